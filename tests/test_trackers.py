"""W&B against servers that swallow, refuse or break; training must not notice, and metrics.csv must have every row."""

import http.server
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from forked_ranks import Session, attempt, start, toy, wait

from vlp.training import metrics_csv, trackers, watchdog

KEY = "0" * 40
PACE_S = 0.25


class _Refuses(http.server.BaseHTTPRequestHandler):
    status = 500

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(self.status)

    do_GET = do_POST  # noqa: N815  (the server calls it by this name)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Accepts(_Refuses):
    """As much of W&B's server as a run needs to start online and to send rows."""

    bucket: ClassVar[dict] = {
        **{"id": "QnVja2V0", "name": "r", "displayName": "r", "description": "", "config": "{}", "sweepName": None},
        **{"project": {"id": "UA==", "name": "vlp", "entity": {"id": "RQ==", "name": "me"}}, "historyLineCount": 0},
    }

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.streamed += "file_stream" in self.path  # type: ignore[attr-defined]
        viewer = {"id": "VQ==", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": viewer, "upsertBucket": {"bucket": self.bucket, "inserted": True}}
        text = json.dumps({"data": data if b"graphql" in self.path.encode() and body else {}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST  # noqa: N815  (the server calls it by this name)


@contextmanager
def server(kind: str) -> Iterator[str]:
    """The URL of a server that accepts and never answers ("hole"), or answers with a status."""
    if kind == "hole":
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        return
    handler = type("Handler", (_Refuses,), {"status": int(kind)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def log_in(url: str, rank: int) -> None:
    """Let a rank have a key for the server at `url`, and little patience."""
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "3"}
    trackers.CLOSE_S = 6.0


def log_in_slowly(url: str, rank: int) -> None:
    """The same, with steps of a quarter of a second."""
    log_in(url, rank)
    mark = watchdog.Watchdog.mark

    def slower(self, where, *, step=None):
        mark(self, where, step=step)
        if where == "forward":
            time.sleep(PACE_S)

    watchdog.Watchdog.mark = slower


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hole", "503", "401"])
def test_a_run_is_whole_whatever_the_server_of_wandb_does(place, kind):
    cfg = toy(place, f"wandb-{kind}", "trainer.max_steps=4", "trainer.log_every=1", "logger=[wandb]")

    with server(kind) as url:
        done = attempt(cfg, log=place / f"wandb-{kind}.log", before=partial(log_in, url), patience_s=90)
    assert done.codes == [0], done.output[-2000:]
    assert "it goes on offline" in done.output and "Traceback" not in done.output
    assert list((place / "runs" / f"wandb-{kind}" / "wandb").glob(f"offline-run-*/run-wandb-{kind}.wandb"))
    rows = metrics_csv.read(place / "runs" / f"wandb-{kind}" / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == ["1", "2", "3", "4"]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_does_not_notice_that_the_server_of_wandb_goes_away_in_its_middle(place):
    cfg = toy(place, "wandb-gone", "trainer.max_steps=40", "trainer.log_every=1", "logger=[wandb]")
    run, log = place / "runs" / "wandb-gone", place / "wandb-gone.log"
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Accepts)
    served.streamed = 0  # type: ignore[attr-defined]
    threading.Thread(target=served.serve_forever, daemon=True).start()
    before = partial(log_in_slowly, f"http://127.0.0.1:{served.server_port}")
    ranks = start(cfg, log=log, session=Session(before=before))
    wait_for(lambda: served.streamed and len(metrics_csv.read(run / "metrics.csv")) < 30)  # type: ignore[attr-defined]
    served.shutdown()
    served.server_close()
    assert wait(ranks, patience_s=90) == [0] and "Traceback" not in log.read_text()
    rows = [row for row in metrics_csv.read(run / "metrics.csv") if "train/loss" in row]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 41)]
    assert statistics.median(float(row["time/step_s"]) for row in rows[-10:]) < 0.3 + PACE_S
    assert list((run / "wandb").glob("run-*/run-wandb-gone.wandb"))


class Slow:
    """A logger that cannot start before it is allowed to."""

    go: ClassVar[threading.Event]
    rows: ClassVar[list]
    experiment = None

    def log_hyperparams(self, facts: dict) -> None:
        self.go.wait(20)

    def log_metrics(self, values: dict, step: int) -> None:
        self.rows.append((step, values))

    def finalize(self, status: str) -> None:
        """Nothing to do."""


@pytest.fixture
def slow(monkeypatch) -> type[Slow]:
    own = type("Own", (Slow,), {"go": threading.Event(), "rows": []})
    monkeypatch.setattr(trackers.config, "build", lambda node, path: own())
    monkeypatch.setattr(trackers.exits, "left_behind", [])
    return own


def test_rows_wait_for_a_logger_that_starts_late_and_no_step_does(slow):
    tracker = trackers.Tracker("t", {}, {})
    began = time.monotonic()
    for step in range(1000):
        tracker.put(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    slow.go.set()
    assert tracker.close() and [step for step, _ in slow.rows] == list(range(1000))


def test_a_logger_that_never_starts_is_left_behind_in_time(slow, capsys):
    tracker = trackers.Tracker("t", {}, {})
    tracker.put(1, {})
    assert not tracker.close(0.2) and trackers.exits.left_behind == ["t"]
    assert "metrics.csv has every row" in capsys.readouterr().err
    slow.go.set()


def test_the_queue_is_bounded(slow, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "_MAX_ROWS", 3)
    tracker = trackers.Tracker("t", {}, {})
    for step in range(5):
        tracker.put(step, {})
    slow.go.set()
    tracker.close()
    assert [step for step, _ in slow.rows] == [2, 3, 4] and "2 rows were dropped" in capsys.readouterr().err


def test_a_full_disk_loses_no_row_of_the_metrics(tmp_path, monkeypatch, capsys):
    csv = metrics_csv.MetricsCsv(tmp_path / "metrics.csv", after_step=0)
    csv.append(1, {"loss": 1.0})
    real, full = Path.open, [True]

    def open_full(self: Path, *arguments, **named):
        return real(Path("/dev/full") if full[0] else self, *arguments, **named)

    monkeypatch.setattr(Path, "open", open_full)
    csv.append(2, {"loss": 2.0})
    csv.append(3, {"loss": 3.0})
    full[0] = False
    csv.append(4, {"loss": 4.0})
    assert [row["step"] for row in metrics_csv.read(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]
    assert capsys.readouterr().err.count("its rows wait") == 1
