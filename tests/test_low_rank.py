"""Low-rank products beside linear layers. Axes: B clips, I inputs, O outputs, P parts, R rank."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import overrides, train
from torch import nn

from vlp import config
from vlp.layers.low_rank import LowRank, adapted, merge
from vlp.training import export
from vlp.training.assemble import assemble
from vlp.training.exits import Exit
from vlp.training.init import start_from


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Linear(5, 6), "two": nn.Sequential(nn.Linear(6, 3, bias=False), nn.ReLU())})


def learnt(module: nn.Module) -> nn.Module:
    for layer in adapted(module).values():
        nn.init.normal_(layer.lora_up)
    return module


def test_layers_give_at_first_what_they_gave():
    module, x = stack(), torch.randn(2, 7, 5)
    before = module["two"](module["one"](x))
    assert LowRank(layers={"*": 3}, rank=2, alpha=4.0)(module) == ["one", "two.0"]
    assert torch.equal(module["two"](module["one"](x)), before)


def test_each_part_of_a_joint_layer_has_a_product_of_its_own():
    module, x = stack(), torch.randn(4, 5)
    LowRank(layers={"one": 3}, rank=2, alpha=8.0)(module)
    layer = learnt(module)["one"]
    expected = [x @ layer.weight[2 * p : 2 * p + 2].T + layer.bias[2 * p : 2 * p + 2] for p in range(3)]
    for part, (down, up) in enumerate(zip(layer.lora_down.chunk(3), layer.lora_up, strict=True)):
        expected[part] = expected[part] + 8.0 / 2 * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), torch.cat(expected, -1))


def test_merged_layers_give_the_same_under_plain_names():
    module, names, x = stack(), set(stack().state_dict()), torch.randn(2, 7, 5)
    LowRank(layers={"one": 2, "two.*": 1}, rank=2, alpha=3.0, dropout=0.5)(module)
    learnt(module).eval()
    before = module["two"](module["one"](x))
    assert merge(module) == 2 and set(module.state_dict()) == names
    assert (module["one"].weight - stack()["one"].weight).abs().max() > 0.1
    torch.testing.assert_close(module["two"](module["one"](x)), before, rtol=1e-5, atol=1e-5)


def test_only_the_products_are_trained_and_dropout_is_theirs():
    module = stack()
    LowRank(layers={"one": 1}, rank=2, alpha=2.0, dropout=0.5)(module)
    assert [n for n, p in module["one"].named_parameters() if p.requires_grad] == ["lora_down", "lora_up"]
    layer, x = learnt(module)["one"], torch.randn(3, 5)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"*.qkv": 3}, r"'\*\.qkv' matches no linear layer; linear layers are named like one, two\.0, \.\.\."),
        ({"two.1": 1}, r"'two\.1' matches no linear layer"),
        ({"one": 1, "o*": 1}, r"'o\*' and another pattern both match one"),
        ({"two.0": 2}, r"two\.0 has 3 outputs, which are not 2 equal parts"),
        ({}, "names no layer"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        LowRank(layers=layers, rank=2, alpha=2.0)(stack())


def test_a_run_trains_the_products_alone_and_exports_plain_weights(place, tmp_path):
    layers = "adapter.low_rank.layers={model.text_encoder.*.query:1}"
    more = ("objective=[contrastive]", "adapter=[low_rank]", layers, "adapter.low_rank.rank=2", "optim.lr=0.1")
    assert train(place, "products", *more) == Exit.DONE
    source, out = export.open_source(place / "runs" / "products"), tmp_path / "plain.safetensors"
    export.export(source, out, averaged=False)
    stored, plain = source.stored.under("model"), load_file(out)
    assert plain.keys() == {name for name in stored if ".lora_" not in name}
    name = next(name for name in plain if name.endswith("query.weight"))
    down, up = (stored[name.replace("weight", f"lora_{side}")] for side in ("down", "up"))
    assert up.abs().max() > 0
    torch.testing.assert_close(plain[name], stored[name] + 16.0 / 2 * up[0] @ down)
    again = assemble(config.load(overrides(place, "plain", "objective=[contrastive]", f"init.run={out}")))
    report = start_from(nn.ModuleDict({"model": again.model}), out)
    assert not report.missing and not report.left_over


def test_a_wrong_pattern_is_one_line_of_the_config(place):
    wrong = "adapter={lora: {_target_: vlp.layers.low_rank.LowRank, layers: {nothing: 1}, rank: 2, alpha: 2}}"
    cfg = config.load([*overrides(place, "wrong"), "+" + wrong])
    with pytest.raises(config.ConfigError, match=r"^adapter\.lora\.layers: 'nothing' matches no linear layer; .*$"):
        assemble(cfg)
