"""A run that stood still for so long that another process took its directory: it writes nothing more there."""

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from forked_ranks import Strike, attempt, toy

from vlp.training.exits import Exit

NEW_OWNER = {"host": "node7/abcd/pid:[1]", "pid": 4, "born": 5, "is_free": False, "beat": 1}


class Lose(NamedTuple):
    """What happens meanwhile: the new owner takes the next number, sweeps, and writes its own record."""

    run: Path

    def __call__(self) -> None:
        (self.run / "lease-000002").write_text(json.dumps(NEW_OWNER).ljust(255) + "\n")
        (self.run / "lease-000001").unlink()
        shutil.rmtree(self.run / "ranks")
        (self.run / "run.json").write_text('{"status": "running"}')
        time.sleep(2)  # the thread of the lease looks once a second


def test_a_run_that_lost_its_directory_ends_with_77_on_all_ranks_and_leaves_the_new_owners_files(place):
    cfg = toy(place, "overtaken", "trainer.max_steps=9", "trainer.checkpoint_every=5", "run.hold_after=null")
    run = place / "runs" / "overtaken"
    done = attempt(cfg, log=place / "overtaken.log", world_size=2, strike=Strike(3, "forward", 0, Lose(run)))
    assert done.codes == [Exit.LOCKED, Exit.LOCKED] == [77, 77], done.output
    assert "was taken over by process 4 on node7" in done.output and "Traceback" not in done.output
    assert (run / "run.json").read_text() == '{"status": "running"}'
    assert not list((run / "checkpoints").glob("*")) and not (run / "lease-000001").exists()
    assert len((run / "metrics.csv").read_text().splitlines()) <= 4
