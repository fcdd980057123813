"""Chooses which curves a run shows, and says of each what good looks like."""

from typing import NamedTuple

import numpy as np

from vlp.report import words
from vlp.report.curves import Chart, chart
from vlp.report.read import Metrics
from vlp.report.records import Evaluation, Graph, Row

WIDE, HALF, THIRD = (1060.0, 230.0), (520.0, 190.0), (340.0, 160.0)


class TaskCurves(NamedTuple):
    """The metrics of one task on one source, over the evaluations."""

    title: str
    charts: list[Chart]


def training_curves(metrics: Metrics, graph: Graph | None) -> dict[str, list[Chart]]:
    """Return charts in three groups: "total", "main" (objectives, rates, speed) and "more" (whatever else was logged)."""
    left = {name for name in metrics.columns if not name.startswith("val/") and not name.endswith("_count")}
    names = objective_names(metrics, graph)
    total = _chart(metrics, "train/loss", "Total loss", "falls, then flattens", WIDE)
    main = [
        _chart(metrics, f"train/{name}", f"{words.title(name)} loss", "unweighted; falls", HALF) for name in names
    ]
    main += [
        _chart(metrics, "train/lr", "Learning rate", "rises, then decays to its end", HALF),
        _derived(metrics, "Temperature", _temperature(metrics), "moves slowly, stays above 0.01", ""),
        _chart(metrics, "data/clips_per_s", "Clips per second", "flat and high", HALF, from_zero=True),
        _derived(metrics, "Share of time waiting for data", _wait_share(metrics), "near 0 %", "%"),
    ]
    left -= {"train/loss", "train/lr", "train/logit_scale", "data/clips_per_s", "time/data_wait_s"}
    left -= {f"train/{name}" for name in names}
    more = [_chart(metrics, name, name, "", HALF) for name in sorted(left)]
    groups = {"total": [total], "main": main, "more": more}
    return {name: [one for one in charts if one is not None] for name, charts in groups.items()}


def objective_names(metrics: Metrics, graph: Graph | None) -> list[str]:
    """Return the objectives that were logged: those of the graph, and every loss that was logged with its count."""
    counted = [name.removeprefix("train/").removesuffix("_count") for name in metrics.columns if name.endswith("_count")]
    known = [objective.name for objective in graph.objectives] if graph else []
    return [name for name in dict.fromkeys(known + counted) if f"train/{name}" in metrics.columns]


def _chart(
    metrics: Metrics, column: str, title: str, note: str, size: tuple[float, float], from_zero: bool = False
) -> Chart | None:
    if column not in metrics.columns:
        return None
    values = metrics.columns[column]
    return chart(title, steps=metrics.steps, values=values, note=note, size=size, from_zero=from_zero)


def _derived(metrics: Metrics, title: str, values: np.ndarray | None, note: str, unit: str) -> Chart | None:
    if values is None:
        return None
    return chart(title, steps=metrics.steps, values=values, note=note, unit=unit, size=HALF, from_zero=True)


def _temperature(metrics: Metrics) -> np.ndarray | None:
    """Return 1 / logit scale."""
    scale = metrics.columns.get("train/logit_scale")
    return None if scale is None else 1 / np.where(scale > 0, scale, np.nan)


def _wait_share(metrics: Metrics) -> np.ndarray | None:
    """Return the percentage of a step's time, waiting included, in which the device had no data."""
    wait, step = metrics.columns.get("time/data_wait_s"), metrics.columns.get("time/step_s")
    if wait is None or step is None:
        return None
    return 100 * wait / np.where(step > 0, step, np.nan)


def evaluation_curves(evaluations: list[Evaluation], metrics: Metrics) -> list[TaskCurves]:
    """Return one chart for each raw metric of each task, with its chance line."""
    found: dict[tuple[str, str], list[Chart]] = {}
    newest = newest_by_source(evaluations)
    several = len(newest) > 1
    for evaluation in newest:
        for task_name, task in evaluation.tasks.items():
            name = (task.title or words.title(task_name)) + (f" · {evaluation.source}" if several else "")
            for row in task.rows:
                steps, values = _history(row, task_name, evaluation, evaluations, metrics)
                unit = row.unit
                good = "higher is better" if row.higher_is_better else "lower is better"
                drawn = chart(
                    row.metric or row.key, steps=steps, values=values, unit=unit, note=good, chance=row.chance, size=THIRD
                )
                if drawn is not None:
                    found.setdefault((name, task_name), []).append(drawn)
    return [TaskCurves(name, charts) for (name, _), charts in found.items()]


def newest_by_source(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Return the last evaluation of each source and split."""
    return list({(found.source, found.split): found for found in evaluations}.values())


def _history(
    row: Row, task: str, newest: Evaluation, evaluations: list[Evaluation], metrics: Metrics
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [N] and raw values [N] of a metric, from the evaluation files or metrics.csv, whichever has more."""
    points = {}
    for found in evaluations:
        if (found.source, found.split) == (newest.source, newest.split) and task in found.tasks:
            points |= {found.step: other.raw for other in found.tasks[task].rows if other.key == row.key}
    points = {step: raw for step, raw in points.items() if raw is not None}
    logged = metrics.columns.get(f"val/{newest.source}/{row.key}")
    if logged is not None and np.isfinite(logged).sum() > len(points):
        return metrics.steps, logged
    return np.array(sorted(points), dtype=np.int64), np.array([points[step] for step in sorted(points)], dtype=float)
