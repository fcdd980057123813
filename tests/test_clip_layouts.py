"""Two towers in the layouts of CLIP. Axes: B clips, T frames, L words."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_published import batch, ours
from torch import nn
from transformers import CLIPModel

from vlp import config
from vlp.forward import ForwardPass
from vlp.training import clip_layouts, published
from vlp.training.state import once

PIXELS = config.load(["+experiment=clip"]).model


def random_system():
    torch.manual_seed(3)
    system = ours()
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    system.model.eval()
    return system


@torch.no_grad()
def test_transformers_loads_what_is_written_and_gives_the_same_logits(tmp_path):
    system, data = random_system(), batch()
    clip_layouts.save(clip_layouts.written(system.model, "hf_clip", PIXELS), tmp_path)
    loaded, facts = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    one = data._replace(frames=data.frames[:, :1], frame_mask=data.frame_mask[:, :1], times_s=data.times_s[:, :1])
    forward = ForwardPass(system.model, one, system.graph)
    expected = forward.take("logit_scale") * forward.take("video_embed") @ forward.take("text_embed").T
    pixels = forward.take("pixels")[:, 0]
    got = loaded(input_ids=data.text_ids, attention_mask=data.text_mask.long(), pixel_values=pixels).logits_per_image
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    stated = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stated["image_mean"] == list(PIXELS.mean) and stated["crop_size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize("kind", ["hf_clip", "open_clip"])
def test_import_of_what_is_written_is_the_model(kind, tmp_path):
    model = random_system().model
    made = clip_layouts.written(model, kind, PIXELS)
    clip_layouts.save(made, tmp_path)
    found = published.import_file(tmp_path / made.weights, kind)
    own = once(nn.ModuleDict({"model": model}))
    assert found.tensors.keys() == own.keys() and not found.left_out
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in own.items())


def test_open_clips_names_and_sizes(tmp_path):
    """Names and settings as open_clip 3.3 defines them."""
    clip_layouts.save(clip_layouts.written(random_system().model, "open_clip", PIXELS), tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    assert tensors["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (72, 24)
    assert tensors["transformer.resblocks.0.attn.in_proj_bias"].shape == (48,) and tensors["visual.proj"].shape == (
        24,
        12,
    )
    stated = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    assert stated["quick_gelu"] and stated["text_cfg"]["eos_id"] == 29 and stated["vision_cfg"]["head_width"] == 8


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("languagebind", "video: TemporalBlock has no place in this layout"),
        ("vidla", "video: SpaceTimeVit has no place"),
        ("quickstart", "video: "),
        ("all_in_one", "model: Unified is no pair of towers"),
        ("mevtr", r"model\.video_pool: .* has no place"),
    ],
)
def test_what_the_layout_cannot_say_is_refused_by_name(experiment, message, place):
    from vlp.training.assemble import assemble

    cfg = config.load([f"+experiment={experiment}", "+scale=tiny", f"paths.data={place}"])
    with pytest.raises(config.ConfigError, match=rf"--to open_clip: {message}"):
        clip_layouts.written(assemble(cfg).model, "open_clip", cfg.model)


def test_two_activations_are_one_too_many_for_open_clip():
    system = random_system()
    system.model.text_encoder.model.config.hidden_act = "gelu"
    with pytest.raises(config.ConfigError, match="one activation is QuickGELU and the other is not"):
        clip_layouts.written(system.model, "open_clip", PIXELS)


@pytest.mark.slow
def test_the_command_writes_a_folder_that_loads(place, tmp_path):
    from tiny_runs import overrides

    from vlp.training import launch
    from vlp.training.exits import Exit

    small = ["video.name=vit_base_patch32_clip_quickgelu_224.openai", "trainer.max_steps=1"]
    words = overrides(place, "towers", *small)
    assert launch.main(["+experiment=clip", *words[1:]]) == Exit.DONE
    command = [
        sys.executable,
        "scripts/convert.py",
        "export",
        "--to",
        "hf_clip",
        str(place / "runs/towers"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "left out: nothing" in done.stdout, done.stderr
    assert (tmp_path / "out/tokenizer.json").exists()
    assert CLIPModel.from_pretrained(tmp_path / "out").logit_scale.shape == ()
