"""Collectives of the losses, on one process and on two real ones."""

import pytest
import torch
from ranks import on_ranks

from vlp import dist

NUM_TOKENS = (2, 5)  # of the two ranks


def rows(rank: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def work(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    x = rows(rank).requires_grad_()
    gathered = dist.gather(x)
    (gathered.square().sum() * (rank + 1)).backward()
    turned = torch.arange(6.0).view(2, 3).T + 10 * rank  # [3, 2], strides of the transpose
    trained = turned.clone(memory_format=torch.preserve_format).requires_grad_()
    tokens = (torch.ones(3, NUM_TOKENS[rank], 4) * (rank + 1)).requires_grad_()
    padded, mask = dist.gather_tokens(tokens, torch.ones(3, NUM_TOKENS[rank], dtype=torch.bool))
    padded.sum().backward()
    num_frames, num_prefix = ((2, 1), (5, 5))[rank]
    cells = (torch.ones(3, num_frames, 2, 2, 4) * (rank + 1)).requires_grad_()
    grid = dist.gather_grid(cells, torch.ones(3, num_frames, dtype=torch.bool), torch.ones(3, num_prefix, 4))
    (grid[0] * (rank + 1)).sum().backward()
    return {
        "cells": grid[0],
        "frame_mask": grid[1],
        "prefix": grid[2],
        "cells_grad": cells.grad,
        "gathered": gathered,
        "grad": x.grad,
        "turned": dist.gather(turned),
        "turned_trained": dist.gather(trained),
        "bools": dist.gather(torch.tensor([rank == 0, True])),
        "keys": dist.gather(torch.tensor([2**62 + rank])),
        "padded": padded,
        "mask": mask,
        "tokens_grad": tokens.grad,
        "sum": dist.sum_over_ranks(torch.tensor([rank + 1.0, 5.0], requires_grad=True)),
        "max": dist.max_over_ranks(torch.tensor([rank, 3 - rank])),
        "who": torch.tensor([dist.rank(), dist.world_size()]),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_ranks(work, 2, tmp_path_factory.mktemp("ranks"))


def test_gather_concatenates_in_rank_order(results):
    for result in results:
        torch.testing.assert_close(result["gathered"], torch.cat([rows(0), rows(1)]), rtol=0, atol=0)


def test_gather_sums_the_gradients_of_all_ranks(results):
    for rank, result in enumerate(results):  # d/dx of (1 + 2) * x^2
        torch.testing.assert_close(result["grad"], 6 * rows(rank))


@pytest.mark.parametrize("name", ["turned", "turned_trained"])
def test_gather_keeps_rows_of_transposed_tensors(results, name):
    expected = torch.tensor([[0.0, 3], [1, 4], [2, 5]])
    for result in results:
        torch.testing.assert_close(result[name], torch.cat([expected, expected + 10]), rtol=0, atol=0)


def test_gather_keeps_bools_and_large_integers(results):
    for result in results:
        assert result["bools"].tolist() == [True, True, False, True]
        assert result["keys"].tolist() == [2**62, 2**62 + 1]


def test_gather_tokens_pads_to_the_longest(results):
    for result in results:
        assert result["padded"].shape == (6, 5, 4) and result["mask"].sum(1).tolist() == [2] * 3 + [5] * 3
        assert result["padded"][0, :, 0].tolist() == [1, 1, 0, 0, 0]


def test_gather_tokens_returns_gradients_in_the_own_length(results):
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["tokens_grad"], torch.full((3, NUM_TOKENS[rank], 4), 2.0))


def test_gather_grid_pads_frames_and_prefix_to_the_longest_and_returns_gradients(results):
    for rank, result in enumerate(results):
        cells, mask, prefix = result["cells"], result["frame_mask"], result["prefix"]
        assert cells.shape == (6, 5, 2, 2, 4) and prefix.shape == (6, 5, 4)
        assert (
            mask.sum(1).tolist() == [2] * 3 + [5] * 3 and cells[:, :, 0, 0, 0].sum(1).tolist() == [2.0] * 3 + [10.0] * 3
        )
        torch.testing.assert_close(result["cells_grad"], torch.full((3, (2, 5)[rank], 2, 2, 4), 3.0))


def test_reductions_agree_on_all_ranks(results):
    for rank, result in enumerate(results):
        assert result["sum"].tolist() == [3, 10] and result["max"].tolist() == [1, 3]
        assert result["who"].tolist() == [rank, 2]


def test_one_process_gets_its_input_back():
    x, mask = torch.randn(2, 3, 5, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    assert dist.gather(x) is x and dist.gather_tokens(x, mask) == (x, mask)
    assert dist.gather_grid(x, mask, x) == (x, mask, x)
    assert (dist.rank(), dist.world_size()) == (0, 1)


@pytest.mark.parametrize("reduce", [dist.sum_over_ranks, dist.max_over_ranks])
def test_reductions_on_one_process_have_no_gradient(reduce):
    x = torch.ones(2, requires_grad=True)
    assert not reduce(x).requires_grad and reduce(x).tolist() == [1, 1]
