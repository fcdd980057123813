"""Text encoders: any encoder-only Hugging Face model, or embeddings alone.

Axes: B texts, L tokens, D width. transformers is imported when the first encoder is built, not with this file.
"""

import difflib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlp.layers.block import init_linears
from vlp.layers.position import LearnedPositions
from vlp.types import Tokens

_OWNED = {"vocab_size": "vocab_size", "pad_token_id": "pad_id"}  # Hugging Face's key: the encoder's argument
_OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert")  # their first position is pad_id + 1


class HuggingFaceText(nn.Module):
    """An encoder-only Hugging Face model (BERT, RoBERTa, DistilBERT, CLIP's text tower) without its pooling layer."""

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        max_length: int,
        config: dict[str, Any] | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Build from scratch by `config`, or load `name`; exactly one of them.

        Args:
            vocab_size: ids of the tokenizer; a loaded model must have at least as many.
            pad_id: the tokenizer's id of padding.
            max_length: most tokens of a text.
            config: Hugging Face's configuration, e.g. {model_type: bert, hidden_size: 256, num_hidden_layers: 4}.
            name: a name on the hub, or a local directory. Only safetensors are read, remote code never runs.
            revision: the commit of a hub name, 40 hexadecimal digits.

        Raises:
            ValueError: both or none of config and name, an unknown key, no pinned commit, a model that does not fit.
        """
        super().__init__()
        if (config is None) == (name is None):
            raise ValueError(f"HuggingFaceText needs config or name, exactly one; got config={config}, name={name}.")
        if name is not None:
            self.model = _load(name, revision, vocab_size, max_length)
        else:
            self.model = _build(dict(config or {}), vocab_size, pad_id, max_length)
        self.dim: int = self.model.config.hidden_size

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tokens:
        """Encode [B, L] int64 under the mask [B, L] bool, True = real, to [B, L, D]."""
        # A text of padding alone keeps its first token in sight: a softmax over nothing is NaN in some kernels.
        seen = torch.cat([text_mask[:, :1] | ~text_mask.any(1, keepdim=True), text_mask[:, 1:]], dim=1)
        return Tokens(self.model(input_ids=text_ids, attention_mask=seen).last_hidden_state, text_mask)


class EmbeddingText(nn.Module):
    """Word embeddings, positions and a norm, no layers: fusion does the reading. Source: arXiv:2111.12681."""

    def __init__(self, *, vocab_size: int, dim: int, max_length: int, pad_id: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.words = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        self.positions = LearnedPositions(length=max_length, dim=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)  # as BERT's
        self.drop = nn.Dropout(dropout)
        init_linears(self.words)

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tokens:
        """Embed [B, L] int64 under the mask [B, L] bool, True = real, to [B, L, D]."""
        return Tokens(self.drop(self.norm(self.positions(self.words(text_ids)))), text_mask)


def _build(config: dict[str, Any], vocab_size: int, pad_id: int, max_length: int) -> Any:
    from transformers import AutoConfig

    model_type = config.pop("model_type", None)
    _check_type(model_type)
    known = AutoConfig.for_model(model_type)
    keys = known.to_dict().keys() | known.attribute_map.keys()
    for key in config:
        if key in _OWNED:
            raise ValueError(f"config.{key} of the text encoder is set by {_OWNED[key]}; remove it from config.")
        if key not in keys:  # Hugging Face would keep an unknown key and ignore it
            near = difflib.get_close_matches(key, keys, n=1)
            raise ValueError(f"{model_type} has no setting '{key}'." + (f" Did you mean '{near[0]}'?" if near else ""))
    if "max_position_embeddings" in keys:
        rows = max_length + (pad_id + 1 if model_type in _OFFSET_FAMILIES else 0)
        config.setdefault("max_position_embeddings", rows)
    built = AutoConfig.for_model(model_type, **config, vocab_size=vocab_size, pad_token_id=pad_id)
    _check_fits(built, str(model_type), vocab_size, max_length)
    return _class_of(built)._from_config(built, attn_implementation="sdpa", **_no_pooling(built))


def _load(name: str, revision: str | None, vocab_size: int, max_length: int) -> Any:
    from transformers import AutoConfig

    is_local = Path(name).is_dir()
    if not is_local and re.fullmatch(r"[0-9a-f]{40}", revision or "") is None:
        raise ValueError(
            f"text model '{name}' is no local directory, so revision must pin a commit of the hub (40 hexadecimal "
            f"digits), got {revision!r}; copy the commit from the model's page."
        )
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    config = getattr(config, "text_config", config)  # a two-tower model such as CLIP: its text tower
    _check_fits(config, name, vocab_size, max_length)
    model, info = _class_of(config).from_pretrained(
        name,
        config=config,
        revision=revision,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        **_no_pooling(config),
    )
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"text model '{name}' lacks {len(info['missing_keys'])} weights ({some}); choose another one.")
    return model.train()


def _class_of(config: Any) -> Any:
    from transformers import AutoModel

    return AutoModel._model_mapping[type(config)]


def _no_pooling(config: Any) -> dict[str, bool]:
    """Return the argument that leaves out the pooling layer, whose weights would never get a gradient."""
    takes_it = "add_pooling_layer" in inspect.signature(_class_of(config).__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def _check_type(model_type: str | None) -> None:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=3)
        raise ValueError(
            f"config.model_type={model_type!r} of the text encoder is not a Hugging Face model type; closest: "
            f"{', '.join(near) or 'bert, roberta, distilbert, clip_text_model'}."
        )


def _check_fits(config: Any, name: str, vocab_size: int, max_length: int) -> None:
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise ValueError(f"text model '{name}' has a decoder; HuggingFaceText needs an encoder, e.g. bert or roberta.")
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"text model '{name}' knows {config.vocab_size} ids but the tokenizer has {vocab_size}; "
            "use the tokenizer that belongs to the model."
        )
    offset = config.pad_token_id + 1 if config.model_type in _OFFSET_FAMILIES else 0
    rows = getattr(config, "max_position_embeddings", max_length + offset) - offset
    if rows < max_length:
        raise ValueError(f"text model '{name}' takes {rows} tokens; lower max_length={max_length} to that or less.")
