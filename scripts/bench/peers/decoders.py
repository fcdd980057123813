"""P1 in the environment of torchcodec or decord."""

import time
from typing import Any

import clips
import numpy as np
from barcode import numbers


def decode(method: str, path: str, times_s: list[float], size: tuple[int, int], mappings: str | None = None) -> Any:
    """Return the seconds of CPU that the frames of a clip cost, from bytes in memory, and the numbers they carry."""
    data, make = clips.read(path), getattr(clips, method)
    began = time.process_time()
    frames = make(data, times_s, size, mappings)
    cpu_s = time.process_time() - began
    return {"cpu_s": cpu_s, "numbers": numbers(np.asarray(frames))}


def versions() -> str:
    """Return what decodes here."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torchcodec", "decord", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
