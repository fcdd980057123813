"""DeepSpeed ZeRO under Lightning, on CUDA with nccl and on CPU with gloo. The only file that imports deepspeed.

    ZeRO-1 shards the optimizer's state and the float32 masters, ZeRO-2 the gradients too, ZeRO-3 the weights too

torch's fused AdamW moves the shards, also where they are offloaded to the host, so nothing has to be compiled.
Overflow, loss scale and clipping follow `vlp.training.update`: DeepSpeed is given the norm that has just been taken.

Source: arXiv:1910.02054.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from pytorch_lightning.plugins import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from vlp.training.precision import LossScale, Precision
from vlp.training.update import MOMENTS, Share, fresh_state


class Settings(NamedTuple):
    """The section `trainer.zero`."""

    offload_optimizer: bool
    offload_parameters: bool
    bucket_elements: int
    persistent_elements: int


class Zero(DeepSpeedStrategy):
    """Lightning's strategy, which also runs on CPU and leaves training_step to call the engine itself."""

    def __init__(self, *, stage: int, settings: Settings, precision: Precision, max_norm: float | None) -> None:
        on_cuda = torch.cuda.is_available()
        super().__init__(
            config=config_of(stage, settings, precision, max_norm, on_cuda=on_cuda),
            precision_plugin=DeepSpeedPrecision("32-true"),  # `Precision` has cast the weights
        )
        self.stage = stage

    @property
    def root_device(self) -> torch.device:
        """Return this rank's device; DeepSpeed wants an index, also on CPU."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Start as Lightning does, without its refusal of CPUs."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Form the process group, without Lightning's check of device numbers where there are none."""
        if self.root_device.type == "cpu":
            _never_compile_collectives()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module: it calls the engine once for each micro-batch."""
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*args, **kwargs)

    def make_update(self, module: nn.Module, *, scale: LossScale | None) -> "ZeroUpdate":
        """Return how the weights move; called once the strategy is set up."""
        return ZeroUpdate(self.deepspeed_engine, module, stage=self.stage, scale=scale)

    def teardown(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        if hasattr(self.model, "destroy"):
            self.model.destroy()  # type: ignore[union-attr]
        self.optimizers = []  # their tensors are views into DeepSpeed's buffers: Lightning must not move them
        super().teardown()


def config_of(
    stage: int, settings: Settings, precision: Precision, max_norm: float | None, *, on_cuda: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    host = {"device": "cpu", "pin_memory": on_cuda}
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_cuda,
        "reduce_bucket_size": settings.bucket_elements,
        "allgather_bucket_size": settings.bucket_elements,
        "stage3_prefetch_bucket_size": settings.bucket_elements,
        "stage3_param_persistence_threshold": settings.persistent_elements,
        **({"offload_optimizer": host} if settings.offload_optimizer else {}),
        **({"offload_param": host} if settings.offload_parameters else {}),
    }
    half = precision.weights == torch.bfloat16
    # Micro-batches are added up in float32; DeepSpeed has no such path in its stage 1.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if half and stage > 1 else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own logs, which are off
        "gradient_clipping": max_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        **sums,
    }


class ZeroUpdate:
    """See `vlp.training.update.Update`; `engine` is DeepSpeed's, around `module`."""

    sharded = True

    def __init__(self, engine: Any, module: nn.Module, *, stage: int, scale: LossScale | None) -> None:
        self.engine, self.module, self.stage, self.scale = engine, module, stage, scale
        self.frozen_sharded = stage == 3
        self.is_first = True  # is the next micro-batch the first one of its step?
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.places = {name: self._place(p) for name, p in self.trained.items()}

    def micro(self, *, last: bool) -> AbstractContextManager:
        """Tell DeepSpeed whether this is the last micro-batch of the step."""
        if self.is_first:
            self._forget_sums()
        self.is_first = last
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def forward(self, *inputs: Any) -> Any:
        """Call the engine."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, times the scale."""
        if self.scale is not None:
            self.zero.custom_loss_scaler, self.zero.external_loss_scale = True, self.scale.value
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self) -> Tensor:
        """Return the norm of the global gradient, infinite where any part of it is not finite."""
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self.zero._get_norm_groups())
        else:
            norm = self.zero.scaled_global_norm()
        return norm / self.zero.loss_scale

    def step(self, norm: Tensor) -> None:
        """Clip by the norm and move the weights."""
        with self._norm_known(norm * self.zero.loss_scale):
            self.engine.step()
        assert self.engine.was_step_applied(), "the norm was finite"

    def discard(self) -> None:
        """Let DeepSpeed forget the gradient as it does after an overflow."""
        with self._norm_known(torch.tensor(torch.inf)):
            self.engine.step()
        assert not self.engine.was_step_applied()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Bring the master's share, the partition and the whole weight into the bounds, those that are here."""
        name = next(name for name, p in self.trained.items() if p is parameter)
        self.places[name].share().values.clamp_(low, high)
        if self.stage == 3:
            parameter.ds_tensor.data.clamp_(low, high)  # type: ignore[attr-defined]
        parameter.data.clamp_(low, high)  # empty where ZeRO-3 has released it

    def weights(self) -> dict[str, Share]:
        """Return this rank's shares of the float32 masters."""
        return {name: place.share() for name, place in self.places.items()}

    def frozen(self) -> dict[str, Share]:
        """Return the parameters that do not move: whole, or this rank's partition under ZeRO-3."""
        frozen = {name: p for name, p in self.module.named_parameters() if name not in self.trained}
        return {
            name: self._partition(p) if self.stage == 3 else Share(p.data, 0, p.shape) for name, p in frozen.items()
        }

    def moments(self) -> dict[str, Share]:
        """Return this rank's shares of what AdamW keeps."""
        state = self.optimizer.state
        return {
            f"{kind}/{name}": place.share(state[place.flat][kind])
            for name, place in self.places.items()
            for kind in MOMENTS
            if state.get(place.flat)
        }

    def steps(self) -> dict[str, float]:
        """Return AdamW's counts; a whole buffer of parameters shares one."""
        state = self.optimizer.state
        return {n: float(state[p.flat]["step"]) for n, p in self.places.items() if state.get(p.flat)}

    def prepare_moments(self, steps: Mapping[str, float]) -> None:
        """Put zeros where the moments will be."""
        flats = {id(place.flat): (place.flat, steps[name]) for name, place in self.places.items() if name in steps}
        for flat, step in flats.values():
            self.optimizer.state[flat] = fresh_state(flat, step)

    @torch.no_grad()
    def publish(self) -> None:
        """Let the weights that compute follow the masters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather every parameter of ZeRO-3 for the time of the block, and take its hooks off."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.zero.parameter_offload
        offload.partition_all_parameters()
        with GatheredParameters(list(self.module.parameters())):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def _forget_sums(self) -> None:
        """Set the sums over micro-batches to zero.

        DeepSpeed overwrites them in the first micro-batch, and only those of parameters that have a gradient there: a
        temperature that has its first one in the last micro-batch would be given that of the step before as well.
        """
        kept = getattr(self.zero, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
        for sums in (*kept.values(), *getattr(self.zero, "accumulated_grads_in_cpu", {}).values()):
            sums.zero_()

    def _place(self, parameter: Any) -> "_Place":
        if self.stage == 3:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            share = self._partition(parameter)
            flat = self.zero.fp32_partitioned_groups_flat[group]
            return _Place(flat, offset, share.values.numel(), share.start, parameter.ds_shape)
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            group = next(g for g, members in enumerate(self.zero.bit16_groups) if any(p is parameter for p in members))
            return _Place(self.zero.single_partition_of_fp32_groups[group], 0, 0, 0, parameter.shape)
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(flat, here.start, here.numel, there.start, parameter.shape)

    def _partition(self, parameter: Any) -> Share:
        """This rank's part of a ZeRO-3 parameter, without the zeros that fill the last one."""
        part = parameter.ds_tensor.data.view(-1)
        start = min(self.engine.global_rank * part.numel(), parameter.ds_numel)
        return Share(part[: max(0, min(part.numel(), parameter.ds_numel - start))], start, parameter.ds_shape)

    @contextmanager
    def _norm_known(self, norm: Tensor) -> Iterator[None]:
        """Let DeepSpeed take this for the norm of the scaled gradient, in place of computing it again."""
        name, value = ("_get_norm_groups", [norm]) if self.stage == 3 else ("scaled_global_norm", norm)
        setattr(self.zero, name, lambda: value)
        self.zero.check_grad_overflow = not torch.isfinite(norm)  # else it would search the gradient once more
        try:
            yield
        finally:
            delattr(self.zero, name)


class _Place(NamedTuple):
    """Where this rank's share of a parameter lies: `length` numbers from `offset` of a flat buffer."""

    flat: Tensor
    offset: int
    length: int
    start: int
    shape: torch.Size

    def share(self, flat: Tensor | None = None) -> Share:
        """Return the share in the masters, or in a buffer that is laid out as they are."""
        buffer = self.flat if flat is None else flat
        return Share(buffer.detach()[self.offset : self.offset + self.length], self.start, self.shape)


def _never_compile_collectives() -> None:
    """Keep DeepSpeed from compiling its shared memory collectives, which gloo does not need."""
    import deepspeed

    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
