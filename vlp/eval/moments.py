"""Score predicted time spans and clip saliency: `python -m vlp.eval.moments PREDICTIONS.jsonl ANNOTATIONS.jsonl`.

    annotation {qid, duration, relevant_windows [[start, end]], relevant_clip_ids, saliency_scores [[3 annotators]]}
    prediction {qid, pred_relevant_windows [[start, end, score]], pred_saliency_scores [one a clip]}
      -> R@1 at IoU, mean IoU, mAP at IoU .5:.05:.95, in all and by length of the right spans; highlights: mAP, HIT@1

The format is that of QVHighlights, in seconds. A query without a prediction scores 0 and stays in the denominator.

Axes: P predicted spans, G right spans, C clips, A annotators, I thresholds of IoU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
BUCKETS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}  # seconds of a right span, (above, up to]
LEVELS = {"fair": 2, "good": 3, "very_good": 4}  # an annotator's score from which on a clip is a highlight
CLIP_S = 2  # seconds of a clip
MAX_SPANS = 10  # predicted spans that count
NUM_ANNOTATORS = 3

AveragePrecision = Callable[[np.ndarray, np.ndarray], float]  # is it right [C], its score [C]


class Protocol(NamedTuple):
    """What the public evaluator does and a strict one does not; the quirks have this name only."""

    name: str
    by_score: bool  # predictions are ranked by score before they are cut, and the first is the best
    any_length: bool  # saliency of another number of clips is cut or filled with zeros instead of refused
    average_precision: AveragePrecision


def evaluate(
    predictions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], protocol: Protocol | None = None
) -> dict[str, float]:
    """Return every score by name, in percent; a bucket without a right span is left out.

    Raises:
        ValueError: a query twice or unknown, a span that is no span, saliency of another number of clips.
    """
    protocol = protocol or STRICT
    found = _by_query(predictions, annotations)
    scores: dict[str, float] = {}
    if any("pred_relevant_windows" in one for one in predictions):
        scores |= moment_scores(found, annotations, protocol)
    if any("pred_saliency_scores" in one for one in predictions):
        scores |= highlight_scores(found, annotations, protocol)
    return scores


def moment_scores(
    found: Mapping[Any, Mapping], annotations: Sequence[Mapping[str, Any]], protocol: Protocol
) -> dict[str, float]:
    """Return R@1 at each IoU, mean IoU and mAP, in all and by length; `found` holds a prediction by query."""
    spans = {one["qid"]: _spans(found.get(one["qid"], {}), protocol) for one in annotations}
    right = {one["qid"]: np.asarray(one["relevant_windows"], dtype=float).reshape(-1, 2) for one in annotations}
    best = np.array([_best_iou(spans[qid][:1], own) for qid, own in right.items()])
    scores = {f"R1@{threshold}": 100 * float((best >= threshold).mean()) for threshold in THRESHOLDS}
    scores["mIoU"] = 100 * float(best.mean())
    scores |= _mean_precision("", spans, right)
    for name, (low, high) in BUCKETS.items():
        inside = {q: own[(own[:, 1] - own[:, 0] > low) & (own[:, 1] - own[:, 0] <= high)] for q, own in right.items()}
        inside = {qid: own for qid, own in inside.items() if len(own)}
        if inside:
            average = _mean_precision("", spans, inside)["mAP"]
            scores |= {f"mAP {name}": average, f"queries {name}": float(len(inside))}
    return scores


def highlight_scores(
    found: Mapping[Any, Mapping], annotations: Sequence[Mapping[str, Any]], protocol: Protocol
) -> dict[str, float]:
    """Return mAP over annotators and queries, and HIT@1, for each level; a query without a highlight scores 0."""
    scores: dict[str, float] = {}
    pairs = [(_saliency(one), _predicted(found.get(one["qid"], {}), one, protocol)) for one in annotations]
    for name, level in LEVELS.items():
        precision, hits = [], []
        for truth, predicted in pairs:
            right = truth >= level  # [C, A]
            if predicted is None:
                precision.append(0.0)
                hits.append(False)
                continue
            precision.append(np.mean([protocol.average_precision(column, predicted) for column in right.T]))
            hits.append(bool(right[int(predicted.argmax())].any()))
        scores |= {f"HL mAP {name}": 100 * float(np.mean(precision)), f"HL HIT@1 {name}": 100 * float(np.mean(hits))}
    return scores


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union [P, G] of spans [P, 2] and [G, 2]; 0 where the union is empty."""
    inside = (np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])).clip(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


def giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return generalised IoU [P, G] in [-1, 1]: IoU minus the share of the hull that neither span covers.

    Source: arXiv:1902.09630, algorithm 1, in one dimension.
    """
    inside = (np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])).clip(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - inside
    hull = np.maximum(a[:, None, 1], b[None, :, 1]) - np.minimum(a[:, None, 0], b[None, :, 0])
    gap = np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0)
    return iou(a, b) - gap


def span_precision(spans: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the average precision [I] of spans [P, 3] (start, end, score, best first) for right spans [G, 2].

    Greedy: each span takes the free right span that it overlaps most, if by the threshold or more.
    """
    overlap = iou(spans[:, :2], right)  # [P, G]
    found = []
    for threshold in THRESHOLDS:
        taken, hits = np.zeros(len(right), dtype=bool), np.zeros(len(spans))
        for place, row in enumerate(overlap):
            free = [g for g in row.argsort()[::-1] if row[g] >= threshold and not taken[g]]
            if free:
                taken[free[0]], hits[place] = True, 1
        found.append(_area(np.cumsum(hits), len(right)))
    return np.array(found)


def clip_precision(right: np.ndarray, scores: np.ndarray) -> float:
    """Return the average precision of ranking clips by score [C]; tied clips share a place, 0 without a right one."""
    hits, places = _steps(right, scores)
    return _area_at(hits, places, int(right.sum())) if right.any() else 0.0


def clip_precision_qvhighlights(right: np.ndarray, scores: np.ndarray) -> float:
    """Return what the public evaluator returns: the mean of the interpolated precision wherever recall grows.

    Each growth counts the same, however many right clips are tied there.
    """
    if right.all() or not right.any():
        return float(right.all())
    hits, places = _steps(right, scores)
    precision = np.maximum.accumulate((hits / places)[::-1])[::-1]
    return float(precision[np.diff(hits, prepend=0) > 0].mean())


STRICT = Protocol("strict", by_score=True, any_length=False, average_precision=clip_precision)
QVHIGHLIGHTS = Protocol("qvhighlights", by_score=False, any_length=True, average_precision=clip_precision_qvhighlights)
PROTOCOLS = {protocol.name: protocol for protocol in (STRICT, QVHIGHLIGHTS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of two files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.eval.moments", description="Score moments and highlights.")
    parser.add_argument("predictions", help="a .jsonl file, one query a line")
    parser.add_argument("annotations", help="a .jsonl file, one query a line")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="strict")
    given = parser.parse_args(arguments)
    try:
        scores = evaluate(_lines(given.predictions), _lines(given.annotations), PROTOCOLS[given.protocol])
    except (OSError, ValueError) as error:
        print(f"moments: {error}", file=sys.stderr)
        return 78
    print(f"protocol: {given.protocol}")
    for name, value in scores.items():
        print(f"{name:<24} {value:8.2f}")
    return 0


def _by_query(predictions: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict[Any, Mapping]:
    known = [one["qid"] for one in annotations]
    asked = [one["qid"] for one in predictions]
    if not known or len(set(known)) < len(known) or len(set(asked)) < len(asked):
        raise ValueError("there must be annotations, and each qid may stand once in each file.")
    unknown = sorted(set(asked) - set(known), key=str)
    if unknown:
        raise ValueError(f"{len(unknown)} predictions have a qid that no annotation has, such as {unknown[0]}.")
    return {one["qid"]: one for one in predictions}


def _spans(prediction: Mapping[str, Any], protocol: Protocol) -> np.ndarray:
    """Return the predicted spans [P, 3] that count, best first."""
    spans = np.asarray(prediction.get("pred_relevant_windows", []), dtype=float)
    if spans.size and (spans.ndim != 2 or spans.shape[1] != 3 or not np.isfinite(spans).all()):
        raise ValueError(f"qid {prediction['qid']}: pred_relevant_windows must hold [start, end, score] each, finite.")
    spans = spans.reshape(-1, 3)
    if protocol.by_score:
        spans = spans[np.argsort(-spans[:, 2], kind="stable")]
    return spans[:MAX_SPANS]


def _best_iou(spans: np.ndarray, right: np.ndarray) -> float:
    return float(iou(spans[:, :2], right).max()) if len(spans) and len(right) else 0.0


def _mean_precision(suffix: str, spans: Mapping[Any, np.ndarray], right: Mapping[Any, np.ndarray]) -> dict[str, float]:
    ranked = {qid: own[np.argsort(-own[:, 2], kind="stable")] for qid, own in spans.items()}
    each = np.stack([span_precision(ranked[qid], own) for qid, own in right.items()]).mean(0)  # [I]
    scores = {f"mAP@{threshold}{suffix}": 100 * float(value) for threshold, value in zip(THRESHOLDS, each, strict=True)}
    return scores | {f"mAP{suffix}": 100 * float(each.mean())}


def _area(hits: np.ndarray, num_right: int) -> float:
    """Return the area under the interpolated curve, given how many right spans [P] the first places have found."""
    return _area_at(hits, np.arange(1, len(hits) + 1), num_right)


def _area_at(hits: np.ndarray, places: np.ndarray, num_right: int) -> float:
    """Return the area under interpolated precision over recall at the given places."""
    if not len(hits) or not num_right:
        return 0.0
    precision = np.maximum.accumulate((hits / places)[::-1])[::-1]  # the best from here on
    return float((np.diff(hits, prepend=0) * precision).sum() / num_right)


def _steps(right: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, at each different score from the highest on, how many right clips and how many clips score as high."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of ties
    return np.cumsum(right[order])[last].astype(float), last + 1


def _saliency(annotation: Mapping[str, Any]) -> np.ndarray:
    """Return the annotators' scores [C, A]; clips that are not listed have 0."""
    scores = np.zeros((int(annotation["duration"] / CLIP_S), NUM_ANNOTATORS))
    scores[np.asarray(annotation["relevant_clip_ids"], dtype=int)] = np.asarray(annotation["saliency_scores"])
    return scores


def _predicted(prediction: Mapping[str, Any], annotation: Mapping[str, Any], protocol: Protocol) -> np.ndarray | None:
    """Return the predicted saliency [C] of a query; None where there is no prediction."""
    if "pred_saliency_scores" not in prediction:
        return None
    num_clips = int(annotation["duration"] / CLIP_S)
    given = np.asarray(prediction["pred_saliency_scores"], dtype=float)
    if len(given) != num_clips and not protocol.any_length:
        raise ValueError(
            f"qid {annotation['qid']}: {len(given)} saliency scores for {num_clips} clips of {CLIP_S} s; give one "
            "each, or use --protocol qvhighlights, which cuts and fills."
        )
    return np.pad(given[:num_clips], (0, max(0, num_clips - len(given))))


def _lines(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
