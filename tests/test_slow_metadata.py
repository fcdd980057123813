"""Checkpoints where a file system keeps fewer promises: a rename that copies, a listing that lags."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from vlp.training import checkpoint
from vlp.training.checkpoint import State

FILES = ("tensors-00000-of-00001.safetensors", "state.json", "manifest.json")


def commit(root: Path, *steps: int) -> None:
    for step in steps:
        state = State({"model/w": torch.full((3, 2), float(step))}, {"cursor": step})
        checkpoint.save(root, step=step, state=state, keep=2)


class PowerCut(BaseException):
    """Nothing after this happens."""


def rename_by_copy(monkeypatch, order: tuple[str, ...], num_copied: int) -> None:
    """Let a directory get its name as object stores do: file by file, and never all of them."""

    def rename(path: Path, target: Path) -> None:
        target.mkdir()
        for name in order[:num_copied]:
            shutil.copy(path / name, target / name)
        raise PowerCut

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("order", list(itertools.permutations(FILES)))
@pytest.mark.parametrize("num_copied", range(4))
def test_a_name_whose_files_are_not_all_there_is_no_checkpoint(tmp_path, monkeypatch, order, num_copied):
    commit(tmp_path, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        rename_by_copy(patch, order, num_copied)
        commit(tmp_path, 3)
    stored, _ = checkpoint.newest_valid(tmp_path)
    assert stored is not None and stored.step == (3 if num_copied == 3 else 2)
    assert float(stored.get("model/w")[0, 0]) == stored.facts["cursor"] == stored.step
    commit(tmp_path, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.fixture
def lagging(monkeypatch):
    """A listing that lacks step 3."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, what: (each for each in glob(path, what) if each.name[-1] != "3"))


@pytest.mark.parametrize(("known", "found"), [(None, 2), (3, 3), (2, 2), (9, 2)])
def test_a_step_that_is_remembered_is_found_although_the_listing_lacks_it(tmp_path, lagging, known, found):
    commit(tmp_path, 1, 2, 3)
    stored, refused = checkpoint.newest_valid(tmp_path, known=known)
    assert stored is not None and stored.step == found and refused == []


def test_retention_counts_only_what_it_sees(tmp_path, lagging):
    commit(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]
