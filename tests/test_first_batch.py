"""A run gets its first batch soon, or ends soon with the reason: nothing waits for data that will never come."""

import os
import time

import clips
import pytest
from tiny_runs import overrides

from vlp.data.index import open_index
from vlp.data.shards import Raw, write_shards
from vlp.training import launch

LIMIT_S = 60
EXIT_DATA, EXIT_CONFIG = 65, 78


def shards_of(place, video: bytes, *, count: int) -> list[str]:
    raws = [Raw(f"{i:03d}", video, "mp4", {"captions": [f"clip number {i}"]}) for i in range(count)]
    return write_shards(raws, os.fspath(place / "shards"), prefix="train", max_samples_per_shard=count)


def spoil(shard: str) -> None:
    """Change a byte of every video after it was indexed; the size stays."""
    index = open_index(shard)
    with open(shard, "r+b") as file:
        for row in range(len(index)):
            file.seek(index.part(row, "video").offset + 100)
            file.write(b"\xff")


def run(place, shard: str, *more: str) -> tuple[int, float]:
    words = overrides(place, "x", "data=shards", f"data.sources.shards.train=[{shard}]", *more)
    words = [word for word in words if not word.startswith("data.sources.world")]
    began = time.monotonic()
    code = launch.main(words)
    return code, time.monotonic() - began


def test_data_of_which_no_sample_is_usable_ends_the_run_with_the_counts(tmp_path, capsys):
    (shard,) = shards_of(tmp_path, b"no video at all", count=120)
    code, seconds = run(tmp_path, shard)
    assert code == EXIT_CONFIG and seconds < LIMIT_S
    assert "source 'shards': none of its 120 train samples can be used (video_broken=120)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=[contrastive]"], "100 of 100 samples were unusable (checksum=100)"),  # found in training
        ([], "none of the first 256 training samples can be used (checksum=2"),  # a codebook is fitted
    ],
)
def test_data_that_went_bad_after_its_index_ends_the_run_with_the_counts(tmp_path, capsys, words, message):
    (shard,) = shards_of(tmp_path, clips.clip(4), count=120)
    spoil(shard)
    code, seconds = run(tmp_path, shard, *words, "trainer.max_steps=40")
    assert code == EXIT_DATA and seconds < LIMIT_S
    assert message in capsys.readouterr().err
