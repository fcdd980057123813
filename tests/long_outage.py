"""Storage that is away for as long as you say, under two ranks with the settings of an ordinary run.

    python tests/long_outage.py 15                    # minutes in which requests get no answer; --kind 503: refusals

In the end the ledger must be that of a run on the same shards that nobody disturbed.
"""

import argparse
import tempfile
import time
from pathlib import Path

from forked_ranks import attempt, changed
from test_outage import SAYS, Dark, few_clips, from_disk, from_server, rows, run_in_the_dark, serving


def run(place: Path, *, minutes: float, kind: str) -> str:
    """Return in words what happened."""
    world = few_clips(place / "world")
    near = from_disk(place, world)
    steady = attempt(changed(near, run__name="steady"), log=place / "steady.log", world_size=2)
    with serving(world) as server:
        server.always = dark = Dark(kind, place / "runs" / "dark")
        cfg = changed(from_server(near, world, server, place / "indexes"), run__name="dark")
        back = []

        def wait(ranks: object) -> None:
            time.sleep(60 * minutes)
            back.append(time.monotonic())

        done = run_in_the_dark(cfg, place / "log", dark, wait, world_size=2, before=None)
    lines = [line for line in done.output.splitlines() if SAYS in line]
    same = rows(place / "runs" / "dark") == rows(place / "runs" / "steady")
    limits = f"data.outage_s={cfg.data.outage_s}, trainer.timeout_s={cfg.trainer.timeout_s}"
    return (
        f"away for {minutes:g} min ({kind}), {limits}: "
        f"exit codes {steady.codes} and {done.codes}, {done.ended - back[0]:.0f} s after storage was back; "
        f"{len(lines)} lines about it; steps, losses and weights are {'the same' if same else 'OTHERS'}"
    )


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("minutes", type=float)
    parser.add_argument("--kind", choices=("black hole", "503"), default="black hole")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(run(Path(place), minutes=given.minutes, kind=given.kind))


if __name__ == "__main__":
    main()
