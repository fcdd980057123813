"""Which texts of its record a sample brings to a batch: one caption, several, one of each kind.

    record {"captions": [...], ...} --> Texts: the first one becomes text_ids [B, L], the others more_ids [B, K, L]

Every choice is a function of the sample's key. Test splits always bring their first caption: what an evaluation asks
of a record is the matter of its task.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from vlp.data.rng import generator
from vlp.types import IGNORE_INDEX


class Texts(NamedTuple):
    """The texts of one sample."""

    first: str
    others: tuple[str | None, ...] = ()  # None = there is no such text; its row is masked
    label: int = IGNORE_INDEX  # what is asked: a class, or the place of the right one among the others


class TextChoice(Protocol):
    """Chooses the texts of a training sample; `num_others` is the same for all samples."""

    num_others: int

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        """Take the record of a sample, with at least one caption, and the key of its randomness."""
        ...


class OneCaption:
    """One of the captions, drawn anew each epoch."""

    num_others = 0

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        return Texts(_drawn(meta["captions"], key))


class ManyCaptions:
    """Up to `max_texts` captions of a clip, all of which describe it: the drawn one and others in random order.

    Source: arXiv:2408.07249 (a video with all its texts in one step).
    """

    def __init__(self, *, max_texts: int) -> None:
        if max_texts < 2:
            raise ValueError(f"max_texts={max_texts} must be at least 2; for one text use vlp.data.texts.OneCaption.")
        self.num_others = max_texts - 1

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        captions = meta["captions"]
        order = generator(key, "caption").permutation(len(captions))[: self.num_others + 1]
        first, *others = (captions[i] for i in order)
        return Texts(first, _filled(others, self.num_others))


class OneOfEach:
    """One text of each field of the record, such as captions and subtitles; the first field must always have one.

    Source: arXiv:2403.14870, 3.3 (a caption and a subtitle as positives of one clip).
    """

    def __init__(self, *, fields: Sequence[str]) -> None:
        if len(fields) < 2 or fields[0] != "captions":
            raise ValueError(f"fields={list(fields)} must name captions first and at least one other field.")
        self.fields, self.num_others = tuple(fields), len(fields) - 1

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        found = [_texts_of(meta.get(field)) for field in self.fields]
        first, *others = (_drawn(texts, key, number) if texts else None for number, texts in enumerate(found))
        assert first is not None, "a record without a caption is a tombstone"
        return Texts(first, tuple(others))


class Question:
    """An open question of the clip as text and its answer's place in a fixed list as label.

    A clip without a question brings its caption, and a question whose answer is not in the list is asked without label:
    both cost a slot of the objective, never the order of the data.

    Args:
        answers: the list; `python -m vlp.data.answers` makes one from shards.
        field: of the record, a list of {"question", "answer"}.
    """

    num_others = 0

    def __init__(self, *, answers: Sequence[str], field: str = "questions") -> None:
        if len(set(answers)) != len(answers) or len(answers) < 2:
            raise ValueError(f"answers has {len(answers)} entries; it must hold at least two, and all different.")
        self.places, self.field, self.num_answers = {text: n for n, text in enumerate(answers)}, field, len(answers)

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        asked = meta.get(self.field) or []
        if not asked:
            return Texts(_drawn(meta["captions"], key))
        one = asked[int(generator(key, "question").integers(len(asked)))]
        return Texts(one["question"], label=self.places.get(one["answer"], IGNORE_INDEX))


class QuestionAndAnswer:
    """An open question followed by its answer, for a decoder that writes answers; a caption where there is none."""

    num_others = 0

    def __init__(self, *, field: str = "questions") -> None:
        self.field = field

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        asked = meta.get(self.field) or []
        if not asked:
            return Texts(_drawn(meta["captions"], key))
        one = asked[int(generator(key, "question").integers(len(asked)))]
        return Texts(f"{one['question']} {one['answer']}")


class Options:
    """A question with options: each option as one of the other texts, the place of the right one as label.

    Args:
        max_options: further wrong ones are left out. template: how question and option become one text.
        field: of the record, a list of {"question", "options", "answer"}.
    """

    def __init__(self, *, max_options: int = 5, template: str = "{question} {option}", field: str = "choices") -> None:
        if max_options < 2 or "{option}" not in template:
            raise ValueError(
                f"max_options={max_options} must be at least 2, and template={template!r} have {{option}}."
            )
        self.num_others, self.template, self.field = max_options, template, field

    def __call__(self, meta: Mapping[str, Any], key: int) -> Texts:
        asked = meta.get(self.field) or []
        if not asked:
            return Texts(_drawn(meta["captions"], key), (None,) * self.num_others)
        rng = generator(key, "question")
        one = asked[int(rng.integers(len(asked)))]
        wrong = [place for place in rng.permutation(len(one["options"])).tolist() if place != one["answer"]]
        places = rng.permutation([one["answer"], *wrong[: self.num_others - 1]]).tolist()
        texts = [self.template.format(question=one["question"], option=one["options"][place]) for place in places]
        return Texts(one["question"], _filled(texts, self.num_others), places.index(one["answer"]))


def _texts_of(value: Any) -> list[str]:
    """Return the texts of a field that may be absent, one text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _drawn(texts: Sequence[str], key: int, number: int = 0) -> str:
    return texts[int(generator(key, f"caption{number or ''}").integers(len(texts)))]


def _filled(texts: Sequence[str], length: int) -> tuple[str | None, ...]:
    return (*texts, *[None] * (length - len(texts)))
