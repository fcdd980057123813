"""mosaicml-streaming: the corpus rewritten as MDS shards."""

import shutil
from pathlib import Path
from typing import Any

import tars
import torch
from measure import batch_rate, clip, sample_rate
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

COLUMNS = {"mp4": "bytes", "txt": "str"}


def prepare(shards: list[str], folder: str) -> None:
    """Write the MDS shards, as many as there are tar shards."""
    if Path(folder, "index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    limit = Path(shards[0]).stat().st_size
    with MDSWriter(out=folder, columns=COLUMNS, size_limit=limit) as writer:
        for sample in tars.samples(shards):
            writer.write(sample)


class Clips(StreamingDataset):
    """Decodes in `__getitem__`, as its users do."""

    def __init__(self, folder: str, how: list) -> None:
        super().__init__(local=folder, batch_size=8, shuffle=False)
        self.how = how

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return clip(sample["mp4"], *self.how), sample["txt"]


def samples(folder: str, count: int, touch: bool) -> float:
    """Return samples a second, shuffled."""
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=folder, batch_size=8, shuffle=True, num_canonical_nodes=1)
    return sample_rate(((s["mp4"], s["txt"]) for _ in range(1 << 30) for s in dataset), count=count, touch=touch)


def batches(folder: str, how: list, workers: int, skip: int, count: int) -> float:
    """Return clips a second."""
    clean_stale_shared_memory()
    loader = torch.utils.data.DataLoader(Clips(folder, how), batch_size=8, num_workers=workers)
    return batch_rate(loader, skip=skip, count=count)
