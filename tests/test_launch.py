"""Whole runs in small: fresh, stopped, continued, refused, failed; each ends with its code and a line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import overrides, train, weights

from vlp.layers.block import Block
from vlp.training import launch, run_dir
from vlp.training.exits import Exit

ONE = "objective=[contrastive]"
# No dropout; updates in proportion to the gradient, because Adam's first steps are its sign, whatever its size.
PLAIN = ("text.config.hidden_dropout_prob=0.0", "optim.eps=1.0", "optim.lr=1.0", "schedule.warmup_steps=0")


def command(*words: str) -> subprocess.CompletedProcess:
    """Run train.py as a user does."""
    root = Path(__file__).parents[1]
    line = [sys.executable, "train.py", *words]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300)


def test_run_leaves_report_checkpoint_scores_and_metrics(place):
    assert train(place, "whole") == Exit.DONE
    run = place / "runs" / "whole"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"], record["exit_code"]) == ("finished", 2, 0)
    assert {"report.html", "graph.json", "metrics.csv", "config.yaml", "tokenizer.json"} <= set(os.listdir(run))
    assert record["sources"][0]["seen"] == 8
    assert list((run / "eval").glob("*.json"))


@pytest.mark.parametrize("bucket_steps", [1, 3])
def test_stopped_run_continues_bit_for_bit(place, bucket_steps):
    more = ("trainer.max_steps=4", f"data.bucket_steps={bucket_steps}")
    straight, broken = f"straight{bucket_steps}", f"broken{bucket_steps}"
    assert train(place, straight, *more) == Exit.DONE
    assert train(place, broken, *more, "run.stop_after=1") == Exit.PREEMPTED
    assert train(place, broken, *more, "run.stop_after=2") == Exit.PREEMPTED
    assert train(place, broken, *more) == Exit.DONE
    expected, actual = weights(place, straight, 4), weights(place, broken, 4)
    assert all(torch.equal(expected[name], actual[name]) for name in expected.keys() | actual.keys())


def test_evaluation_in_the_loop_is_written_and_logged_and_changes_no_step(place):
    more = (ONE, "trainer.max_steps=3")
    assert train(place, "eval_end", *more) == train(place, "eval_often", *more, "eval.every=1") == Exit.DONE
    run = place / "runs" / "eval_often"
    assert sorted(path.name for path in (run / "eval").glob("step-*.world.json")) == [
        f"step-{step:06d}.world.json" for step in (1, 2, 3)
    ]
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    place_of = header.split(",").index("val/world/t2v_r1")
    assert sum(bool(row.split(",")[place_of]) for row in rows) == 3
    expected, actual = weights(place, "eval_end", 3), weights(place, "eval_often", 3)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_finished_run_started_again_trains_nothing(place, capsys):
    assert train(place, "twice", ONE) == Exit.DONE
    before = (place / "runs" / "twice" / "metrics.csv").read_text()
    assert train(place, "twice", ONE) == Exit.DONE
    assert "already reached step 2" in capsys.readouterr().out
    assert (place / "runs" / "twice" / "metrics.csv").read_text() == before


def test_changed_config_is_refused_with_the_difference(place, capsys):
    assert train(place, "changed", ONE, "run.stop_after=1") == Exit.PREEMPTED
    assert train(place, "changed", ONE, "optim.lr=0.5") == Exit.RESUME_REFUSED
    error = capsys.readouterr().err
    assert "optim.lr: was 0.001, is 0.5" in error
    assert "Traceback" not in error


def test_run_directory_in_use_is_refused(place):
    directory = place / "runs" / "locked"
    run_dir.create(directory)
    with run_dir.locked(directory):
        done = command(*overrides(place, "locked", ONE))
    assert done.returncode == Exit.LOCKED
    assert f"process {os.getpid()}" in done.stderr


def test_unwritable_run_directory_is_refused(place, capsys):
    (place / "file").write_text("")
    assert train(place, "x", ONE, f"paths.runs={place / 'file'}") == Exit.CANNOT_CREATE
    assert "cannot be written" in capsys.readouterr().err


def test_mistakes_are_listed_together_without_traceback(place):
    wrong = ["trainer.max_stpes=3", "clip.size=big", "objective=[contrastive,matchin]", "optim.weight_decay=null"]
    done = command(*overrides(place, "wrong", *wrong))
    assert done.returncode == Exit.BAD_CONFIG
    assert all(word in done.stderr for word in ("max_steps", "clip.size", "matching", "optim.weight_decay"))
    assert "Traceback" not in done.stderr
    assert not (place / "runs" / "wrong").exists()


def test_parts_that_only_the_first_batch_shows_to_disagree_cost_a_line(place, capsys):
    more = ("connector=null", "eval.tasks.retrieval=null", "eval.tasks.temporal_probe=null")
    assert train(place, "no_prefix", *more) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert "needs a class token" in error and "Traceback" not in error


def test_a_value_error_that_no_part_of_ours_raised_is_a_bug(place, capsys, monkeypatch):
    monkeypatch.setattr(launch.Pretraining, "sum_counts", lambda *_: int("no number"))
    assert train(place, "bug", ONE) == Exit.BUG
    assert "Traceback" in capsys.readouterr().err


def test_too_few_samples_for_a_batch_is_a_config_error(place, capsys):
    assert train(place, "few", ONE, "data.batch_size=64") == Exit.BAD_CONFIG
    assert "16" in capsys.readouterr().err


def test_non_finite_gradient_stops_with_its_samples_written_down(place, capsys):
    code = train(place, "not_finite", ONE, "objective.contrastive.weight=nan")
    assert code == Exit.NON_FINITE
    note = json.loads((place / "runs" / "not_finite" / "bad_steps.jsonl").read_text())
    assert note["step"] == 0 and note["samples"][0]["key"].startswith("train-") and "contrastive" in note["terms"][0]
    assert json.loads((place / "runs" / "not_finite" / "run.json").read_text())["status"] == "failed"


def test_non_finite_gradient_is_skipped_by_policy_and_moves_nothing(place):
    more = (ONE, "objective.contrastive.weight=nan", "trainer.nan_policy=skip")
    assert train(place, "skip", *more) == Exit.DONE
    assert all(value.isfinite().all() for value in weights(place, "skip", 2).values())


DROPPED = ["contrastive", "matching", "masked_words", "masked_visual", "captioning", "temporal_order"]


@pytest.mark.parametrize("dropped", DROPPED)
def test_run_trains_without_any_one_objective(place, dropped):
    assert train(place, f"without_{dropped}", f"objective.{dropped}=null", "trainer.max_steps=1") == Exit.DONE


def test_micro_batches_give_the_step_of_the_whole_batch(place):
    more = ("objective=[captioning]", *PLAIN, "trainer.max_steps=1")
    assert train(place, "whole_batch", *more) == train(place, "micro", *more, "trainer.accumulate=2") == Exit.DONE
    expected, actual = weights(place, "whole_batch", 1), weights(place, "micro", 1)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_processes_give_the_steps_of_one(place):
    more = (*PLAIN, "trainer.max_steps=2")
    assert train(place, "one", *more) == Exit.DONE
    words = overrides(place, "two", "+scale=[tiny,ddp]", "trainer.devices=2", *more)
    done = command(*(word for word in words if word != "+scale=tiny"))
    assert done.returncode == Exit.DONE, done.stderr[-2000:]
    expected, actual = weights(place, "one", 2), weights(place, "two", 2)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("switch", ["trainer.precision=bf16-mixed", "optim.ema_decay=0.9"])
def test_switches_of_the_step_work(place, switch):
    name = switch.partition("=")[0].replace(".", "_")
    assert train(place, name, ONE, switch, "trainer.max_steps=1") == Exit.DONE


def test_recomputed_activations_change_no_weight_and_every_block_runs_twice(place, monkeypatch):
    more, calls = (ONE, "trainer.max_steps=1"), []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(self.training) or forward(self, *args))
    assert train(place, "kept", *more) == Exit.DONE
    assert sum(calls) == 2
    assert train(place, "recomputed", *more, "trainer.checkpoint_activations=true") == Exit.DONE
    assert sum(calls) == 2 + 4
    expected, actual = weights(place, "kept", 1), weights(place, "recomputed", 1)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler (g++)")
def test_compiled_blocks_give_the_steps_of_eager_ones(place, monkeypatch):
    more, compiled = (ONE, *PLAIN, "trainer.max_steps=1"), []
    compile_block = Block.compile
    monkeypatch.setattr(Block, "compile", lambda self: compiled.append(self) or compile_block(self))
    assert train(place, "eager", *more) == train(place, "compiled", *more, "trainer.compile=true") == Exit.DONE
    assert len(compiled) == 2
    expected, actual = weights(place, "eager", 1), weights(place, "compiled", 1)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)
