"""Ranks of retrieval in chunks: exact, without the matrix of all similarities.

    queries, candidates --blocks in float32--> surely better | surely worse | too near to tell
                                                                              |--> again in float64, pair by pair

A rank is 1 + strictly better groups + tied groups (see `vlp.eval.metrics.ranks`). A group is what counts as one answer:
a video of its own, or all captions of a video, of which the best counts.

Axes: Q queries, C candidates, E embedding, N pairs, M queries and K candidates of a block.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES, CANDIDATES = 2048, 8192  # of a block: 64 MiB in float32
_PAIRS = 1 << 18  # pairs in float64 at once
_MANY = 1 / 16  # share of a block that is near: it is computed as a whole


class Search(NamedTuple):
    """Queries, what they are searched in, and what is right for each."""

    queries: Tensor  # [Q, E]
    candidates: Tensor  # [C, E], those of a group beside each other
    group: Tensor  # [C] int64, not decreasing, from 0
    right: Tensor  # [Q] int64, the group of each query


def ranks(search: Search) -> Tensor:
    """Return the rank [Q] int64, from 1, of each query's group by the dot product."""
    search = _plain(search)
    own = _own(search, lambda rows, columns: _dots(search, rows, columns))  # [Q] float32
    found = torch.zeros(len(own), dtype=torch.int64)
    for rows, columns in _blocks(search):
        near, above = _compared(search, rows, columns, own[rows])
        found[rows] += _groups_hit(above | near, search.group[columns])
    return found


def ranks_of_every(video: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """Return the rank [Q] of each caption among all captions, in the search of its own video [V, E], `owner` [Q].

    The other captions of the video are candidates like any.
    """
    every = torch.arange(len(text))
    return ranks(Search(video[owner], text, every, every))


def dual_softmax_ranks(search: Search, scale: float) -> Tensor:
    """Return ranks [Q] int64 by similarity times its softmax over the queries; see `vlp.eval.metrics.dual_softmax`."""
    search = _plain(search)
    total = torch.full((len(search.candidates),), -torch.inf, dtype=torch.float64)  # [C] log of the sum of exp
    for rows, columns in _blocks(search):
        block = torch.logsumexp(_block(search, rows, columns) * scale, dim=0)
        total[columns] = torch.logaddexp(total[columns], block)

    def dual(similarity: Tensor, columns: Tensor | slice) -> Tensor:
        return similarity * (similarity * scale - total[columns]).exp()

    own = _own(search, lambda rows, columns: dual(_dots(search, rows, columns).double(), columns))
    found = torch.zeros(len(own), dtype=torch.int64)
    for rows, columns in _blocks(search):
        scores = dual(_block(search, rows, columns), columns)
        found[rows] += _groups_hit(~(own[rows, None] > scores), search.group[columns])
    return found


def best(queries: Tensor, candidates: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return places and scores [Q, num] of the best candidates, best first; of equal ones the first."""
    num = min(num, len(candidates))
    every = torch.zeros(len(candidates), dtype=torch.int64)
    search = Search(queries.float(), candidates.float(), every, torch.zeros(len(queries), dtype=torch.int64))
    scores = torch.full((len(queries), num), -torch.inf)
    places = torch.zeros(len(queries), num, dtype=torch.int64)
    for rows, columns in _blocks(search, whole_groups=False):
        block = _block(search, rows, columns).float().nan_to_num(nan=-torch.inf)
        block, here = block.topk(min(num, block.shape[1]), dim=1)
        both = torch.cat([scores[rows], block], 1), torch.cat([places[rows], here + columns.start], 1)
        order = both[1].argsort(dim=1, stable=True)
        both = tuple(x.gather(1, order) for x in both)
        order = both[0].argsort(dim=1, descending=True, stable=True)[:, :num]
        scores[rows], places[rows] = (x.gather(1, order) for x in both)
    return places, scores


def _plain(search: Search) -> Search:
    assert bool((search.group[1:] >= search.group[:-1]).all()), "candidates of a group stand beside each other"
    queries, candidates = (x.detach().cpu().float() for x in search[:2])
    return Search(queries, candidates, search.group.cpu(), search.right.cpu())


def _blocks(search: Search, *, whole_groups: bool = True) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of the matrix; a group is never cut in two."""
    ends = [*range(CANDIDATES, len(search.candidates), CANDIDATES), len(search.candidates)]
    if whole_groups:
        starts = torch.searchsorted(search.group, search.group[[end - 1 for end in ends]])
        ends = sorted({int(start) for start in starts if start} | {len(search.candidates)})
    for first in range(0, len(search.queries), QUERIES):
        start = 0
        for end in ends:
            yield slice(first, min(first + QUERIES, len(search.queries))), slice(start, end)
            start = end


def _dots(search: Search, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the similarity [N] float32 of pairs, summed in float64: equal candidates tie exactly."""
    parts = [
        (search.queries[rows[part]].double() * search.candidates[columns[part]].double()).sum(1).float()
        for part in (slice(start, start + _PAIRS) for start in range(0, len(rows), _PAIRS))
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _block(search: Search, rows: slice, columns: slice) -> Tensor:
    """Return the similarities [M, K] of a block, rounded to float32, as float64."""
    return (search.queries[rows].double() @ search.candidates[columns].double().T).float().double()


def _own(search: Search, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return [Q]: the best score of each query's own group."""
    first = torch.searchsorted(search.group, search.right)
    sizes = torch.searchsorted(search.group, search.right, right=True) - first  # [Q]
    assert bool((sizes > 0).all()), "every query has a group to be found"
    rows = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # [N]
    columns = torch.arange(len(rows)) + torch.repeat_interleave(first - (sizes.cumsum(0) - sizes), sizes)
    scores = score(rows, columns)
    own = scores.new_full((len(sizes),), -torch.inf)
    return own.scatter_reduce(0, rows, scores, "amax")


def _compared(search: Search, rows: slice, columns: slice, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return two [M, K] bool: not below `own` [M] though near to it, and surely above it.

    The margin bounds the error of a float32 dot product, whatever the order of its sum.
    """
    queries, candidates = search.queries[rows], search.candidates[columns]
    similarity = queries @ candidates.T  # [M, K]
    margin = (queries.shape[1] + 2) * 2.0**-23 * queries.norm(dim=1) * candidates.norm(dim=1).max()
    above = similarity > (own + margin)[:, None]
    near = ~(similarity < (own - margin)[:, None]) & ~above  # numbers that are none as well
    if near.count_nonzero() > _MANY * near.numel():
        return near & ~(own[:, None] > _block(search, rows, columns).float()), above
    places = near.nonzero()
    exact = _dots(search, places[:, 0] + rows.start, places[:, 1] + columns.start)
    near[places[:, 0], places[:, 1]] = ~(own[places[:, 0]] > exact)
    return near, above


def _groups_hit(hit: Tensor, group: Tensor) -> Tensor:
    """Return [M]: how many groups have a hit in `hit` [M, K]; `group` [K] is theirs."""
    local = group - group[0]
    num_groups = int(local[-1]) + 1
    if num_groups == len(group):
        return hit.sum(1)
    found = torch.zeros(len(hit), num_groups, dtype=torch.uint8)
    return found.scatter_reduce(1, local.expand_as(hit), hit.to(torch.uint8), "amax").sum(1)
