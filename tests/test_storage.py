import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp.data import storage
from vlp.data.storage import StorageError, expand, local_path, read, replacing, size


@pytest.fixture
def url(tmp_path):
    (tmp_path / "a b.tar").write_bytes(bytes(range(100)))
    return str(tmp_path / "a b.tar")


def test_read_returns_exactly_the_range(url):
    assert read(url, 7, 3) == b"\x07\x08\x09"
    assert read(url, 100, 0) == b""
    assert size(url) == 100


def test_read_accepts_file_urls(url):
    assert read("file://" + url.replace(" ", "%20"), 5, 1) == b"\x05"
    assert size("file://localhost" + url) == 100


@pytest.mark.parametrize(("offset", "count"), [(99, 2), (101, 0), (-1, 1), (0, -1), (1 << 62, 1), (0, 1 << 62)])
def test_read_outside_the_file_is_an_error_that_names_it(url, offset, count):
    with pytest.raises(StorageError, match=r"a b\.tar: bytes .* not inside its 100 bytes"):
        read(url, offset, count)


def test_what_is_no_regular_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="not a regular file"):
        read(str(tmp_path / "fifo"), 0, 0)
    for name in ("fifo", "missing", "."):
        with pytest.raises(StorageError, match=str(tmp_path)):
            read(str(tmp_path / name), 0, 1)
        with pytest.raises(StorageError, match=str(tmp_path)):
            size(str(tmp_path / name))


def test_a_file_cut_after_it_was_opened_is_an_error(url):
    assert read(url, 0, 1) == b"\0"
    os.truncate(url, 50)
    with pytest.raises(StorageError, match="ends at byte 50"):
        read(url, 40, 20)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "-",
        "",
        "scp://host/a.tar",
        "ftp://host/a.tar",
        "FILE2://x",
        "gopen:x",
        "data:,x",
        "a\x00.tar",
        "file://host/a.tar",
        "file:a.tar",
        "file:///a%00b",
        "pipe:/bin/cat",
        "http:///etc/passwd",
    ],
)
def test_schemes_outside_the_allowed_ones_are_refused(url):
    for call in (lambda: read(url, 0, 1), lambda: size(url), lambda: local_path(url), lambda: storage.check(url)):
        with pytest.raises(ValueError, match=r"\.$"):
            call()


@pytest.mark.parametrize("url", ["http://host/a.tar", "https://host/a.tar", "s3://bucket/a.tar"])
def test_remote_shards_are_no_local_paths(url):
    storage.check(url)
    assert storage.file_name(url + "?signature=1") == "a.tar"
    with pytest.raises(ValueError, match="not allowed here"):
        local_path(url)


def test_a_replaced_file_is_read_anew_after_forget(url, tmp_path):
    assert read(url, 0, 1) == b"\0"
    (tmp_path / "new").write_bytes(b"new")
    os.replace(tmp_path / "new", url)
    assert size(url) == 3
    storage.forget(url)
    assert read(url, 0, 3) == b"new"


def test_more_files_than_descriptors_can_be_read(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for i in range(300):
        (tmp_path / str(i)).write_bytes(b"%d" % i)
        assert read(str(tmp_path / str(i)), 0, 1) == b"%d" % int(str(i)[0])
    assert len(os.listdir("/proc/self/fd")) <= before + 257
    storage.forget(str(tmp_path))


def test_expand_counts_up_with_the_width_of_the_first_bound():
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{1..2}/{8..9}{0..0}") == ["1/80", "1/90", "2/80", "2/90"]
    assert expand("a,{b}.tar") == ["a,{b}.tar"]


@pytest.mark.parametrize("pattern", ["{0..1000000}", "{0..999999999999}", "{1..1001}{1..1001}", "{2..1}"])
def test_expand_refuses_before_it_expands(pattern):
    with pytest.raises(ValueError, match=r"backwards|at most 1000000"):
        expand(pattern)


@given(st.text(alphabet="{}.012a", max_size=10))
def test_expand_never_fails_but_with_a_value_error(pattern):
    try:
        assert 1 <= len(expand(pattern)) <= storage.MAX_EXPANSION
    except ValueError as error:
        assert pattern in str(error)


def test_replacing_shows_a_file_only_when_it_is_whole(tmp_path):
    path = tmp_path / "index"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(str(path)) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["index"]
    with replacing(str(path)) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["index"]
