"""A ViT frame by frame with exchange over time. Axes: B clips, T frames, h w patches, D width."""

import pytest
import torch
from torch import nn

from vlp.encoders.frame_vit import FrameVit, NoExchange, TokenOverTime
from vlp.layers.pool import ClsPool

B, T, SIZE, PATCH, DIM = 2, 3, 32, 8, 24
VIT = {"embed_dim": DIM, "depth": 2, "num_heads": 3, "patch_size": PATCH}
MASK = torch.tensor([[True, True, False], [True, False, False]])


def build(time, **options) -> FrameVit:
    torch.manual_seed(0)
    overrides = VIT | options.pop("overrides", {})
    name = options.pop("name", "vit_tiny_patch16_224")
    return FrameVit(name=name, num_frames=4, size=SIZE, time=time, overrides=overrides, **options).eval()


def clips(num_frames: int = T) -> torch.Tensor:
    return torch.randn(B, num_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def silence_time(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "temporal_positions" in name or "temporal_attn.proj" in name:
            nn.init.zeros_(parameter)


def test_without_exchange_frames_are_alone():
    model, frames = build(NoExchange()), clips()
    out = model(frames)
    assert out.x.shape == (B, T, 4, 4, DIM) and out.prefix.shape == (B, T, DIM)
    torch.testing.assert_close(model(frames[:, 1:2]).prefix[:, 0], out.prefix[:, 1])


def test_silenced_time_equals_the_mean_of_frames():
    temporal, frames = build(TokenOverTime()), clips()
    silence_time(temporal)
    own = {k: v for k, v in temporal.state_dict().items() if "temporal" not in k}
    alone = build(NoExchange())
    alone.load_state_dict(own)
    clip = ClsPool(dim=DIM)(temporal(frames))
    torch.testing.assert_close(clip, torch.stack([alone(frames[:, [t]]).prefix[:, 0] for t in range(T)]).mean(0))


def test_time_starts_as_a_copy_of_space():
    block = build(TokenOverTime()).blocks[1]
    assert torch.equal(block.temporal_attn.qkv.weight, block.block.attn.qkv.weight)
    assert torch.equal(block.temporal_norm.weight, block.block.norm1.weight)
    assert block.temporal_norm.eps == block.block.norm1.eps
    fresh = build(TokenOverTime(copy_attention=False)).blocks[1]
    assert not fresh.temporal_attn.proj.weight.any() and fresh.temporal_attn.qkv.weight.any()


def test_attention_over_one_frame_still_changes_it():
    frames, temporal = clips(1), build(TokenOverTime())
    alone = build(NoExchange())
    assert not torch.allclose(temporal(frames).prefix, alone(frames).prefix, atol=1e-3)


def test_order_of_frames_matters_only_by_the_table_of_times():
    model, frames = build(TokenOverTime()), clips()
    turned = [2, 0, 1]
    assert not torch.allclose(model(frames[:, turned]).x, model(frames).x[:, turned], atol=1e-4)
    for block in model.blocks:
        nn.init.zeros_(block.temporal_positions.table)
    torch.testing.assert_close(model(frames[:, turned]).x, model(frames).x[:, turned], atol=1e-5, rtol=1e-4)


def test_unreal_frames_are_not_seen():
    model, frames = build(TokenOverTime()), clips()
    other = torch.where(MASK[:, :, None, None, None], frames, 7.0)
    out, changed = model(frames, MASK), model(other, MASK)
    torch.testing.assert_close(out.prefix[MASK], changed.prefix[MASK])
    assert out.mask.equal(MASK)


def test_dropped_patches_are_the_same_in_all_frames_and_only_in_training():
    model, frames = build(TokenOverTime(), patch_drop=0.5), clips()
    assert model(frames).x.ne(0).any(-1).all()
    there = model.train()(frames).x.ne(0).any(-1)  # [B, T, 4, 4]
    assert there.flatten(2).sum(-1).unique().tolist() == [8]
    assert (there == there[:, :1]).all() and not torch.equal(there[0], there[1])


def test_kept_patches_stay_at_their_places():
    model, frames = build(NoExchange(), patch_drop=0.25).train(), clips()
    seen = model(frames)
    there = seen.x.ne(0).any(-1)
    pixels = there.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)[:, :, None]
    model._kept = lambda *_: there[:, 0].flatten(1).nonzero()[:, 1].view(B, -1)
    torch.testing.assert_close(model(frames.masked_fill(~pixels, 5.0)).x, seen.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_drop": 1.0}, "patch_drop=1.0 is not a share"),
        ({"overrides": {"class_token": False}}, "needs; use TimmFrames"),
        ({"overrides": {"reg_tokens": 2}}, "needs; use TimmFrames"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(NoExchange(), **options)


def test_temporal_parts_of_the_large_model_have_the_published_size():
    options = {"name": "vit_large_patch14_clip_quickgelu_224", "num_frames": 8, "size": 224}
    with torch.device("meta"):
        model = FrameVit(**options, time=TokenOverTime(copy_attention=False))
    temporal = sum(p.numel() for name, p in model.named_parameters() if "temporal" in name)
    assert temporal == pytest.approx(101.007e6, rel=1e-4)
    assert sum(p.numel() for p in model.parameters()) - temporal == pytest.approx(303.18e6, rel=1e-4)
