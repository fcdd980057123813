import pytest
import torch
from eval_toys import EOS, VOCAB, Lookup, captioned, make_data, toy_graph

from vlp.eval.captions import Captions, exact, token_f1
from vlp.eval.runner import evaluate


def script(*texts):
    rows = [[*(VOCAB.index(word) for word in text.split()), EOS] for text in texts]
    longest = max(map(len, rows))
    return [
        row + [VOCAB.index("four")] * (longest - len(row)) for row in rows
    ]  # what comes after the end must not count


def run(folder, written, metas, *, unusable=(), **options):
    model = Lookup(torch.eye(len(metas)), torch.zeros(len(VOCAB) - 3, 2), script=script(*written))
    where = {"data": make_data(metas, unusable=unusable), "step": 1, "device": "cpu", "out_dir": folder / "eval"}
    return evaluate(model, toy_graph(model), {"captions": Captions(**options)}, **where)["tasks"]["captions"], model


def test_token_f1_equals_precision_and_recall_by_hand():
    assert token_f1("red red blue", "Red, then blue, one.") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert token_f1("red red", "red red") == 1
    assert token_f1("", "red") == token_f1("blue", "red") == 0


def test_exact_match_ignores_case_and_punctuation_only():
    assert exact("red then blue", "Red, then blue.") == 1
    assert exact("red then blue", "blue then red") == 0
    assert exact("", "") == 0


def test_scores_take_the_best_reference_of_each_clip(tmp_path):
    metas = captioned(["one", "red then blue"], ["two three", "four"], "blue")
    task, _ = run(tmp_path, ["red then blue", "two", "red"], metas)
    rows = {row["key"]: row for row in task["rows"]}
    assert rows["caption_exact"]["raw"] == pytest.approx(100 / 3)
    assert rows["caption_f1"]["raw"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert rows["caption_exact"]["num"] == 3


def test_chance_is_the_score_against_other_clips(tmp_path):
    task, _ = run(tmp_path, ["red", "red", "blue"], captioned("red", "red", "blue"))
    row = task["rows"][0]
    assert (row["raw"], row["chance"]) == (100, pytest.approx(100 * 2 / 6))  # of 6 wrong pairs, 2 are (red, red)


def test_chance_of_one_clip_is_unknown(tmp_path):
    task, _ = run(tmp_path, ["red"], captioned("red"))
    assert task["rows"][0]["chance"] is None


def test_a_caption_stops_at_the_longest_text(tmp_path):
    task, model = run(tmp_path, ["red red red red red red red red"], captioned("red"))
    assert task["examples"][0]["generated"] == "red red red red red"  # six tokens with the first one
    assert model.calls.count("decoder") == 5


def test_max_length_cuts_a_caption(tmp_path):
    task, _ = run(tmp_path, ["red red red red red red red red"], captioned("red"), max_length=3)
    assert task["examples"][0]["generated"] == "red red"


def test_decoding_stops_when_all_have_ended_and_encodes_the_video_once(tmp_path):
    _, model = run(tmp_path, ["red", "red then blue"], captioned("red", "blue"))
    assert (model.calls.count("decoder"), model.calls.count("video")) == (4, 1)


def test_num_clips_are_spread_over_the_split(tmp_path):
    task, _ = run(tmp_path, ["red"] * 7, captioned(*["red"] * 7), num_clips=3, num_examples=9)
    assert task["rows"][0]["num"] == 3
    assert len({example["strip"] for example in task["examples"]}) == 3


def test_batches_without_a_chosen_clip_decode_nothing(tmp_path):
    _, model = run(tmp_path, ["red"] * 7, captioned(*["red"] * 7), num_clips=1)
    assert (model.calls.count("decoder"), model.calls.count("video")) == (2, 1)


def test_unusable_clips_are_not_captioned(tmp_path):
    task, _ = run(tmp_path, ["red", "red"], captioned("red", "blue"), unusable=(1,))
    assert (task["rows"][0]["raw"], task["rows"][0]["num"]) == (100, 1)
    assert run(tmp_path, ["red"], captioned("red"), unusable=(0,))[0]["rows"] == []


def test_examples_show_what_was_written_beside_the_references(tmp_path):
    task, _ = run(tmp_path, ["red", "two"], captioned(["red", "one"], "blue"))
    shown = [(example["generated"], example["references"]) for example in task["examples"]]
    assert shown == [("red", ["red", "one"]), ("two", ["blue"])]
    assert all((tmp_path / example["strip"]).is_file() for example in task["examples"])
