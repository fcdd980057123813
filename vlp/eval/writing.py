"""Lets a model's caption decoder write for the clips of a batch, after a prompt of any length.

Axes: B clips, L text length, V vocabulary.
"""

import torch
from torch import Tensor

from vlp.eval.decoding import Limits, NextLogits, Prompt, Writer
from vlp.eval.runner import EvalData
from vlp.forward import ForwardPass


def write(
    writer: Writer,
    forward: ForwardPass,
    data: EvalData,
    *,
    prompts: list[str],
    chosen: Tensor,
    min_new: int,
    limit: int,
) -> list[str]:
    """Return a text for each of the `chosen` [B] clips of the batch, "" for the others.

    Args:
        prompts: what each text continues; "" begins with the first token alone.
        min_new: tokens before the end may come. limit: tokens of prompt and text, the first and the last included.
    """
    like = forward.fields["text_ids"]
    ids, mask, _ = (x.to(like.device) for x in data.encode(prompts))
    lengths = mask.sum(1) - 1  # without the end token
    prompt = Prompt(ids, lengths, chosen.to(like.device), forward.fields["sample_id"])
    limits = Limits(data.eos_id, data.pad_id, min_new, min(limit, data.max_length))
    ids = torch.where(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None], ids, data.pad_id)
    written = writer(_next_logits(forward), prompt._replace(ids=ids[:, : limits.max_length]), limits).cpu()
    starts, rows = lengths.cpu().tolist(), chosen.tolist()
    return [_text(written[row, starts[row] :], data) if rows[row] else "" for row in range(len(written))]


def _next_logits(forward: ForwardPass) -> NextLogits:
    def next_logits(ids: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [B, L]
        here = forward.with_fields(text_ids=ids, text_mask=real, word_ids=torch.zeros_like(ids))
        logits = here.take("caption_logits")  # [B, L, V]
        return logits[torch.arange(len(ids), device=ids.device), lengths - 1]

    return next_logits


def _text(ids: Tensor, data: EvalData) -> str:
    """Return the text of ids [L] up to the first end token."""
    ends = ((ids == data.eos_id) | (ids == data.pad_id)).nonzero()[:, 0].tolist()
    kept = ids[: ends[0]] if ends else ids
    return data.decode(kept[None])[0] if len(kept) else ""
