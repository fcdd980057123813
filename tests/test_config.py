"""Composition and checks of configs: every mistake is one line that names the fix, and nothing runs before it."""

import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vlp import config

TEMPERATURE = "vlp.layers.temperature.Temperature"
PART = f"{{_target_: {TEMPERATURE}}}"
TRAIN = f"""
defaults: [_self_, schedule: constant, objective: [contrastive], data: world]
fusion: null
decoder: null
connector: {{}}
view: {{}}
objective: {{}}
logger: {{}}
run: {{name: run, seed: 0, tiny: false, resume: true, stop_after: null,
  allow: [], hold_after: 3}}
trainer: {{max_steps: 9, accumulate: 1, precision: 32-true, strategy: auto, devices: 1, num_nodes: 1, log_every: 1,
  zero: {{offload_optimizer: false, offload_parameters: false, bucket_elements: 9, persistent_elements: 0}},
  clip_grad_norm: 1.0, nan_policy: stop, max_skipped_steps: 0,
  max_rewinds: 3, spike_factor: null, spike_window: 10, spike_policy: skip, timeout_s: 9, max_time_s: null,
  check_replicas_every: null, ledger: false, bad_sample_budget: 0.1, checkpoint_every: 1,
  keep_checkpoints: 2, checkpoint_async: true, compile: false,
  checkpoint_activations: false, num_threads: null, progress_bar: false}}
adapter: {{}}
clip: {{modality: video, decoder: {PART}, width: 8, num_frames: 4, size: 8, short_side: 10, more_clips: 0,
  sampling_train: {PART}, sampling_test: {PART},
  transforms_train: [{PART}], transforms_test: []}}
tokenizer: {{name: null, revision: null, vocab_size: 7, max_length: 5, pad_id: 0, bos_id: 2, eos_id: 3, mask_id: 4}}
video: {{_target_: vlp.objectives.masked_words.MaskedWords, dim: 3, vocab_size: "${{tokenizer.vocab_size}}"}}
text: {PART}
texts: {PART}
model: {{_target_: {TEMPERATURE}, init: 0.1}}
optim: {{lr: 0.1, betas: [0.9, 0.98], eps: 1.0e-8, weight_decay: 0.1, layer_decay: null, lr_factors: {{}}, freeze: [],
  ema_decay: null}}
eval: {{every: null, batch_size: 4, tasks: {{}}}}
paths: {{runs: runs, data: data}}
init: {{run: null, skip: [], rename: {{}}}}
cluster: {{nodes: 1, gpus_per_node: 1, gpu: h100, cores_per_node: 8, utilisation: 0.3, network_gb_s: null, num_clips: 9,
  epochs: null, launch_us: 5.0, stored_as: x, storage_kinds: {{}}, reserved_gib: 1.0, gpu_mtbf_hours: 9.0,
  save_stall_s: 1.0, save_write_s: 1.0, restart_s: 1.0}}
"""
DATA = "{batch_size: 4, num_lanes: 2, window_shards: 1, bucket_steps: 1, num_workers: 0, captions: null, holdout: 0.0"
DATA += ", decode_timeout_s: 9, outage_s: 9, worker_memory_gib: 9.0"
DATA += ", balance: false, index_dir: i, cache_dir: null, cache_gib: 1.0"
FILES = {
    "train": TRAIN,
    "schedule/constant": "_target_: vlp.training.optim.Constant\nwarmup_steps: 2\n",
    "schedule/cosine": "_target_: vlp.training.optim.Cosine\n",
    "objective/contrastive": "# @package objective\ncontrastive: {_target_: vlp.objectives.contrastive.Contrastive}\n",
    "objective/captioning": "# @package objective\ncaptioning: {_target_: vlp.objectives.captioning.Captioning}\n",
    "data/world": f"{DATA}, videos: null, sources: {{w: {PART}}}}}\n",
    "data/mine": f"{DATA}, videos: '???', sources: {{w: {{_target_: {TEMPERATURE}, init: '${{data.videos}}'}}}}}}\n",
    "experiment/long": "# @package _global_\ntrainer: {max_steps: 500}\n",
    "scale/tiny": "# @package _global_\ntrainer: {max_steps: 2}\n",
}


@pytest.fixture
def conf(tmp_path) -> Path:
    for name, text in FILES.items():
        write(tmp_path, name, text)
    return tmp_path


def write(conf: Path, name: str, text: str) -> None:
    path = conf / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def messages(conf: Path, *overrides: str, experiment: str = "") -> list[str]:
    """Return what is wrong; `experiment` is the text of an experiment file that is chosen."""
    if experiment:
        write(conf, "experiment/x", f"# @package _global_\n{experiment}\n")
        overrides = ("+experiment=x", *overrides)
    with pytest.raises(config.ConfigError) as error:
        config.load(overrides, conf=conf)
    assert all("\n" not in message for message in error.value.messages)
    return error.value.messages


def test_a_good_config_loads_and_its_parts_are_built(conf):
    cfg = config.load(["objective=[contrastive,captioning]", "trainer.max_steps=3", "schedule=cosine"], conf=conf)
    assert cfg.trainer.max_steps == 3 and list(cfg.objective) == ["contrastive", "captioning"]
    assert config.build(cfg.schedule)(0, 10) == 1.0 and config.build(cfg.video).head[-1].out_features == 7


def test_an_unknown_key_on_the_command_line_is_refused_with_the_nearest(conf):
    assert messages(conf, "trainer.max_stpes=4") == [
        "trainer.max_stpes: unknown key 'max_stpes'. Did you mean 'max_steps'?"
    ]


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("trainer: {max_stpes: 4}", "trainer.max_stpes: unknown key 'max_stpes'. Did you mean 'max_steps'?"),
        ("trainre: {max_steps: 4}", "trainre: unknown key 'trainre'. Did you mean 'trainer'?"),
        ("eval: {taks: {}}", "eval.taks: unknown key 'taks'. Did you mean 'tasks'?"),
        ("paths: {qqqq: 1}", "paths.qqqq: unknown key 'qqqq'; known: runs, data."),
        ("trainer: 5", "trainer: expected a section with keys, got 5."),
        ("view: null", "view: expected named parts, got None; write {} for none."),
        ("view: [1]", "In 'experiment/x': ConfigTypeError raised while composing config: Cannot merge DictConfig with"),
    ],
)
def test_an_unknown_key_inside_an_experiment_is_refused(conf, experiment, message):
    (found,) = messages(conf, experiment=experiment)
    assert found.startswith(message)


def test_an_argument_that_no_file_sets_may_be_given_without_a_plus(conf):
    assert config.load(["text.max_temperature=2.0"], conf=conf).text.max_temperature == 2.0
    assert messages(conf, "text.max_temperatur=2.0")[0].endswith("Did you mean 'max_temperature'?")


def test_an_unknown_key_that_is_added_with_a_plus_is_refused(conf):
    assert messages(conf, "+trainer.max_stpes=4")[0].startswith("trainer.max_stpes: unknown key 'max_stpes'.")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=abc", "trainer.max_steps: 'abc' has the wrong type; expected int."),
        ("trainer.max_steps=1.5", "trainer.max_steps: 1.5 has the wrong type; expected int."),
        ("trainer.max_steps=true", "trainer.max_steps: True has the wrong type; expected int."),
        ("trainer.max_steps=null", "trainer.max_steps: None has the wrong type; expected int."),
        ("run.resume=5", "run.resume: 5 has the wrong type; expected bool."),
        ("optim.lr=fast", "optim.lr: 'fast' has the wrong type; expected float."),
        ("optim.betas=0.9", "optim.betas: 0.9 has the wrong type; expected list of float."),
        ("optim.betas=[0.9,x]", "optim.betas: [0.9, 'x'] has the wrong type; expected list of float."),
        ("optim.freeze=[1]", "optim.freeze: [1] has the wrong type; expected list of str."),
        ("+optim.lr_factors.text=x", "optim.lr_factors: {'text': 'x'} has the wrong type; expected dict of str to"),
        ("trainer.devices=[1]", "trainer.devices: [1] has the wrong type; expected int or str."),
        ("tokenizer.name=5", "tokenizer.name: 5 has the wrong type; expected str or null."),
        ("video=5", "video: 5 has the wrong type; expected a part with a '_target_'."),
        ("video=null", "video: None has the wrong type; expected a part with a '_target_'."),
        ("+fusion.dim=5", "fusion: {'dim': 5} has the wrong type; expected a part with a '_target_' or null."),
        (
            "clip.transforms_test=[{size: 4}]",
            "clip.transforms_test: [{'size': 4}] has the wrong type; expected list of",
        ),
        ("eval.tasks={a: {b: 1}}", "eval.tasks.a: a part needs a '_target_', the class that is built; got {'b': 1}."),
        (f"trainer.max_steps={{_target_: {TEMPERATURE}}}", f"trainer.max_steps: {{'_target_': '{TEMPERATURE}'}} has"),
    ],
)
def test_a_wrong_type_is_refused(conf, override, message):
    (found,) = messages(conf, override)
    assert found.startswith(message)


SHORT = r"\bT\b"  # stands for TEMPERATURE


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("{_target_: T, int: 0.1}", "text.int: T has no parameter 'int'. Did you mean 'init'?"),
        ("{_target_: T, init: x}", "text.init: 'x' has the wrong type; T takes float."),
        ("{_target_: T, _args_: [1]}", "text._args_: T has no parameter '_args_'; known: init, min_temperature, "),
        ("{_target_: T, facts: 5}", "text.facts: 5 has the wrong type; expected dict of str to anything or null."),
        ("{_target_: vlp.objectives.matching.Matching}", "text.dim: vlp.objectives.matching.Matching needs a value"),
        ("{_target_: vlp.views.Tubes, ratio: null}", "text.ratio: None has the wrong type; vlp.views.Tubes takes"),
        ("{_target_: vlp.views.Tubse}", "text._target_: 'vlp.views' has no 'Tubse'. Did you mean 'Tubes'?"),
        ("{_target_: vlp.veiws.Tubes}", "text._target_: there is no module 'vlp.veiws'."),
        (
            "{_target_: vlp.views.MaskPatches, patch_size: 4, pattern: {_target_: vlp.views.Tubes, ration: 1}}",
            "text.pattern.ration: vlp.views.Tubes has no parameter 'ration'. Did you mean 'ratio'?",
        ),
        (
            "{_target_: vlp.views.MaskPatches, patch_size: 4, pattern: null}",
            "text.pattern: None has the wrong type; vlp.views.MaskPatches takes Pattern.",
        ),
    ],
)
def test_wrong_arguments_of_a_target_are_refused(conf, node, message):
    found = messages(conf, experiment=f"text: {re.sub(SHORT, TEMPERATURE, node)}")
    assert found[0].startswith(re.sub(SHORT, TEMPERATURE, message))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load_state_dict_from_url",
        "vlpx.evil.Thing",
        "vlp",
        "",
        "vlp.",
        "vlp..config.Root",
        "vlp.config.Root; import os",
        "vlp.data.shards.os.system",  # through what a module imports
        "vlp.config.os.system",
        "vlp.config.importlib",
        "vlp.config.compose",
        "vlp.config.Path",
        "vlp.config.CONF",
        "vlp.config.load",  # ours, but no part: a function
        "vlp.training.run_dir.write_json",
        "vlp.config.Root.__init__",
        "torch.nn.modules.module.torch",
    ],
)
def test_targets_outside_the_allow_list_are_refused(conf, target):
    found = messages(conf, experiment=f"text: {{_target_: '{target}'}}")
    assert len(found) == 1 and found[0].startswith("text._target_: ")
    assert "VLP_ALLOW=os" not in found[0] and "VLP_ALLOW=builtins" not in found[0]


@pytest.mark.parametrize("target", ["5", "null", "[os.system]", "{a: 1}"])
def test_targets_that_are_no_text_are_refused(conf, target):
    assert any("text._target_: " in message for message in messages(conf, experiment=f"text: {{_target_: {target}}}"))


@pytest.fixture
def own_package(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("own")
    (directory / "own_parts.py").write_text("class Part:\n    pass\n\ndef make(*, size):\n    return size\n")
    monkeypatch.syspath_prepend(directory)
    yield "own_parts"
    sys.modules.pop("own_parts", None)


def test_nothing_is_imported_before_the_name_is_checked(conf, own_package):
    (message,) = messages(conf, experiment="text: {_target_: own_parts.Part}")
    assert "set VLP_ALLOW=own_parts in the environment" in message and "own_parts" not in sys.modules


def test_a_package_that_the_environment_allows_is_used(conf, own_package, monkeypatch):
    monkeypatch.setenv("VLP_ALLOW", "other, own_parts")
    cfg = config.load(["text={_target_: own_parts.make, size: 3}"], conf=conf)
    assert config.build(cfg.text) == 3


def test_a_config_cannot_allow_a_package_itself(conf, own_package):
    found = messages(conf, "+run.VLP_ALLOW=own_parts", experiment="text: {_target_: own_parts.Part}")
    assert found[-1].startswith("text._target_: 'own_parts.Part' is outside the allowed packages")


REQUIRED = "{0}: a value is required; give it on the command line: {0}=VALUE."


def test_a_required_value_is_asked_for_once_also_where_others_refer_to_it(conf):
    assert messages(conf, "data=mine") == [REQUIRED.format("data.videos")]


@pytest.mark.parametrize("path", ["text.init", "run.seed", "schedule.warmup_steps", "objective.contrastive.weight"])
def test_a_required_value_of_any_place_is_asked_for(conf, path):
    assert messages(conf, f"++{path}=???") == [REQUIRED.format(path)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule=cosin", "schedule=cosin: there is no conf/schedule/cosin.yaml. Did you mean 'cosine'?"),
        ("objective=[contrastive,caption]", "objective=caption: there is no conf/objective/caption.yaml. Did you mean"),
        ("+experiment=lnog", "experiment=lnog: there is no conf/experiment/lnog.yaml. Did you mean 'long'?"),
        ("schedule=zzz", "schedule=zzz: there is no conf/schedule/zzz.yaml; known: constant, cosine."),
    ],
)
def test_an_unknown_choice_of_a_group_is_refused(conf, override, message):
    (found,) = messages(conf, override)
    assert found.startswith(message)


def test_an_unknown_choice_inside_an_experiment_is_refused(conf):
    found = messages(conf, experiment="defaults: [override /schedule: cosin]")
    assert found == ["schedule=cosin: there is no conf/schedule/cosin.yaml. Did you mean 'cosine'?"]


def test_yaml_that_cannot_be_read_is_refused_with_its_place(conf):
    (message,) = messages(conf, experiment="trainer: {max_steps: 3\nrun: [")
    assert "experiment/x.yaml" in message and "line 3" in message


@pytest.mark.parametrize("override", ["a==b", "=", "video=5", "trainer.max_steps"])
def test_overrides_that_hydra_cannot_read_are_one_line(conf, override):
    assert len(messages(conf, override)) == 1


def test_everything_wrong_is_reported_at_once(conf):
    overrides = ["schedule=cosin", "trainer.max_stpes=1", "optim.lr=abc", "text.int=4", "run.seed=???"]
    found = messages(conf, *overrides, experiment="eval: {btach_size: 3}\nview: {v: {_target_: os.system}}")
    starts = ["schedule=cosin:", "trainer.max_stpes:", "text.int:", "optim.lr:", "view.v._target_:"]
    starts += ["eval.btach_size:", "run.seed:"]
    assert all(any(message.startswith(start) for message in found) for start in starts) and len(found) == 7


@pytest.mark.parametrize("overrides", [["+scale=tiny", "+experiment=long"], ["experiment=long", "scale=tiny"]])
def test_a_scale_changes_the_experiment_whatever_the_order(conf, overrides):
    assert config.load(overrides, conf=conf).trainer.max_steps == 2


def test_the_command_line_has_the_last_word(conf):
    assert config.load(["trainer.max_steps=7", "+scale=tiny"], conf=conf).trainer.max_steps == 7


def test_the_command_line_has_the_last_word_over_the_small_size_of_a_part(conf):
    schedule = "_target_: vlp.training.optim.Constant\nwarmup_steps: 2\ntiny: {warmup_steps: 1}\n"
    write(conf, "schedule/constant", schedule)
    assert config.load(["run.tiny=true"], conf=conf).schedule.warmup_steps == 1
    assert config.load(["run.tiny=true", "schedule.warmup_steps=9"], conf=conf).schedule.warmup_steps == 9
    assert config.load(["run.tiny=false"], conf=conf).schedule.warmup_steps == 2


@pytest.mark.parametrize("override", ["view=[]", "view=null", "fusion=null", "experiment=null"])
def test_optional_groups_may_be_left_out(conf, override):
    write(conf, "view/tubes", f"# @package view\nt: {PART}\n")
    write(conf, "fusion/joint", f"_target_: {TEMPERATURE}\n")
    write(conf, "train", TRAIN.replace("data: world]", "data: world, view: [tubes], fusion: joint]"))
    config.load([override], conf=conf)
    assert config.load([], conf=conf).view.t is not None and config.load(["fusion=null"], conf=conf).fusion is None


CANARY = "s3cret-canary"


@pytest.mark.parametrize(
    "experiment",
    [
        "run: {name: '${oc.env:VLP_CANARY}'}",
        "run: {name: 'a${oc.env:VLP_CANARY,x}'}",
        "run: {name: '${oc.decode:${oc.env:VLP_CANARY}}'}",
        "run: {name: '${oc.select:paths.runs}'}",
        "run: {name: '${now:%Y}'}",
        "run: {name: '${hydra:runtime.cwd}'}",
        "paths: {runs: 'oc.env'}\nrun: {name: '${${paths.runs}:VLP_CANARY}'}",
        "paths: {runs: 'oc.env:VLP_CANARY'}\nrun: {name: '${${paths.runs}}'}",
        "clip: {transforms_test: [{_target_: '${oc.env:VLP_CANARY}'}]}",
        "paths: {runs: '$', data: '${paths.runs}{oc.env:VLP_CANARY}'}",  # whole only once it is put together
        "defaults: [override /schedule: '${oc.env:VLP_CANARY}']",
        "defaults: ['/schedule/${oc.env:VLP_CANARY}']",
    ],
)
def test_no_config_reads_the_environment(conf, experiment, monkeypatch):
    monkeypatch.setenv("VLP_CANARY", CANARY)
    found = messages(conf, experiment=experiment)
    assert len(found) == 1 and CANARY not in found[0] and str(Path.cwd()) not in found[0]


def test_no_override_reads_the_environment(conf, monkeypatch):
    monkeypatch.setenv("VLP_CANARY", CANARY)
    found = messages(conf, "run.name=${oc.env:VLP_CANARY}", "schedule=${oc.env:VLP_CANARY}")
    assert found and not any(CANARY in message for message in found)
    assert OmegaConf.create({"a": "${oc.env:VLP_CANARY}"}).a == CANARY  # others may still use it


def test_the_refusal_of_a_resolver_says_what_is_allowed(conf):
    (message,) = messages(conf, "run.name=${oc.env:HOME}")
    assert message.startswith("run.name: '${oc.env:HOME}' is more than a reference;")
    assert message.endswith("; a config may only refer to its own values, as ${section.key}.")


def test_a_reference_to_a_part_that_is_left_out_says_so(conf):
    assert messages(conf, experiment="objective: {contrastive: {dim: '${fusion.dim}'}}") == [
        "objective.contrastive.dim: refers to fusion.dim, but fusion is left out; leave this out too, or choose one."
    ]


@pytest.mark.parametrize("reference", ["${optim.rl}", "${optim.lr}"])
def test_references_that_lead_nowhere_are_refused(conf, reference):
    assert messages(conf, experiment=f"optim: {{lr: '{reference}'}}")[0].startswith("optim.lr: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps: 0 is not possible; it must be at least 1."),
        ("run.stop_after=0", "run.stop_after: 0 is not possible; it must be at least 1."),
        ("eval.every=-1", "eval.every: -1 is not possible; it must be at least 1."),
        ("data.num_workers=-1", "data.num_workers: -1 is not possible; it must be 0 or more."),
        ("data.decode_timeout_s=0", "data.decode_timeout_s: 0 is not possible; it must be above 0."),
        ("clip.more_clips=-1", "clip.more_clips: -1 is not possible; it must be 0 or more."),
        ("optim.lr=0.0", "optim.lr: 0.0 is not possible; it must be above 0."),
        ("optim.lr=nan", "optim.lr: nan is not possible; it must be above 0."),
        ("trainer.clip_grad_norm=0", "trainer.clip_grad_norm: 0 is not possible; it must be above 0."),
        ("trainer.bad_sample_budget=1.5", "trainer.bad_sample_budget: 1.5 is not possible; it must be between 0"),
        ("optim.layer_decay=1.5", "optim.layer_decay: 1.5 is not possible; it must be above 0 and at most 1."),
        ("optim.ema_decay=1.0", "optim.ema_decay: 1.0 is not possible; it must be above 0 and below 1."),
        ("optim.betas=[0.9]", "optim.betas: [0.9] is not possible; write two numbers of at least 0 and below 1."),
        ("optim.betas=[0.9,1.0]", "optim.betas: [0.9, 1.0] is not possible; write two numbers of at least 0"),
        ("trainer.nan_policy=ignore", "trainer.nan_policy: 'ignore' is not known; use one of stop, skip, rewind."),
        ("trainer.strategy=zero9", "trainer.strategy: 'zero9' is not known; use one of "),
        ("trainer.precision=fp8", "trainer.precision: 'fp8' is not known; use one of "),
        ("data.num_lanes=3", "data.num_lanes: 3 does not divide data.batch_size=4; set data.num_lanes to one of 1, 2"),
        ("clip.short_side=7", "clip.short_side: 7 is below clip.size=8; set it to at least clip.size."),
        ("objective=[]", "objective: nothing to train on; choose at least one, for example objective=[contrastive]."),
        ("objective.contrastive=null", "objective: nothing to train on"),
    ],
)
def test_impossible_values_are_refused(conf, override, message):
    (found,) = messages(conf, override)
    assert found.startswith(message)


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "a b", "x;rm", "$(id)", "", "a\nb", "é", "a" * 129])
def test_run_names_that_are_no_file_names_are_refused(conf, name):
    cfg = OmegaConf.merge(config.load([], conf=conf), {"run": {"name": name}})
    (message,) = config.check(cfg)
    assert message.startswith("run.name: ")


NAME, LANES = "run.name: 'a b' is no name;", "data.num_lanes: 3 does not divide data.batch_size=4;"


@pytest.mark.parametrize(
    ("words", "experiment", "others"),
    [
        (["trainer.max_stpes=4"], "", ["trainer.max_stpes: unknown key"]),
        (["optim.lr=x", "optim.betas=y"], "", ["optim.lr: 'x' has the wrong type;", "optim.betas: 'y' has"]),
        (["data=mine"], "", ["data.videos: a value is required;"]),
        (["schedule=cosin"], "", ["schedule=cosin: there is no conf/schedule/cosin.yaml"]),
        ([], "text: {_target_: os.system}", ["text._target_: 'os.system' is outside the allowed packages"]),
        ([], "trainer: 5", ["trainer: expected a section with keys, got 5."]),
        ([], "data: {sources: {w: 3}}", ["data.sources.w: a part needs a '_target_'"]),
        ([], "optim: {lr: '${optim.rl}', betas: ['${optim.lr}', 0.9]}", ["optim.lr: Interpolation key 'optim.rl'"]),
        (
            [],
            "video: {dim: '${fusion.dim}', vocab_size: x}",
            ["video.dim: refers to fusion.dim", "video.vocab_size: 'x' has"],
        ),
        (["optim.lr=${oc.env:HOME}"], "", ["optim.lr: '${oc.env:HOME}' is more than a reference;"]),
        (["trainer.max_steps=0", "objective=[]"], "", ["trainer.max_steps: 0 is not", "objective: nothing to train"]),
    ],
)
def test_mistakes_of_every_kind_come_in_one_go(conf, words, experiment, others):
    found = messages(conf, "run.name='a b'", "data.num_lanes=3", *words, experiment=experiment)
    expected = sorted([NAME, LANES, *others])
    assert [line[: len(start)] for start, line in zip(expected, sorted(found), strict=True)] == expected


def test_nothing_is_divided_by_zero_lanes(conf):
    assert messages(conf, "data.num_lanes=0") == ["data.num_lanes: 0 is not possible; it must be at least 1."]


@pytest.mark.parametrize("name", ["a", "My-run_1.0", "lr=0.1,seed=+3", "a" * 128])
def test_run_names_of_plain_characters_are_fine(conf, name):
    assert config.check(OmegaConf.merge(config.load([], conf=conf), {"run": {"name": name}})) == []


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("weight", "2", True),
        ("weight", "heavy", False),
        ("weight", "null", False),
        ("inputs", "{video: fused, text: [a, b]}", True),
        ("inputs", "{video: 5}", False),
        ("inputs", "fused", False),
        ("wieght", "2", False),
    ],
)
def test_weight_and_inputs_of_an_objective_are_typed(conf, key, value, good):
    override = f"++objective.contrastive.{key}={value}"
    if good:
        config.load([override], conf=conf)
    else:
        assert messages(conf, override)[0].startswith(f"objective.contrastive.{key}: ")


def test_weight_is_no_key_of_other_parts(conf):
    assert "has no parameter 'weight'" in messages(conf, "+text.weight=1.0")[0]


def test_build_makes_inner_parts_first():
    pattern = {"_target_": "vlp.views.Tubes", "ratio": 0.5}
    view = config.build(OmegaConf.create({"_target_": "vlp.views.MaskPatches", "patch_size": 4, "pattern": pattern}))
    assert view.pattern.ratio == 0.5 and view.patch_size == 4


def test_build_of_a_partial_part_waits_for_the_rest():
    make = config.build({"_target_": "vlp.objectives.matching.Matching", "_partial_": True})
    assert isinstance(make, functools.partial) and make(dim=3).head.in_features == 3


def test_build_refuses_targets_that_were_never_checked():
    inner = {"_target_": "os.getpid"}
    for node in ({"_target_": "os.system", "command": "true"}, {"_target_": TEMPERATURE, "init": inner}):
        with pytest.raises(config.ConfigError, match="is outside the allowed packages"):
            config.build(node, "text")
    with pytest.raises(config.ConfigError, match=r"text.int: .* Did you mean 'init'?"):
        config.build({"_target_": TEMPERATURE, "int": 0.1}, "text")


def test_build_reports_a_refused_value_with_its_path():
    inner = {"_target_": "vlp.views.Tubes", "ratio": 7.0}
    with pytest.raises(config.ConfigError, match=r"^view.p.pattern: ratio=7.0 is not a share"):
        config.build({"_target_": "vlp.views.MaskPatches", "patch_size": 4, "pattern": inner}, "view.p")


@pytest.mark.parametrize(("stated", "true"), [(8, 4), (4, 4)])
def test_build_compares_facts_with_what_was_built(stated, true):
    pattern = {"_target_": "vlp.views.Tubes", "ratio": 0.5}
    node = {"_target_": "vlp.views.MaskPatches", "patch_size": 4, "pattern": pattern, "facts": {"patch_size": stated}}
    if stated == true:
        assert config.build(node).patch_size == true
    else:
        with pytest.raises(config.ConfigError, match=r"view.facts.patch_size: the config says 8, the part has 4"):
            config.build(node, "view")


def test_build_hands_plain_maps_on_unchanged(own_package, monkeypatch):
    monkeypatch.setenv("VLP_ALLOW", "own_parts")
    settings = {"facts": 1, "_partial_": "x", "inner": [{"a": None}]}
    assert config.build({"_target_": "own_parts.make", "size": settings} | {}) == settings


def test_the_shipped_config_loads_with_what_readers_try_first():
    cfg = config.load(["+scale=tiny", "+experiment=quickstart", "run.name=test", "logger=[]"])
    assert cfg.run.name == "test" and cfg.trainer.max_steps == 2
    assert config.load(["fusion=null", "decoder=null", "view=[]"]).fusion is None


def test_the_shipped_config_of_own_videos_asks_for_them():
    with pytest.raises(config.ConfigError) as error:
        config.load(["data=my_videos"])
    assert error.value.messages == [REQUIRED.format("data.videos")]
    assert os.environ.get("VLP_ALLOW") is None and torch.is_grad_enabled()


def test_a_mistake_in_a_part_that_others_refer_to_is_one_line():
    with pytest.raises(config.ConfigError) as caught:
        config.load(["+experiment=quickstart", "video.widhts=[3]"])
    (line,) = caught.value.messages
    assert line.startswith("video.widhts: ") and "Did you mean 'widths'?" in line
