"""The directory of a run: its lock, its record, and what may change between attempts.

runs/NAME/
    config.yaml     the resolved config            run.json     status, command, parts, sources, environment
    graph.json      the plan of a step             metrics.csv  losses and rates by step
    tokenizer.json  if it was trained here         eval/        scores and film strips
    checkpoints/    see vlp.training.checkpoint    report.html
"""

import fcntl
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from vlp.training.exits import Exit, StopRun

FREE = (  # sections and keys that may differ when a run continues: they change no number that it computes
    "run.resume",
    "run.stop_after",
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_async",
    "trainer.progress_bar",
    "trainer.num_threads",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.bad_sample_budget",
    "trainer.checkpoint_activations",
    "trainer.compile",
    "data.num_workers",
    "data.videos",  # the fingerprint of the shards decides, not where they lie
    "data.captions",
    "data.index_dir",
    "data.cache_dir",
    "data.cache_gib",
    "data.sources",
    "logger",
    "eval",
    "paths",
    "cluster",  # only plan.py reads it
)


def create(directory: Path) -> None:
    """Make the directory, readable for its owner and group.

    Raises:
        StopRun: it cannot be written, or others could plant files in it (exit 73).
    """
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        _refuse_foreign(directory)
        probe = directory / f".probe-{os.getpid()}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        probe.unlink()
    except OSError as error:
        message = f"the run directory {directory} cannot be written ({error.strerror}); set paths.runs or run.name."
        raise StopRun(Exit.CANNOT_CREATE, message) from None


def _refuse_foreign(directory: Path) -> None:
    """A link that somebody else has put on shared storage would let us write where they want."""
    mode = os.lstat(directory).st_mode
    if stat.S_ISLNK(mode):
        message = f"the run directory {directory} is a link; name the real directory (paths.runs may be a link)."
        raise StopRun(Exit.CANNOT_CREATE, message)
    if mode & stat.S_IWOTH:
        message = f"everybody can write to the run directory {directory}; run chmod o-w on it."
        raise StopRun(Exit.CANNOT_CREATE, message)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Own the run directory; the operating system frees the lock when the process dies, however it dies.

    A POSIX lock, because it is the process's own: `flock` would live on in forked loader workers that outlive a kill.

    Raises:
        StopRun: another process owns it (exit 77).
    """
    file = (directory / "run.lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _first_line(file)
            message = f"{directory} is in use by {owner or 'another process'}; stop it or choose another run.name."
            raise StopRun(Exit.LOCKED, message) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Record:
    """`run.json`, rewritten as a whole at each update; keeps what earlier attempts wrote."""

    def __init__(self, directory: Path, *, writes: bool) -> None:
        self.path, self.writes = directory / "run.json", writes
        self.values, self.damaged = _read_json(self.path)
        if self.damaged:
            print(f"warning: {self.path} is damaged; what it said is made anew.", file=sys.stderr)

    def update(self, **values: Any) -> None:
        """Change keys and store the record; only rank 0 writes."""
        self.values |= values
        if self.writes:
            try:
                write_json(self.path, self.values)
            except OSError as error:  # a full disk; the next update tries again
                print(f"{self.path} cannot be written ({error.strerror}); training goes on.", file=sys.stderr)


def _read_json(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the table in a file, and whether the file is there and holds none."""
    if not path.exists():
        return {}, False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    return (values, False) if isinstance(values, dict) else ({}, True)


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole: a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def refuse_other_config(directory: Path, new: Mapping[str, Any]) -> None:
    """Compare with the config that the run started with.

    Raises:
        StopRun: a key differs that would make it another run (exit 76); every such key is listed.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return
    before, now = _flat(_stored_config(path)), _flat(new)
    changed = [
        f"{key}: was {before.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent") and not _is_free(key)
    ]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        message = f"run '{directory.name}' was started with another config:\n{lines}\n"
        raise StopRun(Exit.RESUME_REFUSED, message + "choose another run.name, or the old values.")


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    advice = "put it back (it is also under 'config' in state.json of each checkpoint), or choose another run.name."
    raise StopRun(Exit.RESUME_REFUSED, f"{path} is damaged; {advice}")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {k: v for key, child in tree.items() for k, v in _flat(child, f"{path}.{key}".lstrip(".")).items()}
    return {path: tree}


def _first_line(file: TextIO) -> str:
    file.seek(0)
    return file.readline().strip()
