"""The digest of weights: any bit, any place, any type."""

import pytest
import torch

from vlp.training import replicas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_flipped_bit_changes_the_digest(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5).to(dtype), torch.ones(2, dtype=dtype)]
    before = int(replicas.digest(tensors))
    for tensor in tensors:
        data = tensor.view(torch.uint8).reshape(-1)
        for place in range(len(data)):
            data[place] ^= 1
            assert int(replicas.digest(tensors)) != before
            data[place] ^= 1
    assert int(replicas.digest(tensors)) == before


def test_swapped_values_and_swapped_tensors_change_it():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert len({int(replicas.digest(t)) for t in ([a, b], [b, a], [a.flip(0), b], [a], [])}) == 5


def test_one_process_has_nothing_to_compare():
    replicas.check(torch.nn.Linear(2, 3), step=1)
