"""What one real step allocates on this machine, by PyTorch's own allocator: the truth that plans are compared with."""

import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from vlp.forward import ForwardPass
from vlp.layers.block import checkpoint_blocks
from vlp.objectives.combine import combine
from vlp.planning.system import batch_of
from vlp.training.assemble import assemble
from vlp.training.prepare import Fitted


def measured_peak(cfg: DictConfig, num_clips: int) -> int:
    """Return the most bytes that forward and backward pass hold beside parameters, in the second of two steps."""
    torch.manual_seed(0)
    system = assemble(cfg)
    for part in [part for root in system.objectives.values() for part in root.modules()]:
        if isinstance(part, Fitted):
            part.fitted.fill_(True)
    if cfg.trainer.checkpoint_activations:
        checkpoint_blocks(system.model)
    batch = batch_of(cfg, num_clips)
    batch = batch._replace(frames=torch.randint(256, batch.frames.shape).byte())
    parameters = [p for root in (system.model, *system.objectives.values()) for p in root.parameters()]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            forward = ForwardPass(system.model.train(), batch, system.graph)
            terms = {n: system.objectives[n](*forward.roles(wiring)) for n, wiring in system.wirings.items()}
        combine(terms, system.weights, {n: t.count.float() for n, t in terms.items()}).loss.backward()

    step()
    for parameter in parameters:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
