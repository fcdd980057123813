"""Storage that gives no answer for a while, or for good, under real runs and real ranks."""

import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import object_server as faults
import pytest
import torch
from forked_ranks import TOY, Attempt, Session, attempt, changed, start, wait
from object_server import Fault, Handler, ObjectServer
from omegaconf import DictConfig
from ranks import on_ranks
from test_remote import CLIPS

from vlp import config
from vlp.data import outage, remote, storage
from vlp.data.fields import ClipReader
from vlp.data.outage import Outage, patiently
from vlp.data.remote import Retry
from vlp.data.storage import OutageError
from vlp.data.synthetic import World
from vlp.eval import runner
from vlp.training import checkpoint, ledger
from vlp.training.exits import Exit
from vlp.types import Reason

QUICK = Retry(budget_s=2.0, first_wait_s=0.02, max_wait_s=0.1, idle_s=0.7)
SAYS = " gives no answer ("
TIMEOUT_S = 6.0  # of the watchdog


def few_clips(root: Path) -> World:
    made = World(root=str(root), num_train=30, num_test=4, size=32, num_frames=4, clips_per_shard=3)
    made.prepare()
    return made


@contextmanager
def serving(world: World) -> Iterator[ObjectServer]:
    with ObjectServer() as running:
        for shard in (*world.shards("train"), *world.shards("test")):
            running.objects[f"/{Path(shard).name}"] = Path(shard).read_bytes()
        yield running
        running.shutdown()


def from_disk(place: Path, world: World, *more: str) -> DictConfig:
    """The config of a run on the shards as files."""
    words = [word for word in TOY if "sources.world" not in word]
    words += [f"data.sources.shards.{split}=[{','.join(world.shards(split))}]" for split in ("train", "test")]
    places = [f"paths.runs={place / 'runs'}", f"paths.data={place / 'data'}", "run.name=x"]
    return config.load([*words, *places, "data=shards", "trainer.max_steps=6", *more])


def from_server(cfg: DictConfig, world: World, server: ObjectServer, index_dir: Path) -> DictConfig:
    """The same run on the shards of the server."""
    urls = {split: [f"{server.url}/{Path(shard).name}" for shard in world.shards(split)] for split in ("train", "test")}
    lists = {f"data__sources__shards__{split}": shards for split, shards in urls.items()}
    return changed(cfg, data__index_dir=str(index_dir), **lists)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return few_clips(tmp_path_factory.mktemp("w"))


@pytest.fixture
def server(world):
    with serving(world) as running:
        yield running


@pytest.fixture(scope="module")
def near(place, world):
    return from_disk(place, world, "trainer.timeout_s=100")


@pytest.fixture(scope="module")
def steady(place, near):
    """Return what an undisturbed run of so many ranks reads and computes."""

    @functools.cache
    def found(world_size: int) -> list[tuple]:
        name = f"steady{world_size}"
        done = attempt(changed(near, run__name=name), log=place / f"{name}.log", world_size=world_size)
        assert done.codes == [0] * world_size, done.output
        return rows(place / "runs" / name)

    return found


@pytest.fixture
def cfg(near, world, server, tmp_path):
    return from_server(near, world, server, tmp_path / "indexes")


def be_quick(rank: int) -> None:
    remote.RETRY, outage._SAY_EVERY_S = QUICK, 1.0
    outage._MAX_PAUSE_S = 0.2


class Dark:
    """A fault of one shard, so that one rank waits first, from the first step of a run on until `over` is set."""

    def __init__(self, kind: str, run: Path):
        kinds: dict[str, Fault] = {"503": faults.status(503), "black hole": self.swallow}
        self.fault, self.ledger, self.over = kinds[kind], run / "ledger.jsonl", threading.Event()

    def __call__(self, handler: Handler, data: bytes, low: int, high: int) -> None:
        if handler.path == "/train-0001-000000.tar" and self.ledger.exists() and not self.over.is_set():
            self.fault(handler, data, low, high)
        else:
            handler.ranged(data, low, high)

    def swallow(self, handler: Handler, data: bytes, low: int, high: int) -> None:
        """Accept, and never answer."""
        self.over.wait(60)
        handler.close_connection = True


def rows(run: Path) -> list[tuple]:
    """What each step read and computed, to the last bit; of steps that were done twice, both."""
    found = [row for row in ledger.read(run / "ledger.jsonl") if "step" in row]
    return sorted((row["step"], row["ids"], row["loss"], row["weights"]) for row in found)


def run_in_the_dark(cfg: DictConfig, log: Path, dark: Dark, until, *, world_size: int = 1, before=be_quick) -> Attempt:
    """Start the ranks, call `until` with them when the log says that storage is away, and wait for their end."""
    ranks = start(cfg, log=log, session=Session(world_size, before=before))
    deadline = time.monotonic() + 120
    while not (log.exists() and SAYS in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert SAYS in log.read_text(), log.read_text()
    until(ranks)
    dark.over.set()
    return Attempt(wait(ranks, patience_s=90), log.read_text(), time.monotonic())


@pytest.mark.parametrize(("kind", "world_size"), [("503", 1), ("black hole", 2)])
def test_a_run_waits_for_storage_says_so_and_loses_nothing(place, cfg, steady, server, tmp_path, kind, world_size):
    name = f"waits-{tmp_path.name}"
    server.always = dark = Dark(kind, place / "runs" / name)
    values = {"run__name": name, "trainer__timeout_s": TIMEOUT_S}  # the others wait for longer than it allows
    done = run_in_the_dark(
        changed(cfg, **values),
        tmp_path / "log",
        dark,
        lambda ranks: time.sleep(1.5 * TIMEOUT_S),
        world_size=world_size,
    )
    assert done.codes == [0] * world_size and rows(place / "runs" / name) == steady(world_size), done.output
    said = [line for line in done.output.splitlines() if SAYS in line]
    assert len(said) > 1 and all(f"{server.url} gives no answer" in line for line in said), done.output
    assert "waiting for it until" in said[0] and "(data.outage_s=7200)" in said[0] and "hang" not in done.output


def test_storage_that_stays_away_ends_in_a_commit_and_74_and_the_next_attempt_goes_on(
    place, cfg, steady, server, tmp_path
):
    name = f"lasting-{tmp_path.name}"
    server.always = dark = Dark("503", place / "runs" / name)
    values = {"run__name": name, "trainer__checkpoint_every": 100, "data__outage_s": 3.0}
    lasting = changed(cfg, **values)
    done = attempt(lasting, log=tmp_path / "log", world_size=2, before=be_quick)
    assert done.codes == [Exit.STORAGE] * 2 == [74, 74], done.output
    run = place / "runs" / name
    (newest,) = checkpoint.all_steps(run / "checkpoints")
    step = max(row[0] for row in rows(run))
    assert int(newest.name[-8:]) == step > 0
    line = f"stopped: {server.url} gave no answer (status 503) for "
    assert done.output.count(line) == 1 and "allowed are data.outage_s=3; step" in done.output, done.output
    assert "Traceback" not in done.output and "hang" not in done.output
    dark.over.set()
    again = attempt(lasting, log=tmp_path / "again", world_size=2)
    assert again.codes == [0, 0] and rows(run) == steady(2), again.output


def test_a_signal_to_one_rank_while_another_waits_for_storage_saves_and_stops_both(place, cfg, server, tmp_path):
    name = f"told-{tmp_path.name}"
    server.always = dark = Dark("503", place / "runs" / name)

    def tell(ranks):
        os.kill(ranks[0].pid, signal.SIGUSR1)
        assert wait(ranks, patience_s=60) == [75, 75]  # while it is still away

    values = {"run__name": name, "trainer__checkpoint_every": 100}
    done = run_in_the_dark(changed(cfg, **values), tmp_path / "log", dark, tell, world_size=2)
    assert done.codes == [75, 75], done.output
    run = place / "runs" / name
    (newest,) = checkpoint.all_steps(run / "checkpoints")
    assert int(newest.name[-8:]) == max(row[0] for row in rows(run))


@pytest.mark.parametrize("indexed", [False, True])
def test_storage_that_is_away_at_the_start_ends_it_at_once_with_74(cfg, server, tmp_path, indexed):
    if indexed:
        config.build(cfg.data.sources.shards).prepare()
    server.always = faults.status(503)
    done = attempt(changed(cfg, run__name=f"start-{tmp_path.name}"), log=tmp_path / "log", before=be_quick)
    assert done.codes == [74] and "Traceback" not in done.output, done.output
    assert "status 503; tried " in done.output and "nothing was trained in this attempt" in done.output


def test_no_secret_of_a_url_is_said_while_storage_is_away(server, monkeypatch, caplog):
    monkeypatch.setattr(remote, "RETRY", QUICK)
    server.always = faults.status(503)
    told = []
    url = server.url.replace("//", "//user:s3cret@") + "/train-0000-000000.tar?sign=s3cret"
    with pytest.raises(OutageError) as caught, caplog.at_level(0):
        patiently(lambda: storage.read(url, 0, 9), limit_s=0.6, tell=told.append)
    said = [each.text() for each in told] + [str(caught.value), caplog.text]
    assert server.url in said[0] and "s3cret" not in "".join(said)


def test_a_body_that_never_comes_whole_is_no_outage(server, monkeypatch):
    monkeypatch.setattr(remote, "RETRY", QUICK)
    for fault in (faults.short, faults.other, faults.cut):
        server.always = fault
        with pytest.raises(storage.StorageError) as caught:
            storage.read(f"{server.url}/train-0000-000000.tar", 0, 900)
        assert not isinstance(caught.value, OutageError)


def test_a_mount_that_goes_away_is_waited_for_and_a_file_that_goes_is_not(world, tmp_path):
    folder = tmp_path / "mount"
    folder.mkdir()
    for shard in world.shards("train")[:2]:
        for path in (Path(shard), Path(shard).with_suffix(".index")):
            (folder / path.name).write_bytes(path.read_bytes())
    shards = [str(folder / Path(shard).name) for shard in world.shards("train")[:2]]
    reader = ClipReader(shards, clips=CLIPS, seed=1, source=0, train=True)
    whole = reader.read(0, 0).frames
    os.rename(folder, tmp_path / "elsewhere")
    with pytest.raises(OutageError) as caught:
        reader.read(3, 0)  # a shard that this process has not opened yet
    assert (caught.value.place, caught.value.what) == (str(folder), "the folder is gone or empty")

    def come_back(outage: Outage) -> None:
        if not folder.exists():
            os.rename(tmp_path / "elsewhere", folder)

    assert patiently(lambda: reader.read(3, 0), limit_s=60, tell=come_back).status == Reason.OK
    storage.forget(shards[0])
    os.unlink(shards[0])
    assert reader.read(0, 0).status == Reason.READ_FAILED and np.any(whole)


def test_a_stale_handle_is_opened_anew_and_a_bad_sector_is_not_waited_for(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"abc")
    assert storage.read(str(tmp_path / "x.tar"), 0, 3) == b"abc" and storage._open.cache_info().currsize
    stale = storage.failure(str(tmp_path / "x.tar"), OSError(errno.ESTALE, "Stale file handle"))
    assert isinstance(stale, OutageError) and stale.place == str(tmp_path) and not storage._open.cache_info().currsize
    for number in (errno.EIO, errno.ENOENT, errno.EACCES):
        assert not isinstance(storage.failure("x", OSError(number, "no")), OutageError)


def split_on(rank: int, *, lost: bool) -> dict[str, torch.Tensor]:
    """Rank 1 waits for its first batch; then there is none for anybody, or its storage is lost."""
    rounds = iter(range(5))

    def batches():
        for _ in rounds if rank == 1 else ():
            runner.keep_up(lambda: None, "cpu")
        if lost and rank == 1:
            runner.give_up("s3://bucket gave no answer", "cpu")
        return
        yield

    data = runner.EvalData._make([None] * len(runner.EvalData._fields))
    data = data._replace(batches=batches, is_stopping=lambda: None, source="x", split="test")
    try:
        list(runner._in_step(data, "cpu"))
    except (ValueError, runner.StoppedError) as error:
        return {"said": torch.tensor(list(f"{type(error).__name__}: {error}".encode()), dtype=torch.uint8)}
    return {}


def only_wait(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    return split_on(rank, lost=False)


def lose(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    return split_on(rank, lost=True)


@pytest.mark.parametrize(
    ("work", "said"),
    [(only_wait, "ValueError: x: split 'test' has no clip"), (lose, "StorageLostError: s3://bucket gave no answer")],
)
def test_an_evaluation_keeps_its_ranks_together_while_one_waits_or_is_lost(tmp_path, work, said):
    for found in on_ranks(work, 2, tmp_path):
        assert bytes(found["said"].tolist()).decode().startswith(said)
