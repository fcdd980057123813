"""What is trained, how fast, and for how long: parameter groups, freezing, layer decay, schedules.

Parameter names are those of the whole trained module: `model.video_encoder...`, `objectives.matching.head...`.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

# The stack that a layer belongs to, and its number; Hugging Face keeps layers one level deeper than the embeddings.
_LAYER = re.compile(r"^(.*?)(?:\.encoder|\.transformer)?\.(?:blocks|layers|layer|stages)\.(\d+)\.")
_BELOW_LAYERS = re.compile(r"embed|token|position|words|norm_pre|stem")


class Cosine:
    """Warm up linearly, then fall to `final_factor` along half a cosine. Source: arXiv:1608.03983, eq. 5."""

    def __init__(self, *, warmup_steps: int = 0, final_factor: float = 0.0) -> None:
        self.warmup_steps, self.final_factor = warmup_steps, final_factor

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor of the learning rate in optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Linear:
    """Warm up linearly, then fall to `final_factor` in a straight line."""

    def __init__(self, *, warmup_steps: int = 0, final_factor: float = 0.0) -> None:
        self.warmup_steps, self.final_factor = warmup_steps, final_factor

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor of the learning rate in optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return 1 - (1 - self.final_factor) * min(1.0, progress)


class Constant:
    """Warm up linearly, then stay."""

    def __init__(self, *, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor of the learning rate in optimizer step `step`, from 0."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


class Setting(NamedTuple):
    """How one parameter is trained."""

    name: str
    parameter: nn.Parameter
    lr_factor: float
    decay: bool


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop the training of parameters by name pattern (`*` matches anything); a leading `!` makes an exception.

    Returns:
        the names of the frozen parameters.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    names = [name for name, _ in module.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not matched:
            raise ValueError(
                f"optim.freeze: '{pattern}' matches no parameter; names look like {', '.join(names[:3])}, ..."
            )
        frozen = frozen - matched if pattern.startswith("!") else frozen | matched
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sorted(frozen)


def settings(module: nn.Module, *, layer_decay: float | None, lr_factors: Mapping[str, float]) -> list[Setting]:
    """Return the setting of every trainable parameter.

    Norms, biases, temperatures and other vectors get no weight decay. Layer decay multiplies the rate by
    `layer_decay ** (layers above)` inside each stack of layers. Source: arXiv:2106.08254, appendix.

    Raises:
        ValueError: a pattern of `lr_factors` that matches nothing; nothing to train.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in lr_factors:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"optim.lr_factors: '{pattern}' matches no parameter; names look like {names[0]}, ...")
    depths = _depths(names)
    result = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = math.prod(value for pattern, value in lr_factors.items() if fnmatch.fnmatch(name, pattern))
        if layer_decay is not None:
            factor *= layer_decay ** _layers_above(name, depths)
        result.append(Setting(name, parameter, factor, parameter.ndim > 1))
    if not result:
        raise ValueError("optim.freeze: every parameter is frozen; leave something to train.")
    return result


def adamw(
    chosen: Iterable[Setting], *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with one group for each (rate, decay); each group carries the `names` of its parameters.

    Source: arXiv:1711.05101.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter, factor, decay in chosen:
        group = groups.setdefault((factor, decay), {"params": [], "names": [], "lr_factor": factor})
        group["params"].append(parameter)
        group["names"].append(name)
        group["lr"] = group["base_lr"] = lr * factor
        group["weight_decay"] = weight_decay if decay else 0.0
    return torch.optim.AdamW(list(groups.values()), betas=(float(betas[0]), float(betas[1])), eps=eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of each group to its base rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def audit(module: nn.Module) -> str:
    """Return a table of the parameters and the trainable parameters of each part, every parameter in one row."""
    parts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        counts = parts.setdefault(".".join(name.split(".")[:2]), [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
    rows = [f"{part:<34} {total:>14,} {trainable:>14,}" for part, (total, trainable) in parts.items()]
    return "\n".join([f"{'part':<34} {'parameters':>14} {'trainable':>14}", *rows])


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Number of layers below each `prefix` of "prefix.blocks.N."."""
    depths: dict[str, int] = {}
    for name in names:
        match = _LAYER.match(name)
        if match:
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def _layers_above(name: str, depths: Mapping[str, int]) -> int:
    match = _LAYER.match(name)
    if match:
        return depths[match[1]] - int(match[2])
    for prefix, depth in depths.items():
        if name.startswith(f"{prefix}.") and _BELOW_LAYERS.search(name.removeprefix(prefix)):
            return depth + 1
    return 0
