"""Two towers in the layouts of CLIP that others read: transformers' CLIPModel, and open_clip.

    model --refusals--> what the layout cannot say: one line, and nothing is written
          --names, splits--> tensors under its names; vlp.training.published makes the model's own of them again

What is written is a folder with weights and config; frames are encoded alone and averaged by whoever loads it.

Axes: D width, E embedding, S patches.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from vlp import config
from vlp.encoders.frame_vit import AloneBlock, FrameVit
from vlp.encoders.text import HuggingFaceText
from vlp.layers.pool import ClsPool, LastPool
from vlp.layers.temperature import Temperature
from vlp.models.video_text import VideoText
from vlp.training.clip_names import HUGGING_FACE, OPEN_CLIP, giving
from vlp.training.published import Tensors, renamed


class Towers(NamedTuple):
    """The sizes that both layouts state."""

    embed_dim: int
    image_size: int
    patch_size: int
    video: tuple[int, int, int, int]  # width, layers, heads, width inside the MLP
    text: Any  # the configuration of Hugging Face's text model
    quick_gelu: tuple[bool, bool]  # of the video tower, of the text tower


class Written(NamedTuple):
    """What a layout makes of a model."""

    weights: str  # file name
    tensors: Tensors
    configs: dict[str, dict[str, Any]]  # file name -> content


def refusals(model: nn.Module, kind: str) -> list[str]:
    """Return one line for each part of a model that a layout of CLIP cannot express."""
    if not isinstance(model, VideoText):
        return [f"--to {kind}: model: {type(model).__name__} is no pair of towers."]
    wrong = {
        "fusion": model.fusion is not None,
        "decoder": model.decoder is not None,
        "connector": len(model.connectors) > 0,
        "video": not _is_clip_vit(model.video_encoder),
        "text": not _is_clip_text(model.text_encoder),
        "model.video_pool": not isinstance(model.video_pool, ClsPool),
        "model.text_pool": not isinstance(model.text_pool, LastPool),
        "model.temperature": not (isinstance(model.temperature, Temperature) and model.temperature.log_space),
        "model.projection_bias": model.text_projection.bias is not None,
        "model.project_video": not isinstance(model.video_projection, nn.Linear),
    }
    lines = [
        f"--to {kind}: {part}: {_what(model, part)} has no place in this layout." for part, bad in wrong.items() if bad
    ]
    if not lines and kind == "open_clip" and len(set(towers(model).quick_gelu)) > 1:
        lines = ["--to open_clip: video, text: one activation is QuickGELU and the other is not; open_clip has one."]
    return lines


def _what(model: VideoText, part: str) -> str:
    parts = {"fusion": model.fusion, "decoder": model.decoder, "video": model.video_encoder, "text": model.text_encoder}
    parts |= {"model.video_pool": model.video_pool, "model.text_pool": model.text_pool}
    if part == "video" and isinstance(model.video_encoder, FrameVit):
        blocks = {type(block).__name__ for block in model.video_encoder.blocks} - {"AloneBlock"}
        return ", ".join(blocks) or "this ViT"
    if part == "connector":
        return ", ".join(dict(model.connectors.named_children()))
    return type(parts[part]).__name__ if part in parts else "what the config says"


def _is_clip_vit(video: nn.Module) -> bool:
    """Is it CLIP's image tower: norms before and after, no bias on the patches, square, each frame alone?"""
    if not isinstance(video, FrameVit) or not all(isinstance(block, AloneBlock) for block in video.blocks):
        return False
    embed: Any = video.patch_embed
    first: Any = video.blocks[0].block  # type: ignore[union-attr]
    plain = type(first).__name__ == "Block" and isinstance(first.attn.q_norm, nn.Identity) and first.attn.gate is None
    activation = _is_quick(first.mlp.act) or type(first.mlp.act) is nn.GELU
    scales = isinstance(first.ls1, nn.Identity) and isinstance(first.mlp.norm, nn.Identity)
    norms = [video.norm_pre, video.norm, first.norm1, first.norm2]
    same = all(isinstance(norm, nn.LayerNorm) and norm.eps == 1e-5 for norm in norms)
    square = embed.grid_size[0] == embed.grid_size[1]
    return plain and activation and scales and same and square and embed.proj.bias is None and _has_biases(first)


def _is_quick(activation: nn.Module) -> bool:
    return type(activation).__name__ == "QuickGELU"  # timm's; no file but those of the encoders imports timm


def _has_biases(block: Any) -> bool:
    return all(layer.bias is not None for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))


def _is_clip_text(text: nn.Module) -> bool:
    if not isinstance(text, HuggingFaceText):
        return False
    made: Any = text.model.config
    known = made.model_type == "clip_text_model" and made.layer_norm_eps == 1e-5
    return known and made.hidden_act in ("quick_gelu", "gelu")


def towers(model: VideoText) -> Towers:
    """Return the sizes of a model that `refusals` has passed."""
    video: Any = model.video_encoder
    first = video.blocks[0].block
    sizes = (video.dim, len(video.blocks), first.attn.num_heads, first.mlp.fc1.out_features)
    text_encoder: Any = model.text_encoder
    text = text_encoder.model.config
    quick = (_is_quick(first.mlp.act), text.hidden_act == "quick_gelu")
    return Towers(model.embed_dim, video.size, video.patch_size, sizes, text, quick)


def _split_video(tensors: Mapping[str, Tensor]) -> Tensors:
    """Hugging Face holds query, key and value of an image block in three tensors."""
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(vision_model\.encoder\.layers\.\d+\.self_attn)\.qkv\.(.*)", name)
        if match is None:
            result[name] = tensor
            continue
        shares = zip("qkv", tensor.chunk(3), strict=True)
        result |= {f"{match[1]}.{part}_proj.{match[2]}": share for part, share in shares}
    return result


def _joined_text(tensors: Mapping[str, Tensor]) -> Tensors:
    """open_clip holds query, key and value of a text block in one tensor."""
    result = dict(tensors)
    for name in tensors:
        match = re.fullmatch(r"(transformer\.resblocks\.\d+\.attn)\.q_proj\.(.*)", name)
        if match is not None:
            parts = [result.pop(f"{match[1]}.{part}_proj.{match[2]}") for part in "qkv"]
            result[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
    return result


def _hugging_face(sizes: Towers, tensors: Tensors, clip: DictConfig) -> Written:
    width, layers, heads, inside = sizes.video
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inside,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_act": "quick_gelu" if sizes.quick_gelu[0] else "gelu",
    }
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    kept += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    stated = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": sizes.embed_dim,
        "text_config": {key: getattr(sizes.text, key) for key in kept},
        "vision_config": vision,
    }
    side = {"height": sizes.image_size, "width": sizes.image_size}
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": sizes.image_size}}
    pixels |= {"crop_size": side, "image_mean": list(clip.mean), "image_std": list(clip.std)}
    named = _split_video(renamed(tensors, giving(HUGGING_FACE), "--to hf_clip").tensors)
    return Written("model.safetensors", named, {"config.json": stated, "preprocessor_config.json": pixels})


def _open_clip(sizes: Towers, tensors: Tensors, clip: DictConfig) -> Written:
    width, layers, heads, inside = sizes.video
    text = sizes.text
    vision = {"image_size": sizes.image_size, "layers": layers, "width": width, "patch_size": sizes.patch_size}
    vision |= {"head_width": width // heads, "mlp_ratio": inside / width}
    words = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size}
    words |= {"heads": text.num_attention_heads, "layers": text.num_hidden_layers}
    words |= {"mlp_ratio": text.intermediate_size / text.hidden_size, "pool_type": "eos", "eos_id": text.eos_token_id}
    stated = {"embed_dim": sizes.embed_dim, "quick_gelu": sizes.quick_gelu[0], "vision_cfg": vision, "text_cfg": words}
    pixels = {"mean": list(clip.mean), "std": list(clip.std)}
    named = _joined_text(renamed(tensors, giving(OPEN_CLIP), "--to open_clip").tensors)
    config_file = {"open_clip_config.json": {"model_cfg": stated, "preprocess_cfg": pixels}}
    return Written("open_clip_model.safetensors", named, config_file)


LAYOUTS: Mapping[str, Callable[[Towers, Tensors, DictConfig], Written]] = {
    "hf_clip": _hugging_face,
    "open_clip": _open_clip,
}


def written(model: nn.Module, kind: str, clip: DictConfig) -> Written:
    """Return a model in a layout.

    Args:
        clip: the section `model` of the config, with mean and std of the pixels.

    Raises:
        config.ConfigError: an unknown layout, or one line for each part that it cannot express.
    """
    if kind not in LAYOUTS:
        raise config.ConfigError([f"--to {kind}: unknown; known are {', '.join(LAYOUTS)}."])
    lines = refusals(model, kind)
    if lines:
        raise config.ConfigError(lines)
    assert isinstance(model, VideoText)
    return LAYOUTS[kind](towers(model), dict(model.state_dict()), clip)


def save(made: Written, folder: Path) -> None:
    """Write weights and configs into a folder that exists."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in made.tensors.items()}
    save_file(tensors, folder / made.weights, metadata={"format": "pt"})
    for name, content in made.configs.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
