"""What a config would train, built without memory: every parameter on the meta device.

Axes: B clips of a micro-batch, T frames, L text length.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from vlp import config
from vlp.layers.block import blocks_of, checkpoint_blocks
from vlp.planning.kernels import Kernels
from vlp.training import optim
from vlp.training.assemble import System, assemble, wanted, without_weights
from vlp.training.prepare import Fitted
from vlp.types import Batch

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}


class Traced(NamedTuple):
    """The parts of a system that a trace uses."""

    model: Any
    objectives: dict[str, nn.Module]
    wirings: Any
    weights: dict[str, float]
    graph: Any
    wanted: list[str]


class Planned(NamedTuple):
    """A system on the meta device, with the freezing and the precision of its config."""

    cfg: DictConfig
    system: Traced
    module: nn.Module  # the whole of what is trained, with the parameter names of a run
    dropped: dict[str, int]  # parts that no objective uses, with their parameters
    half: torch.dtype | None  # of autocast


def build(cfg: DictConfig, *, half_weights: bool = False, checkpointed: bool | None = None) -> Planned:
    """Assemble a config on the meta device; no file of weights is read.

    Args:
        half_weights: keep the weights in bfloat16 whatever trainer.precision says.
        checkpointed: recompute activations; by the config where not given.

    Raises:
        config.ConfigError: as `assemble` does, and a pattern of optim.freeze that matches nothing.
    """
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # of parts that miss their weights
        made: System = assemble(without_weights(cfg))
    for part in [part for root in (made.model, *made.objectives.values()) for part in root.modules()]:
        if isinstance(part, Fitted):
            part.fitted = torch.ones((), dtype=torch.bool)  # as it would be before the first step
    half = HALF.get(cfg.trainer.precision)
    if cfg.trainer.checkpoint_activations if checkpointed is None else checkpointed:
        for block in blocks_of(made.model):  # the backward pass calls them again, outside of the trace's own mode
            block.forward = partial(_with_kernels, block.forward, half)
        checkpoint_blocks(made.model)
    module = nn.ModuleDict({"model": made.model, "objectives": nn.ModuleDict(made.objectives)})
    try:
        optim.freeze(module, cfg.optim.freeze)
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None
    true_half = half_weights or cfg.trainer.precision == "bf16-true"
    if true_half:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    traced = Traced(made.model, made.objectives, made.wirings, made.weights, made.graph, wanted(made.wirings))
    return Planned(cfg, traced, module.train(), made.dropped, half)


def _with_kernels(forward: Callable, half: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    with Kernels(half):
        return forward(*args, **kwargs)


def batch_of(cfg: DictConfig, num_clips: int) -> Batch:
    """Return a micro-batch of full clips and all their texts, full; frames on the meta device, all else real."""
    clip, length = cfg.clip, cfg.tokenizer.max_length
    shape = (num_clips, clip.num_frames)
    text_ids = torch.full((num_clips, length), cfg.tokenizer.eos_id)
    word_ids = torch.arange(length).expand(num_clips, length).clone()
    word_ids[:, [0, -1]] = -1
    numbers = torch.arange(num_clips)
    more = (num_clips, clip.more_clips, clip.num_frames)
    more_ids = text_ids[:, None].repeat(1, config.build(cfg.texts, "texts").num_others, 1)
    others = {
        "more_frames": torch.zeros((*more, clip.size, clip.width, 3), dtype=torch.uint8, device="meta"),
        "more_frame_mask": torch.ones(more, dtype=torch.bool),
        "more_ids": more_ids,
        "more_mask": torch.ones_like(more_ids, dtype=torch.bool),
        "label": torch.zeros(num_clips, dtype=torch.int64),
    }
    return Batch(
        frames=torch.zeros((*shape, clip.size, clip.width, 3), dtype=torch.uint8, device="meta"),
        frame_mask=torch.ones(shape, dtype=torch.bool),
        times_s=torch.zeros(shape),
        text_ids=text_ids,
        text_mask=torch.ones_like(text_ids, dtype=torch.bool),
        word_ids=word_ids,
        **others,
        valid=torch.ones(num_clips, dtype=torch.bool),
        status=torch.zeros(num_clips, dtype=torch.int64),
        sample_id=numbers,
        key=numbers * 7919 + 1,
    )
