"""Sigmoid contrast of paired embeddings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.objectives import pairs as blocks
from vlp.objectives.sigmoid_contrast import SigmoidContrast

VALID = torch.tensor([True, False, True, True, False])


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    video, text = (F.normalize(torch.randn(5, 7), dim=1).requires_grad_() for _ in range(2))
    return video, text, torch.tensor(9.0, requires_grad=True)


def by_hand(video: Tensor, text: Tensor, scale: Tensor, bias: float) -> Tensor:
    """Pair by pair, over the valid rows alone."""
    rows = [i for i in range(5) if VALID[i]]
    logits = {(i, j): scale * (video[i] @ text[j]) + bias for i in rows for j in rows}
    return -torch.stack([F.logsigmoid(x if i == j else -x) for (i, j), x in logits.items()]).sum()


@pytest.mark.parametrize("size", [2, 1024])
def test_value_and_gradients_equal_the_hand_written_sum(monkeypatch, size):
    monkeypatch.setattr(blocks, "BLOCK", size)
    ours, reference = pairs(), pairs()
    term, expected = SigmoidContrast(init_bias=-4.0)(*ours, VALID), by_hand(*reference, -4.0)
    torch.testing.assert_close(term.total, expected)
    assert int(term.count) == 3
    term.total.backward(), expected.backward()
    for one, two in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_gradients_agree_with_finite_differences():
    objective = SigmoidContrast(init_bias=-1.0)
    objective(*pairs(), VALID).total.backward()
    with torch.no_grad():
        moved = [SigmoidContrast(init_bias=-1.0 + step)(*pairs(), VALID).total for step in (0.01, -0.01)]
    assert objective.bias.grad.item() == pytest.approx(((moved[0] - moved[1]) / 0.02).item(), rel=1e-3)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_masked_slots_change_neither_value_nor_gradient(garbage):
    clean, dirty = pairs(), pairs()
    with torch.no_grad():
        for x in dirty[:2]:
            x[~VALID] = garbage
    results = [SigmoidContrast()(*inputs, VALID).total for inputs in (clean, dirty)]
    [result.backward() for result in results]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    for one, two in zip(clean, dirty, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)


def test_a_batch_without_valid_clips_gives_zero_and_finite_gradients():
    inputs, objective = pairs(), SigmoidContrast()
    term = objective(*inputs, torch.zeros(5, dtype=torch.bool))
    term.total.backward()
    assert term.total.item() == 0 and int(term.count) == 0
    assert all(not x.grad.any() for x in (*inputs, objective.bias))
