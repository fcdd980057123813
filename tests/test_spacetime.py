"""A ViT over space and time. Axes: B clips, T frames, T' tubelets, h w patches, D width."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from vlp.encoders.spacetime import Divided, DividedWithClass, Hierarchical, Joint
from vlp.encoders.timm_video import SpaceTimeVit
from vlp.layers.block import blocks_of, checkpoint_blocks
from vlp.layers.patch import CentralFrame, FrameAverage, TubeletEmbed, fill_tubelets

B, T, SIZE, PATCH, DIM = 2, 3, 32, 8, 24
VIT = {"embed_dim": DIM, "depth": 2, "num_heads": 3, "patch_size": PATCH}
TIMES = pytest.mark.parametrize("time", [Joint(), Divided()], ids=["joint", "divided"])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def build(time, num_frames: int = 4, tubelet_size: int = 1, overrides: dict | None = None, **options) -> SpaceTimeVit:
    torch.manual_seed(0)
    return SpaceTimeVit(
        name="vit_tiny_patch16_224",
        num_frames=num_frames,
        size=SIZE,
        time=time,
        tubelet_size=tubelet_size,
        overrides=VIT | (overrides or {}),
        **options,
    ).eval()


def clips(num_frames: int = T) -> torch.Tensor:
    return torch.randn(B, num_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def image_model(model: SpaceTimeVit, **overrides) -> nn.Module:
    """timm's own image model with the same parameters."""
    arguments = VIT | {"img_size": SIZE, "num_classes": 0, "global_pool": ""} | overrides
    image = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    own = {k: v for k, v in model.state_dict().items() if "time" not in k}
    image.load_state_dict(own)
    return image


def wake_time(model: nn.Module) -> None:
    """Give the parts that start at zero other values."""
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "time" in name:
            nn.init.normal_(p, std=0.5)


@TIMES
def test_one_frame_equals_the_image_model(time):
    model, frames = build(time), clips(1)
    expected, out = image_model(model).forward_features(frames[:, 0]), model(frames)
    torch.testing.assert_close(out.x.flatten(1, 3), expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.prefix, expected[:, :1], atol=1e-5, rtol=1e-5)


def test_fresh_divided_attention_on_equal_frames_equals_the_image_model():
    model, frames = build(Divided()), clips(1).expand(-1, 4, -1, -1, -1)
    expected, out = image_model(model).forward_features(frames[:, 0]), model(frames)
    for t in range(4):
        torch.testing.assert_close(out.x[:, t].flatten(1, 2), expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.prefix, expected[:, :1], atol=1e-5, rtol=1e-5)


def test_fresh_divided_attention_without_class_token_equals_the_image_model_per_frame():
    bare = {"class_token": False}
    model, frames = build(Divided(), overrides=bare), clips()
    expected = image_model(model, **bare).forward_features(frames.flatten(0, 1))
    torch.testing.assert_close(model(frames).x.flatten(2, 3), expected.unflatten(0, (B, T)), atol=1e-5, rtol=1e-5)


def test_joint_attention_equals_the_image_model_on_the_concatenated_frames():
    model, frames = build(Joint(), overrides={"class_token": False}), clips()
    image = image_model(model, class_token=False)
    patches = (image.patch_embed(frames.flatten(0, 1)) + image.pos_embed).unflatten(0, (B, T)).flatten(1, 2)
    torch.testing.assert_close(model(frames).x.flatten(1, 3), image.norm(image.blocks(patches)), atol=1e-5, rtol=1e-5)


@TIMES
def test_order_of_frames_matters_once_time_has_been_learned(time):
    model, frames, order = build(time), clips(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(frames).prefix, model(frames[:, order]).prefix)  # at the start it does not
    wake_time(model)
    assert not torch.allclose(model(frames).prefix, model(frames[:, order]).prefix, atol=1e-3)
    assert not torch.allclose(model(frames).x[:, order], model(frames[:, order]).x, atol=1e-3)


@TIMES
def test_frames_see_each_other_once_time_has_been_learned(time):
    model, frames = build(time, overrides={"class_token": False}), clips()
    wake_time(model)
    changed = torch.cat([frames[:, :2], -frames[:, 2:]], dim=1)
    assert not torch.allclose(model(frames).x[:, 0], model(changed).x[:, 0], atol=1e-3)


@TIMES
@pytest.mark.parametrize("tubelet_size", [1, 2])
def test_masked_frames_do_not_change_anything_real(time, tubelet_size):
    model, frames = build(time, tubelet_size=tubelet_size), clips()
    wake_time(model)
    other = torch.where(MASK[..., None, None, None], frames, 5.0)
    ours, theirs = model(frames, MASK), model(other, MASK)
    assert ours.mask.tolist() == (MASK.tolist() if tubelet_size == 1 else [[True, False], [True, False]])
    torch.testing.assert_close(ours.x[ours.mask], theirs.x[theirs.mask])
    torch.testing.assert_close(ours.prefix, theirs.prefix)


@TIMES
def test_masked_frames_equal_absent_frames(time):
    model, frames = build(time), clips()
    wake_time(model)
    short, padded = model(frames[:, :2]), model(frames, torch.tensor([[True, True, False]] * B))
    torch.testing.assert_close(padded.x[:, :2], short.x)
    torch.testing.assert_close(padded.prefix, short.prefix)


@TIMES
def test_clip_without_real_frames_is_finite_forward_and_backward(time):
    model, mask = build(time), MASK & torch.tensor([[True], [False]])
    out = model(clips(), mask)
    (out.x.sum() + out.prefix.sum()).backward()
    assert out.x.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@TIMES
@pytest.mark.parametrize("tubelet_size", [1, 2])
@pytest.mark.parametrize("overrides", [{}, {"reg_tokens": 2}, {"no_embed_class": True, "pre_norm": True}])
def test_every_parameter_gets_a_gradient(time, tubelet_size, overrides):
    model = build(time, tubelet_size=tubelet_size, overrides=overrides)
    wake_time(model)
    out = model(clips(4))
    (out.x.square().sum() + out.prefix.sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())] == []


@TIMES
@pytest.mark.parametrize("tubelet_size, steps", [(1, [1, 2, 3, 4]), (2, [1, 1, 2, 2]), (3, [1, 1, 1, 2])])
def test_any_number_of_frames_up_to_the_limit_is_accepted(time, tubelet_size, steps):
    model = build(time, tubelet_size=tubelet_size)
    for num_frames, num_steps in enumerate(steps, start=1):
        out = model(clips(num_frames))
        assert model.grid(num_frames, SIZE) == (num_steps, 4, 4) == tuple(out.x.shape[1:4])
        assert out.prefix.shape == (B, 1, DIM) and out.mask.shape == (B, num_steps)


def test_tubelet_that_is_not_full_repeats_the_last_frame():
    model, frames = build(Joint(), tubelet_size=2), clips()
    torch.testing.assert_close(model(frames).x, model(torch.cat([frames, frames[:, -1:]], dim=1)).x)


def test_more_frames_than_the_limit_name_the_fix():
    with pytest.raises(ValueError, match=r"5 places.*has 4"):
        build(Joint())(clips(5))


@TIMES
def test_hidden_patches_lose_their_content_but_not_their_place(time):
    model, frames = build(time), clips()
    hidden = torch.rand(B, T, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    pixels = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)[:, :, None]
    torch.testing.assert_close(model(frames, None, hidden).x, model(frames.masked_fill(pixels, 7.0), None, hidden).x)
    everything = model(frames, None, torch.ones_like(hidden)).x[0, 0].flatten(0, 1)
    assert torch.pdist(everything).min() > 1e-3


@pytest.mark.parametrize("inflate", [CentralFrame(), FrameAverage()])
def test_inflated_tubelets_of_equal_frames_equal_the_image_model(inflate):
    model, image = build(Joint(), tubelet_size=3, inflate=inflate), build(Joint())
    frames = clips(1)
    torch.testing.assert_close(model(frames.expand(-1, 3, -1, -1, -1)).x, image(frames).x, atol=1e-5, rtol=1e-5)


def test_inflation_by_the_central_frame_reads_only_that_frame():
    weight = torch.randn(5, 3, 4, 4)
    inflated = CentralFrame()(weight, 3)
    assert torch.equal(inflated[:, :, 1], weight) and inflated[:, :, [0, 2]].abs().max() == 0
    torch.testing.assert_close(FrameAverage()(weight, 3).sum(2), weight)


def test_tubelet_embedding_equals_a_3d_convolution():
    torch.manual_seed(0)
    embed, frames = TubeletEmbed(patch_size=4, tubelet_size=2, dim=5), torch.randn(2, 6, 3, 8, 12)
    nn.init.normal_(embed.bias)
    conv = nn.functional.conv3d(frames.transpose(1, 2), embed.weight, embed.bias, stride=(2, 4, 4))
    torch.testing.assert_close(embed(frames), conv.flatten(3).permute(0, 2, 3, 1))


def test_fill_tubelets_repeats_the_last_real_frame():
    frames = torch.arange(10.0).view(2, 5, 1, 1, 1)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    filled, real = fill_tubelets(frames, mask, 2)
    assert filled.flatten(1).tolist() == [[0, 1, 1, 3, 3, 3], [6, 6, 7, 7, 7, 7]]
    assert real.tolist() == [[True, True, False], [True, True, False]]


@pytest.mark.parametrize("name, word", [("swin_tiny_patch4_window7_224", "SwinTransformer"), ("resnet10t", "ResNet")])
def test_backbones_that_are_no_vit_are_refused(name, word):
    with pytest.raises(ValueError, match=f"{word}.*TimmFrames"):
        SpaceTimeVit(name=name, num_frames=1, size=SIZE, time=Joint())


@pytest.mark.parametrize(
    "overrides, message",
    [({"block_fn": ResPostBlock, "init_values": 1e-5}, "ResPostBlock"), ({"patch_drop_rate": 0.5}, "patch_drop_rate")],
)
def test_blocks_and_options_without_meaning_over_time_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(Joint(), overrides=overrides)


@TIMES
def test_checkpointing_keeps_the_output(time):
    model, frames = build(time), clips()
    before = model(frames).x
    assert len(blocks_of(model)) == checkpoint_blocks(model) == 2
    torch.testing.assert_close(model(frames).x, before)


@TIMES
def test_space_time_vit_runs_in_bfloat16_autocast_in_training(time):
    model = build(time, drop_path=0.2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(clips(), MASK).x.isfinite().all()


def test_fresh_divided_with_class_on_one_frame_equals_the_image_model():
    model, frames = build(DividedWithClass()), clips(1)
    expected, out = image_model(model).forward_features(frames[:, 0]), model(frames)
    torch.testing.assert_close(out.x.flatten(1, 3), expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.prefix, expected[:, :1], atol=1e-5, rtol=1e-5)


def test_fresh_divided_with_class_ignores_the_order_of_frames_but_not_their_number():
    model, frames = build(DividedWithClass()), clips()
    torch.testing.assert_close(model(frames).prefix, model(frames[:, [2, 0, 1]]).prefix, atol=1e-5, rtol=1e-5)
    equal = frames[:, :1].expand(-1, 4, -1, -1, -1)  # the class token sees one class key against four of each patch
    assert not torch.allclose(model(equal).prefix, model(frames[:, :1]).prefix, atol=1e-3)


def test_divided_with_class_adds_space_to_what_the_block_was_given():
    block = build(DividedWithClass()).blocks[0]
    wake_time(block)
    x = torch.randn(B, 1 + T * 5, DIM, generator=torch.Generator().manual_seed(2))
    changed = x + block.time_attn(block.time_norm(x), None, 1, T)
    expected = x + block.attn(block.norm1(changed), None, 1, T)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, None, 1, T), expected)


def test_group_attention_equals_one_attention_under_a_mask():
    block = build(DividedWithClass()).blocks[0]
    wake_time(block)
    x = torch.randn(B, 1 + T * 5, DIM, generator=torch.Generator().manual_seed(2))
    frame, place = torch.arange(T).repeat_interleave(5), torch.arange(5).repeat(T)
    for attention, group in ((block.attn, frame), (block.time_attn, place)):
        sees = torch.ones(1 + T * 5, 1 + T * 5, dtype=torch.bool)
        sees[1:, 1:] = group[:, None] == group[None]
        q, k, v = attention.qkv(x).unflatten(-1, (3, 3, DIM // 3)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / (DIM // 3) ** 0.5).masked_fill(~sees, -torch.inf)
        expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, None, 1, T), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("time", [DividedWithClass(), Hierarchical(num_levels=2, tokens_per_level=2)])
def test_real_frames_do_not_see_unreal_ones(time):
    overrides = {"reg_tokens": 4} if isinstance(time, Hierarchical) else {}
    model, frames = build(time, overrides=overrides), clips()
    wake_time(model)
    other = torch.where(MASK[:, :, None, None, None], frames, 7.0)
    out, changed = model(frames, MASK), model(other, MASK)
    torch.testing.assert_close(out.prefix, changed.prefix)
    torch.testing.assert_close(out.x[MASK], changed.x[MASK])


def test_hierarchical_mask_has_the_row_sums_of_the_paper():
    for sees_class, patch_row in ((False, 61), (True, 62)):
        sees = Hierarchical(patches_see_class=sees_class).mask(13, 12, 49, torch.device("cpu"))
        assert sees.shape == (601, 601) and sees[0].sum() == 601
        assert sees[1:13].sum(1).view(3, 4).unique(dim=1)[:, 0].tolist() == [592, 302, 159]
        assert sees[13:].sum(1).unique().tolist() == [patch_row] and not sees[1:13, 0].any()


@pytest.mark.parametrize(("sees_class", "equal"), [(True, True), (False, False)])
def test_hierarchical_without_summary_tokens_on_one_frame_equals_the_image_model(sees_class, equal):
    time = Hierarchical(num_levels=0, tokens_per_level=0, patches_see_class=sees_class)
    model, frames = build(time), clips(1)
    expected = image_model(model).forward_features(frames[:, 0])
    assert torch.allclose(model(frames).x.flatten(1, 3), expected[:, 1:], atol=1e-5) == equal


def test_hierarchical_refuses_another_number_of_summary_tokens():
    with pytest.raises(ValueError, match=r"5 prefix tokens, .* 13; set overrides.reg_tokens to 12"):
        build(Hierarchical(), overrides={"reg_tokens": 4})(clips())
