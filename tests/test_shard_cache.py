import logging
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import object_server as faults
import pytest
from object_server import ObjectServer
from test_remote import CLIPS, assert_same

from vlp.data import remote, shard_cache
from vlp.data.columns import Info
from vlp.data.fields import ClipReader, Shards
from vlp.data.index import ShardIndex, open_index, read_part
from vlp.data.loader import MicroBatches, Part, StepLoader
from vlp.data.mix import Schedule
from vlp.data.plan import Plan
from vlp.data.remote import Retry
from vlp.data.sandbox import Sandbox
from vlp.data.shard_cache import ShardCache
from vlp.data.storage import StorageError
from vlp.data.synthetic import World
from vlp.data.workers import Workers

SIZE = 10_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "RETRY", Retry(budget_s=2.0, first_wait_s=0.01, max_wait_s=0.02, idle_s=2.0))
    monkeypatch.setattr(remote, "_file_systems", {})
    monkeypatch.setattr(shard_cache, "CHUNK", 3000)
    monkeypatch.setattr(shard_cache, "_AGAIN_S", 0.05)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    """Ten shards of 10,000 bytes."""
    with ObjectServer() as running:
        running.objects = {f"/{i}.tar": np.random.default_rng(i).bytes(SIZE) for i in range(10)}
        yield running
        running.shutdown()


def index_of(server, number, **changes) -> ShardIndex:
    import hashlib

    data = server.objects[f"/{number}.tar"]
    info = Info(f"{number}.tar", len(data), hashlib.sha256(data).hexdigest(), 0, "", 0, "", ())
    return ShardIndex(f"{server.url}/{number}.tar", info._replace(**changes), {})


@pytest.fixture
def make(tmp_path):
    made = []

    def make(shards: float = 3.5) -> ShardCache:
        made.append(ShardCache(str(tmp_path / "cache"), max_bytes=int(shards * SIZE)))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def there(cache, server) -> list[int]:
    return [i for i in range(10) if os.path.exists(cache.path(index_of(server, i)))]


def stored(cache) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(cache.directory))


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_fetched_shard_is_read_without_the_server(server, make):
    cache, index = make(), index_of(server, 1)
    assert cache.read(index, 0, 9) is None and cache.fetch(index)
    server.always, server.requests = faults.status(500), []
    assert cache.read(index, 5, 9000) == server.objects["/1.tar"][5:9005] and cache.fetch(index)
    assert server.requests == [] and sorted(os.listdir(cache.directory)) == sorted(
        [Path(cache.path(index)).name, "lock"]
    )


def test_the_least_recently_used_shard_leaves(server, make):
    cache = make(3.5)
    for number in (0, 1, 2):
        assert cache.fetch(index_of(server, number))
        time.sleep(0.02)
    cache.read(index_of(server, 0), 0, 1)
    assert cache.fetch(index_of(server, 3)) and there(cache, server) == [0, 2, 3]
    assert stored(cache) <= cache.max_bytes


def test_a_shard_with_other_bytes_is_refused(server, make):
    cache, index = make(), index_of(server, 1)
    server.objects["/1.tar"] = bytes(SIZE)
    with pytest.raises(StorageError, match=r"1\.tar: its bytes are not those"):
        cache.fetch(index)
    assert os.listdir(cache.directory) == ["lock"] and cache.read(index, 0, 1) is None


def test_a_fetch_that_fails_leaves_nothing(server, make):
    cache = make()
    server.faults = [None, None, faults.status(403)]
    with pytest.raises(StorageError, match="403"):
        cache.fetch(index_of(server, 1))
    assert os.listdir(cache.directory) == ["lock"]


def test_a_limit_below_one_shard_means_ranges_and_one_warning(server, make, caplog):
    cache = make(0.5)
    assert [cache.fetch(index_of(server, i)) for i in range(3)] == [False] * 3
    cache.ahead("a", [index_of(server, i) for i in range(3)])
    time.sleep(0.2)
    assert there(cache, server) == [] and caplog.text.count("has no room") == 1 and server.requests == []


def test_what_is_wanted_does_not_leave_for_something_else(server, make):
    mine, other = make(2.5), make(2.5)
    mine.ahead("a", [index_of(server, 0), index_of(server, 1)])
    wait_for(lambda: len(mine._fetcher[1]._held) == 2)
    assert not other.fetch(index_of(server, 2)) and there(mine, server) == [0, 1]
    mine.ahead("a", [index_of(server, 1)])
    wait_for(lambda: len(mine._fetcher[1]._held) == 1)
    assert other.fetch(index_of(server, 2)) and there(mine, server) == [1, 2]


def test_nothing_leaves_when_it_would_not_be_enough(server, make):
    mine, other = make(3.5), make(2.5)
    other.fetch(index_of(server, 2))
    mine.ahead("a", [index_of(server, 0), index_of(server, 1)])
    wait_for(lambda: len(mine._fetcher[1]._held) == 2)
    server.objects["/9.tar"] = bytes(2 * SIZE)
    assert not other.fetch(index_of(server, 9)) and there(mine, server) == [0, 1, 2]


def test_owners_do_not_forget_what_the_others_want(server, make):
    cache = make(9)
    for owner, numbers in (("a", [0, 1]), ("b", [2]), ("a", [1])):
        cache.ahead(owner, [index_of(server, i) for i in numbers])
    wait_for(lambda: cache._fetcher[1]._held.keys() == {cache.path(index_of(server, i)) for i in (1, 2)})


def test_what_cannot_be_fetched_is_tried_once_and_the_rest_goes_on(server, make, caplog):
    cache, wrong = make(9), index_of(server, 0, sha256="0" * 64)
    cache.ahead("a", [wrong, index_of(server, 1)])
    wait_for(lambda: there(cache, server) == [1])
    number = len(server.requests)
    time.sleep(0.2)
    assert len(server.requests) == number and caplog.text.count("read by range") == 1


def test_local_shards_are_not_copied(server, make):
    cache = make()
    cache.ahead("a", [ShardIndex("/x/a.tar", index_of(server, 1).info, {})])
    time.sleep(0.1)
    assert os.listdir(cache.directory) == ["lock"]


def test_a_cut_copy_is_dropped(server, make):
    cache, index = make(), index_of(server, 1)
    cache.fetch(index)
    os.truncate(cache.path(index), 100)
    assert cache.read(index, 0, 9) is None and there(cache, server) == []
    assert cache.fetch(index) and cache.read(index, SIZE - 1, 1) == server.objects["/1.tar"][-1:]


def test_shards_of_unknown_digest_are_told_apart_by_url(server, make):
    cache = make()
    one, two = (index_of(server, i, sha256="same", headers_only=True) for i in (1, 2))
    assert cache.fetch(one) and cache.fetch(two)
    assert cache.read(two, 0, 99) == server.objects["/2.tar"][:99]
    outside = index_of(server, 1, sha256="../../outside")
    assert os.path.dirname(cache.path(outside)) == cache.directory


def fetch_all(cache, indexes, results):
    results.put([cache.fetch(index) or cache.read(index, 0, 1) is None for index in indexes])


def test_two_processes_share_a_cache(server, make):
    cache, indexes = make(4.5), [index_of(server, i) for i in range(10)]
    server.always = faults.slow(0.002)
    results = FORK.Queue()
    workers = [
        FORK.Process(target=fetch_all, args=(cache, order, results)) for order in (indexes, indexes[::-1], indexes)
    ]
    for worker in workers:
        worker.start()
    assert [all(results.get(timeout=30)) for _ in workers] == [True] * 3
    for worker in workers:
        worker.join()
    kept = there(cache, server)
    assert 1 <= len(kept) <= 4 and stored(cache) <= cache.max_bytes
    assert all(cache.read(indexes[i], 0, SIZE) == server.objects[f"/{i}.tar"] for i in kept)


def test_a_shard_is_fetched_by_one_process_at_a_time(server, make):
    cache, index = make(), index_of(server, 1)
    server.always = faults.slow(0.1)
    worker = FORK.Process(target=cache.fetch, args=(index,))
    worker.start()
    wait_for(lambda: server.requests)
    start_s = time.monotonic()
    assert not cache.fetch(index) and not make(1.5).fetch(index_of(server, 2)) and time.monotonic() - start_s < 0.2
    worker.join()
    assert len(server.requests) == 4 and there(cache, server) == [1]


def test_a_process_killed_in_a_fetch_blocks_nobody(server, make):
    cache, index = make(1.5), index_of(server, 1)
    server.faults = [None, faults.slow(5)]
    worker = FORK.Process(target=cache.fetch, args=(index,))
    worker.start()
    wait_for(lambda: len(server.requests) == 2)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    (left,) = [name for name in os.listdir(cache.directory) if name.endswith(".part")]
    assert cache.fetch(index_of(server, 2)) and left not in os.listdir(cache.directory)
    assert cache.fetch(index) and cache.read(index, 0, SIZE) == server.objects["/1.tar"]


def test_a_process_killed_with_the_lock_blocks_nobody(server, make):
    def hold():
        with shard_cache.storage.locked(os.path.join(cache.directory, "lock")):
            ready.set()
            time.sleep(60)

    cache, ready = make(), FORK.Event()
    worker = FORK.Process(target=hold)
    worker.start()
    assert ready.wait(10)
    worker.kill()
    worker.join()
    assert cache.fetch(index_of(server, 1))


def test_a_cache_survives_pickling_and_a_fork(server, make):
    cache = make(9)
    cache.ahead("a", [index_of(server, 0)])
    wait_for(lambda: there(cache, server) == [0])
    again = pickle.loads(pickle.dumps(cache))
    again.ahead("a", [index_of(server, 1)])
    wait_for(lambda: there(cache, server) == [0, 1])
    again.close()

    def child():
        cache.ahead("a", [index_of(server, 2)])
        wait_for(lambda: there(cache, server) == [0, 1, 2])

    worker = FORK.Process(target=child)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def test_a_cache_that_cannot_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"set data\.cache_dir"):
        ShardCache(str(tmp_path / "file"), max_bytes=9)
    with pytest.raises(ValueError, match=r"data\.cache_gib"):
        ShardCache(str(tmp_path / "x"), max_bytes=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("w"))
    made = World(root=root, num_train=7, num_test=1, size=32, num_frames=6, clips_per_shard=3)
    made.prepare()
    return made


@pytest.fixture
def far(server, world, tmp_path):
    """Shards of a world on the server, and where their indexes are."""
    server.objects |= {f"/w/{Path(shard).name}": Path(shard).read_bytes() for shard in world.shards("train")}
    shards = [f"{server.url}/w/{Path(shard).name}" for shard in world.shards("train")]
    Shards(train=shards, index_dir=str(tmp_path)).prepare()
    return shards, str(tmp_path)


def test_training_data_from_the_cache_equals_local_data(server, world, far, make, monkeypatch):
    monkeypatch.setattr(shard_cache, "CHUNK", 1 << 20)
    (shards, index_dir), cache = far, make(1000)
    samples = ClipReader(shards, clips=CLIPS, seed=1, source=0, train=True, index_dir=index_dir, cache=cache)
    samples.fetch_ahead([0, 1, 2])
    wait_for(lambda: len(cache._fetcher[1]._held) == 3)
    server.requests = []
    assert_same(samples, ClipReader(world.shards("train"), clips=CLIPS, seed=1, source=0, train=True))
    assert server.requests == []


def test_a_damaged_copy_is_dropped_and_read_anew(server, world, far, make):
    (shards, index_dir), cache = far, make(1000)
    index = open_index(shards[0], index_dir=index_dir)
    assert cache.fetch(index)
    part = index.part(1, "video")
    with open(cache.path(index), "r+b") as file:
        file.seek(part.offset)
        file.write(b"????")
    assert (
        read_part(index, 1, "video", cache=cache)
        == Path(world.shards("train")[0]).read_bytes()[part.offset :][: part.size]
    )
    assert not os.path.exists(cache.path(index))


class Words:
    """Stands for a tokenizer."""

    max_length, pad_id = 4, 0

    def __call__(self, captions):
        raise NotImplementedError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_fetches_the_windows_that_it_will_read(server, far, make, monkeypatch, num_workers):
    monkeypatch.setattr(shard_cache, "CHUNK", 1 << 20)
    monkeypatch.setattr("vlp.data.loader._batch", lambda *a, **k: ((), 0.0))
    (shards, index_dir), cache = far, make(1000)
    samples = ClipReader(shards, clips=CLIPS, seed=1, source=0, train=True, index_dir=index_dir, cache=cache)
    plan = Plan(samples.counts, seed=0, num_lanes=1, window_shards=1, global_batch=1)
    work = MicroBatches(
        {0: Part(samples, plan)},
        schedule=Schedule([1.0], seed=0),
        tokenizer=Words(),
        accumulate=1,
        rank=0,
        world_size=1,
    )
    workers = Workers(num_workers=num_workers, prefetch=1, start_method="fork", sandbox=Sandbox(network=True))
    first = [cache.path(open_index(shards[number], index_dir=index_dir)) for number in plan.upcoming(0, 0, 0, 1)]
    assert len(first) == 2
    steps = iter(StepLoader(work, start_step=0, num_steps=2, workers=workers))
    next(steps)
    wait_for(lambda: all(map(os.path.exists, first)))
    assert len([name for name in os.listdir(cache.directory) if name.endswith(".tar")]) == 2
    steps.close()


def test_warnings_name_no_secrets(server, make, caplog):
    caplog.set_level(logging.DEBUG)
    cache, index = make(0.5), index_of(server, 1)
    index.shard = index.shard.replace("//", "//user:s3cret@") + "?sig=s3cret"
    assert not cache.fetch(index)
    cache.drop(index)
    assert "s3cret" not in caplog.text and "has no room" in caplog.text
