"""Kill a save at every system call it makes, or let the call fail; what can be loaded afterwards must be old or new.

    python tests/kill_save.py           # every point; prints the table of docs/reliability.md
    python tests/kill_save.py 40        # about so many points, spread over all
    python tests/kill_save.py --only "sync, 2 ranks" "async, 2 ranks"     # some rows of the table

Real ranks over gloo save over checkpoints that are there already. One of them is the victim: strace kills it on entry
to the N-th call of a kind, or makes that call return an error, for every kind and every N of an undisturbed save. Then,
as on the next start, the newest valid checkpoint must be that of the old or of the new step, bit for bit; two must be
valid where two were; everything that was not forced to the disk is thrown away and it must still hold; and a next save
works and leaves nothing behind. torch is imported once, and the ranks are forked.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from strace_log import lose_unsynced, read_log

from vlp import dist
from vlp.training import checkpoint, streams
from vlp.training.checkpoint import State
from vlp.training.saver import Saver

CHANGES = ("openat", "mkdir", "write", "fsync", "rename", "unlinkat", "rmdir")  # an error may come back from these
KILLS = (*CHANGES, "mmap", "close", "getdents64", "ftruncate")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
SAVED, REFUSED, LOST_A_PEER, BUG = 0, 3, 4, 5  # how a rank ended
PATIENCE_S = 60.0


class Scenario(NamedTuple):
    """A save over what is there already."""

    name: str
    ranks: int
    background: bool
    before: tuple[int, ...]  # steps
    step: int


class Point(NamedTuple):
    """Where the victim is hit: at the N-th call of a kind in one of its threads, N from 1."""

    scenario: Scenario
    victim: int
    kind: str
    number: int
    action: str  # "signal=KILL" or "error=..."


SCENARIOS = [
    Scenario(f"{'async' if background else 'sync'}, {ranks} rank{'s' * (ranks > 1)}", ranks, background, (1, 2), 3)
    for background in (False, True)
    for ranks in (1, 2, 4)
]
SCENARIOS += [Scenario("the step is there already", 1, False, (1, 2), 2), Scenario("the first save", 1, False, (), 1)]


def state(step: int, rank: int, salt: int = 0) -> State:
    """What a rank saves; a repeated step has another salt."""
    value = float(100 * step + salt)
    tensors = {
        f"model/{rank}.w": torch.full((31, 7), value),
        f"model/{rank}.half": torch.full((5,), value, dtype=torch.bfloat16),
        f"optimizer/exp_avg/{rank}.w": torch.full((31, 7), -value),
    }
    return State(tensors, {"cursor": step, "salt": salt})


def points(scenario: Scenario, directory: Path) -> Iterator[Point]:
    """Yield every point of a scenario, by the calls of a save that nobody disturbs."""
    for victim in {0, scenario.ranks - 1}:
        place = directory / f"probe{victim}"
        _prepare(scenario, place)
        _save(scenario, place, victim, ())
        counts = read_log(place / "strace").most_by_kind(KILLS)
        shutil.rmtree(place)
        for kind, most in sorted(counts.items()):
            for number in range(1, most + 1):
                yield Point(scenario, victim, kind, number, "signal=KILL")
        for kind in CHANGES:
            for number in range(1, counts.get(kind, 0) + 1):
                for error in ERRORS if scenario.ranks == 1 else ERRORS[:2]:
                    yield Point(scenario, victim, kind, number, f"error={error}")


def hit(point: Point, directory: Path) -> list[str] | None:
    """Save, hit the victim, and return what is wrong afterwards; None if the point was not reached."""
    scenario, root = point.scenario, directory / "checkpoints"
    _prepare(scenario, directory)
    inject = ("-e", f"inject={point.kind}:{point.action}:when={point.number}")
    codes, seconds = _save(scenario, directory, point.victim, inject)
    log = read_log(directory / "strace")
    if not log.was_injected:
        return None
    durable = (directory / "durable").exists() or log.is_committed(f"step-{scenario.step:08d}")
    wrong = [f"a rank waited {seconds:.0f} s"] if seconds > PATIENCE_S else []
    wrong += _wrong_codes(point, codes) + _wrong_after(scenario, root, durable=durable)
    for number, variant in enumerate(lose_unsynced(log, root, directory / "lost")):
        wrong += [f"after a power cut ({number}): {line}" for line in _wrong_after(scenario, variant, durable=durable)]
    wrong += _wrong_after_restart(scenario, root)
    return wrong


def _wrong_codes(point: Point, codes: list[int]) -> list[str]:
    if point.action.startswith("signal"):
        others = {code for rank, code in enumerate(codes) if rank != point.victim}
        died = codes[point.victim] == -signal.SIGKILL
        return [] if died and others <= {SAVED, LOST_A_PEER} else [f"the ranks ended with {codes}"]
    return [] if len(set(codes)) == 1 and codes[0] in (SAVED, REFUSED) else [f"the ranks ended with {codes}"]


def _wrong_after(scenario: Scenario, root: Path, *, durable: bool) -> list[str]:
    """Look at the checkpoints as the next start does."""
    stored, refused = checkpoint.newest_valid(root)
    if stored is None:
        return ["nothing can be loaded"] if scenario.before or durable else []
    wrong = [f"a name is there and its checkpoint is not: {refused}"] if refused else []
    is_new = stored.step == scenario.step and stored.facts["salt"] == 1
    allowed = [(scenario.step, 1)] if durable else [(scenario.step, 1), *((step, 0) for step in scenario.before[-1:])]
    if (stored.step, stored.facts["salt"]) not in allowed:
        wrong.append(f"step {stored.step} (salt {stored.facts['salt']}) is the newest one, allowed is {allowed}")
    expected: dict[str, torch.Tensor] = {}
    for rank in range(scenario.ranks):
        expected |= state(stored.step, rank, salt=int(is_new)).tensors
    if stored.keys() != sorted(expected) or any(not torch.equal(stored.get(key), t) for key, t in expected.items()):
        wrong.append(f"step {stored.step} is a mix")
    valid = [path for path in checkpoint.all_steps(root) if _is_valid(path)]
    if len(valid) < min(2, len(scenario.before)):
        wrong.append(f"only {len(valid)} valid")
    return wrong


def _wrong_after_restart(scenario: Scenario, root: Path) -> list[str]:
    checkpoint.save(root, step=scenario.step + 1, state=state(scenario.step + 1, 0), keep=2)
    stored, _ = checkpoint.newest_valid(root)
    names = sorted(path.name for path in root.iterdir())
    if stored is None or stored.step != scenario.step + 1:
        return ["the next save is not the newest one"]
    return [f"left behind: {names}"] if any(name.startswith(".") for name in names) or len(names) > 2 else []


def _is_valid(path: Path) -> bool:
    try:
        return bool(checkpoint.open_checkpoint(path))
    except ValueError:
        return False


def _prepare(scenario: Scenario, directory: Path) -> None:
    """Make the checkpoints that are there before; each layout is written once and copied."""
    template = directory.parent / f"template{scenario.ranks}"
    if not template.exists():
        for step in (1, 2):
            earlier = scenario._replace(background=False, before=(), step=step)
            _save(earlier, template, None, (), salt=0)
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "checkpoints").mkdir(parents=True)
    for step in scenario.before:
        name = f"step-{step:08d}"
        shutil.copytree(template / "checkpoints" / name, directory / "checkpoints" / name)


def _save(
    scenario: Scenario, directory: Path, victim: int | None, inject: tuple[str, ...], salt: int = 1
) -> tuple[list[int], float]:
    """Let the ranks save once, one of them under strace; return their exit codes, and the seconds."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "store").unlink(missing_ok=True)
    ranks = [_fork(scenario, rank, directory, salt) for rank in range(scenario.ranks)]
    for _, ready, _ in ranks:
        os.read(ready, 1)
    started, tracer = time.monotonic(), None
    if victim is not None:
        kinds = ("-e", f"trace={','.join(KILLS)}")
        command = ["strace", "-f", "-y", "-s", "8", "-o", str(directory / "strace"), *kinds, *inject]
        tracer = subprocess.Popen([*command, "-p", str(ranks[victim][0])], stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        tracer.stderr.readline()  # "Process N attached"
    for _, _, go in ranks:
        os.write(go, b"g")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _, _ in ranks]
    for _, ready, go in ranks:
        os.close(ready), os.close(go)
    if tracer is not None:
        tracer.communicate()
    return codes, time.monotonic() - started


def _fork(scenario: Scenario, rank: int, directory: Path, salt: int) -> tuple[int, int, int]:
    """Start a rank that is ready to save; return its id, where it says so, and where it is told to."""
    (ready, say_ready), (hear_go, go) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(say_ready), os.close(hear_go)
        return pid, ready, go
    try:
        signal.alarm(int(PATIENCE_S))
        code = _rank(scenario, rank, directory, salt, say_ready, hear_go)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        code = BUG
    os._exit(code)


def _rank(scenario: Scenario, rank: int, directory: Path, salt: int, say_ready: int, hear_go: int) -> int:
    torch.set_num_threads(1)
    if scenario.ranks > 1:
        store = torch_dist.FileStore(str(directory / "store"), scenario.ranks)
        torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=scenario.ranks)
        dist.exchange(None, dist.side_group())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the warnings of a failed save are expected
    saver = Saver(directory / "checkpoints", keep=2, background=scenario.background)
    os.write(say_ready, b"r"), os.read(hear_go, 1)
    try:
        with streams.tolerant():
            saver.save(scenario.step, state(scenario.step, rank, salt), then=lambda: _note(directory / "durable"))
            saver.settle()
    except RuntimeError:
        return LOST_A_PEER
    return REFUSED if saver.num_failures else SAVED


def _note(path: Path) -> None:
    """Say that the save is durable; the error that strace injects may hit this as well."""
    with suppress(OSError):
        path.touch()


def sweep(scenarios: Sequence[Scenario], limit: int | None = None) -> tuple[Counter, list[str]]:
    """Hit the points, or about `limit` of them; return how many of each row of the table, and what was wrong."""
    counts: Counter = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        every = [point for scenario in scenarios for point in points(scenario, place)]
        chosen = every if limit is None else every[:: max(1, len(every) // limit)]
        for point in chosen:
            wrong = hit(point, place / "run")
            if wrong is None:
                counts[point.scenario.name, "not reached"] += 1
                continue
            counts[point.scenario.name, point.action.partition("=")[0]] += 1
            failures += [f"{point}: {line}" for line in wrong]
    return counts, failures


def main(arguments: list[str]) -> int:
    """Print the table and what was wrong; return 1 if anything was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("limit", type=int, nargs="?")
    parser.add_argument("--only", nargs="*", choices=[scenario.name for scenario in SCENARIOS], metavar="SAVE")
    given = parser.parse_args(arguments)
    chosen = [scenario for scenario in SCENARIOS if given.only is None or scenario.name in given.only]
    started = time.monotonic()
    counts, failures = sweep(chosen, given.limit)
    print("| save | killed at | error at | nothing or a mix loaded |\n|---|---|---|---|")
    for scenario in chosen:
        wrong = sum(repr(scenario) in line for line in failures)
        print(f"| {scenario.name} | {counts[scenario.name, 'signal']} | {counts[scenario.name, 'error']} | {wrong} |")
    missed = sum(count for (_, what), count in counts.items() if what == "not reached")
    total = sum(counts.values()) - missed
    print(f"{total} points in {time.monotonic() - started:.0f} s; {missed} were not reached; {len(failures)} findings")
    print("\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
