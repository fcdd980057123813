"""What a checkpoint holds of a module and its optimizer, and how it comes back."""

import pytest
import torch
from strategy_toy import Memory
from torch import nn

from vlp.training import optim, state
from vlp.training.ema import Ema
from vlp.training.update import PlainUpdate


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.head.weight = self.words.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("start", self.table[:2])  # begins where `table` begins
        self.register_buffer("same", self.table)
        self.register_buffer("nothing", torch.zeros(0))
        self.frozen = nn.Linear(2, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x)).square().sum()


def update_of(module: nn.Module) -> PlainUpdate:
    chosen = optim.settings(module, layer_decay=None, lr_factors={"*.bias": 0.1})
    optimizer = optim.adamw(chosen, lr=0.1, betas=[0.9, 0.9], eps=1e-8, weight_decay=0.1)
    return PlainUpdate(module, module, optimizer, max_norm=None, scale=None)


def one_step(update: PlainUpdate, step: int) -> None:
    update.backward(update.forward(torch.tensor([step, step + 1])))
    update.step(update.norm())


def trained(num_steps: int) -> tuple[nn.Module, PlainUpdate]:
    torch.manual_seed(num_steps)
    module = Tied()
    update = update_of(module)
    for step in range(num_steps):
        one_step(update, step)
    return module, update


def test_tied_tensors_are_given_once_and_everything_else_is_there():
    names = {"table", "start", "nothing", "words.weight", "head.bias", "frozen.weight", "frozen.bias"}
    assert set(state.collect(*trained(0), None)) == {f"model/{name}" for name in names}
    assert set(state.once(Tied())) == names
    assert state.tied_names(Tied()) == {"head.weight": "words.weight", "same": "table"}


def test_a_state_comes_back_with_its_ties_buffers_and_frozen_tensors():
    first, second = trained(1), trained(0)
    first[0].table.add_(10)
    state.restore(*second, None, Memory(state.collect(*first, None)))
    for name, value in first[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], value), name
    assert second[0].head.weight is second[0].words.weight


def test_training_continues_bit_for_bit():
    first, second = trained(3), trained(0)
    state.restore(*second, None, Memory({k: v.clone() for k, v in state.collect(*first, None).items()}))
    for _, update in (first, second):
        one_step(update, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


def test_moments_are_keyed_by_parameter_name_and_absent_before_the_first_step():
    keys = {key for key in state.collect(*trained(1), None) if key.startswith("optimizer/")}
    names = ("words.weight", "head.bias")
    assert keys == {f"optimizer/{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model/table": None}, r"missing \['model/table'\], unknown \[\], other shape \[\] \(1, 0, 0 in all\)"),
        ({"model/more": torch.zeros(2)}, r"missing \[\], unknown \['model/more'\]"),
        ({"model/table": torch.zeros(5)}, r"other shape \['model/table'\]"),
        ({"model/words.weight": torch.zeros(21)}, r"other shape \['model/words.weight'\]"),
        ({"optimizer/exp_avg/9.weight": torch.zeros(1)}, "state for '9.weight', which is not trained"),
        ({"optimizer/exp_avg/head.bias": None}, "no optimizer state for 'head.bias'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    tensors = {**state.collect(*trained(1), None), **change}
    with pytest.raises(ValueError, match=message):
        state.restore(*trained(0), None, Memory({name: value for name, value in tensors.items() if value is not None}))


def test_the_average_comes_back_and_fills_a_module_in_place_of_the_weights():
    module, update = trained(1)
    ema, (other, fresh) = Ema(update.weights(), decay=0.5), trained(0)
    one_step(update, 1), ema.update(update.weights(), 1)
    saved, second = Memory(state.collect(module, update, ema)), Ema(fresh.weights(), decay=0.5)
    state.restore(other, fresh, second, saved)
    assert all(torch.equal(second.average[n].values, share.values) for n, share in ema.average.items())
    for averaged, expected in ((True, ema.average["head.bias"].values), (False, module.head.bias)):
        state.fill(other, saved, averaged=averaged)
        assert torch.equal(other.head.bias, expected)


def test_a_state_without_an_average_is_refused_where_one_is_kept():
    module, update = trained(0)
    with pytest.raises(ValueError, match=r"no averaged weights; keep optim\.ema_decay"):
        state.restore(module, update, Ema(update.weights(), decay=0.5), Memory(state.collect(module, update, None)))


@pytest.mark.parametrize("num_writers", [1, 2, 3, 7])
def test_owners_have_about_as_many_bytes_each(num_writers):
    sizes = {str(n): n for n in (1, 2, 3, 5, 7, 11, 13, 17)}
    owners = state.owners_of(sizes, num_writers)
    loads = [sum(sizes[key] for key, owner in owners.items() if owner == rank) for rank in range(num_writers)]
    assert owners.keys() == sizes.keys() and max(loads) <= max(sum(loads) / num_writers + 7, 17)
