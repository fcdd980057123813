"""Write a caption for a clip and compare it with the clip's own.

Axes: B clips, L text length, V vocabulary.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlp import dist
from vlp.eval import metrics
from vlp.eval.runner import EvalData, Scorer, collect
from vlp.forward import ForwardPass
from vlp.types import Batch

MAX_OTHERS = 8  # other clips whose references give the chance level


class Written(NamedTuple):
    """The caption of one clip."""

    sample_id: int
    text: str


class Captions:
    """Greedy captions: exact match and token F1, each with the best of the clip's references, in percent.

    The chance level is what the same captions score against the references of other clips: what wording alone earns.

    Args:
        num_clips: how many clips of the split to caption, evenly spaced, since each token costs a pass of the decoder.
        max_length: tokens of a caption, the first and the last one included; never more than the texts trained on.
        num_examples: clips to show.
    """

    title = "Captions"
    needs: ClassVar = ("caption_logits",)

    def __init__(self, *, num_clips: int = 64, max_length: int = 32, num_examples: int = 6) -> None:
        self.num_clips, self.max_length, self.num_examples = num_clips, max_length, num_examples

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data = data
        self.written: list[Written] = []

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        chosen = batch.valid & (batch.sample_id * self.num_clips % self.data.num_clips < self.num_clips)  # [B]
        ids = self._greedy(forward, chosen).cpu()  # [B, L]
        for row in chosen.nonzero()[:, 0].tolist():
            self.written.append(Written(int(batch.sample_id[row]), self._text(ids[row])))

    def finish(self) -> dict:
        written = sorted(one for part in collect(self.written) for one in part)
        if not written:
            return {"title": self.title, "rows": [], "examples": []}
        references = [self.data.meta(one.sample_id)["captions"] for one in written]
        texts = [one.text for one in written]
        rows = [
            metrics.row(
                name,
                key,
                raw=_percent(score, texts, references),
                chance=_chance(score, texts, references),
                num=len(texts),
            )
            for name, key, score in (("exact match", "caption_exact", exact), ("token F1", "caption_f1", token_f1))
        ]
        right = torch.tensor([best(exact, text, own) == 1 for text, own in zip(texts, references, strict=True)])
        examples = [
            {"kind": "caption", "generated": texts[n], "references": references[n], "strip": written[n].sample_id}
            for n in metrics.mixed_sample(right, self.num_examples)
        ]
        return {"title": self.title, "rows": rows, "examples": examples}

    def _greedy(self, forward: ForwardPass, chosen: Tensor) -> Tensor:
        """Return the likeliest tokens [B, L], one by one, until the `chosen` [B] rows of all ranks have ended."""
        like = forward.fields["text_ids"]
        ids = like.new_full((len(like), 1), self.data.bos_id)
        running = chosen.to(like.device)
        limit = min(self.max_length, self.data.max_length)
        while ids.shape[1] < limit and dist.max_over_ranks(running.any().long()):
            real = torch.ones_like(ids, dtype=torch.bool)
            here = forward.with_fields(text_ids=ids, text_mask=real, word_ids=torch.zeros_like(ids))
            token = here.take("caption_logits")[:, -1].argmax(-1)  # [B]
            ids = torch.cat([ids, token[:, None]], dim=1)
            running = running & (token != self.data.eos_id)
        return ids[:, 1:]

    def _text(self, ids: Tensor) -> str:
        """Return the text of ids [L] up to the first end token."""
        ends = (ids == self.data.eos_id).nonzero()[:, 0].tolist()
        kept = ids[: ends[0]] if ends else ids
        return self.data.decode(kept[None])[0] if len(kept) else ""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def exact(text: str, reference: str) -> float:
    """Return 1 if both have the same words, and any, else 0."""
    return float(bool(words(text)) and words(text) == words(reference))


def token_f1(text: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of words, repeated ones counted as often as both have them."""
    ours, theirs = Counter(words(text)), Counter(words(reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def best(score: Callable[[str, str], float], text: str, references: list[str]) -> float:
    """Return the score of a text with the reference that suits it most."""
    return max(score(text, reference) for reference in references)


def _percent(score: Callable[[str, str], float], texts: list[str], references: list[list[str]]) -> float:
    return 100 * sum(best(score, text, own) for text, own in zip(texts, references, strict=True)) / len(texts)


def _chance(score: Callable[[str, str], float], texts: list[str], references: list[list[str]]) -> float | None:
    shifts = range(1, min(len(texts), MAX_OTHERS + 1))
    scores = [_percent(score, texts, references[shift:] + references[:shift]) for shift in shifts]
    return sum(scores) / len(scores) if scores else None
