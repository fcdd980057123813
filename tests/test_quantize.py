"""Vectors to codes, their gradient, and what keeps both together. Axes: B clips, T frames, h w cells, D E widths."""

import torch
import torch.nn.functional as F

from vlp.layers.quantize import Quantizer
from vlp.objectives.commitment import Commitment

B, T, H, W, D, E, K = 2, 3, 2, 3, 5, 4, 7
VALID = torch.tensor([True, False])
FRAMES = torch.tensor([[True, True, False], [True, True, True]])


def quantized():
    torch.manual_seed(0)
    quantizer, x = Quantizer(dim=D, num_codes=K, code_dim=E), torch.randn(B, T, H, W, D, requires_grad=True)
    torch.nn.init.normal_(quantizer.turn.weight)
    return quantizer, x, quantizer(x)


def test_codes_are_those_of_the_least_distance():
    quantizer, x, found = quantized()
    near, table = F.normalize(quantizer.down(x), dim=-1), F.normalize(quantizer.turn(quantizer.table), dim=-1)
    for place in torch.ones(B, T, H, W).nonzero().tolist():
        distances = [float((near[tuple(place)] - code).detach().norm()) for code in table]
        assert int(found.codes[tuple(place)]) == distances.index(min(distances))


def test_what_goes_on_is_the_code_and_the_gradient_is_that_of_the_input():
    quantizer, x, found = quantized()
    torch.testing.assert_close(found.x, quantizer.up(F.normalize(quantizer.turn(quantizer.table), dim=-1)[found.codes]))
    (through,) = torch.autograd.grad(found.x.sum(), x, retain_graph=True)
    (straight,) = torch.autograd.grad(quantizer.up(F.normalize(quantizer.down(x), dim=-1)).sum(), x)
    torch.testing.assert_close(through, straight)


def test_codes_that_nothing_chose_move_with_those_that_were():
    quantizer, _, found = quantized()
    unused = sorted(set(range(K)) - set(found.codes.flatten().tolist()))
    assert unused and "table" not in dict(quantizer.named_parameters())
    before, table = F.normalize(quantizer.turn(quantizer.table), dim=-1).detach(), quantizer.table.clone()
    (gradient,) = torch.autograd.grad(found.x.square().sum(), quantizer.turn.weight)
    with torch.no_grad():
        quantizer.turn.weight -= 0.1 * gradient
    moved = (F.normalize(quantizer.turn(quantizer.table), dim=-1) - before).norm(dim=1)
    assert (moved[unused] > 1e-4).all() and torch.equal(quantizer.table, table)


def test_codes_start_where_they_are_put():
    quantizer, _, _ = quantized()
    there = F.normalize(torch.randn(K, E), dim=-1)
    torch.nn.init.normal_(quantizer.turn.weight)
    quantizer.place(there)
    torch.testing.assert_close(quantizer.turn(quantizer.table), there)


def test_commitment_equals_the_reference_and_ignores_what_is_not_there():
    _, _, found = quantized()
    term = Commitment(pull=0.5)(found, FRAMES, VALID)
    by_hand = 1.5 * (found.near - found.chosen)[0, :2].square().sum(-1).mean()
    torch.testing.assert_close(term.total, by_hand)
    assert int(term.count) == 1
    dirty = found._replace(near=found.near.masked_fill(~FRAMES[..., None, None, None], 9.0))
    torch.testing.assert_close(Commitment(pull=0.5)(dirty, FRAMES, VALID).total, term.total)


def test_commitment_moves_cells_less_than_codes():
    _, _, found = quantized()
    near, chosen = torch.autograd.grad(Commitment(pull=0.25)(found, FRAMES, VALID).total, [found.near, found.chosen])
    torch.testing.assert_close(near, -0.25 * chosen)
