"""Chooses which curves a run shows, and says of each what good looks like."""

import numpy as np

from vlp.report import words
from vlp.report.curves import Chart, Look, chart
from vlp.report.read import Metrics
from vlp.report.records import Evaluation, Graph, Row

WIDE, HALF, QUARTER = (1060.0, 230.0), (520.0, 190.0), (258.0, 150.0)  # as shown on a laptop, in pixels
LOOKS = {
    "train/loss": ("Total loss", Look(WIDE, "falls, then flattens")),
    "train/lr": ("Learning rate", Look(HALF, "rises, then decays to its end", smoothed=False)),
    "temperature": ("Temperature", Look(HALF, "moves slowly, stays above 0.01", from_zero=True, smoothed=False)),
    "data/clips_per_s": ("Clips per second", Look(HALF, "flat and high", from_zero=True)),
    "wait": ("Share of time waiting for data", Look(HALF, "near 0 %", unit="%", from_zero=True)),
}


def training_curves(metrics: Metrics, graph: Graph | None) -> dict[str, list[Chart]]:
    """Return charts in three groups: "total", "main" (objectives, rates, speed) and "more" (all else logged)."""
    names = objective_names(metrics, graph)
    looks = {f"train/{name}": (f"{words.title(name)} loss", Look(HALF, "unweighted; falls")) for name in names} | LOOKS
    columns = metrics.columns | _derived(metrics.columns)
    hidden = {"train/logit_scale", "time/data_wait_s"}  # shown as temperature and as share
    left = [name for name in columns if not name.startswith("val/") and not name.endswith("_count")]
    looks |= {name: (name, Look(HALF)) for name in sorted(left) if name not in looks and name not in hidden}
    groups: dict[str, list[Chart]] = {"total": [], "main": [], "more": []}
    for name, (title, look) in looks.items():
        if name not in columns:
            continue
        drawn = chart(title, steps=metrics.steps, values=columns[name], look=look)
        if drawn is not None:
            groups["total" if look.size == WIDE else "main" if look.note else "more"].append(drawn)
    return groups


def objective_names(metrics: Metrics, graph: Graph | None) -> list[str]:
    """Return the objectives that were logged: those of the graph, and every loss that was logged with its count."""
    counted = [name[:-6].removeprefix("train/") for name in metrics.columns if name.endswith("_count")]
    known = [objective.name for objective in graph.objectives] if graph else []
    return [name for name in dict.fromkeys(known + counted) if f"train/{name}" in metrics.columns]


def _derived(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the temperature, and the percentage of a step's time (waiting included) in which it waited for data."""
    derived = {}
    if "train/logit_scale" in columns:
        scale = columns["train/logit_scale"]
        derived["temperature"] = 1 / np.where(scale > 0, scale, np.nan)
    if "time/data_wait_s" in columns and "time/step_s" in columns:
        step_s = columns["time/step_s"]
        derived["wait"] = 100 * columns["time/data_wait_s"] / np.where(step_s > 0, step_s, np.nan)
    return derived


def evaluation_curves(evaluations: list[Evaluation], metrics: Metrics) -> list[Chart]:
    """Return one chart for each raw metric of each task, with its chance line."""
    newest = newest_by_source(evaluations)
    charts = []
    for evaluation in newest:
        for name, task in evaluation.tasks.items():
            group = (task.title or words.title(name)) + (f" · {evaluation.source}" if len(newest) > 1 else "")
            for row in task.rows:
                steps, values = _history(row, name, evaluation, evaluations, metrics)
                note = "higher is better" if row.higher_is_better else "lower is better"
                look = Look(QUARTER, note, group, row.unit, from_zero=True, smoothed=False)
                charts.append(chart(row.metric or row.key, steps=steps, values=values, look=look, chance=row.chance))
    return [drawn for drawn in charts if drawn is not None]


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
            points |= {(found.step, other.key): other.raw for other in found.tasks[task].rows}
    points = {step: raw for (step, key), raw in points.items() if key == row.key and raw is not None}
    logged = metrics.columns.get(f"val/{newest.source}/{row.key}")
    if logged is not None and np.isfinite(logged).sum() > len(points):
        return metrics.steps, logged
    return np.array(sorted(points), dtype=np.int64), np.array([points[step] for step in sorted(points)], dtype=float)
