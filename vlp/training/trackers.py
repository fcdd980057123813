"""W&B, TensorBoard and their like, fed by a thread each: whatever they wait for, no step waits for them.

    training thread --row--> queue of bounded length --thread--> logger

metrics.csv is written elsewhere and is complete whatever happens here. A logger that cannot start online is started
offline, if it can be, so that what was missed can be sent later.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from vlp import config
from vlp.training import exits, redact, signals

CLOSE_S = 20.0  # how long the end of a run waits for a logger
_MAX_ROWS = 10_000
# W&B would send the command line, the code and the screen; and it would wait a minute and a half for its server.
_ENVIRONMENT = {
    "WANDB_X_DISABLE_META": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_INIT_TIMEOUT": "30",
}


class Tracker:
    """One logger and its thread.

    Args:
        name: of the node. node: what is built, in the thread. facts: of the config, for the logger's own records.
    """

    def __init__(self, name: str, node: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.name, self._node, self._facts = name, node, facts
        self._rows: deque[tuple[int, dict[str, float]]] = deque()
        self._lost = 0
        self._wake, self._is_closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"tracker-{name}")
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a row; if the thread is far behind, the oldest one is dropped."""
        with self._wake:
            if len(self._rows) == _MAX_ROWS:
                self._rows.popleft()
                self._lost += 1
            self._rows.append((step, dict(values)))
            self._wake.notify()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Let the thread finish; return whether it did so in time."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._lost:
            _say(self.name, f"{self._lost} rows were dropped because it was too slow; metrics.csv has them")
        if self._thread.is_alive():
            _say(self.name, f"did not finish within {timeout_s:g} s and is left behind; metrics.csv has every row")
            exits.left_behind.append(self.name)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            logger = self._open()
            while (row := self._take()) is not None:
                logger.log_metrics(row[1], step=row[0])
            logger.finalize("success")
            self._finish(logger)
        except Exception as error:  # a tracker may raise anything; training goes on without it
            _say(self.name, f"stopped ({_line(error)}); training goes on, metrics.csv has every row")

    def _open(self) -> Any:
        """Build the logger; offline if it fails online."""
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        try:
            return self._start(self._node)
        except Exception as error:  # no network, a bad key, a server that answers with errors
            if not self._node.get("offline", True):
                _say(self.name, f"cannot start ({_line(error)}); it goes on offline, to be sent later")
                if "wandb" in sys.modules:  # its helper process still holds the run that could not start
                    sys.modules["wandb"].teardown()
                return self._start({**self._node, "offline": True})
            raise

    def _start(self, node: Mapping[str, Any]) -> Any:
        logger = config.build(node, f"logger.{self.name}")
        with signals.held():  # helper processes inherit it: a signal to the whole job is for the trainer alone
            _ = logger.experiment
        logger.log_hyperparams(dict(self._facts))
        return logger

    def _take(self) -> tuple[int, dict[str, float]] | None:
        with self._wake:
            while not self._rows and not self._is_closing:
                self._wake.wait()
            return self._rows.popleft() if self._rows else None

    def _finish(self, logger: Any) -> None:
        """End the logger's own run here, where it may wait, and not when the interpreter ends."""
        finish = getattr(logger.experiment, "finish", None)
        if finish is not None:
            finish()


class Trackers:
    """All loggers of a config; on ranks that do not log there are none."""

    def __init__(self, nodes: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._all = [Tracker(name, node, facts) for name, node in nodes.items() if node]

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a row to each."""
        for tracker in self._all:
            tracker.put(step, values)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let all finish, within one common time."""
        deadline = time.monotonic() + timeout_s
        for tracker in self._all:
            tracker.close(max(0.1, deadline - time.monotonic()))


def public_facts(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a config may leave the machine: an allow-list of sections, without secrets, flat."""
    sections = ("trainer", "optim", "schedule", "clip", "objective", "view", "tokenizer", "eval")
    keys = {"run": ("name", "seed"), "data": ("batch_size", "num_lanes", "window_shards", "bucket_steps")}
    chosen = {name: cfg[name] for name in sections if name in cfg}
    chosen |= {section: {key: cfg[section][key] for key in names} for section, names in keys.items()}
    return _flat(redact.tree(chosen))


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {k: v for key, child in node.items() for k, v in _flat(child, f"{path}.{key}".lstrip(".")).items()}
    return {path: node}


def _line(error: Exception) -> str:
    return redact.text((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def _say(name: str, text: str) -> None:
    print(f"logger.{name}: {text}.", file=sys.stderr, flush=True)
