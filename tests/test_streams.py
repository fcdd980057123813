"""A log that cannot be written stops nothing."""

import subprocess
import sys
from pathlib import Path

from vlp.training import streams

PROGRAM = """
import sys
from vlp.training import streams
with streams.tolerant():
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100_000, file=stream, flush=True)
        print("not flushed", file=stream)
sys.exit(7)
"""


def test_a_full_disk_changes_no_exit_code():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=full, cwd=Path(__file__).parents[1])
    assert done.returncode == 7


def test_what_can_be_written_is_written_and_the_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    with streams.tolerant():
        print("out"), print("err", file=sys.stderr)
        assert sys.stdout.encoding and not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr() == ("out\n", "err\n")
