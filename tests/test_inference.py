"""A trained run from Python."""

import av
import numpy as np
import pytest
import torch
from tiny_runs import train

import vlp
from vlp.training.exits import Exit


@pytest.fixture(scope="module")
def model(place):
    assert train(place, "loaded", "objective=[contrastive]", "optim.ema_decay=0.5") == Exit.DONE
    return vlp.load(place / "runs" / "loaded")


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for value in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((80, 96, 3), 10 * value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_similarity_is_the_cosine_of_the_embeddings(model, clip):
    texts = ["a red circle moves left", "a blue star grows", "a green ring"]
    scores = model.similarity(clip, texts)
    expected = (model.embed_video([clip]) @ model.embed_text(texts).T)[0]
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (3,)


def test_embeddings_are_unit_vectors_and_do_not_depend_on_their_neighbours(model):
    both = model.embed_text(["a red circle moves left", "a blue star"])
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.embed_text(["a blue star"])[0], both[1], atol=1e-5, rtol=0)


def test_broken_file_is_one_clear_error(model, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        model.embed_video([tmp_path / "broken.mp4"])


def test_directory_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="there is no run here"):
        vlp.load(tmp_path)
