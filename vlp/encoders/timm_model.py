"""timm's image models, made ready to be parts of a video encoder.

Axes: B images, N tokens, H heads, d width of a head.
What is changed: heads are dropped, so that no parameter stays without a gradient, and timm's `Attention` is replaced by
one that shares its parameters and runs through `vlp.layers.attention.attend`. State-dict names stay timm's.
"""

import difflib
import sys
from typing import Any

import timm
from einops import rearrange
from timm.layers.attention import Attention
from torch import Tensor, nn

from vlp.encoders.weights import load_exactly, read_weights
from vlp.layers.attention import attend

# Parts after the features. They are replaced by nothing, and their weights in a checkpoint are left unread.
_HEADS = ("head", "head_dist", "head_drop", "fc", "fc_norm", "classifier", "attn_pool", "global_pool")
_OWNED = ("img_size", "num_classes", "in_chans", "pretrained", "drop_path_rate")  # arguments of the encoders instead


class DispatchedAttention(nn.Module):
    """timm's attention with its own parameters and vlp's kernels."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.qkv, self.q_norm, self.k_norm = source.qkv, source.q_norm, source.k_norm
        self.attn_drop, self.norm = source.attn_drop, source.norm
        self.gate = getattr(source, "gate", None)  # newer than the oldest timm that vlp supports
        self.proj, self.proj_drop = source.proj, source.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map [B, N, D] to [B, N, D]; the mask is bool, as in `attend`."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = attend(self.q_norm(q), self.k_norm(k), v, mask=attn_mask, causal=is_causal, dropout_p=dropout_p)
        out = self.norm(rearrange(out, "b h n d -> b n (h d)"))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def image_model(
    name: str,
    *,
    size: int | tuple[int, int],
    pretrained: bool,
    checkpoint_path: str | None,
    overrides: dict[str, Any] | None,
    drop_path: float,
) -> nn.Module:
    """Build a timm image model without heads: its output is its features.

    Args:
        name: a name of `timm.list_models()`, optionally with a weight tag: "vit_base_patch16_224.augreg_in21k".
        size: of the input in pixels: height and width if they differ.
        pretrained: let timm download the weights of the name.
        checkpoint_path: local weights instead; position tables are resized as timm does.
        overrides: constructor arguments of the timm model.

    Raises:
        ValueError: unknown name, an argument that vlp owns, weights from two places, or weights that do not fit.
    """
    arguments = {"global_pool": "", **(overrides or {})}
    _check(name, arguments, pretrained, checkpoint_path)
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = size
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    for head in _HEADS:
        if isinstance(getattr(model, head, None), nn.Module):
            setattr(model, head, nn.Identity())
    # Called as a module and not by method: ZeRO-3 gathers a module's own parameters only around its call.
    features: Any = model.forward_features
    model.forward = features
    if checkpoint_path is not None:
        _load(model, checkpoint_path)
    _dispatch_attention(model)
    return model


def _check(name: str, overrides: dict[str, Any], pretrained: bool, checkpoint_path: str | None) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm has no model '{name}'; closest: {', '.join(near) or 'none'}. See timm.list_models().")
    owned = sorted(set(overrides) & set(_OWNED))
    if owned:
        raise ValueError(f"overrides.{owned[0]} belongs to the video encoder; use the encoder's own argument instead.")
    if pretrained and checkpoint_path is not None:
        raise ValueError(f"pretrained=true and checkpoint_path='{checkpoint_path}' exclude each other; set one.")


def _load(model: nn.Module, path: str) -> None:
    weights = read_weights(path)
    # timm keeps the conversion of published weights (names, size of position tables) beside each family.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        weights = convert(weights, model)
    load_exactly(model, weights, path, spare=tuple(f"{head}." for head in _HEADS))


def _dispatch_attention(model: nn.Module) -> None:
    for part in list(model.modules()):
        for child_name, child in part.named_children():
            if type(child) is Attention:  # its subclasses compute something else
                setattr(part, child_name, DispatchedAttention(child))
