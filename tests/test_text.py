import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlp.data.text import load_tokenizer, tokenizer_from_json, train_tokenizer

CAPTIONS = [
    f"A {c} {s} moves {d}, then turns." for c in ("red", "blue") for s in ("ball", "cube") for d in ("left", "up")
]
FAST = settings(max_examples=50, deadline=None, derandomize=True)


def trained(tmp_path: Path, *, max_length: int = 16, vocab_size: int = 150):
    train_tokenizer(CAPTIONS, vocab_size=vocab_size, path=tmp_path / "tokenizer.json")
    return load_tokenizer(str(tmp_path / "tokenizer.json"), max_length=max_length)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("words"))


def test_new_word_is_spelt_and_not_unknown(words):
    ids = words.encode(["quiz 7"], multiple_of=1).ids
    assert 1 not in ids and words.decode(ids) == ["quiz 7"]


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    """A byte-level BPE without padding token, saved the way Hugging Face repositories are."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return str(folder)


def test_special_tokens_have_the_documented_ids(words):
    assert (words.pad_id, words.bos_id, words.eos_id, words.mask_id) == (0, 2, 3, 4)
    assert words.vocab_size <= 150


def test_encode_frames_captions_and_pads_to_a_multiple(words):
    encoded = words.encode(["a red ball", "A blue cube moves up"])
    assert encoded.ids.shape == encoded.mask.shape == encoded.word_ids.shape == (2, 8)
    assert encoded.ids[:, 0].tolist() == [2, 2]
    assert encoded.ids[0, encoded.mask[0]][-1] == 3
    assert (encoded.ids[~encoded.mask] == 0).all() and (encoded.word_ids[~encoded.mask] == -1).all()
    assert words.encode(["a"], multiple_of=16).ids.shape == (1, 16)


def test_long_caption_is_cut_and_keeps_its_end(words):
    encoded = words.encode(["red " * 50])
    assert encoded.ids.shape == (1, 16) and encoded.mask.all()
    assert encoded.ids[0, -1] == words.eos_id and encoded.ids[0, 0] == words.bos_id


def test_word_ids_equal_the_pretokenizer_of_wordpiece(words):
    text = "Red ball, (unknownish) don't cubes-left!"
    encoding = words.backend.encode(text, add_special_tokens=False)
    assert len(set(encoding.word_ids)) < len(encoding.word_ids)  # some word has several pieces
    assert words.encode([text], multiple_of=1).word_ids[0].tolist()[1:-1] == encoding.word_ids[:14]


def test_word_ids_of_byte_level_tokens_share_their_word(byte_folder):
    tokenizer = load_tokenizer(byte_folder, max_length=32)
    encoded = tokenizer.encode(["zebra ball"], multiple_of=1)
    pieces = [tokenizer.backend.id_to_token(i) for i in encoded.ids[0].tolist()[1:-1]]
    letters = "".join(pieces).index("Ġ")  # pieces before the space are of word 0
    expected = [0 if sum(map(len, pieces[:i])) < letters else 1 for i in range(len(pieces))]
    assert len(pieces) > 3 and encoded.word_ids[0].tolist() == [-1, *expected, -1]


def test_caption_that_names_a_special_token_is_plain_text(words, byte_folder):
    for tokenizer in (words, pickle.loads(pickle.dumps(words)), load_tokenizer(byte_folder, max_length=32)):
        inside = tokenizer.encode(["[MASK] <|endoftext|> [SEP]"], multiple_of=1).ids[0, 1:-1].tolist()
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & {*inside}


def test_scripts_without_spaces_have_one_word_per_character(words):
    from vlp.data.text import _word_numbers

    assert _word_numbers("red 狗猫 café", [(0, 3), (4, 5), (5, 6), (7, 9), (9, 11)]) == [0, 1, 2, 3, 3]


def test_decode_returns_the_caption_up_to_its_end(words):
    encoded = words.encode(["a red ball moves left", "a blue cube"])
    assert words.decode(encoded.ids) == ["a red ball moves left", "a blue cube"]
    tail = torch.cat([encoded.ids[1, :5], encoded.ids[0, 1:4]])[None]
    assert words.decode(tail) == ["a blue cube"]


def test_tokenizer_without_padding_uses_the_end_token(byte_folder):
    tokenizer = load_tokenizer(byte_folder, max_length=32)
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.bos_id and tokenizer.mask_id is None
    assert tokenizer.decode(tokenizer.encode(["A red ball", "A cube moves up"]).ids) == [
        "A red ball",
        "A cube moves up",
    ]


def test_hugging_face_folder_equals_its_own_tokenizer(tmp_path, words):
    from transformers import AutoTokenizer, BertTokenizerFast

    BertTokenizerFast(tokenizer_object=words.backend).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS[0])["input_ids"]
    ours = load_tokenizer(str(tmp_path), max_length=32).encode([CAPTIONS[0]], multiple_of=1)
    assert ours.ids[0].tolist() == theirs


@pytest.mark.parametrize("revision", [None, "main", "abc123", "a" * 41])
def test_name_without_a_commit_is_refused(revision):
    with pytest.raises(ValueError, match="a branch can move; set revision to the 40-digit"):
        load_tokenizer("someone/model", max_length=8, revision=revision)


def test_tokenizer_without_end_token_is_refused(tmp_path):
    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(str(tmp_path / "bare.json"), max_length=8)
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        trained(tmp_path, max_length=2)


def test_training_gives_the_same_file_every_time(tmp_path):
    for name in "abcd":  # the hash tables of the library are seeded anew for each
        train_tokenizer(CAPTIONS, vocab_size=90, path=tmp_path / name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [*"abcd"]


def test_json_and_pickle_keep_the_tokenizer(byte_folder):
    tokenizer = load_tokenizer(byte_folder, max_length=12)
    for again in (tokenizer_from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert again.to_json() == tokenizer.to_json()
        assert torch.equal(again.encode(CAPTIONS).ids, tokenizer.encode(CAPTIONS).ids)


@FAST
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=4))
def test_any_text_has_a_word_for_every_token(words, texts):
    encoded = words.encode(texts)
    special = (encoded.ids == words.bos_id) | (encoded.ids == words.eos_id) | ~encoded.mask
    assert ((encoded.word_ids == -1) == special).all()
    steps = encoded.word_ids.diff(dim=1)[(encoded.word_ids[:, 1:] >= 0) & (encoded.word_ids[:, :-1] >= 0)]
    assert (steps >= 0).all()
