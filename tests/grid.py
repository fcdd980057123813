"""The grid: every kind of batch, frozen part, strategy and accumulation on two real processes, against one process.

    python tests/grid.py            # all cells in float32 and bfloat16; a few minutes
    python tests/grid.py 32-true    # one precision

A cell trains a few steps under a watchdog. Its deviation is the largest difference of a weight from the reference, as a
share of the largest movement of a weight there; weights move in proportion to their gradients.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rank_pool import RankPool
from strategy_toy import FREEZE, Cell, ends, train
from torch import Tensor

SOURCES = ("text", "image", "video", "mixed", "empty")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
ACCUMULATE = (1, 4)
SPLIT = ("trainer.zero.persistent_elements=0",)  # else ZeRO-3 would keep such small weights whole
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 0.05}  # share of the largest movement
TIMEOUT_S = 120.0


class Row(NamedTuple):
    """One cell and how it went."""

    cell: Cell
    deviation: float
    seconds: float

    @property
    def good(self) -> bool:
        return self.deviation <= TOLERANCE[self.cell.precision]


def cells(precisions: Iterable[str] = TOLERANCE) -> list[Cell]:
    """Return every cell."""
    axes = itertools.product(precisions, SOURCES, FREEZE, STRATEGIES, ACCUMULATE)
    return [Cell(s, f, z, k, precision=p, steps=3 if s == "mixed" else 2, more=SPLIT) for p, s, f, z, k in axes]


def run(chosen: Iterable[Cell], one: RankPool, two: RankPool) -> Iterator[Row]:
    """Train each cell on the two processes and on the one; yields as they end.

    Raises:
        TimeoutError: a cell hangs.
    """
    references: dict[Cell, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for cell in chosen:
        alone = cell._replace(strategy="auto", more=())
        if alone not in references:
            (reference,) = one.run(train, alone, timeout_s=TIMEOUT_S)
            references[alone] = reference.start, reference.state
        began = time.monotonic()
        found = ends(two.run(train, cell, timeout_s=TIMEOUT_S))
        yield Row(cell, deviation(*references[alone], found), time.monotonic() - began)


def deviation(start: dict[str, Tensor], expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight as a share of the largest movement; other weights count too."""
    names = [key for key in expected if key.startswith("model/") and expected[key].is_floating_point()]
    assert expected.keys() == actual.keys(), sorted(expected.keys() ^ actual.keys())[:3]
    moved = max(float((expected[name] - start[name]).abs().max()) for name in names)
    return max(float((actual[name] - expected[name]).abs().max()) for name in names) / moved


def table(rows: Iterable[Row]) -> str:
    """Return the largest deviations of each source and strategy over frozen parts and accumulation, in Markdown."""
    rows = list(rows)
    lines = []
    for precision in dict.fromkeys(row.cell.precision for row in rows):
        lines += [f"| {precision} | {' | '.join(STRATEGIES)} |", "|---" * (1 + len(STRATEGIES)) + "|"]
        for source in SOURCES:
            mine = [row for row in rows if (row.cell.precision, row.cell.source) == (precision, source)]
            worst = [max(row.deviation for row in mine if row.cell.strategy == strategy) for strategy in STRATEGIES]
            lines.append(f"| {source} | {' | '.join(f'{value:.1e}' for value in worst)} |")
        lines.append("")
    return "\n".join(lines)


def main(precisions: list[str]) -> int:
    """Print each cell and the table; return 1 if any deviates."""
    began, rows = time.monotonic(), []
    with RankPool(1) as one, RankPool(2) as two:
        for row in run(cells(precisions or TOLERANCE), one, two):
            rows.append(row)
            cell = row.cell
            name = f"{cell.precision} {cell.source} {cell.freeze} {cell.strategy} x{cell.accumulate}"
            print(f"{name:<44} {row.deviation:.1e} {row.seconds:5.1f} s{'' if row.good else '  DEVIATES'}", flush=True)
    good = sum(row.good for row in rows)
    print(f"\n{table(rows)}\n{good} of {len(rows)} cells agree, none hung; {time.monotonic() - began:.0f} s")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
