"""Run one function in several real processes that train together over gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import forks
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

Work = Callable[[int, int], dict[str, Tensor]]  # (rank, number of ranks) -> what the test looks at


def on_ranks(work: Work, num_ranks: int, directory: Path) -> list[dict[str, Tensor]]:
    """Return what `work`, a function at the top of a test file, gives on each rank."""
    forks.context()  # torch is imported once, not by each process
    mp.start_processes(_enter, args=(work, num_ranks, str(directory)), nprocs=num_ranks, start_method="forkserver")
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(num_ranks)]


def _enter(rank: int, work: Work, num_ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = torch_dist.FileStore(f"{directory}/store", num_ranks)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    results = {name: value.detach().contiguous().clone() for name, value in work(rank, num_ranks).items()}
    save_file(results, f"{directory}/rank{rank}.safetensors")
    torch_dist.barrier()
    torch_dist.destroy_process_group()
