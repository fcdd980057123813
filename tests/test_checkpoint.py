"""Checkpoints: complete or not there at all, verified before they are used."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlp.training import checkpoint, optim
from vlp.training.checkpoint import State

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


def state(step: int = 1) -> State:
    return State(
        model={"w": torch.full((2, 3), float(step)), "count": torch.tensor(step)},
        optimizer={"exp_avg/w": torch.ones(2, 3).T, "step/w": torch.tensor(float(step))},
        ema={"w": torch.full((2, 3), step + 0.5)},
        facts={"cursor": step, "config": {"größe": [1, None]}},
    )


def commit(root: Path, *steps: int, keep: int = 2) -> list[Path]:
    return [checkpoint.save(root, step=step, state=state(step), keep=keep) for step in steps]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_load_gives_back_what_was_saved(tmp_path):
    loaded, saved = checkpoint.load(commit(tmp_path, 7)[0]), state(7)
    assert loaded.facts == saved.facts
    for one, two in zip(loaded[:3], saved[:3], strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)
        assert all(one[name].dtype == two[name].dtype for name in two)


def test_kinds_without_tensors_have_no_file(tmp_path):
    path = checkpoint.save(tmp_path, step=1, state=state()._replace(ema={}), keep=2)
    assert not (path / "ema.safetensors").exists() and checkpoint.load(path).ema == {}


def test_newest_valid_goes_by_step_and_not_by_time(tmp_path):
    commit(tmp_path, 100, 9, keep=5)
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-00000100", [])


def test_an_absent_directory_holds_no_checkpoint(tmp_path):
    assert checkpoint.newest_valid(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_makes_the_older_one_used(tmp_path, name, damage):
    old, new = commit(tmp_path, 1, 2)
    data = bytearray((new / name).read_bytes())
    data[len(data) // 2] ^= 1
    change = {"flip": lambda: (new / name).write_bytes(data), "cut": lambda: (new / name).write_bytes(data[:-1])}
    change.get(damage, (new / name).unlink)()
    path, refused = checkpoint.newest_valid(tmp_path)
    # A flipped bit in the text of the manifest either spoils it or one of the digests in it.
    assert path == old and (
        not refused if name == FILES[-1] and damage == "remove" else "step-00000002: " in refused[0]
    )


def test_each_damage_is_named(tmp_path):
    one, two, three = commit(tmp_path, 1, 2, 3, keep=3)
    (one / "state.json").unlink()
    (two / "extra.safetensors").touch()
    (three / "manifest.json").write_text('{"format": 99, "files": {}}')
    assert checkpoint.newest_valid(tmp_path)[1] == [
        "step-00000003: format 99, this version reads 1",
        "step-00000002: extra.safetensors is not in manifest.json",
        "step-00000001: state.json is missing",
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1, "files": [1]}', '{"format": 1, "files": {"a": 1}}', "[" * 9999]
)
def test_a_manifest_of_another_form_is_refused_and_not_a_crash(tmp_path, text):
    (new,) = commit(tmp_path, 1)
    (new / "manifest.json").write_text(text)
    path, refused = checkpoint.newest_valid(tmp_path)
    assert path is None and ("manifest.json" in refused[0] or "is missing" in refused[0])


def test_load_refuses_a_damaged_checkpoint(tmp_path):
    (path,) = commit(tmp_path, 1)
    (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000001: state.json differs from its digest; choose another step"):
        checkpoint.load(path)


def test_load_refuses_tensors_that_cannot_be_read_although_the_digest_agrees(tmp_path):
    (path,) = commit(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"\xff" * 20)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": 20, "sha256": checkpoint._digest(path / "model.safetensors")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); choose another step"):
        checkpoint.load(path)


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
    assert names(tmp_path) == ["step-00000004"] and checkpoint.load(path).facts["cursor"] == 2


def test_a_replaced_step_counts_until_its_successor_stands(tmp_path):
    (path,) = commit(tmp_path, 4)
    replaced = path.rename(tmp_path / "step-00000004-replaced")  # a kill between the two renames
    assert checkpoint.newest_valid(tmp_path) == (replaced, [])
    commit(tmp_path, 4)
    assert names(tmp_path) == ["step-00000004"]


def test_a_disk_that_refuses_leaves_the_old_one(tmp_path, monkeypatch):
    (old,) = commit(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path, 2)
    assert checkpoint.newest_valid(tmp_path) == (old, [])


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
        path, refused = checkpoint.newest_valid(root)
        assert path is not None and not refused
        assert checkpoint.load(path).facts["cursor"] in (max(before), 2)
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
    save(Path(sys.argv[1]), step=step // 3 * 3, state=State(tensors, tensors, {}, {"cursor": step}), keep=2)
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
        path, refused = checkpoint.newest_valid(tmp_path)
        assert path is not None and refused == []
        assert checkpoint.load(path).facts["cursor"] in (last, last + 1)
        last = checkpoint.load(path).facts["cursor"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.head.weight = self.words.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("start", self.table[:2])  # begins where `table` begins
        self.register_buffer("nothing", torch.zeros(0))
        self.frozen = nn.Linear(2, 3).requires_grad_(False)


def test_module_state_stores_tied_tensors_once_and_everything_else():
    assert list(checkpoint.module_state(Tied())) == [
        "table", "start", "nothing", "words.weight", "head.bias", "frozen.weight", "frozen.bias",
    ]  # fmt: skip


def test_load_module_fills_weights_buffers_and_tied_tensors(tmp_path):
    first, second = Tied(), Tied()
    first.table.add_(10)
    save_file({n: t.detach().clone() for n, t in checkpoint.module_state(first).items()}, tmp_path / "m.safetensors")
    checkpoint.load_module(second, checkpoint.load_file(tmp_path / "m.safetensors"))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert second.head.weight is second.words.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, r"missing \['table'\], unknown \[\], other shape \[\] \(1, 0, 0 in all\)"),
        ({"more": torch.zeros(2)}, r"missing \[\], unknown \['more'\]"),
        ({"table": torch.zeros(5)}, r"other shape \['table'\]"),
        ({"table": torch.zeros(1)}, r"other shape \['table'\]"),
    ],
)
def test_load_module_refuses_what_does_not_fit(change, message):
    module = Tied()
    tensors = {**checkpoint.module_state(module), **change}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_module(module, {name: value for name, value in tensors.items() if value is not None})


def trained(num_steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    optimizer = optim.adamw(
        optim.settings(module, layer_decay=None, lr_factors={"0.*": 0.1}),
        lr=0.1,
        betas=[0.9, 0.9],
        eps=1e-8,
        weight_decay=0.1,
    )
    for step in range(num_steps):
        one_step(module, optimizer, step)
    return module, optimizer


def one_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    module(torch.full((1, 2), step + 1.0)).square().sum().backward()
    optimizer.step()


def test_an_optimizer_continues_bit_for_bit_after_save_and_load(tmp_path):
    module, optimizer = trained(3)
    saved = State(checkpoint.module_state(module), checkpoint.optimizer_state(optimizer), {}, {})
    loaded = checkpoint.load(checkpoint.save(tmp_path, step=3, state=saved, keep=2))
    fresh, other = trained(0)
    checkpoint.load_module(fresh, loaded.model)
    checkpoint.load_optimizer(other, loaded.optimizer)
    one_step(module, optimizer, 3), one_step(fresh, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))


def test_optimizer_state_is_keyed_by_parameter_name():
    keys = checkpoint.optimizer_state(trained(1)[1])
    assert set(keys) == {
        f"{k}/{i}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for i in (0, 1) for n in ("weight", "bias")
    }


def test_load_optimizer_without_tensors_starts_afresh():
    _, optimizer = trained(0)
    checkpoint.load_optimizer(optimizer, {})
    assert not optimizer.state


def test_load_optimizer_puts_everything_on_the_device_of_the_parameter():
    _, optimizer = trained(1)
    tensors = checkpoint.optimizer_state(optimizer)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)).to("meta")
    other = optim.adamw(
        optim.settings(module, layer_decay=None, lr_factors={}), lr=1, betas=[0, 0], eps=1, weight_decay=0
    )
    checkpoint.load_optimizer(other, tensors)  # fused AdamW refuses a step count on another device
    assert {value.device.type for value in checkpoint.optimizer_state(other).values()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg/9.weight": torch.zeros(1)}, "state for '9.weight', which is not trained"),
        ({f"{kind}/1.bias": None for kind in ("step", "exp_avg", "exp_avg_sq")}, "no optimizer state for '1.bias'"),
    ],
)
def test_load_optimizer_refuses_other_parameters(change, message):
    tensors = {**checkpoint.optimizer_state(trained(1)[1]), **change}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_optimizer(trained(0)[1], {name: value for name, value in tensors.items() if value is not None})
