"""Softmax contrast of paired embeddings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlp.objectives import pairs as blocks
from vlp.objectives.contrastive import Contrastive

VALID = torch.tensor([True, False, True, True, False])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor)]
        sizes = [x.untyped_storage().nbytes() // 4 for x in made]
        self.numbers = max([self.numbers, *sizes])
        return out


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    video, text = (F.normalize(torch.randn(5, 7), dim=1).requires_grad_() for _ in range(2))
    return video, text, torch.tensor(9.0, requires_grad=True)


def by_hand(video: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Tensor:
    """Both directions over the valid rows alone, row by row."""
    video, text = video[valid], text[valid]
    total = torch.zeros(())
    for i in range(len(video)):
        logits = scale * (text @ video[i]), scale * (video @ text[i])
        total = total - sum(row[i] - row.exp().sum().log() for row in logits) / 2
    return total


@pytest.mark.parametrize("valid", [VALID, torch.ones(5, dtype=torch.bool)])
def test_value_equals_hand_written_cross_entropy(valid):
    term = Contrastive()(*pairs(), valid)
    torch.testing.assert_close(term.total, by_hand(*pairs(), valid))
    assert int(term.count) == int(valid.sum())


def test_summed_directions_are_twice_their_mean():
    torch.testing.assert_close(
        Contrastive(sum_directions=True)(*pairs(), VALID).total, 2 * Contrastive()(*pairs(), VALID).total
    )


def test_gradient_equals_that_of_the_reference():
    ours, reference = pairs(), pairs()
    Contrastive()(*ours, VALID).total.backward()
    by_hand(*reference, VALID).backward()
    for one, two in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_masked_slots_change_neither_value_nor_gradient(garbage):
    clean, dirty = pairs(), pairs()
    with torch.no_grad():
        for x in dirty[:2]:
            x[~VALID] = garbage
    results = [Contrastive()(*inputs, VALID).total for inputs in (clean, dirty)]
    [result.backward() for result in results]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    for one, two in zip(clean, dirty, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)


def test_a_batch_without_valid_clips_gives_zero_and_finite_gradients():
    inputs = pairs()
    term = Contrastive()(*inputs, torch.zeros(5, dtype=torch.bool))
    term.total.backward()
    assert term.total.item() == 0 and int(term.count) == 0
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


def test_a_single_valid_clip_has_no_negatives_and_no_loss():
    assert Contrastive()(*pairs(), torch.arange(5) == 3).total.item() == 0


def test_logits_are_float32_under_autocast():
    video, text, _ = pairs()
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Contrastive()(video, text, scale, VALID).total
    torch.testing.assert_close(mixed, by_hand(video, text, scale, VALID))


def test_half_precision_embeddings_give_a_float32_loss():
    video, text, scale = pairs()
    assert Contrastive()(video.bfloat16(), text.bfloat16(), scale, VALID).total.dtype == torch.float32


def test_count_needs_no_forward_pass():
    assert int(Contrastive().count(VALID)) == 3


def test_blocks_equal_one_block(monkeypatch):
    whole, cut = pairs(), pairs()
    Contrastive()(*whole, VALID).total.backward()
    monkeypatch.setattr(blocks, "BLOCK", 2)
    Contrastive()(*cut, VALID).total.backward()
    for one, two in zip(whole, cut, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_large_scales_lose_no_digits():
    """At scale 100 a row far below the others must not vanish beside them."""
    video = F.normalize(torch.eye(4) + 0.1 * torch.eye(4).roll(1, 0), dim=1)
    text = torch.cat([video[:3], -video[3:]])
    inputs = video, text, torch.tensor(100.0), torch.ones(4, dtype=torch.bool)
    exact = by_hand(*(x.double() for x in inputs[:3]), inputs[3])
    torch.testing.assert_close(Contrastive()(*inputs).total, exact.float(), rtol=1e-6, atol=0)


def test_memory_stays_below_the_matrix():
    """The largest tensor that is made, forward and backward, is an embedding or a block."""
    video, text = (F.normalize(torch.randn(300, 7), dim=1).requires_grad_() for _ in range(2))
    largest = Largest()
    with pytest.MonkeyPatch.context() as patch, largest:
        patch.setattr(blocks, "BLOCK", 16)
        Contrastive()(video, text, torch.tensor(9.0), torch.ones(300, dtype=torch.bool)).total.backward()
    assert 0 < largest.numbers <= 300 * 7
