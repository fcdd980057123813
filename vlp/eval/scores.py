"""Score files: a task's numbers, what each clip contributed to them, and the card that says how they came about.

    runs/NAME/scores/step-NNNNNN.SOURCE.TASK.json
        card        {"protocol": what must be equal for two scores to be compared, "subject": what was scored}
        rows        the task's table, with "low" and "high" where each clip's share is known
        each        row key -> {"clips", "numbers", "values", "statistic"}

Axes: N items (captions, questions, clips), K clips, R resamples.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
NUM_RESAMPLES, NUM_FLIPS = 1000, 10_000
CONFIDENCE = 95.0  # percent


class Each(NamedTuple):
    """What the items of one row have scored; the row's raw value is their mean, or their median."""

    clips: list[int]  # [N] sample id: items of one clip are drawn together, for they are not independent
    numbers: list[int]  # [N] which of its clip
    values: list[float]  # [N] in the unit of the row
    statistic: str = "mean"


class ScoreFile(NamedTuple):
    """A score file as it is on disk."""

    card: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    each: dict[str, Each]
    keys: dict[int, str]  # sample id -> key


def interval(each: Each, *, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a row, by resampling clips with all of their items."""
    draws = _statistic(each, _draws(each, seed))
    low, high = np.percentile(draws, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """B minus A on the same items."""

    value: float
    low: float  # of the bootstrap interval over clips
    high: float
    p: float  # of a two-sided sign-flip test over clips: how often chance alone makes as large a difference


def paired(a: Each, b: Each, *, seed: int = 0) -> Difference:
    """Compare two rows item by item.

    Raises:
        ValueError: other items, or not means.
    """
    if a.statistic != "mean" or b.statistic != "mean":
        raise ValueError("only means can be compared item by item.")
    if (a.clips, a.numbers) != (b.clips, b.numbers):
        raise ValueError("the two score other items; evaluate both on the same split with the same vlp.")
    change = a._replace(values=[y - x for x, y in zip(a.values, b.values, strict=True)])
    draws = _statistic(change, _draws(change, seed))
    low, high = np.percentile(draws, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    sums = _sums(change)
    value = float(sums.sum() / len(change.values))
    return Difference(value, float(low), float(high), _sign_flip(sums, seed))


def _sign_flip(sums: np.ndarray, seed: int) -> float:
    """Return how often sums [K] with random signs are as far from zero as they are, the observed signs included."""
    rng, extreme, rounds = np.random.default_rng(seed), 1, 20
    for _ in range(rounds):
        signs = rng.integers(0, 2, (NUM_FLIPS // rounds, len(sums)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return extreme / (NUM_FLIPS + 1)


def write(path: Path, found: ScoreFile) -> None:
    """Write a score file as a whole."""
    each = {key: one._asdict() for key, one in found.each.items()}
    content = {"format": FORMAT, "card": found.card, "rows": found.rows, "keys": found.keys, "each": each}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> ScoreFile:
    """Read a score file.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        each = {key: Each(**one) for key, one in content["each"].items()}
        keys = {int(sample): key for sample, key in content["keys"].items()}
        return ScoreFile(content["card"], content["rows"], each, keys)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no score file ({error}); evaluate.py writes them into runs/NAME/scores.") from None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return one line for each entry in which the protocols of two cards differ."""
    before, after = a["protocol"], b["protocol"]
    return [
        f"{key}: {json.dumps(before.get(key))} and {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _draws(each: Each, seed: int) -> np.ndarray:
    """Return [R, N]: how often each item is in each resample."""
    clips, owner = np.unique(each.clips, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = np.stack(
        [np.bincount(rng.integers(0, len(clips), len(clips)), minlength=len(clips)) for _ in range(NUM_RESAMPLES)]
    ).astype(np.uint16)
    return counts[:, owner.reshape(-1)]


def _statistic(each: Each, draws: np.ndarray) -> np.ndarray:
    """Return the row's value [R] in each resample."""
    values = np.asarray(each.values, dtype=np.float64)
    if each.statistic == "mean":
        return (draws @ values) / draws.sum(1)
    order = np.argsort(values, kind="stable")
    below = draws[:, order].cumsum(1, dtype=np.int64)  # [R, N]
    total = below[:, -1:]
    low, high = (below < (total + 1) // 2).sum(1), (below < total // 2 + 1).sum(1)
    return (values[order][low] + values[order][high]) / 2


def _sums(each: Each) -> np.ndarray:
    """Return the sum of each clip's values [K]."""
    clips, owner = np.unique(each.clips, return_inverse=True)
    return np.bincount(owner.reshape(-1), weights=each.values, minlength=len(clips))
