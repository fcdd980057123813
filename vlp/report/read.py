"""Reads a run's directory. Nothing here stops a report: what is absent or damaged becomes a sentence in `problems`."""

import csv
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlp.report.records import Evaluation, Graph, Run

Record = TypeVar("Record")


class Metrics(NamedTuple):
    """metrics.csv as columns; NaN where a cell is empty, infinity where the logged value was not a finite number."""

    steps: np.ndarray  # [N] int64, increasing
    columns: dict[str, np.ndarray]  # each [N] float64


class RunFiles(NamedTuple):
    """Everything the report reads; None and empty where a file is missing."""

    directory: Path
    run: Run
    graph: Graph | None
    metrics: Metrics
    evaluations: list[Evaluation]  # by step
    config: str
    problems: list[str]


def parse(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """Return `value` as the annotation `kind`: a plain type, tuple, Mapping or NamedTuple, or one of them or None.

    Raises ValueError where the type is wrong and there is no default to fall back to.
    """
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else parse(typing.get_args(kind)[0], value, where, problems)
    if kind is object:
        return value
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(parse(item, child, f"{where}[{index}]", problems) for index, child in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        return {str(key): parse(item, child, f"{where}.{key}", problems) for key, child in value.items()}
    if hasattr(kind, "_fields") and isinstance(value, dict):
        return _parse_record(kind, value, where, problems)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r:.60}, not {getattr(kind, '__name__', kind)}")


def _parse_record(kind: Any, value: dict, where: str, problems: list[str]) -> Any:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        optional = type(None) in typing.get_args(hint)
        if name not in value:
            if not optional:
                problems.append(f"{where}.{name} is missing")
            continue
        try:
            found[name] = parse(hint, value[name], f"{where}.{name}", problems)
        except ValueError as error:
            problems.append(str(error))
    return kind(**found)


def read_json(path: Path, kind: type[Record], problems: list[str]) -> Record | None:
    """Read a JSON file as the record `kind`; None, with a problem noted, if the file is missing or damaged."""
    where = path.name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return parse(kind, value, where, problems)
    except FileNotFoundError:
        problems.append(f"{where} is missing")
    except (OSError, ValueError, RecursionError) as error:  # ValueError covers broken JSON, UTF-8 and types
        problems.append(f"{where} cannot be read: {error}")
    return None


def read_metrics(path: Path, problems: list[str]) -> Metrics:
    """Read metrics.csv; where a step has several rows, as in a resumed run, each cell's last value counts."""
    rows: dict[int, dict[str, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a number that was cut is still a number
        damaged = len(lines) - len(whole) + sum(not _add_row(rows, row) for row in csv.DictReader(whole))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        damaged = 0
    except (OSError, csv.Error) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        damaged = 0
    if damaged:
        problems.append(f"{path.name} has {damaged} damaged line{'s' * (damaged > 1)}, left out")
    steps = sorted(rows)
    names = sorted({name for row in rows.values() for name in row})
    columns = {name: np.array([rows[step].get(name, np.nan) for step in steps]) for name in names}
    return Metrics(np.array(steps, dtype=np.int64), columns)


def _add_row(rows: dict[int, dict[str, float]], row: dict) -> bool:
    """Add one line; False if it is cut or is not made of numbers."""
    try:
        step = int(float(row.pop("step")))
        values = {name: float(cell) for name, cell in row.items() if cell != ""}  # None, as of a cut line, is refused
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    rows.setdefault(step, {}).update({name: v if math.isfinite(v) else math.inf for name, v in values.items()})
    return True


def read_run(directory: Path) -> RunFiles:
    """Read all that `directory` holds."""
    problems: list[str] = []
    run = read_json(directory / "run.json", Run, problems) or Run()
    if not run.name:
        run = run._replace(name=directory.resolve().name)
    graph = read_json(directory / "graph.json", Graph, problems)
    metrics = read_metrics(directory / "metrics.csv", problems)
    paths = sorted((directory / "eval").rglob("*.json"))
    evaluations = [read_json(path, Evaluation, problems) for path in paths]
    if not paths:
        problems.append("eval/ holds no evaluation")
    config = directory / "config.yaml"
    if not config.is_file():
        problems.append("config.yaml is missing")
    return RunFiles(
        directory=directory,
        run=run,
        graph=graph,
        metrics=metrics,
        evaluations=sorted((found for found in evaluations if found is not None), key=lambda found: found.step),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        problems=problems,
    )
