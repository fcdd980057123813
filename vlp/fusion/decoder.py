"""A caption decoder: words from left to right, with the video in sight.

Axes: B pairs, L words, N video tokens, D width, V vocabulary.
"""

from torch import Tensor, nn

from vlp.layers.block import Block, init_linears
from vlp.layers.grid import AllTokens, PrefixTokens
from vlp.layers.position import LearnedPositions
from vlp.types import Grid


class CaptionDecoder(nn.Module):
    """Causal transformer over the caption, with cross attention to the video.

    The vocabulary head shares its weight with the word embeddings and has no bias. It is a module that owns the weight
    too, since under ZeRO-3 a parameter may be read only inside its owner's forward.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        video_dim: int,
        depth: int,
        num_heads: int,
        max_length: int,
        pad_id: int,
        dropout: float = 0.0,
        reads: AllTokens | PrefixTokens | None = None,
    ) -> None:
        """Build the decoder; `reads`: which video features the words see, all where not given."""
        super().__init__()
        self.dim, self.video_dim = dim, video_dim
        self.reads = reads or AllTokens()
        self.words = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        self.positions = LearnedPositions(length=max_length, dim=dim)
        self.drop = nn.Dropout(dropout)
        self.video_norm = nn.LayerNorm(video_dim)
        self.blocks = nn.ModuleList(
            Block(dim=dim, num_heads=num_heads, dropout=dropout, cross_dim=video_dim, causal=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.words.weight
        init_linears(self.words)

    def forward(self, video: Grid, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Return logits [B, L, V]: place i has seen words 0..i and predicts word i + 1.

        Args:
            video: grid of width D_video.
            text_ids: [B, L] int64, L at most `max_length`; to generate, the words so far.
            text_mask: [B, L] bool, True = real.
        """
        seen = self.reads(video)
        context = self.video_norm(seen.x)  # [B, N, D_video]
        x = self.drop(self.positions(self.words(text_ids)))
        for block in self.blocks:
            x = block(x, text_mask, context, seen.mask)
        return self.head(self.norm(x))
