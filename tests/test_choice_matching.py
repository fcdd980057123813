"""Softmax over the true pair and others."""

import pytest
import torch
from torch import Tensor

from vlp.objectives.choice_matching import ChoiceMatching
from vlp.types import Tokens

VALID = torch.tensor([True, True, False, True])
FOUND = [torch.tensor([True, True, True, False]), torch.tensor([True, False, True, False])]


def make() -> tuple[ChoiceMatching, list[Tensor]]:
    torch.manual_seed(0)
    return ChoiceMatching(dim=3, temperature=0.5).eval(), [torch.randn(4, 2, 3, requires_grad=True) for _ in range(3)]


def term(objective, xs):
    positive, *negatives = (Tokens(x, torch.ones(4, 2, dtype=torch.bool)) for x in xs)
    return objective(positive, negatives, FOUND, VALID)


def test_value_equals_a_softmax_over_the_pairs_that_exist():
    objective, xs = make()
    logits = [objective.head(x[:, 0])[:, 0] / 0.5 for x in xs]
    first = -torch.stack([each[0] for each in logits]).log_softmax(0)[0]
    second = -torch.stack([each[1] for each in logits[:2]]).log_softmax(0)[0]
    result = term(objective, xs)
    torch.testing.assert_close(result.total, first + second)
    assert int(result.count) == 2 == int(objective.count(VALID, FOUND))


def test_nothing_flows_to_clips_that_do_not_count_and_nan_there_spoils_nothing():
    objective, xs = make()
    with torch.no_grad():
        for x in xs:
            x[2:] = torch.nan
    term(objective, xs).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())
    assert not xs[0].grad[2:].any() and xs[0].grad[:2, 0].any() and not xs[2].grad[1].any()


def test_score_is_the_logit_of_a_pair():
    objective, xs = make()
    tokens = Tokens(xs[0], torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(objective.score(tokens), objective.head(xs[0][:, 0])[:, 0] / 0.5)


def test_wiring_of_different_lengths_and_a_temperature_of_zero_are_refused():
    objective, xs = make()
    with pytest.raises(ValueError, match=r"names 1 nodes and inputs\.found 2"):
        objective(Tokens(xs[0], VALID), [Tokens(xs[1], VALID)], FOUND, VALID)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        ChoiceMatching(dim=3, temperature=0)
