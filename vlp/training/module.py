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
from vlp.forward import ForwardPass, Node, Wiring
from vlp.layers.temperature import Temperature
from vlp.objectives.combine import Combined, combine, global_counts
from vlp.training import optim, state
from vlp.training.assemble import System
from vlp.training.ema import Ema
from vlp.training.guard import Guard, NonFiniteError
from vlp.training.precision import LossScale, Precision
from vlp.training.strategy import update_of
from vlp.training.update import PlainUpdate, Update, showing
from vlp.training.whole_step import WholeStep
from vlp.types import Term

LOGIT_SCALE = Node("logit_scale")


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
    seed: int


class Pretraining(pl.LightningModule):
    """Trains a model family under objectives.

    Args:
        system: the model family, and objectives with `inputs`, `count` and `forward` -> Term. recipe: see Recipe.
        loader: first step -> iterable of this rank's StepBatches up to the last step.
        guard: looks at each step; None stops at the first bad one.
    """

    def __init__(
        self,
        system: System,
        *,
        recipe: Recipe,
        loader: Callable[[int], Any],
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = system.model
        self.objectives = nn.ModuleDict(system.objectives)
        self.wirings, self.weights, self.graph = system.wirings, system.weights, system.graph
        self.recipe, self.loader = recipe, loader
        self.update: Update | None = None  # once the strategy is set up
        self.ema: Ema | None = None
        self.guard = guard or Guard.strict()
        self.counters: dict[str, Any] = {name: objective.count for name, objective in system.objectives.items()}
        self.count_wirings = {n: _count_wiring(system.objectives[n], wiring) for n, wiring in system.wirings.items()}
        self.whole_step = WholeStep(system.objectives, system.wirings)
        self.cursor = 0  # steps of the plan that are done, skipped ones included: the data position
        self.stored: state.Stored | None = None  # the checkpoint that the run continues from
        self.scale_state: Mapping[str, Any] | None = None  # of the loss, there
        self.last: dict[str, Any] = {}  # what the callbacks show and log
        self.ended = self.called = time.perf_counter()
        self.gate_s = 0.0  # of the time since then, in meetings of the ranks
        self.mark: Callable[[str], None] = lambda place: None  # tells the watchdog where in a step this rank is

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

    def resume(self, cursor: int, stored: state.Stored, scale: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint, once the strategy is set up."""
        self.cursor, self.stored, self.scale_state = cursor, stored, scale

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the model computes; ZeRO-3 releases weights, so it keeps no copies of them."""
        assert self.update is not None
        return self.recipe.precision.autocast(self.device, cache=not self.update.frozen_sharded)

    def forward(self, number: int, forward: ForwardPass, counts: Mapping[str, Tensor]) -> Combined:
        """Return the loss of micro-batch `number`; the strategies wrap this call."""
        dist.waited_s += time.perf_counter() - self.called  # in the wrapper, where ranks exchange buffers
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
        means, counts = self.differentiate(update, batch)
        self.mark("optimizer")
        norm = update.norm()
        self.move(update, norm, means, batch)
        self.note(batch, means, counts, norm, started)

    def differentiate(self, update: Update, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fill the gradients of one step.

        Returns:
            this rank's share of the mean of each objective, and the number of items of each over all ranks.
        """
        self.mark("counts")
        passes = [ForwardPass(self.model, micro, self.graph) for micro in batch.batches]
        counts = global_counts(self.sum_counts(passes))
        with self.autocast():
            self.whole_step.prepare(passes, self.seed)
        means = dict.fromkeys(self.wirings, torch.zeros((), device=self.device))
        for number, forward in enumerate(passes):
            with update.micro(last=number == len(passes) - 1):
                self.seed(number)
                self.mark("forward")
                self.mark("model")  # one more than a rank that hangs before: the wrapper may wait for it first
                self.called = time.perf_counter()
                combined = update.forward(number, forward, counts)
                self.mark("backward")
                update.backward(combined.loss)
            means = {name: mean + combined.means[name] for name, mean in means.items()}
            forward.values.clear()  # or the outputs of all micro-batches would pile up
        return means, counts

    def rehearse(self, batch: Any) -> None:
        """Fill the gradients of a step and throw them away; weights, buffers and random numbers stay as they were.

        Data parallelism lays out its buckets anew after the first backward pass, and the layout changes the last bits
        of sums over three ranks or more. Rehearsed at the start of every attempt, all steps have the same layout.
        """
        assert isinstance(self.update, PlainUpdate)
        buffers = {name: value.clone() for name, value in self.named_buffers()}
        self.update.untouched = self.untouched(batch)
        self.differentiate(self.update, batch)
        for parameter in self.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, value in self.named_buffers():
                value.copy_(buffers[name])

    def untouched(self, batch: Any) -> list[nn.Parameter]:
        """Return the trained parameters that no objective reaches: a matter of the config, so one look is enough."""
        forward = ForwardPass(self.model, batch.batches[0], self.graph)
        self.whole_step.prepare([forward], self.seed)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.called = time.perf_counter()
        loss = self(0, forward, global_counts(self.sum_counts([forward]))).loss
        grads = torch.autograd.grad(loss, trained, allow_unused=True)  # past the hooks of data parallelism
        return [parameter for parameter, grad in zip(trained, grads, strict=True) if grad is None]

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
        """Move the weights unless the guard finds trouble; the same way on every rank.

        Raises:
            NonFiniteError, SpikeError: the guard's policy ends the run.
        """
        trouble = None if self.scale_fell(update, norm, means) else self.guard.look(norm, means, self.weights)
        if trouble or not torch.isfinite(norm):
            update.discard()
        if trouble:
            self.guard.answer(trouble, step=self.cursor, batch=batch, means=means, seed=self.recipe.seed)
        elif torch.isfinite(norm):
            update.step(norm)
            for module in self.modules():
                if isinstance(module, Temperature) and module.value.requires_grad:
                    update.clamp(module.value, *module.value_bounds)
            if self.ema is not None:
                self.ema.update(update.weights(), self.cursor + 1)
            if update.scale is not None:
                update.scale.accept()
        self.cursor += 1

    def scale_fell(self, update: Update, norm: Tensor, means: Mapping[str, Tensor]) -> bool:
        """In fp16, lower a loss scale under which only the scaled gradient overflowed; the step is left out.

        Raises:
            NonFiniteError: the scale is at its floor.
        """
        if update.scale is None or bool(torch.isfinite(norm)):
            return False
        is_loss = torch.stack(list(means.values())).isfinite().logical_not().any()
        if dist.max_over_ranks(is_loss.long()):
            return False  # no scale is to blame
        if not update.scale.lower():
            raise NonFiniteError(
                f"step {self.cursor}: the gradient is not finite although the loss scale of fp16 is at its floor; "
                "use trainer.precision=bf16-mixed, or lower optim.lr."
            )
        return True

    def alone(self) -> AbstractContextManager:
        """Return the context in which every rank can evaluate `model` by itself, with averaged weights if there are."""
        contexts = ExitStack()
        if self.update is not None:
            average = self.ema.average if self.ema is not None else None
            contexts.enter_context(showing(self.update, self, average))
        if self.recipe.precision.weights != torch.float32:
            contexts.enter_context(self.recipe.precision.autocast(self.device))
        return contexts

    def own_values(self) -> dict[str, Tensor]:
        """Return what this rank holds of the trained weights, and the buffers."""
        assert self.update is not None
        return {name: share.values for name, share in self.update.weights().items()} | dict(self.named_buffers())

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
            "data_wait_s": started - self.ended - self.gate_s,
            "step_s": now - self.ended,
            "batch": batch,
        }
        self.ended, self.gate_s = now, 0.0

    def trained_parts(self) -> dict[str, int]:
        """Return the number of parameters of each part of the model and of each objective."""
        owners = {**dict(self.model.named_children()), **dict(self.objectives.items())}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in owners.items()}

    def on_train_start(self) -> None:
        """Leave the set-up time out of the first step's data wait."""
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was done since the last step out of the next step's data wait."""
        self.ended, self.gate_s = time.perf_counter(), 0.0


def _count_wiring(objective: nn.Module, wiring: Wiring) -> Wiring:
    """The roles that `count` takes."""
    return {role: wiring[role] for role in inspect.signature(objective.count).parameters}  # type: ignore[arg-type]
