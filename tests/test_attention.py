"""Attention against an explicit softmax. Axes: B batch, H heads, N_q queries, N_k keys, d width of a head."""

import math

import pytest
import torch
from torch import Tensor

from vlp.layers.attention import CrossAttention, SelfAttention, attend, attend_packed, kernel_name

B, H, N_Q, N_K, D = 2, 3, 5, 7, 8
MASK = torch.tensor([[True, True, False, True, False, False, True], [False, True, True, True, True, True, False]])


def qkv(num_queries: int = N_Q, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, num_queries, D), (B, H, N_K, D), (B, H, N_K, D)]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`mask` [B, 1, N_q, N_k]; a row without keys is zero."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(D)
    weights = torch.where(mask, scores.exp(), 0.0)
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-9), v)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def segments(q, k, v, starts_q, starts_k, max_q, max_k):
    """The contract of flash_attn_varlen_func in plain torch, with rubbish wherever the contract leaves results open."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    k.register_hook(lambda g: g.index_fill(0, torch.arange(int(starts_k[-1]), len(k)), math.nan))
    no_keys = (starts_k.diff() == 0).repeat_interleave(max_q)
    q.register_hook(lambda g: g.masked_fill(no_keys[:, None, None], math.nan))
    out = torch.full_like(q, math.nan)
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        assert max_q >= q[rows].shape[0] and max_k >= k[keys].shape[0]
        if k[keys].shape[0]:
            scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) / math.sqrt(D)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
    return out


def test_attend_without_mask_equals_softmax():
    q, k, v = qkv()
    everything = torch.ones(B, 1, N_Q, N_K, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v), reference(q, k, v, everything))


def test_attend_with_key_mask_equals_softmax_with_gradients():
    inputs = qkv()
    ours, explicit = attend(*inputs, mask=MASK), reference(*inputs, MASK[:, None, None])
    torch.testing.assert_close(ours, explicit)
    torch.testing.assert_close(gradients(ours, inputs), gradients(explicit, inputs))


def test_attend_with_pair_mask_equals_softmax():
    q, k, v = qkv()
    pairs = torch.rand(B, 1, N_Q, N_K, generator=torch.Generator().manual_seed(1)) < 0.5
    pairs[0, 0, 2] = False  # one query sees nothing
    torch.testing.assert_close(attend(q, k, v, mask=pairs), reference(q, k, v, pairs))


@pytest.mark.parametrize("mask", [None, MASK])
def test_attend_causal_equals_softmax(mask):
    q, k, v = qkv(N_K)
    seen = torch.ones(N_K, N_K, dtype=torch.bool).tril()[None, None]
    seen = seen if mask is None else seen & mask[:, None, None]
    torch.testing.assert_close(attend(q, k, v, mask=mask, causal=True), reference(q, k, v, seen.expand(B, -1, -1, -1)))


def test_attend_without_any_real_key_gives_zeros_and_finite_gradients():
    inputs = qkv()
    mask = MASK.clone()
    mask[1] = False
    out = attend(*inputs, mask=mask)
    assert out[1].abs().max() == 0 and out[0].abs().min() > 0
    assert all(g.isfinite().all() and g[1].abs().max() == 0 for g in gradients(out, inputs))


def test_attend_with_mixed_precision_returns_the_dtype_of_the_values():
    q, k, v = qkv()  # a norm on q and k leaves float32 under autocast
    assert attend(q, k, v.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("empty", [False, True])
def test_packed_attention_equals_masked_with_gradients(empty):
    inputs = qkv()
    mask = MASK & ~torch.tensor([[False], [empty]])
    q, k, v = (x.transpose(1, 2) for x in inputs)
    packed = attend_packed(q, k, v, mask, segments).transpose(1, 2)
    masked = attend(*inputs, mask=mask)
    torch.testing.assert_close(packed, masked)
    torch.testing.assert_close(gradients(packed, inputs), gradients(masked, inputs))


def test_self_attention_padding_does_not_change_real_tokens():
    torch.manual_seed(0)
    attention = SelfAttention(dim=12, num_heads=3)
    x = torch.randn(B, N_K, 12)
    other = torch.where(MASK[..., None], x, 9.0)
    torch.testing.assert_close(attention(x, MASK)[MASK], attention(other, MASK)[MASK])


def test_cross_attention_padding_of_the_context_does_not_change_the_result():
    torch.manual_seed(0)
    attention = CrossAttention(dim=12, context_dim=10, num_heads=3)
    x, context = torch.randn(B, N_Q, 12), torch.randn(B, N_K, 10)
    other = torch.where(MASK[..., None], context, 9.0)
    assert attention(x, context).shape == (B, N_Q, 12)
    torch.testing.assert_close(attention(x, context, MASK), attention(x, other, MASK))


def test_self_attention_dropout_acts_in_training_only():
    attention, x = SelfAttention(dim=12, num_heads=3, dropout=0.5), torch.randn(B, N_K, 12)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_attention_of_indivisible_width_names_both_numbers():
    with pytest.raises(ValueError, match=r"dim=10.*num_heads=3"):
        SelfAttention(dim=10, num_heads=3)


def test_kernel_name_on_cpu_is_sdpa():
    assert kernel_name(torch.device("cpu"), torch.bfloat16).startswith("torch sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", [None, MASK, MASK & torch.tensor([[True], [False]])])
def test_attend_on_gpu_in_half_precision_equals_softmax(mask):
    inputs = qkv(device="cuda", dtype=torch.bfloat16)
    seen = torch.ones(B, N_K, dtype=torch.bool) if mask is None else mask
    exact = [x.detach().float().requires_grad_() for x in inputs]
    explicit = reference(*exact, seen.cuda()[:, None, None].expand(-1, -1, N_Q, -1))
    ours = attend(*inputs, mask=None if mask is None else mask.cuda())
    torch.testing.assert_close(ours.float(), explicit, atol=2e-2, rtol=2e-2)
    for mine, theirs in zip(gradients(ours, inputs), gradients(explicit, exact), strict=True):
        torch.testing.assert_close(mine.float(), theirs, atol=5e-2, rtol=5e-2)
