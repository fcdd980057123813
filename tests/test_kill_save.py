"""A share of the kill sweep over a save (all: `python tests/kill_save.py`), and the order of its system calls."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from strace_log import order_problems, read_log

ROOT = Path(__file__).parents[1]


def can_trace() -> bool:
    """Is strace there, and may it trace here?"""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_trace(), reason="needs strace (apt-get install strace) and leave to trace")


def python(*words: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*under, sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_kill_or_an_error_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint():
    done = python("tests/kill_save.py", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    (count,) = re.findall(r"^(\d+) points in .* 0 findings$", done.stdout, re.MULTILINE)
    assert int(count) >= 15


SAVE = """
import sys
from pathlib import Path
from kill_save import state
from vlp.training import checkpoint
for step in (1, 2, 3):
    checkpoint.save(Path(sys.argv[1]) / "checkpoints", step=step, state=state(step, 0), keep=2)
"""


def test_files_then_manifest_then_directory_then_name_then_parent_are_forced_to_the_disk_and_deletions_last(tmp_path):
    log = tmp_path / "log"
    calls = "trace=openat,write,fsync,rename,unlinkat,rmdir,mkdir"
    done = python("-c", SAVE, str(tmp_path), under=("strace", "-f", "-y", "-s", "8", "-e", calls, "-o", str(log)))
    assert done.returncode == 0, done.stderr
    for step in (1, 2, 3):
        assert order_problems(read_log(log), f"step-{step:08d}") == []
