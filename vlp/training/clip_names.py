"""Names of CLIP's parts here, at Hugging Face and in open_clip, in one table for both directions.

In a name `#` stands for a number, `?` for one letter or digit, and a `*` at the end for the rest; they are the same on
both sides.

Axes: D width, E embedding, S patches.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from einops import rearrange
from torch import Tensor

_PLACES = {r"\#": r"(\d+)", r"\?": r"([a-z0-9])", r"\*": "(.*)"}


class Rule(NamedTuple):
    """What becomes of the tensors whose whole name matches `pattern`."""

    pattern: str
    name: str | None  # with \\1 for groups; None leaves them out
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reason: str = ""  # why they are left out


class Pair(NamedTuple):
    """Two names of one tensor, and how each side gets it from the other."""

    ours: str  # below "model."
    theirs: str
    give: Callable[[Tensor], Tensor] = lambda tensor: tensor
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor


def taking(pairs: Iterable[Pair]) -> tuple[Rule, ...]:
    """Return the rules from their names to ours."""
    return tuple(Rule(_pattern(pair.theirs), _template(f"model.{pair.ours}"), pair.take) for pair in pairs)


def giving(pairs: Iterable[Pair]) -> tuple[Rule, ...]:
    """Return the rules from our names, without "model.", to theirs."""
    return tuple(Rule(_pattern(pair.ours), _template(pair.theirs), pair.give) for pair in pairs)


def _pattern(name: str) -> str:
    text = re.escape(name)
    for place, group in _PLACES.items():
        text = text.replace(place, group)
    return text


def _template(name: str) -> str:
    for number in range(1, len(re.findall(r"[#?*]", name)) + 1):
        name = re.sub(r"[#?*]", rf"\\{number}", name, count=1)
    return name


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _token(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, 1, -1)


def table(tensor: Tensor) -> Tensor:
    """Return one row a place, without leading axes of one."""
    return tensor.reshape(-1, tensor.shape[-1])


def _batched(tensor: Tensor) -> Tensor:
    return table(tensor)[None]


def _turned(tensor: Tensor) -> Tensor:
    return rearrange(tensor, "d e -> e d")


def _number(tensor: Tensor) -> Tensor:
    return tensor.reshape(())


def _one(tensor: Tensor) -> Tensor:
    return tensor.reshape(1)


_VIDEO, _HF_VIDEO = "video_encoder.blocks.#.block", "vision_model.encoder.layers.#"

HUGGING_FACE = (
    Pair("video_encoder.cls_token", "vision_model.embeddings.class_embedding", _flat, _token),
    Pair("video_encoder.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    Pair("video_encoder.pos_embed", "vision_model.embeddings.position_embedding.weight", table, _batched),
    Pair("video_encoder.norm_pre.*", "vision_model.pre_layrnorm.*"),
    Pair("video_encoder.norm.*", "vision_model.post_layernorm.*"),
    Pair(f"{_VIDEO}.attn.qkv.*", f"{_HF_VIDEO}.self_attn.qkv.*"),  # there three layers
    Pair(f"{_VIDEO}.attn.proj.*", f"{_HF_VIDEO}.self_attn.out_proj.*"),
    Pair(f"{_VIDEO}.norm?.*", f"{_HF_VIDEO}.layer_norm?.*"),
    Pair(f"{_VIDEO}.mlp.*", f"{_HF_VIDEO}.mlp.*"),
    Pair("text_encoder.model.*", "text_model.*"),
    Pair("video_projection.weight", "visual_projection.weight"),
    Pair("text_projection.weight", "text_projection.weight"),
    Pair("temperature.value", "logit_scale", _number, _one),
)

_OPEN_VIDEO = "visual.transformer.resblocks.#"
_TEXT, _OPEN_TEXT = "text_encoder.model.encoder.layers.#", "transformer.resblocks.#"

OPEN_CLIP = (
    Pair("video_encoder.cls_token", "visual.class_embedding", _flat, _token),
    Pair("video_encoder.patch_embed.proj.weight", "visual.conv1.weight"),
    Pair("video_encoder.pos_embed", "visual.positional_embedding", table, _batched),
    Pair("video_encoder.norm_pre.*", "visual.ln_pre.*"),
    Pair("video_encoder.norm.*", "visual.ln_post.*"),
    Pair("video_projection.weight", "visual.proj", _turned, _turned),
    Pair(f"{_VIDEO}.attn.qkv.*", f"{_OPEN_VIDEO}.attn.in_proj_*"),
    Pair(f"{_VIDEO}.attn.proj.*", f"{_OPEN_VIDEO}.attn.out_proj.*"),
    Pair(f"{_VIDEO}.norm?.*", f"{_OPEN_VIDEO}.ln_?.*"),
    Pair(f"{_VIDEO}.mlp.fc1.*", f"{_OPEN_VIDEO}.mlp.c_fc.*"),
    Pair(f"{_VIDEO}.mlp.fc2.*", f"{_OPEN_VIDEO}.mlp.c_proj.*"),
    Pair("text_encoder.model.embeddings.token_embedding.weight", "token_embedding.weight"),
    Pair("text_encoder.model.embeddings.position_embedding.weight", "positional_embedding"),
    Pair(f"{_TEXT}.self_attn.?_proj.*", f"{_OPEN_TEXT}.attn.?_proj.*"),  # there one layer
    Pair(f"{_TEXT}.self_attn.out_proj.*", f"{_OPEN_TEXT}.attn.out_proj.*"),
    Pair(f"{_TEXT}.layer_norm?.*", f"{_OPEN_TEXT}.ln_?.*"),
    Pair(f"{_TEXT}.mlp.fc1.*", f"{_OPEN_TEXT}.mlp.c_fc.*"),
    Pair(f"{_TEXT}.mlp.fc2.*", f"{_OPEN_TEXT}.mlp.c_proj.*"),
    Pair("text_encoder.model.final_layer_norm.*", "ln_final.*"),
    Pair("text_projection.weight", "text_projection", _turned, _turned),
    Pair("temperature.value", "logit_scale", _number, _one),
)
