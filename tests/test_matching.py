"""Binary classification of true and swapped pairs."""

import pytest
import torch
from torch import Tensor

from vlp.objectives.matching import Matching
from vlp.types import Tokens

VALID = torch.tensor([True, True, False, True, True])
FOUND = [torch.tensor([True, False, True, True, False]), torch.tensor([True, True, True, True, False])]


def make() -> tuple[Matching, list[Tensor]]:
    torch.manual_seed(0)
    return Matching(dim=3), [torch.randn(5, 2, 3, requires_grad=True) for _ in range(3)]


def term(matching: Matching, xs: list[Tensor], valid: Tensor = VALID):
    positive, *negatives = (Tokens(x, torch.ones(5, 2, dtype=torch.bool)) for x in xs)
    return matching(positive, negatives, FOUND, valid)


def by_hand(matching: Matching, xs: list[Tensor]) -> Tensor:
    """Clip by clip: the mean of -log p over its pairs that exist."""
    total = torch.zeros(())
    for clip in VALID.nonzero().flatten():
        losses = [-matching.head(xs[0][clip, 0]).sigmoid().log()]
        for x, found in zip(xs[1:], FOUND, strict=True):
            if found[clip]:
                losses.append(-(1 - matching.head(x[clip, 0]).sigmoid()).log())
        total = total + torch.cat(losses).mean()
    return total


def test_value_equals_hand_written_binary_cross_entropy():
    matching, xs = make()
    result = term(matching, xs)
    torch.testing.assert_close(result.total, by_hand(matching, xs))
    assert int(result.count) == 4 == int(matching.count(VALID))


def test_gradient_equals_that_of_the_reference():
    matching, xs = make()
    inputs = [*xs, *matching.parameters()]
    ours = torch.autograd.grad(term(matching, xs).total, inputs)
    reference = torch.autograd.grad(by_hand(matching, xs), inputs)
    for one, two in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_masked_slots_and_missing_swaps_change_nothing(garbage):
    matching, xs = make()
    parameters = list(matching.parameters())
    clean = term(matching, xs).total
    clean_grads = torch.autograd.grad(clean, parameters)
    dirty = [x.detach().clone() for x in xs]
    for x, keep in zip(dirty, [VALID, VALID & FOUND[0], VALID & FOUND[1]], strict=True):
        x[~keep] = garbage
    total = term(matching, dirty).total
    torch.testing.assert_close(total, clean, rtol=0, atol=0)
    for one, two in zip(torch.autograd.grad(total, parameters), clean_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_only_the_first_token_is_read():
    matching, xs = make()
    changed = [torch.cat([x[:, :1], torch.full((5, 1, 3), torch.nan)], dim=1) for x in xs]
    torch.testing.assert_close(term(matching, changed).total, term(matching, xs).total, rtol=0, atol=0)


def test_a_batch_without_valid_clips_gives_zero_gradients():
    matching, xs = make()
    result = term(matching, xs, torch.zeros(5, dtype=torch.bool))
    result.total.backward()
    assert result.total.item() == 0 and all(not p.grad.any() for p in matching.parameters())


def test_score_is_the_logit_that_was_trained():
    matching, xs = make()
    torch.testing.assert_close(matching.score(Tokens(xs[0], VALID)), matching.head(xs[0][:, 0])[:, 0])


def test_negatives_without_their_found_are_refused():
    matching, xs = make()
    positive = Tokens(xs[0], VALID)
    with pytest.raises(ValueError, match=r"inputs.negatives names 1 nodes and inputs.found 2; name one for each"):
        matching(positive, [positive], FOUND, VALID)
