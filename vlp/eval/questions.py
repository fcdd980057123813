"""Questions about clips: which option is right, which word is missing, what is the answer.

How an option is scored is a part of its own (`ByCosine`, `ByScorer`, `ByLikelihood`), and so is how an answer is found
(`ByVocabulary`, `ByWriting`).

Axes: B clips, L text length, V vocabulary, A answers, O options.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlp import dist
from vlp.eval import answers, metrics
from vlp.eval.decoding import Greedy, Writer
from vlp.eval.runner import EvalData, Scorer, collect, with_texts
from vlp.eval.scores import Each
from vlp.eval.writing import write
from vlp.forward import ForwardPass
from vlp.types import Batch


class Asked(NamedTuple):
    """One question with what the model made of it."""

    sample_id: int
    number: int  # which question of the clip
    correct: bool
    chance: float  # share of right guesses
    question: str
    given: str
    right: str


class OptionScore(Protocol):
    """Scores a text for each clip of a batch; built from config."""

    needs: tuple[str, ...]
    borrows: tuple[str, ...]  # scorers that objectives must lend
    name: str  # in a word or two

    def protocol(self) -> str: ...

    def __call__(self, forward: ForwardPass, scorers: Mapping[str, Scorer]) -> Tensor:
        """Return the score [B] of the pass's texts for its clips; higher is better."""
        ...


class ByCosine:
    """The cosine of text and video."""

    needs: tuple[str, ...] = ("video_embed", "text_embed")
    borrows: tuple[str, ...] = ()
    name = "cosine"

    def protocol(self) -> str:
        return "cosine of question and option with the video"

    def __call__(self, forward: ForwardPass, scorers: Mapping[str, Scorer]) -> Tensor:
        return (forward.take("video_embed").float() * forward.take("text_embed").float()).sum(-1)


class ByScorer:
    """The logit of a head that an objective lends: "matching", or "choice", which was trained to choose."""

    needs: tuple[str, ...] = ("fused_text",)

    def __init__(self, *, scorer: str = "matching") -> None:
        self.borrows: tuple[str, ...] = (scorer,)
        self.name = scorer

    def protocol(self) -> str:
        return f"logit of the '{self.borrows[0]}' head"

    def __call__(self, forward: ForwardPass, scorers: Mapping[str, Scorer]) -> Tensor:
        return scorers[self.borrows[0]](forward.take("fused_text")).float()


class ByLikelihood:
    """The log-likelihood of the text under the caption decoder, per token or in all."""

    needs = ("caption_logits",)
    borrows = ()

    def __init__(self, *, per_token: bool = True) -> None:
        self.per_token = per_token
        self.name = f"likelihood {'per token' if per_token else 'in all'}"

    def protocol(self) -> str:
        return f"caption log-likelihood {'per token' if self.per_token else 'in all'}"

    def __call__(self, forward: ForwardPass, scorers: Mapping[str, Scorer]) -> Tensor:
        log_share = forward.take("caption_logits")[:, :-1].double().log_softmax(-1)  # [B, L - 1, V]
        ids, mask = forward.fields["text_ids"][:, 1:], forward.fields["text_mask"][:, 1:]
        total = (log_share.gather(-1, ids[..., None])[..., 0] * mask).sum(1)
        return total / mask.sum(1) if self.per_token else total


class MultipleChoice:
    """Accuracy over the questions with options of each clip; a tie with a wrong option is wrong.

    Args:
        by: how an option is scored. template: how question and option become one text.
        field: of the record. num_examples: questions to show.
    """

    title = "Multiple choice"

    def __init__(
        self,
        *,
        by: OptionScore,
        template: str = "{question} {option}",
        field: str = "choices",
        key: str = "choice_accuracy",
        num_examples: int = 6,
    ) -> None:
        _check_template(template, "option")
        self.by, self.template, self.field, self.key, self.num_examples = by, template, field, key, num_examples
        self.needs, self.borrows = by.needs, by.borrows

    def protocol(self) -> dict[str, Any]:
        return {"by": self.by.protocol(), "prompt": self.template, "field": self.field, "ties": "wrong"}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.scorers = data, scorers
        self.asked: list[Asked] = []

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        own = _asked_of(batch, self.data, self.field)  # a list of questions for each row
        num_questions, num_options = _most(own, batch)
        for number in range(num_questions):
            questions = [row[number] if number < len(row) else None for row in own]
            columns = []
            for option in range(num_options):
                texts = [self._text(question, option) for question in questions]
                columns.append(self.by(with_texts(forward, self.data, texts), self.scorers).float().cpu())
            scores = torch.stack(columns, 1)  # [B, O]
            for row, question in enumerate(questions):
                if question is not None:
                    options = question["options"]
                    found = scores[row, : len(options)]
                    best = int(metrics.ranks(found[None], torch.tensor([question["answer"]]))) == 1
                    self.asked.append(
                        Asked(
                            int(batch.sample_id[row]),
                            number,
                            best,
                            1 / len(options),
                            question["question"],
                            options[int(found.nan_to_num(-torch.inf).argmax())],
                            options[question["answer"]],
                        )
                    )

    def finish(self) -> dict:
        return right_or_wrong(self.title, f"accuracy by {self.by.name}", self.key, self.asked, self.num_examples)

    def _text(self, question: dict | None, option: int) -> str:
        if question is None or option >= len(question["options"]):
            return ""
        return self.template.format(question=question["question"], option=question["options"][option])


class AnswerBy(Protocol):
    """Finds an answer to a question for each clip of a batch; built from config."""

    needs: tuple[str, ...]
    borrows: tuple[str, ...]

    def protocol(self) -> str: ...

    def __call__(
        self, forward: ForwardPass, data: EvalData, scorers: Mapping[str, Scorer], questions: list[str], chosen: Tensor
    ) -> list[str]: ...


class ByVocabulary:
    """The likeliest of a fixed list of answers, by the head of the objective "answers"."""

    needs = ("fused_text",)
    borrows = ("answers",)

    def __init__(self, *, answers: list[str]) -> None:
        self.answers = answers

    def protocol(self) -> str:
        return f"classification among {len(self.answers)} answers"

    def __call__(
        self, forward: ForwardPass, data: EvalData, scorers: Mapping[str, Scorer], questions: list[str], chosen: Tensor
    ) -> list[str]:
        logits = scorers["answers"](with_texts(forward, data, questions).take("fused_text"))  # [B, A]
        if logits.shape[1] != len(self.answers):
            raise ValueError(f"the head has {logits.shape[1]} answers and the task {len(self.answers)}; use one list.")
        return [self.answers[place] for place in logits.argmax(1).tolist()]


class ByWriting:
    """What the caption decoder writes after the question."""

    needs = ("caption_logits",)
    borrows = ()

    def __init__(self, *, writer: Writer | None = None, max_length: int = 64) -> None:
        self.writer, self.max_length = writer or Greedy(), max_length

    def protocol(self) -> str:
        return f"written after the question, {self.writer.protocol()}"

    def __call__(
        self, forward: ForwardPass, data: EvalData, scorers: Mapping[str, Scorer], questions: list[str], chosen: Tensor
    ) -> list[str]:
        limits = {"min_new": 1, "limit": self.max_length}
        return write(self.writer, forward, data, prompts=questions, chosen=chosen, **limits)


class OpenEnded:
    """Accuracy of answers to open questions, compared without case, articles and punctuation.

    Every question counts, those whose answer no vocabulary has as well. Chance is the share that the commonest answer
    to questions with the same first two words would get right: what can be known without looking.

    Args:
        by: how an answer is found. num_examples: questions to show.
    """

    title = "Open-ended questions"

    def __init__(
        self, *, by: AnswerBy, field: str = "questions", key: str = "answer_accuracy", num_examples: int = 6
    ) -> None:
        self.by, self.field, self.key, self.num_examples = by, field, key, num_examples
        self.needs, self.borrows = by.needs, by.borrows

    def protocol(self) -> dict[str, Any]:
        return {"by": self.by.protocol(), "match": "equal but for case, articles, punctuation", "failure": "wrong"}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.scorers = data, scorers
        self.asked: list[Asked] = []

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        own = _asked_of(batch, self.data, self.field)
        for number in range(_most(own, batch)[0]):
            questions = [row[number] if number < len(row) else None for row in own]
            texts = [question["question"] if question else "" for question in questions]
            chosen = torch.tensor([question is not None for question in questions])
            given = self.by(forward, self.data, self.scorers, texts, chosen)
            for row, question in enumerate(questions):
                if question is not None:
                    right = answers.exactly(given[row], [question["answer"]], 0)
                    about = (question["question"], given[row], question["answer"])
                    self.asked.append(Asked(int(batch.sample_id[row]), number, bool(right), 0.0, *about))

    def finish(self) -> dict:
        asked = [one for part in collect(self.asked) for one in part]
        return right_or_wrong(self.title, "accuracy", self.key, _with_prior(asked), self.num_examples, collected=True)


def _with_prior(asked: list[Asked]) -> list[Asked]:
    """Let each question's chance say whether the commonest answer to its kind of question is right."""
    counts: dict[str, dict[str, int]] = {}
    for one in sorted(asked):
        own = counts.setdefault(_kind(one), {})
        right = answers.normal(one.right)
        own[right] = own.get(right, 0) + 1
    common = {kind: max(own, key=lambda answer: own[answer]) for kind, own in counts.items()}
    return [one._replace(chance=float(common[_kind(one)] == answers.normal(one.right))) for one in asked]


def _kind(one: Asked) -> str:
    return " ".join(one.question.lower().split()[:2])


def right_or_wrong(
    title: str, name: str, key: str, asked: list[Asked], num_examples: int, *, collected: bool = False
) -> dict:
    """Return the result of a task whose items are right or wrong."""
    found = sorted(asked if collected else [one for part in collect(asked) for one in part])
    if not found:
        return {"title": title, "rows": [], "examples": []}
    values = [100.0 * one.correct for one in found]
    chance = 100 * sum(one.chance for one in found) / len(found)
    rows = [metrics.row(name, key, raw=sum(values) / len(values), chance=chance, num=len(found))]
    each = {key: Each([one.sample_id for one in found], [one.number for one in found], values)}
    chosen = metrics.mixed_sample(torch.tensor([one.correct for one in found]), num_examples)
    return {"title": title, "rows": rows, "each": each, "examples": [_example(found[place]) for place in chosen]}


def _example(one: Asked) -> dict:
    shown = {"kind": "choice", "caption": f"{one.question} {one.right}", "correct": one.correct}
    return {**shown, "negative": "" if one.correct else f"{one.question} {one.given}", "strip": one.sample_id}


def _asked_of(batch: Batch, data: EvalData, field: str) -> list[list[dict]]:
    rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
    return [data.meta(sample).get(field) or [] if valid else [] for sample, valid in rows]


def _most(own: list[list[dict]], batch: Batch) -> tuple[int, int]:
    """Return the most questions of a clip and the most options of a question, on any rank: all make the same passes."""
    options = [len(question.get("options", ())) for row in own for question in row]
    most = torch.tensor([max(map(len, own), default=0), max(options, default=0)])
    questions, options = dist.max_over_ranks(most).tolist()
    return questions, options


def _check_template(template: str, last: str) -> None:
    if f"{{{last}}}" not in template:
        raise ValueError(f"template={template!r} has no {{{last}}}; each option would be the same text.")
    try:
        template.format(**{"question": "", last: ""})
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"template={template!r} may use {{question}} and {{{last}}} only ({error}).") from None
