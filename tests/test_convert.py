"""From a checkpoint to one file and to other libraries' layouts, each compared before it counts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import overrides, train
from torch import nn

from vlp.encoders.text import HuggingFaceText
from vlp.eval import scores
from vlp.report.card import write_card
from vlp.training import evaluate_run, export, state
from vlp.training.exits import Exit

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert.py")
assert SPEC is not None and SPEC.loader is not None
convert = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert)
ONE = ("objective=[contrastive]", "trainer.max_steps=1", "optim.freeze=['model.text_encoder.*']")


@pytest.fixture(scope="module")
def run(place):
    """The directory of a run of one step with frozen parts and averaged weights."""
    assert train(place, "converted", *ONE, "optim.ema_decay=0.5") == Exit.DONE
    return place / "runs" / "converted"


@pytest.mark.parametrize("flags", [[], ["--ema"]])
def test_the_file_holds_every_tensor_of_the_checkpoint(run, tmp_path, capsys, flags):
    out = tmp_path / "new" / "model.safetensors"
    assert convert.main(["export", str(run), str(out), *flags]) == Exit.DONE
    stored, tensors = export.open_source(run).stored, load_file(out)
    expected = {**stored.under("model"), **(stored.under("ema") if flags else {})}
    assert tensors.keys() == expected.keys() and "model.text_encoder.model.embeddings.word_embeddings.weight" in tensors
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert "its outputs are those of the checkpoint" in capsys.readouterr().out
    assert safe_open(out, framework="pt").metadata()["vlp"]


def test_a_file_that_computes_something_else_is_refused_and_gone(run, tmp_path, capsys, monkeypatch):
    spoil = lambda tensors, *args, **kwargs: save_file({n: t + 0.01 for n, t in tensors.items()}, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(export, "save_file", spoil)
    assert convert.main(["export", str(run), str(tmp_path / "bad.safetensors")]) == Exit.BUG
    assert "differs from what the checkpoint gives; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_tensor_is_refused(run, tmp_path):
    (tmp_path / "x").mkdir()
    source = export.open_source(run)
    tensors = dict(list(source.stored.under("model").items())[1:])
    save_file(tensors, tmp_path / "x" / "f.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: missing"):
        export.filled(source.cfg, export.File(tmp_path / "x" / "f.safetensors"), averaged=False, ties=True)


def test_tied_tensors_stand_under_all_their_names_and_fill_the_module_once():
    module = nn.ModuleDict({"words": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    module["head"].weight = module["words"].weight
    assert set(module.state_dict()) == {"words.weight", "head.weight"} and set(state.once(module)) == {"words.weight"}
    assert state.tied_names(module) == {"head.weight": "words.weight"}


def test_the_text_encoder_goes_to_hugging_face_and_back(run, tmp_path, capsys):
    step = next((run / "checkpoints").glob("step-*"))
    assert convert.main(["parts", str(step), str(tmp_path)]) == Exit.DONE
    assert f"text.name={tmp_path / 'text_encoder'}" in capsys.readouterr().out
    system, _ = export.filled(export.open_source(run).cfg, export.open_source(run).stored, averaged=False)
    back = HuggingFaceText(vocab_size=512, pad_id=0, max_length=32, name=str(tmp_path / "text_encoder"))
    for name, value in system.model.text_encoder.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_weights_become_a_run_that_is_evaluated_like_the_one_they_came_from(place, run, tmp_path, capsys):
    weights, tokens = tmp_path / "w.safetensors", f"tokenizer.name={run / 'tokenizer.json'}"
    assert convert.main(["export", str(run), str(weights), "--ema"]) == Exit.DONE
    words = ["run", str(weights), *overrides(place, "of_weights", *ONE, tokens)]
    assert convert.main(words) == Exit.DONE and "python evaluate.py run=" in capsys.readouterr().out
    taken = place / "runs" / "of_weights"
    assert evaluate_run.main([f"run={taken}", "task=retrieval"]) == Exit.DONE
    assert evaluate_run.main([f"run={run}", "task=retrieval"]) == Exit.DONE
    card = write_card(taken).read_text()
    assert "Weights that were not trained here" in card and "experiment: quickstart" in card
    ours, theirs = (next((each / "scores").glob("*.world.retrieval.json")) for each in (taken, run))
    assert scores.read(ours).each == scores.read(theirs).each
    capsys.readouterr()
    assert convert.main(words) == Exit.BAD_CONFIG and "of_weights holds a run already" in capsys.readouterr().err
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    assert convert.main([*words, "run.name=other"]) == Exit.BAD_CONFIG
    assert f"1 tensors are missing, such as {next(iter(tensors))}" in capsys.readouterr().err
    assert not (place / "runs" / "other").exists()


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["export", "nowhere", "x.safetensors"], Exit.BAD_CONFIG, "nowhere: neither a run"),
        (["export", "RUN", "/proc/x/y.safetensors"], Exit.CANNOT_CREATE, "cannot be written"),
    ],
)
def test_mistakes_are_one_line_each(run, capsys, words, code, line):
    assert convert.main([str(run) if word == "RUN" else word for word in words]) == code
    error = capsys.readouterr().err
    assert line in error and "Traceback" not in error
