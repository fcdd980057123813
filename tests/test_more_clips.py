"""Several clips of a sample out of one decode. Axes: B samples, K other clips, T frames, E embedding."""

import math

import numpy as np
import pytest
import torch
from clips import clip, numbers
from test_video_text import build, embed, frames
from tiny_runs import overrides

import vlp.data.decode
from vlp import config
from vlp.data.collate import collate
from vlp.data.datamodule import VideoTextData
from vlp.data.fields import Clip as Other
from vlp.data.fields import ClipReader, Clips, Sample, Shards
from vlp.data.rng import generator
from vlp.data.sampling import Fps, Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.texts import Texts
from vlp.data.transforms import CenterCrop, PadToSquare, RandomResizedCrop
from vlp.layers.pool import MeanPool
from vlp.planning.system import batch_of
from vlp.training import launch
from vlp.training.assemble import assemble
from vlp.training.exits import Exit
from vlp.training.update import PlainUpdate
from vlp.types import Batch, Reason, nothing_more

SECOND = ("clip.more_clips=1", "objective.contrastive.inputs.text=second_clip_embed")
SHAPE = (3, 5, 7, 3)  # T H W 3
TRAIN_CROP = RandomResizedCrop(size=24, scale_min=0.3)
SAME_TIMES = Fps(num_frames=40, fps=30)  # every frame: no phase is left to draw


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """6 samples of 40 frames at 30 fps; number 3 is broken."""
    videos = [clip(40) if i != 3 else b"this is no video" for i in range(6)]
    samples = [Raw(f"clip{i}", video, "mp4", {"captions": [f"number {i}"]}) for i, video in enumerate(videos)]
    return write_shards(samples, str(tmp_path_factory.mktemp("m")), prefix="m", max_samples_per_shard=9)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(["number"], vocab_size=200, path=path)
    return load_tokenizer(str(path), max_length=8)


def reader(shards, num_more: int, *, seed: int = 1, sampling=None, transforms=None, side: int = 32) -> ClipReader:
    clips = Clips(sampling or Segments(num_frames=4), transforms or [TRAIN_CROP], side, num_more)
    return ClipReader(shards, clips=clips, seed=seed, source=0, train=True)


def data(shards, words, **changes) -> VideoTextData:
    settings = {
        **{"sources": {"m": Shards(train=shards, test=shards)}, "weights": {"m": 1.0}, "batch_size": 4},
        **{"accumulate": 1, "num_lanes": 2, "window_shards": 1, "bucket_steps": 1, "num_workers": 0, "seed": 0},
        **{"sampling_train": Segments(num_frames=2), "sampling_test": Segments(num_frames=2), "short_side": 24},
        **{"transforms_train": [RandomResizedCrop(size=16)], "transforms_test": [CenterCrop(size=16)]},
        **{"make_tokenizer": lambda captions: words, "more_clips": 2},
    }
    return VideoTextData(**(settings | changes))


def steps(source: VideoTextData) -> list[Batch]:
    return [step.batches[0] for step in source.train_loader(start_step=0, num_steps=3, rank=0, world_size=1)]


def sample(lengths: list[int], status: Reason = Reason.OK) -> Sample:
    clips = [Other(np.full((n, *SHAPE[1:]), 10 + n, np.uint8), np.arange(n) + 0.5) for n in lengths]
    return Sample(*clips[0], Texts("number"), 4, 5, status, "", 0.1, tuple(clips[1:]))


@pytest.mark.parametrize("num_more", [0, 1, 3])
def test_one_decode_serves_all_clips_and_the_first_is_what_it_was(shards, monkeypatch, num_more):
    calls = []

    def counted(video, times_s, **options):
        calls.append(len(times_s))
        return decode(video, times_s, **options)

    decode = vlp.data.decode.decode
    alone = [reader(shards, 0).read(1, epoch) for epoch in range(4)]
    monkeypatch.setattr(vlp.data.decode, "decode", counted)
    together = [reader(shards, num_more).read(1, epoch) for epoch in range(4)]
    assert calls == [4 * (1 + num_more)] * 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        np.testing.assert_array_equal(one.times_s, other.times_s)
        assert (one.texts, one.key) == (other.texts, other.key) and len(other.more) == num_more


def test_first_clip_keeps_its_plain_streams_and_tests_bring_no_other(shards):
    samples = reader(shards, 2)
    times_s = Segments(num_frames=4)(40 / 30, 30, generator(samples.read(1, 0).key, "times"))
    np.testing.assert_allclose(samples.read(1, 0).times_s, np.floor(times_s * 30) / 30, atol=1e-6)
    crop = TRAIN_CROP.box(32, 48, generator(7, "crop"))
    drawn = samples.clips._replace(transforms=[lambda frames, rng: crop == TRAIN_CROP.box(32, 48, rng)])
    assert drawn.transformed(np.zeros(1), 7)
    assert ClipReader(shards, clips=samples.clips, seed=1, source=0, train=False).read(1, 0).more == ()


def test_each_clip_holds_the_frames_of_its_own_times(shards):
    whole = [PadToSquare(size=96), lambda frames, rng: frames[:, 16:80]]  # 64 x 96 again
    read = reader(shards, 2, transforms=whole, side=64).read(0, 3)
    shown = [numbers(each.frames) for each in (read, *read.more)]
    assert shown == [np.round(each.times_s * 30).astype(int).tolist() for each in (read, *read.more)]
    assert len({tuple(each) for each in shown}) == 3


def test_clips_are_a_function_of_the_key_and_differ(shards):
    def drawn(epoch=0, seed=1, sample_id=0):
        return [
            (each.times_s.tolist(), each.frames.sum())
            for each in reader(shards, 2, seed=seed).read(sample_id, epoch).more
        ]

    assert drawn() == drawn() and drawn()[0] != drawn()[1]
    for change in ({"epoch": 1}, {"seed": 2}, {"sample_id": 1}):
        assert all(a != b for a, b in zip(drawn(), drawn(**change), strict=True))


def test_clips_of_the_same_times_are_cropped_differently(shards):
    read = reader(shards, 1, sampling=SAME_TIMES).read(0, 0)
    np.testing.assert_array_equal(read.times_s, read.more[0].times_s)
    assert len(read.frames) == 40 and (read.frames != read.more[0].frames).any()


def test_tombstone_has_black_clips(shards):
    read = reader(shards, 2).read(3, 0)
    assert read.status == Reason.VIDEO_BROKEN and len(read.more) == 2
    assert all(each.frames.shape == (4, 24, 24, 3) and not each.frames.any() for each in read.more)


def test_other_clips_are_stacked_behind_the_first_in_one_memory(words):
    buffer = torch.full((12 * math.prod(SHAPE),), 77, dtype=torch.uint8)
    batch = collate([sample([2, 3, 1]), sample([1, 2, 2])], words, shape=SHAPE, buffer=buffer)
    assert batch.more_frames.shape == (2, 2, *SHAPE) and batch.more_frame_mask.sum(-1).tolist() == [[3, 1], [2, 2]]
    assert batch.more_frames[..., 0, 0, 0].tolist() == [[[13] * 3, [11, 0, 0]], [[12, 12, 0]] * 2]
    assert batch.frames[..., 0, 0, 0].tolist() == [[12, 12, 0], [11, 0, 0]]
    assert batch.frames.data_ptr() == buffer.data_ptr()
    assert batch.more_frames.data_ptr() == buffer.data_ptr() + batch.frames.numel()
    assert (buffer[6 * math.prod(SHAPE) :] == 77).all()


def test_one_clip_a_sample_costs_nothing(shards, words):
    batch = collate([sample([2]), sample([3])], words, shape=SHAPE)
    assert batch.more_frames.shape == (2, 0, 1, 1, 1, 3) and batch.more_frame_mask.shape == (2, 0, 1)
    assert all(getattr(batch, name).dtype == nothing.dtype for name, nothing in nothing_more(2).items())
    assert reader(shards, 0).sample_bytes == 4 * 24 * 24 * 3 and reader(shards, 2).sample_bytes == 12 * 24 * 24 * 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_other_clips_for_any_number_of_workers(shards, words, num_workers):
    plain, more = steps(data(shards, words, more_clips=0)), steps(data(shards, words, num_workers=num_workers))
    expected = steps(data(shards, words))
    for one, batch, same in zip(plain, more, expected, strict=True):
        assert batch.more_frames.shape == (4, 2, 2, 16, 16, 3) and batch.more_frame_mask.all()
        torch.testing.assert_close(tuple(batch), tuple(same), rtol=0, atol=0)
        assert torch.equal(one.frames, batch.frames) and torch.equal(one.times_s, batch.times_s)
        lit = batch.more_frames.flatten(2).any(-1)
        assert torch.equal(lit, batch.valid[:, None].expand(4, 2))
    assert not all(batch.valid.all() for batch in more), "a broken sample is among them"


def test_test_split_brings_one_clip(shards, words):
    loader = data(shards, words).test_loader("m", batch_size=3, rank=0, world_size=1)
    assert [batch.more_frames.shape[:2] for batch in loader] == [(3, 0), (3, 0)]


def test_embeddings_of_all_clips_are_those_of_each_alone():
    model = build(5, pool=MeanPool).eval()
    first, more = frames(), torch.stack([frames().flip(1), frames().flip(2), 255 - frames()], dim=1)  # [B, K, ...]
    together = model.clips_embed(
        embed(model, first), model.more_video(more, torch.ones(more.shape[:3], dtype=torch.bool))
    )
    alone = torch.stack([embed(model, each) for each in (first, *more.unbind(1))], dim=1)
    torch.testing.assert_close(together, alone)
    assert torch.equal(model.second_clip_embed(together), together[:, 1])


def test_clips_of_a_sample_can_be_contrasted(place, monkeypatch):
    bare, towers = [], set()

    def note(self):
        towers.update(name.split(".")[1] for name in self.trained)
        bare.extend(name for name, parameter in self.trained.items() if parameter.grad is None)
        return norm(self)

    norm = PlainUpdate.norm
    monkeypatch.setattr(PlainUpdate, "norm", note)
    more = ("trainer.max_steps=1", "objective=[contrastive]", "eval.tasks={}", *SECOND)
    assert launch.main([*overrides(place, "second_clip", *more)[1:]]) == Exit.DONE
    assert bare == [] and "video_encoder" in towers and "text_encoder" not in towers


def test_objective_over_other_clips_without_any_is_refused(place):
    cfg = config.load([*overrides(place, "none", "objective=[contrastive]"), SECOND[1]])
    with pytest.raises(config.ConfigError, match=r"clip\.more_clips: 0 other clips of a sample, but"):
        assemble(cfg)


def test_objective_over_other_texts_without_any_is_refused(place):
    with pytest.raises(config.ConfigError, match=r"texts: one text a sample, .* use texts=many_captions"):
        assemble(config.load(overrides(place, "one", "objective=[contrastive,contrastive_second]")))


def test_planner_counts_the_other_clips(place):
    batch = batch_of(config.load(overrides(place, "plan", "clip.more_clips=3")), 2)
    assert batch.more_frames.shape[:2] == (2, 3) and batch.more_frames.shape[2:] == batch.frames.shape[1:]
    assert batch.more_frames.device.type == "meta" and batch.more_frame_mask.all()
