"""Runs that follow each other, each from the weights of the one before: a file of stages as data.

    python train.py stages=conf/stages/frozen_in_time.yaml [section.key=value ...]

Nothing is run here; `vlp.training.stages_run` does that. A file of stages:

    name: frozen_in_time                  # the runs are runs/frozen_in_time-1, -2, ...; without it the file's name
    base: [optim.weight_decay=0.05]       # for every stage; so are the overrides of the command line, which win
    stages:
      - [+experiment=frozen_in_time]
      - [+experiment=frozen_in_time_video]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlp.config import NAME, ConfigError
from vlp.sweep import quoted

WORD = "stages="
_KEYS = ("name", "base", "stages")
_OWN = ("init.run", "run.name")  # what a plan of stages says itself


class Stage(NamedTuple):
    """One run of a plan."""

    name: str
    overrides: tuple[str, ...]  # of an ordinary run; its name included, what it starts from not


class Stages(NamedTuple):
    """Runs in their order."""

    name: str
    stages: tuple[Stage, ...]


def is_asked(words: Sequence[str]) -> bool:
    """Tell whether a command line asks for stages."""
    return any(word.startswith(WORD) for word in words)


def parse(words: Sequence[str]) -> Stages:
    """Return the stages that a command line describes.

    Raises:
        ConfigError: everything that is wrong with the file or the line; the configs of the stages are not looked at.
    """
    paths = [word.removeprefix(WORD) for word in words if word.startswith(WORD)]
    if len(paths) > 1:
        raise ConfigError([f"stages: {len(paths)} files are named; name one."])
    names = [word.partition("=")[2].strip("'\"") for word in words if word.startswith("run.name=")]
    rest = [word for word in words if not word.startswith((WORD, "run.name="))]
    file, messages = _read(paths[0])
    name = (names or [file.get("name")])[-1] or Path(paths[0]).stem
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 120:
        messages.append(f"stages: {name!r} is no name; use letters, digits and ._=,+- (at most 120, not first a dot).")
    messages += [
        f"{word}: the plan of the stages says this itself; leave it out."
        for own in (rest, file.get("base", []), *file.get("stages", []))
        for word in own
        if word.lstrip("+").partition("=")[0] in _OWN
    ]
    if messages:
        raise ConfigError(messages)
    lines = [(*file.get("base", []), *own, *rest) for own in file["stages"]]
    return Stages(name, tuple(_stage(f"{name}-{number}", line) for number, line in enumerate(lines, 1)))


def starting(stages: Stages, number: int, runs: str) -> tuple[str, ...]:
    """Return the overrides of a stage, counted from 0, with what it starts from; `runs` is where the runs lie."""
    own = stages.stages[number]
    if number == 0:
        return own.overrides
    return (*own.overrides, f"init.run={quoted(str(Path(runs) / stages.stages[number - 1].name))}")


def _stage(name: str, line: Sequence[str]) -> Stage:
    return Stage(name, (*line, f"run.name={quoted(name)}"))


def _read(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return what a file says, as far as it is right, and one line for each of its mistakes."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"stages={path}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}."]
    if not isinstance(content, dict) or content.keys() - set(_KEYS):
        return {}, [f"stages={path}: expected the keys {', '.join(_KEYS)}; see the head of vlp/stages.py for its form."]
    listed = content.get("stages")
    if not isinstance(listed, list) or not listed or not all(map(_are_texts, [content.get("base", []), *listed])):
        return {}, [f"stages={path}: 'stages' must be a list with the overrides of each stage, and 'base' such a list."]
    return content, []


def _are_texts(node: Any) -> bool:
    return isinstance(node, list) and all(isinstance(text, str) and "\n" not in text for text in node)
