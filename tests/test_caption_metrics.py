import subprocess
from types import SimpleNamespace

import pytest

from vlp.eval import coco_captions
from vlp.eval.caption_metrics import bleu, rouge_l, score, words
from vlp.eval.captions import Captions

CAPTIONS = [
    "a man is playing a guitar",
    "the dog runs fast on the green grass",
    "people",
    "",
    "a cat sits on a red mat",
]
REFERENCES = [
    ["a man plays the guitar", "a person is playing a guitar on stage"],
    ["a dog is running on grass", "the dog runs", "the brown dog runs fast over green grass today"],
    ["people walk", "a crowd"],
    ["something happens here"],
    ["a cat sits on a red mat"],
]
# Computed with pycocoevalcap 1.2 on these tokens.
CORPUS = {"bleu_1": 0.79586, "bleu_4": 0.54725, "rouge_l": 0.641, "cider": 3.26351}
CIDER = [3.12707, 2.31881, 0.87169, 0.0, 10.0]


def test_corpus_and_caption_scores_are_those_of_the_public_code():
    found = score(CAPTIONS, REFERENCES)
    assert {name: round(found.corpus[name], 5) for name in CORPUS} == CORPUS
    assert [round(value, 5) for value in found.each["cider"]] == CIDER


@pytest.mark.parametrize(
    ("captions", "references", "wanted"),
    [
        (["a red ball"], [["a red ball"]], [0.0]),  # every n-gram is in every clip, so none says anything
        (["a red ball rolls", "two cats sleep there"], [["a red ball rolls"], ["two cats sleep there"]], [10.0, 10.0]),
    ],
)
def test_cider_of_hand_cases(captions, references, wanted):
    assert score(captions, references).each["cider"] == pytest.approx(wanted)


def test_cider_of_a_hit_with_two_references_and_a_miss():
    caption, own = "a red ball rolls away", ["a red ball rolls away", "the sphere moves"]
    assert score([caption, "no"], [own, ["two cats sleep"]]).corpus["cider"] == pytest.approx(2.5)


def test_rouge_takes_best_precision_and_best_recall_of_different_references():
    found = rouge_l(("a", "b", "c"), [("a", "b"), ("a", "x", "y", "z")])
    precision, recall = 2 / 3, 1.0
    assert found == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    corpus, _ = bleu([("a", "b", "c")], [[("a", "b"), ("a", "b", "c", "d")]])
    assert corpus[0] == pytest.approx(1.0)  # no penalty: the closest has two words


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's T-shirt, isn't red!", "a man 's t-shirt is n't red"),
        ("It costs 3.5 (or 1,000) $", "it costs 3.5 -lrb- or 1,000 -rrb- $"),
        ("Dr. No in Washington D.C. at 5:30 p.m.", "dr. no in washington d.c. at 5:30 p.m."),
        ("“You cannot”", "you can not"),
        ("...", ""),
    ],
)
def test_words_are_those_of_the_treebank_tokenizer(text, tokens):
    assert " ".join(words(text)) == tokens


@pytest.mark.parametrize(("captions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_captions_without_references_are_refused(captions, references):
    with pytest.raises(ValueError, match="each caption needs one or more"):
        score(captions, references)


def test_java_metrics_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(coco_captions.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"pycocoevalcap is not installed|there is no java"):
        coco_captions.score(["a"], [["a"]])
    with pytest.raises(ValueError, match="or set java=false for CIDEr, BLEU-4 and ROUGE-L in plain Python"):
        Captions(java=["meteor"])


class Failing:
    """What SPICE does where its models cannot be fetched or Java ends with an error."""

    def tokenize(self, texts):
        return {n: [one["caption"] for one in own] for n, own in texts.items()}

    def compute_score(self, theirs, ours):
        raise subprocess.CalledProcessError(1, "java")


def test_a_metric_that_fails_in_java_is_one_line_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(coco_captions, "_absent", lambda: "")
    module = SimpleNamespace(PTBTokenizer=Failing)
    monkeypatch.setattr(coco_captions.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(coco_captions, "_scorer", lambda name: Failing())
    with pytest.raises(
        ValueError, match=r"java=True: bleu failed in Java .*without it: \[rouge_l, cider, meteor, spice\]"
    ):
        Captions(java=True)
