"""Whether a run directory without a valid checkpoint may begin at step 0, or has lost what it had.

`run.json` says whether anything was committed, but it is a hint: it may be gone or damaged, and so may all the rest. A
run begins at step 0 only where nothing speaks against it.
"""

from collections.abc import Sequence
from pathlib import Path

from vlp.training.exits import Exit, StopRun
from vlp.training.run_dir import Record


def refuse_silent_start(directory: Path, record: Record, refused: Sequence[str]) -> None:
    """Stop if the directory shows that there was progress, or cannot show that there was none.

    Args:
        directory: of the run. record: its run.json. refused: a line for each checkpoint that is not valid.

    Raises:
        StopRun: with what was found (exit 82).
    """
    found = _why_not(directory, record, refused)
    if found is not None:
        raise StopRun(
            Exit.NO_VALID_CHECKPOINT,
            f"{directory / 'checkpoints'} holds no valid checkpoint, but {found}. Put a checkpoint back from a copy, "
            "or choose another run.name to train from the start.",
        )


def _why_not(directory: Path, record: Record, refused: Sequence[str]) -> str | None:
    if record.values.get("committed"):
        return f"the run had reached step {record.values.get('step')}"
    if refused:
        return f"{len(refused)} that cannot be used"
    if record.damaged:
        return "run.json is damaged and cannot say whether there was one"
    others = [name for name in ("config.yaml", "metrics.csv", "graph.json") if (directory / name).exists()]
    others += sorted(path.name for path in (directory / "checkpoints").glob("step-*"))
    if not record.values and others:
        return f"{others[0]} is there and run.json, which would say how far the run came, is not"
    return None
