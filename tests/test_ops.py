"""Counter-based draws and choices."""

import numpy as np
import pytest
import torch

from vlp import ops
from vlp.data.rng import mix

KEYS = torch.tensor([3, -(2**62), 2**63 - 1, 0, 41])


def splitmix64(value: int) -> int:
    mask = 2**64 - 1
    state = (value + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_hash64_equals_splitmix64_written_with_python_integers():
    assert ops.hash64(KEYS).tolist() == [splitmix64(int(key)) for key in KEYS]


def test_hash64_of_zero_is_the_published_first_output():
    assert int(ops.hash64(torch.tensor([0]))) & (2**64 - 1) == 0xE220A8397B1DCDAF


def test_fold_gives_other_keys_for_other_salts():
    folded = torch.stack([ops.fold(KEYS, salt) for salt in range(100)])
    assert folded.unique().numel() == 500


def test_uniform_fills_the_unit_interval_evenly():
    draws = ops.uniform(torch.arange(100), 1000)
    counts = torch.histc(draws, bins=20, min=0.0, max=1.0)
    assert draws.dtype == torch.float32 and float(draws.min()) >= 0 and float(draws.max()) < 1
    assert float((counts / 5000 - 1).abs().max()) < 0.06


def test_uniform_of_a_key_depends_neither_on_row_nor_on_number_of_draws():
    together = ops.uniform(KEYS, 7)
    alone = torch.cat([ops.uniform(key[None], 5) for key in KEYS.flip(0)]).flip(0)
    torch.testing.assert_close(together[:, :5], alone, rtol=0, atol=0)


def test_uniform_of_neighbouring_keys_is_uncorrelated():
    draws = ops.uniform(torch.arange(50), 2000).double().numpy()
    off_diagonal = np.corrcoef(draws)[~np.eye(50, dtype=bool)]
    assert abs(off_diagonal).max() < 0.1


def test_uniform_goes_well_with_the_keys_of_the_data_side():
    keys = torch.tensor([mix(0, 0, 0, sample) for sample in range(2000)])
    assert float(ops.uniform(keys, 1).mean()) == pytest.approx(0.5, abs=0.02)


def test_pair_uniform_belongs_to_the_pair_and_not_to_its_place():
    rows, columns = torch.arange(5), torch.arange(100, 107)
    draws = ops.pair_uniform(rows, columns)
    moved = ops.pair_uniform(rows.flip(0), columns.flip(0)).flip(0, 1)
    torch.testing.assert_close(draws, moved, rtol=0, atol=0)
    assert draws.unique().numel() == 35


def test_pair_uniform_differs_when_the_pair_is_turned_round():
    keys = torch.tensor([5, 9])
    draws = ops.pair_uniform(keys, keys)
    assert float(draws[0, 1]) != float(draws[1, 0])


def test_choose_takes_the_highest_of_each_row():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    chosen = ops.choose(scores, torch.tensor([2, 1]))
    assert chosen.tolist() == [[False, True, True], [True, False, False]]


def test_choose_breaks_ties_so_that_the_count_is_exact():
    chosen = ops.choose(torch.zeros(3, 7), torch.tensor([0, 3, 7]))
    assert chosen.sum(1).tolist() == [0, 3, 7]
    assert chosen[1].tolist() == [True] * 3 + [False] * 4
