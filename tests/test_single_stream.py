"""One transformer for words and frames. Axes: B clips, T frames, L text length, D width."""

import pytest
import torch
from torch import nn

from vlp.encoders.single_stream import NoMixing, RollTokens, SingleStream

B, T, L, SIZE, PATCH, DIM = 2, 3, 5, 32, 8, 24
VIT = {"embed_dim": DIM, "depth": 2, "num_heads": 3, "patch_size": PATCH}
IDS = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]])
TEXT_MASK = IDS != 0


def build(mixing=None, **options) -> SingleStream:
    torch.manual_seed(0)
    arguments = {"num_frames": 4, "size": SIZE, "vocab_size": 11, "max_length": 6, "pad_id": 0, "overrides": VIT}
    return SingleStream(
        name="vit_tiny_patch16_224", mixing=mixing or RollTokens(share=0.2), **arguments | options
    ).eval()


def clips(num_frames: int = T) -> torch.Tensor:
    return torch.randn(B, num_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_three_rolls_of_three_frames_are_the_identity_and_a_quarter_moves():
    x, roll = torch.randn(B, 3, 197, 2), RollTokens()
    once = roll(x)
    assert torch.equal(roll(roll(once)), x) and torch.equal(once[:, :, 0], x[:, :, 0])
    moved = (once != x).any(-1).float().mean()
    assert moved == pytest.approx(48 / 197)


def test_roll_takes_the_first_places_from_before_and_the_last_from_behind():
    x = torch.arange(3.0).view(1, 3, 1, 1).expand(-1, -1, 9, 1)  # every token says its frame
    assert RollTokens(share=0.25)(x)[0, :, :, 0].tolist() == [
        [0, 2, 2, 0, 0, 0, 0, 1, 1],
        [1, 0, 0, 1, 1, 1, 1, 2, 2],
        [2, 1, 1, 2, 2, 2, 2, 0, 0],
    ]


def test_identical_frames_are_one_frame_while_the_table_of_times_is_zero():
    model, frame = build(), clips(1)
    one, three = (model(IDS, TEXT_MASK, frame.expand(-1, n, -1, -1, -1), None).text.x for n in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)


def test_order_of_frames_matters_through_the_roll_alone():
    frames, turned = clips(), [1, 0, 2]  # a cyclic order would roll to the same
    mixed, alone = build(), build(NoMixing())
    for model in (mixed, alone):
        for block in model.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=0.3)
            nn.init.normal_(block.attn.proj.weight, std=0.3)
    out = [m(IDS, TEXT_MASK, frames, None).text.x for m in (mixed, alone)]
    other = [m(IDS, TEXT_MASK, frames[:, turned], None).text.x for m in (mixed, alone)]
    assert not torch.allclose(out[0], other[0], atol=1e-4)
    torch.testing.assert_close(out[1], other[1], atol=1e-5, rtol=1e-5)


def test_a_video_alone_is_not_mixed_and_a_text_alone_sees_no_video():
    model, frames = build(), clips()
    video = model(None, None, frames, None)
    assert video.text.x.shape == (B, 0, DIM)
    torch.testing.assert_close(video.video.x[:, 1], model(None, None, frames[:, [1]], None).video.x[:, 0])
    assert model(IDS, TEXT_MASK, None, None).video is None


def test_padding_words_and_unreal_frames_change_no_text():
    model, frames = build(NoMixing()), clips()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = model(IDS, TEXT_MASK, frames, mask).text.x[TEXT_MASK]
    other = torch.where(mask[:, :, None, None, None], frames, 4.0)
    torch.testing.assert_close(model(IDS, TEXT_MASK, other, mask).text.x[TEXT_MASK], out)
    torch.testing.assert_close(model(IDS.masked_fill(~TEXT_MASK, 5), TEXT_MASK, frames, mask).text.x[TEXT_MASK], out)


def test_shuffled_patches_change_from_call_to_call_only_when_asked():
    frames = clips()
    same, shuffled = build(), build(shuffle_patches=True)
    assert torch.equal(same(None, None, frames, None).video.x, same(None, None, frames, None).video.x)
    first, second = (shuffled(None, None, frames, None).video for _ in range(2))
    assert not torch.equal(first.x, second.x)
    torch.testing.assert_close(first.prefix, second.prefix, atol=1e-5, rtol=1e-5)  # without rolling, order is nothing


@pytest.mark.parametrize(("name", "millions"), [("base", 109.28), ("small", 33.40), ("tiny", 11.39)])
def test_sizes_are_the_published_ones(name, millions):
    options = {"num_frames": 3, "size": 224, "vocab_size": 30522, "max_length": 40, "pad_id": 0}
    with torch.device("meta"):
        model = SingleStream(name=f"vit_{name}_patch16_224", mixing=RollTokens(), **options)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=5e-4)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_shares_that_cannot_be_rolled_are_refused(share):
    with pytest.raises(ValueError, match=f"share={share} must be above 0"):
        RollTokens(share=share)
