"""The LightningModule: one optimizer step over a global batch.

    StepBatch: micro-batches of one optimizer step
      -> ForwardPass each -> counts of all micro-batches and ranks, one all-reduce
      -> embeddings of all micro-batches without gradient, for objectives over the whole step
      -> objectives -> Term(total, count) -> combine -> backward
      -> norm, check, clip and step, clamp, average

Optimisation is manual because the counts of all micro-batches must be known before the first backward. How the strategy
moves the weights is behind `vlp.training.update`.
"""

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vlp import dist
from vlp.data.rng import mix
from vlp.forward import ForwardPass, Graph, Node, Wiring
from vlp.layers.temperature import Temperature
from vlp.objectives.combine import Combined, combine, global_counts
from vlp.training import optim, state
from vlp.training.ema import Ema
from vlp.training.precision import LossScale, Precision
from vlp.training.strategy import update_of
from vlp.training.update import Update, showing
from vlp.training.whole_step import WholeStep
from vlp.types import Term

LOGIT_SCALE = Node("logit_scale")


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not finite; names every term and the samples of the step."""


class Recipe(NamedTuple):
    """How the parameters are moved; plain values from the sections `optim`, `schedule` and `trainer`."""

    optimizer: Mapping[str, Any]  # arguments of optim.adamw
    layer_decay: float | None
    lr_factors: Mapping[str, float]
    schedule: Callable[[int, int], float]
    max_steps: int
    clip_grad_norm: float | None
    precision: Precision
    ema_decay: float | None
    nan_policy: str
    max_skipped_steps: int
    seed: int


class Pretraining(pl.LightningModule):
    """Trains a model family under objectives.

    Args:
        model: the model family. objectives: name -> module with `inputs`, `count` and `forward` -> Term.
        wirings: name -> role -> node names. weights: name -> factor.
        graph: of the model under the config's views. recipe: see Recipe.
        loader: first step -> iterable of this rank's StepBatches up to the last step.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objectives: Mapping[str, nn.Module],
        wirings: Mapping[str, Wiring],
        weights: Mapping[str, float],
        graph: Graph,
        recipe: Recipe,
        loader: Callable[[int], Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.wirings, self.weights, self.graph, self.recipe, self.loader = wirings, weights, graph, recipe, loader
        self.update: Update | None = None  # once the strategy is set up
        self.ema: Ema | None = None
        self.counters: dict[str, Any] = {name: objective.count for name, objective in objectives.items()}
        self.count_wirings = {name: _count_wiring(objectives[name], wiring) for name, wiring in wirings.items()}
        self.whole_step = WholeStep(objectives, wirings)
        self.cursor = 0  # steps of the plan that are done, skipped ones included: the data position
        self.num_skipped = 0
        self.stored: state.Stored | None = None  # the checkpoint that the run continues from
        self.scale_state: Mapping[str, Any] | None = None  # of the loss, there
        self.last: dict[str, Any] = {}  # what the callbacks show and log
        self.ended = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Group the trainable parameters by rate and decay."""
        chosen = optim.settings(self, layer_decay=self.recipe.layer_decay, lr_factors=self.recipe.lr_factors)
        return optim.adamw(chosen, **self.recipe.optimizer)

    def on_fit_start(self) -> None:
        """Take hold of the weights where the strategy has put them, and fill them from the checkpoint."""
        recipe = self.recipe
        scale = LossScale() if recipe.precision.scaled else None
        self.update = update_of(self.trainer, self, max_norm=recipe.clip_grad_norm, scale=scale)
        self.ema = Ema(self.update.weights(), decay=recipe.ema_decay) if recipe.ema_decay is not None else None
        if self.stored is not None:
            state.restore(self, self.update, self.ema, self.stored)
            if scale is not None and self.scale_state is not None:
                scale.load(self.scale_state)
            self.stored = None

    def train_dataloader(self) -> Any:
        """Open the data at the cursor; called when the ranks know each other."""
        return self.loader(self.cursor)

    def resume(self, cursor: int, num_skipped: int, stored: state.Stored, scale: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint, once the strategy is set up."""
        self.cursor, self.num_skipped, self.stored, self.scale_state = cursor, num_skipped, stored, scale

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the model computes; ZeRO-3 releases weights, so it keeps no copies of them."""
        assert self.update is not None
        return self.recipe.precision.autocast(self.device, cache=not self.update.frozen_sharded)

    def forward(self, number: int, forward: ForwardPass, counts: Mapping[str, Tensor]) -> Combined:
        """Return the loss of micro-batch `number`; the strategies wrap this call."""
        with self.autocast():
            terms = self.terms(number, forward)
        if LOGIT_SCALE in forward.values:  # for the log: under ZeRO-3 it cannot be read between steps
            self.last["logit_scale"] = forward.values[LOGIT_SCALE].detach()
        return combine(terms, self.weights, counts)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step on a StepBatch."""
        started, update = time.perf_counter(), self.update
        assert update is not None
        optim.set_rate(update.optimizer, self.recipe.schedule(self.cursor, self.recipe.max_steps))
        passes = [ForwardPass(self.model, micro, self.graph) for micro in batch.batches]
        counts = global_counts(self.sum_counts(passes))
        with self.autocast():
            self.whole_step.prepare(passes, self.seed)
        means = dict.fromkeys(self.wirings, torch.zeros((), device=self.device))
        for number, forward in enumerate(passes):
            with update.micro(last=number == len(passes) - 1):
                self.seed(number)
                combined = update.forward(number, forward, counts)
                update.backward(combined.loss)
            means = {name: mean + combined.means[name] for name, mean in means.items()}
            forward.values.clear()  # or the outputs of all micro-batches would pile up
        norm = update.norm()
        self.move(update, norm, means, batch)
        self.note(batch, means, counts, norm, started)

    def seed(self, number: int) -> None:
        """Restart the random stream of this step's micro-batch `number` on this rank: dropout needs no history."""
        torch.manual_seed((mix(self.recipe.seed, self.cursor, dist.rank()) + number) & 0x7FFF_FFFF)

    def terms(self, number: int, forward: ForwardPass) -> dict[str, Term]:
        """Return what the objectives give for micro-batch `number`; those over the whole step come first."""
        terms = self.whole_step.terms(number, forward)
        own = {n: w for n, w in self.wirings.items() if n not in terms}  # all ranks in the same order
        return terms | {name: self.objectives[name](*forward.roles(wiring)) for name, wiring in own.items()}

    def sum_counts(self, passes: list[ForwardPass]) -> dict[str, Tensor]:
        """Return the number of items of each objective in this rank's micro-batches, before any encoder runs."""
        return {
            name: torch.stack([self.counters[name](*forward.roles(wiring)) for forward in passes]).sum()
            for name, wiring in self.count_wirings.items()
        }

    def move(self, update: Update, norm: Tensor, means: Mapping[str, Tensor], batch: Any) -> None:
        """Move the weights if the gradient is finite; else follow the policy, the same way on every rank."""
        if torch.isfinite(norm):
            update.step(norm)
            for module in self.modules():
                if isinstance(module, Temperature) and module.value.requires_grad:
                    update.clamp(module.value, *module.value_bounds)
            if self.ema is not None:
                self.ema.update(update.weights(), self.cursor + 1)
            if update.scale is not None:
                update.scale.accept()
        else:
            update.discard()
            if update.scale is None or not update.scale.lower():  # a scale that can be lowered is no failure
                self.fail(means, batch)
        self.cursor += 1

    def fail(self, means: Mapping[str, Tensor], batch: Any) -> None:
        """Count a gradient that is not finite; stop by policy, or where the loss scale has reached its floor."""
        self.num_skipped += 1
        assert self.update is not None
        at_floor = self.update.scale is not None
        self.last["non_finite"] = self.describe_failure(means, batch) + at_floor * "; the loss scale is at its floor"
        if at_floor or self.recipe.nan_policy == "stop" or self.num_skipped > self.recipe.max_skipped_steps:
            raise NonFiniteLossError(self.last["non_finite"])

    def alone(self) -> AbstractContextManager:
        """Return the context in which every rank can evaluate `model` by itself, with averaged weights if there are."""
        contexts = ExitStack()
        if self.update is not None:
            average = self.ema.average if self.ema is not None else None
            contexts.enter_context(showing(self.update, self, average))
        if self.recipe.precision.weights != torch.float32:
            contexts.enter_context(self.recipe.precision.autocast(self.device))
        return contexts

    def describe_failure(self, means: Mapping[str, Tensor], batch: Any) -> str:
        """Say which terms are not finite, and on which samples."""
        terms = ", ".join(f"{name}={float(mean):.4g}" for name, mean in means.items())
        ids = [int(i) for micro in batch.batches for i in micro.sample_id if i >= 0]
        return f"step {self.cursor}: the gradient is not finite; terms on rank {dist.rank()}: {terms}; sample ids {ids}"

    def note(
        self, batch: Any, means: Mapping[str, Tensor], counts: Mapping[str, Tensor], norm: Tensor, started: float
    ) -> None:
        """Keep what the callbacks log; tensors stay on the device until a log step asks for them."""
        now = time.perf_counter()
        self.last |= {
            "means": means,
            "counts": counts,
            "grad_norm": norm,
            "data_wait_s": started - self.ended,
            "step_s": now - self.ended,
            "batch": batch,
        }
        self.ended = now

    def trained_parts(self) -> dict[str, int]:
        """Return the number of parameters of each part of the model and of each objective."""
        owners = {**dict(self.model.named_children()), **dict(self.objectives.items())}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in owners.items()}

    def on_train_start(self) -> None:
        """Leave the set-up time out of the first step's data wait."""
        self.ended = time.perf_counter()


def _count_wiring(objective: nn.Module, wiring: Wiring) -> Wiring:
    """The roles that `count` takes."""
    return {role: wiring[role] for role in inspect.signature(objective.count).parameters}  # type: ignore[arg-type]
