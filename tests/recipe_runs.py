"""Runs recipes on tiny downloads and reads back what they made."""

import importlib
import json
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from vlp.data.index import meta_of, open_index, read_part
from vlp.data.probe import VideoFacts
from vlp.types import Reason


class Sample(NamedTuple):
    meta: dict[str, Any]
    video: bytes
    extension: str
    facts: VideoFacts


def run(recipe: str, videos: Path, *arguments: object, out: Path | None = None) -> int:
    """Run a recipe in this process; return the exit code."""
    module = importlib.import_module(f"data_recipes.{recipe}")
    words = ["--videos", str(videos), "--out", str(out or videos.parent / "out"), *map(str, arguments)]
    return module.main(module.RECIPE, words)


def samples(out: Path, split: str) -> dict[str, Sample]:
    """Return the samples of a split by key; all of them must be usable."""
    found = {}
    for path in sorted(glob(f"{out}/{split}-[0-9]*.tar")):
        index = open_index(path)
        for row in range(len(index)):
            assert index.status(row) == Reason.OK, index.detail(row)
            facts = index.facts(row)
            assert facts is not None
            video = read_part(index, row, "video")
            found[index.key(row)] = Sample(meta_of(index, row), video, index.extension(row), facts)
    return found


def audit(out: Path) -> dict[str, Any]:
    return json.loads((out / "audit.json").read_text())


def dropped(out: Path) -> dict[str, str]:
    """Return the reasons by key, or by file and line where there is no key."""
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return {line["key"] or line["where"]: line["reason"] for line in lines}
