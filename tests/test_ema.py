"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from vlp.training import optim
from vlp.training.ema import Ema
from vlp.training.update import PlainUpdate, showing


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PlainUpdate]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 5)).to(dtype)
    module[1].requires_grad_(False)
    chosen = optim.settings(module, layer_decay=None, lr_factors={})
    optimizer = optim.adamw(chosen, lr=1, betas=[0, 0], eps=1, weight_decay=0)
    return module, PlainUpdate(module, module, optimizer, max_norm=None, scale=None)


def set_weights(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_average_follows_the_formula_and_forgets_the_start():
    (module, update), expected = make(), 1.0
    set_weights(module, 1.0)
    ema = Ema(update.weights(), decay=0.5)
    for step in range(1, 8):
        set_weights(module, float(step))
        ema.update(update.weights(), step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["0.weight"].values, torch.full((3, 2), expected))


def test_only_trainable_parameters_are_averaged():
    assert set(Ema(make()[1].weights(), decay=0.9).average) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_average_is_float32_and_apart_from_the_weights():
    module, update = make(torch.bfloat16)
    ema = Ema(update.weights(), decay=0.9)
    set_weights(module, 7.0)
    values = ema.average["0.bias"].values
    assert values.dtype == torch.float32 and not (values == 7).any()


def test_showing_lends_the_average_and_gives_the_weights_back():
    module, update = make()
    ema, before = Ema(update.weights(), decay=0.9), [p.clone() for p in module.parameters()]
    set_weights(module, 2.0)
    with showing(update, module, ema.average):
        assert torch.is_grad_enabled()
        assert torch.equal(module[0].weight, before[0]) and (module[1].weight == 2).all()
    assert all((p == 2).all() for p in module.parameters())


def test_showing_gives_the_weights_back_after_an_exception():
    module, update = make()
    ema = Ema(update.weights(), decay=0.9)
    set_weights(module, 2.0)
    with pytest.raises(RuntimeError, match="inside"), showing(update, module, ema.average):
        raise RuntimeError("inside")
    assert all((p == 2).all() for p in module.parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 2.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match=r"optim.ema_decay=.* between 0 and 1"):
        Ema({}, decay=decay)
