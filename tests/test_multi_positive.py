"""A video against all of its texts. Axes: B clips, M texts of a clip, E embedding."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor

from vlp.objectives.contrastive import Contrastive
from vlp.objectives.multi_positive import Equalised, Fixed, MultiPositive

VALID = torch.tensor([True, True, False, True])
THERE = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, False]])
SCALE = torch.tensor(4.0)


def inputs(num_texts: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return F.normalize(torch.randn(4, 5), dim=-1), F.normalize(torch.randn(4, num_texts, 5), dim=-1)


def by_hand(video: Tensor, texts: Tensor, weight: float, spare: bool = False) -> Tensor:
    """Means over the real videos and over the real texts, one after the other."""
    real = [(b, m) for b in (0, 1, 3) for m in range(3) if THERE[b, m]]
    logit = {(v, b, m): SCALE * video[v] @ texts[b, m] for v in (0, 1, 3) for b, m in real}
    of_videos = []
    for v in (0, 1, 3):
        own = [(b, m) for b, m in real if b == v]
        losses = []
        for pair in own:
            rivals = [p for p in real if not (spare and p in own and p != pair)]
            losses.append(torch.stack([logit[v, *p] for p in rivals]).logsumexp(0) - logit[v, *pair])
        of_videos.append(torch.stack(losses).mean())
    of_texts = [torch.stack([logit[v, b, m] for v in (0, 1, 3)]).logsumexp(0) - logit[b, b, m] for b, m in real]
    return torch.stack(of_videos).mean() + weight * torch.stack(of_texts).mean()


@pytest.mark.parametrize(("weight", "spare"), [(0.0, False), (1.0, False), (0.5, True)])
def test_value_equals_a_loop_over_videos_and_texts(weight, spare):
    video, texts = inputs()
    objective = MultiPositive(balance=Fixed(weight=weight), spare_positives=spare)
    term = objective(video, texts, THERE, SCALE, VALID)
    torch.testing.assert_close(term.total / term.count, by_hand(video, texts, weight, spare))
    assert int(term.count) == 3 == int(objective.count(VALID))


def test_one_text_a_video_is_the_plain_contrast():
    video, texts = inputs(num_texts=1)
    there = torch.ones(4, 1, dtype=torch.bool)
    own = MultiPositive(balance=Fixed())(video, texts, there, SCALE, VALID)
    plain = Contrastive(sum_directions=True)(video, texts[:, 0], SCALE, VALID)
    torch.testing.assert_close(own.total, plain.total)


def test_order_of_a_videos_texts_does_not_matter():
    video, texts = inputs()
    order = [2, 0, 1]
    first = MultiPositive(balance=Fixed())(video, texts, THERE, SCALE, VALID)
    other = MultiPositive(balance=Fixed())(video, texts[:, order], THERE[:, order], SCALE, VALID)
    torch.testing.assert_close(first.total, other.total)


def test_equalised_sides_have_the_same_loss():
    video, texts = inputs()
    one_side = MultiPositive(balance=Fixed(weight=0.0))(video, texts, THERE, SCALE, VALID).total
    torch.testing.assert_close(
        MultiPositive(balance=Equalised())(video, texts, THERE, SCALE, VALID).total, 2 * one_side
    )


def test_absent_texts_and_invalid_clips_take_no_part():
    video, texts = (x.requires_grad_() for x in inputs())
    with torch.no_grad():
        texts[~THERE] = torch.nan
        texts[2], video[2] = torch.nan, torch.nan
    MultiPositive(balance=Fixed())(video, texts, THERE, SCALE, VALID).total.backward()
    assert not video.grad[2].any() and not texts.grad[~THERE].any() and not texts.grad[2].any()
    assert torch.isfinite(texts.grad).all() and video.grad[0].any()


def _share(rank: int, world: int) -> dict[str, Tensor]:
    video, texts = (x.requires_grad_() for x in inputs())
    rows = slice(2 * rank, 2 * rank + 2) if world > 1 else slice(None)
    term = MultiPositive(balance=Fixed())(video[rows], texts[rows], THERE[rows], SCALE, VALID[rows])
    term.total.backward()
    return {"total": term.total, "video": video.grad, "texts": texts.grad}


def test_two_ranks_together_equal_one(tmp_path):
    parts = on_ranks(_share, 2, tmp_path)
    for name, expected in _share(0, 1).items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected, atol=1e-5, rtol=1e-5)
