"""What SLURM says about this process: which rank it is, and whether its job was queued again."""

import os
from typing import Any

from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig

from vlp.config import ConfigError


def in_step() -> bool:
    """Was this process started by `srun`? The shell of a job has most of SLURM's variables too, but is no rank."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def plugins(cfg: DictConfig) -> list[Any]:
    """Return the environment for the trainer: the ranks of `srun`, or this process as the only one that exists yet.

    Lightning would queue a job again by itself, with a checkpoint of its own; the batch scripts do it by exit code, so
    that is off. And it would wait for the other tasks of a job in whose shell somebody types `python train.py`.

    Raises:
        ConfigError: the config asks for another number of processes than `srun` has started.
    """
    if in_step():
        section, tasks = cfg.trainer, int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
        if isinstance(section.devices, int) and section.devices * section.num_nodes != tasks:
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
            raise ConfigError(
                [
                    f"trainer.devices: {section.devices} on trainer.num_nodes={section.num_nodes}, but srun started "
                    f"{tasks} tasks; set trainer.num_nodes={nodes} trainer.devices={tasks // nodes}."
                ]
            )
        return [SLURMEnvironment(auto_requeue=False)]
    if "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return [LightningEnvironment()]
    return []


def facts() -> dict[str, Any]:
    """Return what `run.json` keeps of the job of this attempt; nothing outside SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "slurm": {
            "job": f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"],
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        }
    }
