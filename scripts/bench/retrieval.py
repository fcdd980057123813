"""Retrieval at scale: exact ranks of 100,000 captions among 100,000 videos in chunks, against the whole matrix.

Unit embeddings are random, each caption is its video plus noise, and 1,000 videos have exact copies, so that ties must
be counted. The whole matrix of 100,000 would take 40 GB in float32, so the naive way runs on fewer. Each way runs in a
process of its own, which tells its peak memory.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlp.eval import metrics, ranking
from vlp.eval.ranking import Search

FEW, MANY, DIM, COPIES = 16_384, int(os.environ.get("BENCH_RETRIEVAL", "100000")), 256, 1000
NOISE = 0.28  # per dimension, times the length of a unit vector's entry: recall between 0 and 100 %


def main() -> dict[str, Any]:
    """Return seconds, peak memory and scores; the two ways must agree."""
    naive, few, many = (_measured(way, size) for way, size in (("naive", FEW), ("chunks", FEW), ("chunks", MANY)))
    assert naive["scores"] == few["scores"], (naive, few)
    return {
        f"s, {FEW:,} x {FEW:,}, whole matrix": naive["seconds"],
        f"s, {FEW:,} x {FEW:,}, chunks": few["seconds"],
        "time, chunks to whole": few["seconds"] / naive["seconds"],
        f"MiB above the embeddings, {FEW:,}, whole matrix": naive["mib"],
        f"MiB above the embeddings, {FEW:,}, chunks": few["mib"],
        f"s, {MANY:,} x {MANY:,}, chunks": many["seconds"],
        f"MiB above the embeddings, {MANY:,}, chunks": many["mib"],
        "scores equal": "to the last digit, every rank",
        f"R@1, R@10, median, mean rank of {MANY:,}": ", ".join(f"{x:.6g}" for x in many["scores"][:4]),
    }


def _measured(way: str, size: int) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, way, str(size)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _clips(size: int) -> Search:
    generator = torch.Generator().manual_seed(0)
    video = torch.nn.functional.normalize(torch.randn(size, DIM, generator=generator), dim=1)
    video[1 : 2 * COPIES : 2] = video[0 : 2 * COPIES : 2]
    text = video + NOISE * torch.randn(size, DIM, generator=generator)
    every = torch.arange(size)
    return Search(torch.nn.functional.normalize(text, dim=1), video, every, every)


def _run(way: str, size: int) -> dict[str, Any]:
    search = _clips(size)
    ranking.ranks(_clips(256))  # threads and kernels are up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if way == "naive":
        ranks = metrics.ranks(metrics.similarity(search.queries, search.candidates), search.right)
    else:
        ranks = ranking.ranks(search)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    scores = [metrics.recall(ranks, 1), metrics.recall(ranks, 10), metrics.median_rank(ranks), metrics.mean_rank(ranks)]
    return {"seconds": seconds, "mib": peak / 1024, "scores": [*scores, int((ranks * torch.arange(size)).sum())]}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
    else:
        print(main())
