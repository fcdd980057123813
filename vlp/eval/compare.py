"""Compare two score files item by item: `python -m vlp.eval.compare A.json B.json`.

Exit codes: 0 compared; 76 refused, because the protocol cards differ; 78 a file that is none, or nothing in common.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlp.eval import scores
from vlp.eval.scores import ScoreFile

REFUSED, WRONG = 76, 78  # as vlp.training.exits has them


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.eval.compare", description="Compare two score files.")
    parser.add_argument("a", type=Path, help="runs/NAME/scores/....json")
    parser.add_argument("b", type=Path, help="another one of the same task")
    parser.add_argument("--mark-differences", action="store_true", help="compare under different protocols, marked")
    given = parser.parse_args(arguments)
    try:
        a, b = scores.read(given.a), scores.read(given.b)
        different = scores.differences(a.card, b.card)
        if different and not given.mark_differences:
            print(f"compare: the protocols differ in {'; '.join(different)} (--mark-differences compares all the same)")
            return REFUSED
        print("\n".join(table(a, b, marked=bool(different))))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return WRONG
    if different:
        print("* other protocols, so this is no comparison of models alone:")
        print("\n".join(f"    {line}" for line in different))
    return 0


def table(a: ScoreFile, b: ScoreFile, *, marked: bool) -> list[str]:
    """Return one line for each row that both have; means are compared item by item.

    Raises:
        ValueError: the two have no row in common.
    """
    rows = {row["key"]: row for row in b.rows}
    shared = [(row, rows[row["key"]]) for row in a.rows if row["key"] in rows]
    if not shared:
        raise ValueError("the two files have no row in common; compare scores of the same task.")
    lines = [f"{'row':<28} {'A':>9} {'B':>9} {'B - A':>9} {'95 % interval':>20} {'p':>7}"]
    for one, other in shared:
        key, star = one["key"], "*" if marked else ""
        line = f"{key + star:<28} {one['raw']:9.2f} {other['raw']:9.2f} {other['raw'] - one['raw']:+9.2f}"
        lines.append(line + _test(a, b, key))
    return lines


def _test(a: ScoreFile, b: ScoreFile, key: str) -> str:
    try:
        found = scores.paired(a.each[key], b.each[key])
    except (KeyError, ValueError):  # no share of each item, a median, or other items
        return f" {'-':>20} {'-':>7}"
    return f" {f'{found.low:+.2f} to {found.high:+.2f}':>20} {found.p:7.4f}"


if __name__ == "__main__":
    sys.exit(main())
