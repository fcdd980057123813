"""Convolutions frame by frame. Axes: B clips, T frames, h w cells."""

import pytest
import torch

from vlp.encoders.conv_frames import ConvFrames

B, T, SIZE = 2, 3, 32


def build() -> ConvFrames:
    torch.manual_seed(0)
    return ConvFrames(widths=[4, 6, 5])


def clips(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_grid_has_the_stated_cells_and_width_and_no_prefix():
    out = build()(clips(), torch.tensor([[True, True, False], [True, True, True]]))
    assert build().patch_size == 16 and out.x.shape == (B, T, 2, 2, 5) and out.prefix.shape == (B, 0, 5)
    assert out.mask.tolist() == [[True, True, False], [True, True, True]]


def test_frames_are_encoded_each_by_itself():
    changed = clips()
    changed[:, 1] += 1.0
    before, after = build()(clips()).x, build()(changed).x
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]]) and not torch.equal(before[:, 1], after[:, 1])


def test_pixels_of_hidden_cells_change_nothing():
    hidden = torch.zeros(B, T, 2, 2, dtype=torch.bool)
    hidden[0, 1, 0, 1] = True
    changed = clips()
    changed[0, 1, :, :16, 16:] = 7.0
    assert torch.equal(build()(clips(), None, hidden).x, build()(changed, None, hidden).x)
    changed[0, 1, :, :16, 15] = 7.0
    assert not torch.equal(build()(clips(), None, hidden).x, build()(changed, None, hidden).x)


@pytest.mark.parametrize(("widths", "stride", "patch_size"), [([4], 4, 4), ([4, 6], 2, 4), ([4, 6, 8, 8], 4, 32)])
def test_patch_size_follows_from_the_strides(widths, stride, patch_size):
    encoder = ConvFrames(widths=widths, first_stride=stride)
    cells = SIZE // patch_size
    assert encoder.patch_size == patch_size and encoder(clips()).x.shape == (B, T, cells, cells, widths[-1])
