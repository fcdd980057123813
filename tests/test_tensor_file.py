"""One safetensors file: the same bytes for any reader, every digest, and no trust in a header."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlp.training import tensor_file
from vlp.training.tensor_file import Mapped

TENSORS = {
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "none": torch.zeros(0, 5),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "complex": torch.ones(2, dtype=torch.complex64) * 1j,
    "eight": torch.ones(5, dtype=torch.float8_e4m3fn),
}


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k].float(), v.float()) and found[k].dtype == v.dtype and found[k].shape == v.shape
        for k, v in expected.items()
    )


def read(path) -> dict[str, torch.Tensor]:
    file = Mapped(path)
    return {name: file.tensor(place) for name, place in file.places().items()}


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    tensor_file.write(tmp_path / "ours", TENSORS)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    assert same(load_file(tmp_path / "ours"), TENSORS) and same(read(tmp_path / "theirs"), TENSORS)
    assert same(read(tmp_path / "ours"), TENSORS)


def test_a_file_without_tensors_can_be_read(tmp_path):
    tensor_file.write(tmp_path / "f", {})
    assert read(tmp_path / "f") == {} == load_file(tmp_path / "f")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 23])
def test_there_is_a_digest_of_every_chunk_and_each_is_compared(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensor_file, "CHUNK", 8)
    data = bytes(range(size))
    entry = tensor_file.write_bytes(tmp_path / "f", [data[:5], data[5:]])
    chunks = [data[at : at + 8] for at in range(0, max(1, size), 8)]
    assert entry == {"size": size, "sha256": [hashlib.sha256(chunk).hexdigest() for chunk in chunks]}
    assert (tmp_path / "f").read_bytes() == data and not Mapped(tmp_path / "f").differs(entry, range(len(chunks)))
    for at in range(size):
        (tmp_path / "f").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert [Mapped(tmp_path / "f").differs(entry, [n]) for n in range(len(chunks))].index(True) == at // 8


def test_a_file_that_is_there_already_is_never_overwritten(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileExistsError):
        tensor_file.write(tmp_path / "f", {})


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' overlaps another"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "'b' overlaps another"),
        ({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, 24, "leaves a gap"),
        ({"a": entry([2], 8, 16)}, 16, "leaves a gap"),
        ({"a": entry([2], 0, 8)}, 12, "end at byte"),
        ({"a": entry([2], 0, 8)}, 4, "end at byte"),
        ({"a": entry([2**32, 2**32, 2**62], 0, 8)}, 8, "does not fill its 8 bytes"),
        ({"a": entry([2**64 + 2], 0, 8)}, 8, "no valid shape"),
        ({"a": entry([-1, -2], 0, 8)}, 8, "no valid shape"),
        ({"a": entry([True, 2], 0, 8)}, 8, "no valid shape"),
        ({"a": entry([1] * 65, 0, 4)}, 4, "no valid shape"),
        ({"a": entry([2], 0, 8, "F99")}, 8, "no known type"),
        ({"a": entry([2], 8, 0)}, 8, "no valid place"),
        ({"a": entry([2], -8, 0)}, 8, "no valid place"),
        ({"a": "pickle"}, 0, "no valid place"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "no valid shape"),
        ([1, 2], 0, "no table of tensors"),
        ('{"a":' + json.dumps(entry([2], 0, 8)) + ',"a":' + json.dumps(entry([2], 0, 8)) + "}", 8, "stands twice"),
        ("[" * 100_000, 0, ""),
        ('{"a": ' + "9" * 5000 + "}", 0, ""),
        ("not json", 0, ""),
    ],
)
def test_a_hostile_header_is_refused_with_a_line_that_names_the_file(tmp_path, header, data_bytes, message):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    with pytest.raises(ValueError, match=rf"^f: .*{message}"):
        Mapped(tmp_path / "f").places()


@pytest.mark.parametrize("length", [3, 100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_allocates_nothing(tmp_path, length):
    (tmp_path / "f").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=rf"^f: its header is said to be {length} bytes long in a file of 10"):
        Mapped(tmp_path / "f").places()


@pytest.mark.parametrize(
    ("limit", "value", "said"), [("_MAX_HEADER", 99, "is said to be"), ("_MAX_TENSORS", 1, "is no table")]
)
def test_a_header_above_a_limit_is_refused(tmp_path, monkeypatch, limit, value, said):
    tensor_file.write(tmp_path / "f", {"a": torch.zeros(2), "b": torch.zeros(3)})
    assert len(Mapped(tmp_path / "f").places()) == 2
    monkeypatch.setattr(tensor_file, limit, value)
    with pytest.raises(ValueError, match=f"^f: its header {said}"):
        Mapped(tmp_path / "f").places()


def test_a_link_is_not_followed(tmp_path):
    tensor_file.write(tmp_path / "real", {})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="symbolic links"):
        Mapped(tmp_path / "link")
    with pytest.raises(FileExistsError):
        tensor_file.write(tmp_path / "link", {})
