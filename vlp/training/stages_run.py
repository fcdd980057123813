"""Runs stages one after the other: the same command starts, continues and ends them.

    python train.py stages=FILE --every config is checked--> the first stage that is not finished, in this process
        finished, and there is another --> this process becomes a new one with the same command line
        anything else                  --> the exit code of the stage; the same command goes on there

A process that becomes a new one keeps its place below a scheduler, which warns it and asks it for its exit code; of one
stage nothing is left in the next, such as its process group.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig

from vlp import config, stages
from vlp.report import cells
from vlp.stages import Stages
from vlp.training import redact, run_dir, signals, sweep_local
from vlp.training.assemble import assemble, plain, without_weights
from vlp.training.exits import Exit, StopRun

_PASSED = "VLP_STAGES_DONE"  # how many stages this command has finished: other ranks end before the record says so


def main(words: Sequence[str], train: Callable[[Callable[[], DictConfig]], int]) -> int:
    """Run what is left of the stages and return the exit code; `train` runs one config.

    Raises:
        config.ConfigError: findings in any stage; nothing was started then.
        StopRun: a finished stage was run with another config.
    """
    environment = dict(os.environ)  # before a launcher of ranks writes into it
    plan = stages.parse(words)
    _refuse_elastic(environment)
    configs = check(plan)
    number = max(int(environment.get(_PASSED, "0")), first_waiting(configs))
    if number >= len(configs):
        print(f"all {len(configs)} stages of '{plan.name}' are finished.")
        return Exit.DONE
    print(f"stage {number + 1} of {len(configs)}: {plan.stages[number].name}", flush=True)
    code = train(lambda: configs[number])
    if code != Exit.DONE or number + 1 == len(configs):
        return code
    with signals.held():  # one that comes from here on waits until the new process listens
        if (name := signals.told()) is not None:
            raise StopRun(Exit.PREEMPTED, f"stopped by {name} before stage {number + 2}.")
        if not _has_a_launcher_of_ours(environment):
            _become_next(words, {**environment, **_meeting_point(environment), _PASSED: str(number + 1)})
    return code


def check(plan: Stages, *, with_weights: bool = True) -> list[DictConfig]:
    """Return the configs of all stages, composed, checked, and put together without memory for their weights.

    Args:
        with_weights: look for the files of published weights that parts read.

    Raises:
        config.ConfigError: all findings, each with its stage.
    """
    messages, configs, runs = [], list[DictConfig](), "runs"
    for number, stage in enumerate(plan.stages):
        try:
            cfg = config.load(stages.starting(plan, number, runs))
            runs = cfg.paths.runs
            with torch.device("meta"):
                assemble(cfg if with_weights else without_weights(cfg))
            configs.append(cfg)
        except config.ConfigError as error:
            messages += [f"{message} (in {stage.name})" for message in error.messages]
    if messages:
        raise config.ConfigError(messages)
    return configs


def first_waiting(configs: Sequence[DictConfig]) -> int:
    """Return which stage is next; a finished one is compared with its config.

    Raises:
        StopRun: it was run with another config (exit 76).
    """
    for number, cfg in enumerate(configs):
        runs = Path(cfg.paths.runs)
        status, _, _, record = cells.state(runs, cfg.run.name)
        if status != cells.DONE or record.step < cfg.trainer.max_steps:
            return number
        run_dir.changes(runs / cfg.run.name, redact.tree(plain(cfg)), allow=list(cfg.run.allow))
    return len(configs)


def current(words: Sequence[str]) -> DictConfig:
    """Return the config of the stage that a command line would go on with, or of the last one."""
    configs = check(stages.parse(words))
    return configs[min(first_waiting(configs), len(configs) - 1)]


def _refuse_elastic(environment: Mapping[str, str]) -> None:
    """The store at which torchrun's ranks meet keeps what the stage before has written."""
    if "TORCHELASTIC_RUN_ID" in environment:
        message = (
            "stages: ranks that torchrun started meet once only; use trainer.devices=N, srun, or a stage at a time."
        )
        raise config.ConfigError([message])


def _has_a_launcher_of_ours(environment: Mapping[str, str]) -> bool:
    """Was this rank started by the first one, which will start others for the next stage?"""
    return "LOCAL_RANK" in environment and not {"RANK", "SLURM_PROCID"} & environment.keys()


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the port of the next stage: at that of this one, the first rank may still be when others come back."""
    port = environment.get("MASTER_PORT")
    return {} if port is None else {"MASTER_PORT": str(int(port) + 1)}


def _become_next(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # ports among them; threads of gloo still use theirs
        if descriptor > 2:
            with suppress(OSError):  # that of the listing itself
                os.set_inheritable(descriptor, False)
    os.execve(sys.executable, [sys.executable, str(sweep_local.ROOT / "train.py"), *words], dict(environment))
