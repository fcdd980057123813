"""Facts about the machine and the software, for the start-up summary and for the report."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from vlp.layers.attention import kernel_name

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

    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


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
