"""A split of coloured clips and a model family of lookup tables, for the tests of vlp.eval."""

import torch
from torch import nn

from vlp.eval.runner import EvalData
from vlp.forward import Graph, quantity
from vlp.types import Batch, Reason, Tokens, nothing_more

VOCAB = ["[pad]", "[bos]", "[eos]", "zero", "one", "two", "three", "four", "red", "blue", "then"]
PAD, BOS, EOS = 0, 1, 2
MAX_LENGTH = 6


def encode(texts):
    ids = torch.full((len(texts), MAX_LENGTH), PAD)
    word_ids = torch.full_like(ids, -1)
    for row, text in enumerate(texts):
        tokens = [VOCAB.index(word) for word in text.split()][: MAX_LENGTH - 2]
        ids[row, : len(tokens) + 2] = torch.tensor([BOS, *tokens, EOS])
        word_ids[row, 1 : len(tokens) + 1] = torch.arange(len(tokens))
    return ids, ids != PAD, word_ids


def decode(ids):
    return [" ".join(VOCAB[token] for token in row if token not in (PAD, BOS, EOS)) for row in ids.tolist()]


def make_batch(sample_ids, captions, unusable=()):
    """Frames [B, 4, 8, 6, 3] show the sample id as a grey value; the last frame is padding."""
    size, samples = len(sample_ids), torch.tensor(sample_ids)
    ids, mask, word_ids = encode(captions)
    valid = torch.tensor([sample not in unusable for sample in sample_ids])
    return Batch(
        frames=samples.to(torch.uint8)[:, None, None, None, None].expand(size, 4, 8, 6, 3).contiguous(),
        frame_mask=torch.tensor([True, True, True, False]).expand(size, 4),
        times_s=torch.zeros(size, 4),
        text_ids=ids,
        text_mask=mask,
        word_ids=word_ids,
        **nothing_more(size),
        valid=valid,
        status=torch.where(valid, Reason.OK, Reason.VIDEO_BROKEN),
        sample_id=samples,
        key=samples,
    )


def make_data(metas, *, rank=0, world=1, batch_size=3, unusable=(), **changes):
    """Clip i has key "clip/i" and metas[i]; rank r has clips r, r + world, ..."""

    def batches():
        own = list(range(rank, len(metas), world))
        for start in range(0, len(own), batch_size):
            part = own[start : start + batch_size]
            yield make_batch(part, [metas[i]["captions"][0] for i in part], unusable)

    data = EvalData(
        source="toys",
        split="test",
        trained_on_these=False,
        batches=batches,
        meta=metas.__getitem__,
        key_of=lambda sample: f"clip/{sample}",
        encode=encode,
        decode=decode,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        mask_id=None,
        max_length=MAX_LENGTH,
        num_clips=len(metas),
        batch_size=batch_size,
    )
    return data._replace(**changes)


def captioned(*captions):
    return [{"captions": [caption] if isinstance(caption, str) else list(caption)} for caption in captions]


class Lookup(nn.Module):
    """Clip i has embedding videos[i]; a text is the sum of words[token], later tokens weighing less.

    `script` [clips, L]: the tokens that the decoder writes. `calls` counts what was computed, `sizes` are batch sizes.
    """

    def __init__(self, videos, words, *, script=None, scale=1.0):
        super().__init__()
        self.videos = nn.Parameter(torch.as_tensor(videos, dtype=torch.float32))
        self.words = nn.Parameter(torch.cat([torch.zeros(3, words.shape[1]), words]))
        self.register_buffer("script", torch.as_tensor([[EOS]] * 256 if script is None else script))
        self.register_buffer("scale", torch.tensor(scale))
        self.frozen = nn.Dropout(0.5).eval()
        self.calls, self.sizes, self.modes = [], [], []

    @quantity
    def video(self, frames):
        self.calls.append("video")
        self.sizes.append(len(frames))
        self.modes.append((self.training, torch.is_grad_enabled()))
        return frames[:, 0, 0, 0, 0].long().clamp(max=len(self.videos) - 1)

    @quantity
    def video_embed(self, video):
        return self.videos[video]

    @quantity
    def text_embed(self, text_ids, text_mask):
        self.calls.append("text")
        weights = 0.9 ** torch.arange(text_ids.shape[1], device=text_ids.device) / 0.9  # 1 for the first word
        return (self.words[text_ids] * (weights * text_mask)[..., None]).sum(1)

    @quantity
    def logit_scale(self):
        return self.scale

    @quantity
    def fused_text(self, video_embed, text_embed, text_mask):
        return Tokens((video_embed - text_embed)[:, None], text_mask[:, :1])

    @quantity
    def caption_logits(self, video, text_ids):
        self.calls.append("decoder")
        tokens = self.script[video][:, : text_ids.shape[1]]
        return nn.functional.one_hot(tokens, len(VOCAB)).float()


def toy_graph(model):
    return Graph(model, fields=Batch._fields, views={})
