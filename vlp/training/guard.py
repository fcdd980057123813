"""Looks at each step before the weights move: not finite, or a spike? The answer is the same on every rank.

Both are seen in what all ranks share (the norm of the summed gradient, the global loss), so no rank can disagree. The
policy says what follows:

    stop     end the run
    skip     leave the step out, at most `max_skipped_steps` times in the run
    rewind   go back to the weights of the newest checkpoint and on with the data behind the bad step, at most
             `max_rewinds` times; the steps in between are never trained on again, and the next checkpoint says so

Each bad step is a line of `bad_steps.jsonl`: the terms of every rank, and the samples with their shards.
"""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlp import dist

MIN_LOSS_SCALE = 1.0  # fp16: below it even a gradient that is not scaled at all overflows


class NonFiniteError(RuntimeError):
    """The loss, its gradient or a weight is not finite, and the policy leaves no other way than to stop."""


class SpikeError(RuntimeError):
    """There were more spikes of the loss or of the gradient than the policy allows."""


class Limits(NamedTuple):
    """Plain values of the section `trainer`."""

    nan_policy: str = "stop"
    max_skipped_steps: int = 10
    max_rewinds: int = 3
    spike_factor: float | None = None  # of the median of the last `spike_window` steps; None = never look
    spike_window: int = 100
    spike_policy: str = "skip"


class Trouble(NamedTuple):
    """What is wrong with a step."""

    text: str
    policy: str
    error: type[RuntimeError]
    remedy: str


class Memory:
    """What a checkpoint keeps of the bad steps, so that a resumed run goes on counting."""

    def __init__(self, window: int) -> None:
        self.num_skipped, self.num_rewinds = 0, 0
        self.skipped: list[list[int]] = []  # ranges of steps [first, last + 1) that left nothing in the weights
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; floats survive JSON bit for bit."""
        return {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}

    def load(self, values: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self.num_skipped, self.num_rewinds = values["num_skipped"], values["num_rewinds"]
        self.skipped = [list(pair) for pair in values["skipped"]]
        self.forget(values)

    def forget(self, values: Mapping[str, Any]) -> None:
        """Go back to the windows of a checkpoint; what was skipped since stays known."""
        for name in ("losses", "norms"):
            own = getattr(self, name)
            own.clear()
            own.extend(values[name])


class Rewind(Protocol):
    """Puts weights, optimizer and average back to the newest checkpoint."""

    def __call__(self) -> Mapping[str, Any] | None:
        """Return the facts of the checkpoint, or None if there is none."""
        ...


class Guard:
    """Holds the limits and the memory.

    Args:
        limits: see Limits. path: of `bad_steps.jsonl`. rewind: see Rewind.
        name_sample: (source, sample id) -> {"key", "shard"}.
    """

    def __init__(
        self, limits: Limits, *, path: Path, rewind: Rewind, name_sample: Callable[[int, int], dict[str, str]]
    ) -> None:
        self.limits, self.path, self.rewind, self.name_sample = limits, path, rewind, name_sample
        self.memory = Memory(limits.spike_window)
        self.has_rewound = False  # since the last checkpoint: the way back must be saved before the next step

    @classmethod
    def strict(cls) -> "Guard":
        """Return a guard that stops at the first bad step and writes nothing down."""
        return cls(
            Limits(),
            path=Path(os.devnull),
            rewind=lambda: None,
            name_sample=lambda source, sample: {"key": str(sample), "shard": ""},
        )

    def look(self, norm: Tensor, means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Trouble | None:
        """Judge a step by the gradient norm and the global loss, one small all-reduce.

        A loss that is no number need not show in the gradient: that of a rank with masked slots only is empty.
        """
        limits = self.limits
        loss = float(dist.sum_over_ranks(torch.stack([weights[name] * mean for name, mean in means.items()]).sum()))
        if not (torch.isfinite(norm) and math.isfinite(loss)):
            what = "gradient" if math.isfinite(loss) else "loss"
            remedy = "look at the samples in bad_steps.jsonl, or set trainer.nan_policy to skip or rewind"
            return Trouble(f"the {what} is not finite", limits.nan_policy, NonFiniteError, remedy)
        if limits.spike_factor is None:
            return None
        for what, value, window in (("loss", loss, self.memory.losses), ("norm", float(norm), self.memory.norms)):
            if len(window) == limits.spike_window and value > limits.spike_factor * statistics.median(window):
                usual = f"{statistics.median(window):.4g}, the median of {limits.spike_window} steps"
                text = f"the {what} is {value:.4g}, more than {limits.spike_factor:g} times {usual}"
                remedy = "lower optim.lr, or raise trainer.spike_factor"
                return Trouble(text, limits.spike_policy, SpikeError, remedy)
        self.memory.losses.append(loss)
        self.memory.norms.append(float(norm))
        return None

    def answer(self, trouble: Trouble, *, step: int, batch: Any, means: Mapping[str, Tensor], seed: int) -> None:
        """Write the step down and follow the policy; called on all ranks.

        Raises:
            NonFiniteError, SpikeError: the run has to stop.
        """
        where = self._write(trouble, step, batch, means, seed)
        why = _POLICIES[trouble.policy](self, step)
        if why:
            raise trouble.error(f"step {step}: {trouble.text} ({where}); {why}; {trouble.remedy}.")

    def skip(self, step: int) -> str:
        """Leave one step out; return why that is not possible, or ''."""
        self.memory.num_skipped += 1
        self.memory.skipped.append([step, step + 1])
        limit = self.limits.max_skipped_steps
        return f"more than trainer.max_skipped_steps={limit} were skipped" if self.memory.num_skipped > limit else ""

    def go_back(self, step: int) -> str:
        """Take the weights of the newest checkpoint; return why that is not possible, or ''."""
        if self.memory.num_rewinds >= self.limits.max_rewinds:
            return f"trainer.max_rewinds={self.limits.max_rewinds} are used up"
        facts = self.rewind()
        if facts is None:
            return "there is no checkpoint to go back to yet"
        self.memory.num_rewinds += 1
        self.memory.num_skipped += step + 1 - facts["cursor"]
        self.memory.forget(facts["guard"])
        self.memory.skipped.append([facts["cursor"], step + 1])
        self.has_rewound = True
        return ""

    def _write(self, trouble: Trouble, step: int, batch: Any, means: Mapping[str, Tensor], seed: int) -> str:
        """Collect from all ranks, append a line on rank 0, and return which ranks and terms are to blame."""
        values = torch.stack([mean.detach().float() for mean in means.values()])  # [terms]
        ids = torch.cat([micro.sample_id for micro in batch.batches]).to(values.device)
        by_rank, ids_by_rank = dist.gather(values[None]).cpu(), dist.gather(ids[None]).cpu()  # [W, terms], [W, clips]
        guilty = [rank for rank, row in enumerate(by_rank) if not row.isfinite().all()]
        ranks = guilty or list(range(len(by_rank)))
        terms = [dict(zip(means, row.tolist(), strict=True)) for row in by_rank]
        samples = [
            {"rank": rank, "id": sample, **self.name_sample(batch.source, sample)}
            for rank in ranks
            for sample in ids_by_rank[rank].tolist()
            if sample >= 0
        ]
        row = {"step": step, "what": trouble.text, "policy": trouble.policy, "ranks": guilty, "source": batch.source}
        row |= {"terms": [{k: f"{v:.6g}" for k, v in each.items()} for each in terms], "seed": seed, "samples": samples}
        if dist.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        names = [name for number, name in enumerate(means) if guilty and not by_rank[:, number].isfinite().all()]
        blame = f"not finite on rank {', '.join(map(str, guilty))}: {', '.join(names)}; " if guilty else ""
        keys = [sample["key"] for sample in samples]
        return f"{blame}samples {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


def refuse_non_finite(values: Mapping[str, Tensor], step: int) -> None:
    """Look at every weight and buffer, or this rank's shares of them, before a checkpoint is made; all ranks call it.

    Raises:
        NonFiniteError: one is not finite on any rank; names it.
    """
    numbers = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    bad = next((name for name, value in numbers.items() if not bool(value.isfinite().all())), None)
    device = next(iter(numbers.values())).device if numbers else None
    if dist.max_over_ranks(torch.tensor(int(bad is not None), device=device)):
        raise NonFiniteError(
            f"step {step}: {bad or 'a weight of another rank'} is not finite, so no checkpoint is made of it; "
            "lower optim.lr, and start again: the run goes on from the newest checkpoint."
        )


def _stop(guard: Guard, step: int) -> str:
    return "the policy is to stop"


_POLICIES: dict[str, Callable[[Guard, int], str]] = {"stop": _stop, "skip": Guard.skip, "rewind": Guard.go_back}
POLICIES = tuple(_POLICIES)
