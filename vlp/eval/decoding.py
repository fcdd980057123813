"""How a caption decoder writes: the likeliest word each time, several beams, or words drawn from the likely ones.

A writer gets `next_logits`, which costs one pass of the decoder over fixed rows, so that all ranks make the same passes
and no result depends on which rows share a batch.

Axes: B rows, L text length, V vocabulary, K beams.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlp import dist, ops

NextLogits = Callable[[Tensor, Tensor], Tensor]  # ids [B, L], lengths [B] -> logits [B, V] of the token after each


class Limits(NamedTuple):
    """What every text keeps to."""

    eos_id: int
    pad_id: int
    min_new: int  # tokens before the end token may come
    max_length: int  # of prompt and text together


class Prompt(NamedTuple):
    """Where the texts begin."""

    ids: Tensor  # [B, L] int64, padded at the end
    lengths: Tensor  # [B] int64
    running: Tensor  # [B] bool, rows that are to be written
    key: Tensor  # [B] int64, for what is drawn


class Writer(Protocol):
    """Writes texts; built from config."""

    def protocol(self) -> str:
        """Return the settings in a few words."""
        ...

    def __call__(self, next_logits: NextLogits, prompt: Prompt, limits: Limits) -> Tensor:
        """Return prompt and text [B, L], the end token included, padded at the end."""
        ...


class Greedy:
    """The likeliest token each time."""

    def protocol(self) -> str:
        return "greedy"

    def __call__(self, next_logits: NextLogits, prompt: Prompt, limits: Limits) -> Tensor:
        return _grow(next_logits, prompt, limits, lambda logits, step: logits.argmax(-1))


class Nucleus:
    """Draws from the smallest set of tokens that holds a share `top_p` of the probability. Source: arXiv:1904.09751.

    Args:
        top_p: in (0, 1]. temperature: of the softmax. seed: of the draws, which depend on the clip and on nothing else.
    """

    def __init__(self, *, top_p: float = 0.9, temperature: float = 1.0, seed: int = 0) -> None:
        if not 0 < top_p <= 1 or not temperature > 0:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1, temperature={temperature} above 0.")
        self.top_p, self.temperature, self.seed = top_p, temperature, seed

    def protocol(self) -> str:
        return f"nucleus {self.top_p}, temperature {self.temperature}, seed {self.seed}"

    def __call__(self, next_logits: NextLogits, prompt: Prompt, limits: Limits) -> Tensor:
        key = ops.fold(prompt.key, self.seed)

        def draw(logits: Tensor, step: int) -> Tensor:
            share, order = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
            before = share.cumsum(-1) - share
            share = share.masked_fill(before >= self.top_p, 0.0)  # the first token always stays
            wanted = ops.uniform(ops.fold(key, step), 1).double().to(share.device) * share.sum(-1, keepdim=True)
            place = (share.cumsum(-1) <= wanted).sum(-1).clamp(max=share.shape[-1] - 1)
            return order.gather(-1, place[:, None])[:, 0]

        return _grow(next_logits, prompt, limits, draw)


class Beam:
    """The best of several texts that grow side by side, by log-probability over length to the power `length_penalty`.

    Args:
        num_beams: each costs a pass for every token. length_penalty: 0 compares sums, 1 means.
    """

    def __init__(self, *, num_beams: int = 4, length_penalty: float = 1.0) -> None:
        if num_beams < 1:
            raise ValueError(f"num_beams={num_beams} must be at least 1.")
        self.num_beams, self.length_penalty = num_beams, length_penalty

    def protocol(self) -> str:
        return f"beam {self.num_beams}, length penalty {self.length_penalty}"

    def __call__(self, next_logits: NextLogits, prompt: Prompt, limits: Limits) -> Tensor:
        count, rows = self.num_beams, torch.arange(len(prompt.ids), device=prompt.ids.device)
        ids = _padded(prompt.ids, limits)[:, None].repeat(1, count, 1)  # [B, K, L]
        total = torch.full(ids.shape[:2], -torch.inf, dtype=torch.float64, device=ids.device)  # log-probabilities
        total[:, 0] = 0.0  # the beams are equal at first; one of them counts
        lengths, best = prompt.lengths.clone(), ids[:, 0].clone()
        best_score = torch.full_like(total[:, 0], -torch.inf)
        running, step = prompt.running.clone(), 0
        while _go_on(running := running & (lengths < limits.max_length)):
            columns = [next_logits(ids[:, k], lengths) for k in range(count)]
            log_share = torch.stack([_allowed(logits.double().log_softmax(-1), step, limits) for logits in columns], 1)
            grown = total[:, :, None] + log_share  # [B, K, V]
            done = grown[:, :, limits.eos_id]  # [B, K]
            score, beam = (done / (step + 1) ** self.length_penalty).max(1)
            ends = ids[rows, beam]
            ends[rows, lengths.clamp(max=ids.shape[2] - 1)] = limits.eos_id
            better = running & (score > best_score)
            best[better], best_score[better] = ends[better], score[better]
            grown[:, :, limits.eos_id] = -torch.inf
            flat = grown.flatten(1)
            order = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
            new = ids[rows[:, None], order // grown.shape[2]]
            place = lengths.clamp(max=ids.shape[2] - 1)[:, None, None].expand(-1, count, 1)
            new.scatter_(2, place, (order % grown.shape[2])[:, :, None])
            ids = torch.where(running[:, None, None], new, ids)
            total = torch.where(running[:, None], flat.gather(1, order), total)
            lengths, step = lengths + running.long(), step + 1
            running = running & (self._bound(total[:, 0], prompt, limits, step) > best_score)
        unfinished = best_score.isneginf()  # no room for an end: the best beam as it is
        best[unfinished] = ids[unfinished, 0]
        return best

    def _bound(self, total: Tensor, prompt: Prompt, limits: Limits, step: int) -> Tensor:
        """Return the best score [B] that the leading beam can still reach: its sum only falls."""
        most = (limits.max_length - prompt.lengths).clamp(min=step + 1) if self.length_penalty > 0 else step + 1
        return total / most**self.length_penalty


def _grow(next_logits: NextLogits, prompt: Prompt, limits: Limits, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Add one token at a time until the running rows of all ranks have ended."""
    ids, lengths, step = _padded(prompt.ids, limits), prompt.lengths.clone(), 0
    running = prompt.running.clone()
    while _go_on(running := running & (lengths < limits.max_length)):
        token = choose(_allowed(next_logits(ids, lengths), step, limits), step)  # [B]
        place = lengths.clamp(max=ids.shape[1] - 1)[:, None]
        written = ids.scatter(1, place, token[:, None])
        ids = torch.where(running[:, None], written, ids)
        lengths, step = lengths + running.long(), step + 1
        running = running & (token != limits.eos_id)
    return ids


def _padded(ids: Tensor, limits: Limits) -> Tensor:
    """Return ids [B, L] filled up to the limit: one shape for every step."""
    room = ids.new_full((len(ids), max(0, limits.max_length - ids.shape[1])), limits.pad_id)
    return torch.cat([ids, room], 1)


def _allowed(logits: Tensor, step: int, limits: Limits) -> Tensor:
    """Return the logits [B, V] in float64 without the end token while the text is too short."""
    logits = logits.double()
    if step < limits.min_new:
        logits = logits.clone()
        logits[:, limits.eos_id] = -torch.inf
    return logits


def _go_on(running: Tensor) -> bool:
    return bool(dist.max_over_ranks(running.any().long()))
