"""A sweep as data: from a command line or a file to named cells, each of which is the command line of an ordinary run.

    python train.py -m +experiment=quickstart objective.contrastive.weight=0,0.5,1 run.seed=0,1
    python train.py sweep=FILE.yaml

Nothing is run here and nothing is written; `vlp.training.sweep_run` does that. A sweep file says the same as a command
line, and can name its cells:

    name: weights                          # runs/weights; without it the file's name
    base: [+experiment=quickstart, trainer.max_steps=400]
    axes: {objective.contrastive.weight: [0, 0.5, 1], optim.lr: [1e-3, 3e-4]}
    cells: {full: [], no_matching: [objective.matching=null]}
    seeds: [0, 1, 2]
    baseline: full,contrastive.weight=0,lr=0.001   # what the others are compared with; the first cell if left out
"""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException

from vlp.config import NAME, ConfigError

FLAGS = ("-m", "--multirun")
SEED = "run.seed"
MAX_CELLS = 1000  # more than this is a mistake in a range
_FILE_KEYS = ("name", "base", "axes", "cells", "seeds", "baseline")
_SETTINGS = ("sweep.parallel", "sweep.baseline", "sweep.only")
_LAUNCHER = "hydra.launcher."
_NAMES = "use letters, digits and ._=,+- (at most 128, not first a dot)."
_KEY = re.compile(r"(?:\+|\+\+)?[A-Za-z_][\w./@-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


class Choice(NamedTuple):
    """One value of an axis: what it changes, and how a name says it."""

    label: str  # "contrastive.weight=0.5", or the name of a cell
    overrides: tuple[str, ...]
    changes: dict[str, str]  # short key -> value, for tables


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str
    group: str  # the name without the seed: the cells of a group differ in nothing else
    seed: str | None
    changes: dict[str, str]  # short key -> value, without the seed
    overrides: tuple[str, ...]  # of an ordinary run, but for its name and place


class Sweep(NamedTuple):
    """Everything that a command line asks for."""

    name: str | None  # None: after the experiment and the keys
    by: str  # the changed keys, for such a name
    cells: tuple[Cell, ...]
    keys: dict[str, str]  # short key -> full key
    baseline: str | None
    only: str | None  # run the cells whose names contain this
    parallel: int
    launcher: str
    launcher_values: dict[str, str]  # of `hydra.launcher.*`


class _Words(NamedTuple):
    """The command line, sorted by what it is for."""

    base: list[str]
    axes: dict[str, list[str]]  # key as it was written, with its plus -> values
    settings: dict[str, str]  # sweep, sweep.*, hydra/launcher, hydra.launcher.*, run.name


def is_asked(words: Sequence[str]) -> bool:
    """Tell whether a command line asks for a sweep."""
    return any(word in FLAGS or word.startswith("sweep=") for word in words)


def parse(words: Sequence[str]) -> Sweep:
    """Return the sweep that a command line describes.

    Raises:
        ConfigError: everything that is wrong with it, one line each; the cells' own configs are not looked at.
    """
    messages: list[str] = []
    sorted_words = _sort([word for word in words if word not in FLAGS], messages)
    settings = sorted_words.settings
    file = _read(settings["sweep"], messages) if "sweep" in settings else {}
    axes = _axes(file, sorted_words.axes, messages)
    base = (*_overrides(file.get("base", []), "base", messages), *sorted_words.base)
    keys = {short: key for short, key in _short_keys([key for key, _ in axes]).items() if key != SEED}
    cells = _cells(base, axes, file.get("cells"), messages)
    parallel = _parallel(settings.get("sweep.parallel", "1"), messages)
    name = settings.get("run.name") or file.get("name") or Path(settings.get("sweep", "")).stem or None
    if name is not None and not NAME.fullmatch(name):
        messages.append(f"run.name: {name!r} is no name; {_NAMES}")
    if messages:
        raise ConfigError(messages)
    return Sweep(
        name=name,
        by="+".join(_short_keys([key for key, _ in axes])) or "cells",
        cells=cells,
        keys=keys,
        baseline=settings.get("sweep.baseline") or file.get("baseline"),
        only=settings.get("sweep.only"),
        parallel=parallel,
        launcher=settings.get("hydra/launcher", "local"),
        launcher_values={
            key.removeprefix(_LAUNCHER): value for key, value in settings.items() if key.startswith(_LAUNCHER)
        },
    )


def _sort(words: Iterable[str], messages: list[str]) -> _Words:
    sorted_words, parser = _Words([], {}, {}), OverridesParser.create()
    for word in words:
        key, equals, value = word.partition("=")
        if key in ("sweep", "hydra/launcher", "run.name", *_SETTINGS) or key.startswith(_LAUNCHER):
            sorted_words.settings[key] = value.strip("'\"")
            continue
        if key.lstrip("+~").startswith(("sweep.", "hydra.", "hydra/")) or (not equals and not word.startswith("~")):
            messages.append(f"{word}: not known here{_near(key, (*_SETTINGS, 'hydra/launcher'))}")
            continue
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            messages.append(f"{word}: {str(error).splitlines()[0]}")
            continue
        if override.is_sweep_override():
            sorted_words.axes[key] = _values(override, word, messages)
        else:
            sorted_words.base.append(word)
    return sorted_words


def _values(override: Override, word: str, messages: list[str]) -> list[str]:
    if override.value_type is ValueType.INTERVAL_SWEEP or isinstance(override.value(), Glob):
        messages.append(f"{word}: a sweep needs its values one by one; write them with commas, or as range(0,4).")
        return []
    return [str(text) for text in override.sweep_string_iterator()]


def _read(path: str, messages: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        messages.append(f"sweep={path}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}.")
        return {}
    if not isinstance(content, dict):
        messages.append(f"sweep={path}: expected the keys {', '.join(_FILE_KEYS)}.")
        return {}
    for key in content.keys() - set(_FILE_KEYS):
        messages.append(f"sweep={path}: unknown key '{key}'{_near(str(key), _FILE_KEYS)}")
    kinds = {"base": (list, dict), "axes": dict, "cells": dict, "seeds": (list, int), "name": str, "baseline": str}
    for key, kind in kinds.items():
        if content.get(key) is None:
            content.pop(key, None)
        elif not isinstance(content[key], kind) or isinstance(content[key], bool):
            messages.append(f"sweep={path}: {key} is {content[key]!r:.60}; see the head of vlp/sweep.py for its form.")
            del content[key]
    return content


def _axes(
    file: Mapping[str, Any], typed: Mapping[str, list[str]], messages: list[str]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each key with its (override, value) pairs; the command line replaces axes of the file, seeds come last."""
    found: dict[str, list[tuple[str, str]]] = {}
    listed = {str(key): values for key, values in file.get("axes", {}).items()}
    if "seeds" in file:
        seeds = file["seeds"]
        listed[SEED] = list(range(seeds)) if isinstance(seeds, int) else seeds
    for key, values in listed.items():
        if not _KEY.fullmatch(key) or not isinstance(values, list) or not values:
            messages.append(f"axes.{key}: {values!r:.60} is no list of values for a key of the config.")
            continue
        found[key] = [(f"{key}={text}", text) for text in (hydra_text(value) for value in values)]
    found |= {key: [(f"{key}={text}", text) for text in values] for key, values in typed.items()}
    for key, pairs in found.items():
        twice = {text for _, text in pairs if [text for _, text in pairs].count(text) > 1}
        messages += [f"{key}: the value {text} is given twice." for text in sorted(twice)]
    ordered = sorted(found.items(), key=lambda item: item[0] == SEED)
    return [(key.lstrip("+"), pairs) for key, pairs in ordered]


def _cells(
    base: tuple[str, ...], axes: Sequence[tuple[str, list[tuple[str, str]]]], named: Any, messages: list[str]
) -> tuple[Cell, ...]:
    """Return the product of the named cells and of all axes."""
    short = {key: label for label, key in _short_keys([key for key, _ in axes]).items()}
    columns = [_named(named, messages)] if named else []
    columns += [
        [Choice(f"{short[key]}={safe(text)}", (override,), {short[key]: _shown(text)}) for override, text in pairs]
        for key, pairs in axes
    ]
    if not columns:
        messages.append("nothing to sweep over; give a key several values, as in run.seed=0,1, or a file of cells.")
        return ()
    number = 1
    for column in columns:
        number *= len(column)
    if number > MAX_CELLS:
        messages.append(f"this sweep has {number:,} cells; at most {MAX_CELLS:,} are allowed.")
        return ()
    seeded = bool(axes) and axes[-1][0] == SEED
    cells = tuple(_cell(base, choices, seeded) for choices in itertools.product(*columns))
    names = [cell.name for cell in cells]
    messages += [
        f"two cells have the name '{name}'; name one differently."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return cells


def _cell(base: tuple[str, ...], choices: tuple[Choice, ...], seeded: bool) -> Cell:
    others, seed = (choices[:-1], choices[-1]) if seeded else (choices, None)
    overrides = (*base, *(text for choice in choices for text in choice.overrides))
    group = _short(",".join(choice.label for choice in others))
    return Cell(
        name=_short(",".join(choice.label for choice in choices)),
        group=group or "all",
        seed=None if seed is None else next(iter(seed.changes.values())),
        changes={key: value for choice in others for key, value in choice.changes.items()},
        overrides=overrides,
    )


def _named(named: Mapping[Any, Any], messages: list[str]) -> list[Choice]:
    choices = []
    for name, overrides in named.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            messages.append(f"cells: {name!r} is no name; {_NAMES}")
            continue
        texts = _overrides([] if overrides is None else overrides, f"cells.{name}", messages)
        choices.append(Choice(name, tuple(texts), {"cell": name}))
    return choices


def _overrides(node: Any, where: str, messages: list[str]) -> list[str]:
    """Return overrides as texts, from a list of texts or from a mapping of keys to values."""
    if isinstance(node, Mapping):
        return [f"{key}={hydra_text(value)}" for key, value in node.items()]
    if isinstance(node, list) and all(isinstance(text, str) for text in node):
        messages += [f"{where}: {text!r} holds a line break." for text in node if "\n" in text]
        return node
    messages.append(f"{where}: {node!r:.60} is neither a list of overrides nor keys with values.")
    return []


def hydra_text(value: Any) -> str:
    """Write a value of YAML as Hydra's overrides do."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(hydra_text(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_text(each)}' for key, each in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else quoted(str(value))


def quoted(text: str) -> str:
    """Quote a text for Hydra where its grammar needs it."""
    if re.fullmatch(r"[\w./:+@-]+", text):
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return f"'{escaped}'"


def safe(text: str) -> str:
    """Write a value as part of a file name: stable, readable, and different for different values."""
    plain = text.strip("'\"").strip("[]{}").replace(",", "+").replace("/", ".")
    cleaned = _UNSAFE.sub("_", plain).strip("_")
    altered = cleaned != plain or "+" in text or ("." in text and "/" in text)
    return f"{cleaned[:40]}-{_digest(text)}" if altered or len(cleaned) > 40 or not cleaned else cleaned


def _shown(text: str) -> str:
    return text.strip("'\"")


def _short(name: str) -> str:
    """Keep a name below the limit of file systems and of `run.name`."""
    name = name.lstrip(".-_=,+")
    return name if len(name) <= 120 else f"{name[:112]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return short key -> key: the last two words of a key, without a section that says nothing; or all of it."""
    short = {}
    for key in keys:
        words = re.split(r"[./]", key)
        words = words[1:] if words[0] in ("run", "trainer", "optim", "data", "clip") and len(words) > 1 else words[-2:]
        short[key] = ".".join(words)
    taken = list(short.values())
    return {label if taken.count(label) == 1 else key.replace("/", "."): key for key, label in short.items()}


def _parallel(text: str, messages: list[str]) -> int:
    if re.fullmatch(r"[1-9]\d{0,2}", text):
        return int(text)
    messages.append(f"sweep.parallel: {text!r} is not possible; it must be a number of at least 1.")
    return 1


def _near(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}."
