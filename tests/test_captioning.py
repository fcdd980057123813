"""Cross-entropy of the next token."""

import pytest
import torch
from torch import Tensor

from vlp.objectives.captioning import Captioning

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
VALID = torch.tensor([True, False, True])


def make() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 5, 7, requires_grad=True), torch.randint(7, (3, 5))


def by_hand(logits: Tensor, text_ids: Tensor, smoothing: float) -> Tensor:
    total = torch.zeros(())
    for b, i in ((0, 0), (0, 1), (0, 2), (2, 0)):  # position i predicts token i + 1
        log_probs = logits[b, i].log_softmax(-1)
        total = total - (1 - smoothing) * log_probs[text_ids[b, i + 1]] - smoothing * log_probs.mean()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_value_and_gradient_equal_the_reference(smoothing):
    logits, text_ids = make()
    term = Captioning(label_smoothing=smoothing)(logits, text_ids, MASK, VALID)
    reference = by_hand(logits, text_ids, smoothing)
    torch.testing.assert_close(term.total, reference)
    assert int(term.count) == 4 == int(Captioning().count(MASK, VALID))
    (ours,), (other,) = torch.autograd.grad(term.total, logits), torch.autograd.grad(reference, logits)
    torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_and_masked_slots_change_nothing(smoothing):
    logits, text_ids = make()
    keep = torch.zeros(3, 5, dtype=torch.bool)
    keep[0, :3] = keep[2, :1] = True
    dirty = logits.detach().masked_fill(~keep[..., None], torch.nan).requires_grad_()
    objective, other_ids = Captioning(label_smoothing=smoothing), text_ids.masked_fill(~MASK, 3)
    clean, total = objective(logits, text_ids, MASK, VALID).total, objective(dirty, other_ids, MASK, VALID).total
    torch.testing.assert_close(total, clean, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, dirty), torch.autograd.grad(clean, logits), rtol=0, atol=0)


def test_the_first_token_is_never_predicted():
    logits, text_ids = make()
    other = text_ids.clone()
    other[:, 0] = (text_ids[:, 0] + 1) % 7
    one, two = (Captioning()(logits, ids, MASK, VALID).total for ids in (text_ids, other))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_nothing_to_predict_gives_zero_with_gradients_of_zero():
    logits, text_ids = make()
    term = Captioning()(logits, text_ids, MASK, torch.zeros(3, dtype=torch.bool))
    term.total.backward()
    assert term.total.item() == 0 and int(term.count) == 0 and not logits.grad.any()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_is_no_share_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing=.* is not a share"):
        Captioning(label_smoothing=smoothing)
