"""The search of videos for their captions where each caption counts, and not the best of a video alone.

All captions of all videos are candidates, the video's other ones too. Items are videos: the share of its captions that
are among the first k ("every"), whether one of them is ("best"), whether all are ("worst"), its mean and median rank.

Source: arXiv:2408.07249 (hit ratio, best, worst), with ties lost.
Axes: V videos, Q captions, E embedding.
"""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from vlp.eval import metrics, ranking
from vlp.eval.scores import Each

_PLACES = (1, 5, 10)
_WORDS = {"every": "each caption", "best": "its best caption", "worst": "its worst caption"}


def of_every_caption(
    video: Tensor, text: Tensor, owner: Tensor, video_ids: Tensor
) -> tuple[list[dict], Iterator[tuple[str, Each]]]:
    """Return rows, and items by row, of videos [V, E] and captions [Q, E]; `owner` [Q] is a caption's video."""
    ranks = ranking.ranks_of_every(video, text, owner)
    own = [part.double() for part in ranks.split(torch.bincount(owner, minlength=len(video)).tolist())]  # of each video
    clips, rows, each = video_ids.tolist(), [], {}
    for k in _PLACES:
        hits = [rank <= k for rank in own]
        one, whole = metrics.chance_several(k, [len(rank) for rank in own], len(ranks))
        for which, chance, values in (
            ("every", metrics.chance_recall(k, len(ranks)), [100 * float(hit.double().mean()) for hit in hits]),
            ("best", one, [100.0 * bool(hit.any()) for hit in hits]),
            ("worst", whole, [100.0 * bool(hit.all()) for hit in hits]),
        ):
            key, name = f"v2t_{which}_r{k}", f"video-to-text, {_WORDS[which]}, R@{k}"
            rows.append(metrics.row(name, key, raw=statistics.fmean(values), chance=chance, num=len(values)))
            each[key] = Each(clips, [0] * len(clips), values)
    for statistic, middle in (("mean", statistics.fmean), ("median", statistics.median)):
        key, name = f"v2t_every_{statistic}_rank", f"video-to-text, each caption, {statistic} rank"
        values = [float(middle(rank.tolist())) for rank in own]
        options = {"chance": metrics.chance_rank(len(ranks)), "unit": "", "higher_is_better": False}
        rows.append(metrics.row(name, key, raw=float(middle(values)), num=len(values), **options))
        each[key] = Each(clips, [0] * len(clips), values, statistic)
    return rows, iter(each.items())
