"""Heads of objectives.

Axes: D width, E outputs.
"""

from torch import nn

from vlp.layers.block import init_linears


def mlp_head(dim: int, num_outputs: int, *, hidden_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """Return dropout, two linear layers and a ReLU between them: features [..., D] -> [..., E]."""
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))
    init_linears(head)
    return head
