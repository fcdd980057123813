"""What the trainer leaves in a run's directory, as types: run.json, graph.json and eval/step-*.json.

A field that a file lacks takes its default. Fields that may be None are optional; the absence of any other is noted.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

EMPTY: Mapping = MappingProxyType({})  # as a default it cannot be changed by accident


class Dropped(NamedTuple):
    """One sample that was not used; `reason` is the lower-case name of a `vlp.types.Reason`."""

    key: str = ""
    where: str = ""  # file or shard
    reason: str = ""
    detail: str = ""
    stage: str = ""  # prepare, index or train


class Source(NamedTuple):
    """One source of samples."""

    name: str = ""
    train: int = 0  # samples
    test: int = 0  # samples
    fingerprint: str = ""
    weight: float = 1.0
    seen: int = 0  # samples trained on, repeats included
    test_is_train: bool = False
    dropped: tuple[Dropped, ...] = ()


class Part(NamedTuple):
    """One named part of the model; `dropped` parts were not built because nothing needs them."""

    name: str = ""
    parameters: int = 0
    trainable: int = 0
    dropped: bool = False


class Run(NamedTuple):
    """run.json."""

    name: str = ""
    status: str = "unknown"  # running, finished, preempted or failed
    exit_code: int | None = None
    step: int = 0
    max_steps: int = 0
    experiment: str | None = None
    command: str = ""
    started: str = ""  # ISO 8601
    seconds: float | None = None
    attempts: int = 1
    environment: Mapping[str, object] = EMPTY
    parts: tuple[Part, ...] = ()
    sources: tuple[Source, ...] = ()


class Node(NamedTuple):
    """One quantity of the step's graph, under one view; "" is the clean batch."""

    name: str = ""
    view: str = ""
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    calls: int = 1
    parameters: int = 0


class View(NamedTuple):
    """One corruption of batch fields."""

    name: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class Objective(NamedTuple):
    """One loss; `inputs` maps its roles to quantities or fields."""

    name: str = ""
    weight: float = 1.0
    inputs: Mapping[str, object] = EMPTY  # a name, or a list of names


class Graph(NamedTuple):
    """graph.json."""

    fields: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    views: tuple[View, ...] = ()
    objectives: tuple[Objective, ...] = ()


class Row(NamedTuple):
    """One metric. `raw` and `dual_softmax` are different protocols and are never compared with each other."""

    metric: str = ""
    key: str = ""
    raw: float | None = None
    dual_softmax: float | None = None
    chance: float | None = None
    unit: str = ""
    higher_is_better: bool = True
    num: int | None = None  # how many things `raw` averages
    low: float | None = None  # of the bootstrap interval over clips
    high: float | None = None


class Result(NamedTuple):
    """One clip found for a query."""

    key: str = ""
    caption: str = ""
    score: float | None = None
    correct: bool = False
    strip: str | None = None  # path of a JPEG from the run's directory, frames side by side


class Example(NamedTuple):
    """One example of a task; `kind` (retrieval, choice or caption) tells which fields are filled."""

    kind: str = ""
    query: str | None = None
    rank: int | None = None  # of the right clip, from 1
    results: tuple[Result, ...] | None = None
    caption: str | None = None
    negative: str | None = None
    score: float | None = None
    negative_score: float | None = None
    correct: bool | None = None
    generated: str | None = None
    references: tuple[str, ...] | None = None
    strip: str | None = None


class Task(NamedTuple):
    """One task of an evaluation."""

    title: str = ""
    rows: tuple[Row, ...] = ()
    examples: tuple[Example, ...] = ()
    protocol: Mapping[str, object] | None = None  # the card of vlp.eval.scores, of what must be equal to compare


class Evaluation(NamedTuple):
    """eval/step-NNNNNN.SOURCE.json: one evaluation of one source."""

    step: int = 0
    source: str = ""
    split: str = "test"
    num_clips: int = 0
    num_unusable: int | None = None
    trained_on_these: bool = False
    tasks: Mapping[str, Task] = EMPTY
