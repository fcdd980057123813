"""Picks the examples of a task that a report shows: right and wrong ones, a few of each in front."""

from pathlib import Path
from typing import NamedTuple

from vlp.report.media import Strip, embed
from vlp.report.records import Example, Task

SHOWN = 2  # right ones, and as many wrong ones, without a click
FOLDED = 4  # more of each, behind a click
RESULTS = 3  # clips shown for a query; the right one is added if it stands further down


class Clip(NamedTuple):
    """A found clip with its picture."""

    place: int  # from 1
    key: str
    caption: str
    score: float | None
    correct: bool
    strip: Strip | None


class Shown(NamedTuple):
    """An example with its pictures."""

    example: Example
    right: bool | None  # None where the task knows no right and wrong, as in captioning
    strip: Strip | None
    clips: list[Clip]
    width: float  # full length of the score bars


class Gallery(NamedTuple):
    """The examples of one task on one source."""

    title: str
    kind: str
    front: list[Shown]
    folded: list[Shown]
    num_right: int  # among all examples that were written
    num_wrong: int


def is_right(example: Example) -> bool | None:
    """Return whether the model was right: the right clip first, the true caption preferred; None if that is unknown."""
    if example.rank is not None:
        return example.rank == 1
    if example.correct is not None:
        return example.correct
    if example.score is not None and example.negative_score is not None:
        return example.score > example.negative_score
    return None


def gallery(title: str, task: Task, directory: Path, problems: list[str]) -> Gallery | None:
    """Return the pictures of a task's examples, right ones first; None without examples."""
    right = [example for example in task.examples if is_right(example)]
    wrong = [example for example in task.examples if is_right(example) is False]
    other = [example for example in task.examples if is_right(example) is None]
    if not task.examples:
        return None
    front = [*right[:SHOWN], *wrong[:SHOWN], *other[: 2 * SHOWN]]
    last = SHOWN + FOLDED
    folded = [*right[SHOWN:last], *wrong[SHOWN:last], *other[2 * SHOWN : 2 * last]]
    return Gallery(
        title=title,
        kind=task.examples[0].kind,
        front=[_show(example, directory, problems) for example in front],
        folded=[_show(example, directory, problems) for example in folded],
        num_right=len(right),
        num_wrong=len(wrong),
    )


def _show(example: Example, directory: Path, problems: list[str]) -> Shown:
    clips = [
        Clip(place, found.key, found.caption, found.score, found.correct, embed(directory, found.strip, problems))
        for place, found in enumerate(example.results or [], 1)
        if place <= RESULTS or found.correct
    ]
    width = max((abs(score) for score in (example.score, example.negative_score) if score is not None), default=0.0)
    return Shown(example, is_right(example), embed(directory, example.strip, problems), clips, width or 1.0)
