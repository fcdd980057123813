"""Attempts at a run as a scheduler starts them, without the seconds that importing torch takes.

The ranks are forked from a process that has imported it already (forks.py).
Each rank is a real process that calls `launch.main` under the environment that torchrun would give it, with real gloo
collectives and real loader workers. `Strike` does something to a rank at a definite place of a definite step.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import forks
import torch
from omegaconf import DictConfig, OmegaConf

from vlp import config
from vlp.training import launch, watchdog

# Two towers with dropout, so small that a step takes milliseconds: what counts is what surrounds it.
TOY = ("+scale=tiny", "trainer.num_threads=1", "objective=[contrastive]", "fusion=null", "decoder=null", "view=[]")
TOY += ("clip.num_frames=2", "clip.size=16", "clip.short_side=20", "model.embed_dim=16", "tokenizer.vocab_size=200")
TOY += ("video.facts.dim=32", "video.overrides.depth=1", "video.overrides.num_heads=2", "video.facts.tubelet_size=1")
TOY += ("text.facts.dim=32", "text.config.num_hidden_layers=1", "text.config.num_attention_heads=2")
TOY += ("text.config.intermediate_size=64", "data.sources.world.num_train=30", "data.sources.world.num_test=4")
TOY += ("data.sources.world.size=32", "data.sources.world.num_frames=4", "data.batch_size=12", "data.num_lanes=12")
TOY += ("eval.tasks.retrieval=null", "eval.tasks.temporal_probe=null", "eval.tasks.captions=null")
TOY += ("trainer.checkpoint_every=1", "trainer.ledger=true", "run.hold_after=null")


def toy(place: Path, name: str, *more: str) -> DictConfig:
    """The config of a toy run below `place`; the world is shared."""
    return config.load(
        [*TOY, f"paths.runs={place / 'runs'}", f"paths.data={place / 'data'}", f"run.name={name}", *more]
    )


def changed(cfg: DictConfig, **values: Any) -> DictConfig:
    """A copy with other values, by key with `__` for the dot: composing a config anew takes a second."""
    copy = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(copy, key.replace("__", "."), value)
    return copy


class Strike(NamedTuple):
    """At the first mark `place` of step `step` or later, `rank` does `act`."""

    step: int
    place: str
    rank: int
    act: Callable[[], None]  # at the top of a file, as `Session.before`: it travels to another process


class Session(NamedTuple):
    """How the ranks of an attempt are made."""

    world_size: int = 1
    strike: Strike | None = None
    before: Callable[[int], None] | None = None  # called in each rank, with its number, before it begins
    report: bool = False  # whether the page is written at the end, which takes longer than the run


class Attempt(NamedTuple):
    """Exit codes by rank (negative: killed by that signal), what was written to the screen, and when it was over."""

    codes: list[int]
    output: str
    ended: float  # by time.monotonic(), which is that of the ranks too


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_told() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def fail() -> None:
    raise RuntimeError("struck")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def attempt(
    cfg: DictConfig,
    *,
    log: Path,
    world_size: int = 1,
    strike: Strike | None = None,
    before: Callable[[int], None] | None = None,
    report: bool = False,
    patience_s: float = 120,
) -> Attempt:
    """Run all ranks to their end; one that is still there after `patience_s` is killed, with code -9."""
    ranks = start(cfg, log=log, session=Session(world_size, strike, before, report))
    codes = wait(ranks, patience_s=patience_s)
    return Attempt(codes, log.read_text(errors="replace"), time.monotonic())


def start(cfg: DictConfig, *, log: Path, session: Session) -> list[BaseProcess]:
    """Fork the ranks."""
    values = {"WORLD_SIZE": session.world_size, "LOCAL_WORLD_SIZE": session.world_size}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "VLP_SESSION": uuid.uuid4().hex[:12]}
    ranks = []
    for rank in range(session.world_size):
        own = {**values, "RANK": rank, "LOCAL_RANK": rank} if session.world_size > 1 else {}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        ranks.append(forks.context().Process(target=_be_rank, args=(cfg, log, rank, session, environment)))
        ranks[-1].start()
    return ranks


def wait(ranks: Sequence[BaseProcess], *, patience_s: float) -> list[int]:
    """Return the exit codes of all ranks, which are killed when the patience ends."""
    deadline = time.monotonic() + patience_s
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    codes = []
    for rank in ranks:
        rank.join()
        assert rank.exitcode is not None
        codes.append(rank.exitcode)
    return codes


def _be_rank(cfg: DictConfig, log: Path, rank: int, session: Session, environment: Mapping[str, str]) -> None:
    code = 99
    try:
        os.setpgrp()  # so that a signal can reach its loader workers too, as a scheduler's does
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not a test's own
        os.environ.clear()  # that of the server, from whenever it was started
        os.environ.update(environment)
        torch.set_num_threads(1)
        multiprocessing.set_start_method(None, force=True)  # the server's own is not what a rank has
        if not session.report:
            launch.write_report = lambda directory: directory
        if session.strike is not None and session.strike.rank == rank:
            _arm(session.strike)
        if session.before is not None:
            session.before(rank)
        strategy = "ddp" if session.world_size > 1 else "auto"
        code = launch.run(lambda: changed(cfg, trainer__devices=session.world_size, trainer__strategy=strategy))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(strike: Strike) -> None:
    mark, done = watchdog.Watchdog.mark, []

    def struck(self: watchdog.Watchdog, place: str, *, step: int | None = None) -> None:
        mark(self, place, step=step)
        if not done and place == strike.place and self.step + 1 >= strike.step:
            done.append(True)
            strike.act()

    watchdog.Watchdog.mark = struck  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
