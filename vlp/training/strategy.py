"""The strategies that `trainer.strategy` names: how ranks are started and what they share."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from vlp.training.precision import LossScale, Precision
from vlp.training.update import PlainUpdate, Update


class Ddp(DDPStrategy):
    """Data parallelism whose training_step calls the wrapped module itself, once for each micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*args, **kwargs)


class Needs(NamedTuple):
    """What a strategy is built from."""

    precision: Precision
    max_norm: float | None
    num_devices: int  # on all nodes
    patience: timedelta  # of a collective
    zero: Mapping[str, Any]  # the section `trainer.zero`


def _zero(stage: int) -> Callable[[Needs], Any]:
    def make(needs: Needs) -> Any:
        from vlp.training.zero import Settings, Zero  # DeepSpeed is not needed by other runs

        settings = Settings(**needs.zero)
        return Zero(stage=stage, settings=settings, precision=needs.precision, max_norm=needs.max_norm)

    return make


def _auto(needs: Needs) -> Any:
    return "auto" if needs.num_devices == 1 else _ddp(needs)


def _ddp(needs: Needs) -> Any:
    return Ddp(timeout=needs.patience)


STRATEGIES: Mapping[str, Callable[[Needs], Any]] = {
    "auto": _auto,
    "ddp": _ddp,
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}


@runtime_checkable
class Sharding(Protocol):
    """A strategy whose ranks hold different shares of the state."""

    def make_update(self, module: nn.Module, *, scale: LossScale | None) -> Update:
        """Return how the weights move; called once the strategy is set up."""
        ...


def update_of(trainer: pl.Trainer, module: nn.Module, *, max_norm: float | None, scale: LossScale | None) -> Update:
    """Return how the weights move, once the trainer's strategy is set up."""
    strategy = trainer.strategy
    if isinstance(strategy, Sharding):
        return strategy.make_update(module, scale=scale)
    assert strategy.model is not None
    return PlainUpdate(strategy.model, module, trainer.optimizers[0], max_norm=max_norm, scale=scale)
