"""Checkpoints: complete or not there at all, verified before they are used."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlp.training import checkpoint
from vlp.training.checkpoint import State

TENSORS = "tensors-00000-of-00001.safetensors"
FIRST = '{"format": 2, "chunk_bytes": 33554432'
FILES = (TENSORS, "state.json", "manifest.json")


def state(step: int = 1) -> State:
    tensors = {
        "model/w": torch.full((2, 3), float(step)),
        "model/count": torch.tensor(step),
        "optimizer/exp_avg/w": torch.ones(2, 3).T,
        "ema/w": torch.full((2, 3), step + 0.5),
    }
    return State(tensors, {"cursor": step, "config": {"größe": [1, None]}})


def commit(root: Path, *steps: int, keep: int = 2) -> list[Path]:
    return [checkpoint.save(root, step=step, state=state(step), keep=keep) for step in steps]


def newest(root: Path) -> tuple[Path | None, list[str]]:
    stored, refused = checkpoint.newest_valid(root)
    return stored and stored.path, refused


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_load_gives_back_what_was_saved(tmp_path):
    (path,), saved = commit(tmp_path, 7), state(7)
    stored = checkpoint.open_checkpoint(path)
    assert (stored.facts, stored.step, stored.keys()) == (saved.facts, 7, sorted(saved.tensors))
    for key, tensor in saved.tensors.items():
        assert torch.equal(stored.get(key), tensor) and stored.get(key).dtype == tensor.dtype


def test_under_gives_the_tensors_of_a_kind(tmp_path):
    stored = checkpoint.open_checkpoint(commit(tmp_path, 7)[0])
    assert list(stored.under("optimizer")) == ["exp_avg/w"] and stored.under("other") == {}


def test_a_loaded_tensor_may_be_changed_and_the_file_stays(tmp_path):
    (path,) = commit(tmp_path, 7)
    checkpoint.open_checkpoint(path).get("model/w").add_(1)
    assert torch.equal(checkpoint.open_checkpoint(path).get("model/w"), state(7).tensors["model/w"])


def test_newest_valid_goes_by_step_and_not_by_time(tmp_path):
    commit(tmp_path, 100, 9, keep=5)
    assert newest(tmp_path) == (tmp_path / "step-00000100", [])


def test_an_absent_directory_holds_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_makes_the_older_one_used(tmp_path, name, damage):
    old, new = commit(tmp_path, 1, 2)
    data = bytearray((new / name).read_bytes())
    data[len(data) // 2] ^= 1
    change = {"flip": lambda: (new / name).write_bytes(data), "cut": lambda: (new / name).write_bytes(data[:-1])}
    change.get(damage, (new / name).unlink)()
    path, refused = newest(tmp_path)
    # A flipped bit in the text of the manifest either spoils it or one of the digests in it.
    assert path == old and (
        not refused if name == FILES[-1] and damage == "remove" else "step-00000002: " in refused[0]
    )


def test_each_damage_is_named(tmp_path):
    one, two, three = commit(tmp_path, 1, 2, 3, keep=3)
    (one / "state.json").unlink()
    (two / "extra.safetensors").touch()
    (three / "manifest.json").write_text('{"format": 99, "files": {}}')
    assert newest(tmp_path)[1] == [
        "step-00000003: manifest.json cannot be read (format 99, this version reads 2)",
        "step-00000002: manifest.json cannot be read (extra.safetensors is not in it)",
        "step-00000001: state.json is missing",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        FIRST + ', "files": [1]}',
        FIRST + ', "files": {"a": 1}}',
        FIRST + ', "files": {"/a": 1}}',
        "[" * 9999,
    ],
)
def test_a_manifest_of_another_form_is_refused_and_not_a_crash(tmp_path, text):
    (new,) = commit(tmp_path, 1)
    (new / "manifest.json").write_text(text)
    path, refused = newest(tmp_path)
    assert path is None and ("manifest.json" in refused[0] or "is missing" in refused[0])


def test_a_manifest_names_no_file_outside_although_its_digest_agrees(tmp_path):
    (path,) = commit(tmp_path / "checkpoints", 1)
    (path / "state.json").rename(path.parent / "state.json")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../state.json"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="it names a file outside the checkpoint"):
        checkpoint.open_checkpoint(path)


def test_a_file_that_rank_0_does_not_see_whole_is_not_committed(tmp_path, monkeypatch):
    write = checkpoint.tensor_file.write

    def cut(path: Path, tensors: dict) -> dict:  # as seen through a file system that lags, or is another node's own
        entry = write(path, tensors)
        os.truncate(path, entry["size"] - 1)
        return entry

    commit(tmp_path, 1)
    monkeypatch.setattr(checkpoint.tensor_file, "write", cut)
    with pytest.raises(OSError, match="is not whole where rank 0 looks"):
        commit(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_load_refuses_a_damaged_checkpoint(tmp_path):
    (path,) = commit(tmp_path, 1)
    (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000001: state.json differs from its digest; choose another step"):
        checkpoint.open_checkpoint(path)


def test_load_refuses_tensors_that_cannot_be_read_although_the_digest_agrees(tmp_path):
    (path,) = commit(tmp_path, 1)
    (path / TENSORS).write_bytes(b"\xff" * 20)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][TENSORS] = {"size": 20, "sha256": [hashlib.sha256(b"\xff" * 20).hexdigest()]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); choose another step"):
        checkpoint.open_checkpoint(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_retention_keeps_at_least_the_two_newest(tmp_path, keep, left):
    commit(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_retention_deletes_nothing_before_two_newer_ones_are_valid(tmp_path):
    _, _, third = commit(tmp_path, 1, 2, 3, keep=3)
    (third / "state.json").write_text("{}")
    commit(tmp_path, 4, keep=2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 3, 4)]
    commit(tmp_path, 5, keep=2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 5)]


def test_leftovers_of_killed_attempts_are_swept(tmp_path):
    for name in (".writing-00000003-77", ".deleting-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    commit(tmp_path, 4)
    assert names(tmp_path) == ["step-00000004"]


def test_a_repeated_step_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, step=4, state=state(1), keep=2)
    path = checkpoint.save(tmp_path, step=4, state=state(2), keep=2)
    assert names(tmp_path) == ["step-00000004"] and checkpoint.open_checkpoint(path).facts["cursor"] == 2


def test_a_replaced_step_counts_until_its_successor_stands(tmp_path):
    (path,) = commit(tmp_path, 4)
    replaced = path.rename(tmp_path / "step-00000004-replaced")  # a kill between the two renames
    assert newest(tmp_path) == (replaced, [])
    commit(tmp_path, 4)
    assert names(tmp_path) == ["step-00000004"]


def test_a_disk_that_refuses_leaves_the_old_one(tmp_path, monkeypatch):
    (old,) = commit(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path, 2)
    assert newest(tmp_path) == (old, [])


def save_and_die(root: Path, num_calls: int) -> bool:
    """Save in a child that is killed before its n-th change of the file system; return whether it came to the end."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(num_calls))
        kinds = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
        kill = lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        sys.addaudithook(lambda event, _: event in kinds and kill())
        commit(root, 2)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("before", [(1, 2), (1,), (0, 1)])
def test_a_kill_before_any_change_of_the_file_system_leaves_a_valid_checkpoint(tmp_path, before):
    for num_calls in range(200):
        root = tmp_path / str(num_calls)
        commit(root, *before)
        complete = save_and_die(root, num_calls)
        path, refused = newest(root)
        assert path is not None and not refused
        assert checkpoint.open_checkpoint(path).facts["cursor"] in (max(before), 2)
        commit(root, 3)
        assert names(root)[-1] == "step-00000003" and len(names(root)) == 2
        if complete:
            return


WRITER = """
import sys, torch
from pathlib import Path
from vlp.training.checkpoint import State, save
tensors = {str(i): torch.full((50_000,), float(i)) for i in range(6)}
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    save(Path(sys.argv[1]), step=step // 3 * 3, state=State(tensors, {"cursor": step}), keep=2)
    print(step, flush=True)
"""


def killed_writer(root: Path, start: int, delay_s: float) -> int:
    """Commit checkpoints without end, every third step anew twice, until a kill; return the last that was reported."""
    command = [sys.executable, "-c", WRITER, str(root), str(start)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.readline()
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return max((int(line) for line in process.stdout.read().split()), default=start)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path):
    random.seed(0)
    last = 0
    for _ in range(8):
        last = killed_writer(tmp_path, last + 1, random.uniform(0.01, 0.3))
        path, refused = newest(tmp_path)
        assert path is not None and refused == []
        assert checkpoint.open_checkpoint(path).facts["cursor"] in (last, last + 1)
        last = checkpoint.open_checkpoint(path).facts["cursor"]
