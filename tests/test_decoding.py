"""Writers against exhaustive search. Axes: B rows, L text length, V vocabulary."""

import itertools

import pytest
import torch

from vlp.eval.decoding import Beam, Greedy, Limits, Nucleus, Prompt

PAD, EOS, BOS, V = 0, 1, 2, 5
LIMITS = Limits(eos_id=EOS, pad_id=PAD, min_new=1, max_length=5)


def table(seed):
    """Random log-probabilities [B, V, V, V] of a token after the two before it."""
    return torch.randn(3, V, V, V, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def reader(shares, seen=None):
    def next_logits(ids, lengths):
        if seen is not None:
            seen.append(ids.shape)
        rows = torch.arange(len(ids))
        before = torch.where(lengths > 1, ids[rows, (lengths - 2).clamp(min=0)], BOS)
        return shares[rows, before, ids[rows, lengths - 1]]

    return next_logits


def prompt(*running):
    ids = torch.full((3, 1), BOS)
    return Prompt(ids, torch.ones(3, dtype=torch.int64), torch.tensor(running or (True,) * 3), torch.arange(3))


def score(shares, row, tokens, power):
    before = [BOS, BOS, *tokens]
    return sum(shares[row, before[i], before[i + 1], token] for i, token in enumerate(tokens)) / len(tokens) ** power


def best_text(shares, row, power):
    texts = [
        (*middle, EOS)
        for count in range(LIMITS.min_new, LIMITS.max_length - 1)
        for middle in itertools.product([t for t in range(V) if t != EOS], repeat=count)
    ]
    return max(texts, key=lambda tokens: float(score(shares, row, tokens, power)))


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_many_beams_find_the_best_text_of_all(seed, power):
    shares = table(seed)
    written = Beam(num_beams=V**3, length_penalty=power)(reader(shares), prompt(), LIMITS)
    for row in range(3):
        tokens = best_text(shares, row, power)
        assert tuple(written[row, 1 : 1 + len(tokens)].tolist()) == tokens


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_without_penalty_is_greedy_where_the_text_ends(seed):
    shares = table(seed)
    greedy = Greedy()(reader(shares), prompt(), LIMITS)
    again = Nucleus(top_p=1e-9)(reader(shares), prompt(), LIMITS)  # the likeliest token alone is left
    assert greedy.equal(again)
    for row in range(3):
        tokens = greedy[row].tolist()
        expected = [BOS]
        for step in range(LIMITS.max_length - 1):
            logits = shares[row, ([BOS, *expected])[-2], expected[-1]].clone()
            logits[EOS] = -torch.inf if step < LIMITS.min_new else logits[EOS]
            expected.append(int(logits.argmax()))
            if expected[-1] == EOS:
                break
        assert tokens[: len(expected)] == expected


def test_no_text_is_shorter_than_asked():
    shares = torch.full((3, V, V, V), -9.0)
    shares[..., EOS], shares[..., 3] = -0.1, -3.0
    limits = LIMITS._replace(min_new=2)
    for writer in (Greedy(), Beam(num_beams=2), Nucleus()):
        assert (writer(reader(shares), prompt(), limits)[:, 1:3] != EOS).all()


def test_rows_that_are_not_asked_stay_as_they_are():
    for writer in (Greedy(), Beam(num_beams=2), Nucleus()):
        written = writer(reader(table(0)), prompt(True, False, True), LIMITS)
        assert written[1].tolist() == [BOS] + [PAD] * (LIMITS.max_length - 1)


def test_every_pass_has_the_same_shape():
    for writer in (Greedy(), Beam(num_beams=3), Nucleus()):
        seen = []
        writer(reader(table(1), seen), prompt(), LIMITS)
        assert set(seen) == {(3, LIMITS.max_length)}


def test_nucleus_draws_by_share_inside_the_nucleus_and_by_the_key_alone():
    many = 4000
    shares = torch.tensor([0.0, 0.02, 0.5, 0.3, 0.18]).log().expand(many, V)
    ask = Prompt(
        torch.full((many, 1), BOS), torch.ones(many, dtype=torch.int64), torch.ones(many).bool(), torch.arange(many)
    )
    limits = LIMITS._replace(max_length=2)
    first = Nucleus(top_p=0.75)(lambda ids, lengths: shares, ask, limits)[:, 1]
    counts = first.bincount(minlength=V) / many  # the nucleus holds tokens 2 and 3
    torch.testing.assert_close(counts, torch.tensor([0, 0, 0.625, 0.375, 0]), atol=0.03, rtol=0)
    turned = Nucleus(top_p=0.75)(lambda ids, lengths: shares, ask._replace(key=ask.key.flip(0)), limits)[:, 1]
    assert turned.flip(0).equal(first) and not Nucleus(top_p=0.75, seed=1)(lambda i, n: shares, ask, limits)[
        :, 1
    ].equal(first)


@pytest.mark.parametrize("make", [lambda: Beam(num_beams=0), lambda: Nucleus(top_p=0), lambda: Nucleus(temperature=0)])
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
