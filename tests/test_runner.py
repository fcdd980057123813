import hashlib
import io
import json
from datetime import timedelta

import forks
import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing
from eval_toys import MAX_LENGTH, VOCAB, Lookup, captioned, encode, make_batch, make_data, toy_graph
from PIL import Image
from torch import nn

from vlp import dist
from vlp.eval import strips
from vlp.eval.captions import Captions
from vlp.eval.decoding import Beam
from vlp.eval.matched_retrieval import MatchedRetrieval
from vlp.eval.questions import ByCosine, ByVocabulary, MultipleChoice, OpenEnded
from vlp.eval.retrieval import Retrieval
from vlp.eval.runner import evaluate, flat_scores
from vlp.eval.temporal_probe import TemporalProbe
from vlp.forward import ForwardPass, Graph, quantity
from vlp.types import Batch, Grid, Tokens

THREE = captioned("zero", "one", "two")
# One to three captions, some with a hard negative; the number of clips is a multiple of neither two nor three.
SEVEN = [
    {"captions": [VOCAB[3 + i % 5] + " then red", "blue one", "red two"][: 1 + i % 3]}
    | ({"hard_negative": "red then " + VOCAB[3 + i % 5]} if i % 4 < 2 else {})
    | {"choices": [{"question": "red", "options": ["one", "two", "blue"][: 2 + i % 2], "answer": i % 2}] * (i % 3)}
    | {"questions": [{"question": "one then", "answer": "blue"}] * (2 - i % 3)}
    for i in range(7)
]


def lookup(num_clips=3):
    return Lookup(torch.eye(num_clips), torch.eye(len(VOCAB) - 3)[:, :num_clips])


def run(folder, model, data, *, step=5, tasks=None, **options):
    tasks = {"retrieval": Retrieval()} if tasks is None else tasks
    return evaluate(model, toy_graph(model), tasks, data, step=step, out_dir=folder / "eval", device="cpu", **options)


def all_ranks_are_here():
    """What a part with sharded parameters does first: hangs, or fails here, unless all ranks make the same call."""
    assert int(dist.sum_over_ranks(torch.ones(1))) == dist.world_size()


class Towers(nn.Module):
    """Real matrix products, whose last bits depend on the shape of a batch, and collectives in every part."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.colours = nn.Parameter(torch.randn(256, 384, generator=generator))
        self.words = nn.Parameter(torch.randn(len(VOCAB), 384, generator=generator))
        self.project = nn.Parameter(torch.randn(384, 64, generator=generator))
        self.write = nn.Parameter(torch.randn(MAX_LENGTH, 64, len(VOCAB), generator=generator))
        self.sizes = set()

    @quantity
    def video_embed(self, frames):
        self.sizes.add(len(frames))
        all_ranks_are_here()
        return nn.functional.normalize(self.colours[frames[:, 0, 0, 0, 0].long()] @ self.project, dim=-1)

    @quantity
    def text_embed(self, text_ids, text_mask):
        all_ranks_are_here()
        places = torch.arange(1, text_ids.shape[1] + 1)
        tokens = self.words[text_ids] * (text_mask * places)[..., None]
        return nn.functional.normalize(tokens.sum(1) @ self.project, dim=-1)

    @quantity
    def logit_scale(self):
        return torch.tensor(20.0)

    @quantity
    def video(self, video_embed):
        x = video_embed[:, None, None, None]  # [B, 1, 1, 1, D]
        return Grid(x, torch.ones(len(x), 1, dtype=torch.bool), x[:, :, 0, 0])

    @quantity
    def fused_text(self, video, text_embed, text_mask):
        all_ranks_are_here()
        return Tokens((video.x[:, 0, 0] * text_embed[:, None]).tanh() @ self.project[:64], text_mask[:, :1])

    @quantity
    def caption_logits(self, video_embed, text_ids):
        all_ranks_are_here()
        return torch.einsum("be,lev->blv", video_embed, self.write[: text_ids.shape[1]])


def everything(rank, world, folder):
    """Evaluate seven clips of which one is unusable, and two clips of which the third process gets none."""
    torch.set_num_threads(1)
    tasks = {"retrieval": Retrieval(rerank=2, store=True, every_caption=True), "probe": TemporalProbe()}
    tasks |= {"matched": MatchedRetrieval(num_clips=5, max_captions=None)}
    tasks |= {"captions": Captions(num_clips=5, writer=Beam(num_beams=2)), "choice": MultipleChoice(by=ByCosine())}
    tasks |= {"answers": OpenEnded(by=ByVocabulary(answers=["red", "blue"]))}
    lent = {"matching": lambda fused: fused.x[:, 0].sum(-1), "answers": lambda fused: fused.x[:, 0, :2]}
    options = {"scorers": lent, "device": "cpu"}
    for metas, unusable in ((SEVEN, (3,)), (SEVEN[:2], ())):
        model = Towers()
        data = make_data(metas, rank=rank, world=world, batch_size=4, unusable=unusable)
        where = {"step": len(metas), "out_dir": folder / str(world) / "eval"}
        data = data._replace(embeddings=folder / str(world) / f"{len(metas)}.safetensors")
        result = evaluate(model, toy_graph(model), tasks, data, **where, **options)
        assert model.sizes == {4}
        assert result == json.loads((where["out_dir"] / f"step-{len(metas):06d}.toys.json").read_text())


def process(rank, folder):
    for world in (3, 2):
        store = torch_dist.FileStore(str(folder / f"store{world}"), world)
        if rank < world:
            options = {"store": store, "rank": rank, "world_size": world, "timeout": timedelta(seconds=240)}
            torch_dist.init_process_group("gloo", **options)
            everything(rank, world, folder)
            torch_dist.barrier()
            torch_dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The files of the same evaluations by one, two and three processes, in folders of that name."""
    folder = tmp_path_factory.mktemp("worlds")
    everything(0, 1, folder)
    forks.context()  # imports once for all processes
    torch.multiprocessing.start_processes(process, args=(folder,), nprocs=3, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", ["2", "3"])
def test_scores_of_several_processes_are_those_of_one_to_the_last_digit(worlds, world):
    single = sorted(path for path in (worlds / "1").rglob("*") if path.is_file())
    assert {path.suffix for path in single} == {".json", ".jpg", ".safetensors"}
    for path in single:
        other = worlds / world / path.relative_to(worlds / "1")
        assert other.read_bytes() == path.read_bytes(), path.name


def test_result_says_what_was_evaluated(tmp_path):
    result = run(tmp_path, lookup(), make_data(THREE, batch_size=2, unusable=(1,)))
    about = {name: value for name, value in result.items() if name != "tasks"}
    assert about == {
        "step": 5,
        "source": "toys",
        "split": "test",
        "num_clips": 2,
        "num_unusable": 1,
        "trained_on_these": False,
    }
    assert result["tasks"]["retrieval"]["title"] == "Text-video retrieval"
    assert [path.name for path in (tmp_path / "eval").glob("step*")] == ["step-000005.toys.json"]


def test_model_runs_in_eval_mode_without_gradient_and_returns_to_its_own(tmp_path):
    model = lookup().train()
    model.frozen.eval()
    run(tmp_path, model, make_data(THREE))
    assert set(model.modes) == {(False, False)}
    assert (model.training, model.frozen.training) == (True, False)


def test_model_returns_to_its_mode_after_an_error(tmp_path):
    model = lookup().train()
    with pytest.raises(ValueError, match="2 clips, 2 different"):
        run(tmp_path, model, make_data(THREE, batches=lambda: iter([make_batch([0, 1], ["zero", "one"])])))
    assert model.training


class Caching(Lookup):
    """Makes a table in its first pass and keeps it, as rotary positions do."""

    table = None

    @quantity
    def video_embed(self, video):
        self.table = torch.ones(3) if self.table is None else self.table
        return self.videos[video] * self.table


def test_a_table_made_while_evaluating_can_be_used_in_training(tmp_path):
    model = Caching(torch.eye(3), torch.eye(len(VOCAB) - 3)[:, :3])
    run(tmp_path, model, make_data(THREE))
    model.video_embed(torch.tensor([0, 2])).sum().backward()
    torch.testing.assert_close(model.videos.grad, torch.tensor([[1.0] * 3, [0.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("given", [[0, 1, 1], [0, 1, 2, 2]])
def test_clips_given_twice_are_refused(tmp_path, given):
    batch = make_batch(given, [THREE[sample]["captions"][0] for sample in given])
    with pytest.raises(ValueError, match=rf"{len(given)} clips, {len(set(given))} different ones, .* has 3"):
        run(tmp_path, lookup(), make_data(THREE, batch_size=4, batches=lambda: iter([batch])))
    assert not (tmp_path / "eval").exists()


def test_texts_other_than_the_first_caption_are_refused(tmp_path):
    other = make_data(THREE, batches=lambda: iter([make_batch([0, 1, 2], ["zero", "two", "two"])]))
    with pytest.raises(ValueError, match="'clip/1' is not its first caption"):
        run(tmp_path, lookup(), other)


def test_a_split_without_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match="toys: split 'test' has no clip"):
        run(tmp_path, lookup(), make_data([]))


def test_all_tasks_share_one_pass_and_every_batch_has_one_shape(tmp_path):
    model = lookup()
    run(tmp_path, model, make_data(THREE, batch_size=2), tasks={"a": Retrieval(), "b": TemporalProbe()})
    assert model.sizes == [2, 2]
    assert model.calls.count("text") == 4  # captions and negatives


def test_a_second_evaluation_replaces_the_first_but_not_its_pictures(tmp_path):
    run(tmp_path, lookup(), make_data(THREE))
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "eval/media").iterdir()}
    result = run(tmp_path, lookup(), make_data(THREE, trained_on_these=True))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "eval/media").iterdir()} == pictures
    assert json.loads((tmp_path / "eval/step-000005.toys.json").read_text()) == result
    assert not list((tmp_path / "eval").rglob("*.part"))


def test_scores_that_are_not_numbers_still_give_json(tmp_path):
    model = lookup()
    nn.init.constant_(model.videos, float("nan"))
    retrieval = run(tmp_path, model, make_data(THREE))["tasks"]["retrieval"]
    assert retrieval["rows"][0]["raw"] == 0
    assert retrieval["examples"][0]["results"][0]["score"] is None


class Broken:
    title, needs = "Broken", ()

    def protocol(self):
        return {}

    def begin(self, data, *, scorers):
        pass

    def update(self, batch, forward):
        pass

    def finish(self):
        return {"title": self.title, "rows": [{"key": "loss", "raw": float("nan")}], "examples": []}


def test_a_task_that_gives_no_json_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(tmp_path, lookup(), make_data(THREE), tasks={"broken": Broken()})
    assert not list(tmp_path.rglob("*.json"))


def test_flat_scores_name_the_source_and_keep_dual_softmax_apart(tmp_path):
    scores = flat_scores(run(tmp_path, lookup(), make_data(THREE)))
    assert scores["val/toys/t2v_r1"] == scores["val/toys/t2v_r1_dsl"] == 100
    assert len(scores) == 20


def test_flat_scores_refuse_two_rows_of_one_key(tmp_path):
    result = run(tmp_path, lookup(), make_data(THREE), tasks={"a": Retrieval(), "b": Retrieval()})
    with pytest.raises(ValueError, match=r"tasks\.b: 't2v_r1'"):
        flat_scores(result)


def test_strip_shows_the_real_frames_in_order(tmp_path):
    frames = torch.arange(0, 200, 10, dtype=torch.uint8)[:, None, None, None].expand(20, 8, 6, 3)
    picture = Image.open(io.BytesIO(strips.jpeg(frames)))
    assert picture.size == (8 * 112, 112)
    levels = [picture.getpixel((112 * place + 56, 56))[0] for place in range(8)]
    assert levels == pytest.approx([0, 30, 50, 80, 110, 140, 160, 190], abs=2)


def test_strip_of_few_frames_is_short_and_leaves_padding_out():
    pictures = strips.Strips()
    pictures.add(make_batch([40], ["one"]))  # four frames, the last one padding
    assert Image.open(io.BytesIO(pictures.jpegs[40])).size == (3 * 112, 112)


def test_strips_of_tombstones_are_not_made():
    pictures = strips.Strips()
    pictures.add(make_batch([3, 4], ["one", "two"], unusable=(3,)))
    assert pictures.find([3, 4, 5]).keys() == {4}


def test_file_names_come_from_a_digest_of_source_and_key():
    name = strips.file_name("web", "../../etc/passwd")
    assert name == hashlib.sha256(b"web/../../etc/passwd").hexdigest()[:24] + ".jpg"
    assert name != strips.file_name("world", "../../etc/passwd")


def test_strips_without_a_file_are_null():
    results = {"a": {"examples": [{"strip": 3, "results": [{"strip": 4, "n": 4}]}], "rows": [{"n": 3}]}}
    assert strips.asked(results) == {3, 4}
    assert strips.answered(results, {4: "eval/media/x.jpg"}) == {
        "a": {"examples": [{"strip": None, "results": [{"strip": "eval/media/x.jpg", "n": 4}]}], "rows": [{"n": 3}]}
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu_are_those_on_the_cpu(tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        tasks = {"retrieval": Retrieval(), "probe": TemporalProbe(), "captions": Captions()}
        model, options = lookup(7).to(device), {"scorers": {"matching": lambda tokens: tokens.x[:, 0].sum(-1)}}
        where = {"step": 1, "out_dir": tmp_path / device / "eval", "device": device}
        results.append(evaluate(model, toy_graph(model), tasks, make_data(SEVEN), **where, **options))
    assert results[0] == results[1]


class Reverse:
    """A view that does not read what it replaces."""

    writes = ("text_mask",)

    def __call__(self, text_ids):
        return (text_ids.flip(1) != 0,)


def test_replaced_fields_change_what_depends_on_them_and_nothing_else():
    model, texts = lookup(), encode(["two", "one"])
    forward = ForwardPass(model, make_batch([0, 1], ["zero", "one"]), toy_graph(model))
    other = forward.with_fields(text_ids=texts[0], text_mask=texts[1])
    assert other.take("text_embed").argmax(1).tolist() == [2, 1]
    assert forward.take("text_embed").argmax(1).tolist() == [0, 1]
    assert other.take("video_embed") is forward.take("video_embed")
    assert model.calls == ["text", "text", "video"]


def test_replaced_fields_reach_through_views_and_a_second_replacement():
    model, texts = lookup(), encode(["two", "one"])
    graph = Graph(model, fields=Batch._fields, views={"reverse": Reverse()})
    forward = ForwardPass(model, make_batch([0, 1], ["zero", "one"]), graph)
    other = forward.with_fields(text_ids=texts[0]).with_fields(text_mask=texts[1])
    assert other.take("text_ids").tolist() == texts[0].tolist()
    assert other.take("text_mask:reverse") is other.base.take("text_mask:reverse")
    assert other.take("text_embed").argmax(1).tolist() == [2, 1]


def test_replacing_an_unknown_field_is_a_bug():
    forward = ForwardPass(lookup(), make_batch([0], ["zero"]), toy_graph(lookup()))
    with pytest.raises(AssertionError, match="txt_ids"):
        forward.with_fields(txt_ids=1)
