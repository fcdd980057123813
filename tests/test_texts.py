import pytest

from vlp.data.texts import ManyCaptions, OneCaption, OneOfEach
from vlp.types import IGNORE_INDEX

META = {"captions": ["a", "b", "c"], "subtitles": ["said", " "], "title": "name"}


def test_one_caption_is_a_function_of_the_key():
    assert {OneCaption()(META, key).first for key in range(30)} == {"a", "b", "c"}
    assert OneCaption()(META, 7) == OneCaption()(META, 7) and OneCaption()(META, 7).label == IGNORE_INDEX


@pytest.mark.parametrize(("max_texts", "absent"), [(2, 0), (3, 0), (5, 2)])
def test_many_captions_are_different_ones_filled_up_to_the_same_number(max_texts, absent):
    for key in range(9):
        texts = ManyCaptions(max_texts=max_texts)(META, key)
        real = [texts.first, *(text for text in texts.others if text is not None)]
        assert len(texts.others) == max_texts - 1 and texts.others.count(None) == absent
        assert len(set(real)) == len(real) == max_texts - absent


def test_one_of_each_field_leaves_out_blank_and_missing_texts():
    texts = OneOfEach(fields=["captions", "subtitles", "title", "ocr"])(META, 3)
    assert texts.first in META["captions"] and texts.others == ("said", "name", None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ManyCaptions(max_texts=1), "max_texts=1 must be at least 2"),
        (lambda: OneOfEach(fields=["captions"]), "must name captions first"),
        (lambda: OneOfEach(fields=["title", "captions"]), "must name captions first"),
    ],
)
def test_choices_that_choose_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
