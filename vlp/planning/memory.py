"""Bytes of a GPU's memory by strategy: what is kept between steps, and what a micro-batch adds.

Sums are exact for what is kept; what a micro-batch adds comes from a trace of shapes.

Source: arXiv:1910.02054, 3 (what the stages of ZeRO divide among N ranks).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from vlp.planning.trace import Peak

GIB = 2**30
BLOCKS = 12 * 2**20  # of similarities in contrast


class Sizes(NamedTuple):
    """What the memory depends on, beside the strategy."""

    parameters: int
    trainable: int
    tensors: int  # trainable ones: AdamW keeps a count for each
    buffers: int  # bytes
    weight_bytes: int  # of one weight
    ema: bool
    ranks: int
    bucket: int  # numbers that ZeRO reduces or gathers at a time


class Memory(NamedTuple):
    """Bytes on one GPU, and on its host where state is offloaded."""

    weights: int
    gradients: int
    optimizer: int  # moments, and float32 masters where there are
    average: int  # EMA
    buckets: int  # of communication, gathered weights among them
    host: int = 0

    @property
    def kept(self) -> int:
        """Return the bytes on the GPU that are there whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets


def sizes(module: nn.Module, *, weight_bytes: int, ema: bool, ranks: int, bucket: int = 50_000_000) -> Sizes:
    """Count the parameters and buffers of what is trained."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return Sizes(
        parameters=sum(p.numel() for p in module.parameters()),
        trainable=sum(p.numel() for p in trained),
        tensors=len(trained),
        buffers=sum(b.numel() * b.element_size() for b in module.buffers()),
        weight_bytes=weight_bytes,
        ema=ema,
        ranks=ranks,
        bucket=bucket,
    )


def single(s: Sizes) -> Memory:
    """One process: everything once."""
    w = s.weight_bytes
    return Memory(
        weights=w * s.parameters + s.buffers,
        gradients=w * s.trainable,
        optimizer=2 * w * s.trainable + 4 * s.tensors,
        average=4 * s.trainable * s.ema,
        buckets=0,
    )


def ddp(s: Sizes) -> Memory:
    """Everything on every rank, and the buckets in which gradients are reduced."""
    return single(s)._replace(buckets=s.weight_bytes * s.trainable)


def zero1(s: Sizes) -> Memory:
    """The optimizer's state and float32 masters are divided."""
    share = -(-s.trainable // s.ranks)
    return Memory(
        weights=s.weight_bytes * s.parameters + s.buffers,
        gradients=s.weight_bytes * s.trainable,
        optimizer=12 * share,
        average=4 * share * s.ema,
        buckets=s.weight_bytes * min(s.bucket, s.trainable),
    )


def zero2(s: Sizes) -> Memory:
    """Gradients are divided too; they are added up in float32, and reduced in two buckets in turn."""
    share = -(-s.trainable // s.ranks)
    return zero1(s)._replace(gradients=4 * share, buckets=2 * s.weight_bytes * min(s.bucket, s.trainable))


def zero3(s: Sizes) -> Memory:
    """Weights are divided too; those of the next layers are gathered ahead."""
    weights = s.weight_bytes * -(-s.parameters // s.ranks) + s.buffers
    gathered = s.weight_bytes * min(s.bucket, s.parameters)
    return zero2(s)._replace(weights=weights, buckets=zero2(s).buckets + gathered)


def zero2_offload(s: Sizes) -> Memory:
    """ZeRO-2 with masters and moments in the memory of the host."""
    there = zero2(s)
    return there._replace(optimizer=0, average=0, host=there.optimizer + there.average)


def zero3_offload(s: Sizes) -> Memory:
    """ZeRO-3 with masters, moments and weights in the memory of the host."""
    there = zero3(s)
    host = there.optimizer + there.average + there.weights - s.buffers
    return there._replace(optimizer=0, average=0, weights=s.buffers, host=host)


STRATEGIES: Mapping[str, Callable[[Sizes], Memory]] = {
    "single": single,
    "ddp": ddp,
    "zero1": zero1,
    "zero2": zero2,
    "zero3": zero3,
    "zero2 + offload": zero2_offload,
    "zero3 + offload": zero3_offload,
}


def micro_bytes(peak: Peak, *, grads_are_kept: bool) -> int:
    """Return what a micro-batch adds at its peak to what `Memory` counts, gradients among that.

    Args:
        grads_are_kept: gradients are there all the time, from earlier micro-batches or as ZeRO's shares; else they
            appear one by one while activations go.
    """
    return peak.without_gradients if grads_are_kept else peak.with_gradients - peak.gradients


def gathered_bytes(*, clips: int, width: int, own: int, accumulate: int) -> int:
    """Return the bytes of contrast over all clips: embeddings of all ranks, their gradient, blocks, and what is kept.

    Args:
        clips: whose embeddings are gathered. width: of an embedding. own: of this rank, in all its micro-batches.
    """
    kept = 4 * own * width * 4 if accumulate > 1 else 0  # both sides and their gradients
    return 2 * clips * width * 4 + BLOCKS + kept


def largest_micro_batch(small: tuple[int, float], large: tuple[int, float], room: float) -> int:
    """Return how many clips fit into `room` bytes, from the bytes of two sizes of micro-batch; 0 if none."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return max(0, int((room - (small[1] - slope * small[0])) / slope))
