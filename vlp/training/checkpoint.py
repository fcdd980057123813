"""Checkpoints: one fresh directory a step, complete or not there at all, and nothing in it that unpickles.

    checkpoints/step-00000600/
        tensors-00000-of-00004.safetensors   what rank 0 of 4 wrote, under the keys "model/NAME",
                                             "optimizer/KIND/NAME" and "ema/NAME"; each key is in one file
        state.json                           step, cursor, config, fingerprints
        manifest.json                        size and digests of the files above, and the file of each key; written
                                             last: its presence is the commit

All ranks write into one directory of a temporary name that rank 0 makes up for each attempt, and force their file to
the disk; rank 0 gathers the digests, writes the manifest, renames, forces the parent, and deletes old checkpoints last:
by a rename first, so that a name is complete or gone. A repeated step keeps its old directory as `-replaced` meanwhile.
What happens on one rank happens on all: an error anywhere is raised everywhere, and nothing old is touched.
Where a rename copies (an object store behind a file system), a name may be there before its files are: the digests
decide. Where a listing lags, the caller may know a step that it lacks.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vlp import dist
from vlp.training import tensor_file
from vlp.training.exits import Exit, StopRun
from vlp.training.tensor_file import Mapped

FORMAT = 2
_REPLACED = "-replaced"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class State(NamedTuple):
    """What one rank gives to a checkpoint."""

    tensors: Mapping[str, Tensor]  # by key; each key is given by exactly one rank
    facts: dict[str, Any]  # JSON; those of rank 0 are stored


class Stored:
    """A checkpoint whose digests agree, read through memory maps: only what is asked for is touched.

    `facts` is what the run stored beside the tensors.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], files: Mapping[str, Mapped]) -> None:
        self.path, self.step, self._owners = path, int(manifest["step"]), dict(manifest["keys"])
        self.facts: dict[str, Any] = json.loads(bytes(files["state.json"].bytes))
        self._files = files
        self._places = {name: file.places() for name, file in files.items() if name.endswith(".safetensors")}
        found = [key for table in self._places.values() for key in table]
        if len(found) != len(self._owners) or any(key not in self._places[name] for key, name in self._owners.items()):
            raise ValueError("manifest.json and the headers of the files list other tensors")

    def keys(self) -> list[str]:
        """Return the keys of all files, sorted."""
        return sorted(self._owners)

    def get(self, key: str) -> Tensor:
        """Return a tensor that lies in the file until it is written to or copied."""
        name = self._owners[key]
        return self._files[name].tensor(self._places[name][key])

    def under(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors whose keys begin with "kind/", without it."""
        start = f"{kind}/"
        return {key.removeprefix(start): self.get(key) for key in self.keys() if key.startswith(start)}


def save(root: Path, *, step: int, state: State, keep: int, refuse_stranger: Callable[[], None] = lambda: None) -> Path:
    """Commit a checkpoint and delete the oldest beyond `keep`, but none before two newer ones are known to be valid.

    All ranks call it; on one process it is no collective. Rank 0 calls `refuse_stranger` before it touches anything and
    again right before the checkpoint gets its name: who stood still meanwhile may own the directory no more.

    Raises:
        OSError: the disk refused, on any rank; the older checkpoints are untouched.
        StopRun: raised by `refuse_stranger`; on all ranks.
        ValueError: a key that two ranks give.
    """
    ranks = Ranks()
    final = root / f"step-{step:08d}"
    ranks.first(refuse_stranger)
    temporary = root / str(ranks.first(lambda: _begin(root, step)))
    try:
        written = ranks.each(lambda: _write_share(temporary, state.tensors, ranks))
        files = {share["name"]: share["entry"] for share in written}
        manifest = {"format": FORMAT, "step": step, "chunk_bytes": tensor_file.CHUNK, "files": files}
        manifest["keys"] = _owners(written)
        ranks.first(lambda: _commit(temporary, final, manifest, state.facts, refuse_stranger))
    except Exception:
        ranks.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise
    try:
        _tidy(root, keep, ranks, newest=final)
    except OSError as error:  # the new checkpoint stands all the same
        _report(error)
    return final


class Ranks:
    """All ranks doing one thing after the other, or failing together."""

    def __init__(self) -> None:
        self.group = dist.side_group()
        self.rank, self.size = dist.rank(), dist.world_size()

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and return what each gave, which must be JSON.

        Raises:
            OSError: it failed so on a rank.
            StopRun: raised on a rank.
            RuntimeError: it failed in another way on another rank; the error itself where it failed.
        """
        own, value, problem = None, None, None
        try:
            value = work()
        except Exception as error:  # the others wait for this rank: they must hear of it, whatever it is
            own, problem = error, _told(error)
        answers = dist.exchange([value, problem], self.group)
        problems = [(rank, told) for rank, (_, told) in enumerate(answers) if told]
        if own is not None and (self.size == 1 or not isinstance(own, OSError)):
            raise own
        if problems:
            raise _retold(*problems[0])
        return [answer for answer, _ in answers]

    def first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return what it gave."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]


def all_steps(root: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first, by step and never by time."""
    return sorted((path for path in root.glob("step-*") if (path / "manifest.json").exists()), key=_age)


def newest_valid(root: Path, *, known: int | None = None) -> tuple[Stored | None, list[str]]:
    """Return the newest checkpoint whose digests agree, and one line for each newer one that was refused.

    All ranks call it, if there are several by now.

    Args:
        root: of the checkpoints. known: a step that may be there although a listing lacks it, as rank 0 remembers.
    """
    ranks, refused = Ranks(), []
    for name in ranks.first(lambda: _names(root, known)):
        stored = _verified(root / name, ranks)
        if isinstance(stored, Stored):
            return stored, refused
        refused.append(f"{name}: {stored}")
    return None, refused


def open_checkpoint(path: Path) -> Stored:
    """Verify a checkpoint, each rank a share of it, and open it.

    Raises:
        ValueError: damaged, or of an unknown format; on all ranks alike.
    """
    stored = _verified(path, Ranks())
    if isinstance(stored, str):
        raise ValueError(f"checkpoint {path}: {stored}; choose another step.")
    return stored


def _names(root: Path, known: int | None) -> list[str]:
    """Return the names of the checkpoints, newest first; a step that is known is looked up by its name."""
    found = all_steps(root)
    own = root / f"step-{known or 0:08d}"
    if known is not None and own not in found and (own / "manifest.json").exists():
        found.append(own)
    return [path.name for path in sorted(found, key=_age, reverse=True)]


def _age(path: Path) -> tuple[str, bool]:
    return path.name.removesuffix(_REPLACED), not path.name.endswith(_REPLACED)


def _begin(root: Path, step: int) -> str:
    if not root.exists():
        root.mkdir(mode=0o750, parents=True)
        _sync(root.parent)
    try:
        _sweep(root)
    except OSError as error:
        _report(error)
    name = f".writing-{step:08d}-{secrets.token_hex(4)}"
    (root / name).mkdir(mode=0o750)
    return name


def _write_share(directory: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    name = f"tensors-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    return {"name": name, "entry": tensor_file.write(directory / name, tensors), "keys": sorted(tensors)}


def _commit(
    temporary: Path,
    final: Path,
    manifest: dict[str, Any],
    facts: Mapping[str, Any],
    refuse_stranger: Callable[[], None],
) -> None:
    """Write what rank 0 writes, the manifest last, and give the directory its name."""
    files = manifest["files"]
    for name, entry in files.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != entry["size"]:
            raise OSError(f"{name} is not whole where rank 0 looks; all nodes must share the run directory.")
    text = json.dumps(facts, indent=1, ensure_ascii=False).encode()
    files["state.json"] = tensor_file.write_bytes(temporary / "state.json", [text])
    tensor_file.write_bytes(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    _sync(temporary)
    refuse_stranger()
    if final.exists():  # the same step of an attempt that was repeated
        final.rename(final.with_name(f"{final.name}{_REPLACED}"))
    temporary.rename(final)
    _sync(final.parent)


def _owners(written: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the file of each key."""
    owners: dict[str, str] = {}
    for share in written:
        for key in share["keys"]:
            if key in owners:
                raise ValueError(f"'{key}' is in {owners[key]} and in {share['name']}; one rank alone may give it.")
            owners[key] = share["name"]
    return owners


def _verified(path: Path, ranks: Ranks) -> Stored | str:
    """Return the opened checkpoint, or what is wrong with it; the same on all ranks."""
    opened: Stored | None = None

    def check() -> str | None:
        nonlocal opened
        problem, manifest, files = None, {}, {}
        try:
            manifest = _manifest(path)
            for name in manifest["files"]:
                files[name] = Mapped(path / name)
            problem = _damage(manifest, files, ranks)
            opened = Stored(path, manifest, files) if problem is None else None
        except FileNotFoundError as error:
            problem = f"{Path(error.filename).name} is missing"
        except _UNREADABLE as error:
            problem = f"{'manifest.json' if not files else 'it'} cannot be read ({error})"
        return problem

    problem = next((answer for answer in ranks.each(check) if answer), None)
    return problem or opened or "it cannot be read"


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(bytes(Mapped(path / "manifest.json").bytes))
    if manifest["format"] != FORMAT or manifest["chunk_bytes"] != tensor_file.CHUNK:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    if any(name != Path(name).name for name in manifest["files"]):
        raise ValueError("it names a file outside the checkpoint")
    unlisted = sorted({file.name for file in path.iterdir()} - manifest["files"].keys() - {"manifest.json"})
    if unlisted:
        raise ValueError(f"{unlisted[0]} is not in it")
    return manifest


def _damage(manifest: Mapping[str, Any], files: Mapping[str, Mapped], ranks: Ranks) -> str | None:
    """Compare this rank's share of all chunks with their digests."""
    turn = 0
    for name, file in files.items():
        chunks = range(tensor_file.num_chunks(file.size))
        mine = [chunk for chunk in chunks if (turn + chunk) % ranks.size == ranks.rank]
        if file.differs(manifest["files"][name], mine):
            return f"{name} differs from its digest"
        turn += len(chunks)
    return None


def _told(error: Exception) -> tuple[int | None, int, str]:
    """Return what the other ranks hear: the code of an ending or None, the number of a disk's error or 0, the text."""
    if isinstance(error, StopRun):
        return int(error.code), 0, error.message
    if isinstance(error, OSError):
        return None, error.errno or 5, f"{error.strerror or error} {error.filename or ''}".strip()
    return None, 0, f"{type(error).__name__}: {error}"


def _retold(rank: int, told: tuple[int | None, int, str]) -> Exception:
    """Return what a rank raises because of another one."""
    code, number, text = told
    if code is not None:
        return StopRun(Exit(code), text)
    return OSError(number, f"rank {rank}: {text}") if number else RuntimeError(f"rank {rank}: {text}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Remove what killed attempts left half written or half deleted, and replaced steps whose successor stands."""
    for path in (*root.glob(".writing-*"), *root.glob(".deleting-*")):
        shutil.rmtree(path)
    for path in root.glob(f"step-*{_REPLACED}"):
        if path.with_name(path.name.removesuffix(_REPLACED)).exists():
            _delete(path)


def _tidy(root: Path, keep: int, ranks: Ranks, *, newest: Path) -> None:
    """Delete all but the `keep` newest checkpoints, and keep more where two of those are not valid."""
    ranks.first(lambda: _sweep(root))
    num_valid = 0  # `newest` counts: its digests are those of the memory that was written
    names = ranks.first(lambda: [path.name for path in reversed(all_steps(root))])
    for place, name in enumerate(names):
        if place >= keep and num_valid == 2:
            ranks.first(lambda name=name: _delete(root / name))
        elif num_valid < 2 and (name == newest.name or isinstance(_verified(root / name, ranks), Stored)):
            num_valid += 1


def _report(error: OSError) -> None:
    if dist.rank() == 0:
        print(f"warning: old checkpoints cannot be deleted: {error}", file=sys.stderr, flush=True)


def _delete(path: Path) -> None:
    hidden = path.with_name(f".deleting-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)
