"""Windows over space and time. Axes: B clips, T frames, H W cells, D width."""

import pytest
import torch
from fixed_weights import fill, wave
from torch import nn

from vlp.encoders.swin3d import SwinVideo, WindowAttention, _differences
from vlp.layers.block import blocks_of


def build(**options) -> SwinVideo:
    torch.manual_seed(0)
    defaults = {"size": 32, "width": 6, "depths": [2, 2], "heads": [2, 3], "window": [2, 3, 3]}
    return SwinVideo(**defaults | options).eval()


def test_outputs_are_those_of_the_published_module():
    """The numbers are from SwinTransformer3D of tsujuifu/pytorch_violet with the same weights (docs/systems.md)."""
    with torch.no_grad():
        x = fill(build())(wave((1, 5, 3, 32, 32))).x
    frames = [
        -0.010601842775940895,
        -0.00812051072716713,
        -0.007296004332602024,
        -0.010565047152340412,
        -0.0141014447435,
    ]
    rows = [-0.02519911900162697, -0.022251415997743607, -0.026399724185466766, -0.023885130882263184]
    assert x.shape == (1, 5, 4, 4, 12)
    torch.testing.assert_close(x[0, :, 1, 2, 3], torch.tensor(frames), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x[0, 2, :, 0, 7], torch.tensor(rows), atol=1e-6, rtol=1e-5)


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model = SwinVideo(size=224)
    assert sum(p.numel() for p in model.parameters()) == 49_509_078
    assert (model.dim, model.patch_size, model.tubelet_size) == (768, 32, 1)


def test_every_frame_keeps_its_place_and_the_last_one_sees_zeros_behind_it():
    model, pixels = build(depths=[1], heads=[2], window=[1, 2, 2]), wave((2, 4, 3, 32, 32))
    out = model(pixels).x
    torch.testing.assert_close(out[:, :2], model(pixels[:, :3]).x[:, :2])  # a patch spans a frame and the next one
    followed = torch.cat([pixels[:, :2], torch.zeros_like(pixels[:, :1])], dim=1)
    torch.testing.assert_close(model(pixels[:, :2]).x, model(followed).x[:, :2])


def test_unreal_frames_are_not_seen_and_shift_nothing():
    model, pixels = build(), wave((2, 5, 3, 32, 32))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    other = pixels.masked_fill(~mask[:, :, None, None, None], 4.0)
    out = model(pixels, mask)
    torch.testing.assert_close(out.x[mask], model(other, mask).x[mask])
    torch.testing.assert_close(out.x[1], model(pixels[1:]).x[0])


def test_hidden_cells_are_zero_pixels():
    model, pixels = build(), wave((2, 3, 3, 32, 32))
    hidden = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    zeroed = pixels * ~hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
    torch.testing.assert_close(model(pixels, None, hidden).x, model(zeroed).x)


def test_window_that_covers_the_grid_is_one_attention_with_biases():
    attention = WindowAttention(dim=6, num_heads=2, window=(2, 3, 5))
    nn.init.normal_(attention.relative_position_bias_table)
    x, mask = torch.randn(2, 30, 6), torch.ones(2, 1, 30, 30, dtype=torch.bool)
    mask[0, :, :, 4] = False
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[_differences((2, 3, 5), (2, 3, 5), x.device)].permute(2, 0, 1)
    scores = (q @ k.transpose(-1, -2) / 3**0.5 + bias).masked_fill(~mask, -torch.inf)
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, mask, (2, 3, 5)), expected, atol=1e-5, rtol=1e-5)


def test_smaller_window_reads_the_biases_of_the_same_differences():
    built, small = (3, 4, 5), (2, 3, 3)
    whole = _differences(built, built, torch.device("cpu")).view(*built, *built)
    part = _differences(small, built, torch.device("cpu")).view(*small, *small)
    assert torch.equal(part, whole[:2, :3, :3, :2, :3, :3])


def test_gradient_reaches_every_parameter_and_blocks_are_found():
    model = build()
    model(wave((1, 3, 3, 32, 32))).x.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert len(blocks_of(model)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 36}, r"size=36 is not a multiple of .* 8 pixels; set clip.size to 32"),
        ({"heads": [2]}, "must name the same number of stages"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="frames have 16 x 32 pixels, but the encoder was built for 32"):
        build()(wave((1, 2, 3, 16, 32)))
