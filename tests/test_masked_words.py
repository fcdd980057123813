"""Cross-entropy of masked words."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from vlp.objectives.masked_words import MaskedWords
from vlp.types import IGNORE_INDEX, Tokens

LABELS = torch.tensor([[IGNORE_INDEX, 4, 0], [IGNORE_INDEX] * 3, [6, IGNORE_INDEX, 2]])
MASK = torch.ones(3, 3, dtype=torch.bool)


def make() -> tuple[MaskedWords, Tensor]:
    torch.manual_seed(0)
    return MaskedWords(dim=5, vocab_size=7), torch.randn(3, 3, 5, requires_grad=True)


def by_hand(objective: MaskedWords, x: Tensor) -> Tensor:
    rows = [(x[b, i], LABELS[b, i]) for b in range(3) for i in range(3) if LABELS[b, i] >= 0]
    return -sum(objective.head(row).log_softmax(-1)[label] for row, label in rows)


@torch.no_grad()
def test_head_is_that_of_bert():
    theirs = BertLMPredictionHead(BertConfig(hidden_size=5, vocab_size=7))
    ours = MaskedWords(dim=5, vocab_size=7)
    ours.head[0].load_state_dict(theirs.transform.dense.state_dict())
    ours.head[3].load_state_dict(theirs.decoder.state_dict())
    x = 0.1 * torch.randn(2, 3, 5)  # what its norm sees is small, so that its eps counts
    torch.testing.assert_close(ours.score(Tokens(x, MASK[:2])), theirs(x), atol=1e-6, rtol=1e-5)


def test_value_and_gradient_equal_the_reference():
    objective, x = make()
    term, inputs = objective(Tokens(x, MASK), LABELS), [x, *objective.parameters()]
    reference = by_hand(objective, x)
    torch.testing.assert_close(term.total, reference)
    assert int(term.count) == 4 == int(objective.count(LABELS))
    for one, two in zip(torch.autograd.grad(term.total, inputs), torch.autograd.grad(reference, inputs), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_unmasked_tokens_change_nothing(garbage):
    objective, x = make()
    dirty = x.detach().masked_fill((LABELS == IGNORE_INDEX)[..., None], garbage)
    clean, total = (objective(Tokens(each, MASK), LABELS).total for each in (x, dirty))
    torch.testing.assert_close(total, clean, rtol=0, atol=0)
    parameters = list(objective.parameters())
    for one, two in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(clean, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_nothing_masked_gives_zero_with_gradients_of_zero():
    objective, x = make()
    term = objective(Tokens(x, MASK), torch.full_like(LABELS, IGNORE_INDEX))
    term.total.backward()
    assert term.total.item() == 0 and int(term.count) == 0
    assert all(p.grad is not None and not p.grad.any() for p in [x, *objective.parameters()])
