"""webdataset: the corpus as it is."""

from typing import Any

import torch
import webdataset as wds
from measure import batch_rate, clip, sample_rate

EPOCHS = 64  # in one list of shards: the shuffle buffer stays full from one to the next


def samples(shards: list[str], count: int, touch: bool) -> float:
    """Return samples a second, through a shuffle buffer."""
    dataset = wds.WebDataset(shards * EPOCHS, shardshuffle=EPOCHS * len(shards), seed=0).shuffle(64)
    return sample_rate(((s["mp4"], s["txt"]) for s in dataset), count=count, touch=touch)


def batches(shards: list[str], how: list, workers: int, skip: int, count: int) -> float:
    """Return clips a second."""
    dataset = wds.WebDataset(shards * EPOCHS, shardshuffle=False).map(lambda sample: _clip(sample, how))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=_batch)
    return batch_rate(loader, skip=skip, count=count)


def _clip(sample: dict[str, Any], how: list) -> tuple[torch.Tensor, str]:
    return clip(sample["mp4"], *how), sample["txt"].decode()


def _batch(items: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.utils.data.default_collate([frames for frames, _ in items]), [text for _, text in items]
