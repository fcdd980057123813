"""From a checkpoint of any strategy to one safetensors file, and to the layouts that other libraries read.

A file is only kept if a model that is built from the run's config and filled from the file computes what the model that
is filled from the checkpoint computes: every quantity and every loss on a batch, to the last bit. What adapters have
learnt is added to the weights of their layers, which rounds: there the two agree to 1e-4.

Axes: B clips, T frames, H W pixels, L text length.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlp import config
from vlp.encoders.text import HuggingFaceText
from vlp.encoders.timm_video import TimmFrames
from vlp.forward import ForwardPass
from vlp.layers import low_rank
from vlp.training import checkpoint, clip_layouts, published, state, stored_config
from vlp.training.assemble import System, assemble, wanted
from vlp.training.exits import Exit, StopRun
from vlp.types import Batch, nothing_more

_NUM_CLIPS = 3  # of the batch that the models are compared on


class Source(NamedTuple):
    """What is converted: a checkpoint, the config it was made with, and the run it belongs to."""

    stored: checkpoint.Stored
    cfg: DictConfig
    run: Path


class File:
    """An exported file as `state.fill` reads it."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def keys(self) -> list[str]:
        """Return "model/NAME" of every tensor."""
        return [f"model/{name}" for name in self._names]

    def get(self, key: str) -> Tensor:
        """Return a tensor."""
        return self._file.get_tensor(key.removeprefix("model/"))


def open_source(path: Path) -> Source:
    """Open a run's directory at its newest valid checkpoint, or one checkpoint's directory.

    Raises:
        ConfigError: there is no run, or its config is not one. StopRun: there is no valid checkpoint.
    """
    if (path / "manifest.json").exists():
        try:
            stored = checkpoint.open_checkpoint(path)
        except ValueError as error:
            raise StopRun(Exit.NO_VALID_CHECKPOINT, str(error)) from None
        cfg, run = DictConfig(stored.facts["config"]), path.absolute().parent.parent
    elif (path / "config.yaml").exists():
        found, refused = checkpoint.newest_valid(path / "checkpoints")
        if found is None:
            lines = "; ".join(refused) or "train the run first"
            raise StopRun(Exit.NO_VALID_CHECKPOINT, f"{path} holds no valid checkpoint: {lines}.")
        stored, run = found, path
        cfg = stored_config.read(path)
    else:
        raise config.ConfigError([f"{path}: neither a run (config.yaml) nor a checkpoint (manifest.json) is here."])
    messages = config.check(cfg)  # it may come from a stranger: it is data, checked like any config
    if messages:
        raise config.ConfigError([f"config of {path}: {line}" for line in messages])
    return Source(stored, cfg, run)


def export(source: Source, out: Path, *, averaged: bool) -> int:
    """Write every frozen, tied and buffer tensor of the model and the objectives to one file; return their number.

    Raises:
        ConfigError: `averaged` is asked for where the run kept no average. StopRun: the file cannot be written, or does
            not give the outputs of the checkpoint; nothing is left then.
    """
    if averaged and not source.stored.under("ema"):
        raise config.ConfigError([f"--ema: {source.stored.path} holds no averaged weights; export without it."])
    system, module = filled(source.cfg, source.stored, averaged=averaged)
    expected = outputs(system, source.cfg)
    num_merged, cfg = low_rank.merge(module), source.cfg
    stated = source.stored.facts["config"]
    if num_merged:  # the file holds plain weights: it is of a model without adapters
        cfg, stated = copy.deepcopy(cfg), {**stated, "adapter": {}}
        cfg.adapter = {}
    facts = {"step": source.stored.step, "averaged": averaged, "config": stated}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    with _kept_if_good(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "vlp": json.dumps(facts)})
        again, _ = filled(cfg, File(temporary), averaged=False, ties=True)
        _compare(expected, outputs(again, cfg), out, exact=not num_merged)
    return len(tensors)


def export_parts(source: Source, out: Path, *, averaged: bool) -> list[str]:
    """Write each part that another library can read in that library's layout; return one line on each, how to use it.

    Raises:
        ConfigError: no part has such a layout. StopRun: as `export`.
    """
    system, module = filled(source.cfg, source.stored, averaged=averaged)
    low_rank.merge(module)
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        write(name, part, source, out)
        for name, part in system.model.named_children()
        for kind, write in _LAYOUTS.items()
        if isinstance(part, kind)
    ]
    if not lines:
        known = " and ".join(kind.__name__ for kind in _LAYOUTS)
        raise config.ConfigError([f"no part of this model has a layout of another library; {known} have one."])
    return lines


def export_clip(source: Source, out: Path, *, kind: str, averaged: bool) -> list[str]:
    """Write a folder that transformers' CLIPModel or open_clip loads; return the parts that it leaves out.

    Raises:
        ConfigError: a part that the layout cannot express. StopRun: the folder cannot be written, or its import does
            not give the tensors of the model.
    """
    system, module = filled(source.cfg, source.stored, averaged=averaged)
    low_rank.merge(module)
    made = clip_layouts.written(system.model, kind, source.cfg.model)
    with _kept_if_good(out) as temporary:
        temporary.mkdir()
        clip_layouts.save(made, temporary)
        found = published.import_file(temporary / made.weights, kind).tensors
        own = state.once(nn.ModuleDict({"model": system.model}))
        if found.keys() != own.keys() or not all(torch.equal(found[name], own[name]) for name in own):
            raise StopRun(Exit.BUG, f"{out}: its import is not the model that was exported; nothing was written.")
        _add_tokenizer(source, temporary)
    return [f"objective.{name}" for name, part in system.objectives.items() if any(True for _ in part.parameters())]


def _add_tokenizer(source: Source, folder: Path) -> None:
    """Copy the run's tokenizer, if it is a file, beside the weights that it belongs to."""
    tokenizer = source.cfg.tokenizer.name or str(source.run / "tokenizer.json")
    if Path(tokenizer).is_file():
        shutil.copy(tokenizer, folder / "tokenizer.json")


def filled(cfg: DictConfig, stored: state.Stored, *, averaged: bool, ties: bool = False) -> tuple[System, nn.Module]:
    """Build the system of a config and fill it; with `ties`, from a file that names a tied tensor more than once."""
    torch.manual_seed(1 if ties else 0)  # so that a tensor that is not filled is seen
    system = assemble(cfg)
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    twice = {f"model/{name}" for name in state.tied_names(module)} if ties else set()
    state.fill(module, _Without(stored, twice), averaged=averaged)
    return system, module.eval()


@torch.inference_mode()
def outputs(system: System, cfg: DictConfig) -> dict[str, Any]:
    """Return every node of the step's plan, and every objective's term, on a batch that the config describes."""
    torch.manual_seed(0)
    forward = ForwardPass(system.model, _batch(cfg), system.graph)
    results: dict[str, Any] = {
        f"objective {name}": system.objectives[name](*forward.roles(wiring)) for name, wiring in system.wirings.items()
    }
    return results | {
        str(step.node): forward.take(str(step.node)) for step in system.graph.plan(wanted(system.wirings))
    }


class _Without:
    """A state without some of its keys."""

    def __init__(self, stored: state.Stored, left_out: set[str]) -> None:
        self._stored, self._left_out = stored, left_out

    def keys(self) -> Iterable[str]:
        return set(self._stored.keys()) - self._left_out

    def get(self, key: str) -> Tensor:
        return self._stored.get(key)


def _batch(cfg: DictConfig) -> Batch:
    draw = torch.Generator().manual_seed(0)
    size, time, length = (cfg.clip.size, cfg.clip.width), cfg.clip.num_frames, cfg.tokenizer.max_length
    rows = (_NUM_CLIPS, length)
    return Batch(
        frames=torch.randint(0, 256, (_NUM_CLIPS, time, *size, 3), dtype=torch.uint8, generator=draw),
        frame_mask=torch.ones(_NUM_CLIPS, time, dtype=torch.bool),
        times_s=torch.arange(time).float().expand(_NUM_CLIPS, time),
        text_ids=torch.randint(0, cfg.tokenizer.vocab_size, rows, generator=draw),
        text_mask=torch.ones(rows, dtype=torch.bool),
        word_ids=torch.arange(length).expand(rows),
        **nothing_more(_NUM_CLIPS),
        valid=torch.ones(_NUM_CLIPS, dtype=torch.bool),
        status=torch.zeros(_NUM_CLIPS, dtype=torch.int64),
        sample_id=torch.arange(_NUM_CLIPS),
        key=torch.randint(0, 2**62, (_NUM_CLIPS,), generator=draw),
    )


def _compare(expected: Mapping[str, Any], actual: Mapping[str, Any], out: Path, *, exact: bool = True) -> None:
    same = torch.equal if exact else partial(torch.allclose, rtol=1e-4, atol=1e-4)
    for name, value in expected.items():
        pairs = zip(_tensors(value), _tensors(actual[name]), strict=True)
        if not all(same(one, two) for one, two in pairs):
            raise StopRun(Exit.BUG, f"{out}: '{name}' differs from what the checkpoint gives; nothing was written.")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def _kept_if_good(out: Path) -> Iterator[Path]:
    """Give a temporary place beside `out`, which takes its name if the block ends well and is gone otherwise."""
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise StopRun(Exit.CANNOT_CREATE, f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def _hugging_face(name: str, part: HuggingFaceText, source: Source, out: Path) -> str:
    """Write config, weights and the run's tokenizer as `from_pretrained` expects them."""
    section = source.cfg.tokenizer
    place = out / name
    with _kept_if_good(place) as temporary:
        part.model.save_pretrained(temporary, safe_serialization=True)
        _add_tokenizer(source, temporary)
        facts = {"vocab_size": section.vocab_size, "pad_id": section.pad_id, "max_length": section.max_length}
        again = HuggingFaceText(**facts, name=str(temporary))
        again.eval()
        batch = _batch(source.cfg)
        with torch.inference_mode():
            one, two = ({name: each(batch.text_ids, batch.text_mask)} for each in (part.eval(), again))
        _compare(one, two, place)
    return f"{name}: transformers' from_pretrained('{place}'); in a config text.name={place}"


def _timm(name: str, part: TimmFrames, source: Source, out: Path) -> str:
    """Write the weights of the image backbone under timm's names."""
    place = out / f"{name}.safetensors"
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in part.backbone.state_dict().items()}
    with _kept_if_good(place) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        _compare({name: list(tensors.values())}, {name: [File(temporary).get(key) for key in tensors]}, place)
    return f"{name}: timm's create_model(..., checkpoint_path='{place}'); in a config video.checkpoint_path={place}"


_LAYOUTS: Mapping[type, Callable[..., str]] = {HuggingFaceText: _hugging_face, TimmFrames: _timm}
