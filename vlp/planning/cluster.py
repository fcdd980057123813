"""Time, communication, data and storage of a run on a cluster, from FLOPs, bytes and bandwidths.

Computing takes FLOPs / (dense rate x utilisation), and at least the start of each kernel. Reducing gradients moves
2 (N - 1) / N of their bytes through each GPU's slowest link, and hides behind the backward pass (two thirds of the
computing); what is left over is added.

Source: the bytes of ring all-reduce and of ZeRO, arXiv:1910.02054, 7.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlp import config


class Gpu(NamedTuple):
    """One file of conf/gpu; rates are dense."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    hbm_gb_s: float
    link_gb_s: float  # between GPUs of a node, one direction
    network_gb_s: float  # between nodes, one direction, a GPU's share


class Step(NamedTuple):
    """Seconds of one optimizer step on one rank."""

    compute_s: float
    optimizer_s: float
    exchange_s: float  # of weights and gradients, before hiding
    gather_s: float  # of embeddings, both ways; nothing hides it
    exposed_s: float  # what is not hidden of the exchange

    @property
    def total_s(self) -> float:
        """Return the length of the step."""
        return self.compute_s + self.optimizer_s + self.gather_s + self.exposed_s


def gpu(name: str, folder: Path = config.CONF / "gpu") -> Gpu:
    """Read the figures of a card.

    Raises:
        config.ConfigError: there is no such file, or its keys are not those of `Gpu`.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise config.ConfigError([f"cluster.gpu: there is no conf/gpu/{name}.yaml; there are {', '.join(known)}."])
    values = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    if set(values) != set(Gpu._fields):
        raise config.ConfigError([f"conf/gpu/{name}.yaml: its keys must be {', '.join(Gpu._fields)}."])
    return Gpu(**{key: float(value) for key, value in values.items()})


def step_time(
    card: Gpu,
    *,
    flops: float,
    kernels: int,
    half: bool,
    kept_bytes: int,
    exchanged_bytes: float,
    gathered_bytes: float,
    cluster: Any,
) -> Step:
    """Return the seconds of a step.

    Args:
        flops: of this rank. kernels: that it starts, one after the other; small ones cost their start.
        half: whether products run in 16 bits.
        kept_bytes: that the optimizer reads and writes.
        exchanged_bytes: through this GPU for gradients and weights. gathered_bytes: for embeddings.
    """
    ranks = cluster.nodes * cluster.gpus_per_node
    rate = (card.bf16_tflops if half else card.fp32_tflops) * 1e12 * cluster.utilisation
    between_nodes = (cluster.network_gb_s or card.network_gb_s) if cluster.nodes > 1 else card.link_gb_s
    bandwidth = min(between_nodes, card.link_gb_s) * 1e9
    share = (ranks - 1) / ranks
    compute = max(flops / rate, kernels * cluster.launch_us * 1e-6)
    exchange = exchanged_bytes * share / bandwidth
    return Step(
        compute_s=compute,
        optimizer_s=2 * kept_bytes / (card.hbm_gb_s * 1e9),
        exchange_s=exchange,
        gather_s=gathered_bytes * share / bandwidth,
        exposed_s=max(0.0, exchange - compute * 2 / 3),
    )


def exchanged(strategy: str, gradient_bytes: int, weight_bytes: int, accumulate: int) -> float:
    """Return the bytes that pass each link in a step, for an endless ring."""
    if strategy == "single":
        return 0.0
    if strategy.startswith("zero3"):  # weights are gathered for the forward and the backward pass, gradients scattered
        return (2.0 * weight_bytes + gradient_bytes) * accumulate
    if strategy.startswith("zero2"):  # gradients leave after every micro-batch
        return float(gradient_bytes * accumulate + weight_bytes)
    return 2.0 * gradient_bytes


def decode_cores(clips_per_s: float, kind: Mapping[str, float]) -> float:
    """Return the cores that decode so many clips a second."""
    return clips_per_s * kind["decode_ms"] / 1000
