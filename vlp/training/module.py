"""The LightningModule: one optimizer step over a global batch.

    StepBatch: micro-batches of one optimizer step
      -> ForwardPass each -> counts of all micro-batches and ranks, one all-reduce
      -> embeddings of all micro-batches without gradient, for objectives over the whole step
      -> objectives -> Term(total, count) -> combine -> backward
      -> clip, check, step, schedule, average

Optimisation is manual because the counts of all micro-batches must be known before the first backward.
"""

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vlp import dist
from vlp.data.rng import mix
from vlp.forward import ForwardPass, Graph, Wiring
from vlp.layers.temperature import Temperature
from vlp.objectives.combine import combine, global_counts
from vlp.training import optim, state
from vlp.training.ema import Ema
from vlp.training.whole_step import WholeStep
from vlp.types import Term


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
        self.ema: Ema | None = None
        self.counters: dict[str, Any] = {name: objective.count for name, objective in objectives.items()}
        self.count_wirings = {name: _count_wiring(objectives[name], wiring) for name, wiring in wirings.items()}
        self.whole_step = WholeStep(objectives, wirings)
        self.cursor = 0  # steps of the plan that are done, skipped ones included: the data position
        self.num_skipped = 0
        self.optimizer_tensors: dict[str, Tensor] = {}  # of the checkpoint that the run continues from
        self.last: dict[str, Any] = {}  # what the callbacks show and log
        self.ended = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Group the trainable parameters by rate and decay."""
        chosen = optim.settings(self, layer_decay=self.recipe.layer_decay, lr_factors=self.recipe.lr_factors)
        optimizer = optim.adamw(chosen, **self.recipe.optimizer)
        state.load_optimizer(optimizer, self.optimizer_tensors)
        self.optimizer_tensors = {}  # they keep the files of the checkpoint mapped
        return optimizer

    def train_dataloader(self) -> Any:
        """Open the data at the cursor; called when the ranks know each other."""
        return self.loader(self.cursor)

    def resume(self, cursor: int, num_skipped: int, optimizer_tensors: dict[str, Tensor]) -> None:
        """Continue at a cursor; weights are loaded by the caller."""
        self.cursor, self.num_skipped, self.optimizer_tensors = cursor, num_skipped, optimizer_tensors

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step on a StepBatch."""
        started = time.perf_counter()
        optimizer = self.optimizers(use_pl_optimizer=True)
        optim.set_rate(optimizer.optimizer, self.recipe.schedule(self.cursor, self.recipe.max_steps))  # type: ignore[union-attr]
        passes = [ForwardPass(self.model, micro, self.graph) for micro in batch.batches]
        counts = global_counts(self.sum_counts(passes))
        self.whole_step.prepare(passes, self.seed)
        means = dict.fromkeys(self.wirings, torch.zeros((), device=self.device))
        for number, forward in enumerate(passes):
            with nullcontext() if number == len(passes) - 1 else self.without_sync():
                self.seed(number)
                combined = combine(self.terms(number, forward), self.weights, counts)
                self.manual_backward(combined.loss)
            means = {name: mean + combined.means[name] for name, mean in means.items()}
            forward.values.clear()  # or the outputs of all micro-batches would pile up
        norm = self.clip(optimizer)
        self.move(optimizer, norm, means, batch)
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

    def without_sync(self) -> Any:
        """Keep gradients local for all micro-batches of a step but the last."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()

    def clip(self, optimizer: Any) -> Tensor:
        """Clip the gradient to its largest norm and return the norm before clipping; the same on all ranks."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # fp16: the gradients are still multiplied
            scaler.unscale_(optimizer.optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return nn.utils.clip_grad_norm_(parameters, self.recipe.clip_grad_norm or torch.inf)

    def move(self, optimizer: Any, norm: Tensor, means: Mapping[str, Tensor], batch: Any) -> None:
        """Move the weights if the gradient is finite; else follow the policy, the same way on every rank."""
        if torch.isfinite(norm):
            optimizer.step()
            for module in self.modules():
                if isinstance(module, Temperature):
                    module.clamp_()
            if self.ema is not None:
                self.ema.update(self, self.cursor + 1)
        else:
            self.num_skipped += 1
            self.last["non_finite"] = self.describe_failure(means, batch)
            if self.recipe.nan_policy == "stop" or self.num_skipped > self.recipe.max_skipped_steps:
                raise NonFiniteLossError(self.last["non_finite"])
        optimizer.zero_grad()
        self.cursor += 1

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
