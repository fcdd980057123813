"""Linear layers that keep their weights and learn a product of two thin matrices beside them (LoRA).

    out = W x + b + alpha / rank * up (down x)

A layer keeps the names of its weight and bias, so that weights are found and given under the names of the model without
adapters; `merge` adds the product to the weight, after which nothing of the adapter is left.

Axes: P parts of a joint layer (3 for query, key and value), R rank, I input width, O output width of a part.
"""

import fnmatch
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LowRank:
    """Lets linear layers be tuned by products of low rank; their own weights stay. Source: arXiv:2106.09685, 4.1.

    Args:
        layers: pattern of names of linear layers (`*` matches anything) -> how many layers one of them joins, each of
            which has a product of its own: 3 for `*.attn.qkv`, else 1.
        rank: of each product. alpha: the products are multiplied by alpha / rank.
        dropout: of what the products see.
    """

    def __init__(self, *, layers: dict[str, int], rank: int, alpha: float, dropout: float = 0.0) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1.")
        if not layers:
            raise ValueError("layers={} names no layer; give patterns such as {'model.video_encoder.*.attn.qkv': 3}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1.")
        self.layers, self.rank, self.alpha, self.dropout = dict(layers), rank, alpha, dropout

    def __call__(self, module: nn.Module) -> list[str]:
        """Replace the layers in `module`, and return their names.

        Raises:
            ValueError: a pattern matches no linear layer, or one that is taken; its outputs are no multiple of its
                parts.
        """
        linears = [name for name, part in module.named_modules() if type(part) is nn.Linear]
        adapted: list[str] = []
        for pattern, num_parts in self.layers.items():
            matched = fnmatch.filter(linears, pattern)
            taken = sorted(set(matched) & set(adapted))
            if taken:
                raise ValueError(f"layers: '{pattern}' and another pattern both match {taken[0]}; each layer has one.")
            if not matched:
                raise ValueError(f"layers: '{pattern}' matches no linear layer; {_names(linears)}.")
            for name in matched:
                self._replace(module, name, num_parts)
            adapted += matched
        return adapted

    def _replace(self, module: nn.Module, name: str, num_parts: int) -> None:
        owner, _, last = name.rpartition(".")
        source = module.get_submodule(name)
        assert isinstance(source, nn.Linear)
        if num_parts < 1 or source.out_features % num_parts:
            raise ValueError(
                f"layers: {name} has {source.out_features} outputs, which are not {num_parts} equal parts."
            )
        layer = LowRankLinear(source, rank=self.rank, alpha=self.alpha, dropout=self.dropout, num_parts=num_parts)
        setattr(module.get_submodule(owner), last, layer)


class LowRankLinear(nn.Module):
    """A linear layer whose weight and bias stay, and what is learnt beside them; at first it gives what it gave."""

    def __init__(self, source: nn.Linear, *, rank: int, alpha: float, dropout: float, num_parts: int) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.num_parts, self.scale = num_parts, alpha / rank
        self.weight, self.bias = source.weight, source.bias
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.drop = nn.Dropout(dropout)
        self.lora_down = nn.Parameter(self.weight.new_empty(num_parts * rank, source.in_features))
        self.lora_up = nn.Parameter(self.weight.new_zeros(num_parts, source.out_features // num_parts, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., P*O]."""
        low = rearrange(F.linear(self.drop(x), self.lora_down), "... (p r) -> ... p r", p=self.num_parts)
        extra = torch.einsum("... p r, p o r -> ... p o", low, self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * rearrange(extra, "... p o -> ... (p o)")

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the plain layer that gives the same without dropout."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.weight.device)
        down = rearrange(self.lora_down, "(p r) i -> p r i", p=self.num_parts)
        extra = torch.einsum("p o r, p r i -> p o i", self.lora_up, down)
        layer.weight.copy_(self.weight + self.scale * rearrange(extra, "p o i -> (p o) i"))
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


def merge(module: nn.Module) -> int:
    """Put plain layers in the place of all that learn beside their weights; return their number."""
    found = adapted(module)
    for name, layer in found.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, layer.merged().train(layer.training))
    return len(found)


def adapted(module: nn.Module) -> Mapping[str, LowRankLinear]:
    """Return the layers of `module` that learn beside their weights, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LowRankLinear)}


def _names(linears: list[str]) -> str:
    return f"linear layers are named like {', '.join(linears[:3])}, ..." if linears else "there is none"
