"""Strategies on two and four real processes: the same steps as one, and a state that fits all of them."""

import subprocess
import sys
from pathlib import Path

import grid
import pytest
import torch
from strategy_toy import Cell, Found, ends, train
from tiny_runs import overrides

from vlp.layers.temperature import Temperature

pytestmark = pytest.mark.slow

EMA = (*grid.SPLIT, "optim.ema_decay=0.5")
MIXED = "bf16-mixed"


def share_of_the_grid() -> list[Cell]:
    """Each strategy with each source, and each frozen part and accumulation with each strategy, but not all of all."""
    found = grid.cells(["32-true"])
    return [cell for number, cell in enumerate(found) if number % 11 == 0] + grid.cells([MIXED])[49::31]


def test_a_share_of_the_grid_agrees_with_one_process(one_rank, two_ranks):
    rows = list(grid.run(share_of_the_grid(), one_rank, two_ranks))
    assert {row.cell.strategy for row in rows} == set(grid.STRATEGIES)
    assert [row for row in rows if not row.good] == []


@pytest.fixture(scope="module")
def saved(one_rank, two_ranks) -> dict[str, Found]:
    """The state after two steps under each strategy."""
    found = {"auto": one_rank.run(train, Cell("video", "partly", more=EMA))}
    return found | {z: two_ranks.run(train, Cell("video", "partly", z, more=EMA)) for z in grid.STRATEGIES}


@pytest.mark.parametrize("strategy", grid.STRATEGIES)
def test_the_state_of_every_strategy_is_that_of_one_process(saved, strategy):
    expected, actual = ends(saved["auto"]), ends(saved[strategy])
    assert expected.keys() == actual.keys()
    assert {key.split("/")[0] for key in actual} == {"model", "optimizer", "ema"}
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strategy", grid.STRATEGIES)
def test_low_rank_products_move_the_same_under_every_strategy(one_rank, two_ranks, strategy):
    layers = "adapter.low_rank.layers={model.text_encoder.*.query:1,model.fusion.*.qkv:3}"
    cell = Cell("video", steps=2, more=(*EMA, "adapter=[low_rank]", layers, "adapter.low_rank.rank=2"))
    expected = ends(one_rank.run(train, cell))
    actual = ends(two_ranks.run(train, cell._replace(strategy=strategy)))
    assert any("lora_up" in key for key in actual) and expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [("zero3", "auto"), ("auto", "zero3"), ("ddp", "zero1"), ("zero1", "zero2"), ("zero2", "zero3"), ("zero3", "ddp")],
)
def test_training_continues_under_any_other_strategy(saved, one_rank, two_ranks, before, after):
    cell = Cell("video", "partly", steps=1, more=EMA)
    (expected,) = one_rank.run(train, cell, ends(saved["auto"]), 2)
    pool = one_rank if after == "auto" else two_ranks
    found = pool.run(train, cell._replace(strategy=after), ends(saved[before]), 2)
    assert found[0].losses == pytest.approx(expected.losses, abs=1e-5)
    assert sorted(i for each in found for i in each.clips[0]) == sorted(expected.clips[0])
    for key, value in ends(found).items():
        torch.testing.assert_close(value, expected.state[key], atol=2e-6, rtol=1e-4)


def test_four_ranks_continue_what_two_have_saved_and_one_what_four_have(saved, one_rank, four_ranks):
    cell = Cell("video", "partly", "zero3", steps=1, more=EMA)
    (expected,) = one_rank.run(train, cell._replace(strategy="auto"), ends(saved["auto"]), 2)
    found = four_ranks.run(train, cell, ends(saved["zero2"]), 2)
    assert found[3].losses == pytest.approx(expected.losses, abs=1e-5)
    sizes = [sum(tensor.nbytes for tensor in each.state.values()) for each in found]
    assert min(sizes) > 0.8 * max(sizes)
    further = cell._replace(strategy="auto")
    after = [one_rank.run(train, further, state, 3)[0].losses for state in (ends(found), expected.state)]
    assert after[0] == pytest.approx(after[1], abs=1e-5)


def float16(scale: float) -> tuple[str, ...]:
    return (*grid.SPLIT, f"objective.contrastive.weight={scale}")


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_float16_lowers_its_scale_on_all_ranks_alike_and_continues_with_it(one_rank, two_ranks, strategy):
    cell = Cell("video", strategy=strategy, precision="16-mixed", steps=3, more=float16(3e4))
    found = two_ranks.run(train, cell)
    (expected,) = one_rank.run(train, cell._replace(strategy="auto"))
    assert found[0].scale == found[1].scale == expected.scale
    assert expected.scale < 2.0**16


def hold_bounds(module) -> None:
    """Run on each rank at the end: every copy of the temperature lies at its bound."""
    (part,) = (m for m in module.modules() if isinstance(m, Temperature))
    low, high = part.value_bounds
    with module.alone():
        assert low - 1e-5 <= float(part.value) <= high + 1e-5
    share = module.update.weights()["model.temperature.value"].values
    assert share.numel() == 0 or low - 1e-5 <= float(share) <= high + 1e-5


@pytest.mark.parametrize("strategy", grid.STRATEGIES)
def test_the_temperature_is_held_at_its_bounds(two_ranks, strategy):
    tight = ("model.temperature.init=0.07", "model.temperature.min_temperature=0.0699")
    tight += ("model.temperature.max_temperature=0.07", "optim.lr=100")
    two_ranks.run(train, Cell("video", strategy=strategy, steps=1, more=(*grid.SPLIT, *tight)), None, 0, hold_bounds)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_shards_tokenizer_and_codebooks_are_made_before_the_ranks_meet(tmp_path, strategy):
    scale = [f"+scale=[tiny,{strategy}]", "trainer.devices=2", "trainer.max_steps=1"]
    words = [word for word in overrides(tmp_path, "order", *scale) if word != "+scale=tiny"]
    line = [sys.executable, "tests/prepare_order.py", str(tmp_path / "notes"), *words]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    notes = sorted((tmp_path / "notes").read_text().split("\n"))[1:]
    assert notes == sorted(f"{rank} {name} False" for rank in (0, 1) for name in ("sources", "tokenizer", "fit_parts"))
