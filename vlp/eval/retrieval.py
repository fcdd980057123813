"""Find the video of a caption, and the captions of a video, among all clips of a split.

Axes: V videos, Q captions, E embedding.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vlp import dist
from vlp.eval import metrics
from vlp.eval.runner import EvalData, Scorer, collect, with_texts
from vlp.forward import ForwardPass
from vlp.types import Batch

Part = tuple[Tensor, Tensor]  # sample ids [N] int64, embeddings [N, E] float32


class Retrieval:
    """Recall, median and mean rank by the dot product of unit vectors, with dual softmax in columns of its own.

    A clip may have several captions: each is a query for its video; as an answer to a video the best of them counts.

    Args:
        num_examples: captions to show with what they found. num_results: clips to show for each.
    """

    title = "Text-video retrieval"
    needs: ClassVar = ("video_embed", "text_embed", "logit_scale")

    def __init__(self, *, num_examples: int = 6, num_results: int = 5) -> None:
        self.num_examples, self.num_results = num_examples, num_results

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.scale = data, 1.0
        self.videos: list[Part] = []
        self.texts: list[Part] = []  # the captions of one clip in their order

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
        captions = [self.data.meta(sample)["captions"] if valid else [] for sample, valid in rows]
        video = forward.take("video_embed")  # [B, E]
        self.scale = float(forward.take("logit_scale"))
        self.videos.append(_part(batch.sample_id, video, batch.valid))
        longest = torch.tensor(max(map(len, captions)), device=video.device)
        for number in range(int(dist.max_over_ranks(longest))):  # all ranks encode the same number of texts
            texts = [own[number] if number < len(own) else "" for own in captions]
            here = with_texts(forward, self.data, texts) if number else forward
            exists = torch.tensor([number < len(own) for own in captions])  # [B]
            self.texts.append(_part(batch.sample_id, here.take("text_embed"), exists))

    def finish(self) -> dict:
        parts = collect((self.videos, self.texts))
        videos = [part for rank_videos, _ in parts for part in rank_videos]
        texts = [part for _, rank_texts in parts for part in rank_texts]
        if not sum(len(ids) for ids, _ in videos):
            return {"title": self.title, "rows": [], "examples": []}
        video_ids, video = _in_order(videos)  # [V], [V, E]
        owner_ids, text = _in_order(texts)  # [Q], [Q, E]
        owner = torch.searchsorted(video_ids, owner_ids)
        similarity = metrics.similarity(text, video)  # [Q, V]
        return {
            "title": self.title,
            "rows": _rows(similarity, owner, self.scale),
            "examples": self._examples(similarity, owner, video_ids),
        }

    def _examples(self, similarity: Tensor, owner: Tensor, video_ids: Tensor) -> list[dict]:
        ranks = metrics.ranks(similarity, owner)
        first = torch.searchsorted(owner, owner)  # [Q], the query of the same video's first caption
        examples = []
        for query in metrics.mixed_sample(ranks == 1, self.num_examples):
            own = int(owner[query])
            captions = self.data.meta(int(video_ids[own]))["captions"]
            found = similarity[query].argsort(descending=True, stable=True)[: self.num_results].tolist()
            results = [self._result(int(video_ids[v]), similarity[query, v], correct=v == own) for v in found]
            caption = captions[query - int(first[query])]
            examples.append({"kind": "retrieval", "query": caption, "rank": int(ranks[query]), "results": results})
        return examples

    def _result(self, sample: int, score: Tensor, *, correct: bool) -> dict:
        caption = self.data.meta(sample)["captions"][0]
        about = {"key": self.data.key_of(sample), "caption": caption, "score": metrics.shown(score)}
        return {**about, "correct": correct, "strip": sample}


def _part(sample_ids: Tensor, embed: Tensor, keep: Tensor) -> Part:
    return sample_ids[keep], embed.float().cpu()[keep]


def _in_order(parts: list[Part]) -> Part:
    """Join parts and sort them by sample id; stable, so that one clip's captions keep their order."""
    ids, embed = (torch.cat(column) for column in zip(*parts, strict=True))
    order = ids.argsort(stable=True)
    return ids[order], embed[order]


def _rows(similarity: Tensor, owner: Tensor, scale: float) -> list[dict]:
    """Return the table for similarity [Q, V] of captions and videos; `owner` [Q] is the video of each caption."""
    num_videos = similarity.shape[1]
    itself = torch.arange(num_videos)
    raw, dual = similarity, metrics.dual_softmax(similarity, scale)
    rows = _direction("text-to-video", "t2v", metrics.ranks(raw, owner), metrics.ranks(dual, owner), num_videos)
    raw, dual = (
        metrics.ranks(metrics.group_max(scores, owner, num_videos), itself)
        for scores in (similarity.T, metrics.dual_softmax(similarity.T, scale))
    )
    return rows + _direction("video-to-text", "v2t", raw, dual, num_videos)


def _direction(name: str, key: str, raw: Tensor, dual: Tensor, num_videos: int) -> list[dict]:
    rows = [
        metrics.row(
            f"{name} R@{k}",
            f"{key}_r{k}",
            raw=metrics.recall(raw, k),
            dual_softmax=metrics.recall(dual, k),
            chance=metrics.chance_recall(k, num_videos),
            num=len(raw),
        )
        for k in (1, 5, 10)
    ]
    for word, rank in (("median", metrics.median_rank), ("mean", metrics.mean_rank)):
        rows.append(
            metrics.row(
                f"{name} {word} rank",
                f"{key}_{word}_rank",
                raw=rank(raw),
                dual_softmax=rank(dual),
                chance=metrics.chance_rank(num_videos),
                num=len(raw),
                unit="",
                higher_is_better=False,
            )
        )
    return rows
