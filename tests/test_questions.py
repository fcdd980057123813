"""Questions of the toy split: which option, which word, which answer."""

import pytest
import torch
from eval_toys import BOS, EOS, VOCAB, Lookup, make_data, toy_graph

from vlp.eval.actions import ZeroShotActions, readable
from vlp.eval.decoding import Greedy
from vlp.eval.questions import ByCosine, ByLikelihood, ByScorer, ByVocabulary, ByWriting, MultipleChoice, OpenEnded
from vlp.eval.runner import evaluate

EYE = torch.eye(len(VOCAB) - 3)  # each word its own direction
CHOICES = [
    {"captions": ["zero"], "choices": [{"question": "q", "options": ["red", "blue"], "answer": 0}]},
    {
        "captions": ["one"],
        "choices": [
            {"question": "q", "options": ["one", "two", "three"], "answer": 2},
            {"question": "q", "options": ["blue", "two"], "answer": 0},
        ],
    },
    {"captions": ["two"]},
]


def run(folder, task, metas, *, videos=None, script=None, scorers=None, **options):
    videos = EYE[[6, 4, 2]] if videos is None else videos  # red, two... in VOCAB's order without the special ones
    model = Lookup(videos, EYE, script=script)
    where = {"data": make_data(metas, batch_size=2, **options), "step": 1, "device": "cpu", "out_dir": folder / "eval"}
    found = evaluate(model, toy_graph(model), {"task": task}, scorers=scorers or {}, **where)
    return found["tasks"]["task"]


def row(task, key):
    return next(row for row in task["rows"] if row["key"] == key)


def vectors(*words):
    return torch.stack([sum(EYE[VOCAB.index(word) - 3] for word in text.split()) for text in words])


def test_the_nearest_option_is_chosen_and_every_question_counts(tmp_path):
    task = MultipleChoice(by=ByCosine(), template="{option}")
    found = row(run(tmp_path, task, CHOICES, videos=vectors("red", "three", "two")), "choice_accuracy")
    assert (found["num"], found["raw"]) == (3, pytest.approx(200 / 3))  # the third ties at zero, which is wrong
    assert found["chance"] == pytest.approx(100 * (1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert found["low"] <= found["raw"] <= found["high"]


def test_a_head_that_an_objective_lends_can_choose(tmp_path):
    task = MultipleChoice(by=ByScorer(scorer="choice"), template="{option}")
    lent = {"choice": lambda fused: -fused.x[:, 0].norm(dim=-1)}  # the toy's fusion is the difference of the vectors
    found = run(tmp_path, task, CHOICES, videos=vectors("red", "three", "two"), scorers=lent)
    assert row(found, "choice_accuracy")["raw"] == pytest.approx(200 / 3) and task.borrows == ("choice",)
    assert row(found, "choice_accuracy")["metric"] == "accuracy by choice"  # a task may ask in several ways


def test_likelihood_is_that_of_the_tokens_after_the_first():
    shares = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 3, 1, 0], [2, 4, 5, 1]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])

    class Pass:
        fields = {"text_ids": ids, "text_mask": mask}  # noqa: RUF012

        def take(self, name):
            return shares

    log = shares.double().log_softmax(-1)
    sums = torch.stack([log[0, 0, 3] + log[0, 1, 1], log[1, 0, 4] + log[1, 1, 5] + log[1, 2, 1]])
    torch.testing.assert_close(ByLikelihood(per_token=False)(Pass(), {}), sums)
    torch.testing.assert_close(ByLikelihood()(Pass(), {}), sums / torch.tensor([2.0, 3.0]))


ASKED = [
    {"captions": ["zero"], "questions": [{"question": "one two", "answer": "Red"}, {"question": "one", "answer": "a"}]},
    {"captions": ["one"], "questions": [{"question": "one two", "answer": "blue"}]},
    {"captions": ["two"], "questions": [{"question": "one two", "answer": "red"}]},
]


def test_answers_of_a_vocabulary_are_compared_without_case_and_others_are_wrong(tmp_path):
    task = OpenEnded(by=ByVocabulary(answers=["red", "blue"]))
    lent = {"answers": lambda fused: torch.tensor([[1.0, 0.0]]).expand(len(fused.x), 2)}  # always red
    found = row(run(tmp_path, task, ASKED, scorers=lent), "answer_accuracy")
    assert (found["raw"], found["num"]) == (50, 4)
    assert found["chance"] == 75  # red for "one two" as often as blue and more, "a" is all there is for "one"


def test_a_head_of_another_length_is_refused(tmp_path):
    task = OpenEnded(by=ByVocabulary(answers=["red", "blue"]))
    with pytest.raises(ValueError, match="the head has 3 answers and the task 2"):
        run(tmp_path, task, ASKED, scorers={"answers": lambda fused: torch.zeros(len(fused.x), 3)})


def test_an_answer_is_written_after_the_question(tmp_path):
    red, blue = VOCAB.index("red"), VOCAB.index("blue")
    # What the toy's decoder says after place i, whatever the words: after "one two" red, after "one" blue and red.
    script = [[BOS, blue, red, EOS, EOS, EOS]] * 3
    task = OpenEnded(by=ByWriting(writer=Greedy(), max_length=6), num_examples=9)
    found = run(tmp_path, task, ASKED, script=script)
    assert row(found, "answer_accuracy")["raw"] == 50
    assert sorted(one["negative"] for one in found["examples"]) == ["", "", "one blue red", "one two red"]


def test_actions_take_the_mean_of_their_prompts_and_lose_ties(tmp_path):
    metas = [{"captions": ["zero"], "label": label} for label in ("red", 1, "two")]
    task = ZeroShotActions(classes=["red", "blue", "two"], templates=["{}", "{} then"])
    found = run(tmp_path, task, metas, videos=vectors("red", "red blue", "two"))
    assert row(found, "action_top1")["raw"] == pytest.approx(200 / 3)
    assert row(found, "action_top5")["raw"] == 100
    assert found["protocol"]["prompts"] == ["{}", "{} then"]


def test_a_label_that_is_no_class_is_named(tmp_path):
    task = ZeroShotActions(classes=["red", "blue"], templates=["{}"])
    with pytest.raises(ValueError, match="clip 'clip/0': label='zero' is none of the 2 classes"):
        run(tmp_path, task, [{"captions": ["zero"], "label": "zero"}])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("brush_hair", "brush hair"),
        ("Moving [something] up", "moving something up"),
    ],
)
def test_class_names_become_words(name, words):
    assert readable(name) == words


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ZeroShotActions(), "give classes, or classes_file"),
        (lambda: ZeroShotActions(classes=["a", "a"]), "all different"),
        (lambda: ZeroShotActions(classes_file="absent.txt"), "cannot be read"),
        (lambda: ZeroShotActions(classes=["a", "b"], templates=["x"]), "each template needs"),
        (lambda: MultipleChoice(by=ByCosine(), template="{question}"), "has no {option}"),
        (lambda: MultipleChoice(by=ByCosine(), template="{option}{other}"), "may use {question} and {option} only"),
    ],
)
def test_tasks_that_ask_nothing_are_refused(make, line):
    with pytest.raises(ValueError, match=line):
        make()
