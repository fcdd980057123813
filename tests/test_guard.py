"""The look at each step: what is trouble, and what each policy does about it."""

import json
from types import SimpleNamespace

import pytest
import torch

from vlp.training.guard import Guard, Limits, NonFiniteError, SpikeError, refuse_non_finite
from vlp.training.module import Pretraining
from vlp.training.precision import LossScale

WEIGHTS = {"a": 1.0, "b": 0.5}


def guard(path, rewind=lambda: None, **limits) -> Guard:
    return Guard(
        Limits(**limits),
        path=path / "bad.jsonl",
        rewind=rewind,
        name_sample=lambda s, i: {"key": f"k{i}", "shard": "t"},
    )


def look(made: Guard, loss: float, norm: float = 1.0):
    return made.look(torch.tensor(norm), {"a": torch.tensor(loss), "b": torch.tensor(0.0)}, WEIGHTS)


def answer(made: Guard, trouble, step: int) -> None:
    batch = SimpleNamespace(batches=[SimpleNamespace(sample_id=torch.tensor([3, -1, 5]))], source=0)
    made.answer(trouble, step=step, batch=batch, means={"a": torch.tensor(torch.nan), "b": torch.tensor(0.0)}, seed=1)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, torch.nan), (1.0, torch.inf), (torch.nan, 1.0), (-torch.inf, 1.0)])
def test_a_loss_or_a_gradient_that_is_not_finite_is_trouble(tmp_path, loss, norm):
    trouble = look(guard(tmp_path), loss, norm)
    assert trouble and trouble.error is NonFiniteError and trouble.policy == "stop"


def test_spikes_are_not_looked_for_by_default(tmp_path):
    made = guard(tmp_path, spike_window=2)
    assert not any(look(made, loss) for loss in (1.0, 1.0, 1e9))


@pytest.mark.parametrize(("loss", "norm", "word"), [(3.1, 1.0, "loss"), (1.0, 3.1, "norm")])
def test_a_spike_is_trouble_once_the_window_is_full_and_does_not_enter_it(tmp_path, loss, norm, word):
    made = guard(tmp_path, spike_factor=3.0, spike_window=3)
    assert not look(made, 1.0) and not look(made, 9.0, 9.0) and not look(made, 1.0)
    trouble = look(made, loss, norm)
    assert trouble and trouble.error is SpikeError and word in trouble.text
    assert list(made.memory.losses) == [1.0, 9.0, 1.0] and not look(made, 2.9, 2.9)


def test_steps_are_left_out_up_to_a_number(tmp_path):
    made = guard(tmp_path, nan_policy="skip", max_skipped_steps=2)
    for step in (4, 9):
        answer(made, look(made, torch.nan), step)
    with pytest.raises(NonFiniteError, match=r"step 11: .*on rank 0: a; samples k3, k5.*max_skipped_steps=2"):
        answer(made, look(made, torch.nan), 11)
    assert made.memory.skipped == [[4, 5], [9, 10], [11, 12]]
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert rows[0]["samples"] == [
        {"rank": 0, "id": 3, "key": "k3", "shard": "t"},
        {"rank": 0, "id": 5, "key": "k5", "shard": "t"},
    ]


def test_a_rewind_takes_back_the_window_and_remembers_the_range(tmp_path):
    stored = {"cursor": 3, "guard": {"losses": [1.0], "norms": [1.0]}}
    made = guard(
        tmp_path, rewind=lambda: stored, spike_factor=2.0, spike_window=2, spike_policy="rewind", max_rewinds=1
    )
    assert not look(made, 1.0) and not look(made, 1.0)
    answer(made, look(made, 7.0), 6)
    assert made.memory.skipped == [[3, 7]] and list(made.memory.losses) == [1.0] and made.has_rewound
    look(made, 1.0)
    with pytest.raises(SpikeError, match="max_rewinds=1 are used up"):
        answer(made, look(made, 7.0), 9)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path):
    made = guard(tmp_path, nan_policy="rewind")
    with pytest.raises(NonFiniteError, match="no checkpoint to go back to yet"):
        answer(made, look(made, torch.nan), 1)


def test_the_memory_survives_json_bit_for_bit(tmp_path):
    made, other = (guard(tmp_path, spike_factor=9.0, spike_window=3) for _ in range(2))
    for loss in (0.1, 1 / 3):
        look(made, loss, loss)
    made.skip(5)
    other.memory.load(json.loads(json.dumps(made.memory.to_json())))
    assert other.memory.to_json() == made.memory.to_json() and other.memory.losses.maxlen == 3


def test_a_weight_that_is_not_finite_enters_no_checkpoint():
    module = torch.nn.Linear(2, 3)
    refuse_non_finite(module.state_dict(), 5)
    module.bias.data[1] = torch.inf
    with pytest.raises(NonFiniteError, match="step 5: bias is not finite"):
        refuse_non_finite(module.state_dict(), 5)


def test_fp16_lowers_a_scale_that_was_too_high_and_stops_at_its_floor():
    fine, lost, norm = {"a": torch.tensor(1.0)}, {"a": torch.tensor(torch.nan)}, torch.tensor(torch.inf)
    module, update = SimpleNamespace(cursor=4), SimpleNamespace(scale=LossScale(start=2.0, floor=1.0))
    assert not Pretraining.scale_fell(module, update, norm, lost)  # no scale is to blame
    assert Pretraining.scale_fell(module, update, norm, fine) and update.scale.value == 1.0
    with pytest.raises(NonFiniteError, match=r"step 4: .* the loss scale of fp16 is at its floor"):
        Pretraining.scale_fell(module, update, norm, fine)
