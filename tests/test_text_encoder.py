"""Text encoders: tiny models of each family, from scratch and from a local directory. Axes: B texts, L tokens."""

import pytest
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from vlp.encoders.text import EmbeddingText, HuggingFaceText
from vlp.layers.block import blocks_of, checkpoint_blocks

B, L, DIM, VOCAB = 3, 7, 24, 50
SIZES = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 30}
CONFIGS = {
    "bert": {"model_type": "bert", **SIZES},
    "roberta": {"model_type": "roberta", **SIZES},
    "distilbert": {"model_type": "distilbert", "dim": DIM, "n_layers": 2, "n_heads": 3, "hidden_dim": 30},
    "clip": {"model_type": "clip_text_model", "eos_token_id": 3, "bos_token_id": 2, **SIZES},
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
MASK = torch.arange(L) < torch.tensor([[7], [4], [2]])


def build(family: str = "bert", max_length: int = L, **changes) -> HuggingFaceText:
    torch.manual_seed(0)
    config = CONFIGS[family] | changes
    return HuggingFaceText(config=config, vocab_size=VOCAB, pad_id=1, max_length=max_length)


def ids() -> torch.Tensor:
    return torch.randint(4, VOCAB, (B, L), generator=torch.Generator().manual_seed(1)).masked_fill(~MASK, 1)


@torch.no_grad()
def test_embeddings_alone_are_those_of_bert():
    theirs = BertModel(BertConfig(vocab_size=VOCAB, pad_token_id=1, **SIZES)).embeddings.eval()
    ours = EmbeddingText(vocab_size=VOCAB, dim=DIM, max_length=512, pad_id=1).eval()
    ours.words.weight.copy_(theirs.word_embeddings.weight)  # small at first, where the eps of the norm counts
    ours.positions.table.copy_(theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0])
    torch.testing.assert_close(ours(ids(), MASK).x, theirs(ids()), atol=1e-5, rtol=1e-5)


@FAMILIES
def test_text_gives_tokens_and_a_gradient_to_every_parameter(family):
    model = build(family)
    out = model(ids(), MASK)
    assert out.x.shape == (B, L, DIM) == (B, L, model.dim) and out.mask is MASK
    out.x.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@FAMILIES
def test_padding_does_not_change_real_tokens(family):
    model = build(family).eval()
    other = ids().masked_fill(~MASK, 9)
    torch.testing.assert_close(model(ids(), MASK).x[MASK], model(other, MASK).x[MASK])


@FAMILIES
def test_text_of_padding_alone_is_finite_forward_and_backward(family):
    model = build(family)
    x = model(ids(), MASK & torch.tensor([[True], [False], [True]])).x
    x.square().sum().backward()
    assert x.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_text_of_padding_alone_reads_its_first_token_in_place_of_nothing():
    model, nothing = build().eval(), torch.zeros_like(MASK)
    first = torch.arange(L).expand(B, -1) == 0
    torch.testing.assert_close(model(ids(), nothing).x, model(ids(), first).x)
    assert not model(ids(), nothing).mask.any()


@FAMILIES
def test_text_builds_on_the_meta_device(family):
    with torch.device("meta"):
        assert all(p.is_meta for p in build(family).parameters())


@FAMILIES
def test_layers_are_found_and_checkpointed(family):
    model = build(family).eval()
    before = model(ids(), MASK).x
    assert len(blocks_of(model)) == checkpoint_blocks(model) == 2
    torch.testing.assert_close(model(ids(), MASK).x, before)


def test_bert_of_the_usual_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = HuggingFaceText(config={"model_type": "bert"}, vocab_size=30_522, pad_id=0, max_length=512)
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 - 768 * 768 - 768  # without the pooling layer


def save_bert(path, safe: bool = True) -> BertModel:
    model = BertModel(BertConfig(**SIZES, vocab_size=VOCAB, max_position_embeddings=9, pad_token_id=1))
    model.save_pretrained(path) if safe else model.config.save_pretrained(path)
    if not safe:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    return model


def test_local_directory_loads_its_weights(tmp_path):
    source = save_bert(tmp_path).eval()
    model = HuggingFaceText(name=str(tmp_path), vocab_size=VOCAB - 3, pad_id=1, max_length=9)
    assert model.training and "pooler" not in dict(model.model.named_children())
    expected = source(input_ids=ids(), attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(model.eval()(ids(), MASK).x[MASK], expected[MASK])


def test_local_directory_in_half_precision_is_read_as_float32(tmp_path):
    save_bert(tmp_path).bfloat16().save_pretrained(tmp_path)
    model = HuggingFaceText(name=str(tmp_path), vocab_size=VOCAB, pad_id=1, max_length=9)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_local_directory_that_lacks_weights_names_them(tmp_path):
    source = save_bert(tmp_path)
    source.config.num_hidden_layers = 3
    source.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 16 weights \(encoder.layer.2"):
        HuggingFaceText(name=str(tmp_path), vocab_size=VOCAB, pad_id=1, max_length=9)


def test_text_tower_of_a_two_tower_model_loads(tmp_path):
    text = CLIPTextConfig(
        **SIZES, vocab_size=VOCAB, max_position_embeddings=L, eos_token_id=3, bos_token_id=2, pad_token_id=1
    )
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    source = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=5)).eval()
    source.save_pretrained(tmp_path)
    model = HuggingFaceText(name=str(tmp_path), vocab_size=VOCAB, pad_id=1, max_length=L).eval()
    expected = source.text_model(input_ids=ids(), attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(model(ids(), MASK).x[MASK], expected[MASK])


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    save_bert(tmp_path, safe=False)
    with pytest.raises(OSError, match="safetensors"):
        HuggingFaceText(name=str(tmp_path), vocab_size=VOCAB, pad_id=1, max_length=L)


@pytest.mark.parametrize("vocab_size, max_length, message", [(51, L, "knows 50 ids"), (VOCAB, 10, "takes 9 tokens")])
def test_model_that_does_not_fit_the_tokenizer_names_both_numbers(tmp_path, vocab_size, max_length, message):
    save_bert(tmp_path)
    with pytest.raises(ValueError, match=message):
        HuggingFaceText(name=str(tmp_path), vocab_size=vocab_size, pad_id=1, max_length=max_length)


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_hub_name_without_a_pinned_commit_is_refused(revision):
    with pytest.raises(ValueError, match="revision must pin a commit"):
        HuggingFaceText(name="someone/some-bert", revision=revision, vocab_size=VOCAB, pad_id=1, max_length=L)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bret"}, "closest: bert"),
        ({}, "model_type=None"),
        ({"model_type": "bert", "hiden_size": 24}, "Did you mean 'hidden_size'"),
        ({"model_type": "bert", "vocab_size": 9}, "config.vocab_size .* set by vocab_size"),
        ({"model_type": "bert", "is_decoder": True}, "has a decoder"),
        ({"model_type": "t5"}, "has a decoder"),
        ({"model_type": "bert", "max_position_embeddings": 5}, "takes 5 tokens"),
    ],
)
def test_wrong_config_names_the_fix(config, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceText(config=config, vocab_size=VOCAB, pad_id=1, max_length=L)


@pytest.mark.parametrize("options", [{}, {"name": "x", "config": {"model_type": "bert"}}])
def test_name_and_config_exclude_each_other(options):
    with pytest.raises(ValueError, match="exactly one"):
        HuggingFaceText(**options, vocab_size=VOCAB, pad_id=1, max_length=L)


def test_embedding_text_equals_its_formula():
    torch.manual_seed(0)
    model = EmbeddingText(vocab_size=VOCAB, dim=DIM, max_length=9, pad_id=1)
    expected = model.words.weight[ids()] + model.positions.table[:L]
    out = model(ids(), MASK)
    torch.testing.assert_close(out.x, torch.nn.functional.layer_norm(expected, (DIM,), eps=1e-12))
    out.x.square().sum().backward()
    assert model.dim == DIM and all(p.grad is not None for p in model.parameters())


def test_embedding_text_refuses_longer_texts():
    with pytest.raises(ValueError, match=r"7 places.*has 5"):
        EmbeddingText(vocab_size=VOCAB, dim=DIM, max_length=5, pad_id=1)(ids(), MASK)


def test_text_runs_in_bfloat16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build()(ids(), MASK).x.isfinite().all()
