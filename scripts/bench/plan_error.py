"""P13: what plan.py predicts of a step's memory, against what PyTorch's allocator gives out in a real step here.

Six clips each, forward and backward pass, gradients among it. Parameters and the optimizer's state are exact.
"""

import sys
from pathlib import Path
from typing import Any

from vlp import config
from vlp.planning.system import build
from vlp.planning.trace import peak

ROOT = Path(__file__).parents[2]
TOWERS = ("objective=[contrastive]", "fusion=null", "decoder=null", "view=[]", "text.config.hidden_dropout_prob=0.0")
CASES = {
    "quickstart, six objectives": ("+experiment=quickstart",),
    "two towers, joint space-time ViT": TOWERS,
    "the same, activations recomputed": (*TOWERS, "trainer.checkpoint_activations=true"),
    "the same, bf16-mixed": (*TOWERS, "trainer.precision=bf16-mixed"),
    "fusion, matching, captioning": ("objective=[contrastive,matching,captioning]", TOWERS[-1]),
}


def main() -> dict[str, Any]:
    """Return predicted MiB, measured MiB and the error of each case."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # what measures is a helper of the tests
    from step_memory import measured_peak

    figures = {}
    for name, words in CASES.items():
        cfg = config.load(words)
        predicted, measured = peak(build(cfg), 6).with_gradients, measured_peak(cfg, 6)
        error = predicted / measured - 1
        figures[name] = f"{predicted / 2**20:.1f} MiB predicted, {measured / 2**20:.1f} measured, {error:+.1%}"
    return figures


if __name__ == "__main__":
    print(main())
