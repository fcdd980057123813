"""Evaluation of the model in training: the tasks of the config, on each source's test split."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlp import config, dist
from vlp.data.datamodule import VideoTextData
from vlp.eval.runner import EvalData, evaluate, flat_scores
from vlp.forward import Graph
from vlp.objectives.matching import Matching
from vlp.training.assemble import System
from vlp.training.module import Pretraining
from vlp.types import Batch


class Evaluator:
    """Runs the tasks that this system can be asked, with the averaged weights where there are any."""

    def __init__(
        self, system: System, nodes: Mapping[str, Any], data: VideoTextData, *, batch_size: int, directory: Path
    ) -> None:
        self.data, self.batch_size, self.directory = data, batch_size, directory
        self.is_stopping: Callable[[], Any] = lambda: None
        self.graph = Graph(system.model, fields=Batch._fields, views={})
        self.tasks = {name: config.build(node, f"eval.tasks.{name}") for name, node in nodes.items() if node}
        self.skipped = {
            name: why for name, task in self.tasks.items() if (why := _why_not(task, self.graph, system.trained))
        }
        self.tasks = {name: task for name, task in self.tasks.items() if name not in self.skipped}
        self.scorers: dict[str, Callable[..., Tensor]] = {
            name: part.score for name, part in system.objectives.items() if isinstance(part, Matching)
        }

    def __call__(self, module: Pretraining) -> dict[str, float]:
        """Evaluate on every source; write `eval/`, return the scores to be logged."""
        scores: dict[str, float] = {}
        with module.alone():
            for name in self.data.sources:
                result = evaluate(
                    module.model,
                    self.graph,
                    self.tasks,
                    self.eval_data(name),
                    step=module.cursor,
                    out_dir=self.directory / "eval",
                    device=module.device,
                    scorers=self.scorers,
                )
                scores |= flat_scores(result)
        return scores

    def eval_data(self, name: str) -> EvalData:
        """Return the test split of one source as the tasks want it."""
        data, reader, tokenizer = self.data, self.data.reader(name, "test"), self.data.tokenizer
        assert tokenizer.bos_id is not None
        return EvalData(
            source=name,
            split="test",
            trained_on_these=data.test_is_train(name),
            batches=lambda: data.test_loader(
                name, batch_size=self.batch_size, rank=dist.rank(), world_size=dist.world_size()
            ),
            meta=reader.meta,
            key_of=reader.key_of,
            encode=tokenizer.encode,
            decode=tokenizer.decode,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            max_length=tokenizer.max_length,
            num_clips=len(reader),
            batch_size=self.batch_size,
            is_stopping=self.is_stopping,
        )


def _why_not(task: Any, graph: Graph, trained: frozenset[str]) -> str:
    """Return why a task cannot be asked of this system, or ''."""
    try:
        used = {part for step in graph.plan(task.needs) for part in step.parts}
    except ValueError as error:
        return str(error)
    untrained = sorted(used - trained)
    return f"no objective trains '{untrained[0]}'" if untrained else ""
