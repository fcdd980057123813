"""Plans against hand counts, and against what PyTorch allocates in a real step."""

import json

import pytest
import torch
from step_memory import measured_peak
from torch import nn

from vlp import config
from vlp.planning import cluster, memory
from vlp.planning.command import main
from vlp.planning.estimate import estimate
from vlp.planning.page import page
from vlp.planning.system import build
from vlp.planning.trace import LARGEST_KNOWN, Shapes, costs, peak
from vlp.training.assemble import assemble
from vlp.training.exits import Exit

TOWERS = ("objective=[contrastive]", "fusion=null", "decoder=null", "view=[]", "text.config.hidden_dropout_prob=0.0")
SMALL = ("data.batch_size=64", "cluster.gpus_per_node=4")


def test_flops_of_the_video_encoder_equal_the_hand_count():
    cfg = config.load(TOWERS)
    found = {cost.name: cost for cost in costs(build(cfg), 3)}["encoded"]
    cells, dim, depth, patch = 4 * 8 * 8, 128, 4, 2 * 8 * 8 * 3  # tubelets of 2 frames, patches of 8 x 8
    tokens = cells + 1
    linear, attention = depth * 24 * tokens * dim**2, depth * 4 * tokens**2 * dim
    embed = 2 * cells * patch * dim
    assert found.forward == 3 * (linear + attention + embed)
    # Twice for inputs and weights, but pixels have no gradient; fused attention multiplies 5 times, 2 times forward.
    assert found.backward == 3 * (2 * linear + attention * 5 // 2 + embed)


def test_a_view_costs_its_quantities_again():
    cfg = config.load(["objective=[contrastive,masked_words]", "decoder=null"])
    found = {cost.name: cost.forward for cost in costs(build(cfg), 2)}
    assert found["text:masked_words"] == found["text"] > 0
    assert "encoded:masked_words" not in found and found["fused:masked_words"] > 0


def test_nothing_is_read_for_a_plan():
    """VIOLET's codes, whose weights are a file of the user's."""
    assert build(config.load(["+experiment=violet"])).system.objectives["masked_visual"].tokenizer.num_codes == 8192


def test_masks_over_pairs_of_tokens_are_shapes():
    with Shapes([]):
        known = torch.ones(LARGEST_KNOWN // 2**11, 1, dtype=torch.bool).to("meta")
        narrow, wide = (known & torch.ones(1, width, dtype=torch.bool) for width in (2**11, 2**11 + 1))
    assert "known" in vars(narrow) and "known" not in vars(wide)


def test_what_would_fit_does():
    small = config.load([*TOWERS, "data.batch_size=48", "cluster.gpus_per_node=2", "cluster.reserved_gib=79.4"])
    line = next(line for line in page("x", small, estimate(small)).splitlines() if "does NOT fit" in line)
    ways = [way.split() for way in line.partition("what would: ")[2].split(", or ")]
    assert len(ways) == 2 and "trainer.checkpoint_activations=true" in ways[1]
    for way in ways:
        changed = config.load(
            [*TOWERS, "data.batch_size=48", "cluster.gpus_per_node=2", "cluster.reserved_gib=79.4", *way]
        )
        assert ": fits" in page("x", changed, estimate(changed))


def test_every_text_of_a_sample_is_counted():
    towers = ["+experiment=mevtr", "run.tiny=true", "clip.num_frames=4", "data.batch_size=16"]
    few, many = (
        {cost.name: cost.forward for cost in costs(build(config.load([*towers, f"texts.max_texts={n}"])), 2)}
        for n in (2, 5)
    )
    assert many["more_text"] == 4 * few["more_text"] == 4 * many["text"] > 0 and few["text"] == many["text"]


MEASURED = {
    "towers": TOWERS,
    "recomputed": (*TOWERS, "trainer.checkpoint_activations=true"),
    "six objectives": ("+experiment=quickstart",),
    "half precision": (*TOWERS, "trainer.precision=bf16-mixed"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_peak_of_a_step_is_predicted_within_ten_percent(name):
    cfg = config.load(MEASURED[name])
    found = peak(build(cfg), 6)
    assert found.with_gradients == pytest.approx(measured_peak(cfg, 6), rel=0.1)


def test_what_is_kept_between_steps_is_exact():
    cfg = config.load([*TOWERS, "optim.freeze=[model.text_encoder.*]"])
    planned = build(cfg)
    found = memory.single(memory.sizes(planned.module, weight_bytes=4, ema=False, ranks=1))
    system = assemble(cfg)
    system.model.text_encoder.requires_grad_(False)
    trained = [p for p in system.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    state = [x for each in optimizer.state.values() for x in each.values()]
    assert found.weights == _bytes([*system.model.parameters(), *system.model.buffers()])
    assert found.gradients == _bytes([p.grad for p in trained])
    assert found.optimizer == _bytes(state)


def _bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_strategies_divide_what_they_say():
    s = memory.sizes(nn.Linear(63, 100), weight_bytes=2, ema=True, ranks=4, bucket=1000)  # 6,400 parameters
    assert memory.ddp(s)[:5] == (12_800, 12_800, 4 * 6400 + 8, 25_600, 12_800)
    assert memory.zero1(s)[:5] == (12_800, 12_800, 12 * 1600, 6400, 2000)
    assert memory.zero2(s)[:5] == (12_800, 6400, 12 * 1600, 6400, 4000)
    assert memory.zero3(s)[:5] == (3200, 6400, 12 * 1600, 6400, 6000)
    offloaded = memory.zero3_offload(s)
    assert (offloaded.weights, offloaded.optimizer, offloaded.host) == (0, 0, 3200 + 12 * 1600 + 6400)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    planned = build(config.load(TOWERS))
    one, two = (memory.micro_bytes(peak(planned, clips), grads_are_kept=True) for clips in (8, 16))
    room = 300 * 2**20
    most = memory.largest_micro_batch((8, one), (16, two), room)
    assert peak(planned, most).without_gradients <= room < peak(planned, most + 1).without_gradients
    assert memory.largest_micro_batch((8, one), (16, two), 0) == 0


def test_step_time_by_hand():
    section = config.load(["cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.utilisation=0.5"]).cluster
    card = cluster.gpu("h100")
    step = cluster.step_time(
        card,
        flops=989e12,
        kernels=9,
        half=True,
        kept_bytes=0,
        exchanged_bytes=800e9,
        gathered_bytes=8e9,
        cluster=section,
    )
    assert step.compute_s == pytest.approx(2.0)
    assert step.exchange_s == pytest.approx(800 / 50 * 15 / 16)  # through the network, of which each GPU has 50 GB/s
    assert step.total_s == pytest.approx(2.0 + 0.15 + 15 - 2 * 2 / 3)


def test_a_small_model_waits_for_its_kernels_to_start():
    section = config.load(["cluster.gpus_per_node=1", "cluster.launch_us=10"]).cluster
    card, nothing = cluster.gpu("h100"), {"kept_bytes": 0, "exchanged_bytes": 0, "gathered_bytes": 0}
    step = cluster.step_time(card, flops=1e6, kernels=3000, half=False, cluster=section, **nothing)
    assert step.total_s == pytest.approx(0.03)


@pytest.mark.parametrize("path", sorted((config.CONF / "gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_card_is_complete_and_names_its_source(path):
    card = cluster.gpu(path.stem)
    assert min(card) > 0 and card.bf16_tflops > card.fp32_tflops and "Source:" in path.read_text()


def test_accumulation_costs_a_second_pass_of_the_towers_and_no_more():
    once, twice = (estimate(config.load([*TOWERS, *SMALL, f"trainer.accumulate={k}"]))["flops"] for k in (1, 2))
    towers = sum(row["forward"] for row in once["by_quantity"] if not row["name"].startswith("objective"))
    assert once["second_pass"] == 0 and twice["second_pass"] == towers
    assert twice["step"] - once["step"] == towers * 16


def test_page_and_json_say_the_same_without_opening_data(capsys, tmp_path):
    words = [*TOWERS, *SMALL, "trainer.strategy=ddp", f"paths.data={tmp_path / 'no'}", f"paths.runs={tmp_path / 'no'}"]
    assert main(words) == Exit.DONE
    text = capsys.readouterr().out
    assert main([*words, "--json"]) == Exit.DONE
    plan = json.loads(capsys.readouterr().out)
    for title in ("Parameters", "GFLOPs a clip", "Memory a GPU", "Time", "Data and storage", "Assumed"):
        assert f"\n{title}" in text
    assert f"{plan['parameters']:,}" in text and f"{plan['times']['ddp']['gpu_hours']:,.0f}" in text
    assert plan["memory"]["ddp"]["kept"]["total"] < plan["room_bytes"] and ": fits" in text
    assert not (tmp_path / "no").exists()


def test_audit_names_patterns_exceptions_and_reasons(capsys):
    frozen = "optim.freeze=[model.text_encoder.*,'!model.text_encoder.*LayerNorm*']"
    assert main([*TOWERS, frozen, "audit"]) == Exit.DONE
    text = capsys.readouterr().out
    assert "'model.text_encoder.*' freezes" in text and "'!model.text_encoder.*LayerNorm*' trains again 14" in text
    listed = text[text.index("\ntrained:") :]
    assert "LayerNorm.weight" in listed and "text_encoder.model.encoder.layer.*.attention.self.query" not in listed


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["cluster.gpu=h10"], "there are a10, a100_40"),
        (["cluster.nodes=3"], "set it to a multiple of 24"),
        (["cluster.stored_as=vhs"], "use one of original720, side256"),
        (["cluster.utilisation=1.5"], "cluster.utilisation: 1.5 is not possible"),
        (["optim.freeze=[nothing*]"], "matches no parameter"),
        (["audit", "graph"], "one of them at a time"),
    ],
)
def test_mistakes_cost_a_line(words, hint, capsys):
    assert main(words) == Exit.BAD_CONFIG
    error = capsys.readouterr().err
    assert hint in error and "Traceback" not in error
