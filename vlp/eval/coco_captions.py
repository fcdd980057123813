"""METEOR and SPICE, and all caption metrics by the public COCO evaluation: optional, because they start Java.

`pip install vlp[captions]` brings `pycocoevalcap`. SPICE fetches its language models from the network at first use.
"""

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from vlp.eval.caption_metrics import CaptionScores

_SCORERS = {
    "bleu": ("pycocoevalcap.bleu.bleu", "Bleu"),
    "rouge_l": ("pycocoevalcap.rouge.rouge", "Rouge"),
    "cider": ("pycocoevalcap.cider.cider", "Cider"),
    "meteor": ("pycocoevalcap.meteor.meteor", "Meteor"),
    "spice": ("pycocoevalcap.spice.spice", "Spice"),
}
ALL = tuple(_SCORERS)


def why_not(metrics: Sequence[str] = ALL) -> str:
    """Return why these metrics cannot be computed here, or ''; each scores one caption, so that Java really runs."""
    try:
        score(["a cat sleeps"], [["a cat is sleeping", "a cat sleeps"]], metrics=metrics)
    except ValueError as error:
        return str(error)
    return ""


def score(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, metrics: Sequence[str] = ALL
) -> CaptionScores:
    """Return the scores of the public code, tokenised in Java, as `vlp.eval.caption_metrics.score` does.

    Raises:
        ValueError: it is not installed, there is no Java, an unknown metric, or Java failed (its reason follows).
    """
    problem = _absent()
    unknown = sorted(set(metrics) - _SCORERS.keys())
    if problem or unknown:
        raise ValueError(problem or f"metrics {unknown} are not known; choose from {', '.join(_SCORERS)}.")
    tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    ours = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(captions)})
    theirs = tokenizer.tokenize({n: [{"caption": text} for text in own] for n, own in enumerate(references)})
    corpus: dict[str, float] = {}
    each: dict[str, list[float]] = {}
    for name in metrics:
        try:
            found = _scorer(name).compute_score(theirs, ours)
        # METEOR: an empty answer of a process that died. SPICE: no network for its models, or a Java that is too new.
        except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
            rest = ", ".join(other for other in metrics if other != name)
            what = f"without it: [{rest}]" if rest else "leave it out"
            raise ValueError(f"{name} failed in Java ({error}); {what}.") from error
        _add(name, found, corpus, each)
    return CaptionScores(corpus, each)


def _absent() -> str:
    """Return what is not installed, or ''."""
    try:
        importlib.import_module("pycocoevalcap")
    except ImportError:
        return "pycocoevalcap is not installed (pip install vlp[captions])"
    return "" if shutil.which("java") else "there is no java on the path"


def _scorer(name: str) -> Any:
    module, kind = _SCORERS[name]
    return getattr(importlib.import_module(module), kind)(*([4] if name == "bleu" else []))


def _add(name: str, found: Any, corpus: dict[str, float], each: dict[str, list[float]]) -> None:
    total, parts = found
    if name == "bleu":
        for n in range(4):
            corpus[f"bleu_{n + 1}"], each[f"bleu_{n + 1}"] = float(total[n]), [float(x) for x in parts[n]]
        return
    if name == "spice":
        parts = [part["All"]["f"] for part in parts]
    corpus[name], each[name] = float(total), [float(x) for x in parts]
