import pytest
import torch
from eval_toys import Lookup, captioned, make_data, toy_graph

from vlp.eval import scores, stored
from vlp.eval.retrieval import Retrieval, table
from vlp.eval.runner import evaluate
from vlp.forward import quantity
from vlp.types import Grid, Tokens

CASE = [[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.7, 0.6]]  # captions "zero", "one", "two" against clips 0, 1, 2


def lookup(similarity, scale=1.0):
    """A model with given similarities [words, clips] of one-word texts; the word of row i is the number i."""
    similarity = torch.tensor(similarity)
    return Lookup(torch.eye(similarity.shape[1]), similarity, scale=scale)


def run(folder, similarity, metas, *, scale=1.0, unusable=(), **options):
    return evaluated(folder, lookup(similarity, scale), metas, unusable=unusable, **options)


def evaluated(folder, model, metas, *, unusable=(), **options):
    data = make_data(metas, batch_size=2, unusable=unusable)
    options = {"tasks": {"retrieval": Retrieval(**options)}, "data": data, "step": 1, "device": "cpu"}
    return evaluate(model, toy_graph(model), out_dir=folder / "eval", **options)["tasks"]["retrieval"]


def column(task, name="raw"):
    return {row["key"]: row[name] for row in task["rows"]}


def test_retrieval_equals_the_hand_case(tmp_path):
    raw = column(run(tmp_path, CASE, captioned("zero", "one", "two")))
    found = {key: raw[key] for key in ("t2v_median_rank", "v2t_median_rank", "t2v_r5", "v2t_r10")}
    assert found == {"t2v_median_rank": 2, "v2t_median_rank": 1, "t2v_r5": 100, "v2t_r10": 100}
    assert [raw["t2v_r1"], raw["v2t_r1"]] == pytest.approx([33.333, 66.667], abs=1e-3)
    assert [raw["t2v_mean_rank"], raw["v2t_mean_rank"]] == pytest.approx([1.667, 1.333], abs=1e-3)


def test_every_caption_is_a_query_and_the_best_one_answers(tmp_path):
    # Clip 0 has captions zero and one, clip 1 has two, clip 2 has three.
    similarity = [[0.9, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.5, 0.1], [0.0, 0.4, 0.8]]
    task = run(tmp_path, similarity, captioned(["zero", "one"], "two", "three"))
    raw = column(task)
    assert raw["t2v_r1"] == 75  # one finds clip 1; it would be third for clip 0
    assert raw["t2v_mean_rank"] == (1 + 3 + 1 + 1) / 4
    assert raw["v2t_r1"] == pytest.approx(66.667, abs=1e-3)  # to clip 1, caption one of clip 0 is nearer than two
    assert {row["key"]: row["num"] for row in task["rows"]}["t2v_r1"] == 4


def test_each_caption_counts_by_itself_where_that_is_asked(tmp_path):
    # Columns are clips, rows captions: clip 0 has zero and one, clip 1 has two, clip 2 has three and four.
    similarity = [[0.9, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.5, 0.4], [0.0, 0.4, 0.8], [0.3, 0.1, 0.4]]
    metas = captioned(["zero", "one"], "two", ["three", "four"])
    raw = column(run(tmp_path, similarity, metas, every_caption=True))
    # Ranks among all five: clip 0: .9 first, .1 fourth; clip 1: .5 second; clip 2: .8 first, .4 third (a tie is lost).
    found = {key: value for key, value in raw.items() if "_every_" in key or "_best_" in key or "_worst_" in key}
    assert found["v2t_every_r1"] == pytest.approx(100 * (0.5 + 0 + 0.5) / 3) and found["v2t_every_r5"] == 100
    assert found["v2t_best_r1"] == pytest.approx(200 / 3) and found["v2t_worst_r1"] == 0
    assert found["v2t_every_mean_rank"] == pytest.approx((2.5 + 2 + 2) / 3) and found["v2t_every_median_rank"] == 2
    kept = scores.read(tmp_path / "scores" / "step-000001.toys.retrieval.json")
    assert kept.each["v2t_every_r1"].values == [50, 0, 50] and len(found) == 11


def test_one_caption_a_video_makes_each_best_and_worst_the_same(tmp_path):
    raw = column(run(tmp_path, CASE, captioned("zero", "one", "two"), every_caption=True))
    assert raw["v2t_every_r1"] == raw["v2t_best_r1"] == raw["v2t_worst_r1"] == raw["v2t_r1"]
    assert raw["v2t_every_mean_rank"] == raw["v2t_mean_rank"]


def test_texts_are_encoded_once_for_each_caption_of_the_clip_with_the_most(tmp_path):
    model = lookup(CASE)
    evaluated(tmp_path, model, captioned("zero", "one", ["two", "zero", "one"]))  # batches: clips 0 and 1, clip 2
    assert model.calls == ["video", "text", "video", "text", "text", "text"]


def test_dual_softmax_repairs_a_hub_and_stays_apart(tmp_path):
    hub = [[0.5, 0.8, 0.1], [0.2, 0.9, 0.1], [0.1, 0.8, 0.6]]  # clip 1 is near to every caption
    task = run(tmp_path, hub, captioned("zero", "one", "two"), scale=10.0)
    assert column(task)["t2v_r1"] == pytest.approx(33.333, abs=1e-3)
    assert column(task, "dual_softmax")["t2v_r1"] == 100


def test_dual_softmax_of_videos_normalises_over_the_videos(tmp_path):
    hub = torch.tensor([[0.5, 0.8, 0.1], [0.2, 0.9, 0.1], [0.1, 0.8, 0.6]]).T.tolist()
    task = run(tmp_path, hub, captioned("zero", "one", "two"), scale=10.0)
    assert column(task)["v2t_r1"] == pytest.approx(33.333, abs=1e-3)
    assert column(task, "dual_softmax")["v2t_r1"] == 100


def test_equal_embeddings_tie_and_lose(tmp_path):
    similarity = torch.rand(5, 1, generator=torch.Generator().manual_seed(0)).expand(5, 5).tolist()
    raw = column(run(tmp_path, similarity, captioned("zero", "one", "two", "three", "four")))
    assert (raw["t2v_r1"], raw["t2v_mean_rank"]) == (0, 5)


def test_unusable_clips_are_no_queries_and_no_candidates(tmp_path):
    task = run(tmp_path, CASE, captioned("zero", "one", "two"), unusable=(0,))
    assert column(task)["t2v_mean_rank"] == 1.5  # without clip 0: .5 against .1, .6 against .7
    assert column(task, "chance")["t2v_r1"] == 50


def test_examples_show_right_and_wrong_queries_with_their_results(tmp_path):
    task = run(tmp_path, CASE, captioned("zero", "one", "two"), num_examples=2, num_results=2)
    right, wrong = task["examples"]
    assert (right["query"], right["rank"], wrong["query"], wrong["rank"]) == ("zero", 1, "one", 2)
    assert [(found["key"], found["score"], found["correct"]) for found in wrong["results"]] == [
        ("clip/0", 0.8, False),
        ("clip/1", 0.5, True),
    ]
    assert all((tmp_path / found["strip"]).is_file() for found in right["results"] + wrong["results"])


def test_examples_name_the_caption_that_was_asked(tmp_path):
    similarity = [[0.9, 0.3], [0.2, 0.8], [0.1, 0.4]]
    task = run(tmp_path, similarity, captioned(["zero"], ["one", "two"]), num_examples=9)
    assert [example["query"] for example in task["examples"]] == ["zero", "one", "two"]


def test_a_split_without_usable_clips_has_no_rows(tmp_path):
    task = run(tmp_path, CASE, captioned("zero", "one"), unusable=(0, 1))
    assert (task["rows"], task["examples"]) == ([], [])


class Matched(Lookup):
    """The video keeps its number in a grid, so that a matching head can know the right answer."""

    @quantity
    def video(self, frames):
        number = frames[:, 0, 0, 0, 0].float()[:, None, None, None, None]
        return Grid(number, torch.ones(len(number), 1, dtype=torch.bool), number[:, :, 0, 0])

    @quantity
    def video_embed(self, frames):
        return self.videos[frames[:, 0, 0, 0, 0].long()]

    @quantity
    def fused_text(self, video, text_ids, text_mask):
        word = text_ids[:, 1:2, None] - 3.0  # [B, 1, 1], the number that the caption says
        return Tokens(-(video.x[:, 0, 0] - word).abs(), text_mask[:, :1])


@pytest.mark.parametrize(("rerank", "r1", "mean_rank"), [(2, 100, 1), (3, 100, 1), (1, 100 / 3, 5 / 3)])
def test_matching_orders_the_best_again_and_leaves_the_rest_behind(tmp_path, rerank, r1, mean_rank):
    similarity = torch.tensor(CASE)
    model = Matched(torch.eye(3), similarity)
    data = make_data(captioned("zero", "one", "two"), batch_size=2)
    options = {"step": 1, "device": "cpu", "scorers": {"matching": lambda fused: fused.x[:, 0, 0]}}
    tasks = {"retrieval": Retrieval(rerank=rerank)}
    found = evaluate(model, toy_graph(model), tasks, data, out_dir=tmp_path / "eval", **options)
    raw = column(found["tasks"]["retrieval"])
    assert raw["t2v_r1"] == pytest.approx(100 / 3) and raw["t2v_rerank_r1"] == pytest.approx(r1)
    assert raw["t2v_rerank_mean_rank"] == pytest.approx(mean_rank)


def test_stored_embeddings_give_the_same_table(tmp_path, capsys):
    data = make_data(captioned("zero", ["one", "two"], "two"), batch_size=2, embeddings=tmp_path / "e.safetensors")
    model, options = lookup(CASE), {"step": 1, "device": "cpu", "out_dir": tmp_path / "eval"}
    found = evaluate(model, toy_graph(model), {"retrieval": Retrieval(store=True)}, data, **options)
    rows = found["tasks"]["retrieval"]["rows"]
    again = table(stored.load(tmp_path / "e.safetensors")).rows
    assert [{key: row[key] for key in ("key", "raw", "dual_softmax")} for row in rows] == [
        {key: row[key] for key in ("key", "raw", "dual_softmax")} for row in again
    ]
    assert stored.main([str(tmp_path / "e.safetensors")]) == 0 and "t2v_r1" in capsys.readouterr().out
    assert stored.main([str(tmp_path / "absent")]) == 78


def test_intervals_and_the_protocol_stand_beside_the_scores(tmp_path):
    found = run(tmp_path, CASE, captioned("zero", "one", "two"), max_captions=1)
    assert found["protocol"]["captions"] == "first 1" and found["protocol"]["num_clips"] == 3
    (path,) = (tmp_path / "scores").glob("step-000001.toys.retrieval.json")
    kept = scores.read(path)
    assert kept.each["t2v_mean_rank"].values == [1, 2, 2] and kept.keys == {n: f"clip/{n}" for n in range(3)}
    assert all(row["low"] <= row["raw"] <= row["high"] for row in kept.rows)
