"""Towers of other modalities: what of them is trained, and that sound is learnt from."""

import numpy as np
import pytest
import torch
from tiny_runs import overrides
from tones import tone, with_sound

import vlp
from vlp import config
from vlp.data.decode import decode
from vlp.data.index import ShardIndex, index_url, read_part
from vlp.data.scene import scene
from vlp.data.sound import LogMel
from vlp.data.soundtrack import RATE, soundtrack
from vlp.data.synthetic import World
from vlp.layers.low_rank import adapted
from vlp.planning.system import build
from vlp.training import launch
from vlp.training.exits import Exit

WORDS = {"low": 300.0, "middle": 900.0, "high": 2700.0}
KINDS = [
    (f"a {pitch} {way} tone", hertz, beep)
    for pitch, hertz in WORDS.items()
    for way, beep in (("steady", None), ("beeping", 0.125))
]


def trained(experiment: str) -> dict[str, torch.nn.Parameter]:
    planned = build(config.load([f"+experiment={experiment}"]))
    return {name: p for name, p in planned.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("experiment", "millions", "layers"),
    [
        ("languagebind_lora", 3.146, 48),  # 24 layers x 4 projections x 2 x 16 x 1024, as published
        ("languagebind_depth", 0.393, 48),
        ("languagebind_thermal", 0.393, 48),
        ("languagebind_audio", 3.146, 48),
    ],
)
def test_products_of_low_rank_have_their_published_size_and_little_else_is_trained(experiment, millions, layers):
    names = trained(experiment)
    products = {name: p for name, p in names.items() if ".lora_" in name}
    assert len(products) == 2 * layers
    assert sum(p.numel() for p in products.values()) / 1e6 == pytest.approx(millions, rel=1e-3)
    rest = {name.removeprefix("model.") for name in names.keys() - products.keys()}
    norm = {f"video_encoder.norm.{kind}" for kind in ("weight", "bias")}
    assert rest == {"video_encoder.cls_token", *norm, "video_projection.weight", "temperature.value"}


def test_a_spectrogram_of_126_by_1036_has_9_by_74_cells():
    planned = build(config.load(["+experiment=languagebind_audio"]))
    encoder = planned.system.model.video_encoder
    assert encoder.patch_embed.grid_size == (9, 74) and encoder.pos_embed.shape == (1, 1 + 666, 1024)
    assert len(adapted(planned.module)) == 48


def test_sources_of_another_modality_are_refused():
    with pytest.raises(
        config.ConfigError, match=r"data\.sources\.vidal\.modality: 'audio' is not what clips show; set modality=audio"
    ):
        config.load(["+experiment=languagebind_depth", "data.sources.vidal.modality=audio"])


def test_the_world_can_be_heard(tmp_path):
    world = World(root=str(tmp_path), num_train=3, num_test=1, size=32, num_frames=8, fps=8.0, shows="audio")
    world.prepare()
    index = ShardIndex.load(index_url(world.shards("train")[0]))
    video = read_part(index, 1, "video")
    assert decode(video, np.array([0.2]), short_side=None).frames.shape == (1, 32, 32, 3)
    clip = scene(0, 1, "train", duration_s=1.0)
    wave = soundtrack(clip)
    assert len(wave) == RATE and 0.01 < np.abs(wave).max() < 1
    picture = LogMel(num_mel=32, num_steps=98)(video, np.array([0.0]), short_side=None).frames[0, ..., 0]
    from vlp.data.sound import levels, log_mel

    expected = levels(log_mel(torch.from_numpy(wave), num_mel=32))[..., 0]
    assert np.corrcoef(picture.flatten(), expected.flatten())[0, 1] > 0.7


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Six kinds of sound, sixteen clips of each, pitches a little apart."""
    folder, draw = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for number in range(16 * len(KINDS)):
        caption, hertz, beep = KINDS[number % len(KINDS)]
        wave = tone(hertz * draw.uniform(0.85, 1.15), 2.0, beep_s=beep)
        (folder / f"clip{number:03d}.mp4").write_bytes(with_sound(wave * draw.uniform(0.5, 1.5)))
        (folder / f"clip{number:03d}.txt").write_text(caption)
    return folder


@pytest.mark.slow
def test_sound_is_learnt_from_its_spectrogram(tones, place, tmp_path):
    words = [word for word in overrides(place, "tones") if not word.startswith(("data.sources.world", "+experiment"))]
    own = ["data=my_videos", f"data.videos={tones}", "adapter.low_rank=null", "optim.freeze=[]"]
    own += ["trainer.max_steps=90", "data.batch_size=24", "optim.lr=1e-3", "schedule.warmup_steps=5"]
    own += ["trainer.checkpoint_every=90", "trainer.log_every=20", "tokenizer.vocab_size=64"]
    assert launch.main(["+experiment=languagebind_audio", *words, *own]) == Exit.DONE
    model, draw = vlp.load(place / "runs" / "tones"), np.random.default_rng(1)
    paths = []
    for number, (_, hertz, beep) in enumerate(3 * KINDS):
        paths.append(tmp_path / f"{number}.mp4")
        paths[-1].write_bytes(with_sound(tone(hertz * draw.uniform(0.9, 1.1), 2.0, beep_s=beep)))
    found = model.similarity(paths, [caption for caption, _, _ in KINDS]).argmax(1)
    right = (found == torch.arange(len(paths)) % len(KINDS)).float().mean()
    assert right > 0.4  # chance is 1 / 6
