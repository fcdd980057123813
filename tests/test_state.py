"""What a checkpoint holds of a module and its optimizer, and how it comes back."""

import pytest
import torch
from torch import nn

from vlp.training import checkpoint, optim, state
from vlp.training.ema import Ema


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
    assert list(state.module_state(Tied())) == [
        "table", "start", "nothing", "words.weight", "head.bias", "frozen.weight", "frozen.bias",
    ]  # fmt: skip


def test_load_module_fills_weights_buffers_and_tied_tensors():
    first, second = Tied(), Tied()
    first.table.add_(10)
    state.load_module(second, {n: t.detach().clone() for n, t in state.module_state(first).items()})
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
    tensors = {**state.module_state(module), **change}
    with pytest.raises(ValueError, match=message):
        state.load_module(module, {name: value for name, value in tensors.items() if value is not None})


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
    tensors = state.collect(module, optimizer, None, rank=0, world_size=1)
    path = checkpoint.save(tmp_path, step=3, state=checkpoint.State(tensors, {}), keep=2)
    fresh, other = trained(0)
    state.load_optimizer(other, state.restore(fresh, None, checkpoint.open_checkpoint(path)))
    one_step(module, optimizer, 3), one_step(fresh, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))


def test_optimizer_state_is_keyed_by_parameter_name():
    keys = state.optimizer_state(trained(1)[1])
    assert set(keys) == {
        f"{k}/{i}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for i in (0, 1) for n in ("weight", "bias")
    }


def test_load_optimizer_without_tensors_starts_afresh():
    _, optimizer = trained(0)
    state.load_optimizer(optimizer, {})
    assert not optimizer.state


def test_load_optimizer_puts_everything_on_the_device_of_the_parameter():
    _, optimizer = trained(1)
    tensors = state.optimizer_state(optimizer)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)).to("meta")
    other = optim.adamw(
        optim.settings(module, layer_decay=None, lr_factors={}), lr=1, betas=[0, 0], eps=1, weight_decay=0
    )
    state.load_optimizer(other, tensors)  # fused AdamW refuses a step count on another device
    assert {value.device.type for value in state.optimizer_state(other).values()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg/9.weight": torch.zeros(1)}, "state for '9.weight', which is not trained"),
        ({f"{kind}/1.bias": None for kind in ("step", "exp_avg", "exp_avg_sq")}, "no optimizer state for '1.bias'"),
    ],
)
def test_load_optimizer_refuses_other_parameters(change, message):
    tensors = {**state.optimizer_state(trained(1)[1]), **change}
    with pytest.raises(ValueError, match=message):
        state.load_optimizer(trained(0)[1], {name: value for name, value in tensors.items() if value is not None})


def test_the_average_comes_back_with_the_weights(tmp_path):
    module, optimizer = trained(1)
    ema, other = Ema(module, decay=0.5), Ema(trained(0)[0], decay=0.5)
    one_step(module, optimizer, 1), ema.update(module, 1)
    saved = checkpoint.State(state.collect(module, optimizer, ema, rank=0, world_size=1), {})
    path = checkpoint.save(tmp_path, step=1, state=saved, keep=2)
    state.restore(module, other, checkpoint.open_checkpoint(path))
    assert all(torch.equal(other.average[name], value) for name, value in ema.average.items())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_even(world_size):
    tensors = {f"model/{n}": torch.zeros(n) for n in (1, 2, 3, 5, 7, 11, 13, 17)}
    shares = [state.share(tensors, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(key for each in shares for key in each) == sorted(tensors)
    loads = [sum(tensor.nbytes for tensor in each.values()) for each in shares]
    assert max(loads) <= max(sum(loads) / world_size + 4 * 7, 4 * 17)
