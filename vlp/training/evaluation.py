"""Evaluation of a model: the tasks of the config, on each source's test split, with a protocol card."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
from omegaconf import DictConfig
from torch import nn

from vlp import config, dist
from vlp.data.datamodule import VideoTextData
from vlp.data.outage import Announcer, Outage, patiently
from vlp.data.splits import EvaluationSplits
from vlp.data.storage import OutageError
from vlp.eval.runner import EvalData, evaluate, flat_scores, give_up, keep_up
from vlp.forward import Graph
from vlp.objectives.answers import AnswerClasses
from vlp.objectives.choice import MultipleChoice
from vlp.objectives.choice_matching import ChoiceMatching
from vlp.objectives.masked_words import MaskedWords
from vlp.objectives.matching import Matching
from vlp.training.assemble import System, plain
from vlp.training.module import Pretraining
from vlp.types import Batch

_LENDERS = (Matching, ChoiceMatching, AnswerClasses, MultipleChoice, MaskedWords)


class Evaluator:
    """Runs the tasks that this system can be asked.

    Args:
        system: what is evaluated. cfg: its config. data: the test splits. directory: of the run.
        subject: what else a protocol card says of what is scored, such as the digest of its checkpoint.
        views: how often each clip of `data` is looked at, see `vlp.data.many_views`; None once.
    """

    def __init__(
        self,
        system: System,
        cfg: DictConfig,
        data: VideoTextData | EvaluationSplits,
        *,
        directory: Path,
        subject: Mapping[str, Any] = {},
        views: str | None = None,
    ) -> None:
        self.cfg, self.data, self.directory, self.subject = cfg, data, directory, dict(subject)
        self.views = views
        self.is_stopping: Callable[[], Any] = lambda: None
        self.marks: dict[str, str] = {}  # source -> what sets its scores apart from a published protocol
        self.graph = Graph(system.model, fields=Batch._fields, views={})
        nodes = plain(cfg.eval.tasks)
        self.tasks = {name: config.build(node, f"eval.tasks.{name}") for name, node in nodes.items() if node}
        self.scorers: dict[str, Any] = {
            name: part.score for name, part in system.objectives.items() if isinstance(part, _LENDERS)
        }
        self.skipped = {
            name: why
            for name, task in self.tasks.items()
            if (why := _why_not(task, self.graph, system.trained, self.scorers) or self._why_once(task))
        }
        self.tasks = {name: task for name, task in self.tasks.items() if name not in self.skipped}

    def __call__(self, module: Pretraining) -> dict[str, float]:
        """Evaluate a module in training, with the averaged weights where there are any; return scores to be logged."""
        with module.alone():
            return self.evaluate(module.model, step=module.cursor, device=module.device)

    def evaluate(self, model: nn.Module, *, step: int, device: torch.device | str) -> dict[str, float]:
        """Evaluate on every source; write `eval/` and `scores/`."""
        scores: dict[str, float] = {}
        for name in self.data.sources:
            data = self.eval_data(name, step=step, device=device)
            result = evaluate(
                model,
                self.graph,
                self.tasks,
                data,
                step=step,
                out_dir=self.directory / "eval",
                device=device,
                scorers=self.scorers,
            )
            scores |= flat_scores(result)
        return scores

    def eval_data(self, name: str, *, step: int = 0, device: torch.device | str = "cpu") -> EvalData:
        """Return the test split of one source as the tasks want it; the ranks meet on `device`."""
        data, reader, tokenizer = self.data, self.data.reader(name, "test"), self.data.tokenizer
        assert tokenizer.bos_id is not None
        size, announce = self.cfg.eval.batch_size, Announcer()

        def wait(outage: Outage | None) -> None:
            announce(outage)
            keep_up(self.is_stopping, device)

        def meta(sample: int) -> dict[str, Any]:
            return patiently(partial(reader.meta, sample), limit_s=reader.outage_s, tell=announce)

        def batches() -> Iterator[Batch]:
            ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
            try:
                yield from data.test_loader(name, batch_size=size, **ranks, waiting=wait)
            except OutageError as error:
                give_up(str(error), device)

        return EvalData(
            source=name,
            split="test",
            trained_on_these=data.test_is_train(name),
            batches=batches,
            meta=meta,
            key_of=reader.key_of,
            encode=partial(tokenizer.encode, multiple_of=tokenizer.max_length),  # one length, see vlp.eval.runner
            decode=tokenizer.decode,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            mask_id=tokenizer.mask_id,
            max_length=tokenizer.max_length,
            num_clips=len(reader),
            batch_size=size,
            is_stopping=self.is_stopping,
            num_frames=reader.shape[0],
            card={"protocol": self._protocol(reader.fingerprint, name), "subject": self._subject(step)},
            embeddings=self.directory / "embeddings" / f"step-{step:06d}.{name}.safetensors",
        )

    def _why_once(self, task: Any) -> str:
        """Return why a task cannot look at a clip several times, or ''."""
        for name in task.needs if self.views else ():
            todo, seen = [self.graph.node(name)], set()
            while todo:
                node = todo.pop()
                if node.name == "frames":
                    return f"views are averaged in 'video_embed', and it takes '{name}'"
                if node.name != "video_embed" and node not in seen:
                    seen.add(node)
                    todo += [need for need in self.graph.needs(node) if need is not None]
        return ""

    def _protocol(self, fingerprint: str, name: str) -> dict[str, Any]:
        clip = self.cfg.clip
        return {
            "source": name,
            "split": "test",
            "split_hash": fingerprint,
            "frames": clip.num_frames,
            "sampling": plain(clip.sampling_test),
            "crop": plain(clip.transforms_test),
            "resolution": clip.size,
            "short_side": clip.short_side,
            **({} if clip.modality == "video" else {"modality": clip.modality}),
            "views": f"{self.views} (clips x crops), mean of their scores" if self.views else "one clip, one crop",
            "decoder": f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}",
            **({"mark": self.marks[name]} if name in self.marks else {}),
        }

    def _subject(self, step: int) -> dict[str, Any]:
        text = self.data.tokenizer.to_json().encode()
        return {
            "run": self.cfg.run.name,
            "step": step,
            "seed": self.cfg.run.seed,
            "tokenizer": hashlib.sha256(text).hexdigest(),
            "max_text_tokens": self.data.tokenizer.max_length,
            "torch": torch.__version__,
            "checkpoint": "in training",
            **self.subject,
        }


def _why_not(task: Any, graph: Graph, trained: frozenset[str], scorers: Mapping[str, Any]) -> str:
    """Return why a task cannot be asked of this system, or ''."""
    absent = sorted(set(task.borrows) - scorers.keys())
    if absent:
        return f"there is no objective '{absent[0]}'"
    try:
        used = {part for step in graph.plan(task.needs) for part in step.parts}
    except ValueError as error:
        return str(error)
    untrained = sorted(used - trained)
    return f"no objective trains '{untrained[0]}'" if untrained else ""
