"""vlp: end-to-end video-language pretraining."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.inference import Loaded


def load(run: str | Path) -> "Loaded":
    """Load a trained run, ready to embed videos and texts; see `vlp.inference.Loaded`.

    Args:
        run: the run's directory, such as "runs/demo".

    Raises:
        ValueError: there is no run, or no valid checkpoint in it.
    """
    from vlp.inference import Loaded  # torch and timm load in a second or two: not before they are wanted

    return Loaded(Path(run))
