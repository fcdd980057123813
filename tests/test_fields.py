import fcntl
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from clips import clip, numbers

from vlp.data import fields
from vlp.data.fields import ClipReader, Clips, Shards
from vlp.data.index import build_index, index_url, open_index
from vlp.data.plan import PADDING
from vlp.data.rng import generator, sample_key
from vlp.data.sampling import Fps, Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.texts import Texts
from vlp.data.transforms import CenterCrop, PadToSquare, RandomResizedCrop
from vlp.types import Reason, SampleError

VIDEO = clip(20)  # 20 frames, 30 fps, 96 x 64
TRAIN = Clips(Segments(num_frames=4), [RandomResizedCrop(size=24, scale_min=0.3)], 32)
TEST = Clips(Segments(num_frames=4), [CenterCrop(size=24)], 32)


def raw(number: int, video: bytes = VIDEO) -> Raw:
    captions = [f"caption {c} of {number}" for c in range(3)]
    return Raw(f"clip{number}", video, "mp4", {"captions": captions, "hard_negative": f"not {number}"})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """5 samples in shards of 2; number 3 is broken."""
    samples = [raw(i, VIDEO if i != 3 else b"this is no video") for i in range(5)]
    return write_shards(samples, str(tmp_path_factory.mktemp("s")), prefix="s", max_samples_per_shard=2)


def reader(shards, *, clips=TRAIN, train=True, seed=1):
    return ClipReader(shards, clips=clips, seed=seed, source=0, train=train)


def copied(shards: list[str], folder: Path) -> list[str]:
    for shard in shards:
        for url in (shard, index_url(shard)):
            (folder / Path(url).name).write_bytes(Path(url).read_bytes())
    return [str(folder / Path(shard).name) for shard in shards]


def test_ids_are_positions_in_all_shards(shards):
    samples = reader(shards)
    assert len(samples) == 5 and samples.counts.tolist() == [2, 2, 1]
    assert [samples.key_of(i) for i in range(5)] == [f"clip{i}" for i in range(5)]
    assert [samples.shard_of(i) for i in range(5)] == [shards[i // 2] for i in range(5)]
    assert samples.by_reason == {Reason.OK: 4, Reason.VIDEO_BROKEN: 1}


def test_test_sample_is_the_centred_clip_with_its_first_caption(shards):
    sample = reader(shards, clips=TEST, train=False).read(4, 0)
    assert sample.frames.shape == (4, 24, 24, 3) and sample.frames.dtype == np.uint8
    assert (sample.texts.first, sample.status, sample.sample_id) == ("caption 0 of 4", Reason.OK, 4)
    np.testing.assert_allclose(sample.times_s, (np.arange(4) + 0.5) * 5 / 30, atol=1 / 30)
    assert sample.decode_s > 0


def test_frames_are_those_of_the_times(shards):
    whole = [PadToSquare(size=96), lambda frames, rng: frames[:, 16:80]]  # 64 x 96 again
    sample = reader(shards, clips=Clips(TRAIN.sampling, whole, 64)).read(0, 3)
    assert numbers(sample.frames) == np.round(sample.times_s * 30).astype(int).tolist()


def test_randomness_is_a_function_of_seed_epoch_and_sample(shards):
    def drawn(epoch=0, seed=1, sample_id=0):
        sample = reader(shards, seed=seed).read(sample_id, epoch)
        return sample.times_s.tolist(), sample.frames.sum(), sample.key

    assert drawn() == drawn()
    for change in ({"epoch": 1}, {"seed": 2}, {"sample_id": 1}):
        assert all(a != b for a, b in zip(drawn(), drawn(**change), strict=True))


def test_every_caption_is_drawn_in_training(shards):
    samples = reader(shards)
    assert {samples.read(0, epoch).texts.first for epoch in range(20)} == {f"caption {c} of 0" for c in range(3)}
    key = sample_key(1, 7, 0, 0)
    assert samples.read(0, 7).texts.first == f"caption {generator(key, 'caption').integers(3)} of 0"


def test_shorter_clip_keeps_its_number_of_frames(shards):
    sample = reader(shards, clips=Clips(Fps(num_frames=9, fps=5), TRAIN.transforms, 32)).read(0, 0)
    assert len(sample.frames) == len(sample.times_s) == 3


def test_bad_row_of_the_index_is_a_tombstone(shards):
    sample = reader(shards).read(3, 0)
    assert sample.status == Reason.VIDEO_BROKEN and sample.detail == reader(shards).detail_of(3) != ""
    assert sample.frames.shape == (4, 24, 24, 3) and not sample.frames.any() and sample.texts == Texts("")
    assert list(reader(shards).unusable(9)) == [(3, Reason.VIDEO_BROKEN)]
    assert [i for i, _ in reader(shards * 3).unusable(2)] == [3, 8]


def test_padding_is_a_tombstone(shards):
    sample = reader(shards).read(PADDING, 0)
    assert (sample.status, sample.sample_id) == (Reason.PADDING, PADDING)


@pytest.mark.parametrize("part", ["video", "json"])
def test_flipped_bit_is_a_tombstone_and_the_others_are_not_touched(shards, tmp_path, part):
    copies = copied(shards, tmp_path)
    data = bytearray(Path(copies[0]).read_bytes())
    data[open_index(copies[0]).part(1, part).offset + 20] ^= 4
    Path(copies[0]).write_bytes(data)
    samples = reader(copies)
    assert [samples.read(i, 0).status for i in range(3)] == [Reason.OK, Reason.CHECKSUM, Reason.OK]
    assert part in samples.read(1, 0).detail


def test_video_that_stops_to_decode_is_a_tombstone(shards, tmp_path):
    """A row that is OK, whose bytes are those of the index, and that the decoder cannot read all the same."""
    copies = copied(shards[:1], tmp_path)
    data, index = bytearray(Path(copies[0]).read_bytes()), open_index(copies[0])
    part = index.part(0, "video")
    data[part.offset : part.offset + part.size] = bytes(part.size)
    Path(copies[0]).write_bytes(data)
    changed = build_index(copies[0]).columns["part_crc"]
    index.columns = {**index.columns, "part_crc": changed}
    index.save(index_url(copies[0]))
    sample = reader(copies).read(0, 0)
    assert sample.status == Reason.VIDEO_BROKEN and sample.decode_s == 0


def test_shard_that_is_gone_is_a_tombstone(shards, tmp_path):
    copies = copied(shards, tmp_path)
    samples = reader(copies)
    Path(copies[1]).unlink()
    assert samples.read(2, 0).status == Reason.READ_FAILED
    with pytest.raises(SampleError, match="read_failed"):
        samples.meta(2)


def test_error_that_is_no_fault_of_the_sample_is_raised(shards):
    def broken(frames, rng):
        if len(frames) > 1:  # not when the shape is asked
            raise ZeroDivisionError
        return frames[:, :8, :8]

    with pytest.raises(ZeroDivisionError):
        reader(shards, clips=Clips(TRAIN.sampling, [broken], 32)).read(0, 0)


def test_transforms_without_a_fixed_size_are_refused(shards):
    with pytest.raises(ValueError, match=r"add one with a fixed size, such as vlp.data.transforms.CenterCrop"):
        reader(shards, clips=Clips(TRAIN.sampling, [], 32))
    moody = Clips(TRAIN.sampling, [lambda frames, rng: frames[:, :8, : 8 if len(frames) == 1 else 7]], 32)
    with pytest.raises(ValueError, match=r"clip0: the transforms gave \(8, 7\) and not \(8, 8\)"):
        reader(shards, clips=moody).read(0, 0)


def test_reader_survives_pickling(shards):
    again = pickle.loads(pickle.dumps(reader(shards)))
    np.testing.assert_array_equal(again.read(1, 2).frames, reader(shards).read(1, 2).frames)


def test_meta_and_captions_are_given_whole(shards):
    samples = reader(shards)
    assert samples.meta(1)["hard_negative"] == "not 1"
    assert list(samples.captions(99)) == [f"caption {c} of {i}" for i in range(5) for c in range(3)]
    assert list(samples.captions(2)) == [f"caption {c} of {i}" for i in (0, 4) for c in range(3)]


def test_fingerprint_tells_data_apart(shards, tmp_path):
    assert reader(shards).fingerprint == reader(copied(shards, tmp_path)).fingerprint
    assert reader(shards).fingerprint != reader(shards[:2]).fingerprint


def test_shards_expand_and_get_their_indexes(shards, tmp_path):
    copies = copied(shards, tmp_path)
    for shard in copies:
        Path(index_url(shard)).unlink()
    source = Shards(train=[f"{tmp_path}/s-00000{{0..1}}.tar"], test=[copies[2]])
    source.prepare()
    assert source.shards("train") == copies[:2] and source.shards("test") == copies[2:]
    assert [len(open_index(shard)) for shard in copies] == [2, 2, 1]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".index"] * 3 + [".tar"] * 3
    assert not source.test_is_train() and Shards(train=copies, test=copies).test_is_train()


def test_shard_that_another_process_is_indexing_is_waited_for(shards, tmp_path):
    (copy,) = copied(shards[:1], tmp_path)
    index = Path(index_url(copy)).read_bytes()
    Path(index_url(copy)).unlink()
    waiting = threading.Thread(target=Shards(train=[copy]).prepare)
    with open(copy, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not Path(index_url(copy)).exists()
        written = Path(index_url(copy)).write_bytes(index), Path(index_url(copy)).stat().st_ino
    waiting.join()
    assert Path(index_url(copy)).stat().st_ino == written[1]


def test_shard_that_is_missing_or_damaged_is_named(shards, tmp_path):
    with pytest.raises(ValueError, match=r"no-such\.tar' cannot be indexed"):
        Shards(train=[str(tmp_path / "no-such.tar")]).prepare()
    (tmp_path / "cut.tar").write_bytes(Path(shards[0]).read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        Shards(train=[str(tmp_path / "cut.tar")]).prepare()


def test_sizes_are_the_frames_and_then_the_longest_caption(tmp_path):
    texts = ["four", "twenty characters...", "ten chars."]
    videos = [clip(30), clip(6), clip(30)]
    samples = [Raw(f"c{i}", v, "mp4", {"captions": [t]}) for i, (v, t) in enumerate(zip(videos, texts, strict=True))]
    shards = write_shards(samples, str(tmp_path), prefix="s", max_samples_per_shard=2)
    sizes = reader(shards, clips=Clips(Fps(num_frames=8, fps=8.0), [CenterCrop(size=24)], 32)).sizes(np.arange(3))
    assert sizes.tolist() == [8 << 32 | 4, 1 << 32 | 20, 8 << 32 | 10]


def test_sizes_of_a_shard_that_has_gone_are_zero(shards, tmp_path):
    moved = copied(shards, tmp_path)
    samples = reader(moved)
    Path(moved[1]).unlink()
    fields._index.cache_clear()
    assert (samples.sizes(np.arange(5)) > 0).tolist() == [True, True, False, False, True]
