"""A checkpoint that several real processes write and read together."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from vlp import dist
from vlp.training import checkpoint, tensor_file
from vlp.training.checkpoint import State
from vlp.training.exits import Exit, StopRun


def own(rank: int, step: int) -> State:
    """What a rank gives; its tensors differ in number and size from those of the others."""
    tensors = {f"model/{rank}.{n}": torch.full((n + 1, 3), float(10 * rank + step)) for n in range(rank + 1)}
    return State(tensors, {"cursor": step, "rank": rank})


def outcome(rank: int, work) -> dict[str, Tensor]:
    """What became of `work` on this rank, as text in a tensor."""
    try:
        text = str(work())
    except Exception as error:
        text = f"{type(error).__name__} {getattr(error, 'errno', '')} {error}"
    return {"text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def texts(results: list[dict[str, Tensor]]) -> list[str]:
    return [bytes(each["text"].numpy()).decode() for each in results]


def save_and_open(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    path = checkpoint.save(root, step=3, state=own(rank, 3), keep=2)
    stored = checkpoint.open_checkpoint(path)
    assert stored.facts == {"cursor": 3, "rank": 0}
    return {key: stored.get(key) for key in stored.keys()}  # noqa: SIM118


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_writes_its_file_and_reads_them_all(tmp_path, world):
    results = on_ranks(partial(save_and_open, tmp_path / "checkpoints"), world, tmp_path)
    files = sorted(path.name for path in (tmp_path / "checkpoints" / "step-00000003").glob("*.safetensors"))
    assert files == [f"tensors-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)]
    expected = {key: value for rank in range(world) for key, value in own(rank, 3).tensors.items()}
    assert all(each.keys() == expected.keys() for each in results)
    assert all(torch.equal(each[key], value) for each in results for key, value in expected.items())


def fail_on_one(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    checkpoint.save(root, step=1, state=own(rank, 1), keep=2)
    if rank == 1:
        tensor_file.write = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left", "x"))
    return outcome(rank, lambda: checkpoint.save(root, step=2, state=own(rank, 2), keep=2))


def test_the_failure_of_one_rank_is_that_of_all_and_leaves_the_old_one(tmp_path):
    assert set(texts(on_ranks(partial(fail_on_one, tmp_path / "checkpoints"), 3, tmp_path))) == {
        "OSError 28 [Errno 28] rank 1: No space left x"
    }
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def lose_the_directory(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    """Rank 0 finds at its second look, after all files are written, that the directory is another run's."""
    looks = iter([None, StopRun(Exit.LOCKED, "taken over")])

    def refuse() -> None:
        if found := next(looks):
            raise found

    save = partial(checkpoint.save, root, step=1, state=own(rank, 1), keep=2, refuse_stranger=refuse)
    return outcome(rank, save)


def test_a_directory_that_is_lost_ends_all_ranks_alike_and_gets_no_checkpoint(tmp_path):
    found = texts(on_ranks(partial(lose_the_directory, tmp_path / "checkpoints"), 3, tmp_path))
    assert found == [f"StopRun  ({Exit.LOCKED!r}, 'taken over')"] * 3
    assert list((tmp_path / "checkpoints").iterdir()) == []


def give_twice(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    state = State({"model/w": torch.zeros(2)}, {})
    return outcome(rank, lambda: checkpoint.save(root, step=2, state=state, keep=2))


def test_a_key_that_two_ranks_give_is_refused_by_all(tmp_path):
    found = texts(on_ranks(partial(give_twice, tmp_path / "checkpoints"), 2, tmp_path))
    assert len(set(found)) == 1 and "one rank alone may give it" in found[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def damaged(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    paths = [checkpoint.save(root, step=step, state=own(rank, step), keep=2) for step in (1, 2)]
    dist.exchange(None, dist.side_group())
    if rank == 0:
        with (paths[1] / "tensors-00001-of-00002.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END), file.write(b"\xff")
    dist.exchange(None, dist.side_group())
    stored, refused = checkpoint.newest_valid(root)
    return outcome(rank, lambda: (stored and stored.step, refused))


def test_damage_that_one_rank_finds_makes_all_use_the_older_one(tmp_path):
    line = "step-00000002: tensors-00001-of-00002.safetensors differs from its digest"
    assert set(texts(on_ranks(partial(damaged, tmp_path / "checkpoints"), 2, tmp_path))) == {str((1, [line]))}
