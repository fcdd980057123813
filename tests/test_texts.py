import pytest

from vlp.data.answers import common
from vlp.data.texts import ManyCaptions, OneCaption, OneOfEach, Options, Question, QuestionAndAnswer
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


ASKED = {
    "captions": ["a"],
    "questions": [{"question": "what?", "answer": "red"}, {"question": "who?", "answer": "nobody"}],
    "choices": [{"question": "which?", "options": ["one", "two", "three", "four"], "answer": 2}],
}


def test_a_question_brings_the_place_of_its_answer_or_no_label():
    choose = Question(answers=["blue", "red"])
    found = {(texts.first, texts.label) for texts in (choose(ASKED, key) for key in range(30))}
    assert found == {("what?", 1), ("who?", IGNORE_INDEX)} and choose.num_answers == 2
    assert choose({"captions": ["a"]}, 0) == ("a", (), IGNORE_INDEX)


def test_question_and_answer_become_one_text():
    assert {QuestionAndAnswer()(ASKED, key).first for key in range(30)} == {"what? red", "who? nobody"}


@pytest.mark.parametrize("max_options", [2, 3, 4, 6])
def test_options_come_in_random_order_with_the_right_one_among_them(max_options):
    places = set()
    for key in range(60):
        texts = Options(max_options=max_options)(ASKED, key)
        real = [text for text in texts.others if text is not None]
        assert len(texts.others) == max_options and len(set(real)) == len(real) == min(4, max_options)
        assert texts.others[texts.label] == "which? three"
        places.add(texts.label)
    assert places == set(range(min(4, max_options)))
    assert Options(max_options=3)({"captions": ["a"]}, 0) == ("a", (None,) * 3, IGNORE_INDEX)


def test_answers_are_listed_by_frequency_with_what_they_cover():
    records = [{"questions": [{"answer": text} for text in "bbaac"]}, {}, {"questions": [{"answer": "b"}]}]
    assert common(records, top=2) == (["b", "a"], pytest.approx(5 / 6))


@pytest.mark.parametrize("make", [lambda: Question(answers=["a", "a"]), lambda: Options(max_options=1)])
def test_lists_that_leave_no_choice_are_refused(make):
    with pytest.raises(ValueError, match=r"at least (two|2)"):
        make()
