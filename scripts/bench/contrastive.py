"""P8: softmax contrast of G pairs of width 512, forward and backward, against open_clip's form and its local loss.

open_clip's form makes both G x G matrices; its local loss is one rank's share of eight. Seconds are the best of the
turns. Peak memory is what was allocated above the embeddings themselves, their gradients among it.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vlp.objectives.contrastive import Contrastive
from vlp.objectives.sigmoid_contrast import SigmoidContrast

DIM, RANKS = 512, 8
SIZES = tuple(map(int, os.environ.get("VLP_BENCH_SIZES", "4096,8192,16384").split(",")))
PLAIN_UP_TO = 16_384  # above, the matrices of the plain form need more than 16 GB
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> dict[str, Any]:
    """Return seconds, peaks and ratios for each size."""
    figures: dict[str, Any] = {}
    for size in SIZES:
        figures |= _compare(size)
    return figures


def _compare(size: int) -> dict[str, Any]:
    losses: dict[str, Loss] = {"vlp": _ours(Contrastive()), "vlp sigmoid": _ours(SigmoidContrast())}
    if size <= PLAIN_UP_TO:
        losses |= {"open_clip's form": _plain, f"its local loss, 1 of {RANKS} ranks": _local}
    turns = 3 if size <= 8192 else 1
    seconds = {name: min(_timed(loss, size) for _ in range(turns)) for name, loss in losses.items()}
    peaks = {name: _peak_mib(loss, size) for name, loss in losses.items()}
    rows = {f"{size:,}: {name}": f"{seconds[name]:.3f} s, peak {peaks[name]:.0f} MiB" for name in losses}
    features = 2 * size * DIM * 4 / 2**20
    rows[f"{size:,}: vlp's peak above the gradients of the embeddings"] = f"{peaks['vlp'] - features:.0f} MiB"
    if size <= PLAIN_UP_TO:
        rows[f"{size:,}: time, vlp to open_clip's form"] = seconds["vlp"] / seconds["open_clip's form"]
        rows[f"{size:,}: largest difference of the gradients, relative"] = _difference(size)
    return rows


def _ours(objective: Any) -> Loss:
    return lambda video, text, scale: objective(video, text, scale, torch.ones(len(video), dtype=torch.bool)).total


def _plain(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    true = torch.arange(len(video))
    logits = (scale * video @ text.T, scale * text @ video.T)
    return sum((F.cross_entropy(x, true, reduction="sum") for x in logits), start=torch.zeros(())) / 2


def _local(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """One rank's rows against the embeddings of all ranks."""
    own = len(video) // RANKS
    true = torch.arange(own)
    logits = (scale * video[:own] @ text.T, scale * text[:own] @ video.T)
    return sum((F.cross_entropy(x, true, reduction="sum") for x in logits), start=torch.zeros(())) / 2


def _inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    video, text = (F.normalize(torch.randn(size, DIM, generator=generator), dim=1) for _ in range(2))
    return video.requires_grad_(), text.requires_grad_(), torch.tensor(14.3, requires_grad=True)


def _timed(loss: Loss, size: int) -> float:
    inputs = _inputs(size)
    started = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - started


def _peak_mib(loss: Loss, size: int) -> float:
    """Largest sum of what the allocator gave and did not take back."""
    inputs = _inputs(size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(*inputs).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def _difference(size: int) -> float:
    ours, plain = _inputs(size), _inputs(size)
    _ours(Contrastive())(*ours).backward()
    _plain(*plain).backward()
    pairs = [(a.grad, b.grad) for a, b in zip(ours, plain, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a is not None and b is not None)


if __name__ == "__main__":
    print(main())
