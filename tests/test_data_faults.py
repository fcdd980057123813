"""Faults of data in real runs: what is lost is counted and named, and the run goes on or ends with its code."""

import csv
import ctypes
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from clips import clip
from tiny_runs import overrides

from vlp.data import datamodule, loader
from vlp.data.datamodule import VideoTextData
from vlp.data.fields import Shards
from vlp.data.index import open_index
from vlp.data.sampling import Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.transforms import CenterCrop
from vlp.training import evaluate_run, launch
from vlp.training.exits import Exit
from vlp.types import Reason

PLAIN, MARKED = clip(12, size=(64, 48)), clip(12, size=(48, 48))
BAD = 3  # the sample whose clip is square


def write(folder: Path, *, num: int = 8, per_shard: int = 4) -> list[str]:
    videos = [MARKED if number == BAD else PLAIN for number in range(num)]
    samples = [Raw(f"p{i}", video, "mp4", {"captions": [f"clip {i}"]}) for i, video in enumerate(videos)]
    return write_shards(samples, str(folder), prefix="p", max_samples_per_shard=per_shard)


def damage(shard: str, row: int) -> None:
    """Flip a byte in the video of a sample, behind the index."""
    place = open_index(shard).part(row, "video")
    with open(shard, "r+b") as file:
        file.seek(place.offset + place.size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


class Native:
    """Runs native code at square clips, which no signal handler and no exception can end."""

    def __init__(self, deed):
        self.deed = deed

    def __call__(self, frames, rng):
        if frames.any() and frames.shape[1] == frames.shape[2]:
            self.deed()
        return frames


def hang_with_the_lock():
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter lock


def crash():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's handler would print a page
    ctypes.string_at(0)


@pytest.mark.parametrize(("deed", "reason"), [(hang_with_the_lock, "DECODE_TIMEOUT"), (crash, "DECODE_CRASH")])
def test_native_code_that_hangs_or_crashes_costs_one_sample(tmp_path, deed, reason):
    train_tokenizer(["clip"], vocab_size=100, path=tmp_path / "t.json")
    data = VideoTextData(
        **{"sources": {"p": Shards(train=write(tmp_path))}, "weights": {"p": 1.0}, "batch_size": 4, "accumulate": 1},
        **{
            "num_lanes": 2,
            "window_shards": 1,
            "bucket_steps": 1,
            "num_workers": 2,
            "seed": 0,
            "short_side": 24,
            "decode_timeout_s": 1.0,
        },
        **{"sampling_train": Segments(num_frames=2), "sampling_test": Segments(num_frames=2)},
        **{"transforms_train": [Native(deed), CenterCrop(size=16)], "transforms_test": [CenterCrop(size=16)]},
        make_tokenizer=lambda captions: load_tokenizer(str(tmp_path / "t.json"), max_length=8),
    )
    assert data._workers.decode_s == 1.0 and data._workers.stall_s == 30.0  # the first of the two sees it
    batches = [step.batches[0] for step in data.train_loader(start_step=0, num_steps=2, rank=0, world_size=1)]
    found = {int(i): Reason(int(status)) for b in batches for i, status in zip(b.sample_id, b.status, strict=True)}
    assert found == {i: Reason[reason] if i == BAD else Reason.OK for i in range(8)}
    assert torch.cat([batch.frames[batch.valid].flatten(1).any(1) for batch in batches]).all()


def test_the_limit_of_decoding_reaches_the_workers_of_a_run_and_of_an_evaluation(place, monkeypatch):
    made = []
    monkeypatch.setattr(datamodule, "workers_for", lambda *a, **k: made.append(loader.workers_for(*a, **k)) or made[-1])
    more = ("objective=[contrastive]", "eval.tasks={}", "trainer.max_steps=1", "data.decode_timeout_s=33.5")
    assert launch.main(overrides(place, "limit", *more)) == Exit.DONE
    assert [(workers.decode_s, workers.stall_s) for workers in made] == [(33.5, 33.5)]
    run = place / "runs" / "limit"
    cfg, _ = evaluate_run.load_config(run, None, ["data.decode_timeout_s=44.5"])
    assert evaluate_run.splits(cfg, run)._workers.decode_s == 44.5


def run(place: Path, tmp_path: Path, name: str, *more: str) -> int:
    shards = [f"data.sources.shards.{split}=[{tmp_path}/p-*.tar]" for split in ("train", "test")]
    words = overrides(place, name, "data=shards", *shards, *more)
    return launch.main([word for word in words if "sources.world" not in word])


def test_lost_samples_are_in_the_log_and_the_record_by_source_and_reason(place, tmp_path, capsys):
    damage(write(tmp_path, num=12)[0], 1)
    assert run(place, tmp_path, "lost", "trainer.max_steps=3", "trainer.bad_sample_budget=0.5") == Exit.DONE
    rows = list(csv.DictReader((place / "runs" / "lost" / "metrics.csv").open()))
    record = json.loads((place / "runs" / "lost" / "run.json").read_text())
    counts = [float(row["data/shards/checksum"]) for row in rows if row.get("data/shards/checksum")]
    assert counts and counts == sorted(counts) and counts[-1] == record["seen"]["shards"]["checksum"] >= 1
    assert [each["key"] for each in record["sources"][0]["dropped"]] == ["p1"]


def test_shards_that_are_replaced_or_gone_are_all_named_at_the_start(place, tmp_path, capsys):
    shards = write(tmp_path, num=16)
    Path(shards[1]).write_bytes(b"<html>no</html>")
    Path(shards[3]).write_bytes(b"")
    assert run(place, tmp_path, "replaced") == Exit.DATA_BUDGET
    error = capsys.readouterr().err
    assert shards[1] in error and shards[3] in error and shards[0] not in error and "Traceback" not in error


def test_shards_that_cannot_be_indexed_are_all_named_at_the_start(place, tmp_path, capsys):
    shards = write(tmp_path, num=16)
    for number, content in ((0, b"<html>no</html>"), (2, b"\x1f\x8b gzip"), (3, b"")):
        Path(shards[number]).write_bytes(content)
        Path(shards[number].replace(".tar", ".index")).unlink()
    assert run(place, tmp_path, "foreign") == Exit.DATA_BUDGET
    error = capsys.readouterr().err
    assert all(word in error for word in ("a web page", "gzip data", "an empty file")) and shards[1] not in error
