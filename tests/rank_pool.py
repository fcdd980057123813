"""Real processes that form one group over gloo and stay alive for many jobs, each under a watchdog."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import forks
import torch
import torch.distributed as torch_dist


class RankPool:
    """`num_ranks` processes; with one there is no process group, as in a run on one process."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        context = forks.context()
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, num_ranks, port), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Return what `job(*args)`, a function at the top of a file, gives on each rank.

        Raises:
            TimeoutError: a rank has not answered in time; the pool is dead then.
            RuntimeError: a rank raised; the message is its traceback.
        """
        for pipe in self.pipes:
            pipe.send((job, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered within {timeout_s} s")
            answers.append(pipe.recv())
        failed = [text for good, text in answers if not good]
        if failed:
            self.close()
            raise RuntimeError(failed[0])
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Any, rank: int, num_ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in facts.items()}, MASTER_PORT=str(port))
        torch_dist.init_process_group("gloo")
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, job(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
