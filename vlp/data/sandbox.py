"""What a loader worker gives up before it opens the first clip: whoever takes over a decoder finds little to use.

    no new privileges          prctl, for good
    no program, no debugger    a seccomp filter: execve, ptrace and others fail with EPERM, no signal to another process
    no network                 no socket can be made unless shards are remote; those that were inherited lead nowhere
    no secrets                 variables of the environment with such names are gone, unless shards are remote
    a cap of memory            RLIMIT_DATA: what it holds when it begins, and so many bytes more

Linux on x86-64 and aarch64; elsewhere `enter` says what is missing. The time that a sample may take is
`vlp.data.workers`' affair.
"""

import ctypes
import os
import platform
import re
import resource
import socket
import stat
import struct
import sys
from contextlib import suppress
from typing import NamedTuple

# Names of variables and keys that hold secrets.
SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:pass(?:word|wd|phrase)?|secrets?|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key"
    r"|credentials?|auth|authorization|signature|sas|cookie)$",
    re.IGNORECASE,
)

_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _ALL_THREADS = 38, 1, 1
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the classic packet filter: words, by constant
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; of an argument its low word
_X32 = 0x40000000  # the other numbering that a kernel for x86-64 may know


class _Machine(NamedTuple):
    """An audit architecture and its system calls by number."""

    arch: int
    seccomp: int
    refused: tuple[int, ...]
    signals: tuple[int, ...]  # whose first argument is a process
    socket: int


_MACHINES = {
    "x86_64": _Machine(
        arch=0xC000003E,
        seccomp=317,
        refused=(
            *(59, 322),  # execve, execveat
            *(101, 310, 311, 434, 438, 424),  # ptrace, process_vm_readv, _writev, pidfd_open, _getfd, _send_signal
            *(200, 129, 297),  # tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
            *(425, 426, 427),  # io_uring_setup, _enter, _register: they would open and connect past this filter
            *(272, 308, 165, 166, 155, 161, 428, 429, 430, 442),  # unshare, setns, mounts, pivot_root, chroot
            *(175, 313, 176, 246, 320, 169),  # modules of the kernel, kexec, reboot
            *(321, 298, 323, 304, 248, 249, 250),  # bpf, perf_event_open, userfaultfd, open_by_handle_at, keys
            *(172, 173, 163, 167, 168),  # iopl, ioperm, acct, swapon, swapoff
        ),
        signals=(62, 234),  # kill, tgkill
        socket=41,
    ),
    "aarch64": _Machine(
        arch=0xC00000B7,
        seccomp=277,
        refused=(
            *(221, 281),
            *(117, 270, 271, 434, 438, 424),
            *(130, 138, 240),
            *(425, 426, 427),
            *(97, 268, 40, 39, 41, 51, 428, 429, 430, 442),
            *(105, 273, 106, 104, 294, 142),
            *(280, 241, 282, 265, 217, 218, 219),
            *(89, 224, 225),
        ),
        signals=(129, 131),
        socket=198,
    ),
}


class Sandbox(NamedTuple):
    """What the workers of a loader may do."""

    network: bool = False  # and the secrets of the environment, which remote storage may need
    memory_bytes: int | None = None  # above what a worker holds when it begins; None = no cap

    def enter(self) -> str:
        """Give up in this process, for good, everything else; return what is missing here, '' if nothing is."""
        if not self.network:
            _forget_secrets()
        if sys.platform != "linux":
            return f"no sandbox and no cap of memory: {sys.platform} is not Linux"
        _cut_connections()
        if self.memory_bytes is not None:
            _cap_memory(self.memory_bytes)
        why = _filter(network=self.network)
        return f"they may start programs and open sockets: {why}" if why else ""


def is_capped() -> bool:
    """Return whether the kernel refuses memory to this process beyond a limit."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def _forget_secrets() -> None:
    """Overwrite what the environment holds under such names, also where /proc shows it, and remove it."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    for name in [name for name in os.environb if SECRET_NAME.search(os.fsdecode(name))]:
        if place := libc.getenv(name):
            ctypes.memset(place, ord("*"), len(os.environb[name]))
        del os.environb[name]


def _cut_connections() -> None:
    """Let the trainer's own connections, which a forked process inherits, lead nowhere; their numbers stay taken."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself is closed again
            if stat.S_ISSOCK(os.fstat(number).st_mode) and _family(number) != socket.AF_UNIX:
                os.dup2(nowhere, number, inheritable=False)
    os.close(nowhere)


def _family(number: int) -> int:
    with socket.socket(fileno=os.dup(number)) as copy:
        return copy.family


def _cap_memory(num_bytes: int) -> None:
    """Let the kernel refuse memory beyond what this process holds now and `num_bytes` more."""
    with open("/proc/self/status", encoding="ascii") as file:
        held = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + num_bytes
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _filter(*, network: bool) -> str:
    """Forbid system calls to all threads of this process; return why that is not possible, or ''."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.byteorder != "little":
        return f"there is no filter of system calls for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return f"no_new_privs: {os.strerror(ctypes.get_errno())}"
    code = _program(machine, network=network, pid=os.getpid())
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept))
    if libc.syscall(machine.seccomp, _SET_MODE_FILTER, _ALL_THREADS, program):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(machine: _Machine, *, network: bool, pid: int) -> bytes:
    """Return a packet filter over struct seccomp_data, 8 bytes an instruction.

    Each test that holds goes to the return behind it; each that does not, to the next test.
    """
    refuse, lines = _line(_RETURN, _EPERM), [_line(_LOAD, _ARCH), _line(_EQUAL, machine.arch, 1, 0)]
    lines += [refuse, _line(_LOAD, _NUMBER), _line(_AT_LEAST, _X32, 0, 1), refuse]
    for number in machine.refused:
        lines += [_line(_EQUAL, number, 0, 1), refuse]
    for number in machine.signals:
        lines += [_line(_EQUAL, number, 0, 4), _line(_LOAD, _FIRST_ARGUMENT), _line(_EQUAL, pid, 1, 0), refuse]
        lines += [_line(_RETURN, _ALLOW)]
    if not network:
        lines += [_line(_EQUAL, machine.socket, 0, 4), _line(_LOAD, _FIRST_ARGUMENT)]
        lines += [_line(_EQUAL, socket.AF_UNIX, 1, 0), refuse, _line(_RETURN, _ALLOW)]
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
