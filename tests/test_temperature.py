"""Initial value, bounds and parameterisation of the temperature."""

import math

import pytest
import torch

from vlp.layers.temperature import Temperature


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize("init", [0.05, 0.07, 1.0])
def test_scale_is_one_over_the_initial_temperature(init, log_space):
    scale = Temperature(init=init, log_space=log_space)()
    assert scale.shape == () and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(1 / init, rel=1e-6)


@pytest.mark.parametrize(("log_space", "gradient"), [(True, 1 / 0.05), (False, -1 / 0.05**2)])
def test_gradient_is_that_of_the_parameterisation(log_space, gradient):
    temperature = Temperature(init=0.05, log_space=log_space)
    temperature().backward()
    assert float(temperature.value.grad) == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize(("moved_to", "held_at"), [(1e-4, 0.02), (5.0, 0.5), (0.1, 0.1)])
def test_clamp_holds_both_bounds(log_space, moved_to, held_at):
    temperature = Temperature(init=0.1, min_temperature=0.02, max_temperature=0.5, log_space=log_space)
    with torch.no_grad():
        temperature.value.fill_(-math.log(moved_to) if log_space else moved_to)
    temperature.clamp_()
    assert (1 / temperature()).item() == pytest.approx(held_at, rel=1e-5)


def test_clamp_leaves_the_parameter_trainable():
    temperature = Temperature()
    temperature.clamp_()
    assert temperature.value.requires_grad and temperature.value.is_leaf


def test_a_fixed_temperature_is_not_trained():
    assert not Temperature(learnable=False).value.requires_grad


def test_scale_is_float32_in_a_half_precision_model():
    assert Temperature().bfloat16()().dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"init": 0.001}, {"init": 2.0}, {"min_temperature": 0.0}, {"init": math.nan}])
def test_values_outside_the_bounds_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must lie between min_temperature=.* change model.temperature"):
        Temperature(**arguments)
