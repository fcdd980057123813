"""Several looks at a clip. Axes: T frames, H W pixels, B clips, K other views."""

import numpy as np
import pytest
import torch
from clips import clip, numbers
from eval_toys import Lookup, captioned, make_data, toy_graph
from tiny_runs import train

from vlp.data.fields import ClipReader, Clips
from vlp.data.many_views import parse
from vlp.data.sampling import Dense, Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.transforms import CenterCrop, PadToSquare
from vlp.eval import compare, scores
from vlp.eval.retrieval import Retrieval
from vlp.eval.runner import evaluate
from vlp.training import evaluate_run
from vlp.training.exits import Exit


@pytest.fixture(scope="module")
def run(place):
    """The directory of a run of two steps."""
    assert train(place, "looked") == Exit.DONE
    return place / "runs" / "looked"


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Dense(num_frames=2, window_s=0.2), [[10, 13], [28, 31], [46, 49]]),  # windows of 6 frames in 60
        (Segments(num_frames=2), [[5, 35], [15, 45], [25, 55]]),  # 1/6, 1/2 and 5/6 of each half
    ],
)
def test_each_view_looks_at_its_own_time(tmp_path, sampling, wanted):
    shards = write_shards(
        [Raw("a", clip(60), "mp4", {"captions": ["x"]})], str(tmp_path), prefix="v", max_samples_per_shard=1
    )
    whole = [PadToSquare(size=96), lambda frames, rng: frames[:, 16:80]]  # 64 x 96 again
    clips = Clips(sampling, whole, 64, views=parse("3x1", whole))
    sample = ClipReader(shards, clips=clips, seed=1, source=0, train=False).read(0, 0)
    shown = [numbers(each.frames) for each in (sample, *sample.more)]
    np.testing.assert_allclose(shown, wanted, atol=1)


def test_crops_go_from_the_beginning_to_the_end_of_the_long_side():
    wide = np.random.default_rng(0).integers(0, 255, (2, 6, 11, 3), np.uint8)  # [T, H, W, 3]
    views = parse("2x3", [CenterCrop(size=6)])
    assert [view.time for view in views] == [0.25] * 3 + [0.75] * 3
    for view, start in zip(views[:3], (0, 2, 5), strict=True):
        np.testing.assert_array_equal(view.transforms[0](wide, None), wide[:, :, start : start + 6])
        tall = view.transforms[0](wide.swapaxes(1, 2), None)
        np.testing.assert_array_equal(tall, wide.swapaxes(1, 2)[:, start : start + 6])


def test_scores_are_the_mean_of_the_scores_of_the_views(tmp_path):
    similarity = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))  # [captions, looks]
    model, looks = Lookup(torch.eye(5), similarity), torch.tensor([[0, 3], [1, 4], [2, 3]])  # [B, 1 + K]
    data = make_data(captioned("zero", "one", "two"), batch_size=3)

    def batches():
        for batch in data.batches():
            more = batch.frames[:, None] * 0 + looks[:, 1:, None, None, None, None].to(torch.uint8)
            yield batch._replace(more_frames=more, more_frame_mask=batch.frame_mask[:, None])

    options = {"step": 1, "out_dir": tmp_path / "eval", "device": "cpu"}
    found = evaluate(
        model, toy_graph(model), {"r": Retrieval()}, data._replace(batches=batches, num_frames=6), **options
    )
    mean = similarity[:, looks].mean(-1)  # [captions, B]
    wanted = [int((row >= row[n]).sum()) for n, row in enumerate(mean)]
    kept = scores.read(tmp_path / "scores" / "step-000001.toys.r.json")
    assert kept.each["t2v_mean_rank"].values == wanted and found["num_clips"] == 3
    assert wanted != [int((row >= row[n]).sum()) for n, row in enumerate(similarity[:, :3])]


def test_views_stand_in_the_card_and_leave_out_what_cannot_be_averaged(run, capsys):
    (path,) = (run / "scores").glob("*.retrieval.json")
    once = scores.read(path)
    assert evaluate_run.main([f"run={run}", "views=1x1", "eval.batch_size=4"]) == Exit.DONE
    assert scores.read(path).rows == once.rows
    other = path.with_name("once.json")
    scores.write(other, once)
    assert evaluate_run.main([f"run={run}", "views=2x3", "eval.batch_size=4"]) == Exit.DONE
    assert "captions: views are averaged in 'video_embed', and it takes 'caption_logits'" in capsys.readouterr().out
    assert scores.read(path).card["protocol"]["views"] == "2x3 (clips x crops), mean of their scores"
    assert scores.read(path).rows != once.rows and compare.main([str(other), str(path)]) == 76
    assert "views" in capsys.readouterr().out


@pytest.mark.parametrize("views", ["3", "0x3", "20x20", "2xx", "threex3"])
def test_views_that_make_no_sense_are_one_line(run, capsys, views):
    assert evaluate_run.main([f"run={run}", f"views={views}"]) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert f"views={views} must be CLIPSxCROPS, such as 4x3" in error and "Traceback" not in error


def test_crops_without_a_crop_are_refused():
    with pytest.raises(ValueError, match="has no CenterCrop to be moved; ask for 2x1"):
        parse("2x3", [PadToSquare(size=8)])
