"""Corruptions: what they change, how much of it, and that only the key decides."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from vlp import views
from vlp.types import IGNORE_INDEX, AttentionMass, Grid, Tokens

MASK, PAD = 4, 0
# [CLS] aa ##a b cc ##c ##c d [SEP] pad ..., as word numbers
WORDS = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 3, -1, -1, -1], [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1]])
IDS = torch.arange(100, 122).view(2, 11).masked_fill(WORDS < 0, PAD)
VALID, KEYS = torch.tensor([True, True]), torch.tensor([11, 12])


def mask_words(ids=IDS, words=WORDS, valid=VALID, key=KEYS, **settings):
    return views.MaskWords(**{"prob": 0.5, "mask_id": MASK, "vocab_size": 90, **settings})(ids, words, valid, key)


def many(num_rows: int) -> dict[str, torch.Tensor]:
    return {
        "ids": IDS[1:].expand(num_rows, -1),
        "words": WORDS[1:].expand(num_rows, -1),
        "valid": torch.ones(num_rows, dtype=torch.bool),
        "key": torch.arange(num_rows),
    }


@pytest.mark.parametrize(("prob", "counts"), [(0.5, [2, 4]), (0.01, [1, 1]), (0.75, [3, 7]), (1.0, [4, 9])])
def test_words_are_chosen_in_an_exact_share_and_never_none(prob, counts):
    _, labels = mask_words(prob=prob)
    chosen = [words[row != IGNORE_INDEX].unique().numel() for words, row in zip(WORDS, labels, strict=True)]
    assert chosen == counts


def test_labels_hold_the_original_ids_where_asked():
    ids, labels = mask_words(mask_share=1.0, random_share=0.0)
    asked = labels != IGNORE_INDEX
    assert torch.equal(labels[asked], IDS[asked]) and (ids[asked] == MASK).all()
    assert torch.equal(ids[~asked], IDS[~asked])


def test_whole_words_are_masked_with_all_their_pieces():
    for key in range(40):
        _, labels = mask_words(key=torch.tensor([key, key + 100]))
        asked = labels[0] != IGNORE_INDEX
        assert all(asked[WORDS[0] == word].unique().numel() == 1 for word in range(4))


def test_single_pieces_are_masked_without_whole_word():
    asked = torch.stack([mask_words(key=KEYS + 10 * n, whole_word=False)[1][0] for n in range(40)]) != IGNORE_INDEX
    assert (asked.sum(1) == 4).all()  # half of 7 pieces, to even
    assert (asked[:, 1] != asked[:, 2]).any()


def test_special_tokens_and_padding_are_never_asked():
    for key in range(20):
        ids, labels = mask_words(key=torch.tensor([key, -key]), prob=1.0)
        assert (labels[WORDS < 0] == IGNORE_INDEX).all() and (ids[WORDS < 0] == PAD).all()


def test_invalid_rows_are_left_alone():
    ids, labels = mask_words(valid=torch.tensor([False, True]))
    assert (labels[0] == IGNORE_INDEX).all() and torch.equal(ids[0], IDS[0])
    assert (labels[1] != IGNORE_INDEX).sum() == 4


def test_a_caption_without_words_asks_for_nothing():
    _, labels = mask_words(words=torch.full_like(WORDS, -1))
    assert (labels == IGNORE_INDEX).all()


def test_words_depend_on_the_key_only():
    ids, labels = mask_words()
    turned = [x.flip(0) for x in mask_words(IDS.flip(0), WORDS.flip(0), VALID, KEYS.flip(0))]
    longer = mask_words(F.pad(IDS, (0, 5)), F.pad(WORDS, (0, 5), value=-1))
    for one, two in ((ids, turned[0]), (labels, turned[1]), (ids, longer[0][:, :11]), (labels, longer[1][:, :11])):
        assert torch.equal(one, two)
    assert not torch.equal(mask_words(key=KEYS + 1)[1], labels)


def test_fates_of_the_chosen_have_their_shares():
    ids, labels = mask_words(**many(3000), prob=0.5, mask_share=0.6, random_share=0.3)
    asked = labels != IGNORE_INDEX
    shares = [(ids == MASK)[asked].float().mean(), (ids == labels)[asked].float().mean()]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.6 + 0.3 / 90, 0.1]), atol=0.015, rtol=0)


def test_random_replacements_cover_the_vocabulary_and_stay_inside():
    ids, labels = mask_words(**many(3000), mask_share=0.5, random_share=0.5)
    drawn = ids[labels != IGNORE_INDEX]
    assert drawn.unique().tolist() == list(range(90))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prob": 0.0}, "prob=0.0 is not a share"),
        ({"prob": 1.5}, "prob=1.5 is not a share"),
        ({"mask_id": None}, "no mask token; drop the view or choose another tokenizer"),
        ({"mask_share": 0.9, "random_share": 0.2}, "must add up to at most 1"),
        ({"mask_share": -0.1}, "must add up to at most 1"),
    ],
)
def test_impossible_settings_of_mask_words_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mask_words(**settings)


SHAPE = (3, 5, 7)
PATTERNS = {"random": views.RandomCells, "tubes": views.Tubes, "blocks": views.Blocks}


@pytest.mark.parametrize(
    ("name", "ratio", "count"), [("random", 0.4, 42), ("blocks", 0.4, 42), ("blocks", 0.9, 94), ("tubes", 0.4, 42)]
)
def test_patterns_hide_an_exact_number_of_cells(name, ratio, count):
    hidden = PATTERNS[name](ratio=ratio)(torch.arange(20), SHAPE)
    assert hidden.dtype == torch.bool and hidden.shape == (20, *SHAPE)
    assert hidden.flatten(1).sum(1).tolist() == [count] * 20


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.75, 0.9, 1.0])
def test_tubes_hide_the_same_cells_in_every_frame(ratio):
    hidden = views.Tubes(ratio=ratio)(torch.arange(20), SHAPE)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert (hidden[:, 0].flatten(1).sum(1) == max(1, round(ratio * 35))).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_depend_on_the_key_only(name):
    pattern, keys = PATTERNS[name](ratio=0.5), torch.tensor([3, -9, 2**61])
    alone = torch.cat([pattern(key[None], SHAPE) for key in keys])
    assert torch.equal(pattern(keys, SHAPE), alone) and torch.equal(pattern(keys.flip(0), SHAPE).flip(0), alone)
    assert len(pattern(torch.arange(20), SHAPE).flatten(1).unique(dim=0)) > 15


def test_blocks_hang_together_more_than_random_cells():
    def neighbours(pattern: views.Pattern) -> float:
        hidden = pattern(torch.arange(50), (4, 8, 8))
        return float((hidden[..., 1:] & hidden[..., :-1]).float().mean())

    assert neighbours(views.Blocks(ratio=0.3)) > 1.5 * neighbours(views.RandomCells(ratio=0.3))


def test_a_single_block_is_a_full_box():
    hidden = views.Blocks(ratio=2 / 105, num_boxes=1)(torch.arange(50), SHAPE)
    box = views.Blocks(ratio=1.0, num_boxes=1)
    spans = [box._spans(views.ops.fold(torch.arange(50), axis), length) for axis, length in enumerate(SHAPE)]
    inside = torch.einsum("bnt,bnh,bnw->bthw", *(span.float() for span in spans)).bool()
    assert (hidden <= inside)[inside.flatten(1).sum(1) >= 2].all()


@pytest.mark.parametrize("make", [*PATTERNS.values()])
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1, float("nan")])
def test_ratios_that_are_no_share_are_refused(make, ratio):
    with pytest.raises(ValueError, match=r"ratio=.* is not a share; it must be above 0 and at most 1"):
        make(ratio=ratio)


def test_blocks_without_boxes_are_refused():
    with pytest.raises(ValueError, match="num_boxes=0 must be at least 1"):
        views.Blocks(ratio=0.5, num_boxes=0)


def hide(frame_mask: list[list[int]], tubelet_size: int) -> torch.Tensor:
    mask = torch.tensor(frame_mask, dtype=torch.bool)
    frames = torch.zeros(len(mask), mask.shape[1], 20, 28, 3, dtype=torch.uint8)
    view = views.MaskPatches(pattern=views.Tubes(ratio=0.4), patch_size=4, tubelet_size=tubelet_size)
    return view(frames, mask, torch.arange(len(mask)))[0]


@pytest.mark.parametrize(("tubelet_size", "steps"), [(1, 5), (2, 3), (5, 1)])
def test_mask_patches_works_on_the_grid_of_the_encoder(tubelet_size, steps):
    hidden = hide([[1, 1, 1, 1, 1]], tubelet_size)
    assert hidden.shape == (1, steps, 5, 7) and int(hidden.sum()) == 14 * steps


def test_mask_patches_hides_nothing_in_padding_frames():
    hidden = hide([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], 2)
    assert hidden.flatten(2).any(-1).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_reverse_frames_turns_the_real_frames_and_leaves_the_padding():
    frames = torch.arange(10).view(2, 5, 1, 1, 1).expand(2, 5, 2, 3, 3).byte()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    (turned,) = views.ReverseFrames()(frames, mask)
    assert turned[:, :, 0, 0, 0].tolist() == [[4, 3, 2, 1, 0], [7, 6, 5, 8, 9]] and turned.dtype == torch.uint8
    assert torch.equal(views.ReverseFrames()(turned, mask)[0], frames)


@pytest.mark.parametrize("num_prefix", [0, 5])
def test_reverse_encoded_is_the_encoding_of_the_reversed_frames(num_prefix):
    frames = torch.arange(10).view(2, 5, 1, 1, 1).expand(2, 5, 2, 3, 3).byte()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()

    def encode(frames):
        x = frames.float().sin()
        return Grid(x, mask, x.mean((2, 3))[:, :num_prefix])

    (turned,) = views.ReverseEncoded()(encode(frames))
    for got, want in zip(turned, encode(views.ReverseFrames()(frames, mask)[0]), strict=True):
        assert torch.equal(got, want)


# Twelve clips; valid: all but 2 and 9. Similarity: clip i is close to clip i ^ 1.
NUM = 12
CLIP_KEYS = torch.arange(NUM) * 7919 + 5
CLIP_VALID = torch.ones(NUM, dtype=torch.bool).index_fill(0, torch.tensor([2, 9]), False)
EMBED = F.normalize(torch.eye(NUM) + 0.9 * torch.eye(NUM)[torch.arange(NUM) ^ 1], dim=1)
NUMBERED = torch.arange(float(NUM)).view(NUM, 1, 1).expand(NUM, 3, 2).contiguous()


def wrong(part: slice = slice(None), *, scale: float = 20.0, valid=CLIP_VALID, keys=CLIP_KEYS, **settings):
    """Which clip's text, and which clip's video, each clip of the part is given; whether there was one."""
    embed, key, mask = EMBED[part], keys[part], valid[part]
    text = Tokens(NUMBERED[part], torch.ones(len(embed), 3, dtype=torch.bool))
    video = Grid(NUMBERED[part][:, :, None, None], torch.ones(len(embed), 3, dtype=torch.bool), NUMBERED[part][:, :0])
    rest = (embed, EMBED[part], torch.tensor(scale), mask, key)
    (words, _), has_text = views.WrongText(**settings)(text, *rest)
    (cells, _, _), has_video = views.WrongVideo(**settings)(video, *rest)
    return {"text": words[:, 0, 0], "video": cells[:, 0, 0, 0, 0], "has_text": has_text, "has_video": has_video}


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("side", ["text", "video"])
def test_wrong_clips_are_valid_and_never_the_own(side, hard):
    for shift in range(40):
        given = wrong(keys=CLIP_KEYS + shift, hard=hard, scale=1.0)
        index = given[side].long()
        assert (index != torch.arange(NUM))[CLIP_VALID].all() and CLIP_VALID[index][CLIP_VALID].all()
        assert torch.equal(given[f"has_{side}"], CLIP_VALID)


@pytest.mark.parametrize("side", ["text", "video"])
def test_hard_choice_prefers_the_similar(side):
    twins = (torch.arange(NUM) ^ 1).float()
    both = CLIP_VALID & CLIP_VALID[torch.arange(NUM) ^ 1]
    hard, soft = ((wrong(hard=h)[side] == twins)[both].float().mean() for h in (True, False))
    assert hard == 1 and soft < 0.6


@pytest.mark.parametrize("side", ["text", "video"])
def test_hard_choice_follows_the_softmax_of_the_scaled_similarity(side):
    draws = torch.stack([wrong(keys=CLIP_KEYS + n, scale=3.0)[side] for n in range(1500)])  # [draws, clips]
    logits = (3 * EMBED @ EMBED.T).masked_fill(torch.eye(NUM).bool() | ~CLIP_VALID, -torch.inf)
    observed = torch.stack([(draws == clip).float().mean(0) for clip in range(NUM)], dim=1)
    torch.testing.assert_close(observed[CLIP_VALID], logits.softmax(1)[CLIP_VALID], atol=0.05, rtol=0)


def test_without_another_valid_clip_nothing_is_found():
    alone = torch.zeros(NUM, dtype=torch.bool).index_fill(0, torch.tensor(4), True)
    given = wrong(valid=alone)
    assert not given["has_text"].any() and not given["has_video"].any()


def test_garbage_in_invalid_slots_changes_no_choice(monkeypatch):
    before = wrong(scale=1.0)
    monkeypatch.setitem(globals(), "EMBED", EMBED.masked_fill(~CLIP_VALID[:, None], torch.nan))
    after = wrong(scale=1.0)
    assert all(torch.equal(before[name][CLIP_VALID], after[name][CLIP_VALID]) for name in before)


def test_wrong_text_reads_the_similarity_without_gradient_and_the_text_with():
    embed, scale = EMBED.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    text = Tokens(NUMBERED.clone().requires_grad_(), torch.ones(NUM, 3, dtype=torch.bool))
    given, _ = views.WrongText()(text, embed, embed, scale, CLIP_VALID, CLIP_KEYS)
    given.x.sum().backward()
    assert embed.grad is None and scale.grad is None and float(text.x.grad.sum()) == NUM * 6


def halves(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    size = NUM // num_ranks
    return wrong(slice(rank * size, (rank + 1) * size), scale=2.0)


def test_two_processes_choose_the_same_clips_as_one(tmp_path):
    results = on_ranks(halves, 2, tmp_path)
    for name, value in wrong(scale=2.0).items():
        torch.testing.assert_close(torch.cat([result[name] for result in results]), value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [views.WrongText, views.RandomWrongText])
def test_places_of_one_draw_are_different_clips(kind):
    keys, valid = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([True, True, True, True, False])
    ids = torch.arange(10).view(5, 2)
    mask, found, drawn = torch.ones(5, 2, dtype=torch.bool), [], []
    for place in range(4):
        if kind is views.WrongText:
            text, has = kind(hard=False, place=place)(Tokens(ids[..., None], mask), ids, ids, ids, valid, keys)
            drawn.append(text.x[:, 0, 0])
        else:
            drawn_ids, _, _, has = kind(place=place)(ids, mask, ids, valid, keys)
            drawn.append(drawn_ids[:, 0])
        found.append(has)
    assert [int(has.sum()) for has in found] == [4, 4, 4, 0]  # three others of each
    chosen = torch.stack(drawn[:3], dim=1)[:4]
    assert all(row.unique().numel() == 3 and 2 * i not in row for i, row in enumerate(chosen))


def mask_both(mass_text, mass_video, attended_share=1.0, prob=0.25, num_clips=2, key=KEYS):
    patches = views.MaskPatches(pattern=views.RandomCells(ratio=0.5), patch_size=4)
    view = views.MaskBoth(
        words=views.MaskWords(prob=0.5, mask_id=MASK, vocab_size=90, mask_share=1.0, random_share=0.0),
        patches=patches,
        attended_share=attended_share,
        prob=prob,
    )
    frames = torch.full((2, 3, 8, 12, 3), 9, dtype=torch.uint8)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    video = Grid(mass_video, mask, mass_video[:, :, 0, 0])
    return (mask, frames, *view(IDS, WORDS, frames, mask, AttentionMass(mass_text, video), VALID, key))


def test_attention_decides_what_is_hidden():
    text, video = torch.zeros(2, 11), torch.zeros(2, 3, 2, 3, 1)
    text[:, 4:8] = 1.0
    video[:, 1, 1] = 1.0
    _, frames, ids, labels, masked, hidden = mask_both(text, video, prob=0.25)
    chosen = labels != IGNORE_INDEX
    assert [int(c) for c in chosen.sum(1) + hidden.sum((1, 2, 3))] == [6, 5]  # of 7 + 18 and of 9 + 12
    assert (
        not chosen[:, :4].any()
        and not chosen[:, 8:].any()
        and not hidden[:, [0, 2]].any()
        and not hidden[:, 1, 0].any()
    )
    assert (ids[chosen] == MASK).all() and torch.equal(labels[chosen], IDS[chosen])
    pixels = hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert not masked[pixels].any() and torch.equal(masked[~pixels], frames[~pixels])


def test_nothing_unreal_and_no_special_token_is_hidden():
    everything = torch.ones(2, 11), torch.ones(2, 3, 2, 3, 1)
    mask, _, _, labels, _, hidden = mask_both(*everything, prob=1.0)
    assert torch.equal(labels != IGNORE_INDEX, WORDS >= 0)
    assert torch.equal(hidden, mask[:, :, None, None].expand_as(hidden))


def test_clips_are_masked_by_attention_or_by_pattern_as_their_key_says():
    none, only = torch.full((2, 11), 1e-9), torch.zeros(2, 3, 2, 3, 1)
    only[:, 0, 0, 0] = 1.0
    counts = torch.stack([mask_both(none, only, 0.5, 0.04, key=KEYS + n)[5].sum((1, 2, 3)) for n in range(40)])
    by_attention = (counts == 1).float().mean()  # one cell; by pattern it is half of them
    assert 0.3 < by_attention < 0.7 and counts[counts != 1].min() >= 4
