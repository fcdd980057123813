"""The numbers of an evaluation, as pure functions.

Axes: Q queries, C candidates, E embedding, G groups of candidates, N results.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def similarity(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the dot products [Q, C] float32 of embeddings [Q, E] and [C, E].

    Summed in float64 and rounded, so that equal candidates tie exactly: the order of a sum can depend on the column.
    """
    return (queries.double() @ candidates.double().T).float()


def ranks(similarity: Tensor, positive: Tensor) -> Tensor:
    """Return the rank [Q] int64, from 1, of candidate `positive` [Q] int64 in each row of `similarity` [Q, C].

    rank = 1 + strictly better others + tied others, so that a model that cannot tell candidates apart does not look
    right; a score that is not a number counts as better.
    """
    own = similarity.gather(1, positive[:, None])  # [Q, 1]
    return similarity.shape[1] - (own > similarity).sum(1)  # the positive does not beat itself, hence rank 1 at best


def group_max(similarity: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Return [Q, G]: the best score of each group; `group` [C] int64 tells where each candidate of [Q, C] belongs."""
    best = similarity.new_full((len(similarity), num_groups), -torch.inf)
    return best.scatter_reduce(1, group.expand_as(similarity), similarity, "amax")


def dual_softmax(similarity: Tensor, scale: float) -> Tensor:
    """Return similarity [Q, C] times its softmax over the queries, float64.

    A transductive score: it looks at all queries at once, so it must stand apart from scores that see one query.
    Source: arXiv:2109.04290, eq. 7. Float64, because exp(-2 * scale) is zero in float32.
    """
    similarity = similarity.double()
    return similarity * (similarity * scale).softmax(0)


def recall(ranks: Tensor, k: int) -> float:
    """Return the share of `ranks` [Q] that are at most k, in percent."""
    return share(ranks <= k)


def share(correct: Tensor) -> float:
    """Return how much of `correct` [N] bool is True, in percent."""
    return 100 * int(correct.sum()) / len(correct)


def median_rank(ranks: Tensor) -> float:
    """Return the median of `ranks` [Q]; the mean of the middle two if Q is even."""
    return float(statistics.median(ranks.tolist()))


def mean_rank(ranks: Tensor) -> float:
    """Return the mean of `ranks` [Q]."""
    return int(ranks.sum()) / len(ranks)


def chance_recall(k: int, num_candidates: int) -> float:
    """Return the recall at k, in percent, of guessing among `num_candidates`."""
    return 100 * min(k, num_candidates) / num_candidates


def chance_rank(num_candidates: int) -> float:
    """Return the mean, and the median, rank of guessing among `num_candidates`."""
    return (num_candidates + 1) / 2


def chance_several(k: int, sizes: Sequence[int], num_candidates: int) -> tuple[float, float]:
    """Return the shares, in percent, in which guessing puts one, and all, of a query's answers among the first k.

    `sizes` tells how many of the `num_candidates` are right for each query.
    """
    total = math.comb(num_candidates, k) if k < num_candidates else 1
    none = [math.comb(num_candidates - size, k) / total if k < num_candidates else 0.0 for size in sizes]
    every = [math.comb(k, size) / math.comb(num_candidates, size) if k < num_candidates else 1.0 for size in sizes]
    return 100 * (1 - sum(none) / len(none)), 100 * sum(every) / len(every)


def mixed_sample(correct: Tensor, num: int) -> list[int]:
    """Return up to `num` places of `correct` [N] bool, ascending: half True, half False as far as there are enough."""
    right, wrong = correct.nonzero()[:, 0].tolist(), (~correct).nonzero()[:, 0].tolist()
    num_wrong = min(len(wrong), max(num // 2, num - len(right)))
    return sorted([*_spaced(wrong, num_wrong), *_spaced(right, min(len(right), num - num_wrong))])


def row(
    metric: str,
    key: str,
    *,
    raw: float,
    num: int,
    chance: float | None,
    dual_softmax: float | None = None,
    unit: str = "%",
    higher_is_better: bool = True,
) -> dict:
    """Return one line of a task's table for the JSON file; `num` is the number of things that `raw` averages."""
    columns = {"raw": raw} if dual_softmax is None else {"raw": raw, "dual_softmax": dual_softmax}
    rest = {"chance": chance, "num": num, "unit": unit, "higher_is_better": higher_is_better}
    return {"metric": metric, "key": key, **columns, **rest}


def shown(score: Tensor | float) -> float | None:
    """Round a score for an example; None if it is not a number, which JSON cannot say."""
    return round(float(score), 4) if math.isfinite(float(score)) else None


def _spaced(places: list[int], num: int) -> list[int]:
    return [places[index * len(places) // num] for index in range(num)]
