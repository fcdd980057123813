"""Published systems at full size, on the meta device: their parameters are those of the papers or of their code."""

import pytest
import torch

from vlp import config
from vlp.training.assemble import System, assemble

NO_WEIGHTS = "objective.masked_visual.tokenizer.path=null"  # the tokenizer's weights are a file of the user's


def build(*overrides: str) -> System:
    with torch.device("meta"):
        return assemble(config.load([f"+experiment={overrides[0]}", *overrides[1:]]))


def millions(system: System, *left_out: str) -> float:
    parts = [part for name, part in system.objectives.items() if name not in left_out]
    return sum(p.numel() for part in (system.model, *parts) for p in part.parameters()) / 1e6


@pytest.mark.filterwarnings("ignore:DiscreteVae without weights")
def test_violet_has_its_published_size():
    """49.51 video, 23.84 embeddings, 85.05 fusion, 24.06 words, 13.77 codes, 1.18 matching, 0.16 tokens of frames."""
    system = build("violet", NO_WEIGHTS)
    tokenizer = sum(p.numel() for p in system.objectives["masked_visual"].tokenizer.parameters()) / 1e6
    assert millions(system) - tokenizer == pytest.approx(197.58, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "published", "left_out"),
    [
        ("frozen_in_time", 180.93, ()),
        ("all_in_one", 109.28, ("matching", "masked_words")),
        ("clip", 151.277, ()),
        ("vidla", 149.62 + 28.4, ()),  # CLIP ViT-B/16 and attention over time of its own norm and projections
        ("languagebind", 427.62 + 101.007, ()),  # CLIP ViT-L/14 and what is new over time
    ],
)
def test_systems_have_their_published_size(name, published, left_out):
    assert millions(build(name), *left_out) == pytest.approx(published, rel=1e-3)
