"""Schedules, parameter groups, freezing and layer decay."""

import math

import pytest
import torch
from torch import nn

from vlp.training import optim


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (6, 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2), (10, 0.1), (99, 0.1)],
)
def test_cosine_warms_up_and_falls_along_half_a_cosine(step, factor):
    assert optim.Cosine(warmup_steps=4, final_factor=0.1)(step, 10) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.6), (10, 0.2), (99, 0.2)])
def test_linear_warms_up_and_falls_in_a_straight_line(step, factor):
    assert optim.Linear(warmup_steps=2, final_factor=0.2)(step, 10) == pytest.approx(factor)


@pytest.mark.parametrize(("warmup", "step", "factor"), [(0, 0, 1.0), (4, 0, 0.25), (4, 3, 1.0), (4, 50, 1.0)])
def test_constant_warms_up_and_stays(warmup, step, factor):
    assert optim.Constant(warmup_steps=warmup)(step, 10) == factor


@pytest.mark.parametrize("schedule", [optim.Cosine(), optim.Linear(), optim.Cosine(warmup_steps=5)])
def test_schedules_survive_runs_of_no_length(schedule):
    assert 0 <= schedule(0, 0) <= 1 and 0 <= schedule(7, 5) <= 1


class Encoder(nn.Module):
    """Names as vlp.encoders gives them: the last norm stands before the blocks, the tokens have no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(2, 3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.norm_pre, self.norm = nn.LayerNorm(3), nn.LayerNorm(3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))


class Bert(nn.Module):
    """Names as Hugging Face gives them: the layers stand one level deeper than the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Embedding(7, 3), nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))


def make() -> nn.ModuleDict:
    text, temperature = nn.ModuleDict({"model": Bert()}), nn.Module()
    temperature.value = nn.Parameter(torch.tensor(1.0))
    model = nn.ModuleDict({"video_encoder": Encoder(), "text_encoder": text, "temperature": temperature})
    return nn.ModuleDict({"model": model, "objectives": nn.ModuleDict({"matching": nn.Linear(3, 1)})})


def frozen_names(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def test_freeze_takes_patterns_and_reports_names():
    module = make()
    assert optim.freeze(module, ["*video_encoder.blocks*"]) == sorted(frozen_names(module))
    assert frozen_names(module) == {f"model.video_encoder.blocks.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}


def test_freeze_makes_exceptions_in_the_order_of_the_patterns():
    module = make()
    optim.freeze(module, ["model.*", "!*norm*", "*norm_pre.bias"])
    kept = {name for name, p in module.named_parameters() if p.requires_grad and name.startswith("model.")}
    assert kept == {f"model.video_encoder.{n}" for n in ("norm_pre.weight", "norm.weight", "norm.bias")}


def test_freeze_leaves_what_was_frozen_before():
    module = make()
    module["objectives"].requires_grad_(False)
    optim.freeze(module, ["model.temperature.*"])
    assert "objectives.matching.weight" in frozen_names(module)


@pytest.mark.parametrize("pattern", ["*.vidoe.*", "!*.vidoe.*"])
def test_freeze_refuses_a_pattern_without_match(pattern):
    with pytest.raises(ValueError, match=r"optim.freeze: '!?\*.vidoe.\*' matches no parameter; names look like model."):
        optim.freeze(make(), [pattern])


def settings(**changes) -> dict[str, optim.Setting]:
    chosen = optim.settings(make(), **{"layer_decay": None, "lr_factors": {}, **changes})
    return {setting.name: setting for setting in chosen}


def test_settings_leave_out_frozen_parameters():
    module = make()
    optim.freeze(module, ["model.*"])
    names = [s.name for s in optim.settings(module, layer_decay=None, lr_factors={})]
    assert names == ["objectives.matching.weight", "objectives.matching.bias"]


def test_settings_refuse_a_model_that_is_frozen_altogether():
    module = make().requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        optim.settings(module, layer_decay=None, lr_factors={})


def test_no_weight_decay_on_norms_biases_and_temperatures():
    without = {name for name, setting in settings().items() if not setting.decay}
    assert without == {n for n in settings() if n.endswith(("bias", "temperature.value")) or "norm" in n}


def test_lr_factors_multiply():
    found = settings(lr_factors={"model.video_encoder.*": 0.1, "*.blocks.1.*": 5.0})
    assert found["model.video_encoder.blocks.1.weight"].lr_factor == pytest.approx(0.5)
    assert found["model.video_encoder.norm.weight"].lr_factor == pytest.approx(0.1)
    assert found["objectives.matching.weight"].lr_factor == 1


def test_lr_factors_refuse_a_pattern_without_match():
    with pytest.raises(ValueError, match=r"optim.lr_factors: '\*.vidoe' matches no parameter"):
        settings(lr_factors={"*.vidoe": 0.1})


@pytest.mark.parametrize(
    ("name", "layers_above"),
    [
        ("model.video_encoder.blocks.1.weight", 1),
        ("model.video_encoder.blocks.0.bias", 2),
        ("model.video_encoder.patch_embed.weight", 3),
        ("model.video_encoder.cls_token", 3),
        ("model.video_encoder.norm_pre.weight", 3),
        ("model.video_encoder.norm.weight", 0),
        ("model.text_encoder.model.encoder.layer.2.weight", 1),
        ("model.text_encoder.model.encoder.layer.0.weight", 3),
        ("model.text_encoder.model.embeddings.weight", 4),
        ("model.temperature.value", 0),
        ("objectives.matching.weight", 0),
    ],
)
def test_layer_decay_counts_the_layers_above(name, layers_above):
    assert settings(layer_decay=0.5)[name].lr_factor == 0.5**layers_above


def make_adamw(module: nn.Module, **changes) -> torch.optim.AdamW:
    chosen = optim.settings(module, **{"layer_decay": None, "lr_factors": {"*.blocks.*": 0.1}, **changes})
    return optim.adamw(chosen, lr=0.01, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.05)


def test_adamw_groups_by_rate_and_decay_and_names_everything_once():
    module = make()
    groups = make_adamw(module).param_groups
    assert {(g["lr_factor"], g["weight_decay"]) for g in groups} == {(1, 0.05), (1, 0), (0.1, 0.05), (0.1, 0)}
    assert sorted(name for g in groups for name in g["names"]) == sorted(n for n, _ in module.named_parameters())
    by_name = dict(module.named_parameters())
    assert all(by_name[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))


def test_set_rate_scales_the_base_rates_however_often():
    optimizer = make_adamw(make())
    for factor in (0.5, 0.25):
        optim.set_rate(optimizer, factor)
    assert {round(g["lr"], 9) for g in optimizer.param_groups} == {0.0025, 0.00025}


def test_adamw_moves_like_the_formula():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = optim.adamw([optim.Setting("w", weight, 2.0, True)], lr=0.1, betas=[0, 0.99], eps=0.0, weight_decay=0.5)
    weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()  # in the first step the moments cancel to the sign of the gradient
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.0 * 0.9 - 0.2, -2.0 * 0.9 + 0.2]]))


def test_audit_counts_every_parameter_once():
    module = make()
    module["model"].scale = nn.Parameter(torch.zeros(5))  # of the family itself
    module["objectives"]["matching"].weight = module["model"]["video_encoder"].blocks[0].weight  # tied
    optim.freeze(module, ["*text_encoder*"])
    rows = [line.split() for line in optim.audit(module).splitlines()[1:]]
    totals = {part: (int(total), int(trainable)) for part, total, trainable in rows}
    assert totals["model.text_encoder"] == (57, 0) and totals["model.scale"] == (5, 5)
    assert sum(total for total, _ in totals.values()) == sum(p.numel() for p in module.parameters())
