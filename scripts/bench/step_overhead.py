"""P5: what the framework costs a step, against a hand-written PyTorch loop over the same modules and batches.

Both run in one process, in turns, on batches that lie in memory; the framework logs to CSV and shows its bar.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vlp import config
from vlp.training import optim
from vlp.training.assemble import assemble
from vlp.training.callbacks import Bar, MetricsLog
from vlp.training.launch import quiet, recipe_of
from vlp.training.metrics_csv import MetricsCsv
from vlp.training.module import Pretraining
from vlp.training.trackers import Trackers
from vlp.types import Batch, nothing_more

OVERRIDES = ("+experiment=quickstart", "objective=[contrastive]", "trainer.max_steps=20")
NUM_STEPS, NUM_PAIRS, BATCH_SIZE = 20, 9, 64


class StepBatch(NamedTuple):
    """One optimizer step, as the data module yields it."""

    batches: tuple[Batch, ...]
    step: int
    source: int
    decode_s: float


def main() -> dict[str, Any]:
    """Return the medians in milliseconds a step and their ratio."""
    quiet()
    cfg = config.load(OVERRIDES)
    batches = [_batch(cfg, seed) for seed in range(NUM_STEPS)]
    ours, by_hand = [], []
    for _ in range(NUM_PAIRS):
        ours.append(_framework(cfg, batches))
        by_hand.append(_hand_written(cfg, batches))
    ratios = [a / b for a, b in zip(ours, by_hand, strict=True)]
    return {
        "vlp ms a step": 1000 * statistics.median(ours),
        "hand-written ms a step": 1000 * statistics.median(by_hand),
        "ratio": statistics.median(ratios),
        "ratio, lowest and highest": f"{min(ratios):.3f} to {max(ratios):.3f}",
    }


def _batch(cfg: Any, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH_SIZE, cfg.clip.num_frames, cfg.clip.size, cfg.clip.size, 3)
    text_ids = torch.randint(5, cfg.tokenizer.vocab_size, (BATCH_SIZE, 16), generator=generator)
    return Batch(
        frames=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        frame_mask=torch.ones(shape[:2], dtype=torch.bool),
        times_s=torch.zeros(shape[:2]),
        text_ids=text_ids,
        text_mask=torch.ones_like(text_ids, dtype=torch.bool),
        word_ids=torch.arange(16).expand(BATCH_SIZE, 16),
        **nothing_more(BATCH_SIZE),
        valid=torch.ones(BATCH_SIZE, dtype=torch.bool),
        status=torch.zeros(BATCH_SIZE, dtype=torch.int64),
        sample_id=torch.arange(BATCH_SIZE),
        key=torch.arange(BATCH_SIZE) + seed * BATCH_SIZE,
    )


def _framework(cfg: Any, batches: list[Batch]) -> float:
    """Seconds a step of the whole loop: Lightning, our step, CSV and bar."""
    torch.manual_seed(0)
    system = assemble(cfg)
    stamps: list[float] = []
    module = Pretraining(system, recipe=recipe_of(cfg), loader=lambda start: _Steps(batches))
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        log = MetricsLog(
            MetricsCsv(Path(directory) / "metrics.csv", after_step=0),
            Trackers({}, {}),
            every=cfg.trainer.log_every,
            attempt=1,
        )
        callbacks = [log, Bar(total=len(batches)), _Stamps(stamps)]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module)
    return (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def _hand_written(cfg: Any, batches: list[Batch]) -> float:
    """Seconds a step of the shortest loop that does the same arithmetic."""
    torch.manual_seed(0)
    system = assemble(cfg)
    model, recipe = system.model.train(), recipe_of(cfg)
    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen = optim.settings(model, layer_decay=None, lr_factors={})
    optimizer = optim.adamw(chosen, **recipe.optimizer)
    stamps = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer["lr"] * recipe.schedule(step, recipe.max_steps)
        loss = _contrastive_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, cfg.trainer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.perf_counter())
    return (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def _contrastive_loss(model: Any, batch: Batch) -> Tensor:
    grid = model.connectors(model.video_encoder(model.pixels(batch.frames), batch.frame_mask, None))
    video = nn.functional.normalize(model.video_projection(model.video_pool(grid)), dim=-1)
    tokens = model.text_encoder(batch.text_ids, batch.text_mask)
    text = nn.functional.normalize(model.text_projection(model.text_pool(tokens)), dim=-1)
    logits = model.temperature() * video @ text.T
    labels = torch.arange(len(video))
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


class _Steps:
    """Not a list: Lightning takes a list for several loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[StepBatch]:
        return (StepBatch((batch,), step, 0, 0.0) for step, batch in enumerate(self.batches))


class _Stamps(pl.Callback):
    def __init__(self, stamps: list[float]) -> None:
        self.stamps = stamps

    def on_train_batch_end(self, *_: Any) -> None:
        self.stamps.append(time.perf_counter())
