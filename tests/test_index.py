import io
import json
import os
import shutil
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import webdataset
from clips import clip, image

from vlp.data.columns import IndexFileError, dump
from vlp.data.index import (
    ShardIndex,
    build_index,
    check_shard,
    fingerprint,
    index_url,
    main,
    meta_of,
    open_index,
    read_part,
)
from vlp.data.probe import Limits, probe
from vlp.data.tar import TarError
from vlp.types import Reason, SampleError

SHORT, LONG, SOUND = clip(3), clip(7, options={"g": "2"}), clip(4, layout="a")
MANY = {f"k{i}.{kind}": data for i in range(4) for kind, data in (("mp4", SHORT), ("txt", b"words %d" % i))}


def write(path, files) -> str:
    """Pack (name, data) pairs or a dict; names may repeat."""
    with tarfile.open(path, "w") as writer:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return str(path)


def indexed(path, files, **options) -> ShardIndex:
    shard = write(path, files)
    build_index(shard, **options).save(index_url(shard))
    return open_index(shard)


def statuses(index: ShardIndex) -> dict[str, Reason]:
    return {index.key(row): index.status(row) for row in range(len(index))}


@pytest.fixture
def shard(tmp_path):
    return tmp_path / "x.tar"


def test_rows_hold_keys_parts_and_facts(shard):
    index = indexed(shard, {"a.mp4": SHORT, "a.txt": b"a cat", "d/b.MOV": LONG, "d/b.json": b'{"caption": "two cats"}'})
    assert [index.key(row) for row in range(len(index))] == ["a", "d/b"]
    assert [index.status(row) for row in range(2)] == [Reason.OK, Reason.OK] and index.counts() == {Reason.OK: 2}
    assert (index.extension(0), index.extension(1)) == ("mp4", "mov")
    assert index.part(0, "txt").crc32 == zlib.crc32(b"a cat") and index.part(0, "json") is None
    assert (read_part(index, 0, "video"), read_part(index, 1, "video")) == (SHORT, LONG)
    for row, data in enumerate((SHORT, LONG)):
        got, expected = index.facts(row), probe(data)
        assert got[:8] == expected[:8] and got.key_frames.tolist() == expected.key_frames.tolist()
    assert [index.num_caption_chars(row) for row in range(2)] == [5, 8]
    assert [meta_of(index, row)["captions"] for row in range(2)] == [["a cat"], ["two cats"]]


BAD = {
    "empty": ({"mp4": b"", "txt": b"w"}, Reason.VIDEO_EMPTY),
    "broken": ({"mp4": b"?" * 99, "txt": b"w"}, Reason.VIDEO_BROKEN),
    "truncated": ({"mp4": SHORT[:-9], "txt": b"w"}, Reason.VIDEO_TRUNCATED),
    "sound": ({"mp4": SOUND, "txt": b"w"}, Reason.NO_VIDEO_STREAM),
    "codec": ({"mkv": clip(3, codec="ffv1", container="matroska"), "txt": b"w"}, Reason.CODEC_REFUSED),
    "large": ({"mp4": SHORT + bytes(100_000), "txt": b"w"}, Reason.LIMIT_EXCEEDED),
    "no_video": ({"txt": b"w"}, Reason.VIDEO_MISSING),
    "no_words": ({"mp4": SHORT}, Reason.CAPTION_MISSING),
    "blank": ({"mp4": SHORT, "txt": b" \n", "json": b"{}"}, Reason.CAPTION_MISSING),
    "latin1": ({"mp4": SHORT, "txt": b"caf\xe9", "json": b'{"caption": "a"}'}, Reason.CAPTION_BROKEN),
    "long": ({"mp4": SHORT, "txt": b"w" * 10_000_000}, Reason.CAPTION_BROKEN),
    "list": ({"mp4": SHORT, "txt": b"w", "json": b"[]"}, Reason.CAPTION_BROKEN),
    "deep": ({"mp4": SHORT, "json": b"[" * 100_000}, Reason.CAPTION_BROKEN),
}


def test_a_bad_sample_keeps_its_row_with_a_reason(shard):
    files = {"first.mp4": SHORT, "first.txt": b"w"}
    files |= {f"{key}.{kind}": data for key, (parts, _) in BAD.items() for kind, data in parts.items()}
    files |= {"last.png": image(), "last.txt": b"w"}
    index = indexed(shard, files, limits=Limits(max_bytes=100_000))
    expected = {"first": Reason.OK, **{key: reason for key, (_, reason) in BAD.items()}, "last": Reason.OK}
    assert list(statuses(index).items()) == list(expected.items())
    assert all(bool(index.detail(row)) == (index.status(row) != Reason.OK) for row in range(len(index)))


def test_a_second_part_of_a_key_starts_a_duplicate_row(shard):
    files = [("a.mp4", SHORT), ("a.txt", b"1"), ("b.mp4", SHORT), ("b.txt", b"2"), ("a.mkv", LONG), ("a.txt", b"3")]
    index = indexed(shard, files)
    assert [index.key(row) for row in range(3)] == ["a", "b", "a"]
    assert [index.status(row) for row in range(3)] == [Reason.OK, Reason.OK, Reason.DUPLICATE_KEY]
    assert meta_of(index, 0)["captions"] == ["1"] and "a.mkv" in index.detail(2)


def test_members_of_a_sample_need_not_be_neighbours(shard):
    index = indexed(shard, {"a.mp4": SHORT, "b.txt": b"2", "a.txt": b"1", "b.mp4": LONG})
    assert statuses(index) == {"a": Reason.OK, "b": Reason.OK}
    assert read_part(index, 1, "video") == LONG and meta_of(index, 1)["captions"] == ["2"]


def test_a_picture_beside_a_video_is_a_thumbnail(shard):
    files = {"a.jpg": image("mjpeg"), "a.mp4": SHORT, "a.txt": b"1", "b.mp4": b"", "b.png": image(), "b.txt": b"2"}
    index = indexed(shard, files)
    assert statuses(index) == {"a": Reason.OK, "b": Reason.VIDEO_EMPTY}
    assert (index.extension(0), index.info.num_ignored) == ("mp4", 2)
    assert read_part(index, 0, "video") == SHORT


def test_unknown_members_are_ignored_and_never_opened(shard, tmp_path):
    canary = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "canary") + b"'\ntR."
    bombs = {f"a.{kind}": canary for kind in ("pyd", "pkl", "pth", "npy", "cls", "left.mp4")}
    index = indexed(shard, {**bombs, "README": b"", ".a.mp4": SHORT, "a.mp4": SHORT, "a.txt": b"1"})
    assert statuses(index) == {"a": Reason.OK}
    assert (index.info.num_ignored, index.info.ignored_example) == (8, "a.pyd")
    assert not (tmp_path / "canary").exists()


def test_known_facts_are_not_probed_again(shard):
    index = indexed(shard, {"a.mp4": SHORT, "a.txt": b"1"}, known_facts={"a": probe(LONG)})
    assert index.facts(0).num_frames == 7


def test_shards_of_webdataset_are_indexed_as_they_are(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write({"__key__": f"k{i}", "mp4": SHORT, "json": {"captions": [f"cap {i}"]}, "txt": "other"})
    paths = [str(tmp_path / f"w-00000{i}.tar") for i in range(2)]
    assert main([str(tmp_path / "w-{000000..000001}.tar")]) == 0
    rows = [(index, row) for index in map(open_index, paths) for row in range(len(index))]
    read = [(index.key(row), *meta_of(index, row)["captions"]) for index, row in rows]
    assert read == [("k0", "cap 0"), ("k1", "cap 1"), ("k2", "cap 2")]


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
def test_shards_of_the_tar_command_in_the_layout_of_video2dataset_are_indexed(tmp_path):
    folder = tmp_path / "00000"
    folder.mkdir()
    for i in range(3):
        record = {"videoID": "v", "status": "success", "error_message": None, "caption": f"caption {i}"}
        for kind, data in (("mp4", SHORT), ("txt", b"caption %d" % i), ("json", json.dumps(record).encode())):
            (folder / f"00000000{i}.{kind}").write_bytes(data)
    subprocess.run(["tar", "-cf", "00000.tar", "-C", "00000", "."], cwd=tmp_path, check=True)
    assert main([str(tmp_path / "00000.tar")]) == 0
    index = open_index(str(tmp_path / "00000.tar"))
    captions = {index.key(row): meta_of(index, row)["captions"] for row in range(3)}
    assert captions == {f"00000000{i}": [f"caption {i}"] for i in range(3)} and index.counts() == {Reason.OK: 3}


def test_each_cut_is_refused_or_keeps_exactly_the_samples_before_it(shard):
    whole = indexed(shard, MANY)
    data, facts = shard.read_bytes(), {key: probe(SHORT) for key in statuses(whole)}
    ends = {whole.key(row): whole.part(row, "txt").offset + whole.part(row, "txt").size for row in range(4)}
    for cut in range(0, max(ends.values()) + 512, 397):
        shard.write_bytes(data[:cut])
        with pytest.raises(TarError, match=r"cut|empty"):
            build_index(str(shard))
        kept = build_index(str(shard), on_damage="keep", known_facts=facts)
        good = [key for key, status in statuses(kept).items() if status == Reason.OK]
        before = [key for key, end in ends.items() if end <= cut]
        # After one sample only, nothing tells that it had no third part.
        assert kept.info.damage and good in (before, [] if before == ["k0"] else before)
        assert damaged(shard) == [key for key in ends if key not in before]


def test_a_sample_without_a_part_that_the_others_have_is_lost_at_a_cut(shard):
    record = b'{"captions": ["a", "b"]}'
    files = {f"k{i}.{kind}": data for i in range(3) for kind, data in (("mp4", SHORT), ("txt", b"a"), ("json", record))}
    whole = indexed(shard, files)
    for row, name, good in ((1, "json", ["k0"]), (2, "video", ["k0", "k1"])):
        os.truncate(write(shard, files), whole.part(row, name).offset - 100)  # inside the header
        kept = build_index(str(shard), on_damage="keep")
        assert [key for key, status in statuses(kept).items() if status == Reason.OK] == good


def damaged(shard) -> list[str]:
    """Return the keys that a check names."""
    return sorted({line.partition(":")[0] for line in check_shard(str(shard)) if line.startswith("k")})


def test_each_flipped_bit_is_found_and_blamed_on_its_sample(shard):
    index = indexed(shard, MANY)
    data = shard.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 150):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        parts = [(index.key(row), index.part(row, name)) for row in range(4) for name in ("video", "txt")]
        hit = [key for key, part in parts if part.offset <= at < part.offset + part.size]
        assert damaged(shard) == hit and check_shard(str(shard))


def test_a_damaged_part_is_not_handed_out(shard):
    index = indexed(shard, MANY)
    data = bytearray(shard.read_bytes())
    data[index.part(1, "video").offset + 100] ^= 1
    with open(shard, "r+b") as file:
        file.write(data)
    with pytest.raises(SampleError) as caught:
        read_part(index, 1, "video")
    assert (caught.value.reason, caught.value.key, caught.value.shard) == (Reason.CHECKSUM, "k1", str(shard))
    assert read_part(index, 2, "video") == SHORT


def test_parts_that_cannot_be_read_have_a_reason(shard):
    index = indexed(shard, {"a.mp4": SHORT, "a.txt": b"1", "b.txt": b"\xff", "c.mp4": SHORT})
    wanted = {(1, "video"): Reason.VIDEO_MISSING, (2, "txt"): Reason.CAPTION_MISSING}
    for (row, name), reason in wanted.items():
        with pytest.raises(SampleError) as caught:
            read_part(index, row, name)
        assert caught.value.reason == reason
    for row, reason in ((1, Reason.CAPTION_BROKEN), (2, Reason.CAPTION_MISSING)):
        with pytest.raises(SampleError) as caught:
            meta_of(index, row)
        assert caught.value.reason == reason
    os.truncate(shard, 1024)
    with pytest.raises(SampleError) as caught:
        read_part(index, 0, "video")
    assert caught.value.reason == Reason.READ_FAILED


def test_an_index_is_a_safetensors_file_and_survives_saving(shard, tmp_path):
    index = indexed(shard, MANY)
    arrays = safetensors.numpy.load_file(index_url(str(shard)))
    assert arrays.keys() == index.columns.keys()
    assert all(np.array_equal(arrays[name], index.columns[name]) for name in arrays)
    index.save(str(tmp_path / "copy.index"))
    assert (tmp_path / "copy.index").read_bytes() == (tmp_path / "x.index").read_bytes()


def test_an_empty_shard_has_an_empty_index(shard):
    index = indexed(shard, {})
    assert len(index) == 0 and index.counts() == {}


def test_each_flipped_byte_of_an_index_is_refused(shard, tmp_path):
    indexed(shard, MANY)
    path = tmp_path / "x.index"
    data = path.read_bytes()
    for at in [*range(40), *range(40, len(data), 29)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(IndexFileError, match=r"x\.index: .*; run: python -m vlp\.data\.index --force"):
            open_index(str(shard))


LENGTH_2, LENGTH_99 = (2).to_bytes(8, "little"), (99).to_bytes(8, "little")


@pytest.mark.parametrize(
    "data", [b"", b"8", bytes(8), b"\xff" * 8, LENGTH_2 + b"{}", LENGTH_99 + b"{}", LENGTH_2 + b"[]"]
)
def test_what_is_no_index_is_refused(shard, tmp_path, data):
    write(shard, MANY)
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(IndexFileError):
        open_index(str(shard))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("part_offset", -1),
        ("part_offset", 1 << 40),
        ("part_offset", (1 << 63) - 1),
        ("part_size", 1 << 40),
        ("status", 99),
        ("codec", 200),
        ("extension", 200),
        ("key_ends", 9999),
        ("key_frames_ends", -5),
    ],
)
def test_an_index_that_points_outside_is_refused_though_its_checksum_is_right(shard, tmp_path, column, value):
    index = indexed(shard, MANY)
    columns = {name: array.copy() for name, array in index.columns.items()}
    columns[column].flat[1 if column.startswith("key") else 0] = value
    (tmp_path / "x.index").write_bytes(dump(index.info, columns))
    with pytest.raises(IndexFileError):
        open_index(str(shard))


def test_a_column_of_another_length_or_type_is_refused(shard, tmp_path):
    index = indexed(shard, MANY)
    for wrong in ({"fps": index.columns["fps"][:2]}, {"fps": index.columns["width"]}, {"other": index.columns["fps"]}):
        (tmp_path / "x.index").write_bytes(dump(index.info, {**index.columns, **wrong}))
        with pytest.raises(IndexFileError, match="columns are missing"):
            open_index(str(shard))


def test_a_shard_of_another_size_than_indexed_is_refused(shard):
    indexed(shard, MANY)
    with open(shard, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(IndexFileError, match="when it was indexed"):
        open_index(str(shard))


def test_fingerprint_depends_on_content_name_and_order(tmp_path):
    one, two = (indexed(tmp_path / f"{name}.tar", {f"{name}.mp4": SHORT, f"{name}.txt": b"w"}) for name in "ab")
    renamed = ShardIndex(one.shard, one.info._replace(shard="c.tar"), one.columns)
    prints = [fingerprint(group) for group in ([one], [two], [one, two], [two, one], [renamed], [])]
    assert len(set(prints)) == len(prints)
    assert fingerprint([open_index(one.shard), two]) == prints[2]


def test_the_command_line_builds_checks_and_reports(shard, capsys):
    write(shard, {**MANY, "z.mp4": b""})
    assert main([str(shard)]) == 0
    assert "5 samples, 4 usable, 1 video_empty" in capsys.readouterr().out
    assert main([str(shard)]) == 0 and "unchanged" in capsys.readouterr().out
    assert main(["--check", str(shard)]) == 0 and "as indexed" in capsys.readouterr().out
    with open(shard, "r+b") as file:
        file.seek(open_index(str(shard)).part(2, "video").offset)
        file.write(b"????")
    assert main(["--check", str(shard)]) == 65
    assert capsys.readouterr().out.splitlines() == [
        f"{shard}: differs from its index",
        "    k2: video part: its bytes have changed",
    ]


def test_the_command_line_refuses_or_keeps_a_cut_shard(shard, capsys):
    write(shard, MANY)
    os.truncate(shard, build_index(str(shard)).part(2, "video").offset + 9)
    assert main([str(shard)]) == 65
    assert "cut: 'k2.mp4'" in capsys.readouterr().out and not os.path.exists(index_url(str(shard)))
    assert main(["--policy", "keep", str(shard)]) == 0
    assert "2 samples, 2 usable" in capsys.readouterr().out
    assert open_index(str(shard)).info.damage.startswith("byte ")


def test_the_command_line_goes_on_after_a_bad_shard(tmp_path, capsys):
    for name, data in (("a", b""), ("b", b"<html>not found"), ("c", b"\x1f\x8b" + bytes(99)), ("d", None)):
        write(tmp_path / f"{name}.tar", MANY) if data is None else (tmp_path / f"{name}.tar").write_bytes(data)
    urls = [str(tmp_path / f"{name}.tar") for name in ("a", "b", "c", "missing", "d")]
    assert main(["--workers", "2", *urls]) == 65
    lines = capsys.readouterr().out.splitlines()
    words = ("an empty file", "a web page", "gzip", "No such file", "4 samples, 4 usable")
    assert [word in line and url in line for word, line, url in zip(words, lines, urls, strict=True)] == [True] * 5
    assert main(["--check", urls[0], urls[4]]) == 65


@pytest.mark.parametrize("url", ["x{0..9999999}.tar", "pipe:cat x.tar", "x.tgz", "s3://bucket/x.tar"])
def test_the_command_line_refuses_urls_without_opening_them(url, capsys):
    assert main([url]) == 78
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_line_says_that_an_index_cannot_be_written(shard, capsys):
    write(shard, MANY)
    os.mkdir(index_url(str(shard)))
    assert main([str(shard)]) == 73
    assert capsys.readouterr().out.splitlines() == [f"{index_url(str(shard))}: cannot be written: Is a directory"]
