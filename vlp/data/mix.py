"""Which source a step reads when several are mixed: a pure function of (weights, seed, step)."""

from collections.abc import Sequence
from typing import NamedTuple

from vlp.data.rng import mix

_ONE = 1 << 32  # shares are integers over this, so that no rounding ever loses or repeats a step of a source


class Turn(NamedTuple):
    """Whose step it is, and how many steps that source had before: the cursor of its own plan."""

    source: int
    cursor: int


class Schedule:
    """Steps dealt to sources as evenly as their weights allow, in O(number of sources) at any step.

    Source 0 takes the steps where floor(share * step + phase) grows (evenly spread, as in Bresenham's line), the next
    source does the same with the steps that are left, and so on. So counts are known in closed form, and after s steps
    a source of share w has had w * s steps to within its position in the list (1, 2, 3, ... steps).
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Deal by `weights`, at least one, not negative, of any positive sum. Raises ValueError otherwise."""
        if not weights or not all(0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
            raise ValueError(f"weights={list(weights)} must be finite, not negative, and at least one positive.")
        last = max(i for i, w in enumerate(weights) if w > 0)  # takes all that is left
        self._shares = [round(_ONE * (w / sum(weights[i:]))) for i, w in enumerate(weights[:last])] + [_ONE]
        self._phases = [mix(seed, i) % _ONE for i in range(last)] + [0]

    def counts(self, step: int) -> list[int]:
        """Return how many of the first `step` steps each source has, up to the last source of positive weight."""
        counts = []
        for share, phase in zip(self._shares, self._phases, strict=True):
            counts.append((share * (step - sum(counts)) + phase) // _ONE)
        return counts

    def turn(self, step: int) -> Turn:
        """Return whose step it is and that source's cursor."""
        before, after = self.counts(step), self.counts(step + 1)
        source = next(i for i, count in enumerate(before) if after[i] > count)
        return Turn(source, before[source])
