"""Is a written answer right? Parsers, what a failure to parse costs, and averages, each with a name.

    text, options, right option --protocol.matches--> True, False, or None: it cannot be parsed
      --protocol.failure--> credit, or out of the denominator --> micro and macro accuracy, failures, denominator

`strict` is the default. Others repeat the rules of public toolkits, oddities included, for comparison with their
numbers.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_LETTER = re.compile(
    r"(?:(?:the )?(?:best |correct )?(?:answer|option)(?: is)?:? *)?\(?([a-z])(?:[).:]+|$)\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Matches = Callable[[str, Sequence[str], int], bool | None]
Credit = Callable[[int], float | None]  # number of options -> credit of what cannot be parsed; None = leave it out


class Protocol(NamedTuple):
    """How an answer is read."""

    name: str
    matches: Matches  # (text, options, place of the right one) -> is it right? None: it cannot be parsed
    failure: str  # the policy in a word, for the protocol card
    credit: Credit


class Answer(NamedTuple):
    """What a model wrote on one question."""

    text: str
    options: Sequence[str]  # of a multiple choice; of an open question, the accepted answers
    right: int = 0  # place of the right option
    group: str = ""


class Accuracy(NamedTuple):
    """A score with what it is made of."""

    micro: float  # percent, over the denominator
    macro: float  # percent, mean of the groups
    denominator: int
    num: int  # answers, those left out included
    failures: int  # answers that cannot be parsed


def accuracy(answers: Sequence[Answer], protocol: Protocol) -> Accuracy:
    """Score answers; groups whose answers are all left out do not count.

    Raises:
        ValueError: no answer, or all are left out.
    """
    groups: dict[str, list[float]] = {}
    failures = 0
    for one in answers:
        verdict = protocol.matches(one.text, one.options, one.right)
        failures += verdict is None
        credit = protocol.credit(len(one.options)) if verdict is None else float(verdict)
        if credit is not None:
            groups.setdefault(one.group, []).append(credit)
    scored = [credit for credits in groups.values() for credit in credits]
    if not scored:
        raise ValueError(f"none of {len(answers)} answers can be scored under '{protocol.name}' ({protocol.failure}).")
    macro = sum(sum(credits) / len(credits) for credits in groups.values()) / len(groups)
    return Accuracy(100 * sum(scored) / len(scored), 100 * macro, len(scored), len(answers), failures)


def normal(text: str) -> str:
    """Return a text in lower case without articles, punctuation and extra space."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def by_letter(text: str, options: Sequence[str], right: int) -> bool | None:
    """One option's letter ("B", "(b)", "B. text", "Answer: B", "The answer is (B).") or its whole text."""
    letters = LETTERS[: len(options)]
    said = _LETTER.fullmatch(text.strip())
    if said and said[1].upper() in letters:
        option = letters.index(said[1].upper())
        if normal(said[2] or "") in ("", normal(options[option])):
            return option == right
    same = [place for place, option in enumerate(options) if normal(option) == normal(text)]
    return same[0] == right if len(same) == 1 else None


def exactly(text: str, accepted: Sequence[str], right: int) -> bool | None:
    """Equal to an accepted answer but for case, articles and punctuation; an empty answer cannot be parsed."""
    return normal(text) in {normal(answer) for answer in accepted} if text.strip() else None


def mvbench_official(text: str, options: Sequence[str], right: int) -> bool | None:
    """The first word without dots is inside "(x)", or "(x)" inside it; so "(" and an empty answer match anything."""
    word = text.lower().split(" ")[0].replace(".", "")
    mark = f"({LETTERS[right].lower()})"
    return word in mark or mark in word


def mvbench_lmms(text: str, options: Sequence[str], right: int) -> bool | None:
    """The letter of "X. text", else the first letter A to E that stands alone; an empty answer is not parsed."""
    if not text.strip():
        return None
    found = re.match(r"\s*([A-E])\. ", text)
    if found is None:
        found = re.search(r"\b([A-E])\b", re.sub(r"[^\w\s]", " ", text))
    return found is not None and found[1] == LETTERS[right]


def videoespresso(text: str, options: Sequence[str], right: int) -> bool | None:
    """The first capital A to D anywhere, so "Answer: B" is an A."""
    found = re.search(r"[A-D]", text)
    return found[0] == LETTERS[right] if found else None


def mtvqa_official(text: str, accepted: Sequence[str], right: int) -> bool | None:
    """A lower-case accepted answer is inside the lower-case text without dots, so "3.5" is never found."""
    return any(answer.lower() in text.lower().replace(".", "") for answer in accepted)


def mtvqa_vlmevalkit(text: str, accepted: Sequence[str], right: int) -> bool | None:
    """As mtvqa_official, with the dots taken out of both."""
    return any(answer.lower().replace(".", "") in text.lower().replace(".", "") for answer in accepted)


def span(text: str) -> tuple[float, float] | None:
    """Return the first time span that a text names, in seconds: "12.5 - 20", "from 3 to 7 s", "00:12 to 01:05".

    A reversed pair is turned around; None where there are no two times.
    """
    time = r"(?:\d+:)?\d+:\d+(?:\.\d+)?|\d+(?:\.\d+)?"
    unit = r"(?: ?(?:s|sec|seconds?)\b)?"
    pair = re.search(rf"({time}){unit}\s*(?:-|\u2013|to|and|,|until)\s*({time})", text)
    if pair is None:
        return None
    first, second = sorted(_seconds(part) for part in pair.groups())
    return first, second


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def _wrong(num_options: int) -> float | None:
    return 0.0


def _dropped(num_options: int) -> float | None:
    return None


def _chance(num_options: int) -> float | None:
    return 1 / num_options


STRICT = Protocol("strict", by_letter, "unparsed is wrong", _wrong)
OPEN = Protocol("open_exact", exactly, "unparsed is wrong", _wrong)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        STRICT,
        OPEN,
        Protocol("mvbench_official", mvbench_official, "nothing is unparsed", _wrong),
        Protocol("mvbench_lmms", mvbench_lmms, "empty answers are left out", _dropped),
        Protocol("videoespresso", videoespresso, "unparsed is wrong", _wrong),
        Protocol("llovi", by_letter, "unparsed gets chance credit", _chance),
        Protocol("mtvqa_official", mtvqa_official, "nothing is unparsed", _wrong),
        Protocol("mtvqa_vlmevalkit", mtvqa_vlmevalkit, "nothing is unparsed", _wrong),
    )
}
