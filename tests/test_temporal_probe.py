import torch
from eval_toys import VOCAB, Lookup, make_data, toy_graph

from vlp.eval.questions import ByScorer
from vlp.eval.runner import evaluate
from vlp.eval.temporal_probe import TemporalProbe


def clip(caption, negative=None):
    return {"captions": [caption]} | ({} if negative is None else {"hard_negative": negative})


METAS = [
    clip("red then blue", "blue then red"),
    clip("blue then red", "red then blue"),
    clip("one"),
    clip("blue then red", "red then blue"),
    clip("red", "red"),
]
VIDEOS = [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]  # what comes first: red, red, -, blue, a tie


def run(folder, metas=METAS, scorers=None, by=None, **changes):
    words = torch.zeros(len(VOCAB) - 3, 2)
    words[VOCAB.index("red") - 3, 0] = words[VOCAB.index("blue") - 3, 1] = 1.0
    model = Lookup(VIDEOS, words)
    options = {"data": make_data(metas, **changes), "step": 1, "device": "cpu", "scorers": scorers or {}}
    result = evaluate(model, toy_graph(model), {"probe": TemporalProbe(by=by)}, out_dir=folder / "eval", **options)
    return result["tasks"]["probe"], model


def test_accuracy_counts_clips_with_a_negative_and_ties_are_wrong(tmp_path):
    task, _ = run(tmp_path)
    (row,) = task["rows"]
    assert (row["key"], row["raw"], row["num"], row["chance"]) == ("temporal_accuracy", 50, 4, 50)


def test_scores_that_are_not_numbers_are_wrong(tmp_path):
    task, _ = run(tmp_path, scorers={"matching": lambda tokens: torch.full((len(tokens.x),), float("nan"))})
    assert [row["raw"] for row in task["rows"]] == [50, 0]


def test_matching_scores_the_fused_pair_in_a_row_of_its_own(tmp_path):
    task, _ = run(tmp_path, scorers={"matching": lambda tokens: tokens.x[:, 0].norm(dim=-1)})  # prefers what is far
    assert [row["key"] for row in task["rows"]] == ["temporal_accuracy", "temporal_accuracy_matching"]
    assert [row["raw"] for row in task["rows"]] == [50, 25]


def test_a_model_without_embeddings_is_asked_by_its_head_alone(tmp_path):
    by = ByScorer(scorer="other")
    task, _ = run(tmp_path, scorers={"other": lambda tokens: tokens.x[:, 0].norm(dim=-1)}, by=by)
    assert [(row["key"], row["raw"]) for row in task["rows"]] == [("temporal_accuracy_matching", 25)]
    assert TemporalProbe(by=by).needs == ("fused_text",) and TemporalProbe(by=by).borrows == ("other",)


def test_the_video_is_encoded_once_a_batch(tmp_path):
    _, model = run(tmp_path, scorers={"matching": lambda tokens: tokens.x[:, 0].sum(-1)})
    assert (model.calls.count("video"), model.calls.count("text")) == (2, 4)


def test_unusable_clips_are_left_out(tmp_path):
    task, _ = run(tmp_path, unusable=(1, 4))
    assert (task["rows"][0]["raw"], task["rows"][0]["num"]) == (100, 2)


def test_a_source_without_negatives_has_no_rows(tmp_path):
    task, model = run(tmp_path, [clip("red"), clip("blue", "")])
    assert (task["rows"], task["examples"]) == ([], [])
    assert model.calls.count("text") == 2  # all ranks take the same nodes, whatever their clips have


def test_examples_show_both_texts_and_scores(tmp_path):
    task, _ = run(tmp_path)
    right, wrong = task["examples"][:2]
    assert {name: right[name] for name in ("kind", "caption", "negative", "correct")} == {
        "kind": "choice",
        "caption": "red then blue",
        "negative": "blue then red",
        "correct": True,
    }
    assert (right["score"], right["negative_score"], wrong["correct"]) == (1.0, 0.81, False)
    assert (tmp_path / right["strip"]).is_file()
