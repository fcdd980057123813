"""`make bench`: take every figure of docs/benchmarks.md again and write the tables of that page.

Each bench is a module with `main() -> dict`, what is compared measured in one run, because machines are noisy. A list
among its values is a table of rows. Name some of them to run only those: `python scripts/bench/run.py step_overhead`.
"""

import datetime
import importlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BENCHES = ("step_overhead", "startup", "planning", "lengths", "shuffle", "contrastive", "plan_error")
BENCHES += ("decoding", "loading", "reading", "transfer", "indexing", "checkpoints")


def main(names: Sequence[str]) -> None:
    """Run the benches and replace their sections of the page."""
    for name in names or BENCHES:
        if name not in BENCHES:
            sys.exit(f"there is no bench '{name}'; there are {', '.join(BENCHES)}.")
        print(f"{name} ...", flush=True)
        module = importlib.import_module(name)
        figures = module.main()
        section = _section(name, module.__doc__ or "", figures)
        print(section)
        _replace(name, section)


def _section(name: str, about: str, figures: Mapping[str, Any]) -> str:
    tables = {key: value for key, value in figures.items() if isinstance(value, list)}
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in figures.items()
        if key not in tables
    ]
    cores = len(os.sched_getaffinity(0))
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    where = f"{datetime.date.today()}, {_processor()}, {cores} cores, {versions}"
    return "\n".join(
        [
            about.strip(),
            "",
            *(["| figure | value |", "|---|---|", *rows, ""] if rows else []),
            *(line for title, table in tables.items() for line in _table(title, table)),
            f"`python scripts/bench/run.py {name}`; {where}",
        ]
    )


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a titled table; rows may lack columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(str(row.get(column, '-')) for column in columns)} |" for row in rows]
    return [f"{title}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines, ""]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _replace(name: str, section: str) -> None:
    """Put the section between the markers of its bench."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    PAGE.write_text(f"{head}{begin}\n{section}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
