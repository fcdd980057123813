"""Heads that answer questions: value, gradient, and what must not count."""

import pytest
import torch
from eval_toys import BOS, EOS, PAD
from test_video_text import build
from torch import Tensor, nn

from vlp.fusion.cross import CrossFusion
from vlp.layers.grid import PrefixTokens
from vlp.objectives.answers import AnswerClasses
from vlp.objectives.choice import MultipleChoice
from vlp.types import IGNORE_INDEX, Grid, Tokens

LABEL = torch.tensor([2, IGNORE_INDEX, 0, 1])
VALID = torch.tensor([True, True, True, False])
THERE = torch.tensor([[True, True, True], [False] * 3, [True, True, False], [True] * 3])


def answers() -> tuple[nn.Module, Tensor, list]:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, requires_grad=True)
    return AnswerClasses(dim=5, num_answers=6), x, [Tokens(x, torch.ones(4, 2).bool())]


def choice() -> tuple[nn.Module, Tensor, list]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, requires_grad=True)
    return MultipleChoice(dim=5), x, [Tokens(x, THERE)]


def by_hand(objective: nn.Module, x: Tensor) -> Tensor:
    if isinstance(objective, AnswerClasses):
        return -sum(objective.head(x[row, 0]).log_softmax(-1)[LABEL[row]] for row in (0, 2))
    logits = objective.head(x)[..., 0]
    return -(logits[0].log_softmax(-1)[2] + logits[2, :2].log_softmax(-1)[0])  # the third option of row 2 is not there


@pytest.mark.parametrize("make", [answers, choice])
def test_value_and_gradient_equal_the_reference(make):
    objective, x, inputs = make()
    term, reference = objective(*inputs, LABEL, VALID), by_hand(objective, x)
    torch.testing.assert_close(term.total, reference)
    assert int(term.count) == 2 == int(objective.count(LABEL, VALID))
    both = [x, *objective.parameters()]
    for one, two in zip(torch.autograd.grad(term.total, both), torch.autograd.grad(reference, both), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("make", [answers, choice])
def test_clips_that_are_not_asked_change_nothing(make):
    objective, x, inputs = make()
    clean = objective(*inputs, LABEL, VALID).total
    with torch.no_grad():
        x[1] = torch.nan
        x[3] = torch.inf
    dirty = objective(*inputs, LABEL, VALID).total
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(dirty, list(objective.parameters())))


@pytest.mark.parametrize("make", [answers, choice])
def test_nothing_asked_gives_zero_with_gradients_of_zero(make):
    objective, _, inputs = make()
    term = objective(*inputs, torch.full((4,), IGNORE_INDEX), VALID)
    assert float(term.total.detach()) == 0 and all(
        (g == 0).all() for g in torch.autograd.grad(term.total, list(objective.parameters()))
    )


def test_an_option_fused_in_a_row_is_the_option_fused_alone():
    fusion = CrossFusion(dim=4, video_dim=5, text_dim=6, depth=1, num_heads=2, reads=PrefixTokens())
    model = build(5, fusion=fusion).eval()
    video = Grid(torch.randn(2, 3, 1, 1, 5), torch.ones(2, 3).bool(), torch.randn(2, 3, 5))
    ids = torch.tensor([[[BOS, 7, EOS, PAD], [BOS, 8, 9, EOS]], [[BOS, 5, EOS, PAD], [PAD] * 4]])
    fused = model.fused_more(video, ids, ids != PAD)
    assert fused.mask.tolist() == [[True, True], [True, False]] and fused.x.isfinite().all()
    for option in range(2):
        alone = model.fused(video, model.text(ids[:, option], ids[:, option] != PAD)).text.x[:, 0]
        torch.testing.assert_close(fused.x[0, option], alone[0])
