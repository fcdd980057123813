"""Whether a job whose ranks lost each other (exit 80) is queued again: `python -m vlp.training.requeue OVERRIDES`.

The batch scripts ask here; exit code 0 means yes. A network that failed once is worth another attempt. A run that fails
again and again at the same step is not: it stops, and says why.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlp import config, stages
from vlp.training import stages_run
from vlp.training.exits import Exit, reported
from vlp.training.run_dir import write_json

LIMIT = 3  # attempts that may end at the same step


def main(overrides: Sequence[str]) -> int:
    """Decide for the run that the command line describes; return 0 for yes."""
    return reported(lambda: _decide(overrides))


def _decide(overrides: Sequence[str]) -> int:
    cfg = stages_run.current(overrides) if stages.is_asked(overrides) else config.load(overrides)
    again, why = decide(Path(cfg.paths.runs) / cfg.run.name)
    print(why, file=sys.stderr)
    return Exit.DONE if again else Exit.COLLECTIVE_TIMEOUT


def decide(directory: Path) -> tuple[bool, str]:
    """Note that an attempt lost its ranks, and return whether to try again, and why."""
    record = directory / "run.json"
    step = json.loads(record.read_text(encoding="utf-8")).get("step", 0) if record.exists() else 0
    path = directory / "lost_ranks.json"
    steps = [*(json.loads(path.read_text(encoding="utf-8")) if path.exists() else []), step]
    if directory.is_dir():
        write_json(path, steps)
    times = steps.count(step)
    if times < LIMIT:
        return True, f"the ranks lost each other after step {step}, for the {_nth(times)} time there."
    return False, f"the ranks lost each other {times} times after step {step}; look into it before you start it again."


def _nth(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
