"""How well any text fits any clip of a split, by a head that reads both together.

    clips --what `fused_text` reads and no text changes, computed once--> kept on the CPU, by sample id
    N pairs (text, clip) --forward passes of one shape, shared by the ranks--> scores [N]

Axes: N pairs, B pairs of a forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.eval.runner import EvalData, everyone, with_texts
from vlp.forward import ForwardPass, Graph, Node
from vlp.types import Batch

_TEXT = {"text_ids", "text_mask", "word_ids"}


class Pairs:
    """The clips of a split, and the score of any text with any of them.

    Args:
        data: the split. score: takes a pass over B texts and B clips, returns [B].
    """

    def __init__(self, data: EvalData, score: Callable[[ForwardPass], Tensor]) -> None:
        self.data, self.score = data, score
        self.kept: dict[int, list[tuple[Tensor, ...]]] = {}  # sample id -> the fields of each node
        self.layout: list[Callable[..., Any]] = []  # what puts the fields of a node together
        self.last: ForwardPass | None = None
        self.is_shared = False

    def keep(self, batch: Batch, forward: ForwardPass, rows: Sequence[int]) -> None:
        """Keep what the score needs of these rows; every rank calls it for each of its batches."""
        self.last, self.layout = forward, []
        columns = []
        for node in _without_text(forward.graph):
            value = forward.take(str(node))
            is_one = isinstance(value, Tensor)
            self.layout.append((lambda tensor: tensor) if is_one else type(value))
            columns.append([field.cpu() for field in ([value] if is_one else value)])
        for row in rows:
            self.kept[int(batch.sample_id[row])] = [tuple(field[row] for field in fields) for fields in columns]

    def scores(self, texts: Sequence[str], clips: Sequence[int]) -> Tensor:
        """Return the scores [N] float32 of texts with the clips of these sample ids; all ranks call it alike."""
        if not self.is_shared and dist.world_size() > 1:
            self.kept = {clip: fields for own in everyone(self.kept) for clip, fields in own.items()}
        self.is_shared = True
        mine = range(dist.rank(), len(texts), dist.world_size())
        size, found = self.data.batch_size, []
        for start in range(0, -(-len(texts) // dist.world_size()), size):  # as many passes on every rank
            places = mine[start : start + size]
            found.append((list(places), self._scored(texts, clips, places or range(1))[: len(places)]))
        scores = torch.zeros(len(texts))
        for places, part in (each for own in everyone(found) for each in own):
            scores[places] = part
        return scores

    def _scored(self, texts: Sequence[str], clips: Sequence[int], places: Sequence[int]) -> Tensor:
        """Return the scores of up to B pairs, on the CPU; the batch is filled up with the last one."""
        assert self.last is not None, "a split without batches has no pairs"
        padded = [*places, *[places[-1]] * (self.data.batch_size - len(places))]
        here = with_texts(self.last, self.data, [texts[place] for place in padded])
        device = here.fields["text_ids"].device
        chosen = [self.kept[clips[place]] for place in padded]
        nodes = _without_text(here.graph)
        for node, whole, rows in zip(nodes, self.layout, zip(*chosen, strict=True), strict=True):
            here.values[node] = whole(*(torch.stack(field).to(device) for field in zip(*rows, strict=True)))
        return self.score(here).float().cpu()


def _without_text(graph: Graph) -> list[Node]:
    """Return what the fusion of a pair reads that no text changes, such as the encoded video."""
    steps = graph.plan(["fused_text"])
    textual = {step.node for step in steps if graph.reads(step.node) & _TEXT}
    return sorted({need for step in steps if step.node in textual for need in step.needs} - textual)
