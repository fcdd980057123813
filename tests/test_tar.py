import io
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data.tar import BLOCK, Member, TarError, members

FILES = {
    "a.mp4": b"x" * 700,
    "a.txt": b"",
    "dir/b.mp4": b"y" * 1024,
    "ä b.txt": b"z",
    "n" * 99 + "/" + "m" * 60: b"long",
}


def archive(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT, **fields) -> bytes:
    """Pack files with the standard library; `fields` are set on each header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as writer:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            writer.addfile(info, io.BytesIO(data))
    return file.getvalue()


def listed(data: bytes, **options) -> list[Member]:
    return list(members(io.BytesIO(data), size=len(data), name="x.tar", **options))


def refused(data: bytes) -> TarError:
    with pytest.raises(TarError) as caught:
        listed(data)
    assert str(caught.value).startswith(f"x.tar: byte {caught.value.offset}: ")
    return caught.value


def patched(data: bytes, at: int, new: bytes, header: int = 0) -> bytes:
    """Overwrite bytes of a header and correct its checksum."""
    block = bytearray(data[header : header + BLOCK])
    block[at : at + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + BLOCK :]


def extended(kind: bytes, payload: bytes) -> bytes:
    """Return an archive of one file whose header follows an extended header with this payload."""
    data = patched(archive({"h": payload}), 156, kind)
    return data[: BLOCK + -(-len(payload) // BLOCK) * BLOCK] + archive({"a.txt": b"abc"})


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 2 if len(body) < 98 else len(body) + 3
        lines += b"%d" % length + body
    return lines


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_equal_those_of_the_standard_library_in_each_format(format):
    data = archive(FILES, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        expected = [Member(info.name, info.offset_data, info.size) for info in reader]
    assert listed(data) == expected
    assert [data[m.offset : m.offset + m.size] for m in listed(data)] == list(FILES.values())


@pytest.mark.parametrize("format", ["gnu", "ustar", "posix"])
@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
def test_members_are_read_from_archives_of_the_tar_command(tmp_path, format):
    names = ["a.mp4", "sub/b.txt", "s" * 80 + "/" + "n" * 90 + ".txt"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    subprocess.run(["tar", f"--format={format}", "-cf", "../x.tar", "."], cwd=tmp_path / "in", check=True)
    data = (tmp_path / "x.tar").read_bytes()
    contents = {m.name: data[m.offset : m.offset + m.size].decode() for m in listed(data)}
    assert contents == {name: name for name in names}


def test_members_with_fractional_times_are_read():
    assert [m.name for m in listed(archive({"a.txt": b"abc"}, mtime=1.5))] == ["a.txt"]


@pytest.mark.parametrize("kind", [*b"123467SKMVDN", *b"Az"])
def test_links_devices_and_unknown_types_are_refused(kind):
    error = refused(patched(archive({"a.txt": b""}), 156, bytes([kind])))
    assert error.offset == 0 and "refused" in error.rule


@pytest.mark.parametrize(
    "name", ["../a.mp4", "a/../b", "/etc/passwd", "./../a", "..", "a\nb", "\x1b[2Ja", "a\u202eb", "./"]
)
def test_names_that_climb_or_forge_are_refused(name):
    assert refused(archive({name: b"abc"})).offset in (0, 2 * BLOCK)


def test_a_file_named_like_a_directory_and_a_directory_with_data_are_refused():
    assert "name of a directory" in refused(patched(archive({"a": b"abc"}), 0, b"a/\0")).rule
    assert "has data" in refused(patched(archive({"a": b"abc"}), 156, b"5")).rule
    assert listed(archive({"a": b""}, type=tarfile.DIRTYPE)) == []


def test_a_name_longer_than_allowed_is_refused():
    assert "longer than" in refused(archive({"n" * 1100: b"abc"}, tarfile.PAX_FORMAT)).rule
    assert "longer than" in refused(archive({"n" * 1100: b"abc"}, tarfile.GNU_FORMAT)).rule


def test_a_name_that_is_not_utf8_is_refused():
    assert "not UTF-8" in refused(patched(archive({"a.txt": b"abc"}), 0, b"\xff\xfe.txt")).rule


@pytest.mark.parametrize(
    "field", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\0" * 12, b"9" * 11 + b"\0"]
)
def test_negative_overflowing_and_senseless_sizes_are_refused(field):
    assert "size" in refused(patched(archive({"a.txt": b"abc"}), 124, field)).rule


def test_a_base_256_size_is_read_and_kept_inside_the_archive():
    data = archive({"a.txt": b"abc"})
    assert listed(patched(data, 124, b"\x80" + (3).to_bytes(11))) == [Member("a.txt", BLOCK, 3)]
    error = refused(patched(data, 124, b"\x80" + (1 << 60).to_bytes(11)))
    assert error.rule.startswith("cut") and error.member == "a.txt"


@pytest.mark.parametrize(
    "payload",
    [
        pax(size="4"),
        pax(path="../b"),
        pax(**{"GNU.sparse.realsize": "3"}),
        pax(linkpath="b"),
        pax(size="-3"),
        pax(size="+3"),
        pax(size="3") * 2,
        b"99 path=b\n",
        b"path=b\n",
        b"9 path=b!",
        b"0 path=b\n",
        pax(path="b\x00c"),
    ],
)
def test_pax_records_outside_the_subset_are_refused(payload):
    refused(extended(b"x", payload))


def test_pax_path_and_size_are_used_where_they_agree_with_the_header():
    (member,) = listed(extended(b"x", pax(size="3", path="b.txt", comment="c", mtime="1.5")))
    assert member == Member("b.txt", 3 * BLOCK, 3)


def test_a_gnu_long_name_ends_with_its_nul():
    assert listed(extended(b"L", b"b.txt\0"))[0].name == "b.txt"
    assert "without its NUL" in refused(extended(b"L", b"b.txt")).rule


def test_a_global_pax_header_may_not_name_members():
    assert len(listed(extended(b"g", pax(comment="made by hand")))) == 1
    assert "global" in refused(extended(b"g", pax(path="b.txt"))).rule


def test_extended_headers_come_one_at_a_time_before_a_member():
    one = extended(b"x", pax(path="b.txt"))
    assert "two extended" in refused(one[: 2 * BLOCK] + one).rule
    assert "without a member" in refused(one[: 2 * BLOCK] + bytes(2 * BLOCK)).rule


class Recorder(io.BytesIO):
    """A stream that remembers the largest read and refuses to go back."""

    largest = 0

    def read(self, size=-1):
        self.largest = max(self.largest, size)
        return super().read(size)

    def seek(self, offset, whence=0):
        assert offset >= self.tell()
        return super().seek(offset, whence)


def test_a_header_cannot_make_the_reader_allocate():
    data = patched(extended(b"x", pax(path="b")), 124, b"77777777777\0")
    stream = Recorder(data)
    with pytest.raises(TarError, match="extended header"):
        list(members(stream, size=1 << 40, name="x.tar"))
    assert stream.largest <= BLOCK


def test_the_archive_is_read_forward_only():
    data = archive(FILES)
    stream, contents = Recorder(data), []
    for member in members(stream, size=len(data), name="x.tar"):
        stream.seek(member.offset)
        contents.append(stream.read(member.size))
    assert contents == list(FILES.values())


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"\x1f\x8b" + bytes(9), "gzip"),
        (b"\xfd7zXZ\x00" + bytes(9), "xz"),
        (b"PK\x03\x04", "zip"),
        (b"(\xb5/\xfd" + bytes(600), "zstd"),
        (b" <!DOCTYPE html>", "web page"),
        (b"?" * 999, "not a tar"),
    ],
)
def test_what_is_no_tar_is_named(data, word):
    assert word in refused(data).rule


def test_an_archive_without_ustar_magic_is_refused():
    assert "ustar" in refused(patched(archive({"a.txt": b"abc"}), 257, bytes(8))).rule


def test_any_flipped_bit_of_a_header_is_seen_or_changes_nothing():
    data = archive({"a.txt": b"abc", "b.txt": b"def"})
    expected = listed(data)
    for bit in range(BLOCK * 8):
        flipped = bytearray(data)
        flipped[2 * BLOCK + bit // 8] ^= 1 << bit % 8
        try:
            assert listed(bytes(flipped)) == expected
        except TarError as error:
            assert error.offset == 2 * BLOCK


def test_any_cut_is_seen_and_keeps_what_stands_before_it():
    data = archive({"a.txt": b"x" * 600, "b.txt": b"y" * 40}, tarfile.USTAR_FORMAT)
    full, end = listed(data), 5 * BLOCK
    for cut in range(end + 2 * BLOCK):
        assert ("cut" if cut else "empty") in refused(data[:cut]).rule
        assert list(_before(data[:cut])) == [m for m in full if m.offset + m.size <= cut]
    assert listed(data[: end + 2 * BLOCK]) == full


def _before(data):
    try:
        yield from members(io.BytesIO(data), size=len(data), name="x.tar")
    except TarError:
        return


def test_data_after_the_end_mark_is_refused():
    assert "after the end" in refused(archive({"a.txt": b"abc"}) * 2).rule
    assert "one zero block" in refused(bytes(BLOCK) + archive({"a.txt": b"abc"})).rule


def test_more_members_than_allowed_are_refused():
    data = archive({f"{i}.txt": b"" for i in range(5)})
    assert len(listed(data, max_members=6)) == 5
    with pytest.raises(TarError, match="more than 4 members"):
        listed(data, max_members=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12)), max_size=6), st.booleans())
def test_any_bytes_give_members_inside_the_archive_or_a_tar_error(edits, repair):
    data = archive({"a.mp4": b"x" * 600, "n" * 120: b"y"})
    for at, new in edits:
        data = patched(data, at % BLOCK, new[: BLOCK - at % BLOCK], at // BLOCK * BLOCK) if repair else data
        data = data if repair else data[:at] + new + data[at + len(new) :]
    for member in _before(data):
        assert member.offset % BLOCK == 0 and 0 <= member.size <= len(data) - member.offset
        assert ".." not in member.name.split("/") and member.name.isprintable()
