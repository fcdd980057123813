"""The numbers of a run in the order in which a reader wants them: warnings, headline cards, result tables."""

from collections.abc import Iterator
from typing import NamedTuple

from vlp.report import words
from vlp.report.panels import newest_by_source
from vlp.report.read import RunFiles
from vlp.report.records import Evaluation, Row, Run

HEADLINE_SUFFIX = "_r1"  # these metrics, and the first of each task, become cards
MAX_CARDS = 8
TIMES = "\N{MULTIPLICATION SIGN}"


class Banner(NamedTuple):
    """A warning above everything else."""

    level: str  # "bad", "warn" or "info": the CSS class
    title: str
    text: str
    link: str = ""  # id of the section that says more


class Card(NamedTuple):
    """One headline number."""

    label: str
    task: str
    value: str
    chance: str
    times: str  # how far from chance
    bar: tuple[float, float | None] | None  # value and chance in percent of the bar


class Table(NamedTuple):
    """The metrics of one task on one source."""

    title: str
    rows: tuple[Row, ...]


def banners(files: RunFiles) -> list[Banner]:
    """Return what a reader must know before believing the numbers."""
    return [*_status_banner(files.run), *_test_banner(files), *_drop_banner(files.run)]


def _status_banner(run: Run) -> Iterator[Banner]:
    where = f"at step {words.count(run.step)} of {words.count(run.max_steps)}"
    code = "" if run.exit_code is None else f"Exit code {run.exit_code}: {words.ending(run.exit_code)}. "
    if run.status == "failed":
        yield Banner("bad", f"This run failed {where}.", f"{code}All numbers below are from before that.")
    elif run.status == "preempted":
        text = f"{code}The same command continues it; nothing is lost or repeated."
        yield Banner("warn", f"This run was stopped {where}.", text)
    elif run.status == "running":
        yield Banner("info", f"This run was {where} when the report was written.", "The numbers below will change.")
    elif run.status != "finished":
        yield Banner("warn", "It is not known how this run ended.", "run.json does not say it.", "notes")


def _test_banner(files: RunFiles) -> Iterator[Banner]:
    names = {source.name for source in files.run.sources if source.test_is_train}
    names |= {found.source for found in files.evaluations if found.trained_on_these}
    if names:
        text = "The numbers show that the model can learn these clips by heart, not that it understands new ones."
        yield Banner("warn", f"The test clips of {', '.join(sorted(names))} are its training clips.", text)


def _drop_banner(run: Run) -> Iterator[Banner]:
    dropped = sum(len(source.dropped) for source in run.sources)
    if dropped:
        whole = dropped + sum(source.train + source.test for source in run.sources)
        title = f"{words.plural(dropped, 'sample')} could not be used ({words.share(dropped, whole)})."
        yield Banner("warn", title, "Each is listed with its reason.", "data")


def headline(evaluations: list[Evaluation]) -> list[Card]:
    """Return cards of the newest evaluation of each source."""
    newest = newest_by_source(evaluations)
    cards = []
    for found in newest:
        for task in found.tasks.values():
            chosen = [row for index, row in enumerate(task.rows) if index == 0 or row.key.endswith(HEADLINE_SUFFIX)]
            label = task.title + (f" · {found.source}" if len(newest) > 1 else "")
            cards += [card(row, label) for row in chosen if row.raw is not None]
    return cards[:MAX_CARDS]


def card(row: Row, task: str) -> Card:
    """Return one metric as a card."""
    chance = "" if row.chance is None else words.measure(row.chance, row.unit)
    bar = None
    if row.unit == "%" and row.raw is not None:
        bar = (min(max(row.raw, 0.0), 100.0), row.chance)
    return Card(row.metric or row.key, task, words.measure(row.raw, row.unit), chance, times_chance(row), bar)


def times_chance(row: Row) -> str:
    """Return in words how the raw value compares with chance; "" where a ratio says nothing."""
    if row.raw is None or not row.chance or row.chance <= 0 or row.raw < 0:
        return ""
    if row.higher_is_better:
        return f"{row.raw / row.chance:.3g} {TIMES} chance"
    return f"{row.chance / row.raw:.3g} {TIMES} better than chance" if row.raw > 0 else ""


def tables(evaluation: Evaluation) -> list[Table]:
    """Return one table for each task that has metrics."""
    return [Table(task.title or words.title(name), task.rows) for name, task in evaluation.tasks.items() if task.rows]


class Results(NamedTuple):
    """One evaluation as tables, which have the same columns."""

    evaluation: Evaluation
    tables: list[Table]
    has_dual_softmax: bool
    has_num: bool


def results(evaluation: Evaluation) -> Results:
    """Return the tables of an evaluation and the columns that they need."""
    found = tables(evaluation)
    rows = [row for table in found for row in table.rows]
    has_dual_softmax = any(row.dual_softmax is not None for row in rows)
    return Results(evaluation, found, has_dual_softmax, any(row.num is not None for row in rows))
