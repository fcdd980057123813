"""Score stored embeddings again, without decoding a clip: `python -m vlp.eval.stored X.safetensors`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from vlp.eval.retrieval import Embedded, Table, table

_NAMES = {"video", "text", "owner", "video_ids", "scale"}


def load(path: Path) -> Embedded:
    """Read what `vlp.eval.retrieval.Retrieval(store=True)` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if tensors.keys() != _NAMES:
        raise ValueError(f"{path} holds {sorted(tensors)}, not {sorted(_NAMES)}; evaluate with store=true to make one.")
    return Embedded(**{**tensors, "scale": float(tensors["scale"])})


def lines(scored: Table) -> list[str]:
    """Return the table as text, raw and dual softmax apart."""
    shown = [f"{'row':<28} {'raw':>9} {'dual softmax':>13} {'chance':>9}"]
    return shown + [
        f"{row['key']:<28} {row['raw']:9.2f} {row['dual_softmax']:13.2f} {row['chance']:9.2f}" for row in scored.rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.eval.stored", description="Score stored embeddings.")
    parser.add_argument("file", type=Path)
    try:
        print("\n".join(lines(table(load(parser.parse_args(arguments).file)))))
    except ValueError as error:
        print(f"stored: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
