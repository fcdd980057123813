"""Word-patch alignment. Axes: B pairs, L words, S patches, D width."""

from itertools import permutations

import pytest
import torch

from vlp.objectives.word_patch import WordPatch, transport
from vlp.types import Grid, Tokens

ROWS = torch.tensor([[True, True, True, False], [True, False, True, True]])
COLUMNS = torch.tensor([[True] * 6, [True, True, True, True, False, False]])


def pair(seed: int = 0, words=None, real=None):
    generator = torch.Generator().manual_seed(seed)
    text, cells = (torch.randn(2, *shape, generator=generator, requires_grad=True) for shape in ((4, 3), (3, 1, 2, 3)))
    real = torch.tensor([[True, True, True], [True, True, False]]) if real is None else real
    grid = Grid(cells, real, cells.new_zeros(2, 0, 3))
    return Tokens(text, torch.ones(2, 4).bool()), grid, torch.tensor([[0, 1, 2, -1], [0, -1, 1, 2]])


def test_plan_gives_and_gets_equal_shares():
    cost = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(3))
    plan = transport(cost, ROWS, COLUMNS, beta=0.05, num_steps=300)
    torch.testing.assert_close(plan.sum(2), ROWS / ROWS.sum(1, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(1), COLUMNS / COLUMNS.sum(1, keepdim=True), atol=1e-4, rtol=0)


def test_plan_between_as_many_rows_as_columns_costs_what_the_best_pairing_costs():
    cost = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(4))
    real = torch.ones(1, 4).bool()
    plan = transport(cost, real, real, beta=0.05, num_steps=300)
    best = min(sum(float(cost[0, row, column]) for row, column in enumerate(p)) for p in permutations(range(4))) / 4
    assert best - 1e-4 <= float((plan * cost).sum()) <= best + 0.01


def test_term_is_the_true_distance_less_the_swapped_one():
    objective, (text, grid, ids), (other, seen, _) = WordPatch(), pair(0), pair(1)
    valid, found = torch.tensor([True, True]), torch.tensor([True, False])
    term = objective(text, grid, ids, other, seen, ids, found, valid)
    alone = [objective.distance(*each, ids, valid) for each in ((text, grid), (other, seen))]
    torch.testing.assert_close(term.total, (alone[0].sum() - alone[1][0]) / 2)
    assert int(term.count) == 2
    term.total.backward()
    assert text.x.grad[0, :3].abs().min() > 0 and not text.x.grad[0, 3].any() and not text.x.grad[1, 1].any()
    assert not grid.x.grad[1, 2].any() and not other.x.grad[1].any()


def test_like_words_and_patches_have_no_distance_and_gradients_bring_others_together():
    x = torch.nn.functional.normalize(torch.randn(1, 4, 3), dim=-1)
    tokens, ids, valid = Tokens(x, torch.ones(1, 4).bool()), torch.arange(4)[None], torch.tensor([True])
    same = Grid(x.view(1, 2, 1, 2, 3), torch.ones(1, 2).bool(), x.new_zeros(1, 0, 3))
    assert float(WordPatch(beta=0.02, num_steps=200).distance(tokens, same, ids, valid)) < 0.02


def test_nothing_real_gives_zero_with_finite_gradients_whatever_stands_there():
    text, grid, ids = pair(0)
    poisoned = Tokens(torch.full_like(text.x, torch.nan).requires_grad_(), text.mask)
    nothing = torch.tensor([False, False])
    term = WordPatch()(text, grid, ids, text, grid, torch.full_like(ids, -1), nothing, nothing)
    term.total.backward()
    assert float(term.total) == 0 and int(term.count) == 0 and not text.x.grad.any()
    assert torch.isfinite(WordPatch().distance(poisoned, grid, ids, nothing)).all()


def test_half_precision_loses_nothing_of_the_plan():
    text, grid, ids = pair(0)
    valid = torch.tensor([True, True])
    expected = WordPatch().distance(text, grid, ids, valid)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(WordPatch().distance(text, grid, ids, valid), expected)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="beta=0 must be above 0"):
        WordPatch(beta=0)
