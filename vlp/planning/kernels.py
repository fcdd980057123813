"""What a GPU does in place of PyTorch's general way: fused attention, and the casts of autocast.

Axes: B clips, H heads, N tokens, d width of a head.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

META = torch.device("meta")
# What autocast does on CUDA, as far as parts of vlp, timm and transformers use it.
_HALF = {F.linear, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.mm, torch.einsum}
_HALF |= {Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.addmm, torch.baddbmm, F.scaled_dot_product_attention}
_FULL = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.cross_entropy, F.group_norm, torch.norm, Tensor.norm}


class Kernels(TorchFunctionMode):
    """Attention as a fused kernel, and the casts of autocast to `half` where given."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half
        self.weights: dict[int, Tensor] = {}  # autocast casts each weight once a pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if self.half is not None and (func in _HALF or func in _FULL):
            cast = self._to_half if func in _HALF else _to_full
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def __enter__(self) -> "Kernels":
        self.autocast, torch.autocast = torch.autocast, self._switched  # which knows no meta device
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.autocast = self.autocast
        super().__exit__(*error)

    @contextmanager
    def _switched(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any):
        """Stand in for torch.autocast inside a part that wants its own precision."""
        before, self.half = self.half, (dtype or torch.bfloat16) if enabled else None
        try:
            yield
        finally:
            self.half = before

    def _to_half(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(self.half)
        if id(x) not in self.weights:
            self.weights[id(x)] = x.to(self.half)
        return self.weights[id(x)]


def _to_full(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The memory-efficient kernel of CUDA, which keeps queries, keys, values, output and a number for each query."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=META).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(META, q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
