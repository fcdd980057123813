"""Find the video of a caption, and the captions of a video, among all clips of a split.

    embeddings of all clips and captions --ranking, in chunks--> ranks, raw and by dual softmax, in columns of their own
      |                              |--matching head, on the best few--> ranks after re-ranking, in rows of their own
      +--> a .safetensors file, from which `vlp.eval.stored` makes the same table again

Axes: V videos, Q captions, E embedding, B pairs of a forward pass, K best candidates.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlp import dist
from vlp.eval import metrics, ranking
from vlp.eval.every_caption import of_every_caption
from vlp.eval.pairs import Pairs
from vlp.eval.ranking import Search
from vlp.eval.runner import EvalData, Scorer, collect, everyone, with_texts
from vlp.eval.scores import Each
from vlp.forward import ForwardPass
from vlp.types import Batch

Part = tuple[Tensor, Tensor]  # sample ids [N] int64, embeddings [N, E] float32


class Retrieval:
    """Recall, median and mean rank by the dot product of unit vectors, with dual softmax in columns of its own.

    A clip may have several captions: each is a query for its video; as an answer to a video the best of them counts.

    Args:
        max_captions: of a clip, the first ones; null takes all.
        every_caption: rank each caption of a video by itself as well, in rows of their own: how many of a video's
            captions are found, its best and its worst one. Source: arXiv:2408.07249 (hit ratio, best, worst).
        rerank: how many videos of each caption the matching head puts in order again; 0 for none.
        store: keep all embeddings beside the scores.
        num_examples: captions to show with what they found. num_results: clips to show for each.
    """

    title = "Text-video retrieval"

    def __init__(
        self,
        *,
        max_captions: int | None = None,
        every_caption: bool = False,
        rerank: int = 0,
        store: bool = False,
        num_examples: int = 6,
        num_results: int = 5,
    ) -> None:
        if (max_captions is not None and max_captions < 1) or rerank < 0:
            raise ValueError(f"max_captions={max_captions} must be at least 1 or null, rerank={rerank} at least 0.")
        self.max_captions, self.rerank, self.store = max_captions, rerank, store
        self.num_examples, self.num_results, self.every_caption = num_examples, num_results, every_caption
        extra = ("fused_text",) if rerank else ()
        self.borrows: tuple[str, ...] = ("matching",) if rerank else ()
        self.needs: tuple[str, ...] = ("video_embed", "text_embed", "logit_scale", *extra)

    def protocol(self) -> dict[str, Any]:
        chosen = "all" if self.max_captions is None else f"first {self.max_captions}"
        after = f"first {self.rerank} by matching, in rows of their own" if self.rerank else "none"
        return {"captions": chosen, "ties": "lost", "post_processing": f"{after}; dual softmax in columns of its own"}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data, self.scale = data, 1.0
        self.pairs = (
            Pairs(data, lambda forward: scorers["matching"](forward.take("fused_text"))) if self.rerank else None
        )
        self.videos: list[Part] = []
        self.texts: list[Part] = []  # the captions of one clip in their order

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
        captions = [self._captions(sample) if valid else [] for sample, valid in rows]
        video = forward.take("video_embed")  # [B, E]
        self.scale = float(forward.take("logit_scale"))
        self.videos.append(_part(batch.sample_id, video, batch.valid))
        longest = torch.tensor(max(map(len, captions)), device=video.device)
        for number in range(int(dist.max_over_ranks(longest))):  # all ranks encode the same number of texts
            texts = [own[number] if number < len(own) else "" for own in captions]
            here = with_texts(forward, self.data, texts) if number else forward
            exists = torch.tensor([number < len(own) for own in captions])  # [B]
            self.texts.append(_part(batch.sample_id, here.take("text_embed"), exists))
        if self.pairs is not None:
            self.pairs.keep(batch, forward, batch.valid.nonzero()[:, 0].tolist())

    def finish(self) -> dict:
        parts = (everyone if self.rerank else collect)((self.videos, self.texts))  # all ranks re-rank
        videos = [part for rank_videos, _ in parts for part in rank_videos]
        texts = [part for _, rank_texts in parts for part in rank_texts]
        if not sum(len(ids) for ids, _ in videos):
            return {"title": self.title, "rows": [], "examples": []}
        video_ids, video = _in_order(videos)  # [V], [V, E]
        owner_ids, text = _in_order(texts)  # [Q], [Q, E]
        owner = torch.searchsorted(video_ids, owner_ids)
        found = Embedded(video, text, owner, video_ids, self.scale)
        reranked = self._reranked(found) if self.rerank else []
        if dist.rank():
            return {"title": self.title, "rows": [], "examples": []}
        if self.store and self.data.embeddings is not None:
            save(found, self.data)
        scored = table(found)
        if self.every_caption:
            scored.add(*of_every_caption(found.video, found.text, found.owner, found.video_ids))
        for name, key, ranks in reranked:
            scored.add(direction(name, key, ranks, None, len(video)), _each_of_captions(found, key, ranks))
        examples = self._examples(found, scored.ranks)
        return {"title": self.title, "rows": scored.rows, "each": scored.each, "examples": examples}

    def _captions(self, sample: int) -> list[str]:
        return self.data.meta(sample)["captions"][: self.max_captions]

    def _reranked(self, found: "Embedded") -> list[tuple[str, str, Tensor]]:
        """Return text-to-video ranks after the matching head has ordered each caption's best videos again."""
        places, _ = ranking.best(found.text, found.video, self.rerank)  # [Q, K]
        scores = torch.stack([self._matched(found, column) for column in places.unbind(1)], dim=1)  # [Q, K]
        raw = ranking.ranks(found.of_text())
        right = places == found.owner[:, None]
        own = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        after = (~(own > scores)).sum(1)
        ranks = torch.where(right.any(1), after, raw.clamp(min=places.shape[1] + 1))
        return [(f"text-to-video, best {self.rerank} by matching,", "t2v_rerank", ranks)]

    def _matched(self, found: "Embedded", videos: Tensor) -> Tensor:
        """Return the logit [Q] that caption q belongs to the video `videos`[q]; the ranks share the work."""
        assert self.pairs is not None
        texts = [found.caption(self.data, query) for query in range(len(videos))]
        return self.pairs.scores(texts, found.video_ids[videos].tolist())

    def _examples(self, found: "Embedded", ranks: Tensor) -> list[dict]:
        first = torch.searchsorted(found.owner, found.owner)  # [Q], the query of the same video's first caption
        examples = []
        for query in metrics.mixed_sample(ranks == 1, self.num_examples):
            own = int(found.owner[query])
            similarity = metrics.similarity(found.text[query : query + 1], found.video)[0]  # [V]
            nearest = similarity.argsort(descending=True, stable=True)[: self.num_results].tolist()
            results = [self._result(int(found.video_ids[v]), similarity[v], correct=v == own) for v in nearest]
            caption = self.data.meta(int(found.video_ids[own]))["captions"][query - int(first[query])]
            examples.append({"kind": "retrieval", "query": caption, "rank": int(ranks[query]), "results": results})
        return examples

    def _result(self, sample: int, score: Tensor, *, correct: bool) -> dict:
        caption = self.data.meta(sample)["captions"][0]
        about = {"key": self.data.key_of(sample), "caption": caption, "score": metrics.shown(score)}
        return {**about, "correct": correct, "strip": sample}


class Embedded(NamedTuple):
    """All clips and captions of a split in the shared space."""

    video: Tensor  # [V, E]
    text: Tensor  # [Q, E], the captions of a video beside each other
    owner: Tensor  # [Q] int64, the row of the caption's video
    video_ids: Tensor  # [V] int64, sample ids, ascending
    scale: float  # 1 / temperature

    def of_text(self) -> Search:
        """Return the search of captions for their videos."""
        return Search(self.text, self.video, torch.arange(len(self.video)), self.owner)

    def of_video(self) -> Search:
        """Return the search of videos for their captions."""
        return Search(self.video, self.text, self.owner, torch.arange(len(self.video)))

    def caption(self, data: EvalData, query: int) -> str:
        """Return the text of a caption."""
        own = self.owner[query]
        return data.meta(int(self.video_ids[own]))["captions"][query - int(torch.searchsorted(self.owner, own))]


class Table:
    """The rows of both directions, what each item contributed, and the text-to-video ranks."""

    def __init__(self, ranks: Tensor) -> None:
        self.rows: list[dict] = []
        self.each: dict[str, Each] = {}
        self.ranks = ranks

    def add(self, rows: list[dict], each: Iterator[tuple[str, Each]]) -> None:
        """Add rows and their items."""
        self.rows += rows
        self.each |= dict(each)


def table(found: Embedded) -> Table:
    """Return the scores of embeddings, by the dot product and, beside it, by dual softmax."""
    num_videos, scale = len(found.video), found.scale
    raw = ranking.ranks(found.of_text())
    scored = Table(raw)
    dual = ranking.dual_softmax_ranks(found.of_text(), scale)
    scored.add(direction("text-to-video", "t2v", raw, dual, num_videos), _each_of_captions(found, "t2v", raw))
    raw, dual = ranking.ranks(found.of_video()), ranking.dual_softmax_ranks(found.of_video(), scale)
    each = each_of("v2t", found.video_ids.tolist(), [0] * num_videos, raw)
    scored.add(direction("video-to-text", "v2t", raw, dual, num_videos), each)
    return scored


def save(found: Embedded, data: EvalData) -> None:
    """Write the embeddings and the protocol under which they were made."""
    assert data.embeddings is not None
    data.embeddings.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(found, name).contiguous() for name in ("video", "text", "owner", "video_ids")}
    save_file(tensors | {"scale": torch.tensor(found.scale, dtype=torch.float64)}, data.embeddings)


def _part(sample_ids: Tensor, embed: Tensor, keep: Tensor) -> Part:
    return sample_ids[keep], embed.float().cpu()[keep]


def _in_order(parts: list[Part]) -> Part:
    """Join parts and sort them by sample id; stable, so that one clip's captions keep their order."""
    ids, embed = (torch.cat(column) for column in zip(*parts, strict=True))
    order = ids.argsort(stable=True)
    return ids[order], embed[order]


def _each_of_captions(found: Embedded, key: str, ranks: Tensor) -> Iterator[tuple[str, Each]]:
    first = torch.searchsorted(found.owner, found.owner)
    numbers = (torch.arange(len(found.owner)) - first).tolist()
    return each_of(key, found.video_ids[found.owner].tolist(), numbers, ranks)


def each_of(key: str, clips: list[int], numbers: list[int], ranks: Tensor) -> Iterator[tuple[str, Each]]:
    """Yield what each item, number `numbers` of clip `clips`, contributes to the rows of `direction`."""
    for k in (1, 5, 10):
        yield f"{key}_r{k}", Each(clips, numbers, (100.0 * (ranks <= k)).tolist())
    for statistic in ("median", "mean"):
        yield f"{key}_{statistic}_rank", Each(clips, numbers, ranks.double().tolist(), statistic)


def direction(name: str, key: str, raw: Tensor, dual: Tensor | None, num_videos: int) -> list[dict]:
    """Return the rows of one direction from its ranks [Q], raw and, if there are any, by dual softmax."""
    rows = [
        metrics.row(
            f"{name} R@{k}",
            f"{key}_r{k}",
            raw=metrics.recall(raw, k),
            dual_softmax=None if dual is None else metrics.recall(dual, k),
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
                dual_softmax=None if dual is None else rank(dual),
                chance=metrics.chance_rank(num_videos),
                num=len(raw),
                unit="",
                higher_is_better=False,
            )
        )
    return rows
