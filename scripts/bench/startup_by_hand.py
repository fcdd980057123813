"""The hand-written side of `startup`: the imports of a run, a shard, one step, in one file and without checks."""

import io
import sys

import av
import hydra  # noqa: F401  (imported because a run imports it)
import numpy as np
import pytorch_lightning  # noqa: F401
import safetensors.torch  # noqa: F401
import timm
import torch
import webdataset as wds
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import BertConfig, BertModel

NUM_FRAMES, SIZE, BATCH_SIZE = 8, 64, 64


def clip(data: bytes) -> torch.Tensor:
    """Decode everything, keep evenly spaced frames, scale them: [T, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24", width=SIZE, height=SIZE) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack([frames[i] for i in np.linspace(0, len(frames) - 1, NUM_FRAMES).astype(int)]))


def main(shard: str) -> None:
    """Do one contrastive step on the first clips of a shard."""
    samples = [sample for sample, _ in zip(wds.WebDataset(shard, shardshuffle=False), range(BATCH_SIZE), strict=False)]
    texts = [sample["txt"].decode() for sample in samples]
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=512)
    tokenizer.enable_padding()
    text_ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    pixels = torch.stack([clip(sample["mp4"]) for sample in samples]).permute(0, 1, 4, 2, 3) / 255
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    text = BertModel(BertConfig(vocab_size=512, **sizes))
    frames = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, embed_dim=128, depth=2, num_heads=4, num_classes=0
    )
    optimizer = torch.optim.AdamW([*text.parameters(), *frames.parameters()], lr=1e-3)
    video_embed = nn.functional.normalize(frames(pixels.flatten(0, 1)).view(BATCH_SIZE, NUM_FRAMES, -1).mean(1), dim=1)
    text_embed = nn.functional.normalize(text(text_ids).last_hidden_state[:, 0], dim=1)
    logits, labels = video_embed @ text_embed.T / 0.07, torch.arange(BATCH_SIZE)
    loss = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
    loss.backward()
    optimizer.step()
    print(f"step 1: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
