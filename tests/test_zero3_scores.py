"""ZeRO-3 on two processes against one, from the command line: losses, and scores of what is exported."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import overrides

ROOT = Path(__file__).parents[1]
STEPS = 6
MORE = (f"trainer.max_steps={STEPS}", "trainer.log_every=1", f"trainer.checkpoint_every={STEPS}", "eval.every=null")
MORE += ("data.sources.world.num_test=12", "data.batch_size=8", "text.config.hidden_dropout_prob=0.0")


def python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Both runs, and the exported weights of the sharded one."""
    place = tmp_path_factory.mktemp("zero3")
    python("train.py", *overrides(place, "one", *MORE))
    sharded = [word for word in overrides(place, "zero3", *MORE) if word != "+scale=tiny"]
    sharded += ["+scale=[tiny,zero3]", "trainer.devices=2", "trainer.zero.persistent_elements=0"]
    python("train.py", *sharded)
    python("scripts/convert.py", "export", str(place / "runs/zero3"), str(place / "zero3.safetensors"))
    return place


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]


def scores(run: Path) -> dict:
    (file,) = (run / "eval").glob("step-*.world.json")
    return json.loads(file.read_text())["tasks"]


@pytest.mark.slow
def test_the_loss_curve_of_zero3_is_that_of_one_process(place):
    one, two = losses(place / "runs/one"), losses(place / "runs/zero3")
    assert len(one) == STEPS and one[0] != one[-1] and two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_what_zero3_exports_has_the_scores_of_the_run_and_of_one_process(place):
    words = overrides(place, "exported", *MORE, f"tokenizer.name={place / 'runs/zero3/tokenizer.json'}")
    python("scripts/convert.py", "run", str(place / "zero3.safetensors"), *words)
    python("evaluate.py", f"run={place / 'runs/exported'}")
    assert scores(place / "runs/exported") == scores(place / "runs/zero3") == scores(place / "runs/one")
