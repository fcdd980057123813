"""Peers: other projects, each in an environment of its own, made on first use, each a process that answers calls.

Nothing of a peer is ever imported by vlp. What cannot be installed or fails becomes a line of the table with its error.
"""

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fixtures import CACHE

HERE = Path(__file__).parent / "peers"
INSTALL_S, ANSWER_S = 900, 300  # a peer that takes longer counts as failed


class PeerError(Exception):
    """A peer cannot be installed, does not start, fails or does not answer."""


class Peer:
    """A process in the environment of `peers/NAME.txt` that answers calls of functions of `peers/MODULE.py`."""

    def __init__(self, name: str, module: str) -> None:
        """Install and start it. Raises PeerError."""
        self.name = name
        python = _environment(name)
        command = [str(python), str(HERE / "serve.py"), module]
        log = CACHE / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=variables
            )
        self._log = log
        self._answer()

    def call(self, function: str, **arguments: Any) -> Any:
        """Return what the function returns. Raises PeerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"function": function, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"{self.name} is gone: {_last_line(self._log)}") from error
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        pipe = self._process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], ANSWER_S)[0]:
            self.close()
            raise PeerError(f"{self.name} gave no answer for {ANSWER_S} s")
        line = pipe.readline()
        if not line:
            raise PeerError(f"{self.name} ended: {_last_line(self._log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"].splitlines()[0][:300])
        return answer["result"]


@contextmanager
def started(*wanted: tuple[str, str]) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """Start peers, given as (name, module); yield those that run and, by name, why the others do not."""
    peers: dict[str, Peer] = {}
    failures: dict[str, str] = {}
    try:
        for name, module in wanted:
            try:
                peers[name] = Peer(name, module)
            except PeerError as error:
                failures[name] = str(error)
                print(f"peer {name} does not run: {error}", flush=True)
        yield peers, failures
    finally:
        for peer in peers.values():
            peer.close()


def _environment(name: str) -> Path:
    """Return the interpreter of a peer's environment, which is made if it is missing. Raises PeerError."""
    requirements = HERE / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / "envs" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    print(f"peer {name}: installing {', '.join(requirements.read_text().split())}", flush=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv is None:
        raise PeerError("uv is missing, with which environments are made; run make setup")
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = error.stderr if isinstance(error.stderr, str) else ""
            raise PeerError(f"cannot be installed: {' '.join(said.split())[:300] or error}") from error
    (folder / "installed").touch()
    return python


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
