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


def _texts_of(value: Any) -> list[str]:
    """Return the texts of a field that may be absent, one text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _drawn(texts: Sequence[str], key: int, number: int = 0) -> str:
    return texts[int(generator(key, f"caption{number or ''}").integers(len(texts)))]


def _filled(texts: Sequence[str], length: int) -> tuple[str | None, ...]:
    return (*texts, *[None] * (length - len(texts)))
