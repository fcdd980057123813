"""A sweep on the screen: what begins, how each cell ended, and at the end one table."""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlp.report import sweep_stats, words
from vlp.report.cells import DONE, FAILED, RUNNING, STOPPED, WAITING, Cell, Metric, SweepFiles
from vlp.report.records import Row
from vlp.report.sweep_stats import Estimate, Group, Score

ORDER = (DONE, RUNNING, STOPPED, FAILED, WAITING)
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
COLOURS = {"better": "32", "worse": "31", FAILED: "31", STOPPED: "33", DONE: "32"}


def opening(name: str, directory: Path, total: int, to_run: int) -> str:
    """Return the first line of a sweep."""
    done = total - to_run
    state = f"{done} done already, {to_run} to run" if done else f"{to_run} to run"
    return f"Sweep '{name}': {words.plural(total, 'cell')}, {state if to_run else 'all done already'}. In {directory}"


def outcome(cell: Cell) -> str:
    """Return how a cell ended, in a line."""
    if cell.status != DONE:
        return f"{cell.status}: {cell.reason}" + (f"\n      {cell.detail}" if cell.detail else "")
    first = next(iter(sweep_stats.headlines(cell.scores)), None)
    return DONE if first is None else f"{DONE}, {_title(cell.scores[first])} {_measure(cell.scores[first])}"


def text(files: SweepFiles, page: Path | None) -> str:
    """Return the table of a sweep with what is missing and how to get it."""
    found, known = sweep_stats.groups(files), sweep_stats.metrics(files)
    counts = counted(files)
    lines = ["", f"Sweep '{files.sweep.name}': {words.plural(len(files.cells), 'cell')}, {counts}.", ""]
    chosen = sweep_stats.headlines(known)
    if chosen:
        lines += [*fitting(found, chosen, known), "", *legend(found)]
    missing = [cell for cell in files.cells if cell.status != DONE]
    if missing:
        lines += [
            "",
            "Not done:",
            *(_missing(files, cell) for cell in missing),
            "",
            "Run what is missing by the same command:",
        ]
        lines.append(f"  {files.sweep.command}")
    if page is not None:
        lines += ["", f"Page: {page}"]
    return "\n".join(lines)


def counted(files: SweepFiles) -> str:
    """Return how many cells are done, failed and so on: "5 done, 1 failed"."""
    states = [cell.status for cell in files.cells]
    return ", ".join(f"{states.count(state)} {state}" for state in ORDER if state in states)


def legend(found: Sequence[Group], where: str = "In brackets") -> list[str]:
    """Return what the figures mean; differences stand `where`."""
    base = next((group.name for group in found if group.is_base), None)
    lines = []
    if any(score.value.half is not None for group in found for score in group.scores.values()):
        lines.append(f"{PLUS_MINUS} is the 95 % t-interval over seeds.")
    elif found:
        lines.append("One seed each, so no interval: run more before you believe a small difference.")
    if base is not None and len(found) > 1:
        paired = any(s.difference and s.difference.half is not None for g in found for s in g.scores.values())
        lines.append(f"{where}: the difference to '{base}'" + (", paired by seed." if paired else "."))
    return [" ".join(lines)] if lines else []


def fitting(found: Sequence[Group], chosen: Sequence[Metric], known: Mapping[Metric, Row]) -> list[str]:
    """Return the table with as many of the chosen metrics as the screen is wide, at least one."""
    columns, number = shutil.get_terminal_size((160, 40)).columns, len(chosen)
    lines = table(found, chosen, known)
    while number > 1 and max(map(_width, lines)) > columns:
        number -= 1
        lines = table(found, chosen[:number], known)
    left_out = [_title(known[metric]) for metric in chosen[number:]]
    return lines + ([f"Not shown for want of room: {', '.join(left_out)}."] if left_out else [])


def table(found: Sequence[Group], chosen: Sequence[Metric], known: Mapping[Metric, Row]) -> list[str]:
    """Return the lines of the table: a group each, with its changed keys, its seeds and its scores."""
    keys = list(dict.fromkeys(key for group in found for key in group.changes))
    many_sources = len({metric.source for metric in chosen}) > 1
    heads = [*(keys or ["cell"]), "seeds"]
    heads += [_head(known[m], m.source if many_sources else "") for m in chosen]
    rows = []
    for group in found:
        changes = [group.changes.get(key, "") for key in keys] or [group.name]
        seeds = f"{group.num_done}" if group.num_done == len(group.cells) else f"{group.num_done} of {len(group.cells)}"
        rows.append([*changes, seeds, *(_score(group.scores.get(m), known[m], is_base=group.is_base) for m in chosen)])
    widths = [max(_width(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    left = len(keys) or 1
    return [
        "  ".join(_pad(c, w, left=i < left) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in lines
    ]


def shell(word: str) -> str:
    """Quote a word for a shell, with double quotes where that reads better."""
    if shlex.quote(word) == word or not re.search(r"[\"$`\\!]", word):
        return word if shlex.quote(word) == word else f'"{word}"'
    return shlex.quote(word)


def written(value: Estimate, unit: str) -> str:
    """Write a mean and its interval: 81.3 ± 2.1 %."""
    if value.half is None:
        return words.measure(value.mean, unit).replace("-", words.MINUS)
    digits = 1 if unit == "%" else max(0, 2 - int(f"{value.half:e}".partition("e")[2])) if value.half else 2
    return f"{value.mean:.{digits}f} {PLUS_MINUS} {value.half:.{digits}f} {unit}".rstrip().replace("-", words.MINUS)


def signed(value: Estimate, unit: str) -> str:
    """Write a difference with its sign, and its interval."""
    return ("+" if value.mean >= 0 else "") + written(value, unit)


def _score(score: Score | None, row: Row, *, is_base: bool) -> str:
    if score is None:
        return "-"
    value = written(score.value, row.unit)
    if is_base:
        return f"{value} (base)"
    if score.difference is None:
        return value
    return f"{value} {_colour(f'({signed(score.difference, row.unit)})', score.verdict)}"


def _missing(files: SweepFiles, cell: Cell) -> str:
    lines = [f"  {cell.file.name}: {_colour(cell.status, cell.status)}, {cell.reason}"]
    if cell.detail:
        lines.append(f"      {cell.detail}")
    if cell.status == FAILED:
        lines.append(f"      log: {files.directory / '_logs' / (cell.file.name + '.log')}")
    return "\n".join(lines)


def _head(row: Row, source: str) -> str:
    arrow = "\N{UPWARDS ARROW}" if row.higher_is_better else "\N{DOWNWARDS ARROW}"
    return f"{_title(row)} {arrow}" + (f" {source}" if source else "")


def _title(row: Row) -> str:
    return row.metric or row.key


def _measure(row: Row) -> str:
    return words.measure(row.raw, row.unit)


def _colour(shown: str, name: str) -> str:
    if name not in COLOURS or not sys.stdout.isatty():
        return shown
    return f"\x1b[{COLOURS[name]}m{shown}\x1b[0m"


def _width(cell: str) -> int:
    return len(re.sub(r"\x1b\[\d+m", "", cell))


def _pad(cell: str, width: int, *, left: bool) -> str:
    space = " " * (width - _width(cell))
    return cell + space if left else space + cell
