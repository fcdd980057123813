"""Write a caption for a clip and compare it with the clip's own.

Axes: B clips.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from vlp.eval import caption_metrics, coco_captions, metrics
from vlp.eval.decoding import Greedy, Writer
from vlp.eval.runner import EvalData, Scorer, collect
from vlp.eval.scores import Each
from vlp.eval.writing import write
from vlp.forward import ForwardPass
from vlp.types import Batch

MAX_OTHERS = 8  # other clips whose references give the chance level
_SHOWN = {"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}

Texts = list[str]
References = list[list[str]]


class Written(NamedTuple):
    """The caption of one clip."""

    sample_id: int
    text: str


class Captions:
    """Captions against references: CIDEr, BLEU-4, ROUGE-L, exact match and token F1, in percent (CIDEr: times 100).

    The chance level is what the same captions score against the references of other clips: what wording alone earns.

    Args:
        num_clips: how many clips of the split to caption, evenly spaced; null for all.
        writer: vlp.eval.decoding.Greedy, Beam or Nucleus.
        min_length: tokens before a caption may end. max_length: tokens of a caption, the first and the last one
            included; never more than the texts trained on.
        java: score with the public COCO code, which starts Java: true for all of bleu, rouge_l, cider, meteor, spice,
            or a list of some; see vlp.eval.coco_captions. They are tried before anything is computed.
        num_examples: clips to show.
    """

    title = "Captions"
    borrows: ClassVar = ()
    needs: ClassVar = ("caption_logits",)

    def __init__(
        self,
        *,
        num_clips: int | None = 64,
        writer: Writer | None = None,
        min_length: int = 1,
        max_length: int = 32,
        java: bool | list[str] = False,
        num_examples: int = 6,
    ) -> None:
        if not 0 <= min_length < max_length - 1:
            raise ValueError(f"min_length={min_length} must be at least 0 and below max_length - 1 = {max_length - 1}.")
        self.java = coco_captions.ALL if java is True else tuple(java or ())
        if self.java and (why := coco_captions.why_not(self.java)):
            raise ValueError(f"java={java}: {why}; or set java=false for CIDEr, BLEU-4 and ROUGE-L in plain Python.")
        self.writer = writer or Greedy()
        self.num_clips, self.min_length, self.max_length = num_clips, min_length, max_length
        self.num_examples = num_examples

    def protocol(self) -> dict[str, Any]:
        return {
            "decoding": self.writer.protocol(),
            "length": f"{self.min_length} to {self.max_length} tokens",
            "clips": "all" if self.num_clips is None else f"{self.num_clips}, evenly spaced",
            "metrics": f"pycocoevalcap, tokenised in Java: {', '.join(self.java)}"
            if self.java
            else "vlp, tokenised in Python",
        }

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data = data
        self.written: list[Written] = []

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        wanted = self.data.num_clips if self.num_clips is None else self.num_clips
        chosen = batch.valid & (batch.sample_id * wanted % self.data.num_clips < wanted)  # [B]
        limits = {"min_new": self.min_length, "limit": self.max_length}
        texts = write(self.writer, forward, self.data, prompts=[""] * len(chosen), chosen=chosen, **limits)
        rows = zip(batch.sample_id.tolist(), texts, chosen.tolist(), strict=True)
        self.written += [Written(sample, text) for sample, text, own in rows if own]

    def finish(self) -> dict:
        written = sorted(one for part in collect(self.written) for one in part)
        if not written:
            return {"title": self.title, "rows": [], "examples": []}
        references = [self.data.meta(one.sample_id)["captions"] for one in written]
        texts, clips = [one.text for one in written], [one.sample_id for one in written]
        rows, each = [], {}
        for name, key, score in (("exact match", "caption_exact", exact), ("token F1", "caption_f1", token_f1)):
            values = [100 * best(score, text, own) for text, own in zip(texts, references, strict=True)]
            chance = _chance(score, texts, references)
            rows.append(metrics.row(name, key, raw=sum(values) / len(values), chance=chance, num=len(texts)))
            each[key] = Each(clips, [0] * len(clips), values)
        more_rows, more_each = self._corpus(texts, references, clips)
        rows, each = rows + more_rows, each | more_each
        right = torch.tensor([best(exact, text, own) == 1 for text, own in zip(texts, references, strict=True)])
        examples = [
            {"kind": "caption", "generated": texts[n], "references": references[n], "strip": written[n].sample_id}
            for n in metrics.mixed_sample(right, self.num_examples)
        ]
        return {"title": self.title, "rows": rows, "each": each, "examples": examples}

    def _corpus(self, texts: Texts, references: References, clips: list[int]) -> tuple[list[dict], dict[str, Each]]:
        score = partial(coco_captions.score, metrics=self.java) if self.java else caption_metrics.score
        found = score(texts, references)
        others = score(texts, references[1:] + references[:1]).corpus if len(texts) > 1 else {}
        rows, each = [], {}
        for name in (name for name in _SHOWN if name in found.corpus):
            chance = 100 * others[name] if others else None
            key, raw, unit = f"caption_{name}", 100 * found.corpus[name], "" if name == "cider" else "%"
            rows.append(metrics.row(_SHOWN[name], key, raw=raw, chance=chance, num=len(texts), unit=unit))
            if name != "bleu_4":  # a corpus score that is no mean of the captions'
                each[key] = Each(clips, [0] * len(clips), [100 * value for value in found.each[name]])
        return rows, each


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


def best(score: Callable[[str, str], float], text: str, references: Texts) -> float:
    """Return the score of a text with the reference that suits it most."""
    return max(score(text, reference) for reference in references)


def _percent(score: Callable[[str, str], float], texts: Texts, references: References) -> float:
    return 100 * sum(best(score, text, own) for text, own in zip(texts, references, strict=True)) / len(texts)


def _chance(score: Callable[[str, str], float], texts: Texts, references: References) -> float | None:
    shifts = range(1, min(len(texts), MAX_OTHERS + 1))
    scores = [_percent(score, texts, references[shift:] + references[:shift]) for shift in shifts]
    return sum(scores) / len(scores) if scores else None
