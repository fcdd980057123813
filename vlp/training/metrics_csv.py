"""The metrics of a run as one CSV file that survives kills and resumes: no account, no database."""

import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path


class MetricsCsv:
    """Appends rows to `metrics.csv`; a new key adds a column.

    Args:
        path: the file. after_step: rows behind this step belong to steps that are done again, and are dropped.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.path = path
        self.waiting: list[tuple[int, dict[str, float]]] = []  # rows that the disk has refused so far
        self.columns = ["step"]
        rows = [row for row in read(path) if int(float(row["step"])) <= after_step]
        for row in rows:
            self.columns += [key for key in row if key not in self.columns]
        self._rewrite(rows)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row and hand it to the operating system at once; what a full disk refuses is written later."""
        self.waiting.append((step, dict(values)))
        try:
            while self.waiting:
                self._append(*self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if len(self.waiting) == 1:
                text = f"{self.path} cannot be written ({error.strerror}); training goes on, its rows are kept"
                print(f"{text} in memory until there is room.", file=sys.stderr, flush=True)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        new = [key for key in values if key not in self.columns]
        if new:
            self.columns += new
            self._rewrite(read(self.path))
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(
                    {"step": step, **{k: f"{v:.6g}" for k, v in values.items()}}
                )
        except OSError:
            os.truncate(self.path, size)  # half a row would be read as a whole one when the next is written
            raise

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def read(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_bytes().decode()  # not read_text, for which the first half of a line's end is an end
    lines = text[: text.rfind("\n") + 1].splitlines()  # a number that was cut is still a number
    return [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
