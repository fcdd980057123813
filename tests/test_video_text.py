"""The two-tower family: how its parts are chained and checked. Axes: B clips, T frames, L words."""

import torch
from torch import nn

from vlp.connectors.frame_transformer import FrameTransformer
from vlp.encoders.conv_frames import ConvFrames
from vlp.encoders.text import EmbeddingText
from vlp.forward import Graph
from vlp.fusion.cross import CrossFusion
from vlp.layers.grid import PrefixTokens
from vlp.layers.pool import ClsPool, MeanPool
from vlp.layers.temperature import Temperature
from vlp.models.video_text import VideoText
from vlp.types import Batch
from vlp.views import ReverseEncoded, ReverseFrames

B, T, SIZE, L = 2, 3, 32, 4


def stage(in_dim: int, dim: int) -> FrameTransformer:
    return FrameTransformer(in_dim=in_dim, dim=dim, num_frames=T, size=SIZE, patch_size=16, depth=1, num_heads=2)


def build(video_dim: int = 8, *, pool: type[nn.Module] = ClsPool, **parts) -> VideoText:
    torch.manual_seed(0)
    return VideoText(
        video=ConvFrames(widths=[4, 6, 5]),
        text=EmbeddingText(vocab_size=20, dim=6, max_length=L, pad_id=0),
        video_pool=pool(dim=video_dim),
        text_pool=MeanPool(dim=6),
        embed_dim=7,
        temperature=Temperature(init=0.1, min_temperature=0.01, max_temperature=1.0, learnable=True, log_space=True),
        **parts,
    )


def frames() -> torch.Tensor:
    return torch.randint(0, 256, (B, T, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def embed(model: VideoText, clips: torch.Tensor) -> torch.Tensor:
    grid = model.encoded(model.pixels(clips), torch.ones(B, T, dtype=torch.bool))
    return model.video_embed(model.video(grid))


def test_connectors_run_in_order_and_set_the_width():
    model = build(connectors={"first": stage(5, 6), "off": None, "second": stage(6, 8)})
    out = embed(model, frames())
    assert model.video_dim == 8 and out.shape == (B, 7)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(B))


def test_without_connectors_the_video_is_the_encoders_grid():
    model = build(5, pool=MeanPool)
    grid = model.encoded(model.pixels(frames()), torch.ones(B, T, dtype=torch.bool))
    assert model.video(grid) is grid and model.video_dim == 5


def test_a_connector_that_does_not_fit_is_named_with_the_width_to_set():
    model = build(connectors={"first": stage(5, 6), "second": stage(9, 8)})
    assert model.shape_errors({"video"}) == ["connector.second.in_dim: 9 does not fit what it is given; set it to 6."]


def test_a_fusion_that_does_not_fit_is_told_the_width_after_the_connectors():
    fusion = CrossFusion(dim=4, video_dim=5, text_dim=6, depth=1, num_heads=2, reads=PrefixTokens())
    model = build(connectors={"only": stage(5, 8)}, fusion=fusion)
    (message,) = model.shape_errors({"video", "fused"})
    assert message.startswith("fusion.video_dim: 5 does not fit") and "fusion.video_dim=8" in message


def test_reversing_after_an_encoder_frame_by_frame_is_reversing_the_frames():
    model = build(connectors={"only": stage(5, 8)})
    mask = torch.ones(B, T, dtype=torch.bool)
    grid = model.encoded(model.pixels(frames()), mask)
    (turned,) = ReverseEncoded()(grid)
    (other,) = ReverseFrames()(frames(), mask)
    torch.testing.assert_close(model.video_embed(model.video(turned)), embed(model, other))


def test_a_view_of_the_encoded_clip_leaves_the_encoder_at_one_call():
    model = build(connectors={"only": stage(5, 8)})
    graph = Graph(model, fields=Batch._fields, views={"reversed_frames": ReverseEncoded()})
    steps = graph.plan(["video_embed", "video_embed:reversed_frames"])
    assert sum("video_encoder" in step.parts for step in steps) == 1
    assert sum("connectors" in step.parts for step in steps) == 2
