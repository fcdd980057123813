"""P4: a uint8 batch of 8 clips of 16 frames, 224 x 224 (19.3 MB), from a worker to the trainer.

The samples lie ready in the worker. vlp writes them into its ring buffer, from which the trainer copies; torch's
DataLoader collates them into shared memory, as it does by default. Wall time a batch, and CPU of all processes.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.data.workers import Workers, ordered
from vlp.types import Reason

BATCH, SHAPE = 8, (16, 224, 224, 3)
COUNT, SKIP, REPEATS = 60, 8, 5


class Ready(torch.utils.data.Dataset):
    """Samples that cost nothing to make."""

    def __init__(self) -> None:
        self.sample = torch.randint(0, 256, SHAPE, dtype=torch.uint8)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Tensor:
        return self.sample


class Batches:
    """The same as work of vlp's loader: each sample is written to its row, as `vlp.data.collate` does."""

    def __init__(self, data: Ready) -> None:
        self.data, self.buffer_bytes = data, BATCH * data.sample.nbytes

    def __call__(
        self, job: int, *, begin: Callable[[int], None], skip: Mapping[int, Reason], buffer: Tensor
    ) -> tuple[Tensor]:
        rows = buffer.view(BATCH, *SHAPE)
        for number in range(BATCH):
            begin(number)
            rows[number] = self.data[number]
        return (rows,)


def main(*, quick: bool = False, peers: bool = True) -> dict[str, Any]:
    """Return a row for one and for two workers; `peers` changes nothing, torch is at hand."""
    data = Ready()
    count, repeats = (4, 1) if quick else (COUNT, REPEATS)
    rows = []
    for workers in (1,) if quick else (1, 2):
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(repeats):
            found.setdefault("vlp", []).append(_vlp(data, workers, count))
            found.setdefault("DataLoader", []).append(_data_loader(data, workers, count))
            found.setdefault("memcpy", []).append(_memcpy(data, count))
        wall = {name: statistics.median(wall for wall, _ in pairs) for name, pairs in found.items()}
        cpu = {name: statistics.median(cpu for _, cpu in pairs) for name, pairs in found.items()}
        rows.append(
            {
                "workers": str(workers),
                **{f"{name} ms": f"{1000 * wall[name]:.2f}" for name in wall},
                "DataLoader to vlp": f"{wall['DataLoader'] / wall['vlp']:.2f}",
                "vlp to memcpy": f"{wall['vlp'] / wall['memcpy']:.2f}",
                "DataLoader to vlp, CPU": f"{cpu['DataLoader'] / cpu['vlp']:.2f}",
            }
        )
        print(f"transfer: {rows[-1]}", flush=True)
    return {"A batch": rows}


def _vlp(data: Ready, workers: int, count: int) -> tuple[float, float]:
    with closing(ordered(Batches(data), range(1 << 20), Workers(num_workers=workers))) as batches:
        return _seconds((frames for (frames,) in batches), count)


def _data_loader(data: Ready, workers: int, count: int) -> tuple[float, float]:
    return _seconds(torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=workers), count)


def _memcpy(data: Ready, count: int) -> tuple[float, float]:
    source = torch.stack([data.sample] * BATCH)
    target = torch.empty_like(source)
    return _seconds((target.copy_(source) for _ in range(1 << 20)), count)


def _seconds(batches: Iterable[Tensor], count: int) -> tuple[float, float]:
    """Return seconds a batch, once the queues have filled: of the clock, and of the CPU of all processes."""
    came = iter(batches)
    for frames in islice(came, SKIP):
        assert frames.shape == (BATCH, *SHAPE)
    began, used = time.perf_counter(), _cpu_s()
    for frames in islice(came, count):
        assert len(frames) == BATCH
    return (time.perf_counter() - began) / count, (_cpu_s() - used) / count


def _cpu_s() -> float:
    """Return the seconds of CPU of this process and its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(main())
