"""The cells of a sweep as groups of seeds: mean, interval, and difference to the base.

Intervals are 95 % t-intervals over seeds. Differences to the base are paired by seed, because runs with the same seed
see the same order of samples: the interval is that of the mean of the differences, seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlp.report.cells import DONE, Cell, Metric, SweepFiles
from vlp.report.records import Row

HEADLINE_SUFFIX = "_r1"
MAX_HEADLINES = 6
# The 97.5 % point of Student's t for 1, 2, ... degrees of freedom, as in any table.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
_T += (2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    half: float | None  # half the width of its 95 % interval; None with one seed
    values: tuple[float, ...]  # one a seed


class Score(NamedTuple):
    """One metric of one group."""

    value: Estimate
    difference: Estimate | None  # to the base; None for the base itself and without common seeds
    verdict: str  # "better", "worse", or "" where the interval holds 0 or there is none


class Group(NamedTuple):
    """Cells that differ in their seed only."""

    name: str
    changes: Mapping[str, str]
    cells: list[Cell]
    is_base: bool
    scores: dict[Metric, Score]

    @property
    def num_done(self) -> int:
        """How many of the cells are done."""
        return sum(cell.status == DONE for cell in self.cells)


def t_point(degrees: int) -> float:
    """Return the 97.5 % point of Student's t; between the last of the table and infinity by Fisher's expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value with its 95 % t-interval."""
    mean, number = sum(values) / len(values), len(values)
    if number < 2:
        return Estimate(mean, None, tuple(values))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1))
    return Estimate(mean, t_point(number - 1) * deviation / math.sqrt(number), tuple(values))


def groups(files: SweepFiles) -> list[Group]:
    """Return the groups in the order of the sweep, the scores of each beside the base's."""
    by_name: dict[str, list[Cell]] = {}
    for cell in files.cells:
        by_name.setdefault(cell.file.group, []).append(cell)
    base = by_name.get(files.sweep.baseline, [])
    return [
        Group(name, found[0].file.changes, found, name == files.sweep.baseline, _scores(found, base))
        for name, found in by_name.items()
    ]


def metrics(files: SweepFiles) -> dict[Metric, Row]:
    """Return every metric that a finished cell has, with one row that describes it."""
    return {metric: row for cell in files.cells[::-1] for metric, row in cell.scores.items()}


def headlines(known: Mapping[Metric, Row]) -> list[Metric]:
    """Return the metrics for the first table: the first of each task, and rank-1 retrieval."""
    first: dict[tuple[str, str], Metric] = {}
    for metric in known:
        first.setdefault((metric.source, metric.task), metric)
    chosen = [m for m in known if m in first.values() or m.key.endswith(HEADLINE_SUFFIX)]
    return chosen[:MAX_HEADLINES]


def _scores(found: Sequence[Cell], base: Sequence[Cell]) -> dict[Metric, Score]:
    known = {metric: row for cell in found for metric, row in cell.scores.items()}
    return {metric: _score(metric, row, found, base) for metric, row in known.items()}


def _score(metric: Metric, row: Row, found: Sequence[Cell], base: Sequence[Cell]) -> Score:
    mine, theirs = _by_seed(metric, found), _by_seed(metric, base)
    value = estimate(list(mine.values()))
    common = [seed for seed in mine if seed in theirs]
    if found is base or not common:
        return Score(value, None, "")
    difference = estimate([mine[seed] - theirs[seed] for seed in common])
    return Score(value, difference, _verdict(difference, higher_is_better=row.higher_is_better))


def _by_seed(metric: Metric, found: Sequence[Cell]) -> dict[str | None, float]:
    rows = {cell.file.seed: cell.scores[metric].raw for cell in found if metric in cell.scores}
    return {seed: raw for seed, raw in rows.items() if raw is not None}


def _verdict(difference: Estimate, *, higher_is_better: bool) -> str:
    if difference.half is None or abs(difference.mean) <= difference.half:
        return ""
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
