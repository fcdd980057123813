"""The LightningModule: one optimizer step over a global batch.

    StepBatch: micro-batches of one optimizer step
      -> ForwardPass each -> counts of all micro-batches and ranks, one all-reduce
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
from vlp.training import checkpoint, optim
from vlp.training.ema import Ema
from vlp.training.guard import MIN_LOSS_SCALE, Guard, NonFiniteError


class Recipe(NamedTuple):
    """How the parameters are moved; plain values from the sections `optim`, `schedule` and `trainer`."""

    optimizer: Mapping[str, Any]  # arguments of optim.adamw
    layer_decay: float | None
    lr_factors: Mapping[str, float]
    schedule: Callable[[int, int], float]
    max_steps: int
    clip_grad_norm: float | None
    seed: int


class Pretraining(pl.LightningModule):
    """Trains a model family under objectives.

    Args:
        model: the model family. objectives: name -> module with `inputs`, `count` and `forward` -> Term.
        wirings: name -> role -> node names. weights: name -> factor.
        graph: of the model under the config's views. recipe: see Recipe.
        loader: first step -> iterable of this rank's StepBatches up to the last step. guard: looks at each step.
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
        guard: Guard,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.wirings, self.weights, self.graph, self.recipe, self.loader = wirings, weights, graph, recipe, loader
        self.ema: Ema | None = None
        self.guard = guard
        self.counters: dict[str, Any] = {name: objective.count for name, objective in objectives.items()}
        self.count_wirings = {name: _count_wiring(objectives[name], wiring) for name, wiring in wirings.items()}
        self.cursor = 0  # steps of the plan that are done, skipped ones included: the data position
        self.optimizer_tensors: dict[str, Tensor] = {}  # of the checkpoint that the run continues from
        self.scaler_values: Mapping[str, Any] = {}  # the same; of fp16
        self.last: dict[str, Any] = {}  # what the callbacks show and log
        self.ended = time.perf_counter()
        self.mark: Callable[[str], None] = lambda place: None  # tells the watchdog where in a step this rank is

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Group the trainable parameters by rate and decay."""
        chosen = optim.settings(self, layer_decay=self.recipe.layer_decay, lr_factors=self.recipe.lr_factors)
        optimizer = optim.adamw(chosen, **self.recipe.optimizer)
        checkpoint.load_optimizer(optimizer, self.optimizer_tensors)
        return optimizer

    def train_dataloader(self) -> Any:
        """Open the data at the cursor; called when the ranks know each other."""
        return self.loader(self.cursor)

    def resume(self, cursor: int, optimizer_tensors: dict[str, Tensor]) -> None:
        """Continue at a cursor; weights are loaded by the caller."""
        self.cursor, self.optimizer_tensors = cursor, optimizer_tensors

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step on a StepBatch."""
        started = time.perf_counter()
        optimizer = self.optimizers(use_pl_optimizer=True)
        optim.set_rate(optimizer.optimizer, self.recipe.schedule(self.cursor, self.recipe.max_steps))  # type: ignore[union-attr]
        means, counts = self.differentiate(batch)
        self.mark("optimizer")
        norm = self.clip(optimizer)
        self.move(optimizer, norm, means, batch)
        self.note(batch, means, counts, norm, started)

    def differentiate(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fill the gradients of one step.

        Returns:
            this rank's share of the mean of each objective, and the number of items of each over all ranks.
        """
        self.mark("counts")
        torch.manual_seed(mix(self.recipe.seed, self.cursor, dist.rank()) & 0x7FFF_FFFF)
        passes = [ForwardPass(self.model, micro, self.graph) for micro in batch.batches]
        counts = global_counts(self.sum_counts(passes))
        means = dict.fromkeys(self.wirings, torch.zeros((), device=self.device))
        for number, forward in enumerate(passes):
            with nullcontext() if number == len(passes) - 1 else self.without_sync():
                self.mark("forward")
                terms = {n: self.objectives[n](*forward.roles(wiring)) for n, wiring in self.wirings.items()}
                combined = combine(terms, self.weights, counts)
                self.mark("backward")
                self.manual_backward(combined.loss)
            means = {name: mean + combined.means[name] for name, mean in means.items()}
        return means, counts

    def rehearse(self, batch: Any) -> None:
        """Fill the gradients of a step and throw them away; weights, buffers and random numbers stay as they were.

        Data parallelism lays out its buckets anew after the first backward pass, and the layout changes the last bits
        of sums over three ranks or more. Rehearsed at the start of every attempt, all steps have the same layout.
        """
        buffers = {name: value.clone() for name, value in self.named_buffers()}
        self.differentiate(batch)
        for parameter in self.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, value in self.named_buffers():
                value.copy_(buffers[name])

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
        if self.scaler is not None:  # fp16: the gradients are still multiplied
            self.scaler.unscale_(optimizer.optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return nn.utils.clip_grad_norm_(parameters, self.recipe.clip_grad_norm or torch.inf)

    def move(self, optimizer: Any, norm: Tensor, means: Mapping[str, Tensor], batch: Any) -> None:
        """Move the weights unless the guard finds trouble; the same way on every rank.

        Raises:
            NonFiniteError, SpikeError: the guard's policy ends the run.
        """
        trouble = None if self.scale_fell(norm, means) else self.guard.look(norm, means, self.weights)
        if trouble:
            self.guard.answer(trouble, step=self.cursor, batch=batch, means=means, seed=self.recipe.seed)
        elif torch.isfinite(norm):
            optimizer.step()
            for module in self.modules():
                if isinstance(module, Temperature):
                    module.clamp_()
            if self.ema is not None:
                self.ema.update(self, self.cursor + 1)
        optimizer.zero_grad()
        self.cursor += 1

    def scale_fell(self, norm: Tensor, means: Mapping[str, Tensor]) -> bool:
        """In fp16, halve a loss scale under which only the scaled gradient overflowed; the step is left out.

        Raises:
            NonFiniteError: the scale is below its floor.
        """
        if self.scaler is None or bool(torch.isfinite(norm)):
            return False
        self.scaler.update()
        is_loss = torch.stack(list(means.values())).isfinite().logical_not().any()
        if dist.max_over_ranks(is_loss.long()):
            return False  # no scale is to blame
        if self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise NonFiniteError(
                f"step {self.cursor}: the loss scale of fp16 fell to {self.scaler.get_scale():g}, below "
                f"{MIN_LOSS_SCALE:g}; use trainer.precision=bf16-mixed, or lower optim.lr."
            )
        return True

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def num_skipped(self) -> int:
        """Steps of the plan that left nothing in the weights."""
        return self.guard.memory.num_skipped

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
        """Leave the set-up time out of the first step's data wait; continue with the loss scale of the checkpoint."""
        if self.scaler is not None and self.scaler_values:
            self.scaler.load_state_dict(dict(self.scaler_values))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was done since the last step out of the next step's data wait."""
        self.ended = time.perf_counter()


def _count_wiring(objective: nn.Module, wiring: Wiring) -> Wiring:
    """The roles that `count` takes."""
    return {role: wiring[role] for role in inspect.signature(objective.count).parameters}  # type: ignore[arg-type]
