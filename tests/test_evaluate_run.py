"""Scoring a trained run again, and the plan that is shown without data."""

import json

import pytest
from tiny_runs import train

from vlp.training import evaluate_run, plan
from vlp.training.exits import Exit


@pytest.fixture(scope="module")
def run(place):
    """The directory of a run of two steps."""
    assert train(place, "scored") == Exit.DONE
    return place / "runs" / "scored"


def test_scores_of_the_newest_checkpoint_are_those_of_the_run(run, capsys):
    (path,) = (run / "eval").glob("step-*.world.json")
    before = json.loads(path.read_text())
    path.unlink()
    assert evaluate_run.main([f"run={run}"]) == Exit.DONE
    after = json.loads(path.read_text())
    assert [task["rows"] for task in after["tasks"].values()] == [task["rows"] for task in before["tasks"].values()]
    assert "val/world/t2v_r1" in capsys.readouterr().out


def test_one_task_alone_can_be_asked(run, capsys):
    assert evaluate_run.main([f"run={run}", "task=retrieval", "eval.batch_size=3"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "t2v_r1" in out and "temporal" not in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "run: name the run's directory"),
        (["run=nowhere"], "run=nowhere: there is no run here"),
        (["RUN", "task=retrival"], "task=retrival: the run has retrieval"),
        (["RUN", "optim.lr=1"], "optim.lr=1: an evaluation cannot change this"),
        (["RUN", "eval.batch_sise=1"], "batch_sise"),
        (["RUN", "eval.batch_size=many"], "eval.batch_size: 'many' has the wrong type"),
    ],
)
def test_mistakes_are_one_line_each_and_exit_78(run, capsys, words, line):
    words = [f"run={run}" if word == "RUN" else word for word in words]
    assert evaluate_run.main(words) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert line in error and "Traceback" not in error


def test_a_run_without_a_checkpoint_is_refused(run, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert evaluate_run.main([f"run={tmp_path}"]) == Exit.NO_VALID_CHECKPOINT
    assert "holds no valid checkpoint, but config.yaml is there" in capsys.readouterr().err


def test_plan_shows_parts_and_calls_without_data(capsys):
    assert plan.main(["+experiment=quickstart", "paths.data=/nonexistent"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "model.video_encoder" in out and "contrastive        <- video=video_embed" in out and "fusion x4" in out


def test_plan_of_a_wrong_config_is_one_line_each(capsys):
    assert plan.main(["+experiment=quickstart", "optim.freeze=[nothing_has_this_name]"]) == Exit.BAD_CONFIG
    assert "nothing_has_this_name" in capsys.readouterr().err
