"""The directory of a run: its lock, its record, and what may change between attempts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlp.training import run_dir
from vlp.training.exits import Exit, StopRun

# Holds the lock in a process that has forked a worker, as a data loader does; both sleep.
HOLDER = """
import os, sys, time
from pathlib import Path
from vlp.training import run_dir
with run_dir.locked(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(120)
"""


def hold(directory: Path) -> tuple[subprocess.Popen, int]:
    """Start a process that owns the directory; return it and its worker's id."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_with_the_owner_and_a_killed_one_frees_the_lock(tmp_path):
    process, worker = hold(tmp_path)
    try:
        with pytest.raises(StopRun) as stop, run_dir.locked(tmp_path):
            pass
        assert stop.value.code == Exit.LOCKED == 77 and f"in use by process {process.pid} on " in stop.value.message
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)  # the forked worker still lives, and holds no lock
        with run_dir.locked(tmp_path):
            assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_the_lock_is_free_after_the_block(tmp_path):
    with run_dir.locked(tmp_path):
        pass
    process, worker = hold(tmp_path)
    process.kill(), os.kill(worker, signal.SIGKILL)
    assert worker > 0 and process.wait() == -signal.SIGKILL


def test_create_makes_parents_and_leaves_nothing(tmp_path):
    run_dir.create(tmp_path / "a" / "b")
    run_dir.create(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_directory_that_cannot_be_written_stops_with_73(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StopRun) as stop:
        run_dir.create(tmp_path / "file" / "run")
    assert stop.value.code == Exit.CANNOT_CREATE == 73
    assert "Not a directory" in stop.value.message and "set paths.runs or run.name" in stop.value.message


def test_record_keeps_what_earlier_attempts_wrote(tmp_path):
    run_dir.Record(tmp_path, writes=True).update(step=1, status="running")
    record = run_dir.Record(tmp_path, writes=True)
    record.update(step=2, caption="größer")
    assert json.loads((tmp_path / "run.json").read_text()) == {"step": 2, "status": "running", "caption": "größer"}


def test_record_of_another_rank_writes_nothing(tmp_path):
    record = run_dir.Record(tmp_path, writes=False)
    record.update(step=1)
    assert record.values == {"step": 1} and list(tmp_path.iterdir()) == []


def test_write_json_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        run_dir.write_json(path, {"bad": object()})
    assert path.read_text() == "old"


CONFIG = {"run": {"name": "a", "resume": True}, "optim": {"lr": 1e-05, "lr_factors": {}}, "data": {"sources": {"w": 1}}}


def stored(tmp_path, config=CONFIG) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def changed(**sections) -> dict:
    return {name: {**section, **sections.get(name, {})} for name, section in CONFIG.items()}


@pytest.mark.parametrize(
    "sections",
    [{}, {"run": {"resume": False}}, {"data": {"sources": {"v": 2}}}, {"run": {"stop_after": 3}}],
)
def test_the_same_config_and_free_keys_may_continue(tmp_path, sections):
    run_dir.refuse_other_config(stored(tmp_path), changed(**sections))


def test_every_key_that_makes_another_run_is_listed(tmp_path):
    new = changed(optim={"lr": 2e-05, "lr_factors": {"*": 0.1}}, run={"seed": 3})
    with pytest.raises(StopRun) as stop:
        run_dir.refuse_other_config(stored(tmp_path), new)
    assert stop.value.code == Exit.RESUME_REFUSED == 76
    lines = stop.value.message.splitlines()[1:-1]
    assert lines[0] == "  optim.lr: was 1e-05, is 2e-05" and "  run.seed: was 'absent', is 3" in lines
    assert {line.split(":")[0].strip() for line in lines} == {
        "optim.lr", "optim.lr_factors", "optim.lr_factors.*", "run.seed",
    }  # fmt: skip


def test_a_key_that_only_begins_like_a_free_one_is_not_free(tmp_path):
    with pytest.raises(StopRun, match=r"trainer\.devices_per_node"):
        run_dir.refuse_other_config(stored(tmp_path), {**CONFIG, "trainer": {"devices_per_node": 2}})


def test_a_fresh_directory_may_begin(tmp_path):
    run_dir.refuse_other_config(tmp_path, CONFIG)
