"""Canaries: what a decoder that somebody else has taken over would try, in real loader workers."""

import ctypes
import errno
import io
import logging
import os
import platform
import socket
import subprocess
import sys

import pytest
from PIL import Image
from test_data_faults import BAD, PLAIN, write

from vlp.data import sandbox, workers
from vlp.data.fields import ClipReader, Clips, Shards
from vlp.data.loader import workers_for
from vlp.data.sampling import Segments
from vlp.data.sandbox import Sandbox
from vlp.data.shards import Raw, write_shards
from vlp.data.transforms import CenterCrop
from vlp.data.workers import Workers, ordered
from vlp.types import Reason

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox._MACHINES, reason="there is no filter here"
)


def errno_of(call) -> int:
    """Return 0 if a call succeeds, else the errno."""
    try:
        call()
    except OSError as error:
        assert error.errno
        return error.errno
    return 0


def of_libc(name: str, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if getattr(libc, name)(*arguments) == -1 else 0


DEEDS = {
    "execve": lambda: errno_of(lambda: os.execv("/bin/true", ["true"])),
    "subprocess": lambda: errno_of(lambda: subprocess.run(["/bin/true"])),
    "ptrace": lambda: of_libc("ptrace", 0, 0, 0, 0),
    "inet": lambda: errno_of(socket.socket),
    "inet6": lambda: errno_of(lambda: socket.socket(socket.AF_INET6)),
    "packet": lambda: errno_of(lambda: socket.socket(socket.AF_PACKET)),
    "trainer": lambda: errno_of(lambda: os.kill(os.getppid(), 0)),
    "unshare": lambda: of_libc("unshare", 0x10000000),
    "uring": lambda: of_libc("syscall", 425, 1, 0),
    "own pair": lambda: errno_of(socket.socketpair),
    "itself": lambda: errno_of(lambda: os.kill(os.getpid(), 0)),
    "no_new_privs": lambda: of_libc("prctl", 39, 0, 0, 0, 0) or ctypes.CDLL(None).prctl(39, 0, 0, 0, 0),
}


class Tries:
    """Each job is one deed; an execve that succeeds ends the worker."""

    buffer_bytes = 0

    def __call__(self, job, *, begin, skip, buffer):
        begin(0, loaded=True)
        return -sum(skip.values()) if skip else list(DEEDS.values())[job]()


def tried(box: Sandbox, start_method: str | None = None) -> dict[str, int]:
    settings = Workers(num_workers=1, sandbox=box, start_method=start_method)
    return dict(zip(DEEDS, ordered(Tries(), range(len(DEEDS)), settings), strict=True))


REFUSED = {"execve", "subprocess", "ptrace", "inet", "inet6", "packet", "trainer", "unshare", "uring"}
EXPECTED = {name: errno.EPERM if name in REFUSED else 0 for name in DEEDS} | {"no_new_privs": 1}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_starts_no_program_debugs_nothing_and_has_no_network(start_method):
    assert tried(Sandbox(), start_method) == EXPECTED


def test_a_worker_of_remote_shards_has_a_network_and_no_more():
    may = {"inet": 0, "inet6": 0}
    found = tried(Sandbox(network=True))
    assert {name: found[name] for name in REFUSED - {"inet", "inet6", "packet"}} == dict.fromkeys(
        REFUSED - {"inet", "inet6", "packet"}, errno.EPERM
    )
    assert {name: found[name] for name in may} == may


class Looks:
    """Tells whether a secret, another variable and a connection of the trainer can be seen."""

    buffer_bytes = 0

    def __init__(self, number: int):
        self.number = number

    def __call__(self, job, *, begin, skip, buffer):
        begin(0, loaded=True)
        with open("/proc/self/environ", "rb") as file:
            names = file.read() + os.environb.get(b"VLP_TEST_TOKEN", b"")
        return b"canary" in names, os.environ.get("VLP_TEST_WORD"), errno_of(lambda: os.write(self.number, b"x"))


SHOWS = """
import socket
from test_sandbox import Looks
from vlp.data.sandbox import Sandbox
from vlp.data.workers import Workers, ordered
here, there = socket.socket(), socket.create_server(("127.0.0.1", 0))
here.connect(there.getsockname())
accepted, _ = there.accept()
accepted.setblocking(False)
for network in (False, True):
    settings = Workers(num_workers=1, sandbox=Sandbox(network=network), start_method="fork")
    print(list(ordered(Looks(here.fileno()), range(1), settings)))
try:
    print(accepted.recv(9))
except BlockingIOError:
    print("nothing came")
"""


def test_secrets_of_the_environment_and_open_connections_do_not_reach_a_worker():
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}  # pytest's, with this folder
    environment = os.environ | {"VLP_TEST_TOKEN": "canary", "VLP_TEST_WORD": "word"} | here
    done = subprocess.run([sys.executable, "-c", SHOWS], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[(False, 'word', 0)]", "[(True, 'word', 0)]", "nothing came"], done.stderr


class Bomb:
    """A transform that takes memory at square clips."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes

    def __call__(self, frames, rng):
        if frames.any() and frames.shape[1] == frames.shape[2]:
            bytearray(self.num_bytes)
        return frames


def reader(shards: list[str], *transforms) -> ClipReader:
    clips = Clips(Segments(num_frames=2), [*transforms, CenterCrop(size=16)], 24)
    return ClipReader(shards, clips=clips, seed=0, source=0, train=True)


class Reads:
    buffer_bytes = 0

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, job, *, begin, skip, buffer):
        begin(0, loaded=True)
        sample = self.samples.read(job, 0)
        return int(skip.get(0, sample.status)), os.getpid()


def test_a_sample_that_takes_too_much_memory_is_lost_and_nothing_else(tmp_path):
    shards = Shards(train=write(tmp_path)).shards("train")
    for gib, reason in ((0.25, Reason.LIMIT_EXCEEDED), (8.0, Reason.OK), (None, Reason.OK)):
        samples = reader(shards, Bomb(1 << 30))
        limits = {"decode_s": 60.0, "outage_s": 60.0, "memory_gib": gib}
        settings = workers_for([samples], num_workers=1, **limits)
        found = list(ordered(Reads(samples), range(8), settings))
        assert {i: Reason(status) for i, (status, _) in enumerate(found)} == {
            i: reason if i == BAD else Reason.OK for i in range(8)
        }
        assert len({pid for _, pid in found}) == 1  # no worker was lost with it


def test_a_picture_too_large_for_the_cap_costs_its_sample(tmp_path):
    written = io.BytesIO()
    Image.new("RGB", (7680, 4320)).save(written, "png")  # 100 MB when decoded
    videos = {"a": (PLAIN, "mp4"), "b": (written.getvalue(), "png"), "c": (PLAIN, "mp4")}
    raws = [Raw(key, data, kind, {"captions": ["w"]}) for key, (data, kind) in videos.items()]
    samples = reader(write_shards(raws, str(tmp_path), prefix="p", max_samples_per_shard=8))
    for gib, is_ok in ((0.06, False), (8.0, True)):
        settings = workers_for([samples], num_workers=1, decode_s=60.0, outage_s=60.0, memory_gib=gib)
        settings = settings._replace(start_method="spawn")  # a forked one has what its trainer has freed
        found = [status == Reason.OK for status, _ in ordered(Reads(samples), range(3), settings)]
        assert found == [True, is_ok, True]


def test_where_there_is_no_filter_it_is_said_once_and_all_works(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_MACHINES", {})
    workers._say_once.cache_clear()
    settings = Workers(num_workers=2, start_method="fork")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(list(ordered(Looks(1), range(4), settings))) == 4
    assert caplog.text.count("loader workers have no full sandbox; they may start programs and open sockets") == 1


def test_only_remote_shards_have_a_network(tmp_path):
    shards = write(tmp_path)
    limits = {"decode_s": 1.0, "outage_s": 1.0, "memory_gib": None}
    near = reader(Shards(train=shards).shards("train"))
    assert workers_for([near], num_workers=1, **limits).sandbox == Sandbox()
    near.shards[0] = "https://host/x.tar"
    assert workers_for([near], num_workers=1, **limits).sandbox == Sandbox(network=True)


def test_the_filter_ends_every_path_in_an_answer():
    """Every jump of the program stays inside it, and its last instruction returns."""
    for machine in sandbox._MACHINES.values():
        code = sandbox._program(machine, network=False, pid=7)
        lines = [code[i : i + 8] for i in range(0, len(code), 8)]
        jumps = [(i, line[2], line[3]) for i, line in enumerate(lines) if line[0] in (0x15, 0x35)]
        assert all(i + 1 + max(yes, no) < len(lines) for i, yes, no in jumps) and lines[-1][0] == 0x06
        assert len(set(machine.refused)) == len(machine.refused)
