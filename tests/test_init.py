import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import train, weights
from torch import nn

from vlp import config
from vlp.connectors.frame_tokens import FrameTokens
from vlp.layers.position import LearnedPositions, SpacePositions
from vlp.training import init
from vlp.training.exits import Exit


class Tables(nn.Module):
    def __init__(self, frames, side, words, cells):
        super().__init__()
        self.time_positions = LearnedPositions(length=frames, dim=3)
        self.space_positions = SpacePositions(height=side, width=side, dim=3)
        self.positions = LearnedPositions(length=words, dim=3)
        self.pos_embed = nn.Parameter(torch.randn(1, cells, 3))
        self.head = nn.Linear(3, 2)


def saved(module, path):
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)
    return path


def test_position_tables_are_resized_and_words_keep_their_rows(tmp_path):
    small, large = Tables(4, 2, 5, 1 + 4), Tables(7, 4, 6, 1 + 16)
    last_row = large.positions.table[5].clone()
    report = init.start_from(large, saved(small, tmp_path / "small.safetensors"))
    times, before = large.time_positions.table, small.time_positions.table
    torch.testing.assert_close(times[[0, 2, 6]], before[[0, 1, 3]])  # first stays first, last stays last
    torch.testing.assert_close(large.positions.table[:5], small.positions.table)
    torch.testing.assert_close(large.positions.table[5], last_row)
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])  # the class token
    torch.testing.assert_close(
        large.space_positions.table.mean(), small.space_positions.table.mean(), atol=0.05, rtol=0
    )
    assert report.used == ["head.bias", "head.weight"] and len(report.resized) == 4
    assert "time_positions.table: [4, 3] to [7, 3]" in report.text()


def test_tables_of_frame_tokens_are_resized(tmp_path):
    small, large = (
        FrameTokens(in_dim=3, dim=3, num_frames=frames, size=size, patch_size=8) for frames, size in ((4, 16), (7, 32))
    )
    report = init.start_from(large, saved(small, tmp_path / "small.safetensors"))
    torch.testing.assert_close(large.times.table[[0, 2, 6]], small.times.table[[0, 1, 3]])
    assert report.resized == ["places.table: [2, 2, 3] to [4, 4, 3]", "times.table: [4, 3] to [7, 3]"]


def test_every_tensor_is_accounted_for(tmp_path):
    source = nn.ModuleDict({"a": nn.Linear(2, 3), "old": nn.Linear(2, 2)})
    target = nn.ModuleDict({"a": nn.Linear(2, 3), "new": nn.Linear(2, 2), "b": nn.Linear(1, 1)})
    source["b"] = nn.Linear(1, 1)
    report = init.start_from(target, saved(source, tmp_path / "s.safetensors"), skip=["b.*"])
    assert target["a"].weight.equal(source["a"].weight) and not target["b"].weight.equal(source["b"].weight)
    assert report.missing == ["new.bias", "new.weight"] and report.left_over == ["old.bias", "old.weight"]
    assert report.skipped == ["b.bias", "b.weight"]
    assert "not in it, start as built: new.bias (1), new.weight (1)" in report.text()


def test_a_part_takes_the_weights_of_another_place(tmp_path):
    source, target = nn.ModuleDict({"a": nn.Linear(2, 3), "ab": nn.Linear(1, 1)}), nn.ModuleDict({"z": nn.Linear(2, 3)})
    path = saved(source, tmp_path / "s.safetensors")
    report = init.start_from(target, path, rename={"a.": "z."})
    assert target["z"].weight.equal(source["a"].weight) and report.left_over == ["ab.bias", "ab.weight"]
    with pytest.raises(config.ConfigError, match=r"no name in .* begins with 'b\.'"):
        init.start_from(target, path, rename={"b.": "z."})
    with pytest.raises(config.ConfigError, match=r"two tensors of .* would be named 'ab\.(bias|weight)'"):
        init.start_from(target, path, rename={"a.": "ab."})


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (nn.ModuleDict({"a": nn.Linear(2, 4)}), r"a.weight is \[3, 2\] there and \[4, 2\] here.*init.skip=\[a.weight"),
        (nn.ModuleDict({"c": nn.Linear(2, 3)}), "nothing in .* has a name that this model has"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, target, line):
    path = saved(nn.ModuleDict({"a": nn.Linear(2, 3)}), tmp_path / "s.safetensors")
    with pytest.raises(config.ConfigError, match=line):
        init.start_from(target, path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(config.ConfigError, match="holds no valid checkpoint; name a trained run"):
        init.start_from(nn.Linear(1, 1), tmp_path)


def test_a_run_starts_from_another_and_brings_its_vocabulary(place, capsys):
    assert train(place, "before_tuning") == Exit.DONE
    before = place / "runs" / "before_tuning"
    more = [f"init.run={before}", "optim.lr=1e-12", "trainer.max_steps=1", "objective=[contrastive]"]
    assert train(place, "tuned", *more) == Exit.DONE
    after = weights(place, "tuned", 1)
    name = "model.video_projection.weight"
    torch.testing.assert_close(after[name], weights(place, "before_tuning", 2)[name])
    assert (place / "runs/tuned/tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
    report = json.loads((place / "runs/tuned/init.json").read_text())
    assert any(name.startswith("objectives.matching") for name in report["left_over"]) and not report["missing"]
    assert "weights from" in capsys.readouterr().out


def test_weights_without_their_vocabulary_are_refused(place, tmp_path, capsys):
    path = saved(nn.Linear(1, 1), tmp_path / "w.safetensors")
    assert train(place, "no_vocabulary", f"init.run={path}") == Exit.BAD_CONFIG
    assert "there is no tokenizer.json beside" in capsys.readouterr().err
