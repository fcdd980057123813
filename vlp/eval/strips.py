"""Film strips: small pictures of the clips that the examples of an evaluation show.

A task asks for one by putting a sample id under "strip" in its examples; the runner turns it into the path of a file.

Axes: T frames, H W pixels.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlp.types import Batch

NUM_FRAMES = 8
SIDE = 112  # pixels
QUALITY = 80  # of JPEG


class Strips:
    """Keeps the strip of every clip of this rank, about 30 KB each: which ones are shown is known only at the end."""

    def __init__(self) -> None:
        self.jpegs: dict[int, bytes] = {}  # by sample id

    def add(self, batch: Batch) -> None:
        """Keep the strips of the real clips of a batch on the CPU."""
        for row in batch.valid.nonzero()[:, 0].tolist():
            self.jpegs[int(batch.sample_id[row])] = jpeg(batch.frames[row][batch.frame_mask[row]])

    def find(self, sample_ids: Iterable[int]) -> dict[int, bytes]:
        """Return the strips that this rank has."""
        return {sample_id: self.jpegs[sample_id] for sample_id in sample_ids if sample_id in self.jpegs}


def jpeg(frames: Tensor) -> bytes:
    """Return up to 8 evenly spaced frames of uint8 [T, H, W, 3] side by side, as a JPEG."""
    num_frames = min(NUM_FRAMES, len(frames))
    strip = Image.new("RGB", (num_frames * SIDE, SIDE))
    for place, frame in enumerate(torch.linspace(0, len(frames) - 1, num_frames).round().long().tolist()):
        picture = Image.fromarray(frames[frame].numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        strip.paste(picture, (place * SIDE, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def file_name(source: str, key: str) -> str:
    """Return the file of a clip's strip; a digest, because a key comes from data and must not become a path."""
    return hashlib.sha256(f"{source}/{key}".encode()).hexdigest()[:24] + ".jpg"


def asked(results: Any) -> set[int]:
    """Return the sample ids under "strip" anywhere in the results of tasks."""
    if isinstance(results, dict):
        own = {results["strip"]} if "strip" in results else set()
        return own.union(*(asked(value) for value in results.values()))
    return set().union(*(asked(value) for value in results)) if isinstance(results, list) else set()


def answered(results: Any, paths: dict[int, str]) -> Any:
    """Return the results with the path in place of each sample id under "strip"; None where there is no path."""
    if isinstance(results, dict):
        return {
            name: paths.get(value) if name == "strip" else answered(value, paths) for name, value in results.items()
        }
    return [answered(value, paths) for value in results] if isinstance(results, list) else results


def write_once(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there; one that is there already stays."""
    if not path.exists():
        replace(path, data)


def replace(path: Path, data: bytes) -> None:
    """Write a file such that a reader, or a restart, sees the old or the new content and nothing between.

    A disk that refuses costs a warning and the file: the other ranks wait for this one.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}).", file=sys.stderr)
