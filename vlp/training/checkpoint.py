"""Checkpoints: one fresh directory a step, complete or not there at all, and nothing in it that unpickles.

    checkpoints/step-00000600/
        model.safetensors       weights and buffers of the model and of the objectives
        optimizer.safetensors   moments by parameter name ("exp_avg/model.text_encoder...")
        ema.safetensors         only with optim.ema_decay
        state.json              step, cursor, config, fingerprints
        manifest.json           size and sha256 of the files above; written last: its presence is the commit

Files are written in a directory of a temporary name, synced, and renamed; the parent is synced; old ones go last, by a
rename first, so that a name is complete or gone. A repeated step keeps its old directory as `-replaced` meanwhile.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
_REPLACED = "-replaced"


class State(NamedTuple):
    """What a checkpoint holds."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    facts: dict[str, Any]  # JSON


def save(root: Path, *, step: int, state: State, keep: int) -> Path:
    """Commit a checkpoint and delete the oldest beyond `keep`, but none before two newer ones are known to be valid.

    Raises:
        OSError: the disk refused; the older checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step-{step:08d}", root / f".writing-{step:08d}-{os.getpid()}"
    _sweep(root)
    temporary.mkdir()
    for name in ("model", "optimizer", "ema"):
        tensors = getattr(state, name)
        if tensors:
            save_file(
                {key: t.detach().contiguous().cpu() for key, t in tensors.items()}, temporary / f"{name}.safetensors"
            )
    (temporary / "state.json").write_text(json.dumps(state.facts, indent=1), encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": _digest(path)} for path in sorted(temporary.iterdir())}
    for name in files:
        _sync(temporary / name)
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(temporary)
    if final.exists():  # the same step of an attempt that was repeated
        final.rename(root / f"{final.name}{_REPLACED}")
    temporary.rename(final)
    _sync(root)
    _sweep(root)
    _prune(root, keep, newest=final)
    return final


class Opened(NamedTuple):
    state: State
    facts: dict[str, Any]

    def keys(self):
        return [f"{k}/{n}" for k in ("model", "optimizer", "ema") for n in getattr(self.state, k)]

    def get(self, key):
        kind, _, name = key.partition("/")
        return getattr(self.state, kind)[name]


def open_checkpoint(path: Path) -> Opened:
    found = load(path)
    return Opened(found, found.facts)


def save_tensors(root: Path, *, step: int, tensors, facts, keep: int) -> Path:
    parts = {
        k: {n.partition("/")[2]: t for n, t in tensors.items() if n.partition("/")[0] == k}
        for k in ("model", "optimizer", "ema")
    }
    return save(root, step=step, state=State(**parts, facts=facts), keep=keep)


def all_steps(root: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first, by step and never by time."""
    return sorted(path for path in root.glob("step-*") if (path / "manifest.json").exists())


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose digests agree, and one line for each newer one that was refused."""
    refused = []
    for path in reversed(all_steps(root)):
        problem = _damage(path)
        if problem is None:
            return path, refused
        refused.append(f"{path.name}: {problem}")
    return None, refused


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        ValueError: damaged, or of an unknown format.
    """
    problem = _damage(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path}: {problem}; choose another step.")
    files = [path / f"{name}.safetensors" for name in ("model", "optimizer", "ema")]
    try:
        tensors = {file.stem: load_file(file) if file.exists() else {} for file in files}
        return State(**tensors, facts=json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path}: cannot be read ({error}); choose another step.") from None


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers; a tensor that two names share is stored once, under its first name."""
    seen: set[tuple] = set()
    state = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        state[name] = tensor
    return state


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill weights and buffers; every tensor of the module must be there, and no other.

    Raises:
        ValueError: missing or unknown names, or other shapes.
    """
    own = module_state(module)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}, other shape "
            f"{shapes[:3]} ({len(missing)}, {len(unknown)}, {len(shapes)} in all); use the config it was made with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state tensors by "kind/parameter name"."""
    return {
        f"{kind}/{name}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Fill the optimizer's state from `optimizer_state`.

    Raises:
        ValueError: a tensor that belongs to no trained parameter, or a trained parameter without any.
    """
    owners = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in owners:
            raise ValueError(
                f"the checkpoint has optimizer state for '{name}', which is not trained; freeze the same parts."
            )
        optimizer.state[owners[name]][kind] = value.clone().to(owners[name].device)  # fused AdamW counts there as well
    bare = sorted(name for name, parameter in owners.items() if tensors and not optimizer.state.get(parameter))
    if bare:
        raise ValueError(
            f"the checkpoint has no optimizer state for '{bare[0]}', which is trained; freeze it as before."
        )


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        unlisted = sorted({file.name for file in path.iterdir()} - manifest["files"].keys() - {"manifest.json"})
        if unlisted:
            return f"{unlisted[0]} is not in manifest.json"
        for name, facts in manifest["files"].items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (path / name).stat().st_size != facts["size"] or _digest(path / name) != facts["sha256"]:
                return f"{name} differs from its digest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _prune(root: Path, keep: int, *, newest: Path) -> None:
    """Delete all but the `keep` newest checkpoints, and keep more where two of those are not valid."""
    num_valid = 0
    for place, path in enumerate(reversed(all_steps(root))):
        if place >= keep and num_valid == 2:
            _delete(path)
        elif num_valid < 2 and (path == newest or _damage(path) is None):  # `newest` was just read back
            num_valid += 1


def _delete(path: Path) -> None:
    hidden = path.with_name(f".deleting-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)
