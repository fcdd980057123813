"""A sweep from its command line or file to cells, checked before anything starts, run, stopped and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import overrides

from vlp import sweep
from vlp.config import NAME, ConfigError
from vlp.report import cells
from vlp.training import launch, sweep_run
from vlp.training.exits import Exit

ONE = "objective=[contrastive]"
WEIGHT = "objective.contrastive.weight"


def names(*words: str) -> list[str]:
    return [cell.name for cell in sweep.parse(words).cells]


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        sweep.parse(words)
    return str(error.value)


def test_commas_make_cells_named_after_what_they_change():
    found = sweep.parse(["-m", "+experiment=quickstart", f"{WEIGHT}=0,0.5", "run.seed=3,4"])
    assert [c.name for c in found.cells] == [f"contrastive.weight={w},seed={s}" for w in ("0", "0.5") for s in (3, 4)]
    assert found.cells[1].overrides == ("+experiment=quickstart", f"{WEIGHT}=0", "run.seed=4")
    assert (found.cells[1].group, found.cells[1].seed) == ("contrastive.weight=0", "4")
    assert found.keys == {"contrastive.weight": WEIGHT}


def test_ranges_lists_and_groups_are_axes_too():
    assert names("-m", "run.seed=range(0,3)") == ["seed=0", "seed=1", "seed=2"]
    assert names("-m", "objective=[contrastive],[contrastive,matching]")[0] == "objective=contrastive"
    assert names("-m", "video=tiny_joint,conv_frames") == ["video=tiny_joint", "video=conv_frames"]
    assert names("-m", "optim.lr=1e-3,3e-4") == ["lr=0.001", "lr=0.0003"]


def test_more_values_do_not_rename_the_cells_that_exist():
    few, many = names("-m", "optim.lr=1e-3,3e-4"), names("-m", "optim.lr=1e-4,1e-3,3e-4", "trainer.max_steps=9")
    assert set(few) < set(many)


def test_keys_that_end_alike_keep_apart():
    assert names("-m", "fusion.depth=1,2", "decoder.depth=3,4")[0] == "fusion.depth=1,decoder.depth=3"
    assert names("-m", "a.b.c=1,2", "x.b.c=3,4")[0] == "a.b.c=1,x.b.c=3"


@given(st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=4, unique=True))
def test_names_are_safe_and_differ_for_any_values(values):
    labels = [sweep.safe(value) for value in values]
    assert all(NAME.fullmatch(f"k={label}") and "/" not in label and "\n" not in label for label in labels)
    plain = {value.strip("'\"").strip("[]{}") for value in values}
    assert len(set(labels)) >= len(plain)


def test_all_mistakes_of_a_command_line_come_at_once():
    text = refused("-m", "run.sed", "sweep.paralel=2", "run.seed=interval(0,1)", "optim.lr=1,1", "run.name=a/b", "x=[")
    for word in ("run.sed", "sweep.parallel", "one by one", "given twice", "run.name", "x=["):
        assert word in text
    assert "nothing to sweep over" in refused("-m", "+experiment=quickstart")
    assert "1,001 cells" in refused("-m", "run.seed=range(0,1001)")


def test_file_says_the_same_as_a_command_line(tmp_path):
    path = tmp_path / "weights.yaml"
    content = {"base": ["+experiment=quickstart"], "axes": {WEIGHT: [0, 0.5]}, "seeds": 2}
    path.write_text(yaml.safe_dump(content))
    found = sweep.parse([f"sweep={path}", "trainer.max_steps=7"])
    typed = sweep.parse(["-m", "+experiment=quickstart", "trainer.max_steps=7", f"{WEIGHT}=0,0.5", "run.seed=0,1"])
    assert found.cells == typed.cells and found.name == "weights"


def test_file_with_named_cells_and_values_of_every_kind(tmp_path):
    path = tmp_path / "s.yaml"
    cells_ = {"full": None, "small": {"clip.size": 32, "fusion": None, "a.b": [1, "x y"], "c": True}}
    path.write_text(yaml.safe_dump({"cells": cells_, "seeds": [5], "baseline": "small"}, sort_keys=False))
    found = sweep.parse([f"sweep={path}"])
    assert [cell.name for cell in found.cells] == ["full,seed=5", "small,seed=5"] and found.baseline == "small"
    assert found.cells[1].overrides == ("clip.size=32", "fusion=null", "a.b=[1,'x y']", "c=true", "run.seed=5")


def test_mistakes_of_a_file_come_at_once(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("sedes: 3\naxes: {a: 1, '$(rm)': [1]}\ncells: {'../x': []}\nbase: 3\n")
    text = refused(f"sweep={path}")
    for word in ("Did you mean 'seeds'", "axes.a", "axes.$(rm)", "'../x' is no name", "base is 3"):
        assert word in text
    assert "No such file" in refused("sweep=absent.yaml")


def test_findings_of_all_cells_come_before_the_first_starts(place, capsys):
    words = overrides(place, "wrong", ONE, "-m", "optim.lr=0.1,-1", "trainer.nan_policy=go")
    assert launch.main(words) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert "optim.lr: -1 is not possible; it must be above 0. (in lr=-1)" in error
    assert error.count("trainer.nan_policy") == 1 and "Traceback" not in error
    assert not (place / "runs" / "wrong").exists()


def test_parts_that_do_not_fit_are_found_before_the_first_starts(place, capsys):
    assert launch.main(overrides(place, "wiring", "-m", "view=[],[masked_words]")) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert "(in view=" in error and not (place / "runs" / "wiring").exists()


def test_directory_of_a_run_is_no_directory_of_a_sweep(place, capsys):
    (place / "runs" / "taken").mkdir(parents=True)
    (place / "runs" / "taken" / "run.json").write_text("{}")
    assert launch.main(overrides(place, "taken", ONE, "-m", "run.seed=0,1")) == Exit.CANNOT_CREATE
    assert "is a run, not a sweep" in capsys.readouterr().err


def test_tracker_run_of_a_cell_has_an_id_of_its_own(place):
    words = overrides(place, "tracked", ONE, "logger=[wandb]", "-m", "run.seed=0,1")
    found = sweep_run.check(sweep.parse(words), "")
    ids = [word for job in found.jobs for word in job.overrides if word.startswith("logger.wandb.id=")]
    assert ids == ["logger.wandb.id='tracked.seed=0'", "logger.wandb.id='tracked.seed=1'"]


@pytest.mark.slow
def test_same_command_runs_only_what_failed(place, capsys):
    words = overrides(place, "again", ONE, "-m", "data.batch_size=64,4", "sweep.parallel=2")
    directory = place / "runs" / "again"
    assert launch.main(words) == Exit.BAD_CONFIG  # 16 clips make no batch of 64
    said = capsys.readouterr().out
    assert "1 done, 1 failed" in said and "(exit 78)" in said and "the same command" in said
    done = (directory / "batch_size=4" / "run.json").read_text()
    assert launch.main(words) == Exit.BAD_CONFIG
    assert (directory / "batch_size=4" / "run.json").read_text() == done
    assert (directory / "_logs" / "batch_size=64.log").read_text().count("config: ") == 2
    assert (directory / "report.html").exists()
    assert launch.main([*words, "optim.lr=0.5"]) == Exit.RESUME_REFUSED  # found before anything starts
    assert "optim.lr: was 0.001, is 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_the_running_cell_and_starts_no_other(place):
    words = overrides(place, "stop", ONE, "-m", "run.seed=0,1", "trainer.max_steps=100000", "sweep.parallel=1")
    line = [sys.executable, "train.py", *words]
    root, directory = Path(__file__).parents[1], place / "runs" / "stop"
    process = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 300
    while cells.progress(directory, "seed=0")[0] < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=120)
    assert process.returncode == Exit.PREEMPTED, said
    assert "seed=0: stopped" in said and not (directory / "seed=1").exists()
    step = cells.progress(directory, "seed=0")[0]
    assert (directory / "seed=0" / "checkpoints" / f"step-{step:08d}").is_dir()
