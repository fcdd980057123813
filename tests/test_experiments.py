"""Every experiment file: short, composed, checked, built, stepped once; every trainable parameter gets a gradient."""

import pytest
from tiny_runs import overrides

from vlp import config
from vlp.training import launch, lock
from vlp.training.exits import Exit
from vlp.training.update import PlainUpdate

NAMES = lock.experiments()
UNREAD = {"model.connectors.frame_transformer.cells"}  # where only frame vectors are read: its gradient is zero


@pytest.mark.parametrize("name", NAMES)
def test_experiment_file_is_a_delta(name):
    text = (config.CONF / "experiment" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("# @package _global_\n#"), "the first comment says what the experiment is"


def test_lock_holds_the_hash_of_every_experiment():
    assert lock.current() == (config.CONF / "experiments.lock").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient_in_one_step(name, place, monkeypatch):
    bare = []

    def note(self):
        bare.extend(name for name, parameter in self.trained.items() if parameter.grad is None)
        return norm(self)

    norm = PlainUpdate.norm
    monkeypatch.setattr(PlainUpdate, "norm", note)
    words = overrides(place, f"step_{name}", "trainer.max_steps=1", "init.run=null")
    assert launch.main([f"+experiment={name}", *words[1:]]) == Exit.DONE
    assert {name.rpartition(".")[0] for name in bare} <= UNREAD
