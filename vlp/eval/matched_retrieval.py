"""Retrieval for models without embeddings: every caption is read together with every clip.

    clips --kept by vlp.eval.pairs--> logits of all pairs [Q, V] --> ranks of both directions

The cost grows with the square of the number of clips, so only the first ones are asked for.

Axes: Q captions, V clips.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.eval import metrics
from vlp.eval.pairs import Pairs
from vlp.eval.questions import ByScorer, OptionScore
from vlp.eval.retrieval import direction, each_of
from vlp.eval.runner import EvalData, Scorer, everyone
from vlp.forward import ForwardPass
from vlp.types import Batch

_CLIPS_AT_ONCE = 64  # whose row of the matrix is scored in one go, so that the lists stay short


class MatchedRetrieval:
    """Recall, median and mean rank by the logit of a head over text and video together.

    Args:
        by: how a pair is scored; null takes the head "matching".
        num_clips: the first clips of the split, which are searched. max_captions: of a clip, the first ones; null all.
    """

    title = "Text-video retrieval by matching"

    def __init__(self, *, by: OptionScore | None = None, num_clips: int = 1000, max_captions: int | None = 1) -> None:
        if num_clips < 1 or (max_captions is not None and max_captions < 1):
            raise ValueError(f"num_clips={num_clips} must be at least 1, max_captions={max_captions} too, or null.")
        self.by: OptionScore = ByScorer() if by is None else by
        self.num_clips, self.max_captions = num_clips, max_captions
        self.needs, self.borrows = self.by.needs, self.by.borrows

    def protocol(self) -> dict[str, Any]:
        chosen = "all" if self.max_captions is None else f"first {self.max_captions}"
        return {
            "captions": chosen,
            "searched": f"first {self.num_clips} clips",
            "by": self.by.protocol(),
            "ties": "lost",
        }

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.clips = data, list[int]()
        self.pairs = Pairs(data, lambda forward: self.by(forward, scorers))

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        ids, valid = batch.sample_id.tolist(), batch.valid.tolist()
        rows = [row for row, sample in enumerate(ids) if valid[row] and sample < self.num_clips]
        self.clips += [ids[row] for row in rows]
        self.pairs.keep(batch, forward, rows)

    def finish(self) -> dict:
        clips = sorted(clip for own in everyone(self.clips) for clip in own)
        if not clips:
            return {"title": self.title, "rows": [], "examples": []}
        captions = [self.data.meta(clip)["captions"][: self.max_captions] for clip in clips]
        owner = torch.tensor([place for place, own in enumerate(captions) for _ in own])  # [Q]
        logits = self._logits([text for own in captions for text in own], clips)  # [Q, V]
        if dist.rank():
            return {"title": self.title, "rows": [], "examples": []}
        of_texts = metrics.ranks(logits, owner)
        of_clips = metrics.ranks(metrics.group_max(logits.T, owner, len(clips)), torch.arange(len(clips)))
        numbers = [number for own in captions for number in range(len(own))]
        owners = [clips[place] for place in owner.tolist()]
        rows = direction("text-to-video by matching,", "t2v_matching", of_texts, None, len(clips))
        rows += direction("video-to-text by matching,", "v2t_matching", of_clips, None, len(clips))
        each = dict(each_of("t2v_matching", owners, numbers, of_texts))
        each |= dict(each_of("v2t_matching", clips, [0] * len(clips), of_clips))
        return {"title": self.title, "rows": rows, "each": each, "examples": []}

    def _logits(self, texts: list[str], clips: list[int]) -> Tensor:
        """Return the score of every text with every clip, [Q, V]."""
        parts = []
        for start in range(0, len(clips), _CLIPS_AT_ONCE):
            own = clips[start : start + _CLIPS_AT_ONCE]
            scores = self.pairs.scores([text for _ in own for text in texts], [clip for clip in own for _ in texts])
            parts.append(scores.view(len(own), len(texts)))
        return torch.cat(parts).T
