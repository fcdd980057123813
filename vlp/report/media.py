"""Puts the pictures of a run inside the report."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

MAX_WIDTH = 1280  # pixels; wider strips are shrunk so that the report stays small
MAX_BYTES = 16 * 2**20


class Strip(NamedTuple):
    """A film strip: the frames of a clip side by side, square, in the order of time."""

    uri: str  # data:image/jpeg;base64,...
    num_frames: int


def embed(directory: Path, name: str | None, problems: list[str]) -> Strip | None:
    """Return the JPEG `name` of the run's directory as a data URI; None, and a problem noted, if that is impossible."""
    if not name:
        return None
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):  # a report must not carry other files of the machine
        problems.append(f"{name} lies outside the run's directory and is not shown")
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            num_frames = max(1, round(picture.width / picture.height))
            if picture.width > MAX_WIDTH:
                data = _shrink(picture)
    except FileNotFoundError:
        problems.append(f"picture {name} is missing")
        return None
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        problems.append(f"picture {name} cannot be read: {error}")
        return None
    return Strip("data:image/jpeg;base64," + base64.b64encode(data).decode("ascii"), num_frames)


def _shrink(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    height = max(1, picture.height * MAX_WIDTH // picture.width)
    picture.convert("RGB").resize((MAX_WIDTH, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
    return file.getvalue()
