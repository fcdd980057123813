"""Softmax and sigmoid contrast in blocks: as the whole matrix, on 1, 2 and 4 ranks, with masked clips on some."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor

from vlp.objectives import pairs
from vlp.objectives.contrastive import Contrastive
from vlp.objectives.sigmoid_contrast import SigmoidContrast

CLIPS, DIM = 12, 5
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool()  # a rank of four has one real clip
KINDS = {"softmax": Contrastive, "sigmoid": lambda **options: SigmoidContrast(init_bias=-3.0, **options)}


def embeddings() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(F.normalize(torch.randn(CLIPS, DIM), dim=1) for _ in range(2))  # type: ignore[return-value]


def work(rank: int, num_ranks: int) -> dict[str, Tensor]:
    pairs.BLOCK = 2  # three blocks a side on each of two ranks
    size = CLIPS // num_ranks
    own, results = slice(rank * size, (rank + 1) * size), {}
    for kind, make in KINDS.items():
        video, text = (x[own].clone().requires_grad_() for x in embeddings())
        objective, scale = make(), torch.tensor(9.0, requires_grad=True)
        total = objective(video, text, scale, VALID[own]).total
        (3 * total).backward()
        values = {"total": total, "video": video.grad, "text": text.grad, "scale": scale.grad}
        values |= {name: p.grad for name, p in objective.named_parameters()}
        results |= {f"{kind} {name}": value for name, value in values.items()}
    return results


def by_hand(kind: str) -> dict[str, Tensor]:
    """The whole matrix of the valid clips, by autograd."""
    video, text = (x.clone().requires_grad_() for x in embeddings())
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    logits, true = scale * video[VALID] @ text[VALID].T, torch.arange(int(VALID.sum()))
    if kind == "softmax":
        total = sum(F.cross_entropy(x, true, reduction="sum") for x in (logits, logits.T)) / 2
    else:
        total = -F.logsigmoid((2 * torch.eye(len(true)) - 1) * (logits + bias)).sum()
    (3 * total).backward()
    values = {"total": total, "video": video.grad, "text": text.grad, "scale": scale.grad}
    return values | ({"bias": bias.grad} if kind == "sigmoid" else {})


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    return on_ranks(work, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_on_ranks_equal_the_whole_matrix(results, kind):
    for name, expected in by_hand(kind).items():
        parts = [result[f"{kind} {name}"] for result in results]
        found = torch.cat(parts) if name in ("video", "text") else torch.stack(parts).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6, msg=name)
