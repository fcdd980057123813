"""A small system of all objectives that trains under any strategy for a few steps, on batches made from their step.

Every parameter moves in proportion to its gradient (AdamW with eps 1), so weights after a step show gradients.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from vlp import config, dist
from vlp.data.loader import StepBatch
from vlp.training import optim, state
from vlp.training.assemble import assemble
from vlp.training.launch import quiet, recipe_of
from vlp.training.module import Pretraining
from vlp.training.precision import PRECISIONS
from vlp.training.strategy import STRATEGIES, Needs
from vlp.types import Batch, nothing_more

GLOBAL_BATCH, TEXT_LENGTH, SIZE = 8, 7, 16
FREEZE = {
    "trainable": [],
    "partly": ["model.text_encoder.*layer.0.*", "model.video_encoder.convolutions.*"],
    "frozen": ["model.text_encoder.*", "model.video_encoder.*"],
}
SMALL = (
    *("clip.size=16", "clip.num_frames=4", "clip.short_side=16", "tokenizer.vocab_size=64", "tokenizer.max_length=8"),
    *("video.widths=[8,16,24]", "video.facts.dim=24", "connector.frame_transformer.dim=32", "model.embed_dim=16"),
    *("connector.frame_transformer.depth=1", "connector.frame_transformer.num_heads=2", "text.facts.dim=32"),
    *("text.config.num_hidden_layers=2", "text.config.num_attention_heads=2", "text.config.intermediate_size=48"),
    *("fusion.dim=32", "decoder.dim=32", "fusion.num_heads=2", "decoder.num_heads=2", "trainer.clip_grad_norm=0.5"),
    *("optim.eps=1.0", "optim.lr=1.0", "optim.layer_decay=0.9"),
    *("optim.weight_decay=0.1", "schedule.warmup_steps=0", "trainer.max_steps=100", "optim.freeze=[]"),
)
VISUAL = ("objective.masked_visual.num_codes=8",)
WIRING = {
    "text": (
        *("objective=[masked_words]", "objective.masked_words.inputs.tokens='text:masked_words'"),
        "objective.masked_words.dim=32",
    )
}


class Cell(NamedTuple):
    """One way to train."""

    source: str  # text | image | video | mixed | empty (rank 0 sees tombstones alone)
    freeze: str = "trainable"
    strategy: str = "auto"
    accumulate: int = 1
    precision: str = "32-true"
    steps: int = 2
    more: tuple[str, ...] = ()  # overrides
    system: tuple[str, ...] = ()  # overrides that choose the objectives, in place of those of the source


class Found(NamedTuple):
    """What a run of a cell leaves."""

    start: dict[str, Tensor]  # this rank's share of the state before the first step
    state: dict[str, Tensor]  # and after the last
    losses: list[float]
    cursor: int
    scale: float | None
    clips: list[list[int]]  # sample ids of each step, this rank's


def train(cell: Cell, stored: dict[str, Tensor] | None = None, cursor: int = 0, look: Callable | None = None) -> Found:
    """Train the cell on this rank; `stored` is a whole state to continue from, `look` gets the module at the end."""
    quiet()
    words = cell.system or WIRING.get(cell.source, VISUAL)
    cfg = config.load(["+experiment=quickstart", "+scale=tiny", *SMALL, *words, *cell.more])
    torch.manual_seed(0)
    system = assemble(cfg)
    recipe = recipe_of(cfg)._replace(precision=PRECISIONS[cell.precision])
    module = Pretraining(system, recipe=recipe, loader=lambda start: Steps(cell, start))
    for objective in module.objectives.values():
        _fit_codebook(objective)
    if cell.source != "text":
        optim.freeze(module, FREEZE[cell.freeze])
    elif cell.freeze != "trainable":
        optim.freeze(module, ["model.text_encoder.*"] if cell.freeze == "frozen" else FREEZE["partly"][:1])
    recipe.precision.convert(module)
    if stored is not None:
        module.resume(cursor, Memory(stored), None)
    watch = Watch(module, look)
    patience = timedelta(seconds=120)
    needs = Needs(recipe.precision, recipe.clip_grad_norm, dist.world_size(), patience, dict(cfg.trainer.zero))
    _trainer(STRATEGIES[cell.strategy](needs), watch).fit(module)
    return watch.found


class Steps:
    """A loader; no tuple, in which Lightning would look for several."""

    def __init__(self, cell: Cell, start: int) -> None:
        self.cell, self.start = cell, start

    def __iter__(self) -> Iterator[StepBatch]:
        return (_step(self.cell, step) for step in range(self.start, self.start + self.cell.steps))

    def __len__(self) -> int:
        return self.cell.steps


class Memory(dict[str, Tensor]):
    """A state in memory, where `restore` expects a checkpoint."""

    def get(self, key: str) -> Tensor:  # type: ignore[override]
        """Return a tensor."""
        return self[key]


class Watch(pl.Callback):
    """Notes the losses of all ranks, and the state at the end."""

    def __init__(self, module: Pretraining, look: Callable | None) -> None:
        self.module, self.look, self.losses, self.clips = module, look, [], []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Collect what the steps begin with."""
        self.start = _collected(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add up the shares of the losses."""
        means = torch.stack(list(pl_module.last["means"].values()))
        self.losses.append(float(dist.sum_over_ranks(means).sum()))
        self.clips.append([int(i) for micro in batch.batches for i in micro.sample_id])

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Collect the state while the strategy holds it."""
        scale = pl_module.update.scale
        self.found = Found(
            self.start, _collected(pl_module), self.losses, pl_module.cursor, scale and scale.value, self.clips
        )
        if self.look is not None:
            self.look(pl_module)


def merged(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole state from the shares of all ranks; every tensor must be given once."""
    keys = [key for share in shares for key in share]
    assert len(keys) == len(set(keys))
    return {key: value for share in shares for key, value in share.items()}


def ends(found: list[Found]) -> dict[str, Tensor]:
    """Return the whole state after the last step."""
    return merged([each.state for each in found])


def _collected(module: Pretraining) -> dict[str, Tensor]:
    assert module.update is not None
    return {key: value.clone() for key, value in state.collect(module, module.update, module.ema).items()}


def _fit_codebook(objective: Any) -> None:
    if hasattr(objective, "tokenizer"):
        frames = torch.randint(0, 256, (8, 4, SIZE, SIZE, 3), dtype=torch.uint8, generator=_generator(99))
        objective.tokenizer.fit([frames], seed=0)


def _trainer(strategy: Any, watch: Watch) -> pl.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ranks = {"devices": dist.world_size(), "accelerator": "cpu", "use_distributed_sampler": False}
    return pl.Trainer(strategy=strategy, callbacks=[watch], max_epochs=1, limit_val_batches=0, **off, **ranks)


def _step(cell: Cell, step: int) -> StepBatch:
    """This rank's part: each micro-batch of the whole step is split among the ranks."""
    whole = _whole(cell, step)
    rows = torch.arange(GLOBAL_BATCH).view(cell.accumulate, dist.world_size(), -1)[:, dist.rank()]
    micros = tuple(Batch(*(field[part] for field in whole)) for part in rows)
    return StepBatch(micros, step, step % 2, 0.0)


def _whole(cell: Cell, step: int) -> Batch:
    draw = _generator(step)
    time = {"text": 1, "image": 1, "video": 4, "empty": 4, "mixed": 1 if step % 2 else 4}[cell.source]
    lengths = torch.randint(1, time + 1, (GLOBAL_BATCH,), generator=draw)
    words = torch.randint(3, TEXT_LENGTH + 1, (GLOBAL_BATCH,), generator=draw)
    valid = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
    valid[GLOBAL_BATCH - 1] = False  # a tombstone in every step
    if cell.source == "empty":
        valid[:] = (
            torch.arange(GLOBAL_BATCH) % (GLOBAL_BATCH // cell.accumulate)
        ) >= GLOBAL_BATCH // cell.accumulate // 2
    text_mask = torch.arange(TEXT_LENGTH) < words[:, None]
    ids = torch.randint(5, 64, (GLOBAL_BATCH, TEXT_LENGTH), generator=draw)
    return Batch(
        frames=torch.randint(0, 256, (GLOBAL_BATCH, time, SIZE, SIZE, 3), dtype=torch.uint8, generator=draw),
        frame_mask=torch.arange(time) < lengths[:, None],
        times_s=torch.arange(time).float().expand(GLOBAL_BATCH, time),
        text_ids=ids.masked_fill(~text_mask, 0),
        text_mask=text_mask,
        word_ids=torch.arange(TEXT_LENGTH).expand(GLOBAL_BATCH, -1).masked_fill(~text_mask, -1),
        **nothing_more(GLOBAL_BATCH),
        valid=valid,
        status=(~valid).long(),
        sample_id=torch.arange(GLOBAL_BATCH) + GLOBAL_BATCH * step,
        key=torch.randint(0, 2**62, (GLOBAL_BATCH,), generator=draw),
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
