"""From terms to one loss: the same loss and gradients however clips are spread over ranks and micro-batches."""

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

from vlp import views
from vlp.layers.temperature import Temperature
from vlp.objectives.captioning import Captioning
from vlp.objectives.combine import combine, global_counts
from vlp.objectives.contrastive import Contrastive
from vlp.objectives.masked_visual import MaskedVisual
from vlp.objectives.masked_words import MaskedWords
from vlp.objectives.matching import Matching
from vlp.types import IGNORE_INDEX, Grid, Term, Tokens

CLIPS, LENGTH, DIM, VOCAB = 6, 3, 5, 7
WEIGHTS = {"contrastive": 1.0, "matching": 0.5, "words": 2.0, "visual": 0.7, "captions": 0.3}


class Corner(nn.Module):
    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        return frames[..., 0].long() % VOCAB


class System(nn.Module):
    """One linear layer a side, all five objectives, hard negatives; forward gives the loss to differentiate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video, self.text = nn.Linear(4, DIM), nn.Linear(4, DIM)
        self.temperature = Temperature(init=0.2)
        self.contrastive, self.matching = Contrastive(), Matching(dim=DIM)
        self.words, self.captions = MaskedWords(dim=DIM, vocab_size=VOCAB), Captioning()
        self.visual = MaskedVisual(dim=DIM, num_codes=VOCAB, tokenizer=Corner())
        self.writer = nn.Linear(DIM, VOCAB)

    def terms(self, data: dict[str, Tensor]) -> dict[str, Term]:
        cells, mask = self.video(data["cells"]), data["text_mask"]  # [B, 1, 2, 3, D]
        text = Tokens(self.text(data["words"]), mask)  # [B, L, D]
        first, second = (F.normalize(x, dim=1) for x in (cells.mean((1, 2, 3)), text.x[:, 0]))
        valid, scale = data["valid"], self.temperature()
        other, found = views.WrongText()(text, first, second, scale, valid, data["key"])
        # As a fusion would do: every token sees its clip.
        joint, wrong = (Tokens(each.x * cells.mean((1, 2, 3))[:, None], mask) for each in (text, other))
        frames = data["frames"]
        return {
            "contrastive": self.contrastive(first, second, scale, valid),
            "matching": self.matching(joint, [wrong], [found], valid),
            "words": self.words(joint, data["labels"]),
            "visual": self.visual(Grid(cells, valid[:, None], cells[:, 0, 0, :0]), data["hidden"], frames, mask, valid),
            "captions": self.captions(self.writer(text.x), data["ids"], mask, valid),
        }

    def forward(self, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(data)
        combined = combine(terms, WEIGHTS, global_counts({name: term.count for name, term in terms.items()}))
        return combined.loss, combined.means


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    valid = torch.tensor([True, True, False, True, False, False])  # two clips on one rank, one on the other
    keep = torch.rand(CLIPS, LENGTH, generator=generator) < 0.9
    ids = torch.randint(VOCAB, (CLIPS, LENGTH), generator=generator)
    return {
        "cells": torch.randn(CLIPS, 1, 2, 3, 4, generator=generator),
        "words": torch.randn(CLIPS, LENGTH, 4, generator=generator),
        "text_mask": torch.arange(LENGTH) < torch.tensor([3, 2, 3, 3, 1, 2])[:, None],
        "ids": ids,
        "labels": ids.masked_fill(~keep | ~valid[:, None], IGNORE_INDEX),
        "hidden": torch.rand(CLIPS, 1, 2, 3, generator=generator) < torch.linspace(0.9, 0.3, CLIPS).view(-1, 1, 1, 1),
        "frames": torch.randint(256, (CLIPS, 1, 2, 3, 3), generator=generator).byte(),
        "valid": valid,
        "key": torch.arange(CLIPS) * 31 + 7,
    }


def part(rank: int, num_ranks: int) -> dict[str, Tensor]:
    size = CLIPS // num_ranks
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch().items()}


def work(rank: int, num_ranks: int) -> dict[str, Tensor]:
    system: nn.Module = System()
    if num_ranks > 1:
        system = nn.parallel.DistributedDataParallel(system)
    loss, means = system(part(rank, num_ranks))
    loss.backward()
    local = Contrastive(local_negatives=True)(*local_inputs(rank, num_ranks)).total
    grads = {name.removeprefix("module."): p.grad for name, p in system.named_parameters()}
    return {**{f"mean {name}": mean for name, mean in means.items()}, **grads, "local": local}


def local_inputs(rank: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = part(rank, num_ranks)
    video, text = (F.normalize(x, dim=1) for x in (data["words"][:, 0], data["words"][:, 1]))
    return video, text, torch.tensor(3.0), data["valid"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return work(0, 1), on_ranks(work, 2, tmp_path_factory.mktemp("ranks"))


def test_two_processes_train_as_one_does_on_the_whole_batch(both):
    one, two = both
    names = [name for name in one if not name.startswith("mean") and name != "local"]
    assert len(names) == len(list(System().parameters()))
    for name in names:
        assert (two[0][name] - one[name]).abs().max() < 1e-6, name


def test_shares_of_the_means_add_up_over_the_ranks(both):
    one, two = both
    for name in WEIGHTS:
        torch.testing.assert_close(sum(result[f"mean {name}"] for result in two), one[f"mean {name}"])


def test_local_negatives_come_from_the_own_rank(both):
    for rank, result in enumerate(both[1]):
        torch.testing.assert_close(result["local"], Contrastive()(*local_inputs(rank, 2)).total)


def test_ranks_with_other_counts_are_tested_at_all():
    labels, hidden = batch()["labels"] != IGNORE_INDEX, batch()["hidden"] & batch()["valid"][:, None, None, None]
    counts = [(int(x[:3].sum()), int(x[3:].sum())) for x in (labels, hidden, batch()["valid"])]
    assert all(first != second and second > 0 for first, second in counts), counts


def test_micro_batches_add_up_to_the_whole_batch():
    words, labels = MaskedWords(dim=DIM, vocab_size=VOCAB), batch()["labels"]
    tokens, counts = torch.randn(CLIPS, LENGTH, DIM), {"words": words.count(labels).float()}
    parts = [slice(None), slice(0, 2), slice(2, 6)]
    terms = [words(Tokens(tokens[part], labels[part] > 0), labels[part]) for part in parts]
    losses = [combine({"words": term}, {"words": 3.0}, counts).loss for term in terms]
    torch.testing.assert_close(losses[1] + losses[2], losses[0])
    torch.testing.assert_close(losses[0], 3 * terms[0].total / int((labels >= 0).sum()))


def term(total: float, count: int) -> Term:
    return Term(torch.tensor(total, requires_grad=True), torch.tensor(count))


def test_loss_is_the_weighted_sum_of_the_means_and_means_are_unweighted():
    terms = {"a": term(6.0, 2), "b": term(5.0, 1)}
    loss, means = combine(terms, {"a": 0.5, "b": 2.0}, {"a": torch.tensor(4.0), "b": torch.tensor(10.0)})
    assert loss.item() == 0.5 * 6 / 4 + 2 * 5 / 10 and {n: m.item() for n, m in means.items()} == {"a": 1.5, "b": 0.5}
    loss.backward()
    assert terms["a"].total.grad.item() == 0.5 / 4 and not means["a"].requires_grad


def test_an_objective_without_items_adds_zero():
    loss, _ = combine({"a": term(0.0, 0)}, {"a": 1.0}, {"a": torch.tensor(0.0)})
    assert loss.item() == 0 and torch.isfinite(loss)


def test_global_counts_are_those_of_the_only_process():
    assert not torch_dist.is_initialized()
    counts = global_counts({"a": torch.tensor(3), "b": torch.tensor(0)})
    assert {name: count.item() for name, count in counts.items()} == {"a": 3, "b": 0}
