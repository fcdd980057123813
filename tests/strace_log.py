"""What a process did to files, read from the log of `strace -f -y`, and what a power cut would have taken back."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CALL = re.compile(r"^(\d+) +(\w+)\((.*?)(?: <unfinished \.\.\.>|\) += (-?\d+|\?).*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>.*\) += (-?\d+|\?)")
_OPENED = re.compile(r"<([^<>]*)>")
_QUOTED = re.compile(r'"([^"]*)"')


class Call(NamedTuple):
    """One system call that came back; `paths` are those of its arguments, in their order."""

    thread: str
    kind: str
    paths: tuple[str, ...]
    result: int


class Log(NamedTuple):
    """The calls of all threads of a process."""

    calls: list[Call]  # that came back without an error, in the order in which they did
    counts: dict[str, Counter]  # thread -> kind -> calls that were entered
    was_injected: bool

    def most_by_kind(self, kinds: tuple[str, ...]) -> dict[str, int]:
        """Return the largest number of calls of each kind in any one thread: strace counts by thread."""
        return {
            kind: most for kind in kinds if (most := max((count[kind] for count in self.counts.values()), default=0))
        }

    def is_committed(self, name: str) -> bool:
        """Tell whether a checkpoint got its name and the parent was forced to the disk after that."""
        renamed = False
        for call in self.calls:
            if call.kind == "rename" and call.paths[1].endswith(f"/{name}"):
                renamed = True
            elif call.kind == "fsync" and renamed and call.paths[0].endswith("/checkpoints"):
                return True
        return False


def read_log(path: Path) -> Log:
    """Parse a log."""
    calls, counts, injected, entered = [], {}, False, {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        injected |= "(INJECTED)" in line or "+++ killed by SIGKILL +++" in line
        if found := _CALL.match(line):
            thread, kind, arguments, result = found.groups()
            counts.setdefault(thread, Counter())[kind] += 1
            entered[thread] = (kind, _paths(kind, arguments))
        elif found := _RESUMED.match(line):
            thread, kind, result = found.groups()
        else:
            continue
        if result not in (None, "?") and int(result) >= 0 and entered[thread][0] == kind:
            calls.append(Call(thread, kind, entered[thread][1], int(result)))
    return Log(calls, counts, injected)


def _paths(kind: str, arguments: str) -> tuple[str, ...]:
    if kind in ("write", "fsync"):
        return tuple(_OPENED.findall(arguments)[:1])
    if kind == "unlinkat":
        return (f"{_OPENED.findall(arguments)[0]}/{_QUOTED.findall(arguments)[0]}",)
    return tuple(_QUOTED.findall(arguments))


def order_problems(log: Log, name: str) -> list[str]:
    """Return what is wrong with the order of a save that ended: files, manifest, directory, name, parent, deletion."""
    place: dict[tuple[str, str], list[int]] = {}
    for number, call in enumerate(log.calls):
        for path in call.paths[:1]:
            place.setdefault((call.kind, path), []).append(number)
    (renamed, temporary), *_ = [
        (number, call.paths[0])
        for number, call in enumerate(log.calls)
        if call.kind == "rename" and call.paths[1].endswith(f"/{name}")
    ]
    root, manifest, problems = str(Path(temporary).parent), f"{temporary}/manifest.json", []
    begins = min(place["write", manifest])
    for (kind, path), numbers in place.items():
        if kind == "write" and path.startswith(f"{temporary}/"):
            synced = [number for number in place.get(("fsync", path), ()) if number > max(numbers)]
            limit = renamed if path == manifest else begins
            if not synced or synced[0] > limit:
                what = "the rename" if path == manifest else "the manifest"
                problems.append(f"{Path(path).name} is not forced to the disk before {what}")
    if not any(max(place["write", manifest]) < number < renamed for number in place.get(("fsync", temporary), ())):
        problems.append("the directory is not forced to the disk before the rename")
    parent = [number for number in place.get(("fsync", root), ()) if number > renamed]
    deletions = [n for n, call in enumerate(log.calls) if call.kind == "rename" and "/.deleting-" in call.paths[1]]
    if not parent or any(number < parent[0] for number in deletions):
        problems.append("the parent is not forced to the disk after the rename and before the first deletion")
    return problems


def lose_unsynced(log: Log, root: Path, copy: Path) -> Iterator[Path]:
    """Yield copies of `root` as a power cut at the end of the log might leave it: cut files, lost renames."""
    dirty: set[str] = set()
    pending: list[tuple[str, str]] = []
    for call in log.calls:
        if call.kind == "write":
            dirty |= set(call.paths)
        elif call.kind == "fsync":
            dirty -= set(call.paths)
            pending = [(old, new) for old, new in pending if str(Path(new).parent) != call.paths[0]]
        elif call.kind == "rename":
            old, new = call.paths
            dirty = {new + path.removeprefix(old) if path.startswith(f"{old}/") else path for path in dirty}
            pending.append((old, new))
    for taken_back in ([], pending, pending[:1]):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        for path in dirty:
            _cut(copy / Path(path).relative_to(root) if Path(path).is_relative_to(root) else copy / "none")
        for old, new in reversed(taken_back):
            here, there = copy / Path(new).name, copy / Path(old).name
            if here.exists() and not there.exists():
                here.rename(there)
        yield copy


def _cut(path: Path) -> None:
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
