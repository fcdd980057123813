"""Runs and sweeps on a real SLURM of two nodes: ranks that meet, warnings, queueing again, and cancelling."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import slurm_cluster
import slurm_preemptions
import torch
import yaml
from tiny_runs import overrides, train, weights

from vlp import config, sweep
from vlp.config import ConfigError
from vlp.report import cells
from vlp.training import cluster, requeue, sweep_slurm
from vlp.training.exits import Exit

ROOT = Path(__file__).parents[1]
WHY = slurm_cluster.missing()
needs_slurm = pytest.mark.skipif(bool(WHY), reason=WHY)
SHORT = ("objective=[contrastive]", "eval.tasks={}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[slurm_cluster.Cluster]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("s") / "c") as found:
        found.environment.update(VLP_PYTHON=sys.executable, VLP_ROOT=str(ROOT), PYTHONPATH=str(ROOT))
        yield found


@contextmanager
def started(*words: str, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process that does not outlive its test."""
    line = [sys.executable, *words]
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def record(directory: Path) -> dict:
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def steps(directory: Path) -> list[int]:
    with (directory / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def step_of(directory: Path) -> int:
    return cells.progress(directory.parent, directory.name)[0]


def same_weights(place: Path, name: str, other: str, step: int) -> bool:
    expected, actual = weights(place, name, step), weights(place, other, step)
    return all(torch.equal(expected[key], actual[key]) for key in expected.keys() | actual.keys())


@pytest.mark.slow
@needs_slurm
def test_sweep_with_a_preemption_in_the_middle_loses_and_repeats_nothing(slurm, place):
    more = (*SHORT, "trainer.max_steps=80", "data.batch_size=16", "logger=[tensorboard]")
    words = [*overrides(place, "sweep", *more), "-m", "run.seed=0,1,2", "hydra/launcher=slurm"]
    words += ["hydra.launcher.partition=low", "hydra.launcher.array_parallelism=1", "hydra.launcher.poll_s=0.5"]
    directory = place / "runs" / "sweep"
    names = [f"seed={seed}" for seed in (0, 1, 2)]
    with started("train.py", *words, environment=slurm.environment) as process:
        slurm.wait(lambda: step_of(directory / names[0]) >= 2)
        slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        said, _ = process.communicate(timeout=600)
    assert process.returncode == Exit.DONE and "3 done" in said, said
    assert [record(directory / name)["slurm"]["restarts"] for name in names] == [1, 0, 0]
    assert all(steps(directory / name) == list(range(1, 81)) for name in names)
    assert (directory / "report.html").exists()
    assert len(list((directory / "seed=0").rglob("events.*"))) >= 2  # both attempts, in one tracker run
    assert train(place, "unbroken", *more, "run.seed=0") == Exit.DONE
    assert same_weights(place, "unbroken", "sweep/seed=0", 80)


@pytest.mark.slow
@needs_slurm
def test_cancelled_run_on_two_nodes_saves_and_continues_only_when_asked(slurm, place):
    words = ["--nodes=2", "--ntasks-per-node=1", f"--output={place}/two.log", f"--chdir={ROOT}"]
    words += [str(ROOT / "scripts/slurm/run.sbatch"), *overrides(place, "two_nodes", "eval.tasks={}")]
    directory = place / "runs" / "two_nodes"
    job = slurm.submit(*words, "trainer.max_steps=100000")
    slurm.wait(lambda: step_of(directory) >= 2)
    slurm.command("scancel", job)
    slurm.wait(slurm.is_empty)
    stopped = record(directory)
    assert (stopped["status"], stopped["slurm"]["nodes"]) == ("preempted", "n[1-2]")
    assert slurm.job(job)["JobState"] == "CANCELLED" and slurm.job(job)["Restarts"] == "0"
    slurm.submit(*words, f"trainer.max_steps={stopped['step'] + 2}")
    slurm.wait(slurm.is_empty)
    assert (record(directory)["status"], record(directory)["attempts"]) == ("finished", 2)
    assert steps(directory) == list(range(1, stopped["step"] + 3))


@pytest.mark.slow
@needs_slurm
def test_stages_that_are_preempted_in_the_second_go_on_there_and_repeat_nothing(slurm, place):
    own = [[*SHORT, f"trainer.max_steps={steps}"] for steps in (3, 60)]
    path = place / "staged.yaml"
    path.write_text(yaml.safe_dump({"base": ["+experiment=quickstart"], "stages": own}))
    words = ["--partition=low", "--nodes=2", "--ntasks-per-node=1", f"--output={place}/staged.log", f"--chdir={ROOT}"]
    more = [f"stages={path}", *overrides(place, "staged")[1:]]
    slurm.submit(*words, str(ROOT / "scripts/slurm/run.sbatch"), *more)
    first, second = (place / "runs" / f"staged-{number}" for number in (1, 2))
    slurm.wait(lambda: step_of(second) >= 2)
    before = (first / "run.json").read_bytes()
    slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.wait(slurm.is_empty)
    ended = record(second)
    assert (ended["status"], ended["attempts"], ended["slurm"]["restarts"]) == ("finished", 2, 1)
    assert (steps(first), steps(second)) == (list(range(1, 4)), list(range(1, 61)))
    assert (first / "run.json").read_bytes() == before and record(first)["slurm"]["restarts"] == 0


@pytest.mark.slow
@needs_slurm
def test_warned_preemption_loses_no_step(tmp_path):
    count = slurm_preemptions.run(tmp_path, preemptions=1, seed=3)
    assert (count.restarts, count.lost, count.missing) == (1, 0, 0)


def test_lost_ranks_are_queued_again_but_not_for_ever_at_one_step(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"step": 7}))
    assert [requeue.decide(tmp_path)[0] for _ in range(3)] == [True, True, False]
    (tmp_path / "run.json").write_text(json.dumps({"step": 8}))
    assert requeue.decide(tmp_path) == (True, "the ranks lost each other after step 8, for the first time there.")


@pytest.mark.parametrize(
    "word",
    [
        "partition=$(id)",
        "partition='a b'",
        "nodes=0",
        "nodes=two",
        "wait=3",
        "gpus_per_nod=1",
        "account=-x",
        "qos='a\nb'",
    ],
)
def test_values_that_are_none_of_the_cluster_are_refused(word):
    asked = sweep.parse(["-m", "run.seed=0,1", "hydra/launcher=slurm", f"hydra.launcher.{word}"])
    with pytest.raises(ConfigError, match=f"hydra.launcher.{word.partition('=')[0]}"):
        sweep_slurm.launcher(asked)


def test_launcher_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="there are local, slurm"):
        sweep_slurm.launcher(sweep.parse(["-m", "run.seed=0,1", "hydra/launcher=slrum"]))


def test_batch_command_is_words_and_no_shell(tmp_path):
    asked = sweep.parse(["-m", "run.seed=0,1", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"])
    settings = sweep_slurm.launcher(asked)
    assert settings is not None
    words = sweep_slurm.sbatch_command(settings, tmp_path / "_jobs" / "001", "name", 2)
    assert {"--array=0-1%16", "--partition=gpu", "--signal=USR1@180", "--time=1440"} <= set(words)
    assert not [word for word in words if word.startswith("--gpus") or "None" in word]


def test_shell_inside_a_job_is_no_rank(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)

    (plugin,) = cluster.plugins(config.load(["+experiment=quickstart"]))
    assert type(plugin).__name__ == "LightningEnvironment"


def test_number_of_tasks_that_the_config_does_not_expect_costs_a_line(monkeypatch):

    for name, value in {"STEP_ID": "0", "PROCID": "0", "STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ConfigError, match=r"set trainer.num_nodes=2 trainer.devices=2"):
        cluster.plugins(config.load(["+experiment=quickstart"]))


def test_ranks_of_srun_do_not_queue_themselves_again(monkeypatch):

    for name, value in {"STEP_ID": "0", "PROCID": "1", "STEP_NUM_TASKS": "2", "JOB_ID": "9"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (plugin,) = cluster.plugins(config.load(["+experiment=quickstart", "trainer.devices=2"]))
    assert type(plugin).__name__ == "SLURMEnvironment" and not plugin.auto_requeue
