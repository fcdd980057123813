"""A whole run on a folder of a user's own videos, good and bad ones: it trains, and the report names what was lost."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from clips import clip
from tiny_runs import overrides

from vlp.training import launch
from vlp.training.exits import Exit

ROOT = Path(__file__).parents[1]
CONTAINERS = {"mp4": "mp4", "mkv": "matroska", "avi": "avi", "webm": "webm"}
LOST = {
    "broken": ("video_broken", b"no video at all"),
    "empty": ("video_empty", b""),
    "sound": ("no_video_stream", clip(4, layout="a")),
    "missing": ("video_missing", None),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Eight good clips in four containers, and the four that cannot be used."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        suffix = list(CONTAINERS)[number % 4]
        codec = {"codec": "vp9"} if suffix == "webm" else {}
        (folder / f"clip{number}.{suffix}").write_bytes(clip(6 + number, container=CONTAINERS[suffix], **codec))
    for name, (_, data) in LOST.items():
        if data is not None:
            (folder / f"{name}.mp4").write_bytes(data)
    return folder


def table(videos: Path, kind: str) -> list[str]:
    """Write the captions in one of the three forms; return what the command line adds."""
    texts = {name: f"words about {name}" for name in (*(f"clip{n}" for n in range(8)), *LOST)}
    path = videos.parent / f"{videos.name}.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("video", "caption"), *((f"{k}.mp4" if k in LOST else k, v) for k, v in texts.items())]
            )
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"key": k, "captions": [v]}) + "\n" for k, v in texts.items()))
    else:
        for name, text in texts.items():
            (videos / f"{name}.txt").write_text(text)
        return []
    return [f"data.captions={path}"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_folder_with_four_bad_videos_trains_and_the_report_names_them(videos, place, kind):
    words = [word for word in overrides(place, f"mine_{kind}") if not word.startswith("data.sources.world")]
    words += ["data=my_videos", f"data.videos={videos}", *table(videos, kind)]
    assert launch.main(words) == Exit.DONE
    run = place / "runs" / f"mine_{kind}"
    record, report = json.loads((run / "run.json").read_text()), (run / "report.html").read_text()
    (source,) = record["sources"]
    named = {item["key"].removesuffix(".mp4"): item["reason"] for item in source["dropped"]}  # as the table spells it
    assert named == {name: reason for name, (reason, _) in LOST.items()}
    assert all(name in report for name in LOST)


REAL = ROOT.parent / "shared" / "real_clips"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the ten real clips are not beside this checkout")
def test_the_command_of_the_readme_trains_on_real_clips(tmp_path):
    words = ["+experiment=quickstart", "data=my_videos", f"data.videos={REAL}", f"data.captions={REAL}/captions.jsonl"]
    words += ["trainer.max_steps=20", "run.name=real", f"paths.runs={tmp_path}", f"paths.data={tmp_path}/data"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == Exit.DONE, done.stderr[-2000:]
    record = json.loads((tmp_path / "real" / "run.json").read_text())
    assert (
        record["step"] == 20 and record["sources"][0]["dropped"] == [] and (tmp_path / "real" / "report.html").exists()
    )
