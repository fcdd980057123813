import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp.data.meta import MAX_JSON, MAX_TEXT, MetaError, parse_caption, parse_meta, parse_record
from vlp.types import Reason


def broken(text: bytes | None = None, record: bytes | None = None) -> MetaError:
    with pytest.raises(MetaError) as caught:
        parse_meta(text, record)
    return caught.value


def test_captions_come_from_the_record_first_and_the_text_where_it_has_none():
    assert parse_meta(b" a cat\n", None) == {"captions": ["a cat"]}
    assert parse_meta(b"a cat", b'{"captions": ["b ", "", "c"], "url": 5}') == {"captions": ["b", "c"], "url": 5}
    assert parse_meta(b"a cat", b'{"caption": "one"}')["captions"] == ["one"]
    assert parse_meta(b"a cat", b'{"caption": NaN, "captions": null}')["captions"] == ["a cat"]


def test_a_byte_order_mark_is_no_part_of_a_caption():
    assert parse_caption("\ufeffa cat".encode()) == "a cat"
    assert parse_record('\ufeff{"captions": ["é"]}'.encode()) == {"captions": ["é"]}


@pytest.mark.parametrize(
    ("text", "record"), [(None, None), (b"", None), (b" \n", b"{}"), (None, b'{"captions": [""]}')]
)
def test_a_sample_without_words_is_missing_its_caption(text, record):
    assert broken(text, record).reason == Reason.CAPTION_MISSING


@pytest.mark.parametrize("text", [b"caf\xe9", "a".encode("utf-16"), b"a\0b", b"x" * (MAX_TEXT + 1), b"\xed\xa0\x80"])
def test_a_broken_text_is_broken_also_beside_a_good_record(text):
    assert broken(text).reason == Reason.CAPTION_BROKEN
    assert broken(text, b'{"captions": ["a"]}').reason == Reason.CAPTION_BROKEN


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b"null",
        b'"a"',
        b"{",
        b'{"captions": "a"}',
        b'{"captions": [5]}',
        b'{"caption": {}}',
        b"\xff{}",
        b'{"caption": "\\ud800"}',
        b'{"caption": "a\\u0000"}',
        b'{"n": ' + b"9" * 9999 + b"}",
        b"[" * 200000,
        b'{"caption": "' + b"x" * (MAX_TEXT + 1) + b'"}',
        b'{"caption": "a", "x": "' + b"x" * MAX_JSON + b'"}',
        b'{"caption": "' + b"x" * MAX_JSON + b'"}',
    ],
)
def test_a_broken_record_is_broken_also_beside_a_good_text(record):
    error = broken(b"a cat", record)
    assert error.reason == Reason.CAPTION_BROKEN and error.detail.startswith("json: ")


FIELDS = {
    "hard_negative": (["a dog"], [5, ["a"], "\0"]),
    "questions": ([[{"question": "q", "answer": "a"}], []], [[{"question": "q"}], {}, [5], [{"answer": "a"}]]),
    "choices": (
        [[{"question": "q", "options": ["a", "b"], "answer": 1}]],
        [
            [{"question": "q", "options": options, "answer": answer}]
            for options, answer in [
                (["a", "b"], 2),
                (["a", "b"], True),
                (["a"], 0),
                ("ab", 0),
                (["a", 5], 0),
                (["a", "b"], -1),
            ]
        ],
    ),
    "events": (
        [[{"text": "t", "start_s": 0, "end_s": 1.5}]],
        [
            [{"text": "t", "start_s": start, "end_s": end}]
            for start, end in [(2, 1), ("0", 1), (0, None), (0, 1e999), (False, 1)]
        ]
        + [[{"start_s": 0, "end_s": 1}]],
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_training_uses_are_checked(field):
    good, bad = FIELDS[field]
    for value in good:
        assert parse_record(json.dumps({"captions": ["a"], field: value}).encode())[field] == value
    for value in bad:
        with pytest.raises(MetaError, match=f"json: {field}"):
            parse_record(json.dumps({"captions": ["a"], field: value}).encode())
    assert field not in parse_record(b'{"%s": null}' % field.encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["captions", *FIELDS, "x"]), inner),
)


@given(
    st.one_of(st.none(), st.binary(max_size=40)),
    st.one_of(json_values.map(lambda v: json.dumps(v).encode()), st.binary()),
)
def test_any_bytes_give_captions_or_a_meta_error(text, record):
    try:
        captions = parse_meta(text, record)["captions"]
    except MetaError as error:
        assert error.reason in (Reason.CAPTION_MISSING, Reason.CAPTION_BROKEN) and "\n" not in error.detail
        return
    assert captions and all(caption == caption.strip() and caption and "\0" not in caption for caption in captions)
