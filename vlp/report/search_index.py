"""The index of a folder of videos: which windows of which files there are, and their embeddings.

Axes: N windows, E embedding.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv"}

Embed = Callable[[Path], tuple[list[tuple[float, float]], Tensor]]  # file -> windows in seconds, vectors [N, E]


class Window(NamedTuple):
    """A part of a file."""

    file: int  # its number in the index
    start_s: float
    end_s: float


class Index(NamedTuple):
    """What can be found."""

    folder: Path
    files: list[str]  # relative to the folder
    windows: list[Window]
    embeds: Tensor  # [N, E] unit vectors
    refused: dict[str, str]  # file -> why it is not in the index


def videos_of(folder: Path) -> list[str]:
    """Return the video files below a folder, relative to it; links that lead out of it are left out."""
    root = folder.resolve()
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path.relative_to(root).as_posix() for path in found if path.resolve().is_relative_to(root))


def open_index(folder: Path, *, embed: Embed, identity: str, store: Path) -> Index:
    """Return the index of a folder, from `store` if neither the files nor `identity` have changed since it was made.

    Args:
        embed: makes windows and vectors of a file, or raises ValueError. identity: of the model and its settings.
        store: folder in which indexes are kept.

    Raises:
        ValueError: there is no folder, or nothing in it can be indexed.
    """
    if not folder.is_dir():
        raise ValueError(f"videos={folder} is no folder; name one with video files.")
    root, files = folder.resolve(), videos_of(folder)
    facts = [(name, (root / name).stat().st_size, (root / name).stat().st_mtime_ns) for name in files]
    digest = hashlib.sha256(json.dumps([identity, str(root), facts]).encode()).hexdigest()[:16]
    path = store / f"{digest}.safetensors"
    found = _load(path, root) or _made(root, files, embed)
    if not found.windows:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(found.refused.items())[:3])
        raise ValueError(f"videos={folder} holds no video that can be indexed ({why or 'no file of ' + _listed()}).")
    if not path.exists():
        _save(found, path)
    return found


def _made(root: Path, files: list[str], embed: Embed) -> Index:

    kept, windows, parts, refused = [], [], [], {}
    for name in tqdm(files, desc="indexing videos", unit="video", disable=None):
        try:
            spans, vectors = embed(root / name)
        except (ValueError, OSError) as error:
            refused[name] = str(error)
            continue
        windows += [Window(len(kept), start, end) for start, end in spans]
        kept.append(name)
        parts.append(vectors.cpu())
    return Index(root, kept, windows, torch.cat(parts) if parts else torch.zeros(0, 1), refused)


def _save(found: Index, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"files": found.files, "windows": found.windows, "refused": found.refused}
    part = path.with_suffix(".part")
    save_file({"embeds": found.embeds.contiguous()}, part, metadata={"index": json.dumps(about)})
    part.replace(path)


def _load(path: Path, root: Path) -> Index | None:
    """Return a kept index; None if there is none, or it is damaged and must be made again."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["index"])
            windows = [Window(int(n), float(start), float(end)) for n, start, end in about["windows"]]
            return Index(root, about["files"], windows, file.get_tensor("embeds"), about["refused"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _listed() -> str:
    return ", ".join(sorted(SUFFIXES))
