import hashlib
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest
import webdataset
from clips import clip, image

from vlp.data.index import build_index, check_shard, index_url, meta_of, open_index, read_part
from vlp.data.probe import probe
from vlp.data.shards import Raw, write_shards
from vlp.types import Reason

VIDEO, PICTURE = clip(3), image()


def raws(count: int, **fields) -> list[Raw]:
    samples = [Raw(f"d/k{i}", VIDEO, "mp4", {"captions": [f"clip {i}", "é"], "n": i}) for i in range(count)]
    return [sample._replace(**fields) for sample in samples]


def digests(paths: list[str]) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def test_samples_come_back_in_order(tmp_path):
    samples = [*raws(5), Raw("still", PICTURE, "png", {"captions": ["p"]})]
    paths = write_shards(samples, str(tmp_path / "new" / "dir"), prefix="train", max_samples_per_shard=4)
    assert [os.path.basename(path) for path in paths] == ["train-000000.tar", "train-000001.tar"]
    rows = [(index, row) for index in map(open_index, paths) for row in range(len(index))]
    assert [index.key(row) for index, row in rows] == [sample.key for sample in samples]
    assert [meta_of(index, row) for index, row in rows] == [sample.meta for sample in samples]
    assert [read_part(index, row, "video") for index, row in rows] == [sample.video for sample in samples]


def test_other_tools_read_the_shards(tmp_path):
    (path,) = write_shards(raws(2), str(tmp_path), prefix="x", max_samples_per_shard=9)
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [(s["__key__"], s["mp4"], s["txt"]) for s in samples] == [
        (f"d/k{i}", VIDEO, b"clip %d" % i) for i in range(2)
    ]
    with tarfile.open(path) as reader:
        assert {(info.mtime, info.uname, info.gname, info.uid, info.mode) for info in reader} == {(0, "", "", 0, 0o444)}


def test_the_same_samples_give_the_same_bytes_and_indexes(tmp_path):
    one, two = (write_shards(raws(3), str(tmp_path / name), prefix="x", max_samples_per_shard=2) for name in "ab")
    assert digests(one) == digests(two) and len(one) == 2
    assert digests([index_url(path) for path in one]) == digests([index_url(path) for path in two])


def test_the_index_made_while_writing_equals_one_made_later(tmp_path):
    (path,) = write_shards(raws(3), str(tmp_path), prefix="x", max_samples_per_shard=9)
    build_index(path).save(str(tmp_path / "later.index"))
    assert (tmp_path / "later.index").read_bytes() == (tmp_path / "x-000000.index").read_bytes()
    assert open_index(path).info.sha256 == digests([path])[0] and check_shard(path) == []


def test_bytes_limit_a_shard_but_never_leave_one_empty(tmp_path):
    samples = raws(5)
    samples[2] = samples[2]._replace(video=VIDEO * 9)
    paths = write_shards(
        samples, str(tmp_path), prefix="x", max_samples_per_shard=9, max_bytes_per_shard=2 * len(VIDEO)
    )
    assert [len(open_index(path)) for path in paths] == [2, 1, 2]


def test_no_samples_make_no_shard(tmp_path):
    assert write_shards([], str(tmp_path), prefix="x", max_samples_per_shard=1) == [] and not os.listdir(tmp_path)


def test_broken_videos_are_written_and_become_rows_that_are_not_ok(tmp_path):
    samples = raws(3)
    samples[1] = samples[1]._replace(video=b"")
    (path,) = write_shards(samples, str(tmp_path), prefix="x", max_samples_per_shard=9)
    assert [open_index(path).status(row) for row in range(3)] == [Reason.OK, Reason.VIDEO_EMPTY, Reason.OK]


def test_facts_that_are_given_are_not_probed_again(tmp_path):
    facts = probe(clip(7))
    (path,) = write_shards(raws(1, facts=facts), str(tmp_path), prefix="x", max_samples_per_shard=1)
    assert open_index(path).facts(0).num_frames == 7


@pytest.mark.parametrize(
    "fields",
    [{"key": key} for key in ("a.b", "../a", "/a", "a\n", "", "./a", "d/", "a/../b", "n" * 1100)]
    + [{"extension": extension} for extension in ("txt", "exe", "MP4", "")]
    + [{"meta": meta} for meta in ({}, {"captions": []}, {"captions": "a"}, {"captions": ["a"], "x": float("nan")})],
)
def test_what_no_reader_accepts_is_not_written(tmp_path, fields):
    with pytest.raises(ValueError, match=r"cannot be written|is not one of"):
        write_shards(raws(1, **fields), str(tmp_path), prefix="x", max_samples_per_shard=1)
    assert os.listdir(tmp_path) == []


def test_a_key_twice_in_a_shard_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="'d/k0' comes twice"):
        write_shards(raws(1) * 2, str(tmp_path), prefix="x", max_samples_per_shard=2)


def test_an_error_of_the_source_leaves_whole_shards_only(tmp_path):
    def broken():
        yield from raws(3)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shards(broken(), str(tmp_path), prefix="x", max_samples_per_shard=2)
    assert sorted(os.listdir(tmp_path)) == ["x-000000.index", "x-000000.tar"]


def test_an_old_index_never_stands_beside_a_new_shard(tmp_path):
    write_shards(raws(2), str(tmp_path), prefix="x", max_samples_per_shard=2)

    def broken():
        yield raws(1)[0]
        assert not (tmp_path / "x-000000.index").exists()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shards(broken(), str(tmp_path), prefix="x", max_samples_per_shard=2)
    assert os.listdir(tmp_path) == ["x-000000.tar"]


def write_and_die(directory):
    def samples():
        yield from raws(5)
        os.kill(os.getpid(), signal.SIGKILL)

    write_shards(samples(), str(directory), prefix="x", max_samples_per_shard=2)


def test_a_killed_writer_leaves_whole_shards_and_can_start_again(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    visible = sorted(name for name in os.listdir(tmp_path) if not name.startswith("."))
    assert process.exitcode == -9 and visible == ["x-000000.index", "x-000000.tar", "x-000001.index", "x-000001.tar"]
    assert all(check_shard(str(tmp_path / name)) == [] for name in visible if name.endswith(".tar"))
    assert len(write_shards(raws(3), str(tmp_path), prefix="x", max_samples_per_shard=2)) == 2


@pytest.mark.parametrize("options", [{"max_samples_per_shard": 0}, {"prefix": ""}, {"prefix": "a/b"}])
def test_senseless_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="are needed"):
        write_shards(raws(1), str(tmp_path), **{"prefix": "x", "max_samples_per_shard": 1, **options})
