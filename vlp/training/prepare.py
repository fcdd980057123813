"""What must be there before the first step: shards, a tokenizer, fitted codebooks. None of it inside a collective."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlp import config
from vlp.data import storage
from vlp.data.datamodule import VideoTextData
from vlp.data.fields import ShardsError
from vlp.data.text import Tokenizer, load_tokenizer, train_tokenizer
from vlp.training.assemble import build_part
from vlp.training.exits import Exit, StopRun
from vlp.types import Reason


@runtime_checkable
class Fitted(Protocol):
    """A part that is fitted on training frames before the first step, such as a codebook."""

    fitted: Tensor

    def fit(self, frames: Iterable[Tensor], *, seed: int) -> None:
        """Take uint8 clips [B, T, H, W, 3]."""
        ...


def sources(cfg: DictConfig) -> dict[str, Any]:
    """Build and prepare the sources of the config; makes shards and indexes where they are missing.

    Raises:
        config.ConfigError: what the user must change, one line a source.
        ShardsError: shards are missing or damaged; a line each.
    """
    built, messages, damaged = {}, [], []
    for name, node in cfg.data.sources.items():
        try:
            built[name] = build_part(node, f"data.sources.{name}")
            built[name].prepare()
        except config.ConfigError as error:
            messages += error.messages
        except ShardsError as error:
            damaged.append(f"data.sources.{name}: {error}")
        except ValueError as error:
            messages.append(f"data.sources.{name}: {error}")
    if messages:
        raise config.ConfigError([*messages, *damaged])
    if damaged:
        raise ShardsError("\n".join(damaged))
    return built


def tokenizer(cfg: DictConfig, directory: Path, captions: Iterable[str]) -> Tokenizer:
    """Load the configured tokenizer, or train one on the captions at first use and keep it with the run.

    Raises:
        config.ConfigError: its special tokens differ from those that the config states.
    """
    section = cfg.tokenizer
    name = section.name
    if name is None:
        path = directory / "tokenizer.json"
        with storage.locked(str(directory / "prepare.lock")):
            if not path.exists():
                train_tokenizer(captions, vocab_size=section.vocab_size, path=path)
        name = str(path)
    loaded = load_tokenizer(name, revision=section.revision, max_length=section.max_length)
    stated = {key: section[key] for key in ("pad_id", "bos_id", "eos_id", "mask_id")}
    wrong = [
        f"tokenizer.{k}: the config says {v}, '{name}' has {getattr(loaded, k)}; set it to that."
        for k, v in stated.items()
        if v != getattr(loaded, k)
    ]
    if loaded.vocab_size > section.vocab_size:
        wrong.append(f"tokenizer.vocab_size: {section.vocab_size} is below the {loaded.vocab_size} tokens of '{name}'.")
    if wrong:
        raise config.ConfigError(wrong)
    return loaded


def fit_parts(module: nn.Module, data: VideoTextData, directory: Path, *, seed: int, num_clips: int = 256) -> list[str]:
    """Fit every part that needs it on frames of the training clips; the first process fits, the others read its result.

    Returns:
        the names of the fitted parts.
    """
    waiting = {
        name: part for name, part in module.named_modules() if isinstance(part, Fitted) and not bool(part.fitted)
    }
    for name, part in waiting.items():
        assert isinstance(part, nn.Module)
        path = directory / f"fitted-{name}.safetensors"
        with storage.locked(str(directory / "prepare.lock")):
            if not path.exists():
                part.fit(_frames(data, num_clips), seed=seed)
                save_file(dict(part.state_dict()), path)
        part.load_state_dict(load_file(path))
    return list(waiting)


def _frames(data: VideoTextData, num_clips: int) -> Iterator[Tensor]:
    """Yield training frames in the order of the first epoch. Raises StopRun if no clip can be used."""
    seen, lost = 0, Counter[str]()
    loader = data.train_loader(start_step=0, num_steps=-(-num_clips // data.batch_size), rank=0, world_size=1)
    for step in loader:
        for micro in step.batches:
            lost.update(Reason(status).name.lower() for status in micro.status[~micro.valid].tolist())
            if micro.valid.any():
                yield micro.frames[micro.valid]
        seen += data.batch_size
        if seen >= num_clips:
            break
    if lost.total() == seen:
        reasons = ", ".join(f"{name}={count}" for name, count in lost.items())
        raise StopRun(
            Exit.DATA_BUDGET,
            f"none of the first {seen} training samples can be used ({reasons}); check the shards with "
            "python -m vlp.data.index --check.",
        )
