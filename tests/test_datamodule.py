import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import clip
from object_server import ObjectServer
from pytorch_lightning.utilities import move_data_to_device

from vlp.data.datamodule import VideoTextData
from vlp.data.fields import Shards
from vlp.data.remote import RETRY
from vlp.data.sampling import Segments
from vlp.data.shard_cache import ShardCache
from vlp.data.shards import Raw, write_shards
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.transforms import CenterCrop, RandomResizedCrop
from vlp.data.workers import Workers
from vlp.types import Reason

VIDEOS = [clip(12, size=(64, 48)), clip(18, size=(48, 64))]
BAD = 5  # the sample of each source that has no video


def write(folder, prefix: str, num: int) -> list[str]:
    samples = [
        Raw(f"{prefix}{i}", b"" if i == BAD else VIDEOS[i % 2], "mp4", {"captions": [f"{prefix} number {i}", "other"]})
        for i in range(num)
    ]
    return write_shards(samples, str(folder), prefix=prefix, max_samples_per_shard=4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources of 14 and 9 training samples; the first has 7 for tests."""
    folder = tmp_path_factory.mktemp("data")
    first = Shards(train=write(folder, "a", 14), test=write(folder, "t", 7))
    return {"first": first, "second": Shards(train=write(folder, "b", 9), test=[])}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(["a t b number other"], vocab_size=200, path=path)
    return load_tokenizer(str(path), max_length=16)


@pytest.fixture
def make(sources, words):
    def make(**changes) -> VideoTextData:
        settings = {
            "sources": sources,
            "weights": {"first": 2.0, "second": 1.0},
            "batch_size": 4,
            "accumulate": 1,
            "num_lanes": 4,
            "window_shards": 2,
            "bucket_steps": 1,
            "num_workers": 0,
            "seed": 3,
            "sampling_train": Segments(num_frames=2),
            "sampling_test": Segments(num_frames=3),
            "transforms_train": [RandomResizedCrop(size=16)],
            "transforms_test": [CenterCrop(size=24)],
            "short_side": 24,
            "make_tokenizer": lambda captions: words,
        }
        return VideoTextData(**(settings | changes))

    return make


class Poison:
    """Takes its process down at a square clip."""

    def __call__(self, frames, rng):
        if frames.any() and frames.shape[1] == frames.shape[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return frames


def train(data: VideoTextData, start: int, num: int, rank: int = 0, world_size: int = 1) -> list:
    return list(data.train_loader(start_step=start, num_steps=num, rank=rank, world_size=world_size))


def assert_same(left: list, right: list) -> None:
    assert [(x.step, x.source) for x in left] == [(x.step, x.source) for x in right]
    for a, b in zip(left, right, strict=True):
        for one, other in zip(a.batches, b.batches, strict=True):
            torch.testing.assert_close(tuple(one), tuple(other), rtol=0, atol=0)


def ids_of(steps: list) -> list[list[int]]:
    return [[i for batch in step.batches for i in batch.sample_id.tolist()] for step in steps]


def test_each_epoch_of_each_source_holds_every_sample_once(make):
    data = make()
    steps = train(data, 0, 21)
    assert data.steps_per_epoch("first") == 4 and data.steps_per_epoch("second") == 3
    for source, (num, per_epoch) in enumerate([(14, 4), (9, 3)]):
        ids = ids_of([step for step in steps if step.source == source])
        for epoch in range(len(ids) // per_epoch):
            seen = np.concatenate(ids[epoch * per_epoch : (epoch + 1) * per_epoch])
            assert sorted(seen[seen >= 0]) == list(range(num))
        assert ids[:per_epoch] != ids[per_epoch : 2 * per_epoch]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(make, num_workers):
    assert_same(train(make(num_workers=num_workers), 0, 8), train(make(), 0, 8))


@pytest.mark.parametrize("start", [1, 5, 11])
def test_loader_starts_anywhere_and_continues_the_same_run(make, start):
    assert_same(train(make(num_workers=1), start, 13 - start), train(make(), 0, 13)[start:])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_and_micro_batches_cut_the_same_global_batch(make, world_size, accumulate):
    whole = train(make(), 0, 7)
    ranks = [train(make(accumulate=accumulate), 0, 7, rank, world_size) for rank in range(world_size)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert {len(part.batches) for part in parts} == {accumulate}
        for field in ("sample_id", "key", "status", "frames"):
            per_rank = [torch.cat([getattr(batch, field) for batch in part.batches]) for part in parts]
            assert torch.equal(torch.stack(per_rank, 1).flatten(0, 1), getattr(step.batches[0], field))


def test_micro_batches_of_all_ranks_hold_the_same_samples_for_any_world_size(make):
    def micro(world_size: int) -> list[set[int]]:
        parts = [train(make(accumulate=2), 0, 1, rank, world_size)[0] for rank in range(world_size)]
        return [{i for part in parts for i in part.batches[m].sample_id.tolist()} for m in range(2)]

    assert micro(1) == micro(2)


@pytest.mark.parametrize("bucket_steps", [1, 3])
def test_balanced_ranks_read_the_clips_of_the_plain_ones_and_the_same_frames(make, bucket_steps):
    def read(world: int, **changes) -> list[dict[int, bytes]]:
        data = make(batch_size=8, bucket_steps=bucket_steps, accumulate=2, **changes)
        steps = zip(*(train(data, 0, 5, rank, world) for rank in range(world)), strict=True)
        rows = [
            [row for part in ranks for batch in part.batches for row in zip(*batch, strict=True)] for ranks in steps
        ]
        return [{int(row[-2]): row[0].numpy().tobytes() for row in step} for step in rows]

    plain = read(1)
    assert read(1, balance=True) == read(2, balance=True) == plain and len(plain[0]) == 8


def test_loader_can_be_sent_to_spawned_processes(make):
    loader = make().train_loader(start_step=2, num_steps=2, rank=0, world_size=1)
    assert_same(list(pickle.loads(pickle.dumps(loader))), list(loader))


def test_source_of_a_step_is_the_same_on_all_ranks(make):
    data = make()
    assert [s.source for s in train(data, 0, 9, 0, 2)] == [s.source for s in train(data, 0, 9, 1, 2)]
    assert sorted(s.source for s in train(data, 0, 9)) == [0] * 6 + [1] * 3


def test_two_sources_of_the_same_shards_have_different_orders(make, sources):
    same = Shards(train=sources["first"].shards("train"))
    steps = train(make(sources={"x": same, "y": same}, weights={"x": 1.0, "y": 1.0}), 0, 8)
    ids = [ids_of([step for step in steps if step.source == source]) for source in (0, 1)]
    assert len(ids[0]) == len(ids[1]) and ids[0] != ids[1]


def test_tombstones_stand_in_the_place_of_bad_samples(make):
    batches = [batch for step in train(make(), 0, 12) for batch in step.batches]
    bad = [batch.status[batch.sample_id == BAD] for batch in batches]
    assert len(torch.cat(bad)) >= 2 and set(torch.cat(bad).tolist()) == {Reason.VIDEO_EMPTY}
    padding = torch.cat([batch.status[batch.sample_id == -1] for batch in batches])
    assert len(padding) and set(padding.tolist()) == {Reason.PADDING}
    assert all(torch.equal(batch.valid, batch.status == Reason.OK) for batch in batches)


def test_clip_that_kills_its_worker_becomes_a_tombstone_and_nothing_else_changes(make, tmp_path):
    videos = [clip(12, size=(48, 48)) if i == 3 else VIDEOS[0] for i in range(8)]
    samples = [Raw(f"p{i}", video, "mp4", {"captions": ["a"]}) for i, video in enumerate(videos)]
    source = Shards(train=write_shards(samples, str(tmp_path), prefix="p", max_samples_per_shard=9))
    one = {"sources": {"p": source}, "weights": {"p": 1.0}}
    plain = train(make(**one), 0, 2)
    poisoned = train(make(**one, num_workers=2, transforms_train=[Poison(), RandomResizedCrop(size=16)]), 0, 2)
    for a, b in zip(plain, poisoned, strict=True):
        left, right = a.batches[0], b.batches[0]
        assert right.status.tolist() == [Reason.DECODE_CRASH if i == 3 else Reason.OK for i in left.sample_id]
        assert torch.equal(left.frames[right.valid], right.frames[right.valid])


def test_steps_say_how_long_a_clip_took_to_decode(make):
    assert all(0 < step.decode_s < 1 for step in train(make(), 0, 3))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_test_split_is_read_once_in_order(make, num_workers, world_size):
    data, seen = make(num_workers=num_workers), []
    for rank in range(world_size):
        loader = data.test_loader("first", batch_size=2, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader) and max(len(batch.valid) for batch in batches) == 2
        seen.append([i for batch in batches for i in batch.sample_id.tolist()])
    assert seen == [list(range(rank, 7, world_size)) for rank in range(world_size)]
    assert batches[0].frames.shape[1:] == (3, 24, 24, 3)


def test_test_split_carries_first_captions(make, words):
    data = make()
    batch = next(iter(data.test_loader("first", batch_size=3, rank=0, world_size=1)))
    assert words.decode(batch.text_ids) == ["t number 0", "t number 1", "t number 2"]
    assert data.reader("first", "test").meta(2)["captions"] == ["t number 2", "other"]


def test_step_survives_the_transfer_of_lightning(make):
    step = train(make(), 0, 1)[0]
    moved = move_data_to_device(step, torch.device("meta"))
    assert type(moved) is type(step) and moved.batches[0].frames.device.type == "meta"
    assert (moved.step, moved.source) == (0, step.source)


def test_what_is_lost_is_listed_and_explained(make, sources):
    data = make()
    shard = sources["first"].shards("train")[1]
    expected = {"key": "a5", "where": shard, "reason": "video_empty", "detail": "no bytes"}
    assert data.explain(0, BAD, Reason.VIDEO_EMPTY) == expected
    assert data.explain(0, 2, Reason.READ_FAILED)["key"] == "a2"
    assert [each["key"] for each in data.dropped("first")] == ["a5", "t5"]
    assert data.dropped("first")[0] == {**expected, "stage": "index"}
    both = Shards(train=sources["first"].shards("train"), test=sources["first"].shards("train"))
    again = make(sources={"both": both}, weights={"both": 1.0})
    assert again.test_is_train("both") and len(again.dropped("both")) == 1


def test_counts_and_fingerprints_are_told(make, sources):
    data = make()
    assert [data.num_clips("first", split) for split in ("train", "test")] == [14, 7]
    prints = data.fingerprints()
    assert prints == make().fingerprints() and len(set(prints.values())) == 2
    assert make(sources={"first": sources["first"]}, weights={"first": 1}).fingerprints()["first"] == prints["first"]
    assert not data.test_is_train("first")


def test_tokenizer_gets_the_training_captions(make, words):
    seen: list[str] = []
    make(make_tokenizer=lambda captions: seen.extend(captions) or words)
    assert {"a number 0", "b number 8", "other"} <= set(seen) and not any(text.startswith("t") for text in seen)
    assert "a number 5" in seen  # its video is bad, its caption is not


def test_source_of_weight_zero_is_only_for_tests(make):
    data = make(weights={"first": 0.0, "second": 1.0})
    assert {step.source for step in train(data, 0, 5)} == {1}
    assert (
        data.steps_per_epoch("first") == 0 and len(data.test_loader("first", batch_size=7, rank=0, world_size=1)) == 1
    )


def test_source_without_a_usable_sample_is_refused_with_the_counts(make, tmp_path):
    samples = [Raw(f"x{i}", b"" if i else b"rubbish", "mp4", {"captions": ["a"]}) for i in range(5)]
    source = Shards(train=write_shards(samples, str(tmp_path), prefix="x", max_samples_per_shard=9))
    with pytest.raises(ValueError, match=r"source 'x': none of its 5 train samples.*video_empty=4, video_broken=1.*x0"):
        make(sources={"x": source}, weights={"x": 1.0})


def test_source_without_enough_samples_is_refused(make, sources):
    with pytest.raises(
        ValueError, match=r"'second' has 9 training samples in 3 shards.*batch_size=12.*batch_size to 8"
    ):
        make(batch_size=12)
    with pytest.raises(ValueError, match="'none' has 0 training samples in 0 shards"):
        make(sources={"none": Shards(test=sources["first"].shards("test"))}, weights={"none": 1.0})


def test_layout_that_does_not_divide_is_refused(make):
    with pytest.raises(ValueError, match="batch_size=6 is not a multiple of num_lanes=4"):
        make(batch_size=6)
    with pytest.raises(ValueError, match="batch_size=4 is not a multiple of accumulate=3"):
        make(accumulate=3)
    with pytest.raises(ValueError, match="world_size=3 does not fit"):
        make().train_loader(start_step=0, num_steps=1, rank=0, world_size=3)
    with pytest.raises(ValueError, match="world_size=4 does not fit"):
        make(accumulate=2).train_loader(start_step=0, num_steps=1, rank=0, world_size=4)


def test_index_that_is_missing_is_named(make, sources, tmp_path):
    (tmp_path / "no.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"source 'x': .*no\.index.*python -m vlp\.data\.index"):
        make(sources={"x": Shards(train=[str(tmp_path / "no.tar")])}, weights={"x": 1.0})


def test_remote_shards_give_the_batches_of_local_ones(make, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ObjectServer() as server:
        near = sources["second"].shards("train")
        server.objects = {f"/{Path(shard).name}": Path(shard).read_bytes() for shard in near}
        far = Shards(train=[f"{server.url}/{Path(shard).name}" for shard in near], index_dir=str(tmp_path))
        far.prepare()
        cache = ShardCache(str(tmp_path / "cache"), max_bytes=1 << 30)
        options = {"index_dir": str(tmp_path), "cache": cache, "num_workers": 1}
        data = make(sources={"second": far}, weights={"second": 1.0}, **options)
        local = make(sources={"second": sources["second"]}, weights={"second": 1.0})
        assert data.fingerprints() == local.fingerprints()
        # A worker that waits for storage does not hang; only a decoder does.
        assert data._workers.stall_s >= 3 * RETRY.budget_s and local._workers.stall_s == Workers().stall_s
        place = {"start_step": 0, "num_steps": 3, "rank": 0, "world_size": 1}
        for one, two in zip(data.train_loader(**place), local.train_loader(**place), strict=True):
            for mine, theirs in zip(one.batches[0], two.batches[0], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert os.listdir(tmp_path / "cache") != ["lock"]
        server.shutdown()
