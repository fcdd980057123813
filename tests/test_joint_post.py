"""Fusion by BERT's layers. Axes: B pairs, L words, T H W cells, D width."""

import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from vlp.fusion.joint_post import JointPostFusion, PostBlock, attention_mass
from vlp.types import Grid, Tokens

B, L, T, H, W, D = 2, 3, 2, 2, 1, 8
TEXT_MASK = torch.tensor([[True, True, False], [True, True, True]])
FRAME_MASK = torch.tensor([[True, True], [True, False]])


def inputs() -> tuple[Grid, Tokens]:
    torch.manual_seed(1)
    return Grid(torch.randn(B, T, H, W, 6), FRAME_MASK, torch.randn(B, T, 6)), Tokens(torch.randn(B, L, D), TEXT_MASK)


def build(depth: int = 2) -> JointPostFusion:
    torch.manual_seed(0)
    return JointPostFusion(dim=D, video_dim=6, text_dim=D, depth=depth, num_heads=2).eval()


def test_layer_equals_the_layer_of_bert():
    own = PostBlock(dim=D, num_heads=2, dropout=0.1).eval()
    bert = BertLayer(BertConfig(hidden_size=D, num_attention_heads=2, intermediate_size=4 * D)).eval()
    q, k, v = own.attn.qkv.weight.chunk(3)
    with torch.no_grad():
        for part, weight in (("query", q), ("key", k), ("value", v)):
            getattr(bert.attention.self, part).weight.copy_(weight)
            getattr(bert.attention.self, part).bias.zero_()
    bert.attention.output.dense.load_state_dict(own.attn.proj.state_dict())
    bert.intermediate.dense.load_state_dict(own.mlp.fc1.state_dict())
    bert.output.dense.load_state_dict(own.mlp.fc2.state_dict())
    x = torch.randn(B, 5, D)
    out = bert(x)
    torch.testing.assert_close(own(x, torch.ones(B, 5).bool()), out[0] if isinstance(out, tuple) else out)


def test_both_sides_see_each_other_and_nothing_unreal():
    fusion, (video, text) = build(), inputs()
    out = fusion(video, text)
    assert (
        out.text.x.shape == (B, L, D) and out.video.x.shape == (B, T, H, W, D) and out.video.prefix.shape == (B, T, D)
    )
    other = Grid(video.x + 3 * ~FRAME_MASK[:, :, None, None, None], FRAME_MASK, video.prefix)
    changed = fusion(other, Tokens(text.x + 3 * ~TEXT_MASK[..., None], TEXT_MASK))
    torch.testing.assert_close(changed.text.x[TEXT_MASK], out.text.x[TEXT_MASK])
    assert not torch.allclose(fusion(video, Tokens(text.x * 2, TEXT_MASK)).video.x, out.video.x)


def test_mass_of_attention_is_one_for_each_query_and_layer():
    fusion, (video, text) = build(depth=3), inputs()
    mass = fusion(video, text, True)
    total = mass.text.sum(1) + mass.video.x.sum((1, 2, 3, 4)) + mass.video.prefix.sum((1, 2))
    num_real = TEXT_MASK.sum(1) + FRAME_MASK.sum(1) * (H * W + 1)
    torch.testing.assert_close(total, 3.0 * num_real)
    assert not mass.text[~TEXT_MASK].any() and not mass.video.x[~FRAME_MASK].any()


def test_mass_of_a_layer_equals_a_loop_over_heads():
    block = build(depth=1).blocks[0]
    x, mask = torch.randn(B, 5, D), torch.ones(B, 5).bool()
    q, k, _ = block.attn.qkv(x).unflatten(-1, (3, 2, D // 2)).unbind(2)
    shares = [(q[:, :, h] @ k[:, :, h].transpose(1, 2) / (D // 2) ** 0.5).softmax(-1) for h in range(2)]
    torch.testing.assert_close(attention_mass(block.attn, x, mask), sum(shares).sum(1) / 2)
