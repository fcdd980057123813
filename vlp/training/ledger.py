"""What each step read and computed, to the last bit: the evidence that a broken run equals an unbroken one.

`ledger.jsonl` in the run's directory, with `trainer.ledger=true`; steps that are done again appear again, by attempt:

    {"attempt": 1, "step": 7, "ids": [...], "loss": "0x1.8p+1", "weights": "9f..."}    {"attempt": 1, "committed": 7}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vlp import dist
from vlp.training import replicas
from vlp.training.module import Pretraining


class Ledger(pl.Callback):
    """Writes a line a step; the ids are those of all ranks, sorted, the loss is the global one."""

    def __init__(self, path: Path, *, attempt: int, world_size: int) -> None:
        self.path, self.about = path, {"attempt": attempt, "world_size": world_size}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect from all ranks; rank 0 writes."""
        means = pl_module.last["means"]
        loss = torch.stack([pl_module.weights[name] * mean for name, mean in means.items()]).sum()
        ids = dist.gather(torch.cat([micro.sample_id for micro in batch.batches]).to(loss.device))
        row = {
            "step": pl_module.cursor,
            "source": batch.source,
            "ids": sorted(ids.tolist()),
            "loss": float(dist.sum_over_ranks(loss)).hex(),
            "weights": f"{int(replicas.of_module(pl_module)) % 2**64:016x}",
        }
        self.write(row)

    def committed(self, step: int) -> None:
        """Note that a checkpoint of this step is complete."""
        self.write({"committed": step})

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line, as a whole; only rank 0 does."""
        if dist.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.about, **row}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines; a last one that a kill cut is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
