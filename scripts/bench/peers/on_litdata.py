"""litdata: the corpus rewritten as its binary chunks."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import tars
from measure import sample_rate


def prepare(shards: list[str], folder: str) -> None:
    """Write the chunks, one process, as many as there are tar shards."""
    if Path(folder, "index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    per_chunk = -(-sum(1 for _ in tars.samples(shards)) // len(shards))
    litdata.optimize(fn=partial(_of_shard), inputs=shards, output_dir=folder, chunk_size=per_chunk, num_workers=1)


def _of_shard(shard: str) -> Any:
    for sample in tars.samples([shard]):
        yield {"mp4": sample["mp4"], "txt": sample["txt"]}


def samples(folder: str, count: int, touch: bool) -> float:
    """Return samples a second, shuffled."""
    dataset = litdata.StreamingDataset(folder, shuffle=True, drop_last=False)
    return sample_rate(((s["mp4"], s["txt"]) for _ in range(1 << 30) for s in dataset), count=count, touch=touch)
