"""The directory of a run: its lock, its record, and what may change between attempts.

runs/NAME/
    config.yaml     the resolved config            run.json     status, command, parts, sources, environment
    graph.json      the plan of a step             metrics.csv  losses and rates by step
    tokenizer.json  if it was trained here         eval/        scores and film strips
    checkpoints/    see vlp.training.checkpoint    report.html
"""

import fnmatch
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
import yaml

from vlp import dist
from vlp.training import lease
from vlp.training.exits import Exit, StopRun
from vlp.training.lease import Lease

# What may differ when a run continues, by patterns of keys; what is in none of the lists makes it another run.
REFUSED = ("data.sources.*.weight",)  # stands above the next list: it would change which source a step reads
FREE = (  # changes no number that the run computes, or only how it answers trouble
    "run.resume",
    "run.stop_after",
    "run.allow",
    "run.hold_after",
    "trainer.max_steps",
    "trainer.accumulate",  # the loss is divided by global counts, so the split into micro-batches does not matter
    "trainer.nan_policy",
    "trainer.max_skipped_steps",
    "trainer.max_rewinds",
    "trainer.spike_*",
    "trainer.timeout_s",
    "trainer.max_time_s",
    "trainer.check_replicas_every",
    "trainer.ledger",
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
    "data.decode_timeout_s",
    "data.outage_s",
    "data.worker_memory_gib",
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
WITH_FLAG = (  # another training from here on, that can be continued; only where `run.allow` names the key
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.layer_decay",
    "optim.lr_factors",
    "schedule",
    "objective.*.weight",
    "trainer.clip_grad_norm",
    "trainer.precision",
    "data.batch_size",  # the cursor stays: of the current epoch some samples may be read twice or not at all
    "clip.sampling_*",
    "clip.transforms_*",
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
def locked(directory: Path) -> Iterator[Lease]:
    """Own the run directory inside the block; a process that dies, however it dies, frees it.

    Raises:
        StopRun: another process owns it (exit 77).
    """
    with lease.held(directory) as own:
        yield own


def clear_sessions(directory: Path, *, keep: str) -> None:
    """Remove what the watchdogs of earlier attempts left, the newest of them aside, which knows its last step."""
    folders = sorted((directory / "ranks").glob("*"), key=lambda path: path.stat().st_mtime)
    for path in folders[:-2]:
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def everyone_like_first(value: str | None) -> str | None:
    """Return rank 0's value on all ranks."""
    values = [value]
    if dist.world_size() > 1:
        torch_dist.broadcast_object_list(values)
    return values[0]


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


def changes(directory: Path, new: Mapping[str, Any], *, allow: Sequence[str] = ()) -> list[str]:
    """Compare with the config with which the run was started or last continued.

    Args:
        directory: of the run. new: the config, without secrets.
        allow: keys of `WITH_FLAG` that may differ now (`run.allow`).

    Returns:
        one line for each difference, to be printed.

    Raises:
        StopRun: a key differs that would make it another run (exit 76); all differences are listed, by class.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return []
    before, now = _flat(_stored_config(path)), _flat(new)
    classes: dict[str, list[str]] = {"free": [], "allowed": [], "needs run.allow": [], "refused": []}
    for key in sorted(before.keys() | now.keys()):
        was, is_now = before.get(key, "absent"), now.get(key, "absent")
        both_nan = was != was and is_now != is_now
        if was != is_now and not both_nan:
            classes[_class_of(key, allow)].append(f"{key}: was {was!r}, is {is_now!r}")
    lines = [f"  {name}: {line}" for name, found in classes.items() for line in found]
    if classes["needs run.allow"] or classes["refused"]:
        keys = ",".join(line.partition(":")[0] for line in classes["needs run.allow"])
        advice = "choose another run.name, or the old values"
        if keys and not classes["refused"]:
            advice += f"; or continue all the same with run.allow=[{keys}]"
        message = f"run '{directory.name}' was started with another config:\n" + "\n".join(lines) + f"\n{advice}."
        raise StopRun(Exit.RESUME_REFUSED, message)
    return [f"changed since the last attempt:{line}" for line in lines]


def _class_of(key: str, allow: Sequence[str]) -> str:
    if _is_listed(key, REFUSED):
        return "refused"
    if _is_listed(key, FREE):
        return "free"
    if _is_listed(key, WITH_FLAG):
        return "allowed" if _is_listed(key, allow) else "needs run.allow"
    return "refused"


def _is_listed(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, each) or fnmatch.fnmatchcase(key, f"{each}.*") for each in patterns)


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    advice = "put it back (it is also under 'config' in state.json of each checkpoint), or choose another run.name."
    raise StopRun(Exit.RESUME_REFUSED, f"{path} is damaged; {advice}")


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {k: v for key, child in tree.items() for k, v in _flat(child, f"{path}.{key}".lstrip(".")).items()}
    return {path: tree}
