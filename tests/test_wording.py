import re
from collections import Counter

import pytest

from vlp.data.scene import COLOURS, SHAPES, Event, Object, Scene, scene
from vlp.data.wording import VERBS, canonical, captions, choices, hard_negative, phrases, questions

TRAIN = [scene(0, index, "train") for index in range(1000)]
TEST = [scene(0, index, "test") for index in range(200)]
OPPOSITE_WORDS = [
    {"left", "right"},
    {"up", "down"},
    {"clockwise", "anticlockwise"},
    {"grows", "shrinks"},
    {"appears", "vanishes"},
    {"stops", "waits"},
]
RED = Object("circle", "red", "small")
GREEN = Object("square", "orange", "")


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text)


def made(*events: Event, objects: tuple[Object, ...] = (RED,)) -> Scene:
    return Scene(5, 2.0, objects, events)


@pytest.mark.parametrize(
    ("clip", "text"),
    [
        (made(Event("left", 0)), "a small red circle moves left"),
        (made(Event("left", 0), Event("turn", 0, "blue")), "a small red circle moves left, then turns blue"),
        (
            made(Event("left", 1), Event("grow", 0), objects=(GREEN, RED)),
            "a small red circle moves left, then an orange square grows",
        ),
        (
            made(Event("shrink", 0), objects=(GREEN, RED)),
            "an orange square shrinks while a small red circle stays still",
        ),
    ],
)
def test_canonical_caption_states_objects_and_order(clip, text):
    assert canonical(clip) == text


def test_captions_are_different_and_begin_with_the_canonical_one():
    for clip in TEST:
        texts = captions(clip)
        assert texts[0] == canonical(clip) and len(set(texts)) == len(texts) == 5 and captions(clip) == texts


def test_paraphrases_name_the_same_objects_and_keep_the_order():
    for clip in (clip for clip in TEST if len({event.kind for event in clip.events}) == 2):
        at = [{wording.format(event.colour) for wording in VERBS[event.kind]} for event in clip.events]
        for text in captions(clip):
            first, second = (max(text.rfind(f" {wording}") for wording in wordings) for wordings in at)
            assert min(first, second) >= 0 and (first < second) != (" after " in text and "after that" not in text)
            assert all(f"{one.colour} {one.shape}" in text for one in clip.objects)


def test_hard_negative_differs_only_in_words_of_time():
    for clip in TRAIN + TEST:
        mine, other = Counter(words(canonical(clip))), Counter(words(hard_negative(clip)))
        gone, new = mine - other, other - mine
        articles = {"a", "an"}  # follow the colour when "an orange ring turns red" is reversed
        changed = set(gone) | set(new)
        assert canonical(clip) != hard_negative(clip)
        assert changed <= articles or changed - articles in OPPOSITE_WORDS, (canonical(clip), hard_negative(clip))


def test_hard_negative_is_of_either_kind():
    orders = [Counter(words(canonical(clip))) == Counter(words(hard_negative(clip))) for clip in TEST]
    assert 30 < sum(orders) < 170


def test_vocabulary_is_small_and_train_knows_every_word():
    train, test = (
        {word for clip in clips for text in [*captions(clip), hard_negative(clip)] for word in words(text)}
        for clips in (TRAIN, TEST)
    )
    assert test <= train and len(train) < 150 and {*SHAPES, *COLOURS} <= train


def test_captions_of_the_test_clips_are_nearly_all_different():
    texts = [canonical(clip) for clip in TEST]
    assert len(set(texts)) >= 190 and not set(texts) & {canonical(clip) for clip in TRAIN}


def test_every_sentence_has_the_right_article():
    for clip in TRAIN:
        for text in [*captions(clip), hard_negative(clip)]:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]|  ", text), text


def test_answers_agree_with_the_scene():
    for clip in TEST:
        by_shape, by_colour = ({one[at]: one for one in clip.objects} for at in (0, 1))
        for question, answer in ((item["question"], item["answer"]) for item in questions(clip)):
            if match := re.fullmatch(r"what colour is the (\w+)( at first)?\?", question):
                assert answer == by_shape[match[1]].colour
            elif match := re.fullmatch(r"what shape is the (\w+) object( at first)?\?", question):
                assert answer == by_colour[match[1]].shape
            elif match := re.fullmatch(r"is the (\w+) \w+ small or large\?", question):
                assert answer == by_colour[match[1]].size
            elif question == "how many objects are there?":
                assert answer == {1: "one", 2: "two"}[len(clip.objects)]
            else:
                assert all(word in canonical(clip) for word in words(answer)), (question, answer)


def test_questions_of_order_follow_the_spans():
    for clip in (clip for clip in TEST if len(clip.events) == 2 and len(clip.objects) == 1):
        head, last = canonical(clip).split(", then ")
        asked = f"what does the {clip.objects[0].colour} {clip.objects[0].shape} do"
        first = head.split(f"{clip.objects[0].shape} ")[1]
        found = {item["question"]: item["answer"] for item in questions(clip)}
        assert (found[f"{asked} first?"], found[f"{asked} last?"]) == (first, last)
        assert (found[f"{asked} before it {last}?"], found[f"{asked} after it {first}?"]) == (first, last)


def test_each_question_is_asked_once():
    for clip in TRAIN + TEST:
        asked = [item["question"] for item in questions(clip)]
        assert len(set(asked)) == len(asked) >= 3
        asked = [item["question"] for item in choices(clip)]
        assert len(set(asked)) == len(asked) >= 3


def test_options_hold_the_answer_exactly_once():
    for clip in TRAIN + TEST:
        answers = {item["question"]: item["answer"] for item in questions(clip)}
        for item in choices(clip):
            right = answers.get(item["question"], canonical(clip))
            assert len(set(item["options"])) == 5 and item["options"][item["answer"]] == right


def test_options_are_at_random_places():
    places = Counter(item["answer"] for clip in TRAIN for item in choices(clip))
    assert set(places) == set(range(5)) and max(places.values()) < 1.15 * min(places.values())


def test_sentences_to_choose_from_include_the_hard_negative():
    for clip in TEST:
        item = choices(clip)[-1]
        assert item["question"] == "which sentence is true?" and hard_negative(clip) in item["options"]


def test_phrases_say_who_does_what():
    clip = made(Event("left", 1), Event("turn", 0, "blue"), objects=(GREEN, RED))
    assert phrases(clip) == ["red circle moves left", "orange square turns blue"]
