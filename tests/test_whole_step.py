"""Objectives over all micro-batches of a step: gradients as from one pass, on one rank and on several."""

import os
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

from vlp import config
from vlp.forward import ForwardPass, Graph, quantity
from vlp.layers.temperature import Temperature
from vlp.objectives.contrastive import Contrastive
from vlp.training.assemble import assemble
from vlp.training.callbacks import Rehearsal
from vlp.training.launch import quiet, recipe_of
from vlp.training.module import Pretraining
from vlp.training.strategy import Ddp
from vlp.training.whole_step import WholeStep
from vlp.types import Batch, nothing_more

CLIPS, LENGTH = 8, 5
TINY = (
    *("+scale=tiny", "clip.size=16", "clip.short_side=16", "clip.num_frames=3", "video.overrides.depth=1"),
    *("text.config.num_hidden_layers=1", "text.config.hidden_dropout_prob=0.0", "fusion.depth=1"),
    "objective=[contrastive,masked_words,temporal_order]",
)


class Fields(NamedTuple):
    x: Tensor
    y: Tensor
    valid: Tensor


class Towers(nn.Module):
    """Two linear towers with dropout, and running statistics on one side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.norm, self.right = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(4, 6)
        self.temperature = Temperature(init=0.2)

    @quantity
    def video(self, x: Tensor) -> Tensor:
        return F.normalize(F.dropout(self.norm(self.left(x)), 0.4), dim=1)

    @quantity
    def text(self, y: Tensor) -> Tensor:
        return F.normalize(F.dropout(self.right(y), 0.4), dim=1)

    @quantity
    def scale(self) -> Tensor:
        return self.temperature()


WIRING = {"video": "video", "text": "text", "scale": "scale", "valid": "valid"}


def micro_batches() -> list[Fields]:
    torch.manual_seed(1)
    return [Fields(torch.randn(4, 4), torch.randn(4, 4), torch.arange(4) < number + 2) for number in range(3)]


def cached(spans: bool = True) -> Towers:
    """The gradient after two passes; without `spans`, that of the objective on each micro-batch."""
    towers, objective = Towers(), Contrastive(whole_step=spans)
    graph = Graph(towers, fields=Fields._fields, views={})
    passes = [ForwardPass(towers, fields, graph) for fields in micro_batches()]
    whole = WholeStep({"it": objective}, {"it": WIRING})
    whole.prepare(passes, torch.manual_seed)
    for number, forward in enumerate(passes):
        torch.manual_seed(number)
        terms = whole.terms(number, forward) or {"it": objective(*forward.roles(WIRING))}
        terms["it"].total.backward()
    return towers


def in_one_graph() -> Towers:
    """The same by keeping the activations of all micro-batches."""
    towers, taken = Towers(), []
    graph = Graph(towers, fields=Fields._fields, views={})
    for number, fields in enumerate(micro_batches()):
        torch.manual_seed(number)
        taken.append(ForwardPass(towers, fields, graph).roles(WIRING))
    video, text, scale, valid = zip(*taken, strict=True)
    Contrastive()(torch.cat(video), torch.cat(text), scale[-1], torch.cat(valid)).total.backward()
    return towers


def test_two_passes_give_the_gradient_of_one_graph_with_dropout_and_running_statistics():
    two, one = cached(), in_one_graph()
    for (name, a), b in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(two.buffers(), one.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_micro_batches_by_themselves_give_another_gradient():
    assert not torch.allclose(cached(spans=False).left.weight.grad, in_one_graph().left.weight.grad, rtol=0.1)


def test_one_micro_batch_takes_one_pass():
    whole = WholeStep({"it": Contrastive()}, {"it": WIRING})
    towers = Towers()
    passes = [ForwardPass(towers, micro_batches()[0], Graph(towers, fields=Fields._fields, views={}))]
    whole.prepare(passes, torch.manual_seed)
    assert whole.terms(0, passes[0]) == {} and not passes[0].values


class StepBatch(NamedTuple):
    batches: tuple[Batch, ...]
    step: int = 0
    source: int = 0
    decode_s: float = 0.0


class Once:
    """A loader of one step."""

    def __init__(self, step: StepBatch) -> None:
        self.step = step

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        return iter([self.step])


def batch(cfg) -> Batch:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(256, (CLIPS, cfg.clip.num_frames, 16, 16, 3), generator=generator).byte()
    ids = torch.randint(5, 90, (CLIPS, LENGTH), generator=generator)
    whole = torch.ones(CLIPS, dtype=torch.bool)
    mask, words = torch.ones(CLIPS, LENGTH, dtype=torch.bool), torch.arange(LENGTH).expand(CLIPS, LENGTH)
    numbers = torch.arange(CLIPS)
    real, times = torch.ones(frames.shape[:2], dtype=torch.bool), torch.zeros(frames.shape[:2])
    other = nothing_more(CLIPS).values()
    valid = whole.index_fill(0, torch.tensor([2]), False)
    return Batch(frames, real, times, ids, mask, words, *other, valid, *[numbers] * 3)


def gradients(num_micro: int, rank: int, num_ranks: int, *more: str) -> dict[str, Tensor]:
    """One real step of this rank's share: the gradient before clipping, and the means."""
    quiet()
    cfg = config.load([*TINY, *more])
    torch.manual_seed(0)
    system = assemble(cfg)
    size = CLIPS // (num_ranks * num_micro)
    starts = [(micro * num_ranks + rank) * size for micro in range(num_micro)]
    step = StepBatch(tuple(Batch(*(field[s : s + size] for field in batch(cfg))) for s in starts))
    module = Noted(system, recipe=recipe_of(cfg), loader=lambda start: Once(step))
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    strategy = Ddp() if num_ranks > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        max_epochs=1,
        callbacks=[Rehearsal()],
        **dict.fromkeys(off, False),
    )
    trainer.fit(module)
    return module.noted


class Noted(Pretraining):
    def move(self, update, norm, means, batch):
        self.noted = {name: parameter.grad.clone() for name, parameter in update.trained.items()}
        super().move(update, norm, means, batch)

    def note(self, batch, means, *rest):
        self.noted |= {f"mean {name}": mean for name, mean in means.items()}
        super().note(batch, means, *rest)


def work(rank: int, num_ranks: int) -> dict[str, Tensor]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}  # the group exists
    return gradients(2, rank, num_ranks)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return gradients(1, 0, 1)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_micro", [2, 4])
def test_accumulated_step_has_the_gradient_of_the_whole_batch(whole, num_micro):
    assert_same(gradients(num_micro, 0, 1), whole)


def test_switched_off_negatives_come_from_the_micro_batch(whole):
    found = gradients(2, 0, 1, "objective.contrastive.whole_step=false")
    assert found["mean contrastive"] < whole["mean contrastive"] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_with_micro_batches_have_the_gradient_of_the_whole_batch(whole, num_ranks, tmp_path):
    results = on_ranks(work, num_ranks, tmp_path)
    means = {n: sum(result[n] for result in results) for n in whole if n.startswith("mean")}
    for result in results:
        assert_same(result | means, whole)
