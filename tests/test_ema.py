"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from vlp.training.ema import Ema


def make() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    module[1].requires_grad_(False)
    return module


def set_weights(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_average_follows_the_formula_and_forgets_the_start():
    module, expected = make(), 1.0
    set_weights(module, 1.0)
    ema = Ema(module, decay=0.5)
    for step in range(1, 8):
        set_weights(module, float(step))
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["0.weight"], torch.full((3, 2), expected))


def test_only_trainable_parameters_are_averaged():
    assert set(Ema(make(), decay=0.9).average) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_average_is_float32_and_apart_from_the_weights():
    module = make().bfloat16()
    ema = Ema(module, decay=0.9)
    set_weights(module, 7.0)
    assert ema.average["0.bias"].dtype == torch.float32 and not (ema.average["0.bias"] == 7).any()


def test_applied_lends_the_average_and_gives_the_weights_back():
    module = make()
    ema, before = Ema(module, decay=0.9), [p.clone() for p in module.parameters()]
    set_weights(module, 2.0)
    with ema.applied(module):
        assert torch.is_grad_enabled()
        assert torch.equal(module[0].weight, before[0]) and (module[1].weight == 2).all()
    assert all((p == 2).all() for p in module.parameters())


def test_applied_gives_the_weights_back_after_an_exception():
    module = make()
    ema = Ema(module, decay=0.9)
    set_weights(module, 2.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(module):
        raise RuntimeError("inside")
    assert (module[0].weight == 2).all()


def test_load_continues_from_a_stored_average():
    ema, other = Ema(make(), decay=0.9), Ema(make(), decay=0.9)
    set_weights(module := make(), 3.0)
    other.update(module, 1)
    ema.load(other.average)
    assert all(torch.equal(ema.average[name], value) for name, value in other.average.items())
    assert ema.average["0.weight"] is not other.average["0.weight"]


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_load_refuses_other_parameters(change):
    ema = Ema(make(), decay=0.9)
    average = {name: value for name, value in ema.average.items() if name != "2.bias"}
    if change == "unknown":
        average = {**ema.average, "9.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"differ in 1 names \((2|9).bias\); freeze the same parts"):
        ema.load(average)


def test_the_average_follows_the_module_to_another_device():
    module = make()
    ema = Ema(module, decay=0.9)
    ema.update(module.to("meta"), 1)
    assert {value.device.type for value in ema.average.values()} == {"meta"}


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 2.0])
def test_a_decay_outside_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match=r"optim.ema_decay=.* must lie between 0 and 1, for example 0.999; null"):
        Ema(make(), decay=decay)
