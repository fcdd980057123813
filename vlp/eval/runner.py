"""Runs all tasks of an evaluation over one split, on one forward pass a batch, and writes step-NNNNNN.SOURCE.json.

    batches of this rank --filled to one shape--> ForwardPass --> task.update, each task     all ranks alike
    task.finish --rows, examples--> film strips --> JSON                                     rank 0, shared with all

The scores do not depend on the number of processes: every clip is computed in a batch of the same shape (the last bits
of a matrix product depend on the shape), and tasks bring results together in the order of `sample_id`.

Axes: B clips, N texts, L text length.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import dist
from vlp.eval import scores, strips
from vlp.forward import ForwardPass, Graph
from vlp.types import Batch, Reason, Tokens

Scorer = Callable[[Tokens], Tensor]  # fused tokens [B, L, D] -> logit [B] that text and video belong together


class StoppedError(Exception):
    """A rank wished to stop; the evaluation left nothing behind."""


class StorageLostError(StoppedError):
    """A rank got no more clips, because their storage was away for too long; the same message on all ranks."""


class EvalData(NamedTuple):
    """One split of one source, and how its texts are read and written."""

    source: str
    split: str
    trained_on_these: bool
    batches: Callable[[], Iterable[Batch]]  # this rank's share: each clip once over all ranks, with its first caption
    meta: Callable[[int], dict]  # sample id -> {"captions": [...], "hard_negative": ..., ...}
    key_of: Callable[[int], str]  # sample id -> key
    encode: Callable[[list[str]], tuple[Tensor, Tensor, Tensor]]  # -> ids int64, mask bool, word_ids int64, all [N, L]
    decode: Callable[[Tensor], list[str]]  # ids [N, L] -> N texts
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int | None
    max_length: int  # tokens of a text, the first and the last one included
    num_clips: int  # of the split, over all ranks, unusable ones included
    batch_size: int  # clips a forward pass on one rank; shorter batches are filled up
    is_stopping: Callable[[], Any] = lambda: None  # asked before each batch; if any rank says so, all stop
    num_frames: int | None = None  # of a clip; batches of shorter ones are filled up
    card: Mapping[str, Mapping[str, Any]] = {}  # "protocol" and "subject", see vlp.eval.scores
    embeddings: Path | None = None  # where retrieval stores its embeddings


class Task(Protocol):
    """What an evaluation measures; built from config by keyword-only plain values."""

    title: str
    needs: tuple[str, ...]  # node names that it takes
    borrows: tuple[str, ...]  # scorers that it cannot do without

    def protocol(self) -> dict[str, Any]:
        """Return what of this task another score must share to be compared: prompts, decoding, post-processing."""
        ...

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        """Forget what was measured before."""
        ...

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        """Measure one batch, given on the CPU; only rows with `valid` count.

        It may start collectives, because all ranks make the same number of updates.
        """
        ...

    def finish(self) -> dict:
        """Return {"title", "rows", "examples"}, and "each" (row key -> Each) where rows are made of items.

        Called on all ranks, and rank 0's answer counts.
        """
        ...


def evaluate(
    model: nn.Module,
    graph: Graph,
    tasks: Mapping[str, Task],
    data: EvalData,
    *,
    step: int,
    out_dir: Path,
    device: torch.device | str,
    scorers: Mapping[str, Scorer] = {},
) -> dict:
    """Return, on all ranks, the result that rank 0 has written to out_dir/step-NNNNNN.SOURCE.json.

    Args:
        model: all ranks' model, which is left in the mode in which it was found.
        tasks: name -> task. step: of the training. out_dir: "eval" inside the run's directory.
        scorers: what objectives lend to the tasks, such as "matching".

    Raises:
        ValueError: the ranks' batches are not each clip of the split once, or a text is not its clip's first caption.
        StoppedError: on all ranks, when one of them wishes to stop; StorageLostError, when one gets no more clips.
    """
    data = data._replace(meta=cache(data.meta))
    pictures, seen = strips.Strips(), []
    with _evaluating(model), torch.no_grad():  # inference_mode breaks the next training step under ZeRO-3
        for task in tasks.values():
            task.begin(data, scorers=scorers)
        for batch in _in_step(data, device):
            batch = _with_whole_texts(batch, data)
            pictures.add(batch)
            seen += zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
            forward = _averaged(ForwardPass(model, Batch(*(x.to(device) for x in batch)), graph))
            for task in tasks.values():
                task.update(batch, forward)
        counts = _counts(seen, data)
        results = {name: task.finish() for name, task in tasks.items()}
    files = _recorded(results, tasks, data, counts)
    about = {"step": step, "source": data.source, "split": data.split, **counts}
    result = {
        **about,
        "trained_on_these": data.trained_on_these,
        "tasks": _illustrated(results, pictures, data, out_dir),
    }
    if dist.rank() == 0:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        strips.replace(out_dir / f"step-{step:06d}.{data.source}.json", text.encode())
        for name, found in files.items():
            scores.write(out_dir.parent / "scores" / f"step-{step:06d}.{data.source}.{name}.json", found)
    return everyone(result)[0]


def keep_up(is_stopping: Callable[[], Any], device: torch.device | str) -> None:
    """Meet the other ranks while this one waits for its next batch; to be called about once a second.

    Raises:
        StoppedError, StorageLostError: as `evaluate`.
    """
    _meet(_State(is_left=True, is_waiting=True), is_stopping, device)


def give_up(loss: str, device: torch.device | str) -> NoReturn:
    """Tell the other ranks that this one gets no more batches, and why; all of them raise StorageLostError."""
    _meet(_State(is_lost=True), lambda: None, device, loss=loss)
    raise AssertionError("the meeting raises")


def flat_scores(result: dict) -> dict[str, float]:
    """Return {"val/<source>/<key>": score} for logging; scores by dual softmax end in "_dsl".

    Raises:
        ValueError: two rows have the same key.
    """
    found: dict[str, float] = {}
    for name, task in result["tasks"].items():
        for row in task["rows"]:
            for column, suffix in (("raw", ""), ("dual_softmax", "_dsl")):
                key = f"val/{result['source']}/{row['key']}{suffix}"
                if key in found:
                    raise ValueError(
                        f"tasks.{name}: '{row['key']}' is also a row of another task; keep one of the two."
                    )
                if row.get(column) is not None:
                    found[key] = row[column]
    return found


def with_texts(forward: ForwardPass, data: EvalData, texts: list[str]) -> ForwardPass:
    """Return a pass over the same B clips with other texts [B]; the video is not computed again."""
    ids, mask, word_ids = (x.to(forward.fields["text_ids"].device) for x in data.encode(texts))
    return forward.with_fields(text_ids=ids, text_mask=mask, word_ids=word_ids)


def everyone(local: Any) -> list[Any]:
    """Return every rank's object, in rank order, on all ranks."""
    parts = [local] * dist.world_size()
    if len(parts) > 1:
        torch_dist.all_gather_object(parts, local)
    return parts


def collect(local: Any) -> list[Any]:
    """Return every rank's object, in rank order, on rank 0, and an empty list on the others."""
    if dist.world_size() == 1:
        return [local]
    parts = [None] * dist.world_size() if dist.rank() == 0 else None
    torch_dist.gather_object(local, parts)
    return parts or []


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; then each module gets its own mode back, for frozen parts stay in eval mode during training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _in_step(data: EvalData, device: torch.device | str) -> Iterator[Batch]:
    """Yield this rank's batches, all of data.batch_size, and empty ones while another rank still has some.

    A forward pass starts collectives where parameters are sharded, so all ranks must make the same number of them. They
    begin none before each of them has its batch: those that wait for storage keep up, and nothing times out.
    """
    batches, empty = iter(data.batches()), None
    while True:
        batch = next(batches, None)
        while (state := _meet(_State(is_left=batch is not None), data.is_stopping, device)).is_waiting:
            pass
        empty = empty or _empty_like_first(batch, data)
        if not state.is_left:
            return
        yield _filled(empty if batch is None else batch, data.batch_size)


class _State(NamedTuple):
    """What a rank says of itself before a batch; of all ranks, whether one of them says so."""

    is_left: bool = False  # there is a batch
    is_waiting: bool = False  # for one that may come
    is_stopping: bool = False
    is_lost: bool = False  # there is none because storage was away for too long


def _meet(state: _State, is_stopping: Callable[[], Any], device: torch.device | str, *, loss: str = "") -> _State:
    """Exchange states with all ranks, once. Raises StoppedError and StorageLostError on all of them."""
    mine = torch.tensor(state._replace(is_stopping=bool(is_stopping())), dtype=torch.long, device=device)
    state = _State(*map(bool, dist.max_over_ranks(mine).tolist()))
    if state.is_lost:
        raise StorageLostError(dist.first_text(loss, device))
    if state.is_stopping:
        raise StoppedError
    return state


def _empty_like_first(batch: Batch | None, data: EvalData) -> Batch:
    """Return one row without a clip, shaped like the first batch of any rank: this one may have no clip at all."""
    layouts = everyone(None if batch is None else [(x.shape[1:], x.dtype) for x in batch])
    layout = next((layout for layout in layouts if layout is not None), None)
    if layout is None:
        raise ValueError(f"{data.source}: split '{data.split}' has no clip; take this source out of the evaluation.")
    ones = Batch(*(torch.ones(1, *shape, dtype=dtype) for shape, dtype in layout))  # masks of ones: no NaN in attention
    return _without(ones, torch.tensor([True]))


def _filled(batch: Batch, num_rows: int) -> Batch:
    """Repeat the last row up to `num_rows`; the repetitions hold no clip."""
    num_clips = len(batch.valid)
    assert num_clips <= num_rows, f"a batch of {num_clips} clips, but EvalData.batch_size={num_rows}"
    places = torch.arange(num_rows)
    return _without(Batch(*(x[places.clamp(max=num_clips - 1)] for x in batch)), places >= num_clips)


def _without(batch: Batch, absent: Tensor) -> Batch:
    """Mark the rows `absent` [B] bool as padding."""
    return batch._replace(
        valid=batch.valid & ~absent,
        sample_id=batch.sample_id.masked_fill(absent, -1),
        status=batch.status.masked_fill(absent, Reason.PADDING),
    )


def _with_whole_texts(batch: Batch, data: EvalData) -> Batch:
    """Fill texts and frames up to the longest there may be: the last bits of a result depend on the shape of a batch.

    Tasks take the batch's text for the first caption, so a batch that carries another one is refused.

    Raises:
        ValueError: the text of a clip is not its first caption.
    """
    rows = zip(batch.sample_id.tolist(), batch.valid.tolist(), strict=True)
    ids, mask, word_ids = data.encode([data.meta(sample)["captions"][0] if ok else "" for sample, ok in rows])
    for row in batch.valid.nonzero()[:, 0].tolist():
        if not torch.equal(batch.text_ids[row][batch.text_mask[row]], ids[row][mask[row]]):
            raise ValueError(
                f"{data.source}: the text of clip '{data.key_of(int(batch.sample_id[row]))}' is not its first caption; "
                "EvalData.batches must carry meta['captions'][0]."
            )
    missing = (data.num_frames or batch.frames.shape[1]) - batch.frames.shape[1]
    return batch._replace(
        text_ids=ids,
        text_mask=mask,
        word_ids=word_ids,
        frames=F.pad(batch.frames, (0, 0, 0, 0, 0, 0, 0, missing)),
        frame_mask=F.pad(batch.frame_mask, (0, missing)),
        more_frames=F.pad(batch.more_frames, (0, 0, 0, 0, 0, 0, 0, missing)),
        more_frame_mask=F.pad(batch.more_frame_mask, (0, missing)),
        times_s=F.pad(batch.times_s, (0, missing)),
    )


def _averaged(forward: ForwardPass) -> ForwardPass:
    """Let `video_embed` be the mean over the views of each clip, where the batch brings several.

    It is no unit vector then: its dot product with a text is the mean of what the views score.
    """
    views = zip(forward.fields["more_frames"].unbind(1), forward.fields["more_frame_mask"].unbind(1), strict=True)
    passes = [forward.with_fields(frames=frames, frame_mask=mask) for frames, mask in views]
    if passes:
        embeds = [one.take("video_embed") for one in (forward, *passes)]
        forward.values[forward.graph.node("video_embed")] = torch.stack(embeds).mean(0)
    return forward


def _recorded(
    results: dict[str, dict], tasks: Mapping[str, Task], data: EvalData, counts: Mapping[str, int]
) -> dict[str, scores.ScoreFile]:
    """Put interval and protocol into each task's result; return its score file, by the name of the task."""
    files = {}
    for name, result in results.items():
        each: dict[str, scores.Each] = result.pop("each", {})
        for row in result["rows"]:
            if row["key"] in each:
                row["low"], row["high"] = scores.interval(each[row["key"]])
        about = {"task": type(tasks[name]).__name__, **counts, **tasks[name].protocol()}
        card = {"protocol": {**data.card.get("protocol", {}), **about}, "subject": dict(data.card.get("subject", {}))}
        result["protocol"] = card["protocol"]
        if result["rows"]:
            keys = {clip: data.key_of(clip) for one in each.values() for clip in one.clips}
            files[name] = scores.ScoreFile(card, result["rows"], each, keys)
    return files


def _counts(seen: list[tuple[int, bool]], data: EvalData) -> dict[str, int]:
    """Return how many clips were scored and how many could not be, over all ranks.

    Raises:
        ValueError: a clip was seen twice or not at all, so that a score would be one of another set.
    """
    valid = [(sample, ok) for part in everyone(seen) for sample, ok in part if sample >= 0]
    different = len({sample for sample, _ in valid})
    if not len(valid) == different == data.num_clips:
        raise ValueError(
            f"{data.source}: the batches of all ranks hold {len(valid)} clips, {different} different ones, but split "
            f"'{data.split}' has {data.num_clips}; EvalData.batches must give each clip once, on one rank."
        )
    num_clips = sum(ok for _, ok in valid)
    return {"num_clips": num_clips, "num_unusable": different - num_clips}


def _illustrated(results: dict, pictures: strips.Strips, data: EvalData, out_dir: Path) -> dict:
    """Write the film strips that rank 0's results ask for, from the ranks that have them, and put in their paths."""
    wanted = everyone(sorted(strips.asked(results)))[0]
    paths: dict[int, str] = {}
    for jpegs in collect(pictures.find(wanted)):
        for sample, jpeg in jpegs.items():
            path = out_dir / "media" / strips.file_name(data.source, data.key_of(sample))
            strips.write_once(path, jpeg)
            paths[sample] = path.relative_to(out_dir.parent).as_posix()
    return strips.answered(results, paths)
