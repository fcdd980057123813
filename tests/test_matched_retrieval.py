"""Every caption read together with every clip."""

import pytest
import torch
from eval_toys import Lookup, captioned, make_data, toy_graph

from vlp.eval.matched_retrieval import MatchedRetrieval
from vlp.eval.runner import evaluate

CASE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.7, 0.6]])  # captions "zero", "one", "two" by clip


def run(folder, metas, *, unusable=(), **options):
    """The toy fuses to the difference of both vectors; the head prefers what is near."""
    model = Lookup(torch.eye(3), CASE)
    data = make_data(metas, batch_size=2, unusable=unusable)
    lent = {"matching": lambda tokens: -tokens.x[:, 0].square().sum(-1)}  # nearest in space
    tasks = {"retrieval": MatchedRetrieval(**options)}
    found = evaluate(model, toy_graph(model), tasks, data, step=1, out_dir=folder, device="cpu", scorers=lent)
    return found["tasks"]["retrieval"], model


def by_hand(texts, clips):
    """The rank of clip i for caption i, by the distance of their vectors."""
    distance = torch.cdist(CASE[texts], torch.eye(3)[clips])
    return [int((row <= row[i]).sum()) for i, row in enumerate(distance)]


def test_ranks_equal_the_hand_case(tmp_path):
    task, _ = run(tmp_path, captioned("zero", "one", "two"))
    raw = {row["key"]: row["raw"] for row in task["rows"]}
    assert raw["t2v_matching_mean_rank"] == pytest.approx(sum(by_hand([0, 1, 2], [0, 1, 2])) / 3)
    columns = torch.cdist(CASE, torch.eye(3)).T
    expected = [int((row <= row[i]).sum()) for i, row in enumerate(columns)]
    assert raw["v2t_matching_mean_rank"] == pytest.approx(sum(expected) / 3)


def test_the_video_is_encoded_once_and_the_search_ends_at_num_clips(tmp_path):
    task, model = run(tmp_path, captioned("zero", "one", "two"), num_clips=2)
    assert model.calls.count("video") == 2  # batches
    chance = {row["key"]: row["chance"] for row in task["rows"]}
    assert chance["t2v_matching_r1"] == 50 and task["protocol"]["searched"] == "first 2 clips"


def test_several_captions_answer_for_their_clip(tmp_path):
    task, _ = run(tmp_path, captioned(["zero", "two"], "one", "two"), max_captions=None)
    num = {row["key"]: row["num"] for row in task["rows"]}
    assert (num["t2v_matching_r1"], num["v2t_matching_r1"]) == (4, 3)


def test_clips_that_cannot_be_read_are_left_out(tmp_path):
    task, _ = run(tmp_path, captioned("zero", "one", "two"), unusable=(1,))
    assert {row["num"] for row in task["rows"]} == {2}
    task, _ = run(tmp_path, captioned("zero", "one"), unusable=(0, 1))
    assert task["rows"] == []


@pytest.mark.parametrize("options", [{"num_clips": 0}, {"max_captions": 0}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        MatchedRetrieval(**options)
