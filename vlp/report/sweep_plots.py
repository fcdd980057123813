"""The plots of a sweep as geometry: scores with their intervals, and the curves of all groups on one chart."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlp.report import sweep_text, words
from vlp.report.cells import Cell, Metric
from vlp.report.curves import SMOOTHED_FROM, SMOOTHING_SHARE, Frame, Tick, nice_ticks, smooth, thin, y_range
from vlp.report.panels import objective_names
from vlp.report.records import Row
from vlp.report.sweep_stats import Group

SIZE = (520.0, 200.0)
DOTS_WIDTH, LABELS, ROW_HEIGHT, DOTS_TOP, DOTS_BOTTOM = 520.0, 168.0, 26.0, 8.0, 26.0
LABEL_CHARS = 25
HUES = (217, 38, 152, 292, 48, 190, 340, 90, 262, 12)  # far apart in this order
MAX_COLOURED = len(HUES)


class Dots(NamedTuple):
    """One group's row in a plot of scores."""

    y: float
    label: str
    title: str  # all of it in words
    hue: int
    mean: float
    interval: tuple[float, float] | None
    seeds: list[float]
    is_base: bool


class DotPlot(NamedTuple):
    """One metric of all groups."""

    title: str
    note: str
    height: float
    rows: list[Dots]
    base: float | None  # position of the base's mean
    chance: float | None
    x_ticks: list[Tick]
    alt: str


class Line(NamedTuple):
    """One group on a chart of curves."""

    name: str
    hue: int
    path: str  # mean over seeds
    seeds: list[str]  # paths of single seeds; empty with one seed
    last: str


class LineChart(NamedTuple):
    """The curves of all groups."""

    title: str
    note: str
    size: tuple[float, float]
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    chance: float | None
    alt: str


def hue(index: int) -> int:
    """Return the colour of group number `index`."""
    return HUES[index % MAX_COLOURED]


def dot_plot(metric: Metric, row: Row, found: Sequence[Group], group_title: str) -> DotPlot | None:
    """Return the plot of one metric, or None where no group has it."""
    scored = [(index, group) for index, group in enumerate(found) if metric in group.scores]
    if not scored:
        return None
    values = [group.scores[metric].value for _, group in scored]
    ends = [v.mean - (v.half or 0) for v in values] + [v.mean + (v.half or 0) for v in values]
    ends += [x for v in values for x in v.values] + ([row.chance] if row.chance is not None else [])
    low, high = _padded(min(ends), max(ends), percent=row.unit == "%")
    scale = (DOTS_WIDTH - LABELS - 16) / (high - low)

    def at(value: float) -> float:
        return LABELS + (min(max(value, low), high) - low) * scale

    rows = [_dots(place, index, group, metric, row, at) for place, (index, group) in enumerate(scored)]
    base = next((one.mean for one in rows if one.is_base), None)
    return DotPlot(
        title=(row.metric or row.key) + (f" · {metric.source}" if group_title else ""),
        note="higher is better" if row.higher_is_better else "lower is better",
        height=DOTS_TOP + ROW_HEIGHT * len(rows) + DOTS_BOTTOM,
        rows=rows,
        base=base if len(rows) > 1 else None,
        chance=None if row.chance is None else at(row.chance),
        x_ticks=[Tick(at(tick), words.plain(tick)) for tick in nice_ticks(low, high, 5)],
        alt=f"{row.metric or row.key}: " + "; ".join(one.title for one in rows) + ".",
    )


def _dots(place: int, index: int, group: Group, metric: Metric, row: Row, at) -> Dots:
    value = group.scores[metric].value
    seeds = f", {words.plural(len(value.values), 'seed')}" if len(value.values) > 1 else ""
    return Dots(
        y=DOTS_TOP + ROW_HEIGHT * (place + 0.5),
        label=group.name if len(group.name) <= LABEL_CHARS else f"{group.name[: LABEL_CHARS - 1]}…",
        title=f"{group.name}: {sweep_text.written(value, row.unit)}{seeds}",
        hue=hue(index),
        mean=at(value.mean),
        interval=None if value.half is None else (at(value.mean - value.half), at(value.mean + value.half)),
        seeds=[at(x) for x in value.values] if len(value.values) > 1 else [],
        is_base=group.is_base,
    )


def _padded(low: float, high: float, *, percent: bool) -> tuple[float, float]:
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    return (max(low, 0.0), min(high, 100.0)) if percent and high > 0 else (low, high)


def score_curves(chosen: Mapping[Metric, Row], found: Sequence[Group]) -> list[LineChart]:
    """Return a chart for each metric that was evaluated more than once."""
    charts = []
    for metric, row in chosen.items():
        series = [[_evaluated(cell, metric) for cell in group.cells] for group in found]
        note = "higher is better" if row.higher_is_better else "lower is better"
        charts.append(_chart(row.metric or row.key, note, series, found, unit=row.unit, chance=row.chance))
    return [chart for chart in charts if chart is not None]


def loss_curves(found: Sequence[Group]) -> list[LineChart]:
    """Return a chart for each objective's unweighted loss; the total is left out, for it depends on the weights."""
    cells = [cell for group in found for cell in group.cells]
    names = dict.fromkeys(name for cell in cells for name in objective_names(cell.metrics, None))
    charts = []
    for name in names:
        series = [[_logged(cell, f"train/{name}") for cell in group.cells] for group in found]
        charts.append(_chart(f"{words.title(name)} loss", "unweighted; falls", series, found))
    return [chart for chart in charts if chart is not None]


Points = dict[int, float]  # step -> value


def _evaluated(cell: Cell, metric: Metric) -> Points:
    points = {}
    for evaluation in cell.evaluations:
        task = evaluation.tasks.get(metric.task) if evaluation.source == metric.source else None
        for row in task.rows if task else ():
            if row.key == metric.key:
                points[evaluation.step] = row.raw
    return {step: raw for step, raw in points.items() if raw is not None and np.isfinite(raw)}


def _logged(cell: Cell, name: str) -> Points:
    column = cell.metrics.columns.get(name)
    if column is None:
        return {}
    finite = np.isfinite(column)
    return dict(zip(cell.metrics.steps[finite].tolist(), column[finite].tolist(), strict=True))


def _chart(
    title: str,
    note: str,
    series: Sequence[Sequence[Points]],
    found: Sequence[Group],
    *,
    unit: str = "",
    chance: float | None = None,
) -> LineChart | None:
    """Draw one line a group; None where no cell has two points."""
    if max((len(points) for group in series for points in group), default=0) < 2:
        return None
    columns = [[_smoothed(points) for points in group if points] for group in series]
    drawn = [(index, _mean(group), group) for index, group in enumerate(columns) if group]
    steps = np.concatenate([s for _, _, group in drawn for s, _ in group])
    values = np.concatenate([v for _, _, group in drawn for _, v in group])
    shown = y_range(values, values, [] if chance is None else [chance], from_zero=unit == "%")
    frame = Frame(*SIZE, (float(steps.min()), float(steps.max())), shown)
    lines = [
        Line(
            found[index].name,
            hue(index),
            frame.path(*thin(*mean)),
            [frame.path(*thin(*one)) for one in group] if len(group) > 1 else [],
            words.measure(float(mean[1][-1]), unit),
        )
        for index, mean, group in drawn
    ]
    return LineChart(
        title=title,
        note=note,
        size=SIZE,
        lines=lines,
        x_ticks=[Tick(float(frame.x(at)), words.short(at)) for at in nice_ticks(*frame.steps, 5)],
        y_ticks=[Tick(float(frame.y(at)), words.plain(at)) for at in nice_ticks(*frame.values, 4)],
        chance=None if chance is None else float(frame.y(chance)),
        alt=f"{title} at the end: " + "; ".join(f"{line.name} {line.last}" for line in lines) + ".",
    )


def _smoothed(points: Points) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array(sorted(points), dtype=np.int64)
    values = np.array([points[step] for step in steps.tolist()])
    return steps, smooth(values, SMOOTHING_SHARE * len(values)) if len(values) > SMOOTHED_FROM else values


def _mean(group: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds at the steps that all of them have; the longest one where they have none in common."""
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in group)))
    if not common:
        return max(group, key=lambda one: len(one[0]))
    columns = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in group]
    return np.array(common, dtype=np.int64), np.array([np.mean([c[step] for c in columns]) for step in common])
