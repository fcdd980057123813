"""Start a run with the weights of an earlier one: by name, never silently.

init.run --newest valid checkpoint, averaged weights where there are any--> tensors by name
  used        same name, same shape
  resized     a table of positions of another length or grid
  missing     of this run only: they start as built, at random or from a file of their own
  left over   of the earlier run only: they are not loaded
  skipped     by init.skip

init.rename says where a part of the earlier run has another place here: a trained tokenizer is a target of this run.
"""

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlp import config
from vlp.layers.position import resize_space, resize_time
from vlp.training import checkpoint, state

_SHOWN = 8  # names of a kind in the summary; all of them are in init.json


class Report(NamedTuple):
    """What became of every tensor."""

    source: str
    used: list[str]
    resized: list[str]  # "name: [8, 192] to [16, 192]"
    missing: list[str]
    left_over: list[str]
    skipped: list[str]

    def text(self) -> str:
        """Return a line for each kind, with the first names."""
        lines = [f"weights from {self.source}: {len(self.used)} tensors used"]
        for kind in ("resized", "missing", "left_over", "skipped"):
            names = _by_part(getattr(self, kind)) if kind != "resized" else self.resized
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            words = {"missing": "not in it, start as built", "left_over": "left over"}.get(kind, kind)
            if names:
                lines.append(f"  {words}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines)


def start_from(module: nn.Module, source: Path, *, skip: Sequence[str] = (), rename: Mapping[str, str] = {}) -> Report:
    """Fill weights and buffers of `module` from an earlier run, as far as names and shapes agree.

    Args:
        source: a run's directory, a checkpoint's, or a .safetensors file. skip: patterns of names left alone.
        rename: beginning of a name there -> what stands in its place here; names that begin otherwise stay.

    Raises:
        config.ConfigError: nothing can be read, nothing fits, or a shape differs that is no table of positions.
    """
    stored, where = _read(source)
    tensors = _renamed(stored, rename, where)
    own = state.once(module)
    skipped = sorted(name for name in own if any(fnmatch.fnmatch(name, pattern) for pattern in skip))
    taken = {name: tensors[name] for name in own if name in tensors and name not in skipped}
    resized, wrong, used = [], [], []
    for name, tensor in taken.items():
        target = own[name]
        grid = _grid_of(module, name)
        fitted = tensor if tensor.shape == target.shape else _resized(name, tensor, target, grid)
        if fitted is None:
            wrong.append(f"{name} is {list(tensor.shape)} there and {list(target.shape)} here")
            continue
        (used if fitted is tensor else resized).append(name)
        with torch.no_grad():
            target.copy_(fitted)
    if wrong or not used:
        raise config.ConfigError([_refusal(where, wrong)])
    missing = sorted(own.keys() - tensors.keys() - set(skipped))
    left_over = sorted(tensors.keys() - own.keys())
    sizes = [f"{name}: {list(tensors[name].shape)} to {list(own[name].shape)}" for name in resized]
    return Report(where, sorted(used), sizes, missing, left_over, skipped)


def save(report: Report, directory: Path) -> None:
    """Keep the whole report with the run."""
    (directory / "init.json").write_text(json.dumps(report._asdict(), indent=1) + "\n", encoding="utf-8")


def tokenizer_of(source: Path) -> Path | None:
    """Return the trained tokenizer of the run that `source` belongs to, if it keeps one."""
    for folder in (source, source.parent.parent):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    return None


def _read(source: Path) -> tuple[dict[str, Tensor], str]:
    if source.is_file():
        try:
            return load_file(source), str(source)
        except (OSError, SafetensorError) as error:
            raise config.ConfigError([f"init.run: {source} is no safetensors file ({error})."]) from None
    if (source / "manifest.json").exists():
        try:
            stored = checkpoint.open_checkpoint(source)
        except ValueError as error:
            raise config.ConfigError([f"init.run: {error}"]) from None
    else:
        newest, refused = checkpoint.newest_valid(source / "checkpoints")
        if newest is None:
            why = f" ({'; '.join(refused)})" if refused else ""
            raise config.ConfigError([f"init.run: {source} holds no valid checkpoint{why}; name a trained run."])
        stored = newest
    average = stored.under("ema")
    return {**stored.under("model"), **average}, str(stored.path) + (" (averaged weights)" if average else "")


def _renamed(tensors: Mapping[str, Tensor], rename: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """Give the tensors their names in this run, by the longest beginning that fits.

    Raises:
        config.ConfigError: a beginning that no name has, or two tensors of one name.
    """
    idle = [old for old in rename if not any(name.startswith(old) for name in tensors)]
    if idle:
        raise config.ConfigError([f"init.rename: no name in {where} begins with '{idle[0]}'."])
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fitting = max((old for old in rename if name.startswith(old)), key=len, default="")
        new = rename.get(fitting, "") + name.removeprefix(fitting)
        if new in renamed:
            raise config.ConfigError([f"init.rename: two tensors of {where} would be named '{new}'."])
        renamed[new] = tensor
    return renamed


def _grid_of(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the cells (h, w) of the image model whose table of positions `name` is; None if it is none."""
    owner, _, last = name.rpartition(".")
    embed = getattr(module.get_submodule(owner), "patch_embed", None) if last == "pos_embed" else None
    return getattr(embed, "grid_size", None)


def _resized(name: str, tensor: Tensor, target: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """Return a table of positions in another size; None if the name is none or the widths differ."""
    if tensor.ndim != target.ndim or tensor.shape[-1] != target.shape[-1]:
        return None
    if name.endswith(("time_positions.table", "times.table")):
        return resize_time(tensor, target.shape[0])
    if name.endswith(("space_positions.table", "places.table")):
        return resize_space(tensor, target.shape[0], target.shape[1])
    if name.endswith("pos_embed") and tensor.ndim == 3:
        return _resized_grid(tensor, target, grid)
    if name.endswith(("positions.table", "position_embeddings.weight", "position_embedding.weight")):
        return _lengthened(tensor, target)
    return None


def _resized_grid(tensor: Tensor, target: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """Resize a table [1, P + S, D] of P class tokens and a square grid of S cells, to `grid` or to another square."""
    for num_prefix in range(4):
        side, goal = (math.isqrt(max(0, table.shape[1] - num_prefix)) for table in (tensor, target))
        height, width = grid or (goal, goal)
        if side**2 == tensor.shape[1] - num_prefix and height * width == target.shape[1] - num_prefix:
            prefix, cells = tensor[:, :num_prefix], tensor[0, num_prefix:]
            plane = resize_space(rearrange(cells, "(h w) d -> h w d", h=side), height, width)
            return torch.cat([prefix, rearrange(plane, "h w d -> 1 (h w) d")], 1)
    return None


def _lengthened(tensor: Tensor, target: Tensor) -> Tensor:
    """Keep the first rows of a table of word positions: the third word is the third word in a longer text too."""
    longer = target.detach().clone()
    rows = min(len(tensor), len(longer))
    longer[:rows] = tensor[:rows]
    return longer


def _refusal(where: str, wrong: Sequence[str]) -> str:
    if not wrong:
        return f"init.run: nothing in {where} has a name that this model has; choose the same parts."
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    names = ", ".join(line.split()[0] for line in wrong[:3])
    return f"init.run: {'; '.join(wrong[:3])}{more}; build them alike, or leave them out: init.skip=[{names}]."


def _by_part(names: Sequence[str]) -> list[str]:
    """Return the parts that names belong to, with their number of tensors: "objectives.matching (2)"."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + 1
    return [f"{part} ({count})" for part, count in counts.items()]
