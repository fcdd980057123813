"""The list of answers that a classifier chooses from: `python -m vlp.data.answers --top 1000 'DIR/train-*.tar'`.

Prints the commonest answers of the shards' questions as the YAML of a `texts` group; a comment says how many of the
questions they cover.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import yaml

from vlp.data import storage
from vlp.data.columns import IndexFileError
from vlp.data.index import meta_of, open_index
from vlp.types import Reason, SampleError


def common(records: Iterable[dict], *, top: int, field: str = "questions") -> tuple[list[str], float]:
    """Return the commonest answers, most frequent first and then by letter, and the share of questions they answer."""
    counts = Counter(one["answer"] for record in records for one in record.get(field) or [])
    chosen = sorted(counts, key=lambda answer: (-counts[answer], answer))[:top]
    return chosen, sum(counts[answer] for answer in chosen) / max(1, counts.total())


def records(shards: Sequence[str], *, index_dir: str | None = None) -> Iterable[dict]:
    """Yield the records of the usable samples of shards."""
    for pattern in shards:
        for shard in storage.expand(pattern):
            index = open_index(shard, index_dir=index_dir)
            for row in range(len(index.columns["status"])):
                if index.status(row) == Reason.OK:
                    yield meta_of(index, row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the list; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlp.data.answers", description="List the commonest answers.")
    parser.add_argument("shards", nargs="+", help="training shards, {000..099} and * allowed")
    parser.add_argument("--top", type=int, default=1000)
    parser.add_argument("--index-dir", help="where the indexes of remote shards lie")
    given = parser.parse_args(arguments)
    try:
        answers, share = common(records(given.shards, index_dir=given.index_dir), top=given.top)
    except (IndexFileError, storage.StorageError, SampleError, ValueError) as error:
        print(f"answers: {error}", file=sys.stderr)
        return 78
    if not answers:
        print(f"answers: the samples of {given.shards} have no questions.", file=sys.stderr)
        return 78
    node = {"_target_": "vlp.data.texts.Question", "answers": answers, "facts": {"num_answers": len(answers)}}
    print(f"# {len(answers)} answers, right for {share:.1%} of the questions they were counted on.")
    print(yaml.safe_dump(node, sort_keys=False, allow_unicode=True, width=120), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
