"""What was not used for training, counted by reason and listed."""

from collections import Counter
from typing import NamedTuple

from vlp.report import words
from vlp.report.records import Dropped, Source

MAX_LISTED = 200  # for each source; the counts are always complete


class ReasonCount(NamedTuple):
    """How often one reason occurred, and what it means."""

    name: str
    meaning: str
    advice: str
    stages: str
    number: int
    bar: float  # percent of the most frequent reason


class Drops(NamedTuple):
    """The dropped samples of one source."""

    source: str
    number: int
    share: str
    reasons: list[ReasonCount]
    listed: list[Dropped]


def drops(source: Source) -> Drops:
    """Count the dropped samples of a source, the most frequent reason first."""
    counted = Counter(dropped.reason.lower() for dropped in source.dropped)
    most = max(counted.values(), default=1)
    reasons = []
    for name, number in counted.most_common():
        stages = dict.fromkeys(dropped.stage for dropped in source.dropped if dropped.reason.lower() == name)
        found = ", ".join(words.STAGES.get(stage, stage) for stage in stages)
        reasons.append(ReasonCount(words.title(name), *words.reason(name), found, number, 100 * number / most))
    whole = len(source.dropped) + source.train + source.test
    listed = sorted(source.dropped, key=lambda dropped: (dropped.reason, dropped.where, dropped.key))[:MAX_LISTED]
    return Drops(source.name, len(source.dropped), words.share(len(source.dropped), whole), reasons, listed)
