"""BLEU, ROUGE-L and CIDEr of captions in plain Python: the numbers of the public COCO caption evaluation.

    captions, references --words--> tokens --n-grams--> corpus scores, and a score of each caption

The scores agree with that evaluation on equal tokens; `words` follows the rules of the Penn Treebank tokenizer that it
starts in Java, and differs from it on rare text only (see docs/evaluation.md for how often).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

Tokens = tuple[str, ...]
Grams = Counter[tuple[str, ...]]

ORDER = 4  # longest n-gram
_BETA = 1.2  # of ROUGE-L: weight of recall
_SIGMA = 6.0  # of CIDEr: deviation of the length penalty, in words
_SMALL, _TINY = 1e-9, 1e-15  # keep a quotient of zeros at zero
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|(?:\b[a-z]\.){2,}|\b(?:st|dr|mr|mrs|ms|jr|sr|vs)\.|\d+(?:[.,:]\d+)+"
    r"|\w+(?:[-&/_.']\w+)*|[^\w\s]"
)
_REPLACED: dict[str, str] = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}
_REMOVED = frozenset(".?!,:;-'\"`…\u2018\u2019\u201c\u201d")  # punctuation that the evaluation takes out
# It means to take brackets out as well, but under the names that they have before the text becomes lower case.
_REPLACED |= {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


class CaptionScores(NamedTuple):
    """Scores by metric name."""

    corpus: dict[str, float]  # of all captions together
    each: dict[str, list[float]]  # of each caption, in the order of the captions; their mean is the corpus score of
    # ROUGE-L and CIDEr, but not of BLEU


def words(text: str) -> Tokens:
    """Return the tokens of a caption: lower case, clitics apart ("do n't"), punctuation left out, brackets as words."""
    spaced = _CLITIC.sub(r" \1", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    found: list[str] = [token for token in _TOKEN.findall(spaced) if token not in _REMOVED]
    return tuple(part for token in found for part in _REPLACED.get(token, token).split())


def score(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], Tokens] = words,
) -> CaptionScores:
    """Return BLEU-1 to BLEU-4, ROUGE-L and CIDEr, as shares (CIDEr: up to 10).

    Args:
        captions: one for each clip. references: one or more of the same clip.

    Raises:
        ValueError: no caption, or a clip without a reference.
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"{len(captions)} captions and {len(references)} lists of references; each caption needs one or more."
        )
    ours = [tokenize(text) for text in captions]
    theirs = [[tokenize(text) for text in own] for own in references]
    bleu_corpus, bleu_each = bleu(ours, theirs)
    each = {f"bleu_{n + 1}": bleu_each[n] for n in range(ORDER)}
    each |= {
        "rouge_l": [rouge_l(one, own) for one, own in zip(ours, theirs, strict=True)],
        "cider": cider(ours, theirs),
    }
    corpus = {f"bleu_{n + 1}": bleu_corpus[n] for n in range(ORDER)}
    corpus |= {name: sum(each[name]) / len(ours) for name in ("rouge_l", "cider")}
    return CaptionScores(corpus, each)


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[list[float], list[list[float]]]:
    """Return BLEU-1 to BLEU-4 of the corpus, and of each caption by order. Source: the COCO evaluation ("closest").

    The brevity penalty takes the reference whose length is closest to the caption's, the shorter one of two.
    """
    counts = [_bleu_counts(one, own) for one, own in zip(captions, references, strict=True)]
    total = [sum(column) for column in zip(*counts, strict=True)]
    each = [_bleu_of(one) for one in counts]
    return _bleu_of(total), [list(column) for column in zip(*each, strict=True)]


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """Return the F-score of the longest common subsequence, with the best precision and the best recall of any.

    Source: the COCO evaluation (beta 1.2).
    """
    common = [_common_length(caption, own) for own in references]
    # An empty text counts as one (empty) word there.
    precision = max(common) / max(1, len(caption))
    recall = max(n / max(1, len(own)) for n, own in zip(common, references, strict=True))
    if not precision or not recall:
        return float(caption == () and () in references)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def cider(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return CIDEr-D of each caption, from 0 to 10; papers print 100 times the mean.

    Counts are clipped to the reference's and lengths that differ are penalised. How rare an n-gram is, is counted over
    the references of this very corpus, so a score depends on all of them, and is 0 for a corpus of one clip.

    Source: arXiv:1411.5726, section 4.1 (CIDEr-D), as in the COCO evaluation.
    """
    grams = [[_grams(text) for text in own] for own in references]
    frequency = Counter(gram for own in grams for gram in set().union(*own))
    log_total = math.log(len(references))

    def vectors(counts: Grams) -> list[dict[tuple[str, ...], float]]:
        found: list[dict] = [{} for _ in range(ORDER)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (log_total - math.log(max(1.0, frequency[gram])))
        return found

    scores = []
    for caption, own in zip(captions, grams, strict=True):
        hypothesis, counts = vectors(mine := _grams(caption)), _num_bigrams(mine)
        each = [_cosine(hypothesis, vectors(text), counts - _num_bigrams(text)) for text in own]
        scores.append(10 * sum(each) / len(each))
    return scores


def _bleu_counts(caption: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Return length, length of the closest reference, n-grams of each order, and how many of them a reference has."""
    mine, largest = _grams(caption), Counter()
    for own in references:
        largest |= _grams(own)
    closest = min((abs(len(own) - len(caption)), len(own)) for own in references)[1]
    found = mine & largest
    right = [sum(count for gram, count in found.items() if len(gram) == n) for n in range(1, ORDER + 1)]
    return [len(caption), closest, *(max(0, len(caption) - n + 1) for n in range(1, ORDER + 1)), *right]


def _bleu_of(counts: Sequence[int]) -> list[float]:
    length, closest, guesses, right = counts[0], counts[1], counts[2 : 2 + ORDER], counts[2 + ORDER :]
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDER):
        product *= (right[n] + _TINY) / (guesses[n] + _SMALL)
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def _cosine(ours: list[dict], theirs: list[dict], difference: int) -> float:
    """Return the mean over the orders of the clipped cosine, times the penalty for a `difference` in length."""
    total = 0.0
    for mine, own in zip(ours, theirs, strict=True):
        dot = sum(min(value, own[gram]) * own[gram] for gram, value in mine.items() if gram in own)
        norm = math.sqrt(sum(value**2 for value in mine.values()) * sum(value**2 for value in own.values()))
        total += dot / norm if norm else 0.0
    return total / ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))


def _grams(tokens: Tokens) -> Grams:
    return Counter(tokens[start : start + n] for n in range(1, ORDER + 1) for start in range(len(tokens) - n + 1))


def _num_bigrams(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)  # what the evaluation takes for the length


def _common_length(a: Tokens, b: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for place, other in enumerate(b, 1):
            before, row[place] = row[place], before + 1 if token == other else max(row[place], row[place - 1])
    return row[-1]
