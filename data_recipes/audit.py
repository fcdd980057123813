"""What was made and what was not: as JSON beside the shards, and as a page of text."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from data_recipes.items import Dropped, Item
from data_recipes.plan import Plan
from data_recipes.shard_jobs import Record, Work, read
from vlp.data import storage
from vlp.data.probe import ProbeError, probe

AUDIT, DROPPED = "audit.json", "dropped.jsonl"
_EXAMPLES = 5  # names for each reason in the text; dropped.jsonl has all
_PROBED = 20  # files that are opened to estimate how long all are


def make_audit(
    plan: Plan, records: dict[str, list[Record]], dropped: Sequence[Dropped], duplicates: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what there is to say about a finished run.

    Args:
        plan: of the run.
        records: of the shards of each split.
        dropped: everything that became no sample.
        duplicates: (split/key, split/key) of what looks the same, the later one first; dropped or not.
    """
    splits = {}
    for split, made in records.items():
        written = {key for record in made for key in record.written}
        items = [item for item in plan.items[split] if item.key in written]
        splits[split] = {
            "annotated": len(plan.items[split]),
            "written": len(written),
            "dropped": _counts(item for item in dropped if item.split == split),
            "shards": sum(len(record.shards) for record in made),
            "bytes": sum(record.num_bytes for record in made),
            "hours": round(sum(record.seconds for record in made) / 3600, 4),
            "captions": caption_statistics(items),
            "notes": dict(sum((Counter(record.notes) for record in made), Counter())),
        }
    return {
        "recipe": plan.identity["recipe"],
        "options": plan.identity["options"],
        "splits": splits,
        "dropped": _counts(dropped),
        "dropped_examples": _examples(dropped),
        "duplicates": [{"sample": one, "looks_like": other} for one, other in duplicates],
    }


def caption_statistics(items: Sequence[Item]) -> dict[str, Any]:
    """Return how many captions there are, how long, and how many differ."""
    captions = [caption for item in items for caption in item.captions]
    num_words = [len(caption.split()) for caption in captions]
    return {
        "count": len(captions),
        "distinct": len(set(captions)),
        "mean_a_sample": round(len(captions) / max(1, len(items)), 2),
        "mean_words": round(sum(num_words) / max(1, len(captions)), 2),
        "max_words": max(num_words, default=0),
        "questions": sum(len(item.fields.get(name, ())) for item in items for name in ("questions", "choices")),
        "events": sum(len(item.fields.get("events", ())) for item in items),
    }


def _counts(dropped: Any) -> dict[str, int]:
    return dict(Counter(item.reason for item in dropped).most_common())


def _examples(dropped: Sequence[Dropped]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for item in dropped:
        if len(found[item.reason]) < _EXAMPLES:
            found[item.reason].append(f"{item.key or item.where}: {item.detail}")
    return dict(found)


def save(out: str, audit: dict[str, Any], dropped: Sequence[Dropped]) -> None:
    """Write the audit, and one line for each thing that was dropped. Raises OSError."""
    with storage.replacing(os.path.join(out, DROPPED)) as file:
        for item in dropped:
            file.write(json.dumps(item._asdict()).encode() + b"\n")
    with storage.replacing(os.path.join(out, AUDIT)) as file:
        file.write(json.dumps(audit, indent=1).encode())


def page(audit: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an audit for people."""
    yield f"{'split':10}{'annotated':>11}{'written':>9}{'shards':>8}{'MB':>10}{'hours':>8}{'captions':>10}{'words':>7}"
    for name, split in audit["splits"].items():
        captions = split["captions"]
        yield (
            f"{name:10}{split['annotated']:11}{split['written']:9}{split['shards']:8}{split['bytes'] / 1e6:10.1f}"
            f"{split['hours']:8.2f}{captions['count']:10}{captions['mean_words']:7.1f}"
        )
        yield from (f"  {count} times in {name}: {note}" for note, count in split["notes"].items())
    yield from _dropped_lines(audit["dropped"], audit["dropped_examples"])
    if audit["duplicates"]:
        yield f"look the same: {len(audit['duplicates'])}"
        for each in audit["duplicates"][:_EXAMPLES]:
            yield f"    {each['sample']} like {each['looks_like']}"


def preview(plan: Plan) -> Iterator[str]:
    """Yield what a run would do, without doing it."""
    work = {split: [each for job in jobs for each in job.work] for split, jobs in plan.jobs.items()}
    seconds_a_byte = _seconds_a_byte([each for group in work.values() for each in group], plan)
    yield f"{'split':10}{'annotated':>11}{'found':>8}{'shards':>8}{'MB':>10}{'hours':>8}"
    for split, group in work.items():
        num_bytes = sum({each.file: each.file.size for each in group}.values())
        seconds = sum(_seconds(each, seconds_a_byte) for each in group)
        shards = sum(bool(job.work) for job in plan.jobs[split])
        yield (
            f"{split:10}{len(plan.items[split]):11}{len(group):8}{shards:8}{num_bytes / 1e6:10.1f}{seconds / 3600:8.2f}"
        )
    yield "MB of the files as they are now; hours estimated from a few of them, or the sum of the spans"
    yield from _dropped_lines(_counts(plan.dropped), _examples(plan.dropped))


def _dropped_lines(counts: dict[str, int], examples: dict[str, list[str]]) -> Iterator[str]:
    for reason, count in counts.items():
        yield f"{reason}: {count}"
        yield from (f"    {line}" for line in examples[reason])
        if count > len(examples[reason]):
            yield f"    and {count - len(examples[reason])} more"


def _seconds(work: Work, seconds_a_byte: float) -> float:
    span = work.item.span
    return max(0.0, span[1] - span[0]) if span else work.file.size * seconds_a_byte


def _seconds_a_byte(work: Sequence[Work], plan: Plan) -> float:
    """Return the ratio over a few files, evenly spread."""
    folder = next((job.videos for jobs in plan.jobs.values() for job in jobs), "")
    num_bytes, seconds = 0, 0.0
    for each in work[:: max(1, len(work) // _PROBED)][:_PROBED]:
        try:
            seconds += probe(read(folder, each.file)).duration_s
            num_bytes += each.file.size
        except (OSError, ProbeError):
            continue  # the run itself will say so
    return seconds / max(1, num_bytes)
