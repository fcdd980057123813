"""The model card of a run: `python -m vlp.report.card runs/NAME [--use TEXT]` writes runs/NAME/MODEL_CARD.md.

Everything in it comes from the run's own files: which clips were trained on and how many were lost, the recipe, the
scores with their intervals and the protocol behind each. Ready for a hub, whose front matter it begins with.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlp.report import words
from vlp.report.panels import newest_by_source
from vlp.report.read import RunFiles, read_run
from vlp.report.records import Evaluation, Row, Source, Task

WRONG = 78  # as vlp.training.exits has it
USE = "Research on video-language models: retrieval, captioning and questions about clips like those it was trained on."
OUT_OF_USE = (
    "Decisions about people, surveillance, and clips unlike its training data, on which nothing below was measured."
)


def write_card(run_dir: str | Path, *, use: str = USE) -> Path:
    """Write `MODEL_CARD.md` into a run's directory and return its path.

    Raises:
        ValueError: `run_dir` is not a directory. A file that is missing or damaged in it never raises.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is not a directory; give the directory of a run, as runs/NAME.")
    path = directory / "MODEL_CARD.md"
    path.write_text("\n".join(_lines(read_run(directory), use)) + "\n", encoding="utf-8", errors="replace")
    return path


def _lines(files: RunFiles, use: str) -> Iterator[str]:
    run = files.run
    yield from ("---", "library_name: vlp", "tags: [video-text, video-retrieval, video-captioning]", "---", "")
    yield from (
        f"# {plain(run.name)}",
        "",
        f"Trained with vlp; {run.step:,} of {run.max_steps:,} steps, {run.status}."
        if run.status != "imported"
        else "Weights that were not trained here; `init.json` beside this card says where from.",
        "",
    )
    yield from ("## Intended use", "", plain(use), "", f"Not for: {OUT_OF_USE}", "")
    yield from ("## Training data", "", *_data(run.sources), "")
    yield from ("## Recipe", "", *_recipe(files), "")
    yield from ("## Scores", "", *_scores(newest_by_source(files.evaluations)), "")
    yield from ("## Made with", "")
    yield from (f"- {plain(name)}: {plain(str(value))}" for name, value in run.environment.items())
    if files.problems:
        yield from ("", "## What this card could not read", "", *(f"- {plain(line)}" for line in files.problems))


def _data(sources: Sequence[Source]) -> Iterator[str]:
    yield "| source | training clips | seen, repeats included | not usable | test clips | fingerprint |"
    yield "|---|---|---|---|---|---|"
    for one in sources:
        cells = [plain(one.name), f"{one.train:,}", f"{one.seen:,}", f"{len(one.dropped):,}", f"{one.test:,}"]
        yield f"| {' | '.join(cells)} | `{plain(one.fingerprint[:16])}` |"
    for one in sources:
        if one.test_is_train:
            yield f"\nThe test clips of {plain(one.name)} are its training clips: scores show memory only."


def _recipe(files: RunFiles) -> Iterator[str]:
    run = files.run
    kept = [part for part in run.parts if not part.dropped]
    yield f"- experiment: {plain(run.experiment or 'none named')}"
    yield f"- command: `{plain(run.command)}`"
    if files.graph:
        weights = ", ".join(f"{plain(one.name)} ({one.weight:g})" for one in files.graph.objectives)
        yield f"- objectives (weight): {weights}"
    trainable = sum(part.trainable for part in kept)
    yield f"- parameters: {sum(part.parameters for part in kept):,}, {trainable:,} trained"
    yield f"- duration: {words.duration(run.seconds)} in {words.plural(run.attempts, 'attempt')}"
    yield "- the whole config: `config.yaml` beside this card"


def _scores(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    if not evaluations:
        yield "None yet: run `python evaluate.py run=...`."
    for found in evaluations:
        for task in found.tasks.values():
            if task.rows:
                yield from _table(found, task)


def _table(found: Evaluation, task: Task) -> Iterator[str]:
    yield f"### {plain(task.title)}, {plain(found.source)}, step {found.step:,}"
    if found.trained_on_these:
        yield "\n**The model was trained on these clips.**"
    yield "\n| metric | score | 95 % interval | dual softmax | chance | items |\n|---|---|---|---|---|---|"
    for row in task.rows:
        yield f"| {' | '.join(_cells(row))} |"
    if task.protocol:
        yield "\n<details><summary>Protocol</summary>\n"
        yield from (f"- {plain(name)}: {_value(value)}" for name, value in task.protocol.items())
        yield "\n</details>"
    yield ""


def _cells(row: Row) -> list[str]:
    interval = "" if row.low is None or row.high is None else f"{row.low:.1f} to {row.high:.1f}"
    numbers = ["" if value is None else f"{value:.1f}" for value in (row.raw, row.dual_softmax, row.chance)]
    unit = f" ({row.unit})" if row.unit else ""
    return [plain(row.metric + unit), numbers[0], interval, numbers[1], numbers[2], str(row.num or "")]


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return plain(text if len(text) <= 300 else f"{text[:300]} ...")


def plain(text: str) -> str:
    """Return text that means nothing to Markdown or HTML: names of data must not become markup."""
    table: Mapping[int, str] = str.maketrans({letter: f"&#{ord(letter)};" for letter in "<>&|`[]*\\"} | {"\n": " "})
    return text.translate(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card of the run that the command line names, print where it is; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.report.card", description="Write the model card of a run.")
    parser.add_argument("run_dir", help="directory of the run, such as runs/NAME")
    parser.add_argument("--use", default=USE, help="what the model is meant for")
    given = parser.parse_args(arguments)
    try:
        print(write_card(given.run_dir, use=given.use))
    except ValueError as error:
        print(f"card: {error}", file=sys.stderr)
        return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
