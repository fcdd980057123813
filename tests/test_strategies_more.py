"""Offload, weights in bfloat16, and contrast over a whole step, under every stage of ZeRO on real processes."""

import grid
import pytest
from strategy_toy import Cell, Found, ends, merged, train

pytestmark = pytest.mark.slow

ZERO = ("zero1", "zero2", "zero3")
OFFLOAD = (*grid.SPLIT, "trainer.zero.offload_optimizer=true")
TOWERS = ("objective=[contrastive]",)  # what it does not use is left out of the model


def deviation(expected: Found, found: list[Found]) -> float:
    return grid.deviation(expected.start, expected.state, ends(found))


def lies_in_host_memory(module) -> None:
    """Run on each rank at the end: DeepSpeed has taken the offload, and moved what it names."""
    zero = module.update.zero
    assert getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    assert all(place.flat.device.type == "cpu" for place in module.update.places.values())


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3+parameters"])
def test_what_is_offloaded_moves_as_what_is_not(one_rank, two_ranks, strategy):
    stage, _, parameters = strategy.partition("+")
    more = (*OFFLOAD, "trainer.zero.offload_parameters=true", "trainer.strategy=zero3") if parameters else OFFLOAD
    cell = Cell("video", "partly", stage, accumulate=4, more=more)
    (expected,) = one_rank.run(train, cell._replace(strategy="auto", more=()))
    assert deviation(expected, two_ranks.run(train, cell, None, 0, lies_in_host_memory)) < 1e-4


@pytest.mark.parametrize("strategy", ZERO)
def test_bfloat16_weights_with_float32_masters_move_as_float32_ones_from_the_same_start(one_rank, two_ranks, strategy):
    cell = Cell("video", "partly", strategy, accumulate=4, precision="bf16-true", more=grid.SPLIT)
    found = two_ranks.run(train, cell)
    start = {key: value.float() for key, value in merged([each.start for each in found]).items()}
    (expected,) = one_rank.run(train, cell._replace(strategy="auto", precision="32-true", more=()), start)
    assert deviation(expected, found) < grid.TOLERANCE["bf16-mixed"]


def test_bfloat16_weights_without_masters_move_on_two_ranks_as_on_one(one_rank, two_ranks):
    cell = Cell("video", "partly", "ddp", precision="bf16-true")
    (expected,) = one_rank.run(train, cell._replace(strategy="auto"))
    found = two_ranks.run(train, cell)
    assert deviation(expected, found) < 0.12  # the largest movement is 18 of a weight's last bits, or so


@pytest.mark.parametrize(("pool", "micro_batches"), [("one_rank", 2), ("two_ranks", 4), ("four_ranks", 2)])
@pytest.mark.parametrize("strategy", ZERO)
def test_contrast_over_micro_batches_and_ranks_is_that_of_one_pass(request, one_rank, strategy, pool, micro_batches):
    ranks = request.getfixturevalue(pool)
    cell = Cell("video", strategy=strategy, accumulate=micro_batches, more=grid.SPLIT, system=TOWERS)
    (expected,) = one_rank.run(train, cell._replace(strategy="auto", accumulate=1, more=()))
    assert deviation(expected, ranks.run(train, cell)) < 1e-4
