"""Captions, questions and events of a sample, from the bytes of its `.txt` and `.json` parts: bounded and strict.

Text is UTF-8, with or without a byte order mark. What is not, or what has the wrong type, is an error with a reason and
never a replacement character. Sizes are checked before anything is parsed.
"""

import json
import math
from typing import Any

from vlp.types import Reason

MAX_TEXT = 64 * 1024  # bytes of a caption
MAX_JSON = 1024 * 1024


class MetaError(Exception):
    """The text of a sample cannot be used: `reason` (CAPTION_MISSING or CAPTION_BROKEN) and one line of `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason.name.lower()}: {self.detail}"


def parse_meta(text: bytes | None, record: bytes | None) -> dict[str, Any]:
    """Return the meta of a sample, with at least one caption under "captions".

    The captions of the record stand before that of the text, which is used only where the record has none.

    Args:
        text: content of the `.txt` part: one caption. None where there is no such part.
        record: content of the `.json` part, an object with "captions" (list) or "caption".

    Raises:
        MetaError: CAPTION_BROKEN if either part breaks a rule, CAPTION_MISSING if there is no caption.
    """
    meta = parse_record(record) if record is not None else {"captions": []}
    caption = parse_caption(text) if text is not None else ""
    if not meta["captions"]:
        if not caption:
            raise MetaError(Reason.CAPTION_MISSING, "neither the txt nor the json part has a caption")
        meta["captions"] = [caption]
    return meta


def parse_caption(text: bytes) -> str:
    """Return the caption of a `.txt` part without surrounding white space; "" if there is nothing else.

    Raises:
        MetaError: CAPTION_BROKEN, above 64 KiB, not UTF-8 or with a NUL.
    """
    return _caption(_decode(text, MAX_TEXT, "txt"), "txt")


def parse_record(record: bytes) -> dict[str, Any]:
    """Return the object of a `.json` part; "captions" is always there and may be empty, blank captions are left out.

    NaN, which data frames write for "no value", is read as null. Checked are the fields that training uses: captions,
    hard_negative, questions, choices and events; others are passed through.

    Raises:
        MetaError: CAPTION_BROKEN, above 1 MiB, not JSON, or a field of the wrong type.
    """
    text = _decode(record, MAX_JSON, "json")
    try:
        return check_record(json.loads(text, parse_constant=lambda name: None))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or an integer of thousands of digits
        raise _broken(f"json: {error}") from error


def check_record(meta: object) -> dict[str, Any]:
    """Return a copy of an object read from JSON with "captions" as `parse_record` promises; raises MetaError."""
    if not isinstance(meta, dict):
        raise _broken(f"json: an object is wanted, not {_kind(meta)}")
    single = meta.get("caption")
    captions = meta.get("captions") or ([] if single is None else [single])
    if not isinstance(captions, list):
        raise _broken(f"json: captions must be a list of texts, not {_kind(captions)}")
    stripped = [_caption(caption, "json: a caption") for caption in captions]
    for name, check in _FIELDS.items():
        if meta.get(name) is not None:
            check(meta[name], f"json: {name}")
    known = {name: value for name, value in meta.items() if value is not None or name not in _FIELDS}
    return known | {"captions": [caption for caption in stripped if caption]}


def _broken(detail: str) -> MetaError:
    return MetaError(Reason.CAPTION_BROKEN, detail)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _decode(data: bytes, limit: int, what: str) -> str:
    if len(data) > limit:
        raise _broken(f"{what}: {len(data)} bytes; at most {limit} are allowed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(f"{what}: not UTF-8 at byte {error.start}") from error


def _caption(value: object, what: str) -> str:
    _check_text(value, what)
    return str(value).strip()


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise _broken(f"{what} must be a text, not {_kind(value)}")
    if "\0" in value:
        raise _broken(f"{what} has a NUL")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise _broken(f"{what} is not valid Unicode at character {error.start}") from error
    if size > MAX_TEXT:
        raise _broken(f"{what} has {size} bytes; at most {MAX_TEXT} are allowed")


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _broken(f"{what} must be a list of objects")
    return value


def _check_questions(value: object, what: str) -> None:
    for item in _objects(value, what):
        _check_text(item.get("question"), f"{what}: question")
        _check_text(item.get("answer"), f"{what}: answer")


def _check_choices(value: object, what: str) -> None:
    for item in _objects(value, what):
        _check_text(item.get("question"), f"{what}: question")
        options, answer = item.get("options"), item.get("answer")
        if not isinstance(options, list) or len(options) < 2:
            raise _broken(f"{what}: options must be a list of at least two texts")
        for option in options:
            _check_text(option, f"{what}: an option")
        if type(answer) is not int or not 0 <= answer < len(options):
            raise _broken(f"{what}: answer must be the position of an option, 0 to {len(options) - 1}")


def _check_events(value: object, what: str) -> None:
    for item in _objects(value, what):
        _check_text(item.get("text"), f"{what}: text")
        start_s, end_s = (_seconds(item.get(name)) for name in ("start_s", "end_s"))
        if start_s is None or end_s is None or start_s > end_s:
            raise _broken(f"{what}: start_s and end_s must be seconds in this order")


def _seconds(value: object) -> float | None:
    """Return a finite number as it is, None for anything else; a bool is no time."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf else None


_FIELDS = {
    "hard_negative": _check_text,
    "questions": _check_questions,
    "choices": _check_choices,
    "events": _check_events,
}
