import numpy as np
import torch

from vlp.data.collate import collate
from vlp.data.fields import Sample
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.texts import Texts
from vlp.types import IGNORE_INDEX, Reason, nothing_more

SHAPE = (3, 5, 7, 3)  # T H W 3


def sample(num_frames: int, text: str, *others: str | None, sample_id: int = 4, status: Reason = Reason.OK) -> Sample:
    frames = np.full((num_frames, *SHAPE[1:]), 9, np.uint8)
    texts = Texts(text, others, len(others) or IGNORE_INDEX)
    return Sample(frames, np.arange(num_frames) + 0.5, texts, sample_id, -(2**63), status, "", 0.1)


def tokenizer(tmp_path):
    train_tokenizer(["a red ball moves to the left and then up again"], vocab_size=200, path=tmp_path / "t.json")
    return load_tokenizer(str(tmp_path / "t.json"), max_length=12)


def test_short_clip_is_padded_and_masked_in_reused_memory(tmp_path):
    buffer = torch.full((1000,), 77, dtype=torch.uint8)
    batch = collate([sample(2, "a"), sample(3, "ball")], tokenizer(tmp_path), shape=SHAPE, buffer=buffer)
    assert batch.frames.shape == (2, *SHAPE) and batch.frames.data_ptr() == buffer.data_ptr()
    assert (batch.frames[0, :2] == 9).all() and (batch.frames[0, 2] == 0).all() and (batch.frames[1] == 9).all()
    assert batch.frame_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.times_s.tolist() == [[0.5, 1.5, 0.0], [0.5, 1.5, 2.5]]


def test_a_batch_of_short_clips_is_as_long_as_its_longest(tmp_path):
    batch = collate([sample(1, "a"), sample(2, "ball")], tokenizer(tmp_path), shape=SHAPE)
    assert batch.frames.shape == (2, 2, *SHAPE[1:]) and batch.frame_mask.tolist() == [[True, False], [True, True]]
    assert batch.times_s.tolist() == [[0.5, 0.0], [0.5, 1.5]]


def test_fields_have_the_types_of_the_contract(tmp_path):
    batch = collate([sample(3, "a red ball")], tokenizer(tmp_path), shape=SHAPE)
    integers = (batch.text_ids, batch.word_ids, batch.status, batch.sample_id, batch.key)
    assert batch.frames.dtype == torch.uint8 and batch.times_s.dtype == torch.float32
    assert {x.dtype for x in integers} == {torch.int64}
    assert {x.dtype for x in (batch.frame_mask, batch.text_mask, batch.valid)} == {torch.bool}
    assert batch.key.item() == -(2**63) and batch.sample_id.item() == 4


def test_text_is_padded_to_a_multiple_of_eight_up_to_the_maximum(tmp_path):
    words = tokenizer(tmp_path)
    assert collate([sample(3, "ball"), sample(3, "")], words, shape=SHAPE).text_ids.shape == (2, 8)
    assert collate([sample(3, "ball " * 9)], words, shape=SHAPE).text_ids.shape == (1, 12)


def test_tombstone_is_not_valid_but_has_whole_masks(tmp_path):
    bad = sample(3, "", status=Reason.CHECKSUM)
    batch = collate([sample(3, "a"), bad], tokenizer(tmp_path), shape=SHAPE)
    assert batch.valid.tolist() == [True, False]
    assert batch.status.tolist() == [Reason.OK, Reason.CHECKSUM]
    assert batch.frame_mask[1].all() and batch.text_mask[1].any()


def test_other_texts_keep_their_clip_and_absent_ones_are_masked(tmp_path):
    words = tokenizer(tmp_path)
    batch = collate([sample(3, "a", "ball", None), sample(3, "red", "up", "left again")], words, shape=SHAPE)
    assert batch.more_ids.shape == batch.more_mask.shape == (2, 2, 8)
    assert words.decode(batch.more_ids[1]) == ["up", "left again"] and words.decode(batch.more_ids[0])[0] == "ball"
    assert batch.more_mask.any(-1).tolist() == [[True, False], [True, True]] and batch.label.tolist() == [2, 2]


def test_clips_with_one_caption_bring_no_other_texts(tmp_path):
    batch = collate([sample(3, "a"), sample(3, "ball"), sample(3, "red")], tokenizer(tmp_path), shape=SHAPE)
    assert batch.more_ids.shape[:2] == (3, 0) and batch.label.tolist() == [IGNORE_INDEX] * 3
    assert all(torch.equal(getattr(batch, name), value) for name, value in nothing_more(3).items() if name == "label")
