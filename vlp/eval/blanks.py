"""Fill in the blank: which word is missing, by the head that was trained on masked words.

    "a red ___ moves left" --as many mask tokens as a candidate has pieces--> mean log-probability of its pieces

Axes: B clips, L text length, V vocabulary, N pieces of a candidate, A candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlp import dist
from vlp.eval.questions import Asked, right_or_wrong
from vlp.eval.runner import EvalData, Scorer
from vlp.forward import ForwardPass
from vlp.types import Batch

BLANK = "_____"


class FillBlank:
    """Accuracy of the likeliest candidate; every clip is asked for each of its blanks.

    Args:
        candidates: the words to choose from.
        field: of the record, a list of {"text": with _____, "answer": a candidate}; null makes one blank a clip:
            the last word of its first caption that is a candidate.
    """

    title = "Fill in the blank"
    needs: ClassVar = ("fused_text",)
    borrows: ClassVar = ("masked_words",)

    def __init__(self, *, candidates: Sequence[str], field: str | None = "blanks", num_examples: int = 6) -> None:
        if len(set(candidates)) < 2:
            raise ValueError("candidates must hold at least two different words.")
        self.candidates, self.field, self.num_examples = list(dict.fromkeys(candidates)), field, num_examples

    def protocol(self) -> dict[str, Any]:
        made = f"field '{self.field}'" if self.field else "last candidate word of the first caption"
        return {"by": "mean log-probability of pieces", "blanks": made, "candidates": self.candidates, "ties": "wrong"}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.head = data, scorers["masked_words"]
        self.asked: list[Asked] = []
        self.pieces: dict[int, list[tuple[int, list[int]]]] = {}  # number of pieces -> (candidate, its ids)
        ids, mask, _ = data.encode(self.candidates)
        for place, (row, real) in enumerate(zip(ids, mask, strict=True)):
            own = row[real].tolist()[1:-1]
            self.pieces.setdefault(len(own), []).append((place, own))

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
        own = [self._blanks(sample) if valid else [] for sample, valid in rows]
        for number in range(int(dist.max_over_ranks(torch.tensor(max(map(len, own)))))):
            asked = [row[number] if number < len(row) else None for row in own]
            scores = self._scores(forward, [one["text"] if one else "" for one in asked])  # [B, A]
            for row, one in enumerate(asked):
                if one is not None:
                    self._note(int(batch.sample_id[row]), number, one, scores[row])

    def finish(self) -> dict:
        return right_or_wrong(self.title, "accuracy", "blank_accuracy", self.asked, self.num_examples)

    def _note(self, sample: int, number: int, one: dict, scores: Tensor) -> None:
        if one["answer"] not in self.candidates:
            raise ValueError(f"clip '{self.data.key_of(sample)}': {one['answer']!r} is none of the candidates.")
        right = self.candidates.index(one["answer"])
        correct = bool((scores[right] >= scores).all() and (scores == scores[right]).sum() == 1)
        given = self.candidates[int(scores.argmax())]
        chance = 1 / len(self.candidates)
        self.asked.append(Asked(sample, number, correct, chance, one["text"], given, one["answer"]))

    def _blanks(self, sample: int) -> list[dict]:
        meta = self.data.meta(sample)
        if self.field is not None:
            return meta.get(self.field) or []
        words = meta["captions"][0].split()
        places = [place for place, word in enumerate(words) if word.strip(".,") in self.candidates]
        if not places:
            return []
        answer = words[places[-1]].strip(".,")
        return [{"text": " ".join([*words[: places[-1]], BLANK, *words[places[-1] + 1 :]]), "answer": answer}]

    def _scores(self, forward: ForwardPass, texts: list[str]) -> Tensor:
        """Return the score [B, A] of each candidate in the blank of each text; one pass for each number of pieces."""
        found = torch.full((len(texts), len(self.candidates)), -torch.inf, dtype=torch.float64)
        for count, candidates in sorted(self.pieces.items()):
            ids, mask, places = self._masked(texts, count)
            device = forward.fields["text_ids"].device
            here = forward.with_fields(text_ids=ids.to(device), text_mask=mask.to(device))
            tokens = here.take("fused_text")
            at = tokens.x[torch.arange(len(texts), device=device)[:, None], places.to(device)]  # [B, N, D]
            log_share = self.head(tokens._replace(x=at)).double().log_softmax(-1).cpu()  # [B, N, V]
            for place, pieces in candidates:
                found[:, place] = log_share[:, torch.arange(count), torch.tensor(pieces)].mean(1)
        return found

    def _masked(self, texts: list[str], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask [B, L] with `count` mask tokens in the blank, and their places [B, N]."""
        assert self.data.mask_id is not None
        before, before_mask, _ = self.data.encode([text.partition(BLANK)[0] for text in texts])
        after, after_mask, _ = self.data.encode([text.partition(BLANK)[2] for text in texts])
        ids = torch.full_like(before, self.data.pad_id)
        places = torch.zeros(len(texts), count, dtype=torch.int64)
        mask = torch.zeros_like(before, dtype=torch.bool)
        for row in range(len(texts)):
            front, back = before[row][before_mask[row]].tolist()[:-1], after[row][after_mask[row]].tolist()[1:]
            front = front[: ids.shape[1] - count - 1]  # the blank itself is never cut off
            tokens = [*front, *[self.data.mask_id] * count, *back][: ids.shape[1]]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
            places[row] = len(front) + torch.arange(count)
        return ids, mask, places
