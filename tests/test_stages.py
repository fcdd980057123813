"""Runs that follow each other by one command: checked first, continued where they broke, never done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_runs import WORLD, overrides, train

from vlp import config, stages
from vlp.planning import command
from vlp.report import cells
from vlp.training import launch, requeue, stages_run
from vlp.training.exits import Exit

ROOT = Path(__file__).parent.parent
ONE = "objective=[contrastive]"
SHORT = [["+experiment=frozen_in_time", f"clip.num_frames={number}"] for number in (1, 3)]


def line(folder, *lines, name="plan", base=(), more=()):
    """The command line of stages of the given overrides, on the world of the tests."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": list(base), "stages": [list(each) for each in lines]}))
    return [f"stages={path}", *overrides(folder, "x")[1:-1], *more]


def refused(*words):
    with pytest.raises(config.ConfigError) as error:
        stages.parse(words)
    return str(error.value)


def start(words):
    return subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def status(folder, name):
    found, _, _, record = cells.state(folder / "runs", name)
    return found, record.step


def test_a_file_becomes_named_runs_each_from_the_one_before(tmp_path):
    words = line(tmp_path, *SHORT, base=["optim.lr=1"], more=["optim.lr=2"])
    plan = stages.parse([*words, "run.name=mine"])
    assert [stage.name for stage in plan.stages] == ["mine-1", "mine-2"]
    second = stages.starting(plan, 1, "runs")
    assert second[:2] == ("optim.lr=1", "+experiment=frozen_in_time") and second[-1] == "init.run=runs/mine-1"
    assert second.index("optim.lr=2") > second.index("clip.num_frames=3")  # what is typed wins
    assert not any(word.startswith("init.run") for word in stages.starting(plan, 0, "runs"))
    assert stages.parse(words).name == "plan"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: []", "'stages' must be a list with the overrides of each stage"),
        ("stages: [+experiment=clip]", "'stages' must be a list with the overrides of each stage"),
        ("stagse: [[a=1]]", "expected the keys name, base, stages"),
        ("{", "while parsing"),
        ("name: a/b\nstages: [[a=1]]", "'a/b' is no name"),
        ("stages: [[a=1], [init.run=x]]", "init.run=x: the plan of the stages says this itself"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, said):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert said in refused(f"stages={path}")


def test_a_file_that_is_not_there_and_two_files_are_refused(tmp_path):
    assert "No such file or directory" in refused(f"stages={tmp_path / 'no.yaml'}")
    assert "2 files are named" in refused("stages=a", "stages=b")


def test_every_stage_is_checked_before_the_first_one_starts(tmp_path, capsys):
    words = line(tmp_path, [*SHORT[0], "optim.lrr=1"], [*SHORT[1], "clip.sise=9", "clip.num_frames=x"])
    assert launch.main(words) == Exit.BAD_CONFIG
    said = capsys.readouterr().err
    assert "optim.lrr" in said and "(in plan-1)" in said and "clip.sise" in said and "(in plan-2)" in said
    assert launch.main(line(tmp_path, SHORT[0], [*SHORT[1], "video.overrides.depht=7"])) == Exit.BAD_CONFIG
    assert "(in plan-2)" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_ranks_of_torchrun_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch.main(line(tmp_path, *SHORT)) == Exit.BAD_CONFIG
    assert "torchrun" in capsys.readouterr().err


def test_a_finished_stage_of_another_config_is_refused(place, capsys):
    words = line(place, [ONE], [ONE], base=["+experiment=quickstart"], name="other")
    assert train(place, "other-1", ONE) == Exit.DONE
    assert launch.main([*words, "optim.lr=0.5"]) == Exit.RESUME_REFUSED
    assert "run 'other-1' was started with another config" in capsys.readouterr().err
    assert stages_run.current(words).run.name == "other-2"


def test_plan_prints_each_stage_and_the_sum(tmp_path, capsys):
    words = line(tmp_path, *SHORT, more=["cluster.gpus_per_node=1", "trainer.max_steps=7"])
    assert command.main(words) == Exit.DONE
    head, one, two, total = capsys.readouterr().out.splitlines()
    assert one.split()[:6] == ["plan-1", "1", "x", "1", "h100", "7"] and two.split()[7] == "3"
    assert head.split()[-1] == "GPU-hours" and total.split()[2] == "14"
    assert int(total.split()[3]) == sum(int(each.split()[6]) for each in (one, two)) > 0


def test_a_plan_needs_no_file_of_weights_and_a_run_of_stages_does(tmp_path):
    words = line(tmp_path, [f"++video.checkpoint_path={tmp_path}/absent.pth"], base=["+experiment=clip"])
    assert len(stages_run.check(stages.parse(words), with_weights=False)) == 1
    with pytest.raises(config.ConfigError, match=r"absent\.pth' does not exist"):
        stages_run.check(stages.parse(words))


@pytest.mark.slow
def test_a_plan_that_is_killed_in_its_second_stage_goes_on_there(tmp_path):
    words = line(tmp_path, *SHORT, base=["trainer.max_steps=6", "trainer.checkpoint_every=1"])
    first = start([*words, "trainer.max_steps=40"])
    end = time.monotonic() + 300
    while status(tmp_path, "plan-2")[1] < 3 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    said, _ = first.communicate(timeout=60)
    assert status(tmp_path, "plan-1") == (cells.DONE, 40) and status(tmp_path, "plan-2")[0] != cells.DONE, said
    before = os.stat(tmp_path / "runs" / "plan-1" / "run.json").st_mtime_ns
    again = start([*words, "trainer.max_steps=40"])
    said, _ = again.communicate(timeout=300)
    assert again.returncode == Exit.DONE and "stage 2 of 2: plan-2" in said and "stage 1" not in said
    assert status(tmp_path, "plan-2") == (cells.DONE, 40)
    assert os.stat(tmp_path / "runs" / "plan-1" / "run.json").st_mtime_ns == before
    (resized,) = json.loads((tmp_path / "runs" / "plan-2" / "init.json").read_text())["resized"]
    assert resized.endswith("time_positions.table: [1, 128] to [3, 128]")
    assert launch.main([*words, "trainer.max_steps=40"]) == Exit.DONE


@pytest.mark.slow
def test_two_ranks_go_through_both_stages_and_a_stop_keeps_its_exit_code(tmp_path):
    ranks = ["trainer.devices=2", "trainer.strategy=ddp"]
    words = line(tmp_path, *SHORT, more=[*ranks, "run.stop_after=1"])
    stopped = start(words)
    said, _ = stopped.communicate(timeout=300)
    assert stopped.returncode == Exit.PREEMPTED and "stage 1 of 2" in said and "stage 2" not in said, said
    done = start(words[:-1])
    said, _ = done.communicate(timeout=300)
    assert done.returncode == Exit.DONE and status(tmp_path, "plan-2") == (cells.DONE, 2), said


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["it writes its report", "it becomes the next one"])
def test_a_signal_between_two_stages_is_not_lost(tmp_path, moment):
    process = start(line(tmp_path, *SHORT, base=["trainer.max_steps=2"]))
    record = tmp_path / "runs" / "plan-1" / "run.json"

    def has_come() -> bool:
        if moment == "it becomes the next one":
            return status(tmp_path, "plan-1")[0] == cells.DONE
        return record.exists() and '"finished"' in record.read_text()

    while process.poll() is None and not has_come():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == Exit.PREEMPTED and status(tmp_path, "plan-2") == (cells.WAITING, 0), said


def test_ranks_of_a_scheduler_meet_at_another_port_in_each_stage():
    assert stages_run._meeting_point({"MASTER_PORT": "12007"}) == {"MASTER_PORT": "12008"}
    assert stages_run._meeting_point({}) == {}


def test_a_lost_rank_is_counted_in_the_stage_that_lost_it(tmp_path, capsys):
    words = line(tmp_path, *SHORT)
    (tmp_path / "runs" / "plan-1").mkdir(parents=True)
    assert requeue.main(words) == Exit.DONE
    assert (tmp_path / "runs" / "plan-1" / "lost_ranks.json").exists()


@pytest.mark.parametrize("path", sorted((config.CONF / "stages").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_plans_are_right_at_both_sizes(path, tmp_path):
    places = [f"paths.runs={tmp_path}", f"paths.data={tmp_path}"]
    for more in ([], ["+scale=tiny", *WORLD]):
        assert len(stages_run.check(stages.parse([f"stages={path}", *more, *places]))) == 2
