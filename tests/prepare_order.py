"""train.py that writes down, for each thing that is made before the first step, whether the ranks had met by then.

python tests/prepare_order.py NOTES OVERRIDE...     # NOTES: a file; each rank adds its lines
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as torch_dist

from vlp.training import launch, prepare

NOTES = Path(sys.argv[1])
MADE = ("sources", "tokenizer", "fit_parts")


def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Write a line when `work` is done: rank, name, and whether there is a process group."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        with NOTES.open("a") as file:
            file.write(f"{os.environ.get('LOCAL_RANK', '0')} {name} {torch_dist.is_initialized()}\n")
        return result

    return wrapped


if __name__ == "__main__":
    for name in MADE:
        setattr(prepare, name, noted(name, getattr(prepare, name)))
    sys.exit(launch.main(sys.argv[2:]))
