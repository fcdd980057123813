"""The metrics of a run as one CSV file that survives kills and resumes: no account, no database."""

import csv
import errno
import io
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class MetricsCsv:
    """Appends rows to `metrics.csv`; a new key adds a column.

    A disk that refuses costs a warning and no row: rows wait in memory until the file can be written again.

    Args:
        path: the file. after_step: rows behind this step belong to steps that are done again, and are dropped.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.path, self.after_step = path, after_step
        self.columns: list[str] = []  # of the file as it stands; none before it was made
        self.waiting: list[dict[str, str]] = []
        self.has_warned = False
        self._write()

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row and hand it to the operating system at once."""
        self.waiting.append({"step": str(step), **{key: f"{value:.6g}" for key, value in values.items()}})
        self._write()

    def _write(self) -> None:
        try:
            self._extend()
        except OSError as error:
            if not self.has_warned:
                print(f"warning: {self.path} cannot be written ({error.strerror}); its rows wait.", file=sys.stderr)
            self.has_warned = True
        else:
            self.has_warned = False
            self.waiting.clear()

    def _extend(self) -> None:
        """Add the waiting rows; a part of a row is taken back."""
        new = [key for row in self.waiting for key in row if key not in self.columns]
        if new or not self.columns:
            self._rewrite()
            return
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(self.waiting)
        data = text.getvalue().encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def _rewrite(self) -> None:
        """Write the whole file anew, with all columns of its rows and of the waiting ones."""
        kept = read(self.path)
        if not self.columns:
            kept = [row for row in kept if int(float(row["step"])) <= self.after_step]
        rows = [*kept, *self.waiting]
        columns = list(dict.fromkeys(["step", *self.columns, *(key for row in rows for key in row)]))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)
        self.columns = columns


def read(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_bytes().decode()  # not read_text, for which the first half of a line's end is an end
    lines = text[: text.rfind("\n") + 1].splitlines()  # a number that was cut is still a number
    return [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
