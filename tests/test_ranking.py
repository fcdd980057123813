import pytest
import torch

from vlp.eval import metrics, ranking
from vlp.eval.ranking import Search


@pytest.fixture(params=[(3, 5), (2048, 8192)], ids=["small blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(ranking, "QUERIES", request.param[0])
    monkeypatch.setattr(ranking, "CANDIDATES", request.param[1])


def clips(num_videos=11, num_dim=6, seed=0):
    """Embeddings of videos and of one to three captions each; two videos are equal, so that they tie."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.nn.functional.normalize(torch.randn(num_videos, num_dim, generator=generator), dim=1)
    video[4] = video[2]
    owner = torch.repeat_interleave(torch.arange(num_videos), torch.arange(num_videos) % 3 + 1)
    text = video[owner] + 0.4 * torch.randn(len(owner), num_dim, generator=generator)
    text[-1] = text[0]
    return torch.nn.functional.normalize(text, dim=1), video, owner


@pytest.mark.parametrize("seed", range(4))
def test_ranks_in_blocks_are_those_of_the_whole_matrix(blocks, seed):
    text, video, owner = clips(seed=seed)
    every = torch.arange(len(video))
    whole = metrics.similarity(text, video)
    assert ranking.ranks(Search(text, video, every, owner)).equal(metrics.ranks(whole, owner))
    grouped = metrics.group_max(whole.T, owner, len(video))
    assert ranking.ranks(Search(video, text, owner, every)).equal(metrics.ranks(grouped, every))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_dual_softmax_in_blocks_is_that_of_the_whole_matrix(blocks, scale):
    text, video, owner = clips()
    every = torch.arange(len(video))
    whole = metrics.dual_softmax(metrics.similarity(text, video), scale)
    assert ranking.dual_softmax_ranks(Search(text, video, every, owner), scale).equal(metrics.ranks(whole, owner))
    whole = metrics.group_max(metrics.dual_softmax(metrics.similarity(video, text), scale), owner, len(video))
    assert ranking.dual_softmax_ranks(Search(video, text, owner, every), scale).equal(metrics.ranks(whole, every))


def test_a_difference_that_float32_cannot_sum_is_seen(blocks):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 999, generator=generator)
    near = query * (1 + torch.linspace(-3e-6, 3e-6, 40)[:, None])  # closer to each other than a sum in float32 is exact
    exact = (query.double() * near.double()).sum(1).float()
    for right in range(40):
        found = ranking.ranks(Search(query, near, torch.arange(40), torch.tensor([right])))
        assert found.item() == int((exact >= exact[right]).sum())


def test_a_collapsed_model_and_numbers_that_are_none_rank_last(blocks):
    ones, nan = torch.ones(7, 4), torch.full((7, 4), torch.nan)
    every = torch.arange(7)
    assert ranking.ranks(Search(ones, ones, every, every)).tolist() == [7] * 7
    assert ranking.ranks(Search(nan, ones, every, every)).tolist() == [7] * 7
    assert ranking.ranks(Search(ones, nan, every, every)).tolist() == [7] * 7


def test_best_candidates_come_in_order_and_of_equal_ones_the_first(blocks):
    text, video, _ = clips()
    places, scores = ranking.best(text, video, 4)
    whole = metrics.similarity(text, video)
    assert places.equal(whole.argsort(dim=1, descending=True, stable=True)[:, :4])
    torch.testing.assert_close(scores, whole.gather(1, places))
    assert ranking.best(text, video[:2], 4)[0].shape == (len(text), 2)
