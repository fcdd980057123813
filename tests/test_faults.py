"""Ranks that die, hang, fail or run out of memory: all of them end in time, with the code and the cause."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import Attempt, Strike, attempt, changed, die, fail, stop, toy
from omegaconf import DictConfig

from vlp.training import ledger, metrics_csv, module, watchdog
from vlp.training.exits import Exit

TIMEOUT_S = 6.0
HANGS = {"trainer__timeout_s": TIMEOUT_S}  # only where a hang is meant: a busy machine can hold a rank up for seconds


@pytest.fixture(scope="module")
def cfg(place: Path) -> DictConfig:
    return toy(place, "x", "trainer.max_steps=4", "trainer.timeout_s=100")


def struck(place: Path, cfg: DictConfig, name: str, strike: Strike, **values) -> tuple[Attempt, Path]:
    done = attempt(
        changed(cfg, run__name=name, **values), log=place / f"{name}.log", world_size=2, strike=strike, patience_s=60
    )
    return done, place / "runs" / name


def say_and_stop() -> None:
    print("struck at", time.monotonic(), flush=True)
    stop()


def hang() -> None:
    time.sleep(1000)


def be_late() -> None:
    time.sleep(1.6 * TIMEOUT_S)


def lack_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_other_leaves_its_stacks_and_exit_80(place, cfg, rank):
    done, run = struck(place, cfg, f"killed{rank}", Strike(2, "backward", rank, die))
    other = 1 - rank
    assert done.codes[rank] == -9 and done.codes[other] == Exit.COLLECTIVE_TIMEOUT == 80
    assert done.output.count("stopped: ") == 1 and f"rank {rank} (process " in done.output
    assert " died; it was last seen in step " in done.output
    assert "File " in (run / "crash" / f"rank-{other}.txt").read_text()
    again = attempt(changed(cfg, run__name=run.name), log=place / "again.log", world_size=2)
    assert again.codes == [0, 0] and "Traceback" not in done.output + again.output


def test_a_stopped_rank_is_named_within_the_timeout_and_ten_seconds(place, cfg):
    done, run = struck(place, cfg, "stopped", Strike(2, "forward", 1, say_and_stop), **HANGS)
    assert done.codes == [80, -9]  # a stopped process cannot leave by itself: rank 0 ended it
    assert done.ended - float(re.search("struck at (.*)", done.output)[1]) < TIMEOUT_S + 10
    assert "rank 1 " in done.output and "it is stopped or frozen; it was last seen in step" in done.output
    assert json.loads((run / "run.json").read_text())["exit_code"] == 80


def test_a_hung_rank_is_told_from_those_that_wait_for_it(place, cfg):
    done, run = struck(place, cfg, "hung", Strike(2, "forward", 1, hang), **HANGS)
    assert done.codes == [80, 80], done.output
    assert "rank 1 hangs in step 1, at 'forward'" in done.output
    assert "hang" in (run / "crash" / "rank-1.txt").read_text()
    assert "distributed.py" in (run / "crash" / "rank-0.txt").read_text()


def test_a_slow_evaluation_and_a_slow_save_are_no_hang(place, cfg):
    done, _ = struck(place, cfg, "slow", Strike(2, "save", 0, be_late), **HANGS)
    assert done.codes == [0, 0], done.output


def test_an_exception_on_one_rank_ends_all_with_its_code_and_is_said_once(place, cfg):
    done, run = struck(place, cfg, "failed", Strike(2, "optimizer", 1, fail))
    assert done.codes == [70, 70]
    assert done.output.count("Traceback") == 1 and done.output.count("stopped: RuntimeError: struck") == 1
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 70) and "struck" in record["history"][0]["reason"]


def test_a_rank_without_memory_ends_all_with_a_summary_and_without_traceback(place, cfg):
    done, _ = struck(place, cfg, "memory", Strike(2, "forward", 1, lack_memory))
    assert done.codes == [70, 70]
    assert "out of memory (host peak" in done.output and "data.batch_size" in done.output
    assert "Traceback" not in done.output


def poison(rank: int) -> None:
    """Let the loss of rank 1 be no number in its fourth step."""
    combine, calls = module.combine, []

    def bad(*arguments):
        calls.append(1)
        combined = combine(*arguments)
        if len(calls) != 6:  # the first two look and rehearse
            return combined
        means = {name: mean * torch.nan for name, mean in combined.means.items()}
        return combined._replace(loss=combined.loss * torch.nan, means=means)

    if rank == 1:
        module.combine = bad


@pytest.mark.parametrize(
    ("policy", "codes", "steps"), [("stop", [79, 79], 3), ("skip", [0, 0], 4), ("rewind", [0, 0], 4)]
)
def test_a_loss_that_is_not_finite_on_one_rank_moves_no_weight_on_any(place, cfg, policy, codes, steps):
    values = {"run__name": f"nan-{policy}", "trainer__nan_policy": policy}
    done = attempt(changed(cfg, **values), log=place / f"nan-{policy}.log", world_size=2, before=poison)
    run = place / "runs" / f"nan-{policy}"
    assert done.codes == codes, done.output
    bad = json.loads((run / "bad_steps.jsonl").read_text())
    assert bad["step"] == 3 and bad["ranks"] == [1] and bad["terms"][1] == {"contrastive": "nan"}
    assert {sample["rank"] for sample in bad["samples"]} == {1}
    assert all(sample["key"].startswith("train-") and sample["shard"].endswith(".tar") for sample in bad["samples"])
    rows = {row["step"]: row for row in ledger.read(run / "ledger.jsonl") if "step" in row}
    assert len(rows) == steps and (policy == "stop" or rows[4]["weights"] == rows[3]["weights"])


def be_slow(rank: int) -> None:
    """Let rank 1 take a second longer in each forward pass, more than other work on the machine takes from rank 0."""
    mark = watchdog.Watchdog.mark

    def slower(self, place, *, step=None):
        mark(self, place, step=step)
        if rank == 1 and place == "forward":
            time.sleep(1.0)

    watchdog.Watchdog.mark = slower


def test_a_slow_rank_is_reported_once_with_its_split_of_the_step(place, cfg):
    done = attempt(changed(cfg, run__name="slow_rank"), log=place / "slow_rank.log", world_size=2, before=be_slow)
    (line,) = [line for line in done.output.splitlines() if line.startswith("rank 1 is slow at step ")]
    compute, waiting = (float(re.search(f"{name} ([0-9.]+)", line)[1]) for name in ("compute", "for other ranks"))
    assert done.codes == [0, 0] and compute >= 0.9 and waiting < compute


def die_slowly() -> None:
    """Die once the watchdog has written down the step."""
    time.sleep(2)
    die()


def test_steps_that_are_done_again_are_announced_and_carry_the_number_of_their_attempt(place, cfg):
    again = changed(cfg, run__name="done_again", trainer__checkpoint_every=2)
    attempt(again, log=place / "again1.log", strike=Strike(4, "save", 0, die_slowly))
    done = attempt(again, log=place / "again2.log")
    assert done.codes == [0] and re.search("continuing at step 2: [12] later steps were not saved", done.output)
    rows = metrics_csv.read(place / "runs/done_again/metrics.csv")
    found = [(row["step"], row["attempt"]) for row in rows if "train/loss" in row]
    assert found == [("1", "1"), ("2", "1"), ("3", "2"), ("4", "2")]


def jump(rank: int) -> None:
    """Set the clock of rank 0 a day forward and that of rank 1 a day back, after the second step."""
    mark, clock = watchdog.Watchdog.mark, time.time

    def jumping(self, place, *, step=None):
        mark(self, place, step=step)
        if self.step == 2:
            time.time = lambda: clock() + (86400, -86400)[rank]

    watchdog.Watchdog.mark = jumping


def test_clocks_that_jump_by_a_day_change_no_row_and_end_nothing(place, cfg):
    values = {"trainer__checkpoint_every": 1, "trainer__max_time_s": 3000.0}
    runs = {}
    for name, before in (("steady", None), ("jumping", jump)):
        log = place / f"{name}.log"
        done = attempt(changed(cfg, run__name=name, **values), log=log, world_size=2, before=before)
        assert done.codes == [0, 0], done.output
        runs[name] = [row for row in ledger.read(place / "runs" / name / "ledger.jsonl") if "step" in row]
    kept = [[(row["step"], row["ids"], row["loss"], row["weights"]) for row in rows] for rows in runs.values()]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    table = metrics_csv.read(place / "runs/jumping/metrics.csv")
    times = [float(row["time/step_s"]) for row in table if "train/loss" in row]
    assert all(0 < seconds < 60 for seconds in times)


def flip(rank: int) -> None:
    """Flip the lowest bit of one weight of rank 1 after its second step."""
    note = module.Pretraining.note

    def note_and_flip(self, *arguments):
        note(self, *arguments)
        if rank == 1 and self.cursor == 2:
            weight = next(self.parameters()).data.view(torch.int32).view(-1)
            weight[0] ^= 1

    module.Pretraining.note = note_and_flip


def test_a_flipped_bit_of_one_rank_stops_the_run_before_the_next_commit(place, cfg):
    values = {"run__name": "flipped", "trainer__check_replicas_every": 100}
    done = attempt(changed(cfg, **values), log=place / "flipped.log", world_size=2, before=flip)
    assert done.codes == [83, 83] and "after step 2 the weights of rank 1 differ" in done.output
    assert [path.name for path in (place / "runs/flipped/checkpoints").iterdir()] == ["step-00000001"]
