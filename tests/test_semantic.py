"""A tokenizer that one run learns is the target of another. Axes: B clips, T frames, H W pixels, h w cells."""

import torch
from eval_toys import make_data
from safetensors.torch import save_file
from torch import nn

from vlp.encoders.codebook import k_means
from vlp.encoders.semantic import SemanticCodes
from vlp.encoders.swin3d import SwinVideo
from vlp.eval.code_usage import CodeUsage
from vlp.layers.pixels import normalised
from vlp.layers.pool import ClsPool, MeanPool
from vlp.models.tokenizer import SemanticTokenizer
from vlp.objectives.masked_visual import MaskedVisual
from vlp.training import init
from vlp.types import Tokens

B, T, SIZE, CODES, DIM = 2, 3, 32, 6, 16
MASK = torch.ones(B, T, dtype=torch.bool)


class Words(nn.Module):
    dim = 5

    def forward(self, ids, mask):
        return Tokens(torch.zeros(*ids.shape, 5), mask)


def encoder(drop_path=0.0):
    return SwinVideo(size=SIZE, width=8, depths=[1, 1], heads=[1, 2], window=[2, 2, 2], drop_path=drop_path)


def clips(seed):
    return torch.randint(256, (B, T, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed)).byte()


def family():
    torch.manual_seed(0)
    pools = {"video_pool": MeanPool(dim=DIM), "text_pool": ClsPool(dim=5)}
    parts = {"video": encoder(), "text": Words(), "temperature": nn.Identity(), **pools}
    return SemanticTokenizer(**parts, num_codes=CODES, code_dim=4, embed_dim=7)


def target(**options):
    return SemanticCodes(encoder=encoder(**options), num_codes=CODES, code_dim=4)


def test_a_target_takes_the_tokenizer_of_another_run_by_name(tmp_path):
    learnt, waiting = family(), nn.ModuleDict({"objectives": nn.ModuleDict({"tokenizer": target()})})
    learnt.fit([clips(1), clips(2)], seed=0)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in learnt.state_dict().items()}
    save_file(tensors, tmp_path / "learnt.safetensors")
    report = init.start_from(waiting, tmp_path / "learnt.safetensors", rename={"model.": "objectives.tokenizer."})
    assert not report.missing
    read = waiting["objectives"]["tokenizer"].eval()(clips(3), MASK)
    learnt.eval()
    expected = learnt.codes(learnt.quantized(learnt.encoded(learnt.pixels(clips(3)), MASK)))
    assert torch.equal(read, expected) and read.shape == (B, T, 4, 4)


def test_fitting_puts_the_codes_where_the_cells_are():
    codes = target().eval()
    cells = codes.video_encoder(normalised(clips(1), codes.pixel_affine), MASK, None).x
    before = codes.quantizer(cells)
    codes.fit([clips(1)], seed=0)
    after = codes.quantizer(cells)
    assert codes.quantizer.down(cells).flatten(0, 3).mean(0).abs().max() < 1e-5  # around zero, in all directions
    far = [float((one.near - one.chosen).detach().square().sum()) for one in (before, after)]
    assert bool(codes.fitted) and far[1] < far[0] and len(codes(clips(1), MASK).unique()) > CODES // 2


def test_targets_do_not_change_from_step_to_step():
    objective = MaskedVisual(dim=3, num_codes=CODES, tokenizer=target(drop_path=0.9)).train()
    assert objective.training and not any(part.training for part in objective.tokenizer.modules())
    assert torch.equal(objective.tokenizer(clips(0), MASK), objective.tokenizer(clips(0), MASK))


def test_k_means_of_equal_groups_finds_them():
    vectors = torch.eye(3).repeat(4, 1)
    assert len(k_means(vectors, 3, 5, torch.Generator().manual_seed(0)).unique(dim=0)) == 3


class Coded:
    """A pass that knows its codes."""

    def __init__(self, codes, mask):
        self.values = {"codes": codes, "encoded_mask": mask}

    def take(self, name):
        return self.values[name]


def test_usage_counts_real_cells_of_real_clips():
    (batch, *_) = make_data([{"captions": ["red"]}] * 3, unusable=(1,)).batches()
    codes = torch.tensor([[0, 1, 5], [2, 2, 2], [0, 1, 5]])[..., None, None]  # [3, T, 1, 1]
    task = CodeUsage(num_codes=8)
    task.begin(None, scorers={})  # type: ignore[arg-type]
    task.update(batch, Coded(codes, torch.tensor([[True, True, False]] * 3)))  # type: ignore[arg-type]
    raw = {row["key"]: row["raw"] for row in task.finish()["rows"]}
    assert raw["codes_used"] == 25 and abs(raw["codes_perplexity"] - 2) < 1e-6
