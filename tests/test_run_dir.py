"""The directory of a run: its lock, its record, and what may change between attempts."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlp import config
from vlp.training import run_dir
from vlp.training.assemble import plain
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
        with run_dir.locked(tmp_path) as lease:
            assert lease.number == 2 and [path.name for path in tmp_path.glob("lease-*")] == ["lease-000002"]
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


def different(**sections) -> dict:
    return {name: {**section, **sections.get(name, {})} for name, section in CONFIG.items()}


def test_every_difference_is_listed_by_class_and_the_way_out_is_named(tmp_path):
    new = different(optim={"lr": 2e-05, "lr_factors": {"*": 0.1}}, run={"seed": 3, "resume": False})
    with pytest.raises(StopRun) as stop:
        run_dir.changes(stored(tmp_path), new)
    assert stop.value.code == Exit.RESUME_REFUSED == 76
    assert stop.value.message.splitlines()[1:] == [
        "  free: run.resume: was True, is False",
        "  needs run.allow: optim.lr: was 1e-05, is 2e-05",
        "  needs run.allow: optim.lr_factors: was {}, is 'absent'",
        "  needs run.allow: optim.lr_factors.*: was 'absent', is 0.1",
        "  refused: run.seed: was 'absent', is 3",
        "choose another run.name, or the old values.",
    ]


def test_a_change_that_the_user_allows_continues_and_is_printed(tmp_path):
    new = different(optim={"lr": 2e-05})
    with pytest.raises(StopRun, match=r"continue all the same with run\.allow=\[optim\.lr\]"):
        run_dir.changes(stored(tmp_path), new)
    lines = run_dir.changes(tmp_path, new, allow=["optim.lr"])
    assert lines == ["changed since the last attempt:  allowed: optim.lr: was 1e-05, is 2e-05"]


def test_the_flag_allows_nothing_that_is_refused(tmp_path):
    with pytest.raises(StopRun, match=r"refused: run\.seed"):
        run_dir.changes(stored(tmp_path), different(run={"seed": 3}), allow=["run.seed", "*"])


# One key each that is changed in the config of a run: what happens when it goes on.
FREE = """trainer.max_steps=9 trainer.accumulate=2 trainer.nan_policy=skip trainer.max_skipped_steps=1
trainer.max_rewinds=1 trainer.spike_factor=3.0 trainer.timeout_s=5 trainer.max_time_s=60
trainer.check_replicas_every=1 trainer.ledger=true trainer.log_every=7 trainer.checkpoint_every=7
trainer.keep_checkpoints=7 trainer.devices=2 trainer.strategy=ddp trainer.num_threads=2 data.num_workers=3
data.cache_gib=1.0 eval.every=4 eval.batch_size=2 run.resume=false run.stop_after=3 run.hold_after=null
paths.runs=elsewhere data.decode_timeout_s=30"""
WITH_FLAG = """optim.lr=0.5 optim.eps=0.1 optim.weight_decay=0.5 schedule.warmup_steps=3
trainer.clip_grad_norm=0.1 trainer.precision=bf16-mixed objective.contrastive.weight=0.5 data.batch_size=8"""
REFUSED = """run.seed=1 data.num_lanes=2 data.window_shards=9 data.bucket_steps=2
+data.sources.world.weight=0.5 clip.num_frames=4 tokenizer.vocab_size=99 model.embed_dim=7 optim.ema_decay=0.9
optim.freeze=[model.text*] objective.captioning=null text.config.num_hidden_layers=1 run.name=other"""
TABLE = [
    (word, kind) for kind, words in (("free", FREE), ("flag", WITH_FLAG), ("no", REFUSED)) for word in words.split()
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, dict]:
    cfg = plain(config.load(["+experiment=quickstart", "+scale=tiny"]))
    return stored(tmp_path_factory.mktemp("quickstart"), cfg), cfg


@pytest.mark.parametrize(("word", "kind"), TABLE)
def test_each_single_change_of_a_config_is_in_its_class(quickstart, word, kind):
    (directory, old), (key, _, value) = quickstart, word.lstrip("+").partition("=")
    *path, last = key.split(".")
    new = copy.deepcopy(old)
    functools.reduce(lambda node, name: node[name], path, new)[last] = yaml.safe_load(value)
    if kind == "free":
        assert run_dir.changes(directory, new)
        return
    with pytest.raises(StopRun):
        run_dir.changes(directory, new)
    if kind == "flag":
        assert run_dir.changes(directory, new, allow=[key])
    else:
        with pytest.raises(StopRun, match="refused"):
            run_dir.changes(directory, new, allow=[key])


def test_the_table_of_changes_is_of_forty_or_more():
    assert len(TABLE) >= 40


def test_a_key_that_only_begins_like_a_free_one_is_not_free(tmp_path):
    with pytest.raises(StopRun, match=r"trainer\.devices_per_node"):
        run_dir.changes(stored(tmp_path), {**CONFIG, "trainer": {"devices_per_node": 2}})


def test_a_fresh_directory_may_begin(tmp_path):
    assert run_dir.changes(tmp_path, CONFIG) == []
