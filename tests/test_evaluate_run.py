"""Scoring a trained run again, and the plan that is shown without data."""

import json

import pytest
import yaml
from tiny_runs import train

from vlp import config
from vlp.eval import compare
from vlp.planning import command as plan
from vlp.training import evaluate_run
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


def test_a_run_of_an_older_vlp_gets_the_keys_that_it_did_not_know(run, tmp_path):
    kept = yaml.safe_load((run / "config.yaml").read_text())
    for section, key in (("data", "decode_timeout_s"), ("cluster", "gpu"), ("trainer", "zero")):
        del kept[section][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    cfg, _ = evaluate_run.load_config(tmp_path, None, [])
    assert cfg == evaluate_run.load_config(run, None, [])[0]
    del kept["video"]["_target_"]  # a part has no default
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(config.ConfigError, match="video"):
        evaluate_run.load_config(tmp_path, None, [])


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


def test_every_benchmark_of_conf_can_be_asked_of_a_run(run):
    given = {"lsmdc_blank": ["eval.tasks.blank.candidates=[a,b]"]}
    for name in evaluate_run.benchmarks():
        try:
            cfg, _ = evaluate_run.load_config(run, name, given.get(name, []))
        except config.ConfigError as error:
            assert "texts.answers" in str(error), (name, error)  # needs a run that was fine-tuned on a list of answers
            continue
        assert len(cfg.data.sources) == 1 and cfg.eval.tasks


def test_a_benchmark_brings_its_own_shards_and_marks_a_split_that_is_not_whole(run, capsys):
    (shard,) = (run.parent.parent / "data").rglob("test-*.tar")
    words = [f"run={run}", "task=msrvtt_1ka", f"data.sources.msrvtt_1ka.test=[{shard}]", "eval.batch_size=4"]
    assert evaluate_run.main(words) == Exit.DONE
    out = capsys.readouterr().out
    assert "val/msrvtt_1ka/t2v_r1" in out and "note, msrvtt_1ka: 6 clips, and the published split has 1000" in out
    (path,) = (run / "scores").glob("*.msrvtt_1ka.retrieval.json")
    card = json.loads(path.read_text())["card"]
    assert card["protocol"]["mark"] and card["protocol"]["frames"] == 8 and len(card["protocol"]["split_hash"]) == 64
    assert len(card["subject"]["checkpoint"]) == 64 and card["protocol"]["decoder"].startswith("PyAV")
    assert compare.main([str(path), str(next((run / "scores").glob("*.world.retrieval.json")))]) == 76


def test_a_benchmark_without_shards_is_one_line(run, capsys):
    assert evaluate_run.main([f"run={run}", "task=didemo"]) == Exit.BAD_CONFIG
    assert "didemo" in (error := capsys.readouterr().err) and "Traceback" not in error


def test_a_run_without_a_checkpoint_is_refused(run, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert evaluate_run.main([f"run={tmp_path}"]) == Exit.NO_VALID_CHECKPOINT
    assert "holds no valid checkpoint; train the run first" in capsys.readouterr().err


def test_plan_of_a_wrong_config_is_one_line_each(capsys):
    assert plan.main(["+experiment=quickstart", "optim.freeze=[nothing_has_this_name]"]) == Exit.BAD_CONFIG
    assert "nothing_has_this_name" in capsys.readouterr().err
