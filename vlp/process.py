"""A process by a name that is never given twice, and whether it still lives."""

import os
import socket
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """The machine and its space of process numbers, the number, and when it was given: numbers come again."""

    host: str
    pid: int
    born: int  # clock ticks since the machine started

    @property
    def node(self) -> str:
        """The name of the machine."""
        return self.host.partition("/")[0]

    @classmethod
    def own(cls) -> "Process":
        """Return this process."""
        return cls(_host(), os.getpid(), _stat(os.getpid())[1])


def is_gone(process: Process) -> bool:
    """Tell whether a process of this machine has ended; False for those of others, of which nothing is known."""
    if process.host != _host():
        return False
    state, born = _stat(process.pid)
    return state in ("", "Z", "X") or born != process.born


def _host() -> str:
    """Containers may share a host name, so its boot and the space of its process numbers belong to the name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{boot[:8]}/{os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and the start of a process; "" if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[19])
