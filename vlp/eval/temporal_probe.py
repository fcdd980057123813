"""Tell a caption from one that differs only in what happens over time: "left, then up" from "up, then left".

Axes: B clips, N clips with a hard negative, W ways to score.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlp.eval import metrics
from vlp.eval.questions import ByCosine, ByScorer, OptionScore
from vlp.eval.runner import EvalData, Scorer, collect, with_texts
from vlp.eval.scores import Each
from vlp.forward import ForwardPass
from vlp.types import Batch

_NAMES = {  # by whether a head is borrowed
    False: ("accuracy by cosine", "temporal_accuracy"),
    True: ("accuracy by matching", "temporal_accuracy_matching"),
}


class TemporalProbe:
    """Share of clips whose caption scores strictly higher than its hard negative; a tie is wrong, chance is 50 %.

    Clips without a hard negative are left out. A "matching" scorer, lent by its objective, adds a second row.

    Args:
        by: the only way to score, for models without embeddings; null scores by the cosine, and by matching if it can.
        num_examples: clips to show.
    """

    title = "Order of events"

    def __init__(self, *, by: OptionScore | None = None, num_examples: int = 6) -> None:
        self.by, self.num_examples = by, num_examples
        cosine = ByCosine()
        self.needs: tuple[str, ...] = (by or cosine).needs
        self.borrows: tuple[str, ...] = (by or cosine).borrows

    def protocol(self) -> dict[str, Any]:
        ways = {} if self.by is None else {"by": self.by.protocol()}
        return {"ties": "wrong", "negatives": "hard_negative of the record", **ways}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.scorers = data, scorers
        both = [ByCosine(), *([ByScorer()] if "matching" in scorers else [])]
        self.ways: list[OptionScore] = both if self.by is None else [self.by]
        self.ids: list[Tensor] = []  # each [N] int64
        self.scores: list[Tensor] = []  # each [N, W, 2] float32: of the caption and of its negative

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
        negatives = [self.data.meta(sample).get("hard_negative") if valid else None for sample, valid in rows]
        # Scored even if no clip here has a negative: all ranks must take the same nodes.
        other = with_texts(forward, self.data, [negative or "" for negative in negatives])
        scores = torch.stack([self._scores(forward), self._scores(other)], dim=-1)  # [B, W, 2]
        exists = torch.tensor([bool(negative) for negative in negatives])
        self.ids.append(batch.sample_id[exists])
        self.scores.append(scores[exists])

    def finish(self) -> dict:
        parts = collect((torch.cat(self.ids), torch.cat(self.scores)))
        if not sum(len(ids) for ids, _ in parts):
            return {"title": self.title, "rows": [], "examples": []}
        ids, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        order = ids.argsort()
        ids, scores = ids[order], scores[order]
        correct = scores[..., 0] > scores[..., 1]  # [N, W]
        names = [_NAMES[bool(way.borrows)] for way in self.ways]
        rows = [
            metrics.row(name, key, raw=metrics.share(column), chance=50.0, num=len(ids))
            for (name, key), column in zip(names, correct.unbind(1), strict=False)
        ]
        each = {
            key: Each(ids.tolist(), [0] * len(ids), (100.0 * column).tolist())
            for (_, key), column in zip(names, correct.unbind(1), strict=False)
        }
        examples = self._examples(ids, scores[:, 0], correct[:, 0])
        return {"title": self.title, "rows": rows, "each": each, "examples": examples}

    def _scores(self, forward: ForwardPass) -> Tensor:
        """Return [B, W] on the CPU: the cosine, and the logit of matching if there is one."""
        return torch.stack([way(forward, self.scorers).float() for way in self.ways], dim=1).cpu()

    def _examples(self, ids: Tensor, scores: Tensor, correct: Tensor) -> list[dict]:
        examples = []
        for place in metrics.mixed_sample(correct, self.num_examples):
            meta = self.data.meta(int(ids[place]))
            score, negative_score = (metrics.shown(value) for value in scores[place])
            texts = {"kind": "choice", "caption": meta["captions"][0], "negative": meta["hard_negative"]}
            verdict = {"score": score, "negative_score": negative_score, "correct": bool(correct[place])}
            examples.append({**texts, **verdict, "strip": int(ids[place])})
        return examples
