"""How many of a tokenizer's codes are in use.

Axes: B clips, T frames, h w cells, K codes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlp.eval import metrics
from vlp.eval.runner import EvalData, Scorer, collect
from vlp.forward import ForwardPass
from vlp.types import Batch


class CodeUsage:
    """Share of the codes that occur in the split, and the perplexity of their frequencies: 1 where all is one code.

    Args:
        num_codes: K.
    """

    title = "Codes in use"
    borrows: ClassVar = ()
    needs: ClassVar = ("codes", "encoded_mask")

    def __init__(self, *, num_codes: int) -> None:
        self.num_codes = num_codes

    def protocol(self) -> dict[str, Any]:
        return {"num_codes": self.num_codes}

    def begin(self, data: EvalData, *, scorers: Mapping[str, Scorer]) -> None:
        self.counts = torch.zeros(self.num_codes, dtype=torch.int64)

    def update(self, batch: Batch, forward: ForwardPass) -> None:
        codes, real = forward.take("codes").cpu(), forward.take("encoded_mask").cpu()  # [B, T, h, w], [B, T]
        seen = codes[real & batch.valid[:, None]]
        self.counts += torch.bincount(seen.flatten(), minlength=self.num_codes)

    def finish(self) -> dict:
        counts: Tensor = sum(collect(self.counts), torch.zeros(self.num_codes, dtype=torch.int64))
        total = int(counts.sum())
        if not total:
            return {"title": self.title, "rows": [], "examples": []}
        share = counts.double() / total
        perplexity = float(torch.special.entr(share).sum().exp())
        used = metrics.share(counts > 0)
        rows = [
            metrics.row("codes that occur", "codes_used", raw=used, chance=100.0 / self.num_codes, num=total),
            metrics.row("perplexity of the codes", "codes_perplexity", raw=perplexity, chance=1.0, num=total, unit=""),
        ]
        return {"title": self.title, "rows": rows, "examples": []}
