"""The report of a sweep: `python -m vlp.report.sweep runs/SWEEP` prints one table and writes runs/SWEEP/report.html.

It works while the sweep runs, and for one with cells that failed: those are listed with their reason.
"""

import argparse
from pathlib import Path
from urllib.parse import quote

from vlp.report import sweep_plots, sweep_stats, sweep_text, words
from vlp.report.cells import DONE, FAILED, RUNNING, SweepFiles, read_sweep
from vlp.report.page import write_page
from vlp.report.run import summarise


def write_page_of(files: SweepFiles) -> Path:
    """Write `report.html` into the directory of a sweep and return its path."""
    found, known = sweep_stats.groups(files), sweep_stats.metrics(files)
    many_sources = len({metric.source for metric in known}) > 1
    chosen = {metric: known[metric] for metric in sweep_stats.headlines(known)}
    title = "source" if many_sources else ""
    plots = [sweep_plots.dot_plot(metric, row, found, title) for metric, row in chosen.items()]
    return write_page(
        "sweep.html.j2",
        files.directory / "report.html",
        sweep=files.sweep,
        cells=files.cells,
        groups=found,
        hues={group.name: sweep_plots.hue(index) for index, group in enumerate(found)},
        keys=list(dict.fromkeys(key for group in found for key in group.changes)),
        known=known,
        chosen=chosen,
        many_sources=many_sources,
        plots=[plot for plot in plots if plot is not None],
        score_curves=sweep_plots.score_curves(chosen, found),
        loss_curves=sweep_plots.loss_curves(found),
        counts=sweep_text.counted(files),
        status=status(files),
        num_done=sum(cell.status == DONE for cell in files.cells),
        missing=[cell for cell in files.cells if cell.status != DONE],
        facts=facts(files),
        legend=sweep_text.legend(found, "Below each score"),
        problems=summarise(files.problems),
        written=sweep_text.written,
        signed=sweep_text.signed,
        link=lambda name: f"{quote(name)}/report.html" if (files.directory / name / "report.html").exists() else "",
    )


def status(files: SweepFiles) -> str:
    """Return the state of the whole sweep, as the CSS classes of a run's state."""
    states = {cell.status for cell in files.cells}
    if states == {DONE}:
        return "finished"
    return "failed" if FAILED in states else "running" if RUNNING in states else "preempted"


def facts(files: SweepFiles) -> list[tuple[str, str]]:
    """Return the short facts of the header as label and value."""
    experiments = dict.fromkeys(cell.run.experiment for cell in files.cells if cell.run.experiment)
    seconds = sum(cell.run.seconds or 0.0 for cell in files.cells)
    seeds = dict.fromkeys(cell.file.seed for cell in files.cells if cell.file.seed is not None)
    rows = [("Experiment", ", ".join(experiments) or "none named"), ("Cells", words.count(len(files.cells)))]
    if seeds:
        rows.append(("Seeds", ", ".join(seeds) if len(seeds) < 12 else words.count(len(seeds))))
    rows += [("Compared with", files.sweep.baseline), ("Time of all cells", words.duration(seconds))]
    return rows


def main() -> None:
    """Print the table of the sweep that the command line names, and write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m vlp.report.sweep", description="Print the table of a sweep and write its page."
    )
    parser.add_argument("directory", help="directory of the sweep, such as runs/SWEEP")
    try:
        files = read_sweep(Path(parser.parse_args().directory))
    except ValueError as error:
        parser.error(str(error))
    print(sweep_text.text(files, write_page_of(files)))


if __name__ == "__main__":
    main()
