"""Score highlights by the clips that come first: `python -m vlp.eval.top_clips PREDICTIONS.jsonl ANNOTATIONS.jsonl`.

    annotation {video, domain, scores [[an annotator's score each] a clip]}       TVSum: 20 annotators, clips of 2 s
    prediction {video, saliency [one a clip]}
      -> mean average precision of the first 5 clips, by domain and over the domains

A clip is right for an annotator whose score for it is above their median of that video. `tvsum` is what public code
does: the median is the lower one of two, tied clips keep their order, precision is joined by straight lines, and
recall is of the right clips among the first 5 alone. `strict` takes the plain median, puts tied right clips last, and
divides by how many of the 5 could be right. Videos without a prediction score 0.

Source: the evaluation of TVSum in UMT (arXiv:2203.12745), which later work on highlights uses.
Axes: C clips, A annotators, K first clips.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

TOP = 5
Median = Callable[[np.ndarray], Any]
Precision = Callable[[np.ndarray, np.ndarray], float]  # right clips [C] bool, predicted saliency [C] -> 0 to 1


def evaluate(
    predictions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], protocol: str = "strict"
) -> dict[str, float]:
    """Return the score of each domain and their mean ("mAP"), in percent.

    Raises:
        ValueError: a video twice or unknown, annotations of no annotator, another number of clips.
    """
    median, precision = PROTOCOLS[protocol]
    found = {one["video"]: one["saliency"] for one in predictions}
    known = [one["video"] for one in annotations]
    if not known or len(set(known)) < len(known) or len(found) < len(predictions):
        raise ValueError("there must be annotations, and each video may stand once in each file.")
    unknown = sorted(found.keys() - set(known))
    if unknown:
        raise ValueError(f"{len(unknown)} predictions are of a video that no annotation has, such as {unknown[0]!r}.")
    domains: dict[str, list[float]] = {}
    for one in annotations:
        domains.setdefault(one["domain"], []).append(_of_video(one, found.get(one["video"]), median, precision))
    scores = {f"mAP {domain}": 100 * sum(own) / len(own) for domain, own in sorted(domains.items())}
    return {**scores, "mAP": sum(scores.values()) / len(scores)}


def _of_video(one: Mapping[str, Any], saliency: Any, median: Median, precision: Precision) -> float:
    truth = np.asarray(one["scores"], dtype=float)
    if truth.ndim != 2 or not truth.size:
        raise ValueError(f"{one['video']}: scores must hold a list for each clip, with one number an annotator.")
    if saliency is None:
        return 0.0
    guess = np.asarray(saliency, dtype=float)
    if guess.shape != truth.shape[:1] or not np.isfinite(guess).all():
        raise ValueError(
            f"{one['video']}: saliency must hold {len(truth)} finite numbers, one a clip, not {guess.shape}."
        )
    right = truth > np.apply_along_axis(median, 0, truth)  # [C, A]
    return float(np.mean([precision(column, guess) for column in right.T]))


def strict_precision(right: np.ndarray, guess: np.ndarray) -> float:
    """Return the average precision of the first clips; of tied clips the right ones come last."""
    hits = right[np.lexsort((right, -guess))][:TOP]
    places = np.flatnonzero(hits)
    precision = np.arange(1, len(places) + 1) / (places + 1)
    return float(precision.sum() / max(1, min(TOP, int(right.sum()))))


def joined_precision(right: np.ndarray, guess: np.ndarray) -> float:
    """Return the area below precision over recall among the first clips, joined by straight lines from (0, 1) on."""
    hits = np.cumsum(right[np.argsort(-guess, kind="stable")][:TOP])
    if not hits[-1]:
        return 0.0
    recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
    before = np.concatenate([[1.0], precision[:-1]])
    return float((np.diff(recall, prepend=0) * (before + precision) / 2).sum())


def _lower_median(scores: np.ndarray) -> float:
    return float(np.sort(scores)[(len(scores) - 1) // 2])


PROTOCOLS: dict[str, tuple[Median, Precision]] = {
    "strict": (np.median, strict_precision),
    "tvsum": (_lower_median, joined_precision),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.eval.top_clips", description="Score highlights by domain.")
    parser.add_argument("predictions", help="JSON lines: video, saliency")
    parser.add_argument("annotations", help="JSON lines: video, domain, scores")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="strict")
    given = parser.parse_args(arguments)
    try:
        scores = evaluate(_lines(given.predictions), _lines(given.annotations), given.protocol)
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        print(f"top_clips: {what}", file=sys.stderr)
        return 78
    print(f"protocol: {given.protocol}")
    for name, value in scores.items():
        print(f"{name:<24} {value:8.2f}")
    return 0


def _lines(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
