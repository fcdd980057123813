"""Disks that are full or not ours: old checkpoints stay, logs stop nothing, and a start is refused at once."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import overrides, train

from vlp.eval import strips
from vlp.training import checkpoint, run_dir
from vlp.training.exits import Exit, StopRun
from vlp.training.metrics_csv import MetricsCsv, read

ONE, EACH = "objective=[contrastive]", "trainer.checkpoint_every=1"
IS_ROOT = os.geteuid() == 0
ROOT = Path(__file__).parents[1]


def mount(*words: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", *words], capture_output=True).returncode == 0


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A file system of its own in memory."""
    (tmp_path / "small").mkdir()
    if not mount("-o", "size=64M", "tmpfs", str(tmp_path / "small")):
        pytest.skip("needs leave to mount a tmpfs")
    yield tmp_path / "small"
    subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def resize(place: Path, num_bytes: int) -> None:
    assert mount("-o", f"remount,size={num_bytes}", "tmpfs", str(place))


def fill(place: Path) -> Path:
    """Use up every byte, and return the file that does."""
    with (place / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1):
            while True:
                try:
                    if file.write(bytes(size)) == 0:
                        break
                except OSError:
                    break
    return place / "filler"


def used(place: Path) -> int:
    facts = os.statvfs(place)
    return (facts.f_blocks - facts.f_bfree) * facts.f_bsize


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_costs_warnings_then_exit_74_and_the_run_continues_when_there_is_room(
    place, small, capsys, background
):
    more = (ONE, EACH, "trainer.max_steps=6", f"trainer.checkpoint_async={background}", "trainer.keep_checkpoints=9")
    more += (f"paths.runs={small}",)
    assert train(place, "full", *more, "run.stop_after=1") == Exit.PREEMPTED
    root = small / "full" / "checkpoints"
    size = sum(path.stat().st_size for path in root.glob("*/*"))
    resize(small, used(small) + size + size // 2)
    assert train(place, "full", *more) == Exit.STORAGE
    error = capsys.readouterr().err
    assert error.count("warning: the checkpoint of step") == 2 and "3 failures in a row" in error
    assert "No space left" in error and "Traceback" not in error
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]
    resize(small, 256 << 20)
    assert train(place, "full", *more) == Exit.DONE
    stored, refused = checkpoint.newest_valid(root)
    assert stored is not None and stored.step == 6 and not refused


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let every write behind this size fail in this process, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files_ends_a_run_with_74_and_its_record_says_so(place, capsys):
    assert train(place, "limited", ONE, EACH, "trainer.max_steps=6", "run.stop_after=1") == Exit.PREEMPTED
    with largest_file(200_000):
        assert train(place, "limited", ONE, EACH, "trainer.max_steps=6") == Exit.STORAGE
    assert "File too large" in capsys.readouterr().err
    run = place / "runs" / "limited"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 74)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_commits_are_timed_in_the_metrics(place):
    assert train(place, "timed", ONE, EACH, "trainer.max_steps=3") == Exit.DONE
    rows = [row for row in read(place / "runs" / "timed" / "metrics.csv") if "time/checkpoint_commit_s" in row]
    assert len(rows) == 3 and all(float(row["time/checkpoint_snapshot_s"]) >= 0 for row in rows)


def test_rows_of_metrics_wait_for_room_and_none_is_lost_or_cut(small, capsys):
    csv = MetricsCsv(small / "metrics.csv", after_step=0)
    csv.append(1, {"train/loss": 0.5})
    resize(small, 1 << 20)
    filler = fill(small)
    for step in range(2, 2000):
        csv.append(step, {"train/loss": 0.5 + step})
    assert capsys.readouterr().err.count("cannot be written (No space left on device); its rows wait") == 1
    assert 0 < len(read(csv.path)) < 1000
    filler.unlink()
    csv.append(2000, {"train/loss": 1.0, "val/new": 2.0})
    assert [int(row["step"]) for row in read(csv.path)] == list(range(1, 2001))


def test_records_and_pictures_that_find_no_room_cost_a_line(small, capsys):
    record = run_dir.Record(small, writes=True)
    record.update(step=1)
    resize(small, 1 << 20)
    fill(small)
    record.update(step=2, more="x" * 100_000)
    strips.replace(small / "eval" / "step.json", bytes(100_000))
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 2
    assert json.loads((small / "run.json").read_text()) == {"step": 1}


@pytest.mark.slow
def test_a_run_whose_log_is_on_a_full_disk_ends_as_any_other(place):
    words = overrides(place, "deaf", ONE, "trainer.max_steps=1", "trainer.progress_bar=true")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "train.py", *words], stdout=full, stderr=full, cwd=ROOT, timeout=300)
    assert done.returncode == Exit.DONE
    assert checkpoint.newest_valid(place / "runs" / "deaf" / "checkpoints")[0] is not None


def test_a_read_only_disk_is_refused_with_73_before_anything_is_built(place, small, capsys, monkeypatch):
    assert mount("-o", "remount,ro", "tmpfs", str(small))
    monkeypatch.setattr("vlp.training.launch.assemble", lambda *_: pytest.fail("built"))
    began = time.monotonic()
    assert train(place, "ro", ONE, f"paths.runs={small}") == Exit.CANNOT_CREATE == 73
    assert "Read-only file system" in capsys.readouterr().err and time.monotonic() - began < 5


def test_the_directory_of_a_run_is_closed_to_others(tmp_path):
    before = os.umask(0)
    try:
        run_dir.create(tmp_path / "run")
        path = checkpoint.save(tmp_path / "run" / "checkpoints", step=1, state=checkpoint.State({}, {}), keep=2)
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_a_link_in_the_place_of_the_run_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StopRun, match="is a link") as stop:
        run_dir.create(tmp_path / "run")
    assert stop.value.code == Exit.CANNOT_CREATE and not list((tmp_path / "elsewhere").iterdir())


def test_a_run_directory_that_everybody_can_write_to_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(StopRun, match="chmod o-w"):
        run_dir.create(tmp_path / "run")


@pytest.mark.skipif(not IS_ROOT, reason="needs two users: run as root")
def test_another_user_can_neither_read_nor_write_a_run(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    run_dir.create(tmp_path / "run")
    run_dir.write_text(tmp_path / "run" / "config.yaml", "a: 1\n")
    program = "import sys, os\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    for code in (
        "open(sys.argv[1] + '/config.yaml')",
        "open(sys.argv[1] + '/planted', 'w')",
        "os.listdir(sys.argv[1])",
    ):
        done = subprocess.run(
            [sys.executable, "-c", program + code, str(tmp_path / "run")], capture_output=True, text=True
        )
        assert "PermissionError" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="needs another user: run as root")
def test_a_run_directory_of_another_user_is_refused_with_73(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        try:
            run_dir.create(tmp_path / "run")
        except StopRun as stop:
            os._exit(int(stop.code))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 73
