"""A trained run in Python: videos and texts in, embeddings and scores out.

Axes: B videos, N texts, E embedding, T frames, H W pixels, L text length.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vlp import config
from vlp.data.decode import DecodeError
from vlp.data.probe import ProbeError, probe
from vlp.data.text import Tokenizer
from vlp.forward import ForwardPass, Graph
from vlp.training import checkpoint, prepare, state, stored_config
from vlp.training.assemble import assemble
from vlp.types import Batch, nothing_more


class Loaded:
    """The model of a run with its tokenizer, in evaluation mode; with averaged weights where the run kept them.

    Args:
        run: the run's directory.

    Raises:
        ValueError: there is no run, or no valid checkpoint in it.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "config.yaml").exists():
            raise ValueError(f"{run}: there is no run here (no config.yaml); train one, or name another directory.")
        stored, refused = checkpoint.newest_valid(run / "checkpoints")
        if stored is None:
            raise ValueError(f"{run}: there is no valid checkpoint {refused or ''}; train the run further.")
        self.cfg = stored_config.read(run)
        messages = config.check(self.cfg)  # the file may come from a stranger: it is data, checked like any config
        if messages:
            raise ValueError(f"{run / 'config.yaml'}: {'; '.join(messages)}")
        self.step = stored.step
        self.model = self._model(stored)
        self.tokenizer: Tokenizer = prepare.tokenizer(self.cfg, run, ())
        self.graph = Graph(self.model, fields=Batch._fields, views={})

    def embed_video(self, videos: Sequence[str | Path]) -> Tensor:
        """Return unit vectors [B, E] of video or image files.

        Raises:
            ValueError: a file that cannot be decoded, with the reason.
        """
        frames = torch.stack([self._frames(Path(video)) for video in videos])
        return self._take("video_embed", frames, [""] * len(videos))

    def embed_windows(self, video: str | Path, *, window_s: float) -> tuple[list[tuple[float, float]], Tensor]:
        """Return the windows (start, end) in seconds that cover a video, and a unit vector [N, E] of each.

        The windows are equal and about `window_s` long; a shorter video, or an image, is one.

        Raises:
            ValueError: a file that cannot be decoded, with the reason.
        """
        path = Path(video)
        data = path.read_bytes()
        try:
            facts = probe(data)
            count = max(1, round(facts.duration_s / window_s))
            length = facts.duration_s / count
            choose = config.build(self.cfg.clip.sampling_test)
            times = [choose(length, facts.fps, None) + length * number for number in range(count)]
            look = config.build(self.cfg.clip.decoder)
            frames = look(data, np.concatenate(times), short_side=self.cfg.clip.short_side).frames
        except (ProbeError, DecodeError) as error:
            raise ValueError(f"{path}: {error}") from error
        for node in self.cfg.clip.transforms_test:
            frames = config.build(node)(frames, None)
        parts = np.split(frames, np.cumsum([len(own) for own in times])[:-1])
        embeds = [self._take("video_embed", torch.from_numpy(part.copy())[None], [""]) for part in parts]
        return [(length * number, length * (number + 1)) for number in range(count)], torch.cat(embeds)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [N, E] of texts."""
        frames = torch.zeros(len(texts), 1, self.cfg.clip.size, self.cfg.clip.width, 3, dtype=torch.uint8)
        return self._take("text_embed", frames, texts)

    def similarity(self, videos: str | Path | Sequence[str | Path], texts: Sequence[str]) -> Tensor:
        """Return cosines [B, N], or [N] for a single video."""
        single = isinstance(videos, str | Path)
        embeds = self.embed_video([videos] if single else videos)  # type: ignore[list-item]
        scores = embeds @ self.embed_text(texts).T
        return scores[0] if single else scores

    def _model(self, stored: checkpoint.Stored) -> nn.Module:
        system = assemble(self.cfg)
        trained = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
        state.fill(trained, stored, averaged=True)
        return system.model.eval()

    def _frames(self, path: Path) -> Tensor:
        """Return the frames [T, H, W, 3] that evaluation would see."""
        data = path.read_bytes()
        clip = self.cfg.clip
        try:
            facts = probe(data)
            times_s = config.build(clip.sampling_test)(facts.duration_s, facts.fps, None)
            frames = config.build(clip.decoder)(data, times_s, short_side=clip.short_side).frames
        except (ProbeError, DecodeError) as error:
            raise ValueError(f"{path}: {error}") from error
        for node in clip.transforms_test:
            frames = config.build(node)(frames, None)
        return torch.from_numpy(np.ascontiguousarray(frames))

    @torch.inference_mode()
    def _take(self, name: str, frames: Tensor, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer.encode(list(texts))
        size, time = frames.shape[:2]
        batch = Batch(
            frames=frames,
            frame_mask=torch.ones(size, time, dtype=torch.bool),
            times_s=torch.zeros(size, time),
            text_ids=encoded.ids,
            text_mask=encoded.mask,
            word_ids=encoded.word_ids,
            **nothing_more(size),
            valid=torch.ones(size, dtype=torch.bool),
            status=torch.zeros(size, dtype=torch.int64),
            sample_id=torch.arange(size),
            key=torch.zeros(size, dtype=torch.int64),
        )
        return ForwardPass(self.model, batch, self.graph).take(name)
