"""Properties of published systems that no test of a single part shows; docs/systems.md lists them all."""

import pytest
import torch
from torch import nn

from vlp import config, views
from vlp.objectives.masked_visual import MaskedVisual
from vlp.planning.system import build
from vlp.types import AttentionMass, Grid

NO_WEIGHTS = "objective.masked_visual.tokenizer.path=null"


def num_tokens(model: nn.Module, num_frames: int) -> int:
    with torch.no_grad():
        grid = model.connectors(model.video_encoder(torch.empty(1, num_frames, 3, 224, 224, device="meta"), None, None))
    return grid.prefix.shape[1] + grid.x.shape[1:4].numel()


@pytest.mark.filterwarnings("ignore:DiscreteVae without weights")
def test_one_more_frame_gives_violet_fifty_more_tokens():
    model = build(config.load(["+experiment=violet", NO_WEIGHTS])).system.model.eval()
    assert [num_tokens(model, count) for count in (3, 4)] == [150, 200]


@pytest.mark.parametrize("attended_share", [0.0, 1.0])
def test_masked_codes_are_as_many_as_blackened_cells(attended_share):
    draw = torch.Generator().manual_seed(0)
    key, frame_mask = torch.tensor([5, 6, 7]), torch.tensor([[True, True], [True, True], [True, False]])
    words = views.MaskWords(prob=0.15, mask_id=4, vocab_size=90, mask_share=1.0, random_share=0.0)
    patches = views.MaskPatches(pattern=views.Blocks(ratio=0.3), patch_size=4)
    view = views.MaskBoth(words=words, patches=patches, attended_share=attended_share, prob=0.3)
    mass = AttentionMass(
        torch.rand(3, 5, generator=draw),
        Grid(torch.rand(3, 2, 3, 4, 1, generator=draw), frame_mask, torch.zeros(3, 0, 1)),
    )
    ids, valid = torch.arange(15).view(3, 5) + 5, torch.ones(3).bool()
    frames = torch.full((3, 2, 12, 16, 3), 9, dtype=torch.uint8)
    _, labels, black, hidden = view(ids, torch.arange(5).expand(3, 5), frames, frame_mask, mass, valid, key)
    cells = (black.view(3, 2, 3, 4, 4, 4, 3).transpose(3, 4) == 0).all(-1).all(-1).all(-1)
    objective = MaskedVisual(dim=3, num_codes=7, tokenizer=nn.Identity())
    assert int(objective.count(hidden, valid)) == int(cells.sum()) == int((black == 0).sum()) // (4 * 4 * 3) > 0
    assert (labels >= 0).any()
