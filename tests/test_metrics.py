import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.eval import metrics

CASE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.7, 0.6]])
TIES = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0.1, 0.2, 0.8]])
DIAGONAL = torch.arange(3)


def test_similarity_of_equal_candidates_ties_exactly():
    generator = torch.Generator().manual_seed(0)
    for dim in (31, 64, 255):
        query, candidate = torch.randn(2, 1, dim, generator=generator)
        scores = metrics.similarity(query, candidate.repeat(9, 1))
        torch.testing.assert_close(scores[0, 0], query[0] @ candidate[0])
        assert (scores == scores[0, 0]).all()


def test_ranks_equal_the_hand_case_in_both_directions():
    forward, backward = metrics.ranks(CASE, DIAGONAL), metrics.ranks(CASE.T, DIAGONAL)
    assert forward.tolist() == [1, 2, 2]
    assert backward.tolist() == [1, 2, 1]
    assert metrics.recall(forward, 1) == pytest.approx(33.333, abs=1e-3)
    assert metrics.recall(backward, 1) == pytest.approx(66.667, abs=1e-3)
    assert (metrics.median_rank(forward), metrics.median_rank(backward)) == (2, 1)
    assert metrics.mean_rank(forward) == pytest.approx(1.667, abs=1e-3)
    assert metrics.mean_rank(backward) == pytest.approx(1.333, abs=1e-3)


def test_a_tie_is_lost_and_counted_once():
    assert metrics.ranks(TIES, DIAGONAL).tolist() == [2, 1, 1]
    assert metrics.recall(metrics.ranks(TIES, DIAGONAL), 1) == pytest.approx(66.667, abs=1e-3)


def test_a_collapsed_model_ranks_last():
    assert metrics.ranks(torch.ones(2, 5), torch.tensor([0, 4])).tolist() == [5, 5]


def test_scores_that_are_not_numbers_count_against_the_model():
    nan = float("nan")
    similarity = torch.tensor([[nan, 1.0, 2.0], [0.5, nan, 0.1], [nan, nan, nan]])
    assert metrics.ranks(similarity, torch.tensor([0, 0, 2])).tolist() == [3, 2, 3]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5), st.data())
def test_ranks_equal_counting_by_hand(rows, data):
    positive = [data.draw(st.integers(0, 3)) for _ in rows]
    expected = [
        1 + sum(score >= row[own] for place, score in enumerate(row) if place != own)
        for row, own in zip(rows, positive, strict=True)
    ]
    assert metrics.ranks(torch.tensor(rows).float(), torch.tensor(positive)).tolist() == expected


def test_group_max_takes_the_best_caption_of_each_video():
    similarity = torch.tensor([[0.1, 0.7, 0.3, 0.2, 0.0], [-0.5, -0.6, 0.4, 0.9, -0.1]])
    best = metrics.group_max(similarity, torch.tensor([0, 0, 2, 1, 1]), 3)
    torch.testing.assert_close(best, torch.tensor([[0.7, 0.2, 0.3], [-0.5, 0.9, 0.4]]))


def test_group_max_keeps_what_is_not_a_number():
    best = metrics.group_max(torch.tensor([[float("nan"), 0.9, 0.1]]), torch.tensor([0, 0, 1]), 2)
    assert metrics.ranks(best, torch.tensor([0])).tolist() == [2]


def test_dual_softmax_equals_the_formula():
    scores = metrics.dual_softmax(CASE, 10.0)
    for query in range(3):
        for candidate in range(3):
            weights = [2.718281828459045 ** (10 * float(CASE[other, candidate])) for other in range(3)]
            expected = float(CASE[query, candidate]) * weights[query] / sum(weights)
            assert float(scores[query, candidate]) == pytest.approx(expected, rel=1e-9)


def test_dual_softmax_keeps_tiny_scores_apart_at_a_high_scale():
    scores = metrics.dual_softmax(torch.tensor([[0.9, 0.95], [-0.9, -0.95]]), 100.0)
    assert (scores != 0).all()


def test_recall_and_median_with_an_even_number_of_queries():
    ranks = torch.tensor([1, 2, 5, 40])
    assert [metrics.recall(ranks, k) for k in (1, 2, 5, 10)] == [25, 50, 75, 75]
    assert metrics.median_rank(ranks) == 3.5
    assert metrics.mean_rank(ranks) == 12


@pytest.mark.parametrize(("k", "num", "expected"), [(1, 200, 0.5), (10, 200, 5), (10, 7, 100)])
def test_chance_recall_is_k_out_of_n(k, num, expected):
    assert metrics.chance_recall(k, num) == expected


def test_chance_of_one_and_of_all_answers_is_that_of_every_order():
    orders = list(itertools.permutations(range(5)))  # answers 0 and 1 of a query, answer 2 of another
    one = [any(order.index(n) < 3 for n in (0, 1)) + (order.index(2) < 3) for order in orders]
    every = [all(order.index(n) < 3 for n in (0, 1)) + (order.index(2) < 3) for order in orders]
    wanted = [50 * sum(counts) / len(orders) for counts in (one, every)]
    assert metrics.chance_several(3, [2, 1], 5) == pytest.approx(wanted)
    assert metrics.chance_several(9, [2, 1], 5) == (100, 100)


def test_chance_rank_equals_the_mean_over_all_places():
    assert metrics.chance_rank(7) == sum(range(1, 8)) / 7


@pytest.mark.parametrize(
    ("correct", "num", "expected"),
    [
        ([1, 1, 0, 1, 0, 1, 0], 4, [0, 2, 3, 4]),
        ([1, 1, 1, 1, 0], 4, [0, 1, 2, 4]),
        ([0, 0, 0], 2, [0, 1]),
        ([0, 1], 6, [0, 1]),
        ([], 6, []),
    ],
)
def test_mixed_sample_shows_right_and_wrong_ones(correct, num, expected):
    assert metrics.mixed_sample(torch.tensor(correct, dtype=torch.bool), num) == expected


def test_row_without_dual_softmax_leaves_the_column_out():
    assert "dual_softmax" not in metrics.row("a", "b", raw=1.0, num=2, chance=None)
    assert metrics.row("a", "b", raw=1.0, num=2, chance=None, dual_softmax=0.0)["dual_softmax"] == 0.0


def test_shown_scores_are_json():
    scores = [metrics.shown(torch.tensor(value)) for value in (0.123456, float("nan"), float("-inf"))]
    assert json.dumps(scores, allow_nan=False) == "[0.1235, null, null]"
