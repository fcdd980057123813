"""Attention: one dispatcher for all of vlp, and the two modules built on it.

Axes: B batch, H heads, N tokens (N_q queries, N_k keys), D width, d width of a head.
The only file that knows flash-attn; without it, or off CUDA, PyTorch's scaled_dot_product_attention gives equal values.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def _import_flash() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("flash_attn"), ""
    except ModuleNotFoundError:
        return None, ""
    except ImportError as error:  # installed, but built for another torch: `kernel_name` tells the user
        return None, f" (flash-attn is installed but cannot be imported: {error})"


_flash, _flash_problem = _import_flash()


def kernel_name(device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the name of the attention kernel that runs for this device (the GPU, where there is one) and dtype."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if _flash is not None and _flash_runs(device, dtype):
        return f"flash-attn {_flash.__version__}"
    return f"torch sdpa{_flash_problem}"


@lru_cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # flash-attn 2 refuses older cards


def _flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    return _flash is not None and device.type == "cuda" and dtype in HALF and _is_ampere(device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v with the fastest kernel that applies; same values whichever it is.

    Args:
        q: [B, H, N_q, d]; `k`, `v`: [B, H, N_k, d].
        mask: bool, True = real; keys [B, N_k], or pairs [B, 1, N_q, N_k]. A query with no real key gives zeros.
        causal: query i sees keys 0..i; needs N_q = N_k.
        bias: [1 or B, H, N_q, N_k], added to the logits.

    Returns:
        [B, H, N_q, d] in the dtype of `v`.
    """
    assert not causal or q.shape[2] == k.shape[2], "causal attention needs as many queries as keys"
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a q or k norm leaves float32
    packable = bias is None and (mask is None or (mask.ndim == 2 and not causal))
    head_fits = q.shape[3] <= 256 and q.shape[3] % 8 == 0
    if packable and head_fits and _flash_runs(q.device, q.dtype):
        return _flash_attend(q, k, v, mask, causal, dropout_p)
    return _sdpa_attend(q, k, v, mask, causal, dropout_p, bias)


def _sdpa_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    bias: Tensor | None,
) -> Tensor:
    if mask is None and bias is not None:
        mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    if mask.ndim == 2:
        mask = rearrange(mask, "b k -> b 1 1 k")
    if causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    some = mask.any(-1, keepdim=True)  # [B, 1, N_q or 1, 1]
    # What a kernel does with a row of only masked keys differs (NaN, mean, zero): show it all keys, then clear it.
    seen = mask | ~some
    if bias is not None:
        seen = bias.to(q.dtype).masked_fill(~seen, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout_p)
    return out.masked_fill(~some, 0.0)


def _flash_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    assert _flash is not None
    q, k, v = (rearrange(x, "b h n d -> b n h d") for x in (q, k, v))
    if mask is None:
        out = _flash.flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal)
    else:
        out = attend_packed(q, k, v, mask, partial(_flash.flash_attn_varlen_func, dropout_p=dropout_p))
    return rearrange(out, "b n h d -> b h n d")


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kernel: Callable[..., Tensor]) -> Tensor:
    """Attend with keys packed to their real length, by a variable-length `kernel`.

    Shapes do not depend on the mask, so nothing waits for the device: real keys move to the front, and the rest of the
    buffer belongs to no sequence. A kernel may leave anything there and in rows without keys, forward and backward,
    so both are cleared on the way in (which clears their gradients) and rows without keys on the way out.

    Args:
        q: [B, N_q, H, d]; `k`, `v`: [B, N_k, H, d].
        mask: [B, N_k] bool, True = real.
        kernel: `(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)`, as flash_attn_varlen_func.
    """
    num_clips, num_queries = q.shape[:2]
    lengths = mask.sum(1)  # [B]
    order = mask.flatten().argsort(descending=True, stable=True)  # [B*N_k], real keys first
    real = rearrange(mask.flatten()[order], "n -> n 1 1")
    k, v = (rearrange(x, "b n h d -> (b n) h d")[order].masked_fill(~real, 0.0) for x in (k, v))
    empty = rearrange(lengths == 0, "b -> b 1 1 1")
    starts_q = torch.arange(num_clips + 1, device=q.device, dtype=torch.int32) * num_queries
    starts_k = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed_q = rearrange(q.masked_fill(empty, 0.0), "b n h d -> (b n) h d")
    out = kernel(packed_q, k, v, starts_q, starts_k, num_queries, mask.shape[1])  # [B*N_q, H, d]
    return rearrange(out, "(b n) h d -> b n h d", b=num_clips).masked_fill(empty, 0.0)


def _head_dim(dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}; change one of them.")
    return dim // num_heads


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        _head_dim(dim, num_heads)
        self.dim, self.num_heads, self.dropout, self.causal = dim, num_heads, dropout, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map [B, N, D] to [B, N, D]; `mask` bool as in `attend`."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
        dropout_p = self.dropout if self.training else 0.0
        out = attend(q, k, v, mask=mask, causal=self.causal, dropout_p=dropout_p)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


def silence(attn: SelfAttention) -> None:
    """Let a fresh attention give zero at first: as a residual branch it changes nothing."""
    nn.init.trunc_normal_(attn.qkv.weight, std=0.02, a=-0.04, b=0.04)
    for parameter in (attn.qkv.bias, attn.proj.weight, attn.proj.bias):
        nn.init.zeros_(parameter)


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to a context of another width."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _head_dim(dim, num_heads)
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Map [B, N_q, D] to [B, N_q, D] by the context [B, N_k, D_context]; mask bool as in `attend`."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads).unbind(0)
        dropout_p = self.dropout if self.training else 0.0
        out = attend(q, k, v, mask=context_mask, dropout_p=dropout_p)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
