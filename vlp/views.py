"""Named corruptions of a step: each replaces some batch fields or quantities, and leaves the rest as it is.

A view's parameters name what it reads; `writes` names what it returns, in order. All draws come from `key`, so a view
does the same to a sample on every rank, at every batch position, after every restart.

Axes: B clips, G clips of all ranks, T frames or grid steps, U frames of a step, H W grid cells, L text length, N cells,
D width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from vlp import dist, ops
from vlp.types import IGNORE_INDEX, AttentionMass, Grid, Tokens


class MaskWords:
    """Replace words by [MASK] and ask for them back; at least one word of every caption.

    Args:
        prob: share of the words to be predicted, in (0, 1].
        mask_id: id of the mask token. vocab_size: random replacements are drawn below it.
        whole_word: mask all pieces of a word together.
        mask_share, random_share: of the chosen words, how many become [MASK] or a random token; the rest stay.

    Source: arXiv:1810.04805, 3.1. Deviation: an exact share of each caption, where BERT draws each token by itself.
    """

    writes = ("text_ids", "labels")
    detached = ()

    def __init__(
        self,
        *,
        prob: float,
        mask_id: int | None,
        vocab_size: int,
        whole_word: bool = True,
        mask_share: float = 0.8,
        random_share: float = 0.1,
    ) -> None:
        _check_share("prob", prob)
        if mask_id is None:
            raise ValueError(
                "mask_id=null: this tokenizer has no mask token; drop the view or choose another tokenizer."
            )
        if not (mask_share >= 0 and random_share >= 0 and mask_share + random_share <= 1):
            raise ValueError(f"mask_share={mask_share} and random_share={random_share} must add up to at most 1.")
        self.prob, self.mask_id, self.vocab_size, self.whole_word = prob, mask_id, vocab_size, whole_word
        self.mask_share, self.random_share = mask_share, random_share

    def __call__(self, text_ids: Tensor, word_ids: Tensor, valid: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return (text_ids, labels), both [B, L] int64; labels are IGNORE_INDEX where nothing is asked."""
        num_tokens = text_ids.shape[1]
        positions = torch.arange(num_tokens, device=text_ids.device).expand_as(text_ids)
        units = word_ids if self.whole_word else torch.where(word_ids >= 0, positions, -1)  # [B, L]
        inside = units >= 0
        unit_draws = ops.uniform(ops.fold(key, 1), num_tokens)  # [B, L], one a unit
        exists = _units_present(units)  # [B, L]
        counts = (exists.sum(1) * self.prob).round().clamp(min=1).long()  # [B]
        chosen_units = ops.choose(unit_draws.masked_fill(~exists, -1.0), counts)
        chosen = chosen_units.gather(1, units.clamp(min=0)) & inside & valid[:, None]  # [B, L]
        fate = ops.uniform(ops.fold(key, 2), num_tokens)
        random_ids = (ops.uniform(ops.fold(key, 3), num_tokens) * self.vocab_size).long()
        replaced = torch.where(fate < self.mask_share + self.random_share, random_ids, text_ids)
        replaced = torch.where(fate < self.mask_share, self.mask_id, replaced)
        return torch.where(chosen, replaced, text_ids), torch.where(chosen, text_ids, IGNORE_INDEX)


class Pattern(Protocol):
    """Which cells of a grid to hide."""

    def __call__(self, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return [B, T, H, W] bool, True = hidden, for keys [B] and shape (T, H, W)."""
        ...


class RandomCells:
    """Hide cells independently. Source: arXiv:2205.09113 (random space-time masking)."""

    def __init__(self, *, ratio: float) -> None:
        self.ratio = _check_share("ratio", ratio)

    def __call__(self, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        t, h, w = shape
        return rearrange(_highest(ops.uniform(key, t * h * w), self.ratio), "b (t h w) -> b t h w", t=t, h=h)


class Tubes:
    """Hide the same cells in every frame, so that a still copy is not left in the next. Source: arXiv:2203.12602."""

    def __init__(self, *, ratio: float) -> None:
        self.ratio = _check_share("ratio", ratio)

    def __call__(self, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        t, h, w = shape
        return repeat(_highest(ops.uniform(key, h * w), self.ratio), "b (h w) -> b t h w", t=t, h=h)


class Blocks:
    """Hide cells in space-time boxes, box after box until the ratio is reached.

    Source: arXiv:2111.12681 (blockwise masking); boxes span a quarter to two thirds of each axis. Deviation: an exact
    number of cells, so that every sample weighs the same.
    """

    def __init__(self, *, ratio: float, num_boxes: int = 16) -> None:
        if num_boxes < 1:
            raise ValueError(f"num_boxes={num_boxes} must be at least 1.")
        self.ratio, self.num_boxes = _check_share("ratio", ratio), num_boxes

    def __call__(self, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        inside = [self._spans(ops.fold(key, axis), length) for axis, length in enumerate(shape)]  # each [B, boxes, n]
        boxes = inside[0][:, :, :, None, None] & inside[1][:, :, None, :, None] & inside[2][:, :, None, None, :]
        order = torch.arange(self.num_boxes, 0, -1, device=key.device)  # the first box counts most
        rank = (boxes * order[None, :, None, None, None]).amax(1)  # [B, T, H, W]
        rank = rearrange(rank, "b t h w -> b (t h w)")
        jitter = ops.uniform(ops.fold(key, 9), rank.shape[1])  # breaks ties inside a box
        return rearrange(_highest(rank + jitter, self.ratio), "b (t h w) -> b t h w", t=shape[0], h=shape[1])

    def _spans(self, key: Tensor, length: int) -> Tensor:
        draws = rearrange(ops.uniform(key, 2 * self.num_boxes), "b (n two) -> b n two", two=2)
        size = (length * (1 / 4 + draws[..., 0] * (2 / 3 - 1 / 4))).round().clamp(min=1)  # [B, boxes]
        start = (draws[..., 1] * (length - size + 1)).floor()
        cells = torch.arange(length, device=key.device)
        return (cells >= start[..., None]) & (cells < (start + size)[..., None])  # [B, boxes, length]


class MaskPatches:
    """Choose grid cells of a video whose content the encoder must not see; it gets them as `hidden`.

    Args:
        pattern: RandomCells, Tubes or Blocks.
        patch_size: pixels a side of a grid cell. tubelet_size: frames a grid step.
    """

    writes = ("hidden",)
    detached = ()

    def __init__(self, *, pattern: Pattern, patch_size: int, tubelet_size: int = 1) -> None:
        self.pattern, self.patch_size, self.tubelet_size = pattern, patch_size, tubelet_size

    def __call__(self, frames: Tensor, frame_mask: Tensor, key: Tensor) -> tuple[Tensor]:
        """Return (hidden,): [B, T', H', W'] bool, True = hidden; never a cell of a padding frame."""
        num_frames, height, width = frames.shape[1:4]
        frame_mask = F.pad(frame_mask, (0, -num_frames % self.tubelet_size))
        real = rearrange(frame_mask, "b (t u) -> b t u", u=self.tubelet_size).any(-1)  # [B, T'], as the encoders do
        hidden = self.pattern(key, (real.shape[1], height // self.patch_size, width // self.patch_size))
        return (hidden & real[:, :, None, None],)


class MaskBoth:
    """Hide words and the pixels of grid cells: of some clips by pattern, of the others where attention is high.

    What is hidden of a frame is black in the pixels themselves, and a word is always replaced by [MASK].

    Args:
        words, patches: what hides by pattern; `words` with mask_share 1 and random_share 0.
        attended_share: share of the clips that are masked by attention.
        prob: share of all words and cells of a clip that attention hides.

    Source: arXiv:2111.12681, 3.3 (blockwise and attended masking). Deviations: padding queries do not vote; an exact
    share of each caption is hidden, as in MaskWords.
    """

    writes = ("text_ids", "labels", "frames", "hidden_pixels")
    detached = ("attention_mass",)

    def __init__(self, *, words: MaskWords, patches: MaskPatches, attended_share: float = 0.5, prob: float = 0.15):
        if not 0 <= attended_share <= 1:
            raise ValueError(f"attended_share={attended_share} is not a share; it must be between 0 and 1.")
        self.words, self.patches = words, patches
        self.attended_share, self.prob = attended_share, _check_share("prob", prob)

    def __call__(
        self,
        text_ids: Tensor,
        word_ids: Tensor,
        frames: Tensor,
        frame_mask: Tensor,
        attention_mass: AttentionMass,
        valid: Tensor,
        key: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (text_ids [B, L], labels [B, L], frames [B, T, H, W, 3], hidden cells [B, T, h, w] bool)."""
        ids, labels = self.words(text_ids, word_ids, valid, ops.fold(key, 1))
        (hidden,) = self.patches(frames, frame_mask, ops.fold(key, 2))
        chosen, seen = self._by_attention(attention_mass, word_ids, frame_mask, ops.fold(key, 3))
        attended = ops.uniform(ops.fold(key, 4), 1)[:, 0] < self.attended_share  # [B]
        chosen = chosen & valid[:, None]
        ids = torch.where(attended[:, None], text_ids.masked_fill(chosen, self.words.mask_id), ids)
        labels = torch.where(attended[:, None], torch.where(chosen, text_ids, IGNORE_INDEX), labels)
        hidden = torch.where(attended[:, None, None, None], seen, hidden)
        size = {"p": frames.shape[2] // hidden.shape[2], "q": frames.shape[3] // hidden.shape[3]}
        pixels = repeat(hidden, "b t h w -> b t (h p) (w q) 1", **size)
        return ids, labels, frames.masked_fill(pixels, 0), hidden

    def _by_attention(
        self, mass: AttentionMass, word_ids: Tensor, frame_mask: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw words [B, L] and cells [B, T, h, w] without replacement, in proportion to the mass of attention."""
        num_frames, height, width = mass.video.x.shape[1:4]
        cells = rearrange(mass.video.x, "b t h w 1 -> b (t h w)")
        real = torch.cat([word_ids >= 0, repeat(frame_mask, "b t -> b (t s)", s=height * width)], dim=1)  # [B, N]
        weight = torch.cat([mass.text, cells], dim=1).detach().float()
        noise = -torch.log(-torch.log(ops.uniform(key, real.shape[1]).clamp(1e-7, 1 - 1e-7)))
        scores = (weight.clamp(min=1e-12).log() + noise).masked_fill(~real, -torch.inf)
        chosen = ops.choose(scores, (real.sum(1) * self.prob).round().clamp(min=1).long()) & real
        words, cells = chosen.split([word_ids.shape[1], num_frames * height * width], dim=1)
        return words, rearrange(cells, "b (t h w) -> b t h w", t=num_frames, h=height)


class ReverseFrames:
    """Play each clip backwards; padding frames stay at the end."""

    writes = ("frames",)
    detached = ()

    def __call__(self, frames: Tensor, frame_mask: Tensor) -> tuple[Tensor]:
        """Return (frames,): [B, T, H, W, 3] uint8."""
        backwards = _backwards(frame_mask)
        return (frames[_rows(backwards), backwards],)


class ReverseEncoded:
    """Play each clip backwards after the video encoder: as ReverseFrames, and cheaper, for encoders frame by frame.

    With an encoder that sees several frames at once this is not the clip played backwards: use ReverseFrames there.
    """

    writes = ("encoded",)
    detached = ()

    def __call__(self, encoded: Grid) -> tuple[Grid]:
        """Return (encoded,): cells [B, T, H, W, D] and class tokens [B, 0 or T, D] in reverse order of frames."""
        x, mask, prefix = encoded
        backwards = _backwards(mask)
        if prefix.shape[1]:
            prefix = prefix[_rows(backwards), backwards]
        return (Grid(x[_rows(backwards), backwards], mask, prefix),)


class WrongText:
    """Give each video the text of another clip, hard ones more often, from the batch of all ranks.

    Args:
        hard: draw in proportion to exp(scaled similarity), detached; else uniformly.
        place: 0 for the first text that is drawn, 1 for the second; views of different places give different texts.

    Source: arXiv:2107.07651, 3.2. Deviation: drawn from all ranks' clips, so that the loss does not depend on their
    number.
    """

    writes = ("text", "has_wrong_text")
    detached = ("video_embed", "text_embed", "logit_scale")
    stream = "wrong_text"  # all places are places of one draw

    def __init__(self, *, hard: bool = True, place: int = 0) -> None:
        if place < 0:
            raise ValueError(f"place={place} must be 0 or more.")
        self.hard, self.place = hard, place

    def __call__(
        self, text: Tokens, video_embed: Tensor, text_embed: Tensor, logit_scale: Tensor, valid: Tensor, key: Tensor
    ) -> tuple[Tokens, Tensor]:
        """Return the other clip's text tokens [B, L, D] and whether there was another clip [B] bool."""
        similarity = _similarity(video_embed, text_embed, logit_scale) if self.hard else None
        index, found = _draw_other(similarity, valid, key, self.place)
        x, mask = dist.gather_tokens(text.x, text.mask)  # [G, L, D]
        return Tokens(x[index], mask[index]), found


class RandomWrongText:
    """Give each video the text of any other clip: WrongText for families without embeddings of their own.

    Args:
        place: as in WrongText.
    """

    writes = ("text_ids", "text_mask", "word_ids", "has_wrong_text")
    detached = ()
    stream = "wrong_text"

    def __init__(self, *, place: int = 0) -> None:
        self.place = place

    def __call__(
        self, text_ids: Tensor, text_mask: Tensor, word_ids: Tensor, valid: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, mask and words [B, L] of another clip's text, and whether there was another clip [B] bool."""
        index, found = _draw_other(None, valid, key, self.place)
        ids, mask = dist.gather_tokens(text_ids, text_mask)
        words, _ = dist.gather_tokens(word_ids, text_mask)
        return ids[index], mask[index], words[index], found


class WrongVideo:
    """Give each text the video of another clip; see WrongText."""

    writes = ("video", "has_wrong_video")
    detached = ("video_embed", "text_embed", "logit_scale")

    def __init__(self, *, hard: bool = True) -> None:
        self.hard = hard

    def __call__(
        self, video: Grid, video_embed: Tensor, text_embed: Tensor, logit_scale: Tensor, valid: Tensor, key: Tensor
    ) -> tuple[Grid, Tensor]:
        """Return the other clip's video grid [B, T, H, W, D] and whether there was another clip [B] bool."""
        similarity = _similarity(text_embed, video_embed, logit_scale) if self.hard else None
        index, found = _draw_other(similarity, valid, key)
        return Grid(*(field[index] for field in dist.gather_grid(*video))), found


def _backwards(mask: Tensor) -> Tensor:
    """Return for each place of mask [B, T] the place to read, int64: real frames in reverse, padding as it is."""
    places = torch.arange(mask.shape[1], device=mask.device)
    source = mask.sum(1, keepdim=True) - 1 - places  # [B, T], negative at the padding
    return torch.where(source >= 0, source, places)


def _rows(places: Tensor) -> Tensor:
    """Return [B, 1], the row numbers that go with places [B, T] in indexing."""
    return torch.arange(len(places), device=places.device)[:, None]


def _units_present(units: Tensor) -> Tensor:
    """Return [B, L] bool: does unit number j occur in the row of `units` [B, L] (-1 = none)?"""
    numbers = torch.arange(units.shape[1], device=units.device)
    return (units[:, :, None] == numbers).any(1)


def _highest(scores: Tensor, ratio: float) -> Tensor:
    """Return [B, N] bool, True at the share `ratio` of highest scores [B, N]; as many in each row, at least one."""
    count = max(1, round(ratio * scores.shape[1]))
    return ops.choose(scores, torch.full(scores.shape[:1], count, device=scores.device))


def _similarity(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled similarity of this rank's rows [B, D] to all ranks' columns [G, D], without gradient."""
    return logit_scale.detach() * rows.detach() @ dist.gather(columns.detach()).T  # [B, G]


def _draw_other(similarity: Tensor | None, valid: Tensor, key: Tensor, place: int = 0) -> tuple[Tensor, Tensor]:
    """Draw for each row [B] another valid clip of all ranks [G], by Gumbel noise that is a function of the two keys.

    Of a draw without replacement it is the one at `place`.
    """
    all_keys, all_valid = dist.gather(key), dist.gather(valid)  # [G]
    noise = -torch.log(-torch.log(ops.pair_uniform(key, all_keys).clamp(1e-7, 1 - 1e-7)))  # [B, G]
    scores = noise if similarity is None else noise + similarity.float()
    allowed = all_valid[None, :] & (key[:, None] != all_keys[None, :])
    found = valid & (allowed.sum(1) > place)
    best = scores.masked_fill(~allowed, -torch.inf).topk(min(place + 1, len(all_keys)), dim=1).indices  # [B, place + 1]
    return best[:, -1], found


def _check_share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is not a share; it must be above 0 and at most 1.")
    return value
