"""Which action does a clip show? Zero-shot, by texts made of the names of the classes.

    names x templates --text encoder--> one unit vector a class (mean over the templates)  . video --> top 1, top 5

Axes: B clips, C classes, P templates, E embedding, N scored clips.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.eval import metrics
from vlp.eval.runner import EvalData, Scorer, collect, with_texts
from vlp.eval.scores import Each
from vlp.forward import ForwardPass
from vlp.types import Batch

# Those of arXiv:2103.00020 for Kinetics-700 (its public prompt list), less those that speak of a photo.
TEMPLATES = (
    "a video of {}.",
    "a video of a person {}.",
    "a video of a person using {}.",
    "a video of a person doing {}.",
    "a video of a person during {}.",
    "a video of a person performing {}.",
    "a video of a person practicing {}.",
    "an example of {}.",
    "an example of a person {}.",
    "an example of a person performing {}.",
    "a demonstration of {}.",
    "a demonstration of a person {}.",
)


class ZeroShotActions:
    """Top-1 and top-5 accuracy, and the mean of the classes' top-1; ties are lost.

    Args:
        classes: the names, or null; classes_file: a text file, one name a line. Exactly one of them. A name is used as
            it stands but for "_" and CamelCase, which become spaces ("ApplyEyeMakeup": "apply eye makeup").
        templates: texts with {} for the name; null takes TEMPLATES.
        field: of the record, which holds the name or the number of the clip's class.
    """

    title = "Zero-shot action recognition"
    borrows: ClassVar = ()
    needs: ClassVar = ("video_embed", "text_embed")

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        classes_file: str | None = None,
        templates: Sequence[str] | None = None,
        field: str = "label",
    ) -> None:
        if (classes is None) == (classes_file is None):
            raise ValueError("give classes, or classes_file, and not both.")
        self.classes = list(classes) if classes is not None else _read(Path(classes_file or ""))
        self.templates = list(TEMPLATES if templates is None else templates)
        self.field = field
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ValueError(f"{len(self.classes)} classes must be at least two, and all different.")
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ValueError("each template needs {} where the name of the class goes.")

    def protocol(self) -> dict[str, Any]:
        return {"prompts": self.templates, "classes": self.classes, "ensemble": "mean of unit vectors"}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.data = data
        self.table: Tensor | None = None  # [C, E]
        self.found: list[tuple[int, int, int]] = []  # sample id, class, rank

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        if self.table is None:
            self.table = self._class_vectors(forward)
        scores = metrics.similarity(forward.take("video_embed").float().cpu(), self.table)  # [B, C]
        for row in batch.valid.nonzero()[:, 0].tolist():
            sample = int(batch.sample_id[row])
            label = self._label(sample)
            rank = int(metrics.ranks(scores[row : row + 1], torch.tensor([label])))
            self.found.append((sample, label, rank))

    def finish(self) -> dict:
        found = sorted(one for part in collect(self.found) for one in part)
        if not found:
            return {"title": self.title, "rows": [], "examples": []}
        ids, labels, ranks = (list(column) for column in zip(*found, strict=True))
        rows, each = [], {}
        for k in (1, 5):
            values = [100.0 * (rank <= k) for rank in ranks]
            chance = metrics.chance_recall(k, len(self.classes))
            each[f"action_top{k}"] = Each(ids, [0] * len(ids), values)
            raw = sum(values) / len(values)
            rows.append(metrics.row(f"top-{k} accuracy", f"action_top{k}", raw=raw, chance=chance, num=len(ids)))
        own = [[rank == 1 for rank, one in zip(ranks, labels, strict=True) if one == label] for label in set(labels)]
        mean = 100 * sum(sum(hits) / len(hits) for hits in own) / len(own)
        chance = metrics.chance_recall(1, len(self.classes))
        rows.append(metrics.row("mean top-1 of classes", "action_mean_class", raw=mean, chance=chance, num=len(own)))
        return {"title": self.title, "rows": rows, "each": each, "examples": []}

    def _class_vectors(self, forward: ForwardPass) -> Tensor:
        """Return unit vectors [C, E], computed in passes of B texts."""
        texts = [template.format(readable(name)) for name in self.classes for template in self.templates]
        size = len(forward.fields["text_ids"])
        parts = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            padded = part + [""] * (size - len(part))
            parts.append(with_texts(forward, self.data, padded).take("text_embed").float().cpu()[: len(part)])
        vectors = torch.cat(parts).unflatten(0, (len(self.classes), len(self.templates)))  # [C, P, E]
        return F.normalize(vectors.mean(1), dim=-1)

    def _label(self, sample: int) -> int:
        """Return the class of a clip. Raises ValueError where its record names none of the classes."""
        value = self.data.meta(sample).get(self.field)
        if isinstance(value, str) and value in self.classes:
            return self.classes.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.classes):
            return value
        raise ValueError(
            f"clip '{self.data.key_of(sample)}': {self.field}={value!r} is none of the {len(self.classes)} classes; "
            "set `field`, or the list of classes."
        )


def readable(name: str) -> str:
    """Return the name of a class as words: "ApplyEyeMakeup" and "apply_eye_makeup" as "apply eye makeup".

    Placeholders of Something-Something lose their brackets: "Moving [something] up" as "moving something up".
    """
    spaced = "".join(
        f" {letter}" if letter.isupper() and place and name[place - 1].islower() else letter
        for place, letter in enumerate(name)
    )
    return " ".join(spaced.replace("_", " ").replace("[", "").replace("]", "").lower().split())


def _read(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes_file={str(path)!r} cannot be read ({error}).") from None
