"""The report of one run: `python -m vlp.report.run runs/NAME` writes runs/NAME/report.html.

It also works while a run trains, and for one that crashed: what is missing is said, and the rest is shown.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlp.report import words
from vlp.report.drops import drops
from vlp.report.examples import Gallery, gallery
from vlp.report.graph import layout
from vlp.report.page import write_page
from vlp.report.panels import evaluation_curves, newest_by_source, training_curves
from vlp.report.read import RunFiles, read_run
from vlp.report.records import Part
from vlp.report.results import banners, headline, results, times_chance

LABELS = {
    "python": "Python",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "platform": "System",
    "attention": "Attention kernel",
    "vlp": "vlp",
    "pytorch-lightning": "PyTorch Lightning",
    "deepspeed": "DeepSpeed",
    "timm": "timm",
    "av": "PyAV",
    "flash-attn": "FlashAttention",
    "commit": "Git commit",
}


class PartBar(NamedTuple):
    """One part of the model with its bar, in percent of the largest part."""

    part: Part
    total: float
    trainable: float


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    Raises:
        ValueError: `run_dir` is not a directory. A file that is missing or damaged in it never raises.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is not a directory; give the directory of a run, as runs/NAME.")
    files = read_run(directory)
    newest = newest_by_source(files.evaluations)
    galleries = _galleries(files)  # first, because it may find problems
    return write_page(
        "run.html.j2",
        directory / "report.html",
        files=files,
        run=files.run,
        banners=banners(files),
        facts=facts(files),
        cards=headline(files.evaluations),
        newest=[results(found) for found in newest],
        training=training_curves(files.metrics, files.graph),
        evaluation=evaluation_curves(files.evaluations, files.metrics),
        galleries=galleries,
        drops=[drops(source) for source in files.run.sources],
        drawing=layout(files.graph) if files.graph else None,
        parts=part_bars(files.run.parts),
        environment=environment_rows(files.run.environment),
        problems=summarise(files.problems),
        times_chance=times_chance,
    )


def _galleries(files: RunFiles) -> list[Gallery]:
    newest = newest_by_source(files.evaluations)
    found = []
    for evaluation in newest:
        for name, task in evaluation.tasks.items():
            title = (task.title or words.title(name)) + (f" · {evaluation.source}" if len(newest) > 1 else "")
            found.append(gallery(title, task, files.directory, files.problems))
    return [one for one in found if one is not None]


def facts(files: RunFiles) -> list[tuple[str, str]]:
    """Return the short facts of the header as label and value."""
    run = files.run
    kept = [part for part in run.parts if not part.dropped]
    parameters = sum(part.parameters for part in kept)
    trainable = sum(part.trainable for part in kept)
    rows = [
        ("Experiment", run.experiment or "none named"),
        ("Started", words.when(run.started)),
        ("Duration", words.duration(run.seconds) + (f" in {run.attempts} attempts" if run.attempts > 1 else "")),
    ]
    if run.sources:
        rows.append(("Clips trained on", words.count(sum(source.seen for source in run.sources))))
    if kept:
        rows.append(("Parameters", f"{words.short(parameters)}, {words.short(trainable)} trainable"))
    return rows


def part_bars(parts: Sequence[Part]) -> list[PartBar]:
    """Return the parts, largest first, dropped ones last."""
    largest = max((part.parameters for part in parts), default=0) or 1
    ordered = sorted(parts, key=lambda part: (part.dropped, -part.parameters))
    return [PartBar(part, 100 * part.parameters / largest, 100 * part.trainable / largest) for part in ordered]


def environment_rows(environment: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the environment as label and value; nested values as JSON."""
    return [
        (LABELS.get(key, words.title(key)), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in environment.items()
    ]


def summarise(problems: list[str]) -> list[tuple[str, int]]:
    """Return each problem once with its number; those that differ only in a position in a list are one."""
    counted: dict[str, tuple[str, int]] = {}
    for problem in problems:
        general = re.sub(r"\[\d+\]", "[]", problem)
        first, number = counted.get(general, (problem, 0))
        counted[general] = (first, number + 1)
    return list(counted.values())


def main() -> None:
    """Write the report of the run that the command line names, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m vlp.report.run", description="Write the HTML report of a run.")
    parser.add_argument("run_dir", help="directory of the run, such as runs/NAME")
    try:
        print(write_report(parser.parse_args().run_dir))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
