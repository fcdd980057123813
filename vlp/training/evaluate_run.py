"""Score a trained run again: on its own tasks, on one of them, or under changed evaluation settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlp import config
from vlp.training import environment, run_dir
from vlp.training.assemble import assemble
from vlp.training.exits import Exit, reported
from vlp.training.launch import Attempt, quiet

CHANGEABLE = ("eval.", "data.num_workers=", "data.videos=", "data.captions=", "paths.", "trainer.num_threads=")
CHANGEABLE += ("data.index_dir=", "data.cache_dir=", "data.cache_gib=")


def main(arguments: Sequence[str]) -> int:
    """Evaluate the run that the command line names; return the exit code."""
    quiet()
    return reported(lambda: _evaluate(*_parse(arguments)))


def _parse(arguments: Sequence[str]) -> tuple[Path, str | None, list[str]]:
    named = dict(word.split("=", 1) for word in arguments if word.startswith(("run=", "task=")))
    overrides = [word for word in arguments if not word.startswith(("run=", "task="))]
    messages = [
        f"{word}: an evaluation cannot change this; allowed are {', '.join(CHANGEABLE)}"
        for word in overrides
        if not word.startswith(CHANGEABLE) or "=" not in word
    ]
    if "run" not in named:
        messages.append("run: name the run's directory, for example run=runs/demo.")
    elif not (Path(named["run"]) / "config.yaml").exists():
        messages.append(f"run={named['run']}: there is no run here (no config.yaml).")
    if messages:
        raise config.ConfigError(messages)
    return Path(named["run"]), named.get("task"), overrides


def _evaluate(run: Path, task: str | None, overrides: Sequence[str]) -> int:
    cfg = DictConfig(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise config.ConfigError([str(error).splitlines()[0]]) from None
    messages = config.check(cfg)
    tasks = cfg.eval.tasks
    if task is not None and task not in tasks:
        messages.append(f"task={task}: the run has {', '.join(tasks)}.")
    if messages:
        raise config.ConfigError(messages)
    if task is not None:
        cfg.eval.tasks = {task: tasks[task]}
    alone = environment.Ranks(rank=0, world_size=1, session="evaluation", launcher=None)
    with run_dir.locked(run) as lease:
        attempt = Attempt(cfg, assemble(cfg), run, first=True, ranks=alone, lease=lease)
        scores = attempt.evaluate_only()
    _show(scores, attempt.evaluator.skipped)
    return Exit.DONE


def _show(scores: Mapping[str, float], skipped: Mapping[str, Any]) -> None:
    for name, value in scores.items():
        print(f"{name:<40} {value:8.2f}")
    for name, why in skipped.items():
        print(f"{name}: left out, {why}")
