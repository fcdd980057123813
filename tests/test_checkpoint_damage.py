"""Checkpoints that rot or are hostile: the damage is named, nothing of it runs, and nothing starts over silently."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_runs import train

from vlp.encoders import weights
from vlp.training import checkpoint
from vlp.training.checkpoint import State
from vlp.training.exits import Exit, StopRun
from vlp.training.run_dir import Record
from vlp.training.traces import refuse_silent_start

TENSORS = "tensors-00000-of-00001.safetensors"
FILES = (TENSORS, "state.json", "manifest.json")


def commit(root: Path, *steps: int) -> list[Path]:
    tensors = {"model/w": torch.arange(300.0), "optimizer/exp_avg/w": torch.ones(300)}
    return [checkpoint.save(root, step=step, state=State(tensors, {"cursor": step}), keep=9) for step in steps]


@pytest.mark.parametrize("name", FILES)
def test_a_flip_in_any_part_of_any_file_is_found_and_the_older_one_used(tmp_path, name):
    _, new = commit(tmp_path, 1, 2)
    good = (new / name).read_bytes()
    for part in range(64):
        at = min(len(good) - 1, part * len(good) // 64 + 1)
        (new / name).write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        stored, refused = checkpoint.newest_valid(tmp_path)
        assert stored is not None and stored.step == 1, f"byte {at} of {name}"
        assert "step-00000002: " in refused[0] and (name in refused[0] or name == "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, 9, -1])
def test_a_file_that_was_cut_is_found(tmp_path, name, left):
    _, new = commit(tmp_path, 1, 2)
    (new / name).write_bytes((new / name).read_bytes()[:left])
    stored, refused = checkpoint.newest_valid(tmp_path)
    assert stored is not None and stored.step == 1 and len(refused) == 1


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run with checkpoints of its steps 1 and 2."""
    assert train(place, "rotten", "objective=[contrastive]", "trainer.checkpoint_every=1") == Exit.DONE
    return place / "runs" / "rotten"


def again(place: Path, run: Path, tmp_path: Path, change) -> int:
    """Copy the run, change the copy, and start it."""
    shutil.copytree(run, tmp_path / "runs" / "rotten")
    change(tmp_path / "runs" / "rotten")
    more = (
        "objective=[contrastive]",
        "trainer.checkpoint_every=1",
        "trainer.max_steps=3",
        f"paths.runs={tmp_path}/runs",
    )
    return train(place, "rotten", *more)


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_older_one_and_says_what_is_lost(place, run, tmp_path, capsys):
    assert again(place, run, tmp_path, lambda copy: rot(copy / "checkpoints" / "step-00000002" / TENSORS)) == Exit.DONE
    error = capsys.readouterr().err
    assert f"checkpoint refused: step-00000002: {TENSORS} differs from its digest" in error
    assert "continuing from step-00000001" in error


def test_a_run_without_any_valid_checkpoint_stops_with_82(place, run, tmp_path, capsys):
    def rot_all(copy: Path) -> None:
        for path in copy.glob(f"checkpoints/*/{TENSORS}"):
            rot(path)

    assert again(place, run, tmp_path, rot_all) == Exit.NO_VALID_CHECKPOINT
    error = capsys.readouterr().err
    assert "holds no valid checkpoint, but the run had reached step 2" in error and "Traceback" not in error


@pytest.mark.parametrize("record", ["", "{ garbage", "missing"])
def test_a_run_goes_on_from_its_checkpoint_whatever_happened_to_its_record(place, run, tmp_path, record):
    path = tmp_path / "runs" / "rotten" / "run.json"
    damage = path.unlink if record == "missing" else lambda: path.write_text(record)
    assert again(place, run, tmp_path, lambda copy: damage()) == Exit.DONE
    assert json.loads(path.read_text())["step"] == 3


STATES = ("whole", "", "{ garbage", "missing")


@pytest.mark.parametrize(("record", "config"), list(itertools.product(STATES, STATES)))
def test_no_run_without_checkpoints_starts_from_zero_silently(tmp_path, record, config):
    """All combinations of the two files that say whether there was a run, after steps were committed."""
    for name, content, whole in (
        ("run.json", record, '{"committed": true, "step": 7}'),
        ("config.yaml", config, "a: 1"),
    ):
        if content != "missing":
            (tmp_path / name).write_text(whole if content == "whole" else content)
    (tmp_path / "checkpoints").mkdir()
    if (record, config) == ("missing", "missing"):
        (tmp_path / "checkpoints" / "step-00000007").mkdir()  # its manifest is gone
    with pytest.raises(StopRun, match="holds no valid checkpoint, but ") as stop:
        refuse_silent_start(tmp_path, Record(tmp_path, writes=False), [])
    assert stop.value.code == Exit.NO_VALID_CHECKPOINT == 82


@pytest.mark.parametrize(
    "files", [{}, {"run.json": '{"status": "running"}', "config.yaml": "a: 1", "metrics.csv": "step\n"}]
)
def test_a_fresh_run_and_one_that_died_before_its_first_commit_start_from_zero(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "checkpoints" / ".writing-00000001-77").mkdir(parents=True)
    refuse_silent_start(tmp_path, Record(tmp_path, writes=False), [])


@pytest.mark.parametrize("text", ["", "{ garbage: [", "- a list"])
def test_a_damaged_config_is_one_line_and_not_a_guess(place, run, tmp_path, capsys, text):
    code = again(place, run, tmp_path, lambda copy: (copy / "config.yaml").write_text(text))
    assert code == Exit.RESUME_REFUSED
    error = capsys.readouterr().err
    assert "config.yaml is damaged" in error and "Traceback" not in error


class Gadget:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.canary}",))


def gadgets(canary: Path, place: Path) -> dict[str, bytes]:
    """The same attack in the forms that loaders fall for."""
    torch.save({"w": Gadget(canary)}, place / "new.pt")
    torch.save({"w": Gadget(canary)}, place / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(place / "npz", "w") as archive:
        archive.writestr("w.npy", pickle.dumps(Gadget(canary)))
    forms = {"pickle": pickle.dumps(Gadget(canary)), "text": pickle.dumps(Gadget(canary), 0)}
    return forms | {name: (place / name).read_bytes() for name in ("new.pt", "old.pt", "npz")}


@pytest.mark.parametrize("form", ["pickle", "text", "new.pt", "old.pt", "npz"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_under_the_name_of_a_checkpoint_file_is_refused_and_never_run(tmp_path, form, name):
    _, new = commit(tmp_path / "c", 1, 2)
    attack = gadgets(tmp_path / "canary", tmp_path)[form]
    (new / name).write_bytes(attack)
    if name != "manifest.json":  # its author can write digests
        manifest = json.loads((new / "manifest.json").read_text())
        manifest["files"][name] = {"size": len(attack), "sha256": [hashlib.sha256(attack).hexdigest()]}
        (new / "manifest.json").write_text(json.dumps(manifest))
    stored, refused = checkpoint.newest_valid(tmp_path / "c")
    assert stored is not None and stored.step == 1 and len(refused) == 1 and "\n" not in refused[0]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("extra", ["weights.pt", "data.pkl", "pytorch_model.bin", "rank0.pth"])
def test_a_file_that_no_manifest_lists_makes_a_checkpoint_invalid(tmp_path, extra):
    _, new = commit(tmp_path / "c", 1, 2)
    (new / extra).write_bytes(gadgets(tmp_path / "canary", tmp_path)["pickle"])
    stored, refused = checkpoint.newest_valid(tmp_path / "c")
    assert stored is not None and stored.step == 1 and extra in refused[0] and not (tmp_path / "canary").exists()


def test_files_swapped_between_two_checkpoints_are_refused(tmp_path):
    _, new = commit(tmp_path, 1, 2)
    checkpoint.save(tmp_path, step=3, state=State({"model/w": torch.zeros(300)}, {}), keep=9)
    shutil.copy(tmp_path / "step-00000003" / TENSORS, new / TENSORS)
    with pytest.raises(ValueError, match=f"{TENSORS} differs from its digest"):
        checkpoint.open_checkpoint(new)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["pickle", "text", "new.pt", "old.pt", "npz"])
def test_weights_of_a_stranger_are_refused_in_one_line_and_never_run(tmp_path, form, ending):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(gadgets(tmp_path / "canary", tmp_path)[form])
    with pytest.raises(ValueError) as refusal:
        weights.read_weights(str(path))
    assert str(path) in str(refusal.value) and not (tmp_path / "canary").exists()


HOSTILE = {
    "overlap": {"a": [[2], 0, 8], "b": [[2], 4, 12]},
    "overflow": {"a": [[2**32, 2**32, 2**62], 0, 8]},
    "negative": {"a": [[-2], 0, 8]},
    "beyond the end": {"a": [[2**20], 0, 2**22]},
}


@pytest.mark.parametrize("case", [*HOSTILE, "huge header", "no header"])
def test_hostile_safetensors_of_a_stranger_are_refused_in_one_line(tmp_path, case):
    table = HOSTILE.get(case, {}).items()
    header = {k: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]} for k, (shape, begin, end) in table}
    text = json.dumps(header).encode()
    length = {"huge header": 2**62, "no header": 0}.get(case, len(text))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(ValueError, match=r"^checkpoint '.*weights.safetensors' cannot be read \([^\n]*$"):
        weights.read_weights(str(path))
