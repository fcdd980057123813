"""From a folder of videos over a recipe to trained weights."""

from pathlib import Path

import pytest
from clips import clip
from recipe_runs import run
from tiny_runs import weights

from vlp.data.storage import expand
from vlp.training import launch

FRAMES = ("--store", "frames", "--frames", 5, "--short-side", 48)


@pytest.mark.parametrize("options", [(), FRAMES])
def test_shards_of_a_recipe_are_trained_on(place: Path, tmp_path: Path, options: tuple):
    (tmp_path / "videos").mkdir()
    for number in range(12):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(clip(9 + number))
        (tmp_path / "videos" / f"{number}.txt").write_text(f"clip {number} of many\n")
    assert run("folder", tmp_path / "videos", "--holdout", 0.4, "--clips-per-shard", 4, *options) == 0
    shards = [f"data.sources.shards.{split}=[{tmp_path}/out/{split}-*.tar]" for split in ("train", "test")]
    words = [
        "+experiment=quickstart",
        "+scale=tiny",
        "data=shards",
        "trainer.num_threads=1",
        f"run.name=recipe{len(options)}",
        *shards,
    ]
    assert launch.main([*words, f"paths.runs={place / 'runs'}", f"paths.data={place / 'data'}"]) == 0
    assert weights(place, f"recipe{len(options)}", 2)


def test_a_star_finds_files_in_order_and_never_nothing(tmp_path):
    for name in ("b.tar", "a.tar", "a.index"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(ValueError, match="matches no file"):
        expand(f"{tmp_path}/c*.tar")
