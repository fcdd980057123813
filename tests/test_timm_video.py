"""timm backbones per frame, and what all timm encoders share. Axes: B clips, T frames, h w cells, D width."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vlp.encoders.spacetime import Joint
from vlp.encoders.timm_model import DispatchedAttention
from vlp.encoders.timm_video import SpaceTimeVit, TimmFrames
from vlp.layers.block import blocks_of, checkpoint_blocks

B, T, SIZE = 2, 3, 32
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
BACKBONES = {
    "vit_tiny_patch16_224": (VIT, 8, 1),
    "vit_base_patch16_siglip_224": (VIT, 8, 0),
    "vit_betwixt_patch16_reg4_gap_256": (VIT, 8, 0),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 6, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
        32,
        0,
    ),
    "convnext_atto": ({"depths": [1, 1, 2, 1], "dims": [4, 6, 8, 10]}, 32, 0),
    "resnet10t": ({}, 32, 0),
}


def build(name: str = "vit_tiny_patch16_224", size: int = SIZE, **options) -> TimmFrames:
    torch.manual_seed(0)
    return TimmFrames(name=name, num_frames=4, size=size, overrides=BACKBONES[name][0], **options)


def clips(size: int = SIZE, num_frames: int = T) -> torch.Tensor:
    return torch.randn(B, num_frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def reset(model: nn.Module) -> None:
    """Leave no parameter at zero, where gradients of others vanish."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else p.data.add_(0.1)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_gives_its_grid_and_a_gradient_to_every_parameter(name):
    _, stride, num_prefix = BACKBONES[name]
    model = build(name, size=64, space_positions=True)
    reset(model)
    out = model(clips(64))
    shape = model.grid(T, 64)
    assert (model.patch_size, model.num_prefix, shape) == (stride, num_prefix, (T, 64 // stride, 64 // stride))
    assert out.x.shape == (B, *shape, model.dim) and out.prefix.shape == (B, T * num_prefix, model.dim)
    (out.x.square().sum() + out.prefix.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())] == []


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_features_equal_timm_frame_by_frame(name):
    model = build(name, size=64).eval()
    frames = clips(64)
    features = model.backbone.forward_features(frames[:, 1])
    if features.ndim == 3:
        features = features[:, -64:].unflatten(1, (8, 8))
    elif not name.startswith("swin"):
        features = features.permute(0, 2, 3, 1)
    torch.testing.assert_close(model(frames).x[:, 1], features)


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_frames_up_to_the_table_of_times_are_accepted(num_frames):
    out = build()(clips(num_frames=num_frames))
    assert out.x.shape[1] == num_frames and out.mask.all()


def test_more_frames_than_the_table_name_the_fix():
    with pytest.raises(ValueError, match=r"5 places.*has 4"):
        build()(clips(num_frames=5))


def test_time_positions_are_added_to_cells_and_class_tokens():
    model, frames = build().eval(), clips()
    before = model(frames)
    nn.init.normal_(model.time_positions.table)
    after, table = model(frames), model.time_positions.table[:T]
    torch.testing.assert_close(after.x, before.x + table[:, None, None])
    torch.testing.assert_close(after.prefix, before.prefix + table)


def test_masked_frames_stay_masked_and_do_not_change_others():
    model, mask = build().eval(), torch.tensor([[True, True, False], [True, False, False]])
    frames = clips()
    other = torch.where(mask[..., None, None, None], frames, 5.0)
    torch.testing.assert_close(model(frames, mask).x[mask], model(other, mask).x[mask])
    assert torch.equal(model(frames, mask).mask, mask)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_hidden_cells_do_not_influence_anything(name):
    model = build(name, size=64).eval()
    hidden = torch.rand(B, *model.grid(T, 64), generator=torch.Generator().manual_seed(2)) < 0.5
    cell = model.patch_size
    pixels = hidden.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, None]
    frames = clips(64)
    torch.testing.assert_close(model(frames, None, hidden).x, model(frames.masked_fill(pixels, 7.0), None, hidden).x)
    assert not torch.allclose(model(frames, None, hidden).x, model(frames).x)


def test_frozen_backbone_keeps_its_batch_norm_and_gets_no_gradient():
    model = build("resnet10t", frozen=True).train()
    before = model.backbone.bn1.running_mean.clone()
    model(clips()).x.sum().backward()
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["time_positions.table"]


def test_vit_attention_runs_through_the_dispatcher_with_equal_output_and_names():
    torch.manual_seed(0)
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", img_size=SIZE, qk_norm=True, **VIT)
    ours = TimmFrames(name="vit_tiny_patch16_224", num_frames=1, size=SIZE, overrides=VIT | {"qk_norm": True}).backbone
    assert sum(isinstance(m, DispatchedAttention) for m in ours.modules()) == 2
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(clips()[:, 0]), stock(clips()[:, 0]))


def test_unknown_name_suggests_the_closest():
    with pytest.raises(ValueError, match="vit_base_patch16_224"):
        TimmFrames(name="vit_base_patch16_242", num_frames=1, size=SIZE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 36}, "stride of 8.*clip.size to 32"),
        ({"size": SIZE, "overrides": {"img_size": 64}}, "img_size"),
        ({"size": SIZE, "pretrained": True, "checkpoint_path": "x.pth"}, "exclude each other"),
        ({"size": SIZE, "checkpoint_path": "nowhere.pth"}, "'nowhere.pth' does not exist"),
    ],
)
def test_impossible_options_name_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        TimmFrames(**({"name": "vit_tiny_patch16_224", "num_frames": 1, "overrides": VIT} | options))


def test_frames_of_another_size_name_the_fix():
    with pytest.raises(ValueError, match=r"64 x 64 pixels.*built for 32"):
        build()(clips(64))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_checkpoint_of_another_size_loads_with_resized_positions(tmp_path, ending):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, **VIT)
    path = str(tmp_path / f"weights.{ending}")
    save_file(source.state_dict(), path) if ending == "safetensors" else torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path
    )
    model = build(checkpoint_path=path)
    assert torch.equal(model.backbone.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert model.backbone.pos_embed.shape == (1, 17, 24)


def test_checkpoint_that_lacks_weights_names_them(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **VIT).state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"1 missing \(blocks.1.mlp.fc2.bias\); 1 unknown \(extra\)"):
        build(checkpoint_path=str(tmp_path / "w.pth"))


class Payload:
    def __reduce__(self):
        return (exit, (3,))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_checkpoint_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        build(checkpoint_path=str(tmp_path / "w.pth"))


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"weight": Payload()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        build(checkpoint_path=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name, count", [("vit_tiny_patch16_224", 2), ("swin_tiny_patch4_window7_224", 5)])
def test_blocks_of_timm_models_are_their_layers(name, count):
    assert len(blocks_of(build(name, size=64))) == count


@pytest.mark.parametrize("name, count", [("convnext_atto", 5), ("resnet10t", 4)])
def test_checkpointed_timm_models_give_the_same(name, count):
    model = build(name, size=64).eval()
    before = model(clips(64)).x
    assert checkpoint_blocks(model) == count
    torch.testing.assert_close(model(clips(64)).x, before)


def test_a_copy_of_an_encoder_uses_its_own_parameters():
    model, frames = build().eval(), clips()
    twin, before = copy.deepcopy(model), model(frames).x
    nn.init.zeros_(model.backbone.norm.weight)
    torch.testing.assert_close(twin(frames).x, before)


@pytest.mark.parametrize("name", BACKBONES)
def test_encoders_build_on_the_meta_device(name):
    with torch.device("meta"):
        model = build(name, size=64)
    assert all(p.is_meta for p in model.parameters())


def test_space_time_vit_builds_on_the_meta_device():
    with torch.device("meta"):
        model = SpaceTimeVit(name="vit_base_patch16_224", num_frames=8, size=224, time=Joint(), tubelet_size=2)
    # timm's ViT-B without head, an inflated patch embedding, a table of four times
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + 768 * 3 * 16 * 16 + 4 * 768


def test_encoder_runs_in_bfloat16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build(drop_path=0.1)(clips()).x.isfinite().all()
