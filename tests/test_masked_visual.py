"""Cross-entropy of the visual codes of hidden cells."""

import pytest
import torch
from torch import Tensor, nn

from vlp.objectives.masked_visual import MaskedVisual
from vlp.types import Grid

VALID = torch.tensor([True, False, True])
FRAME_MASK = torch.tensor([[True, True], [True, True], [True, False]])
HIDDEN = torch.zeros(3, 2, 2, 3, dtype=torch.bool)
HIDDEN[0, 0, 0], HIDDEN[0, 1, 1, 2], HIDDEN[1], HIDDEN[2, 0, 1, 1] = True, True, True, True


class Brightness(nn.Module):
    """Codes 0 to 6 by the first pixel of a cell; frames that are not real count as black."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        return (frames[:, :, ::2, ::2, 0] * frame_mask[:, :, None, None] * self.weight).long() % 7


def make() -> tuple[MaskedVisual, Tensor, Tensor]:
    torch.manual_seed(0)
    objective = MaskedVisual(dim=5, num_codes=7, tokenizer=Brightness())
    return objective, torch.randn(3, 2, 2, 3, 5, requires_grad=True), torch.randint(256, (3, 2, 4, 6, 3)).byte()


def term(objective: MaskedVisual, x: Tensor, frames: Tensor):
    return objective(Grid(x, FRAME_MASK, x[:, 0, 0, :0]), HIDDEN, frames, FRAME_MASK, VALID)


def by_hand(objective: MaskedVisual, x: Tensor, frames: Tensor) -> Tensor:
    total = torch.zeros(())
    for b, t, h, w in HIDDEN.nonzero().tolist():
        if VALID[b]:
            code = int(frames[b, t, 2 * h, 2 * w, 0]) % 7
            total = total - objective.head(x[b, t, h, w]).log_softmax(-1)[code]
    return total


def test_value_and_gradient_equal_the_reference():
    objective, x, frames = make()
    result, reference = term(objective, x, frames), by_hand(objective, x, frames)
    torch.testing.assert_close(result.total, reference)
    assert int(result.count) == 5 == int(objective.count(HIDDEN, VALID))
    inputs = [x, *objective.head.parameters()]
    for one, two in zip(torch.autograd.grad(result.total, inputs), torch.autograd.grad(reference, inputs), strict=True):
        torch.testing.assert_close(one, two)


def test_open_cells_and_masked_slots_change_nothing():
    objective, x, frames = make()
    keep = HIDDEN & VALID[:, None, None, None]
    dirty, noise = x.detach().masked_fill(~keep[..., None], torch.nan), frames.clone()
    noise[~VALID] = 0
    clean, total = term(objective, x, frames).total, term(objective, dirty, noise).total
    torch.testing.assert_close(total, clean, rtol=0, atol=0)
    parameters = list(objective.head.parameters())
    for one, two in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(clean, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_tokenizer_knows_which_frames_are_real():
    objective, x, frames = make()
    hidden = torch.zeros_like(HIDDEN).index_fill(1, torch.tensor(1), True)
    result = objective(Grid(x, FRAME_MASK, x[:, 0, 0, :0]), hidden, frames, FRAME_MASK, torch.arange(3) == 2)
    torch.testing.assert_close(result.total, -objective.head(x[2, 1]).log_softmax(-1)[..., 0].sum())


def test_nothing_hidden_gives_zero_with_gradients_of_zero():
    objective, x, frames = make()
    nothing = torch.zeros_like(HIDDEN)
    result = objective(Grid(x, FRAME_MASK, x[:, 0, 0, :0]), nothing, frames, FRAME_MASK, VALID)
    result.total.backward()
    assert result.total.item() == 0 and int(result.count) == 0
    assert all(not p.grad.any() for p in [x, *objective.head.parameters()])


def test_the_tokenizer_is_frozen():
    assert not any(p.requires_grad for p in make()[0].tokenizer.parameters())


def test_another_grid_is_refused_with_both_sizes():
    objective, x, frames = make()
    with pytest.raises(ValueError, match=r"gives a grid of \(2, 2, 2\), the encoder one of \(2, 2, 3\)"):
        term(objective, x, frames[:, :, :, :4])
