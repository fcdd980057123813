"""Facts about the machine and the software, for the start-up summary and for the report."""

import hashlib
import os
import platform
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from vlp.layers.attention import kernel_name
from vlp.training import redact

_PACKAGES = (
    "vlp",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "deepspeed",
    "timm",
    "transformers",
    "av",
    "flash-attn",
)


def is_first_process() -> bool:
    """Is this the process that owns the run directory? Launchers and SLURM say so before any group exists."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


class Ranks(NamedTuple):
    """This process among those that train together, as its launcher has told it: before any group exists."""

    rank: int
    world_size: int
    session: str  # the same on all ranks of an attempt, another for each attempt
    launcher: int | None  # the process that started this rank and that it must not outlive


def ranks(*, devices: int | str, num_nodes: int) -> Ranks:
    """Return what is known; if this process will start the others, they find the session in its environment."""
    per_node = _num_devices(devices)
    local = int(os.environ.get("LOCAL_RANK", 0))
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", node * per_node + local)))
    world_size = per_node * num_nodes
    is_started = any(name in os.environ for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")) and world_size > 1
    if not is_started:
        session = uuid.uuid4().hex[:12] if num_nodes == 1 else _session(num_nodes)
        if world_size > 1:
            os.environ["VLP_SESSION"] = session
        return Ranks(rank, world_size, session, None)
    return Ranks(rank, world_size, os.environ.get("VLP_SESSION") or _session(num_nodes), os.getppid())


def end_of_job() -> float | None:
    """Return the time, by `time.time()`, at which the scheduler will end this job; None if it has not said so."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def _session(num_nodes: int) -> str:
    """Name an attempt by what a launcher gives all of its ranks."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    names += ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    parts = [os.environ.get(name, "") for name in names]
    if num_nodes == 1:
        parts.append(str(os.getppid()))  # one launcher: ports and ids may come again
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _num_devices(devices: int | str) -> int:
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(text)


def facts() -> dict[str, str]:
    """Return versions, device and kernels as readable strings."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)"
    values = {
        "device": device,
        "attention": kernel_name(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": str(torch.version.cuda) if cuda else "not used",
    }
    for package in _PACKAGES:
        try:
            values[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            values[package] = "not installed"
    return values | {"commit": _commit()}


def command() -> str:
    """Return the command line that started this process, ready to be pasted."""
    import shlex

    return redact.text(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))


def _commit() -> str:
    root = Path(__file__).parents[2]
    try:
        text = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return text.stdout.strip()
