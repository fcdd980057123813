"""Published systems at full size, on the meta device: their parameters are those of the papers or of their code."""

import re

import pytest
import torch

from vlp import config, sweep
from vlp.training import sweep_run
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


def test_e_vilm_is_as_compact_as_its_abstract_says():
    """15 % of VIOLET, the tokenizer aside, which is a target and not trained."""
    system = build("e_vilm")
    trained = millions(system) - sum(p.numel() for p in system.objectives["masked_visual"].tokenizer.parameters()) / 1e6
    assert trained == pytest.approx(0.15 * 197.58, rel=0.1)


def test_the_codes_lie_on_the_cells_that_e_vilm_hides():
    tokenizer, compact = build("e_vilm_tokenizer").model.video_encoder, build("e_vilm").model.video_encoder
    assert tokenizer.patch_size == compact.patch_size and tokenizer.tubelet_size == compact.tubelet_size


SWEEP = config.CONF.parent / "scripts" / "bench" / "systems.yaml"


@pytest.mark.slow
def test_every_row_of_the_learning_table_still_composes(tmp_path):
    asked = sweep.parse([f"sweep={SWEEP}", f"paths.runs={tmp_path}", "sweep.only=seed=0"])
    asked = asked._replace(cells=tuple(cell for cell in asked.cells if cell.seed == "0"))
    assert len(sweep_run.check(asked, "").jobs) == len(asked.cells)
    page = (config.CONF.parent / "docs" / "systems.md").read_text(encoding="utf-8")
    table = page.partition("## What they learn")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([\w-]+)`", table, flags=re.MULTILINE))
    assert named and named <= {cell.group for cell in asked.cells}
