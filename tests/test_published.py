"""Published weights under vlp's names. Axes: B clips, T frames, L words."""

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixed_weights import wave
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, DistilBertConfig, DistilBertModel

from vlp import config
from vlp.forward import ForwardPass
from vlp.training import published
from vlp.training.assemble import assemble
from vlp.training.state import once
from vlp.types import Batch, nothing_more

VISION = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
WORDS = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 30, "bos_token_id": 27, "eos_token_id": 29, "pad_token_id": 29, "max_position_embeddings": 7}


_LAYER = "vision_model.encoder.layers.0.self_attn"


def hugging_face() -> CLIPModel:
    torch.manual_seed(0)
    made = CLIPConfig(
        text_config=WORDS | TOKENS, vision_config=VISION | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    return CLIPModel(made).eval()


def ours(experiment: str = "clip", *more: str):
    words = [
        f"{k}={v}" for k, v in {"vocab_size": 30, "max_length": 7, "bos_id": 27, "eos_id": 29, "pad_id": 29}.items()
    ]
    text = "{num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}"
    video = "{embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}"
    return assemble(
        config.load(
            [
                f"+experiment={experiment}",
                "clip.num_frames=3",
                "clip.size=32",
                *(f"tokenizer.{word}" for word in words),
                f"text.config={text}",
                "text.facts.dim=16",
                f"video.overrides={video}",
                "video.facts.dim=24",
                "video.facts.patch_size=8",
                "model.embed_dim=12",
                *more,
            ]
        )
    )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[27, 3, 4, 29, 29], [27, 5, 6, 7, 29]])
    return Batch(
        frames=torch.randint(256, (2, 3, 32, 32, 3), generator=generator, dtype=torch.uint8),
        frame_mask=torch.ones(2, 3, dtype=torch.bool),
        times_s=torch.zeros(2, 3),
        text_ids=ids,
        text_mask=torch.tensor([[True, True, True, True, False], [True] * 5]),
        word_ids=ids,
        **nothing_more(2),
        valid=torch.ones(2, dtype=torch.bool),
        status=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
        key=torch.arange(2),
    )


def fill(module: nn.Module, tensors: dict) -> None:
    own = once(nn.ModuleDict({"model": module}))
    assert own.keys() == tensors.keys()
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def test_clip_of_hugging_face_gives_the_same_embeddings():
    source, system, data = hugging_face(), ours(), batch()
    found = published.convert(source.state_dict(), "hf_clip")
    fill(system.model.eval(), found.tensors)
    forward = ForwardPass(system.model, data, system.graph)
    pixels = forward.take("pixels")
    frames = source.vision_model(pixels.flatten(0, 1)).pooler_output.unflatten(0, (2, 3)).mean(1)
    expected = F.normalize(source.visual_projection(frames), dim=-1)
    torch.testing.assert_close(forward.take("video_embed"), expected, atol=1e-5, rtol=1e-4)
    text = source.text_model(input_ids=data.text_ids, attention_mask=data.text_mask).last_hidden_state
    last = torch.stack([text[0, 3], text[1, 4]])
    torch.testing.assert_close(
        forward.take("text_embed"), F.normalize(source.text_projection(last), dim=-1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(forward.take("logit_scale"), source.logit_scale.exp())


def test_a_folder_of_hugging_face_is_taken_by_its_weights(tmp_path):
    with pytest.raises(config.ConfigError, match=r"model\.safetensors' does not exist"):
        published.import_file(tmp_path, "hf_clip")
    hugging_face().save_pretrained(tmp_path)
    found, same = published.import_file(tmp_path, "hf_clip"), published.convert(hugging_face().state_dict(), "hf_clip")
    assert found.tensors.keys() == same.tensors.keys()


@torch.no_grad()
def test_openai_names_hold_the_same_tensors_as_hugging_faces():
    source = hugging_face().state_dict()
    renamed = published.convert(openai(source), "open_clip").tensors
    for name, tensor in published.convert(source, "hf_clip").tensors.items():
        assert torch.equal(renamed.pop(name), tensor), name
    assert not renamed


def test_clip4clip_fills_every_parameter_of_its_experiment():
    heads = {"cross.pooler.weight", "lstm_visual.weight_ih_l0", "transformerClip.resblocks.0.ln_1.bias"}
    tensors = {f"clip.{name}": tensor for name, tensor in openai(hugging_face().state_dict()).items()}
    found = published.convert(tensors | dict.fromkeys(heads, torch.ones(2)), "clip4clip")
    own = once(nn.ModuleDict({"model": ours("clip4clip").model}))
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {n: t.shape for n, t in own.items()}
    assert set(found.left_out) == heads


def openai(source: dict) -> dict:
    """Hugging Face's state dict under OpenAI's names."""
    pairs = [
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("text_model.final_layer_norm", "ln_final"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    result = {}
    for name, tensor in source.items():
        if "q_proj" in name:
            parts = [source[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name or "position_ids" in name:
            continue
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = tensor
    result["visual.proj"] = result.pop("visual_projection.weight").T
    result["text_projection"] = result.pop("text_projection.weight").T
    return result


# Of the published class with the same weights, channels 4 to 7: words, and patches in the mean of the frames.
TRUNK_WORDS = {
    (0, 0): [-0.061872, 0.970460, -1.007468, 0.777902],
    (1, 0): [-0.064412, 0.972360, -1.007179, 0.777151],
    (1, 2): [-0.071122, 0.979641, -1.003397, 0.776331],
}
TRUNK_PATCHES = {
    (0, 0): [-0.073228, 0.949907, -1.029724, 0.739356],
    (1, 3): [-0.075367, 0.935819, -1.048993, 0.722852],
    (3, 3): [-0.042083, 0.967740, -1.018695, 0.741390],
}


def all_in_one_tensors() -> dict[str, torch.Tensor]:
    """The trunk of the published module, 24 wide with 3 blocks, its weights by a formula of their names."""
    wide, text = 24, "text_embeddings"
    shapes = {f"{text}.word_embeddings.weight": (30, wide), f"{text}.position_embeddings.weight": (7, wide)}
    shapes |= {f"{text}.token_type_embeddings.weight": (2, wide), "token_type_embeddings.weight": (2, wide)}
    shapes |= {"transformer.cls_token": (1, 1, wide), "transformer.pos_embed": (1, 17, wide)}
    shapes |= {"transformer.temporal_embed": (1, 3, wide)}
    norms = [f"{text}.LayerNorm", "transformer.norm"]
    layers = {"transformer.patch_embed.proj": (wide, 3, 8, 8)}
    for block in (f"transformer.blocks.{n}" for n in range(3)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        layers |= {f"{block}.attn.qkv": (3 * wide, wide), f"{block}.attn.proj": (wide, wide)}
        layers |= {f"{block}.mlp.fc1": (4 * wide, wide), f"{block}.mlp.fc2": (wide, 4 * wide)}
    shapes |= {f"{name}.{kind}": (wide,) for name in norms for kind in ("weight", "bias")}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {name: wave(shape, zlib.crc32(name.encode()) % 1000) for name, shape in shapes.items()}


@torch.no_grad()
def test_the_imported_trunk_of_all_in_one_gives_the_outputs_of_the_published_module():
    small = ["clip.size=32", "tokenizer.vocab_size=30", "tokenizer.max_length=7", "video.facts.dim=24"]
    small += ["video.overrides={embed_dim: 24, depth: 3, num_heads: 3, patch_size: 8}", "video.facts.patch_size=8"]
    stream = assemble(config.load(["+experiment=all_in_one", *small])).model.stream.eval()
    own = once(nn.ModuleDict({"model": nn.ModuleDict({"stream": stream})}))
    found = published.convert(all_in_one_tensors(), "all_in_one").tensors
    assert own.keys() == found.keys()
    for name, tensor in own.items():
        tensor.copy_(found[name])
    ids = torch.tensor([[2, 5, 9, 4, 3, 0, 0], [2, 7, 3, 0, 0, 0, 0]])
    fused = stream(ids, ids > 0, wave((2, 3, 3, 32, 32), 17), None)
    assert fused.video is not None
    patches = fused.video.x[1].mean(0)
    for (clip, word), expected in TRUNK_WORDS.items():
        torch.testing.assert_close(fused.text.x[clip, word, 4:8], torch.tensor(expected), atol=2e-6, rtol=0)
    for place, expected in TRUNK_PATCHES.items():
        torch.testing.assert_close(patches[place][4:8], torch.tensor(expected), atol=2e-6, rtol=0)


def names_of(experiment: str, *overrides: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        system = assemble(config.load([f"+experiment={experiment}", *overrides]))
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def violet_names() -> dict[str, tuple[int, ...]]:
    """Of the released model, as its card lists them; the encoder's names are vlp's own."""
    bert = {"attention.output.dense": 768, "intermediate.dense": 3072, "output.dense": 768}
    names = {"enc_img.emb_cls": (1, 1, 1, 768), "enc_img.emb_pos": (1, 1, 197, 768), "enc_img.emb_len": (1, 6, 1, 768)}
    names |= {f"enc_img.norm.{kind}": (768,) for kind in ("weight", "bias")}
    names |= {"enc_txt.emb_txt.word_embeddings.weight": (30522, 768), "enc_txt.emb_txt.position_ids": (1, 512)}
    names |= {"enc_txt.emb_txt.position_embeddings.weight": (512, 768)}
    names |= {"enc_txt.emb_txt.token_type_embeddings.weight": (2, 768)}
    names |= {f"enc_txt.emb_txt.LayerNorm.{kind}": (768,) for kind in ("weight", "bias")}
    for layer in (f"trsfr.layer.{n}" for n in range(12)):
        for part in ("query", "key", "value"):
            names |= {
                f"{layer}.attention.self.{part}.weight": (768, 768),
                f"{layer}.attention.self.{part}.bias": (768,),
            }
        for part, width in bert.items():
            inner = 3072 if part == "output.dense" else 768
            names |= {f"{layer}.{part}.weight": (width, inner), f"{layer}.{part}.bias": (width,)}
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            names |= {f"{layer}.{part}.weight": (768,), f"{layer}.{part}.bias": (768,)}
    heads = {"fc.1": (1536, 768), "fc.3": (1, 1536), "fc_mvm.1": (1536, 768), "fc_mvm.3": (8192, 1536)}
    heads |= {"fc_mtm.predictions.transform.dense": (768, 768), "fc_mtm.predictions.transform.LayerNorm": (768,)}
    for name, shape in heads.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return names | {"fc_mtm.predictions.decoder.weight": (30522, 768), "fc_mtm.predictions.bias": (30522,)}


@pytest.mark.filterwarnings("ignore:DiscreteVae without weights")
def test_violet_fills_every_parameter_of_its_experiment():
    wanted = names_of("violet", "objective.masked_visual.tokenizer.path=null")
    own = {n: s for n, s in wanted.items() if not n.startswith("objectives.masked_visual.tokenizer.")}
    swin = {n.replace("model.video_encoder.", "enc_img.swin."): s for n, s in own.items() if "video_encoder" in n}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in {**violet_names(), **swin}.items()}
    found = published.convert(tensors, "violet")
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == own
    assert set(found.left_out) == {"enc_txt.emb_txt.position_ids", "enc_txt.emb_txt.token_type_embeddings.weight"}


def frozen_names() -> dict[str, tuple[int, ...]]:
    """Of the released model: a ViT-B/16 with attention over time, and DistilBERT-base."""
    names = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "temporal_embed": (1, 4, 768)}
    layers = {"patch_embed.proj": (768, 3, 16, 16)}
    norms = {"norm"} | {f"blocks.{n}.norm{place}" for n in range(12) for place in (1, 2, 3)}
    for block in (f"blocks.{n}" for n in range(12)):
        for attn in ("attn", "timeattn"):
            layers |= {f"{block}.{attn}.qkv": (2304, 768), f"{block}.{attn}.proj": (768, 768)}
        layers |= {f"{block}.mlp.fc1": (3072, 768), f"{block}.mlp.fc2": (768, 3072)}
    names |= {f"{norm}.{kind}": (768,) for norm in norms for kind in ("weight", "bias")}
    names |= {f"{name}.weight": shape for name, shape in layers.items()}
    names |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    with torch.device("meta"):
        text = {f"text_model.{n}": tuple(t.shape) for n, t in DistilBertModel(DistilBertConfig()).state_dict().items()}
    heads = {f"{head}.weight": (256, 768) for head in ("txt_proj.1", "vid_proj.0")}
    heads |= {f"{head}.bias": (256,) for head in ("txt_proj.1", "vid_proj.0")}
    return {f"video_model.{name}": shape for name, shape in names.items()} | text | heads


def test_frozen_in_time_fills_every_parameter_of_its_experiment_and_brings_its_temperature():
    tensors = {name: torch.empty(shape, device="meta") for name, shape in frozen_names().items()}
    found = published.convert(tensors, "frozen").tensors
    assert {name: tensor.shape for name, tensor in found.items()} == names_of("frozen_in_time_video", "init.run=null")
    torch.testing.assert_close(found["model.temperature.value"].exp(), torch.tensor([20.0]))


@pytest.mark.parametrize("below", [".base_layer", ""])  # of newer and of older releases of peft
def test_products_of_peft_are_those_of_the_joint_layer(below):
    encoder, tensors = "vision_model.encoder.base_model.model.layers.0", {}
    plain = hugging_face().state_dict()
    for part in ("q", "k", "v", "out"):
        layer = f"{encoder}.self_attn.{part}_proj"
        tensors |= {f"{layer}{below}.{kind}": plain[f"{_LAYER}.{part}_proj.{kind}"] for kind in ("weight", "bias")}
        tensors[f"{layer}.lora_A.default.weight"] = torch.full((2, 24), float(ord(part[0])))
        tensors[f"{layer}.lora_B.default.weight"] = torch.randn(24, 2)
    found = published.convert(tensors, "languagebind").tensors
    block = "model.video_encoder.blocks.0.block.attn"
    assert found[f"{block}.qkv.lora_down"][::2, 0].tolist() == [float(ord(part)) for part in "qkv"]
    ups = [tensors[f"{encoder}.self_attn.{part}_proj.lora_B.default.weight"] for part in "qkv"]
    assert torch.equal(found[f"{block}.qkv.lora_up"], torch.stack(ups)) and found[f"{block}.proj.lora_up"].shape == (
        1,
        24,
        2,
    )
    assert found[f"{block}.qkv.weight"].shape == (72, 24) and len(found) == 8


def test_rows_that_violet_adds_are_added():
    tensors = {
        "enc_img.emb_cls": torch.ones(1, 1, 1, 2),
        "enc_img.emb_pos": torch.arange(394.0).view(1, 1, 197, 2),
        "enc_txt.emb_txt.position_embeddings.weight": torch.zeros(3, 2),
        "enc_txt.emb_txt.token_type_embeddings.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
    }
    found = published.convert(tensors, "violet").tensors
    assert found["model.connectors.frame_tokens.class_token.table"].tolist() == [1.0, 2.0]
    places = found["model.connectors.frame_tokens.places.table"]
    assert places.shape == (7, 7, 2) and places[0, 1].tolist() == [4.0, 5.0]
    assert found["model.text_encoder.positions.table"].tolist() == [[5.0, 6.0]] * 3


def test_what_no_rule_knows_is_refused_and_never_skipped(tmp_path):
    with pytest.raises(config.ConfigError, match=r"no rule knows surprise\.weight; is it a checkpoint of another kind"):
        published.convert({"surprise.weight": torch.zeros(1)}, "frozen")
    with pytest.raises(config.ConfigError, match=r"--from clap: unknown; known are violet, frozen"):
        published.convert({}, "clap")


class Settings:
    """An object that a training script keeps beside its weights; loading it would copy a file."""

    def __init__(self, source: Path, canary: Path) -> None:
        self.paths = (source, canary)

    def __reduce__(self) -> tuple:
        return (shutil.copyfile, tuple(str(path) for path in self.paths), {"path": self.paths[0]})


def test_objects_beside_the_tensors_are_left_out_and_never_made(tmp_path):
    (tmp_path / "source").write_text("")
    found = {"state_dict": {"module.vid_proj.0.bias": torch.ones(2)}, "monitor_best": np.float64(1)}
    torch.save(found | {"config": Settings(tmp_path / "source", tmp_path / "canary")}, tmp_path / "x.pth")
    assert published.import_file(tmp_path / "x.pth", "frozen").tensors["model.video_projection.bias"].tolist() == [1, 1]
    assert not (tmp_path / "canary").exists()


def test_files_are_read_under_their_wrappers(tmp_path):
    save_file({"module.token_type_embeddings.weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    found = published.import_file(tmp_path / "x.safetensors", "all_in_one")
    assert list(found.tensors) == ["model.stream.types.weight"] and not found.left_out


def test_the_command_writes_what_a_run_starts_from(tmp_path):
    save_file({"text_projection.weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    words = ["import", "--from", "hf_clip", str(tmp_path / "x.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run([sys.executable, "scripts/convert.py", *words], capture_output=True, text=True, check=True)
    assert "1 tensors, 0 left out" in done.stdout
    assert list(load_file(tmp_path / "out.safetensors")) == ["model.text_projection.weight"]
    words[-2] = str(tmp_path / "absent")
    done = subprocess.run([sys.executable, "scripts/convert.py", *words], capture_output=True, text=True)
    assert done.returncode == 78 and "absent' does not exist" in done.stderr and "Traceback" not in done.stderr
