"""Small real runs for tests: the quickstart experiment on a world of a few clips."""

from pathlib import Path

from torch import Tensor

from vlp.training import checkpoint, launch

WORLD = ("data.sources.world.num_train=16", "data.sources.world.num_test=6")


def overrides(place: Path, name: str, *more: str) -> list[str]:
    """The command line of a tiny run below `place`; worlds are shared through `place / "data"`."""
    places = [f"paths.runs={place / 'runs'}", f"paths.data={place / 'data'}", f"run.name={name}"]
    return ["+experiment=quickstart", "+scale=tiny", "trainer.num_threads=1", *WORLD, *places, *more]


def train(place: Path, name: str, *more: str) -> int:
    """Run in this process; return the exit code."""
    return launch.main(overrides(place, name, *more))


def weights(place: Path, name: str, step: int) -> dict[str, Tensor]:
    """The weights of a checkpoint."""
    path = place / "runs" / name / "checkpoints" / f"step-{step:08d}"
    return checkpoint.open_checkpoint(path).under("model")
