"""Fusion of both sides and the caption decoder; the law of ZeRO-3 for all parts.

Axes: B pairs, L words, T frames, H W cells, D width, V vocabulary.
"""

import pytest
import torch

from vlp.encoders.spacetime import Divided, Joint
from vlp.encoders.text import EmbeddingText, HuggingFaceText
from vlp.encoders.timm_video import SpaceTimeVit, TimmFrames
from vlp.fusion.cross import CrossFusion
from vlp.fusion.decoder import CaptionDecoder
from vlp.fusion.joint import JointFusion
from vlp.layers.block import blocks_of
from vlp.layers.grid import PrefixTokens
from vlp.layers.pool import AttentionPool
from vlp.types import Grid, Tokens

B, L, T, H, W, DIM, DIM_VIDEO, DIM_TEXT, V = 2, 5, 3, 2, 4, 12, 10, 14, 30
FRAMES = torch.tensor([[True, True, False], [True, False, False]])
WORDS = torch.arange(L) < torch.tensor([[5], [3]])
FUSIONS = pytest.mark.parametrize("fusion", [JointFusion, CrossFusion])


def build(fusion, **options):
    torch.manual_seed(0)
    sizes = {"dim": DIM, "video_dim": DIM_VIDEO, "text_dim": DIM_TEXT, "depth": 2, "num_heads": 3}
    return fusion(**(sizes | options)).eval()


def decoder(**options) -> CaptionDecoder:
    torch.manual_seed(0)
    return CaptionDecoder(
        vocab_size=V, dim=DIM, video_dim=DIM_VIDEO, depth=2, num_heads=3, max_length=7, pad_id=0, **options
    ).eval()


def video(hole: float | None = None, seed: int = 1, num_prefix: int = 1) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, W, DIM_VIDEO, generator=generator)
    if hole is not None:
        x = x.masked_fill(~FRAMES[:, :, None, None, None], hole)
    return Grid(x, FRAMES, torch.randn(B, num_prefix, DIM_VIDEO, generator=generator))


def text(hole: float | None = None, seed: int = 1) -> Tokens:
    x = torch.randn(B, L, DIM_TEXT, generator=torch.Generator().manual_seed(seed))
    return Tokens(x if hole is None else x.masked_fill(~WORDS[..., None], hole), WORDS)


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, V, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_prefix", [0, 1, T])
def test_joint_fusion_returns_both_sides_in_their_places(num_prefix):
    out = build(JointFusion)(video(num_prefix=num_prefix), text())
    assert out.text.x.shape == (B, L, DIM) and out.text.mask is WORDS
    assert out.video.x.shape == (B, T, H, W, DIM) and out.video.prefix.shape == (B, num_prefix, DIM)
    assert out.video.mask is FRAMES


def test_cross_fusion_returns_the_text_alone():
    out = build(CrossFusion)(video(), text())
    assert out.text.x.shape == (B, L, DIM) and out.video is None


@FUSIONS
def test_padding_of_either_side_does_not_change_real_tokens(fusion):
    model = build(fusion)
    ours, theirs = model(video(), text()), model(video(hole=9.0), text(hole=-9.0))
    torch.testing.assert_close(ours.text.x[WORDS], theirs.text.x[WORDS])
    if ours.video is not None:
        torch.testing.assert_close(ours.video.x[FRAMES], theirs.video.x[FRAMES])
        torch.testing.assert_close(ours.video.prefix, theirs.video.prefix)


@FUSIONS
def test_each_side_reaches_the_other(fusion):
    model = build(fusion)
    ours, other_video, other_text = model(video(), text()), model(video(seed=2), text()), model(video(), text(seed=2))
    assert not torch.allclose(ours.text.x, other_video.text.x, atol=1e-4)
    if ours.video is not None:
        assert not torch.allclose(ours.video.x, other_text.video.x, atol=1e-4)


@FUSIONS
@pytest.mark.parametrize("dim", [DIM, DIM_TEXT + 1])
def test_every_parameter_of_a_fusion_gets_a_gradient(fusion, dim):
    model = build(fusion, dim=dim)
    out = model(video(), text())
    (out.text.x.square() * torch.rand(dim)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@FUSIONS
def test_equal_widths_need_no_projection(fusion):
    model = build(fusion, text_dim=DIM)
    assert not list(model.text_proj.parameters()) and len(blocks_of(model)) == 2
    assert (model.dim, model.video_dim, model.text_dim) == (DIM, DIM_VIDEO, DIM)
    assert model.updates_video == (fusion is JointFusion)


@FUSIONS
def test_pair_without_anything_real_is_finite_forward_and_backward(fusion):
    model, keep = build(fusion), torch.tensor([[True], [False]])
    x, mask, prefix = video()
    out = model(Grid(x, mask & keep, prefix), Tokens(text().x, WORDS & keep))
    out.text.x.sum().backward()
    assert out.text.x.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("num_prefix", [1, T])
def test_fusion_and_decoder_that_read_the_prefix_do_not_see_the_cells(num_prefix):
    for part, words in (
        (build(CrossFusion, reads=PrefixTokens()), (text(),)),
        (decoder(reads=PrefixTokens()), (ids(), WORDS)),
    ):
        ours = video(num_prefix=num_prefix)
        other_cells, other_prefix = ours._replace(x=ours.x + 1.0), ours._replace(prefix=ours.prefix.sin())
        outs = [part(grid, *words) for grid in (ours, other_cells, other_prefix)]
        first, same, other = (out if isinstance(out, torch.Tensor) else out.text.x for out in outs)
        assert torch.equal(first, same) and not torch.allclose(first, other, atol=1e-4)


def test_prefix_of_a_video_without_class_tokens_names_the_other_choice():
    with pytest.raises(ValueError, match="AllTokens"):
        decoder(reads=PrefixTokens())(video(num_prefix=0), ids(), WORDS)


def test_text_without_a_video_ignores_what_the_video_holds():
    model, nothing = build(CrossFusion), torch.zeros_like(FRAMES)
    ours, theirs = (model(video(seed=s)._replace(mask=nothing), text()) for s in (1, 2))
    torch.testing.assert_close(ours.text.x, theirs.text.x)


def test_modalities_are_told_apart():
    model = build(JointFusion, video_dim=DIM, text_dim=DIM)
    same = torch.ones(B, 1, DIM)
    everything = torch.ones(B, 1, dtype=torch.bool)
    out = model(Grid(same[:, None, None], everything, same[:, :0]), Tokens(same, everything))
    assert not torch.allclose(out.text.x[:, 0], out.video.x[:, 0, 0, 0], atol=1e-4)


def test_decoder_gives_logits_that_do_not_look_ahead():
    model, words = decoder(), ids()
    changed = torch.cat([words[:, :3], ids(seed=2)[:, 3:]], dim=1)
    everything = torch.ones_like(WORDS)
    ours, theirs = model(video(), words, everything), model(video(), changed, everything)
    assert ours.shape == (B, L, V)
    torch.testing.assert_close(ours[:, :3], theirs[:, :3])
    assert not torch.allclose(ours[:, 3:], theirs[:, 3:])


def test_decoder_on_a_prefix_equals_the_first_places_of_the_whole():
    model, words = decoder(), ids()
    whole, prefix = model(video(), words, WORDS), model(video(), words[:, :2], WORDS[:, :2])
    torch.testing.assert_close(whole[:, :2], prefix)


def test_decoder_reads_the_real_frames_only():
    model, words = decoder(), ids()
    torch.testing.assert_close(model(video(), words, WORDS), model(video(hole=9.0), words, WORDS))
    assert not torch.allclose(model(video(), words, WORDS), model(video(seed=2), words, WORDS), atol=1e-4)


def test_decoder_padding_does_not_change_real_places():
    model, words = decoder(), ids()
    other = torch.where(WORDS, words, 7)
    torch.testing.assert_close(model(video(), words, WORDS)[WORDS], model(video(), other, WORDS)[WORDS])


def test_decoder_ties_its_head_to_the_embedding_and_trains_everything():
    model = decoder()
    assert model.head.weight is model.words.weight and model.video_dim == DIM_VIDEO
    model(video(), ids(), WORDS).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_decoder_learns_to_write_the_caption():
    model, words, everything = decoder().train(), ids(), torch.ones_like(WORDS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(video(), words, everything)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(video(), words, everything)[:, :-1].argmax(-1), words[:, 1:])


@pytest.mark.parametrize("make", [lambda: build(JointFusion), lambda: build(CrossFusion), decoder])
def test_fusions_build_on_the_meta_device(make):
    with torch.device("meta"):
        assert all(p.is_meta for p in make().parameters())


def test_fusions_run_in_bfloat16_autocast_in_training():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for fusion in (JointFusion, CrossFusion):
            assert build(fusion, dropout=0.1, drop_path=0.1).train()(video(), text()).text.x.isfinite().all()
        assert decoder(dropout=0.1).train()(video(), ids(), WORDS).isfinite().all()


SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
VIT = {
    "name": "vit_tiny_patch16_224",
    "num_frames": 4,
    "size": 32,
    "overrides": {"embed_dim": 12, "depth": 2, "num_heads": 3},
}
PIXELS = torch.randn(B, T, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PARTS = {
    "joint_vit": (lambda: SpaceTimeVit(time=Joint(), **VIT), (PIXELS, FRAMES)),
    "divided_vit": (lambda: SpaceTimeVit(time=Divided(), tubelet_size=2, **VIT), (PIXELS, FRAMES)),
    "frames": (lambda: TimmFrames(space_positions=True, **VIT), (PIXELS, FRAMES)),
    "bert": (
        lambda: HuggingFaceText(config={"model_type": "bert", **SIZES}, vocab_size=V, pad_id=0, max_length=L),
        (ids(), WORDS),
    ),
    "embedding": (lambda: EmbeddingText(vocab_size=V, dim=DIM, max_length=L, pad_id=0), (ids(), WORDS)),
    "joint": (lambda: build(JointFusion), (video(), text())),
    "cross": (lambda: build(CrossFusion), (video(), text())),
    "decoder": (decoder, (video(), ids(), WORDS)),
    "pool": (lambda: AttentionPool(dim=DIM_VIDEO, num_heads=2), (video(),)),
}


def leave_parameters_empty_outside_their_owners_forward(module: torch.nn.Module) -> None:
    """What ZeRO-3 does: a parameter has its values only while the module that holds it runs."""
    values = {p: p.data.clone() for p in module.parameters()}

    def fill(part: torch.nn.Module, real: bool) -> None:
        for p in part.parameters(recurse=False):
            p.data = values[p] if real else torch.full_like(values[p], torch.nan)

    for part in module.modules():
        fill(part, False)
        part.register_forward_pre_hook(lambda part, _: fill(part, True))
        part.register_forward_hook(lambda part, *_: fill(part, False))


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_parameters_are_read_inside_their_owners_forward_only(name):
    make, inputs = PARTS[name]
    module = make().eval()
    expected = torch.utils._pytree.tree_leaves(module(*inputs))
    leave_parameters_empty_outside_their_owners_forward(module)
    for ours, theirs in zip(torch.utils._pytree.tree_leaves(module(*inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
