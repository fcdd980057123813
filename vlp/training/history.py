"""The attempts at a run, in `run.json`: where each began and ended, and whether one step keeps killing them.

"history": [{"attempt": 1, "session": "...", "from": 0, "to": 17, "exit_code": 80, "reason": "...", ...}, ...]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp.training.exits import Exit, StopRun
from vlp.training.run_dir import Record
from vlp.training.watchdog import last_beat

_NO_FAILURE = (Exit.DONE, Exit.PREEMPTED)


def begin(record: Record, directory: Path, *, session: str, step: int, world_size: int) -> int:
    """Note that an attempt begins at a step, and return its number."""
    entries = [*closed(record.values, directory)]
    number = record.values.get("attempts", 0) + 1
    entry = {"attempt": number, "session": session, "from": step, "to": step, "exit_code": None, "reason": None}
    record.update(attempts=number, history=[*entries, {**entry, "world_size": world_size}])
    return number


def end(record: Record, *, step: int, code: int, reason: str | None) -> None:
    """Note how the running attempt ended."""
    *before, last = record.values["history"]
    record.update(history=[*before, {**last, "to": step, "exit_code": int(code), "reason": reason}])


def closed(values: Mapping[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Return the attempts; one that was killed before it could write gets its last step from its watchdog's beat."""
    entries = [dict(entry) for entry in values.get("history", [])]
    if entries and entries[-1]["exit_code"] is None and entries[-1]["reason"] is None:
        beat = last_beat(directory, entries[-1]["session"])
        if beat:
            place = f"killed in step {beat['step']}, at '{beat['place']}'"
            entries[-1] |= {"to": max(entries[-1]["from"], beat["step"]), "reason": place}
        entries[-1]["has_trained"] = beat is not None and not beat["first_step"]
    return entries


def refuse_crash_loop(values: Mapping[str, Any], directory: Path, *, hold_after: int | None) -> None:
    """Stop a run that failed `hold_after` times in a row at one step: another try would fail again.

    Raises:
        StopRun: with the reason (exit 76, which no scheduler queues again).
    """
    failures: list[Mapping[str, Any]] = []
    for entry in reversed(closed(values, directory)):
        if entry["exit_code"] in _NO_FAILURE or (failures and entry["to"] != failures[0]["to"]):
            break
        if entry["exit_code"] is not None or entry.get("has_trained"):  # killed while starting: not the run's fault
            failures.append(entry)
    if hold_after is not None and len(failures) >= hold_after:
        code = failures[0]["exit_code"]
        how = "killed" if code is None else f"exit {code}"
        raise StopRun(
            Exit.RESUME_REFUSED,
            f"held: the last {len(failures)} attempts failed at step {failures[0]['to']} ({how}: "
            f"{failures[0]['reason']}); look into it, then raise run.hold_after, or set it to null, and start again.",
        )
