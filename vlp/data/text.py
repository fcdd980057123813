"""Captions to token ids and back, with any tokenizer that has a fast (Rust) backend.

Axes: N captions, L text length.
"""

import json
import os
import re
import string
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: every character is a word
_STOPS = r"\s!-/:-@\[-`{-~\u2000-\u206f\u3000-\u303f"  # spaces and punctuation
_WORD = re.compile(rf"[^{_CJK}{_STOPS}]+|\S")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_START = "\u2581"  # marks the beginning of a word while pieces are merged

# What the special tokens are called, in the order of preference, in a tokenizer.json that comes without a config.
_NAMES = {
    "pad_id": ("[PAD]", "<pad>", "<|endoftext|>", "</s>"),
    "bos_id": ("[CLS]", "<s>", "<|startoftext|>", "<|endoftext|>"),
    "eos_id": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask_id": ("[MASK]", "<mask>"),
}


class Encoded(NamedTuple):
    """Captions as a rectangle of tokens."""

    ids: Tensor  # [N, L] int64
    mask: Tensor  # [N, L] bool, True = real
    word_ids: Tensor  # [N, L] int64, which word of the caption; -1 for special tokens and padding


class Tokenizer:
    """A vocabulary and its special tokens. A caption becomes [bos] tokens [eos], whatever the backend's own habit."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_length: int,
        pad_id: int,
        eos_id: int,
        bos_id: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        """Wrap a backend. `bos_id` and `mask_id` are None where the vocabulary has none (T5, CLIP)."""
        if max_length < 3:
            raise ValueError(
                f"max_length={max_length} leaves no room between the first and the last token; at least 3."
            )
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # a caption that says "[MASK]" is a caption with brackets
        self.backend, self.max_length = backend, max_length
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = pad_id, bos_id, eos_id, mask_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

    def encode(self, texts: Sequence[str], *, multiple_of: int = 8) -> Encoded:
        """Tokenise; L is the longest caption rounded up to `multiple_of`, at most `max_length`. A cut keeps [eos]."""
        rows = [self._row(text) for text in texts]
        longest = max((len(ids) for ids, _ in rows), default=1)
        length = min(self.max_length, -(-longest // multiple_of) * multiple_of)
        ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        word_ids = np.full((len(rows), length), -1, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        for i, (tokens, words) in enumerate(rows):
            ids[i, : len(tokens)], word_ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, words, True
        return Encoded(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(word_ids))

    def decode(self, ids: Tensor) -> list[str]:
        """Return the text of ids [N, L], each row up to its first [eos] after the first position."""
        return [self.backend.decode(self._until_end(row), skip_special_tokens=True) for row in ids.tolist()]

    def to_json(self) -> str:
        """Return everything needed to make this tokenizer again, for checkpoints and exports."""
        ids = {name: getattr(self, name) for name in ("max_length", *_NAMES)}
        return json.dumps({**ids, "backend": json.loads(self.backend.to_str())})

    def __reduce__(self) -> tuple:
        return tokenizer_from_json, (self.to_json(),)  # the backend alone forgets `encode_special_tokens`

    def _row(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids and word numbers of one caption; not encode_batch, whose thread pool does not survive a fork."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        first = [] if self.bos_id is None else [self.bos_id]
        room = self.max_length - 1 - len(first)
        words = _word_numbers(text, encoding.offsets[:room])
        return [*first, *encoding.ids[:room], self.eos_id], [-1] * len(first) + words + [-1]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token == self.eos_id and i > 0), len(ids))
        return [token for token in ids[:end] if token != self.pad_id]


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.to_json` described."""
    fields = json.loads(text)
    return Tokenizer(Backend.from_str(json.dumps(fields.pop("backend"))), **fields)


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, path: str | os.PathLike) -> None:
    """Train lower-cased WordPiece on captions and save it at `path`; the same captions give the same file.

    Ids 0 to 4 are [PAD] [UNK] [CLS] [SEP] [MASK]. Source: arXiv:1609.08144, 4.1, as used in arXiv:1810.04805.
    Deviation: pieces are merged by frequency (arXiv:1508.07909, 3.2) and not by likelihood.
    """
    pieces = _merged_pieces(captions, vocab_size)
    letters = sorted({*"".join(pieces), *string.ascii_lowercase, *string.digits} - {_START})
    # "##" marks a piece inside a word; a letter has both forms, so that a new word is spelt and does not become [UNK]
    forms = [*letters, *(f"##{letter}" for letter in letters if letter not in string.punctuation)]
    forms += [piece.removeprefix(_START) if piece.startswith(_START) else f"##{piece}" for piece in pieces]
    vocab = list(dict.fromkeys([*_SPECIAL, *(form for form in forms if form not in ("", "##"))]))[:vocab_size]
    backend = Backend(models.WordPiece({form: i for i, form in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(_SPECIAL)
    _save(backend, Path(path))


def _merged_pieces(captions: Iterable[str], vocab_size: int) -> list[str]:
    """Return byte-pair pieces of the words, most basic first; a word begins with _START.

    Not WordPieceTrainer: it numbers its pieces in the order of a hash table with a random seed, so that two processes
    get two vocabularies.
    """
    # The Rust thread pool would make every later fork of a loader worker warn; training on one core is fast enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    mark = pre_tokenizers.Metaspace(replacement=_START, prepend_scheme="always", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), mark])
    backend.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    vocab = backend.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def load_tokenizer(name_or_path: str, *, max_length: int, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer.json, or any Hugging Face tokenizer by folder, or by name and the commit of its repository.

    Code of the repository is never run. Raises ValueError for a name without a 40-digit commit (a branch can move) and
    for a tokenizer without a fast backend or an end token.
    """
    if name_or_path.endswith(".json"):
        backend = Backend.from_file(name_or_path)
        ids: dict[str, Any] = {field: _first_id(backend, names) for field, names in _NAMES.items()}
    else:
        backend, ids = _hugging_face(name_or_path, revision)
    if ids["eos_id"] is None:
        raise ValueError(f"tokenizer {name_or_path!r} has no end token (one of {', '.join(_NAMES['eos_id'])}).")
    if ids["pad_id"] is None:
        ids["pad_id"] = ids["eos_id"]  # GPT-2, Llama: the mask tells padding from the end
    return Tokenizer(backend, max_length=max_length, **ids)


def _hugging_face(name_or_path: str, revision: str | None) -> tuple[Backend, dict[str, Any]]:
    if not os.path.isdir(name_or_path) and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"tokenizer {name_or_path!r} with revision={revision!r}: a branch can move; set revision to the 40-digit "
            "commit of the repository, or give a folder or a tokenizer.json."
        )
    from transformers import AutoTokenizer  # seconds of import that runs with a tokenizer.json do not pay

    loaded = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, use_fast=True)
    if not loaded.is_fast:
        raise ValueError(f"tokenizer {name_or_path!r} has no fast backend; convert it to a tokenizer.json first.")
    ids = {
        "pad_id": loaded.pad_token_id,
        "bos_id": loaded.bos_token_id if loaded.bos_token_id is not None else loaded.cls_token_id,
        "eos_id": loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id,
        "mask_id": loaded.mask_token_id,
    }
    return Backend.from_str(loaded.backend_tokenizer.to_str()), ids


def _first_id(backend: Backend, names: Iterable[str]) -> int | None:
    return next((id for id in map(backend.token_to_id, names) if id is not None), None)


def _save(backend: Backend, path: Path) -> None:
    """Write a tokenizer.json in one step, so that a kill or a second process never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(backend.to_str(pretty=True))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _word_numbers(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of the word that each token ends in. Taken from the text and not from the backend, which for
    some tokenizers (Llama) sees a whole caption as one word."""
    ends = [match.end() for match in _WORD.finditer(text)]
    return [bisect_left(ends, end) for _, end in offsets]
