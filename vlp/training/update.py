"""How the weights move: one interface over a single process, data parallelism and ZeRO.

    micro (forward, backward) x K -> norm of the global gradient -> step, or discard -> clamp

A tensor that belongs to a parameter is seen as the `Share` of it that this rank holds: all of it, or a piece under
ZeRO. State that is kept beside the weights (moments, averages) has the same shares, so nothing else knows the strategy.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from vlp.training.precision import LossScale

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped as the parameter; its "step" is one number


class Share(NamedTuple):
    """What this rank holds of a tensor: n values, perhaps none, from `start` of the flattened whole of `shape`."""

    values: Tensor  # live: writing into it changes the state
    start: int
    shape: torch.Size

    def take(self, whole: Tensor) -> None:
        """Fill the share from the whole tensor, of which no more is read than that."""
        part = whole.reshape(-1)[self.start : self.start + self.values.numel()]
        self.values.copy_(part.view(self.values.shape))


class Update(Protocol):
    """What a strategy does with gradients and weights."""

    optimizer: torch.optim.Optimizer  # its groups carry the names and rates of `vlp.training.optim`
    scale: LossScale | None
    sharded: bool  # do ranks hold different shares of the trained weights, and
    frozen_sharded: bool  # of the others?

    def micro(self, *, last: bool) -> AbstractContextManager:
        """Return the context of one micro-batch; gradients are summed over the ranks in the last one at the latest."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """Call the wrapped module."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss."""
        ...

    def norm(self) -> Tensor:
        """Return the norm of the global gradient, the same on every rank; infinite or NaN if any part of it is."""
        ...

    def step(self, norm: Tensor) -> None:
        """Clip by the norm and move the weights."""
        ...

    def discard(self) -> None:
        """Forget the gradient."""
        ...

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Bring every copy of a weight that this rank holds into its bounds."""
        ...

    def weights(self) -> dict[str, Share]:
        """Return the trained weights, in the precision in which they move."""
        ...

    def frozen(self) -> dict[str, Share]:
        """Return the parameters that do not move."""
        ...

    def moments(self) -> dict[str, Share]:
        """Return the optimizer's state by "kind/name"; empty before the first step."""
        ...

    def steps(self) -> dict[str, float]:
        """Return the steps that the optimizer has counted, by name."""
        ...

    def prepare_moments(self, steps: Mapping[str, float]) -> None:
        """Make room for moments that are about to be filled."""
        ...

    def publish(self) -> None:
        """Let the weights that compute follow those of `weights` and `frozen`."""
        ...

    def whole(self) -> AbstractContextManager:
        """Return the context in which every rank can use the module alone, as on one process."""
        ...


class PlainUpdate:
    """On one process, or the same on all: weights and their optimizer are whole on every rank.

    Args:
        wrapped: the module, or DistributedDataParallel around it. module: itself. optimizer: of `vlp.training.optim`.
        max_norm: see torch's clip_grad_norm_; None clips nothing. scale: for float16.
    """

    sharded = frozen_sharded = False

    def __init__(
        self,
        wrapped: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None,
        scale: LossScale | None,
    ) -> None:
        self.wrapped, self.module, self.optimizer, self.scale = wrapped, module, optimizer, scale
        self.max_norm = max_norm or torch.inf
        self.untouched: list[nn.Parameter] = []  # trained, but reached by no objective; data parallelism waits for them
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def micro(self, *, last: bool) -> AbstractContextManager:
        """Keep the gradients of all micro-batches but the last on this rank."""
        wrapped = self.wrapped
        return (
            nullcontext() if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped.no_sync()
        )

    def forward(self, *inputs: Any) -> Any:
        """Call the wrapped module."""
        return self.wrapped(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, times the scale; zeros for what the loss does not reach."""
        for parameter in self.untouched:
            loss = loss + 0.0 * parameter.sum()
        (loss if self.scale is None else loss * self.scale.value).backward()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Divide by the loss scale and return the norm; a parameter that nothing reached gets a gradient of zeros."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif self.scale is not None:
                parameter.grad.div_(self.scale.value)
        return nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])

    def step(self, norm: Tensor) -> None:
        """Clip, move, forget the gradient."""
        nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.max_norm, norm)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Bring the weight into its bounds."""
        parameter.clamp_(low, high)

    def weights(self) -> dict[str, Share]:
        """Return the trained parameters themselves."""
        return {name: _all_of(p.detach()) for name, p in self.trained.items()}

    def frozen(self) -> dict[str, Share]:
        """Return the other parameters."""
        return {name: _all_of(p.detach()) for name, p in self.module.named_parameters() if name not in self.trained}

    def moments(self) -> dict[str, Share]:
        """Return what AdamW keeps of each parameter."""
        state = self.optimizer.state
        return {f"{kind}/{n}": _all_of(state[p][kind]) for n, p in self.trained.items() for kind in MOMENTS if state[p]}

    def steps(self) -> dict[str, float]:
        """Return AdamW's own count for each parameter."""
        return {n: float(self.optimizer.state[p]["step"]) for n, p in self.trained.items() if self.optimizer.state[p]}

    def prepare_moments(self, steps: Mapping[str, float]) -> None:
        """Put zeros where the moments will be."""
        for name, step in steps.items():
            self.optimizer.state[self.trained[name]] = fresh_state(self.trained[name], step)

    def publish(self) -> None:
        """Do nothing: the weights that move are those that compute."""

    def whole(self) -> AbstractContextManager:
        """Return a context that does nothing: the module is whole."""
        return nullcontext()


def fresh_state(parameter: Tensor, step: float) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter after `step` steps, moments zero; fused AdamW counts on the same device."""
    zeros = {kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in MOMENTS}
    return {"step": torch.tensor(step, dtype=torch.float32, device=parameter.device), **zeros}


def gathered(share: Share, *, device: torch.device, to: int | None = None) -> Tensor:
    """Put a sharded tensor together from all ranks, in float32: on rank `to`, or on every rank.

    Every rank must call this, in the same order. Elsewhere than on rank `to` the result means nothing.
    """
    whole = torch.zeros(share.shape.numel(), dtype=torch.float32, device=device)
    whole[share.start : share.start + share.values.numel()] = share.values.reshape(-1).to(device)
    if to is None:
        torch_dist.all_reduce(whole)
    else:
        torch_dist.reduce(whole, to)
    return whole.view(share.shape)


@contextmanager
@torch.no_grad()
def showing(update: Update, module: nn.Module, average: Mapping[str, Share] | None) -> Iterator[None]:
    """Let the module compute alone on every rank inside the block, with the averaged weights where there are any."""
    with update.whole():
        own = {}
        parameters = dict(module.named_parameters())
        for name, share in (average or {}).items():
            parameter = parameters[name]
            own[name] = parameter.detach().clone()
            parameter.copy_(gathered(share, device=parameter.device) if update.sharded else share.values)
        try:
            yield
        finally:
            for name, value in own.items():
                parameters[name].copy_(value)


def _all_of(tensor: Tensor) -> Share:
    """The share of a rank that holds everything."""
    return Share(tensor, 0, tensor.shape)
