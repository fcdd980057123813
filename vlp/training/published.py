"""Weights that others published, under the names of vlp: every tensor is renamed, or left out for a stated reason.

    file --read_weights (tensors only)--> names of its layout --joins, rules--> names of vlp --init.run--> a run

Axes: D width, E embedding, S patches, T frames, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vlp import config
from vlp.encoders.weights import read_weights
from vlp.training import clip_names
from vlp.training.clip_names import Rule, table

Tensors = dict[str, Tensor]


class Layout(NamedTuple):
    """How a kind of checkpoint is read."""

    rules: tuple[Rule, ...]
    joins: tuple[Callable[[Tensors], Tensors], ...] = ()  # of several tensors, before the rules


class Imported(NamedTuple):
    """What a checkpoint holds, in vlp's words."""

    tensors: Tensors
    left_out: dict[str, str]  # name -> reason


def convert(tensors: Mapping[str, Tensor], kind: str) -> Imported:
    """Rename the tensors of a published checkpoint.

    Raises:
        config.ConfigError: an unknown kind, or a tensor that no rule of the kind knows.
    """
    if kind not in LAYOUTS:
        raise config.ConfigError([f"--from {kind}: unknown; known are {', '.join(LAYOUTS)}."])
    layout, found = LAYOUTS[kind], dict(tensors)
    for join in layout.joins:
        found = join(found)
    return renamed(found, layout.rules, f"--from {kind}")


def renamed(tensors: Mapping[str, Tensor], rules: Iterable[Rule], asked: str) -> Imported:
    """Give each tensor the name that the first rule for it says.

    Raises:
        config.ConfigError: a tensor that no rule knows; `asked` is what the command line said.
    """
    rules, named = tuple(rules), Imported({}, {})
    unknown = []
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            unknown.append(name)
        elif rule.name is None:
            named.left_out[name] = rule.reason
        else:
            named.tensors[re.sub(rule.pattern, rule.name, name)] = rule.change(tensor).contiguous()
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        names = f"{', '.join(unknown[:3])}{more}"
        raise config.ConfigError([f"{asked}: no rule knows {names}; is it a checkpoint of another kind?"])
    return named


def import_file(path: Path, kind: str) -> Imported:
    """Read and rename a published checkpoint; pickled objects beside tensors are refused.

    Args:
        path: of the file, or of a folder as Hugging Face writes it, with model.safetensors.

    Raises:
        config.ConfigError: no such file, objects in it, an unknown kind or tensor.
    """
    try:
        return convert(read_weights(str(path / "model.safetensors" if path.is_dir() else path)), kind)
    except config.ConfigError:
        raise
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None


def _joined(pattern: str, parts: Iterable[str], name: str) -> Callable[[Tensors], Tensors]:
    """Concatenate the `parts` of what `pattern` finds, such as query, key and value, under one name.

    `pattern` has {} where the part stands and matches up to ".weight" or ".bias".
    """
    names = tuple(parts)
    first = re.compile(pattern.format(re.escape(names[0])) + r"\.(weight|bias)")

    def join(tensors: Tensors) -> Tensors:
        result = dict(tensors)
        for key in tensors:
            match = first.fullmatch(key)
            if match is None:
                continue
            others = [key.replace(f".{names[0]}.", f".{part}.") for part in names]
            if all(other in result for other in others):
                result[match.expand(name) + f".{match.groups()[-1]}"] = torch.cat([result.pop(o) for o in others])
        return result

    return join


def _added(place: str, others: Callable[[Tensors], Tensor | None]) -> Callable[[Tensors], Tensors]:
    """Add a tensor to that of another name, such as BERT's type of the first segment to its positions."""

    def add(tensors: Tensors) -> Tensors:
        other = others(tensors)
        if place not in tensors or other is None:
            return tensors
        return {**tensors, place: tensors[place] + other}

    return add


def _row(name: str, index: int) -> Callable[[Tensors], Tensor | None]:
    return lambda tensors: tensors[name].reshape(-1, tensors[name].shape[-1])[index] if name in tensors else None


def _stated(name: str, value: float) -> Callable[[Tensors], Tensors]:
    """Add a constant that the published code states and its checkpoints lack."""
    return lambda tensors: {**tensors, name: torch.tensor([value])}


def _violet_places(tensor: Tensor) -> Tensor:
    """Rows 1 to 49 of the table are the 7 x 7 cells of a frame of 224 pixels; the others are never read."""
    return rearrange(table(tensor)[1:50], "(h w) d -> h w d", h=7)


_POOLER = "the pooling layer is no part of vlp's heads"
_SEGMENT = "its first row is added to the positions"
_INDEX = "computed from the shape of the window"
_BUFFER = "numbers of positions, no weights"

_VIT = r"(cls_token|pos_embed|patch_embed\..*|blocks\.\d+\.(?:norm1|norm2|attn|mlp)\..*|norm\..*)"

FROZEN = Layout(
    (
        Rule("temperature", "model.temperature.value", lambda value: -value.log()),
        Rule(r"video_model\.temporal_embed", "model.video_encoder.time_positions.table", table),
        Rule(r"video_model\.(blocks\.\d+)\.timeattn\.(.*)", r"model.video_encoder.\1.time_attn.\2"),
        Rule(r"video_model\.(blocks\.\d+)\.norm3\.(.*)", r"model.video_encoder.\1.time_norm.\2"),
        Rule(rf"video_model\.{_VIT}", r"model.video_encoder.\1"),
        Rule(r"text_model\.embeddings\.position_ids", None, reason=_BUFFER),
        Rule(r"text_model\.(.*)", r"model.text_encoder.model.\1"),
        Rule(r"txt_proj\.1\.(.*)", r"model.text_projection.\1"),
        Rule(r"vid_proj\.0\.(.*)", r"model.video_projection.\1"),
    ),
    (_stated("temperature", 0.05),),
)

_BERT_LAYER = (
    Rule(r"trsfr\.layer\.(\d+)\.attention\.self\.qkv\.(.*)", r"model.fusion.blocks.\1.attn.qkv.\2"),
    Rule(r"trsfr\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"model.fusion.blocks.\1.attn.proj.\2"),
    Rule(r"trsfr\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.*)", r"model.fusion.blocks.\1.norm1.\2"),
    Rule(r"trsfr\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"model.fusion.blocks.\1.mlp.fc1.\2"),
    Rule(r"trsfr\.layer\.(\d+)\.output\.dense\.(.*)", r"model.fusion.blocks.\1.mlp.fc2.\2"),
    Rule(r"trsfr\.layer\.(\d+)\.output\.LayerNorm\.(.*)", r"model.fusion.blocks.\1.norm2.\2"),
)


def _words_head(start: str) -> tuple[Rule, ...]:
    """BERT's head over the vocabulary."""
    head = "objectives.masked_words.head"
    return (
        Rule(rf"{start}\.transform\.dense\.(.*)", rf"{head}.0.\1"),
        Rule(rf"{start}\.transform\.LayerNorm\.(.*)", rf"{head}.2.\1"),
        Rule(rf"{start}\.decoder\.weight", f"{head}.3.weight"),
        Rule(rf"{start}\.bias", f"{head}.3.bias"),
        Rule(rf"{start}\.decoder\.bias", None, reason="the same tensor as the bias beside it"),
    )


VIOLET = Layout(
    (
        Rule(r"enc_img\.swin\..*relative_position_index", None, reason=_INDEX),
        Rule(r"enc_img\.swin\.(.*)", r"model.video_encoder.\1"),
        Rule(r"enc_img\.emb_cls", "model.connectors.frame_tokens.class_token.table", lambda t: table(t)[0]),
        Rule(r"enc_img\.emb_pos", "model.connectors.frame_tokens.places.table", _violet_places),
        Rule(r"enc_img\.emb_len", "model.connectors.frame_tokens.times.table", table),
        Rule(r"enc_img\.norm\.(.*)", r"model.connectors.frame_tokens.norm.\1"),
        Rule(r"enc_img\.fc\.(.*)", r"model.connectors.frame_tokens.project.\1"),
        Rule(r"enc_img\.emb_odr", None, reason="orders of frames are no part of the pretraining"),
        Rule(r"enc_txt\.emb_txt\.word_embeddings\.(.*)", r"model.text_encoder.words.\1"),
        Rule(r"enc_txt\.emb_txt\.position_embeddings\.weight", "model.text_encoder.positions.table"),
        Rule(r"enc_txt\.emb_txt\.token_type_embeddings\.weight", None, reason=_SEGMENT),
        Rule(r"enc_txt\.emb_txt\.LayerNorm\.(.*)", r"model.text_encoder.norm.\1"),
        Rule(r"enc_txt\.emb_txt\.(position_ids|token_type_ids)", None, reason=_BUFFER),
        *_BERT_LAYER,
        Rule(r"fc\.(\d)\.(.*)", r"objectives.choice_matching.head.\1.\2"),
        *_words_head(r"fc_mtm\.predictions"),
        Rule(r"fc_mvm\.(\d)\.(.*)", r"objectives.masked_visual.head.\1.\2"),
    ),
    (
        _joined(r"(trsfr\.layer\.\d+\.attention\.self)\.{}", ("query", "key", "value"), r"\1.qkv"),
        _added("enc_txt.emb_txt.position_embeddings.weight", _row("enc_txt.emb_txt.token_type_embeddings.weight", 0)),
        _added("enc_img.emb_cls", _row("enc_img.emb_pos", 0)),
    ),
)

ALL_IN_ONE = Layout(
    (
        Rule(r"text_embeddings\.word_embeddings\.(.*)", r"model.stream.words.\1"),
        Rule(r"text_embeddings\.position_embeddings\.weight", "model.stream.word_positions.table"),
        Rule(r"text_embeddings\.token_type_embeddings\.weight", None, reason=_SEGMENT),
        Rule(r"text_embeddings\.LayerNorm\.(.*)", r"model.stream.word_norm.\1"),
        Rule(r"text_embeddings\.position_ids", None, reason=_BUFFER),
        Rule(r"token_type_embeddings\.weight", "model.stream.types.weight"),
        Rule(r"transformer\.temporal_embed", "model.stream.time_positions.table", table),
        Rule(rf"transformer\.{_VIT}", r"model.stream.\1"),
        *_words_head("mlm_score"),
        Rule(r"(?:txt|vid)_proj\..*", None, reason="its heads have layers that vlp's projections have not"),
        Rule(r"pooler\..*", None, reason=_POOLER),
        Rule(r"itm_score\..*", None, reason=_POOLER),
        Rule(r"transformer\.(?:head|pre_logits|dist_token|head_dist).*", None, reason="a classifier of images"),
    ),
    (_added("text_embeddings.position_embeddings.weight", _row("text_embeddings.token_type_embeddings.weight", 0)),),
)

_HF_LAYER = r"vision_model\.encoder\.layers\.(\d+)"
_TIME = r"model.video_encoder.blocks.\1"

_HF_RULES = (
    Rule(r"(?:vision|text)_model\.embeddings\.position_ids", None, reason=_BUFFER),
    Rule(rf"{_HF_LAYER}\.temporal_embedding", rf"{_TIME}.temporal_positions.table", table),
    Rule(rf"{_HF_LAYER}\.temporal_attn\.qkv\.(.*)", rf"{_TIME}.temporal_attn.qkv.\2"),
    Rule(rf"{_HF_LAYER}\.temporal_attn\.out_proj\.(.*)", rf"{_TIME}.temporal_attn.proj.\2"),
    Rule(rf"{_HF_LAYER}\.temporal_layer_norm1\.(.*)", rf"{_TIME}.temporal_norm.\2"),
    *clip_names.taking(clip_names.HUGGING_FACE),
)


def _without_peft(tensors: Tensors) -> Tensors:
    """The peft library keeps the encoder below "base_model.model" and the weights of a tuned layer below "base_layer".

    Of query, key and value each has products of its own, which become those of the joint layer.
    """
    plain = {name.replace(".base_model.model.", ".").replace(".base_layer.", "."): t for name, t in tensors.items()}
    result: Tensors = {}
    for name, tensor in plain.items():
        match = re.fullmatch(r"(.*_attn)\.(q|out)_proj\.lora_A\.default\.weight", name)
        if match is None:
            if re.fullmatch(r".*_attn\.(?:[qkv]|out)_proj\.lora_[AB]\.default\.weight", name) is None:
                result[name] = tensor
            continue
        layer = f"{match[1]}.{'qkv' if match[2] == 'q' else 'out_proj'}"
        parts = [f"{match[1]}.{part}_proj" for part in ("qkv" if match[2] == "q" else ("out",))]
        result[f"{layer}.lora_down"] = torch.cat([plain[f"{part}.lora_A.default.weight"] for part in parts])
        result[f"{layer}.lora_up"] = torch.stack([plain[f"{part}.lora_B.default.weight"] for part in parts])
    return result


HF_CLIP = Layout(
    _HF_RULES,
    (
        _without_peft,
        *(
            _joined(rf"(vision_model\.encoder\.layers\.\d+\.{kind})\.{{}}", ("q_proj", "k_proj", "v_proj"), r"\1.qkv")
            for kind in ("self_attn", "temporal_attn")
        ),
    ),
)


def _split_text(tensors: Tensors) -> Tensors:
    """OpenAI's text blocks hold query, key and value in one tensor, Hugging Face's in three."""
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if match is None:
            result[name] = tensor
            continue
        for part, share in zip("qkv", tensor.chunk(3), strict=True):
            result[f"transformer.resblocks.{match[1]}.attn.{part}_proj.{match[2]}"] = share
    return result


OPEN_CLIP = Layout(
    (
        Rule(r"(?:input_resolution|context_length|vocab_size|attn_mask)", None, reason=_BUFFER),
        *clip_names.taking(clip_names.OPEN_CLIP),
    ),
    (_split_text,),
)


def _without_clip(tensors: Tensors) -> Tensors:
    """CLIP4Clip keeps CLIP below "clip."."""
    return {name.removeprefix("clip."): tensor for name, tensor in tensors.items()}


CLIP4CLIP = Layout(
    (
        Rule(r"visual\.proj", "model.connectors.project.linear.weight", lambda proj: rearrange(proj, "d e -> e d")),
        *OPEN_CLIP.rules,
        Rule(
            r"(?:frame_position_embeddings|transformerClip|lstm_visual|cross|similarity_dense)\..*",
            None,
            reason="a head over frames, which mean pooling has not",
        ),
    ),
    (_without_clip, _split_text),
)

LAYOUTS: Mapping[str, Layout] = {
    "violet": VIOLET,
    "frozen": FROZEN,
    "all_in_one": ALL_IN_ONE,
    "languagebind": HF_CLIP,
    "clip4clip": CLIP4CLIP,
    "open_clip": OPEN_CLIP,
    "hf_clip": HF_CLIP,
}
