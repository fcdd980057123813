"""A real cluster of SLURM on this machine: munged, slurmctld and two slurmd, all below one folder and on free ports.

Two partitions share both nodes; jobs of `high` preempt those of `low`, which are warned, have some seconds, and are
queued again. What starts here ends here.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES, GRACE_S = ("n1", "n2"), 60
SBIN = "/usr/sbin"  # where daemons lie, and where the search path of a plain user does not look


def missing() -> str:
    """Return why there can be no cluster here; "" if there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if absent:
        return f"needs SLURM: {', '.join(absent)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root to start jobs"


class Cluster(NamedTuple):
    """A running cluster; `environment` makes every command talk to it."""

    place: Path
    environment: dict[str, str]

    def command(self, *words: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command of SLURM and return what it printed."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """Hand a job in and return its number."""
        return self.command("sbatch", "--parsable", *words).partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM knows of a job, or of an element of an array."""
        text = self.command("scontrol", "--oneliner", "show", "job", number, check=False).splitlines()
        return dict(word.split("=", 1) for word in (text[0].split() if text else []) if "=" in word)

    def wait(self, until: Callable[[], object], *, timeout: float = 240) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + timeout
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(self.command("squeue", "--array", "--long", check=False))
            time.sleep(0.2)

    def is_empty(self) -> bool:
        """Tell whether no job is queued or running."""
        return not self.command("squeue", "--noheader")


@contextmanager
def cluster(place: Path) -> Iterator[Cluster]:
    """Bring a cluster up in an empty folder, and take it down with all its jobs."""
    (place / "munge").mkdir(parents=True)
    (place / "munge").chmod(0o700)
    _configure(place)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MASTER_"))}
    environment |= {"SLURM_CONF": str(place / "slurm.conf"), "PATH": _path(), "OMP_NUM_THREADS": "1"}
    found = Cluster(place, environment)
    with ExitStack() as stack:
        m = place / "munge"
        own = [f"--{key}={m / value}" for key, value in (("key-file", "key"), ("socket", "s"), ("pid-file", "pid"))]
        own += [f"--log-file={m / 'log'}", f"--seed-file={m / 'seed'}"]
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *own], found))
        _until((m / "s").exists)
        stack.enter_context(_daemon(["slurmctld", "-D"], found))
        for node in NODES:
            stack.enter_context(_daemon(["slurmd", "-D", "-N", node], found))
        _until(lambda: found.command("sinfo", "-h", "-o", "%T", check=False) == "idle")
        stack.callback(_end_jobs, found)
        yield found


def _configure(place: Path) -> None:
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    control, *ports = _free_ports(1 + len(NODES))
    (place / "munge" / "key").write_bytes(os.urandom(1024))
    (place / "munge" / "key").chmod(0o400)
    (place / "state").mkdir()
    for node in NODES:
        (place / f"spool-{node}").mkdir()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={place}/munge/s,cred_expire=6",  # so long a job that is queued again is kept back
        "SlurmctldPort": control,
        "StateSaveLocation": f"{place}/state",
        "SlurmdSpoolDir": f"{place}/spool-%n",
        "SlurmctldPidFile": f"{place}/ctld.pid",
        "SlurmdPidFile": f"{place}/slurmd-%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "SlurmdParameters": "config_overrides",  # the nodes share a machine, whose cores each of them counts
        "KillWait": 10,
        "ReturnToService": 2,
        "MpiDefault": "none",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MailProg": "/bin/true",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    for node, port in zip(NODES, ports, strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4")
    lines.append(f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={GRACE_S} State=UP")
    lines.append("PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP")
    (place / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _daemon(words: list[str], found: Cluster) -> Iterator[None]:
    name = "-".join(word.lstrip("-") for word in (words[0], *words[2:][-1:]) if "/" not in word)
    with (found.place / f"{name}.log").open("w") as log:
        process = subprocess.Popen(words, env=found.environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(holds: Callable[[], object], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the cluster does not come up; its logs lie beside slurm.conf")
        time.sleep(0.05)


def _end_jobs(found: Cluster) -> None:
    found.command("scancel", "--user", getpass.getuser(), check=False)
    _until(lambda: not found.command("squeue", "--noheader", check=False), timeout=30)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"
