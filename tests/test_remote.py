import logging
import re
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import object_server as faults
import pytest
from moto.server import ThreadedMotoServer
from object_server import ObjectServer

from vlp import config
from vlp.data import fields, remote, storage
from vlp.data.columns import PARTS
from vlp.data.fields import ClipReader, Clips, Shards
from vlp.data.index import build_index, index_path, index_url, main, open_index, read_part
from vlp.data.remote import Retry, shown
from vlp.data.sampling import Segments
from vlp.data.sandbox import Sandbox
from vlp.data.storage import StorageError
from vlp.data.synthetic import World
from vlp.data.transforms import RandomResizedCrop
from vlp.data.workers import Workers, ordered
from vlp.types import Reason, SampleError

DATA = np.random.default_rng(0).bytes(100_000)
QUICK = Retry(budget_s=2.0, first_wait_s=0.01, max_wait_s=0.02, idle_s=0.3)
CLIPS = Clips(Segments(num_frames=3), [RandomResizedCrop(size=16)], 24)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(
        root=str(tmp_path_factory.mktemp("w")), num_train=7, num_test=3, size=32, num_frames=6, clips_per_shard=3
    )
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "RETRY", QUICK)
    monkeypatch.setattr(remote, "_file_systems", {})  # timeouts are set when they are made
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(world):
    with ObjectServer() as running:
        running.objects["/a.tar"] = DATA
        for shard in (*world.shards("train"), *world.shards("test")):
            running.objects[f"/w/{Path(shard).name}"] = Path(shard).read_bytes()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def s3_server():
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(s3_server, world, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "s3cret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for shard in world.shards("train"):
        client.upload_file(shard, "bucket", f"w/{Path(shard).name}")
    client.put_object(Bucket="bucket", Key="a b.tar", Body=DATA)
    return "s3://bucket"


def test_http_range_and_size_are_exact(server):
    url = f"{server.url}/a.tar"
    assert storage.size(url) == len(DATA) and storage.read(url, 0, len(DATA)) == DATA
    assert storage.read(url, 7, 1000) == DATA[7:1007] and storage.read(url, len(DATA) - 1, 1) == DATA[-1:]
    assert storage.read(url, 5, 0) == b""


def test_s3_range_and_size_are_exact(bucket):
    url = f"{bucket}/a b.tar"
    assert storage.size(url) == len(DATA) and storage.read(url, 7, 50_000) == DATA[7:50_007]


def test_s3_errors_say_what_is_wrong(bucket, monkeypatch):
    monkeypatch.setattr(remote, "RETRY", Retry())  # none of them is tried again, and a busy machine is slow
    for url, words in {f"{bucket}/no.tar": "404", "s3://nowhere/a.tar": "404"}.items():
        with pytest.raises(StorageError, match=f"{url}: status {words} .not found.$"):
            storage.read(url, 0, 1)
    with pytest.raises(StorageError, match=r"not inside its 100000 bytes|outside the object"):
        storage.read(f"{bucket}/a b.tar", len(DATA), 1)


def test_s3_without_credentials_is_one_clear_line(bucket, monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StorageError, match="no credentials"):
        storage.read(f"{bucket}/a b.tar", 0, 1)


TRANSIENT = [faults.status(500), faults.status(503), faults.status(429), faults.status(408), faults.reset, faults.cut]
TRANSIENT += [faults.short, faults.other, faults.slow(1.0)]


@pytest.mark.parametrize("number", range(len(TRANSIENT)))
def test_a_passing_fault_is_retried(server, number):
    server.faults = [TRANSIENT[number]] * 2
    assert storage.read(f"{server.url}/a.tar", 1000, 5000) == DATA[1000:6000]
    assert len(server.requests) == 3


@pytest.mark.parametrize("number", [0, 4, 5, 6, 8])
def test_a_lasting_fault_ends_in_time_and_says_how_often_it_was_tried(server, number, monkeypatch):
    monkeypatch.setattr(remote, "RETRY", QUICK._replace(budget_s=0.5))
    server.always, start_s = TRANSIENT[number], time.monotonic()
    with pytest.raises(StorageError, match=rf"^{server.url}/a\.tar: .+; tried \d+ times in \d\.\d s$") as caught:
        storage.read(f"{server.url}/a.tar", 1000, 5000)
    assert time.monotonic() - start_s < 2 and len(server.requests) >= 2
    tries = int(re.findall(r"tried (\d+) times", str(caught.value))[0])
    assert tries == len(server.requests) or (
        TRANSIENT[number] is faults.reset and tries > 1
    )  # aiohttp asks again itself


def test_a_server_that_cannot_be_reached_is_an_error(server):
    server.server_close()
    with pytest.raises(StorageError, match=r"Connect.*tried \d+ times"):
        storage.read(f"{server.url}/a.tar", 0, 1)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418])
def test_a_refusal_is_not_retried(server, code):
    server.always = faults.status(code)
    for call in (lambda url: storage.read(url, 0, 9), storage.size):
        with pytest.raises(StorageError, match=f"status {code}"):
            call(f"{server.url}/a.tar")
    assert len(server.requests) == 2


def test_more_bytes_than_asked_for_are_refused(server):
    server.always = faults.longer
    with pytest.raises(StorageError, match="more than the 9 bytes"):
        storage.read(f"{server.url}/a.tar", 0, 9)


def test_a_small_object_without_ranges_is_sliced(server):
    server.always = faults.whole
    assert storage.read(f"{server.url}/a.tar", 1000, 5000) == DATA[1000:6000]
    assert storage.size(f"{server.url}/a.tar") == len(DATA)


def test_a_large_object_without_ranges_is_refused_and_not_downloaded(server):
    sent = []

    def endless(handler, data, low, high):
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        try:
            while len(sent) < 200:
                handler.wfile.write(bytes(1 << 20))
                sent.append(1)
        except ConnectionError:
            handler.close_connection = True

    server.always = endless
    with pytest.raises(StorageError, match="ignores byte ranges"):
        storage.read(f"{server.url}/a.tar", 1 << 30, 1000)
    assert storage.size(f"{server.url}/a.tar") == 1 << 40
    assert storage.read(f"{server.url}/a.tar", 1 << 20, 9) == bytes(9)
    assert len(sent) < 100


def test_a_read_outside_the_object_or_above_the_limit_is_an_error(server):
    for offset, size in ((len(DATA) - 1, 2), (len(DATA), 1), (1 << 40, 1)):
        with pytest.raises(StorageError, match="not inside its 100000 bytes"):
            storage.read(f"{server.url}/a.tar", offset, size)
    for offset, size in ((-1, 2), (0, -1), (0, 1 << 40)):
        with pytest.raises(StorageError, match="at most"):
            storage.read(f"{server.url}/a.tar", offset, size)


def test_a_compressed_answer_is_refused(server):
    server.always = lambda handler, data, low, high: handler.ranged(data, low, high, **{"Content-Encoding": "gzip"})
    with pytest.raises(StorageError, match="gzip"):
        storage.read(f"{server.url}/a.tar", 0, 9)


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://user:pw@host:8/a.tar?X-Amz-Signature=s#f", "https://host:8/a.tar"),
        ("https://a@b:pw@host/a.tar", "https://host/a.tar"),
        ("http://host?pw", "http://host"),
        ("s3://b/k.tar", "s3://b/k.tar"),
        ("ftp://user:pw@host/x", "ftp://host/x"),
        ("/data/a@b?.tar", "/data/a@b?.tar"),
    ],
)
def test_shown_urls_have_no_secrets(url, public):
    assert shown(url) == public


def test_no_secret_of_a_url_is_ever_said(server, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG, logger="vlp")
    server.faults = [faults.status(503), faults.status(403), faults.status(403)]
    url = server.url.replace("//", "//user:s3cret@") + "/w/x.tar?X-Amz-Signature=s3cret"
    said = []
    for call in (
        lambda: storage.read(url, 0, 9),
        lambda: storage.size(url),
        Shards(train=[url], index_dir=str(tmp_path)).prepare,
    ):
        with pytest.raises((StorageError, ValueError)) as caught:
            call()
        said += [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    assert main([url, "--index-dir", str(tmp_path)]) == 65
    for bad in ("http://user:s3cret@", "http://user:s3cret@[bad/x.tar?s3cret", "ftp://user:s3cret@host/x.tar"):
        with pytest.raises(ValueError, match=r"\.$") as caught:
            storage.read(bad, 0, 1)
        said += [str(caught.value), repr(caught.value.__cause__)]
    said += [caplog.text, *capsys.readouterr()]
    assert "s3cret" not in "".join(said) and "503" in caplog.text and "404" in "".join(said)


def test_passwords_of_a_url_reach_the_server(server):
    seen = []

    def note(handler, data, low, high):
        seen.append((handler.headers["Authorization"], handler.path))
        handler.ranged(data, low, high)

    server.always = note
    storage.read(server.url.replace("//", "//user:pw@") + "/a.tar?sign=a%2Fb", 0, 1)
    assert seen == [("Basic dXNlcjpwdw==", "/a.tar?sign=a%2Fb")]


@pytest.mark.parametrize("package", ["aiohttp", "s3fs"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=f"pip install {package}$"):
        storage.read({"aiohttp": "http://host/a.tar", "s3fs": "s3://b/a.tar"}[package], 0, 1)


def remote_shards(server, world, split="train"):
    return [f"{server.url}/w/{Path(shard).name}" for shard in world.shards(split)]


def reader(shards, **options):
    return ClipReader(shards, clips=CLIPS, seed=1, source=0, train=True, **options)


def assert_same(one, two):
    assert len(one) == len(two) == 7 and one.counts.tolist() == two.counts.tolist()
    for sample_id in range(7):
        mine, theirs = one.read(sample_id, 2), two.read(sample_id, 2)
        assert (mine.status, mine.texts, mine.key) == (theirs.status, theirs.texts, theirs.key)
        assert mine.status == Reason.OK and np.array_equal(mine.frames, theirs.frames)


@pytest.mark.parametrize("headers_only", [False, True])
def test_training_data_over_http_equals_local_data(server, world, tmp_path, headers_only):
    shards = remote_shards(server, world)
    source = Shards(train=shards, index_dir=str(tmp_path), headers_only=headers_only)
    source.prepare()
    far, near = reader(source.shards("train"), index_dir=str(tmp_path)), reader(world.shards("train"))
    assert_same(far, near)
    assert headers_only or far.fingerprint == near.fingerprint


def test_training_data_over_s3_equals_local_data(bucket, world, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY", Retry())  # nothing fails here, and a busy machine is slow
    shards = [f"{bucket}/w/{Path(shard).name}" for shard in world.shards("train")]
    source = Shards(train=shards, index_dir=str(tmp_path))
    source.prepare()
    assert_same(reader(shards, index_dir=str(tmp_path)), reader(world.shards("train")))


class Reading:
    """Work of a loader: the sum of the frames of a sample."""

    buffer_bytes = 64

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, job, *, begin, skip, buffer):
        return int(self.samples.read(job, 0).frames.sum())


def test_forked_workers_read_after_their_parent_has(server, world, tmp_path):
    shards = remote_shards(server, world)
    Shards(train=shards, index_dir=str(tmp_path)).prepare()
    here = [int(reader(world.shards("train")).read(i, 0).frames.sum()) for i in range(7)]
    far = Reading(reader(shards, index_dir=str(tmp_path)))
    assert far(0, begin=None, skip={}, buffer=None) == here[0]
    workers = Workers(num_workers=2, start_method="fork", sandbox=Sandbox(network=True))
    assert list(ordered(far, range(7), workers)) == here


def test_a_wrong_part_is_asked_for_once_more(server, world, tmp_path):
    shards = remote_shards(server, world)
    Shards(train=shards, index_dir=str(tmp_path)).prepare()
    index = open_index(shards[0], index_dir=str(tmp_path))
    server.faults = [faults.flipped]
    assert read_part(index, 1, "video") == read_part(open_index(world.shards("train")[0]), 1, "video")
    server.faults, server.requests = [faults.flipped] * 3, []
    with pytest.raises(SampleError) as caught:
        read_part(index, 1, "video")
    assert caught.value.reason == Reason.CHECKSUM and len(server.requests) == 2


def test_a_shard_that_cannot_be_read_is_a_tombstone(server, world, tmp_path):
    shards = remote_shards(server, world)
    Shards(train=shards, index_dir=str(tmp_path)).prepare()
    samples = reader(shards, index_dir=str(tmp_path))
    server.always = faults.status(403)
    sample = samples.read(0, 0)
    assert sample.status == Reason.READ_FAILED and "status 403" in sample.detail


def test_access_is_checked_when_the_indexes_are_there(server, world, tmp_path):
    source = Shards(train=remote_shards(server, world), index_dir=str(tmp_path))
    source.prepare()
    server.requests = []
    source.prepare()
    assert len(server.requests) == 1
    server.always = faults.status(403)
    with pytest.raises(ValueError, match=r"cannot be read: .*status 403"):
        source.prepare()
    server.always, name = None, source.shards("train")[0].removeprefix(server.url)
    server.objects[name] += bytes(512)
    with pytest.raises(ValueError, match="when it was indexed"):
        source.prepare()


def test_remote_shards_need_a_folder_and_urls_that_differ(tmp_path):
    with pytest.raises(ValueError, match=r"data\.index_dir"):
        Shards(train=["http://host/a.tar"])
    with pytest.raises(ValueError, match="differ in nothing but"):
        Shards(train=["http://host/a.tar?id=1", "http://host/a.tar?id=2"], index_dir=str(tmp_path))
    paths = {index_path(f"http://host/{name}/a.tar", index_dir=str(tmp_path)) for name in ("train", "test")}
    assert len(paths) == 2


def test_the_command_line_indexes_and_checks_remote_shards(server, world, tmp_path, capsys):
    shards, options = remote_shards(server, world), ["--index-dir", str(tmp_path / "new")]
    assert main([*shards, *options]) == 0 and "3 samples, 3 usable" in capsys.readouterr().out
    near, far = open_index(world.shards("train")[0]), open_index(shards[0], index_dir=str(tmp_path / "new"))
    assert near.info == far.info and all(np.array_equal(near.columns[name], far.columns[name]) for name in near.columns)
    assert main([*shards, *options]) == 0 and capsys.readouterr().out.count("unchanged") == 3
    assert main(["--check", *shards, *options]) == 0
    server.objects[shards[1].removeprefix(server.url)] = bytes(10240)
    assert main(["--check", *shards, *options]) == 65


def test_a_remote_shard_is_indexed_in_few_requests(server, world, tmp_path):
    build_index(remote_shards(server, world)[0])
    assert len(server.requests) == 2  # its size, and one range


def test_headers_are_indexed_without_the_videos(server, tmp_path, capsys):
    from test_index import SHORT, write

    parts = {f"k{i}.{kind}": data for i in range(3) for kind, data in (("txt", b"w"), ("mp4", SHORT + bytes(1 << 20)))}
    path = write(tmp_path / "x.tar", parts | {"e.mp4": b"", "e.txt": b"w", "n.mp4": SHORT, "t.txt": b"w"})
    server.objects["/x.tar"] = Path(path).read_bytes()
    url, options = f"{server.url}/x.tar", ["--index-dir", str(tmp_path / "i"), "--headers-only"]
    assert main([url, *options]) == 0 and "from the headers only" in capsys.readouterr().out
    assert sum(high - low for _, low, high in server.requests) < 0.25 * len(server.objects["/x.tar"])
    index = open_index(url, index_dir=str(tmp_path / "i"))
    whole = build_index(path)
    assert [index.part(2, "video")[:2], index.key(2)] == [whole.part(2, "video")[:2], "k2"]
    assert index.info.headers_only and index.facts(0) is None and index.num_caption_chars(0) == -1
    assert [index.status(row) for row in range(len(index))] == [whole.status(row) for row in range(len(index))]
    assert main(["--check", url, *options]) == 0 and main([url, *options]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main([url, *options[:2]]) == 0 and "unchanged" not in capsys.readouterr().out


def test_a_broken_video_of_a_headers_index_is_found_at_first_read(server, tmp_path):
    from test_index import SHORT, write

    path = write(
        tmp_path / "x.tar",
        {"a.mp4": b"?" * 99, "a.txt": b"w", "b.mp4": SHORT, "b.json": b"{}", "c.mp4": SHORT, "c.txt": b"w"},
    )
    server.objects["/x.tar"] = Path(path).read_bytes()
    source = Shards(train=[f"{server.url}/x.tar"], index_dir=str(tmp_path), headers_only=True)
    source.prepare()
    samples = reader(source.shards("train"), index_dir=str(tmp_path))
    assert [samples.read(i, 0).status for i in range(3)] == [Reason.VIDEO_BROKEN, Reason.CAPTION_MISSING, Reason.OK]


def headers_reader(server, world, tmp_path):
    shards = remote_shards(server, world)
    Shards(train=shards, index_dir=str(tmp_path), headers_only=True).prepare()
    fields._index.cache_clear()  # as a process that has just started
    return reader(shards, index_dir=str(tmp_path))


def test_the_first_read_of_a_headers_index_is_kept(server, world, tmp_path, monkeypatch):
    first = [headers_reader(server, world, tmp_path).read(i, 2) for i in range(7)]
    lines = [line for path in tmp_path.glob("*.seen") for line in path.read_text().splitlines()]
    assert len(lines) == 21  # of each sample its three parts, once
    monkeypatch.setattr(fields, "probe", None)
    again = headers_reader(server, world, tmp_path)
    assert all((again.read(i, 2).frames == sample.frames).all() for i, sample in enumerate(first))
    full = build_index(world.shards("train")[0])
    known = open_index(again.shards[0], index_dir=str(tmp_path))
    assert [known.crc32(0, name) for name in PARTS] == [full.crc32(0, name) for name in PARTS]
    assert repr(known.facts(0)) == repr(full.facts(0))


def test_bytes_that_change_after_the_first_read_are_found(server, world, tmp_path, capsys):
    samples = headers_reader(server, world, tmp_path)
    assert samples.read(0, 2).status == Reason.OK
    place = open_index(samples.shards[0], index_dir=str(tmp_path)).part(0, "video")
    name = "/w/" + Path(samples.shards[0]).name
    data = bytearray(server.objects[name])
    data[place.offset + place.size // 2] ^= 1
    server.objects[name] = bytes(data)
    assert samples.read(0, 2).status == Reason.CHECKSUM and samples.read(1, 2).status == Reason.OK
    assert main(["--check", samples.shards[0], "--index-dir", str(tmp_path)]) == 65
    assert "video part: its bytes have changed" in capsys.readouterr().out
    assert main(["--force", "--headers-only", samples.shards[0], "--index-dir", str(tmp_path)]) == 0
    assert headers_reader(server, world, tmp_path).read(0, 2).status == Reason.OK  # as a new first read


def test_local_shards_keep_their_index_beside_them(world, tmp_path):
    shard = world.shards("test")[0]
    assert index_path(shard, index_dir=str(tmp_path)) == index_url(shard)


def test_the_config_of_shards_composes_with_remote_urls():
    words = ["+experiment=quickstart", "data=shards"]
    cfg = config.load([*words, 'data.sources.shards.train=["s3://bucket/{0..1}.tar"]', "data.cache_dir=x"])
    source = config.build(cfg.data.sources.shards)
    assert source.shards("train") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    with pytest.raises(config.ConfigError, match=r"data\.sources\.shards\.train: a value is required"):
        config.load(words)
