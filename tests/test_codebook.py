"""Visual tokenizers. Axes: B clips, T frames, H W pixels, h w cells, K codes."""

import pytest
import torch
from safetensors.torch import save_file

from vlp.encoders.codebook import DiscreteVae, PatchCodebook, _nearest, k_means

B, T, HEIGHT, WIDTH, PATCH = 2, 3, 16, 24, 8


def clips(num_frames: int = T, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, num_frames, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)


def codebook(num_codes: int = 5, **options) -> PatchCodebook:
    book = PatchCodebook(num_codes=num_codes, patch_size=PATCH, **options)
    book.fit([clips(seed=1), clips(seed=2)], seed=0)
    return book


def vae(**options) -> DiscreteVae:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="random codes"):
        return DiscreteVae(path=None, patch_size=PATCH, hidden_dim=8, num_codes=11, **options)


@pytest.mark.parametrize("tubelet_size, steps", [(1, 3), (2, 2), (3, 1)])
def test_codes_lie_on_the_grid_of_the_encoder(tubelet_size, steps):
    for tokenizer in (codebook(tubelet_size=tubelet_size), vae(tubelet_size=tubelet_size)):
        codes = tokenizer(clips())
        assert codes.shape == (B, steps, HEIGHT // PATCH, WIDTH // PATCH) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < tokenizer.num_codes


def test_codes_name_the_nearest_centroid():
    book, frames = codebook(picture_size=PATCH), clips()
    cell = frames[1, 2, 8:16, 16:24].permute(2, 0, 1).float() / 255
    distances = (book.centroids.view(5, 3, PATCH, PATCH) - cell).square().sum((1, 2, 3))
    assert book(frames)[1, 2, 1, 2] == distances.argmin()


def test_codebook_finds_the_clusters_that_are_there():
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]], dtype=torch.uint8)
    which = torch.randint(4, (B, T, 2, 3), generator=torch.Generator().manual_seed(0))
    frames = colours[which].repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    book = PatchCodebook(num_codes=4, patch_size=PATCH)
    book.fit([frames], seed=3)
    codes = book(frames)
    assert len({(int(a), int(b)) for a, b in zip(which.flatten(), codes.flatten(), strict=True)}) == 4


def test_codebook_is_a_function_of_the_seed():
    one, two, three = PatchCodebook(num_codes=5, patch_size=PATCH), codebook(), codebook()
    one.fit([clips(seed=1), clips(seed=2)], seed=9)
    assert torch.equal(two.centroids, three.centroids) and not torch.equal(one.centroids, two.centroids)


def test_codebook_reads_no_more_clips_than_it_needs():
    def endless():
        while True:
            yield clips(seed=1)

    PatchCodebook(num_codes=3, patch_size=PATCH).fit(endless(), seed=0, max_vectors=40)


def test_codes_with_contrast_do_not_depend_on_light():
    book, frames = codebook(contrast=True), clips() // 4
    assert torch.equal(book(frames), book(2 * frames + 10))
    assert not torch.equal(codebook()(frames), codebook()(2 * frames + 10))


def test_masked_frames_do_not_change_the_code_of_a_tubelet():
    book, frames = codebook(tubelet_size=2), clips()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    other = torch.where(mask[..., None, None, None], frames, 200)
    real = torch.tensor([[True, True], [True, False]])
    assert torch.equal(book(frames, mask)[real], book(other, mask)[real])


def test_empty_codebook_refuses_until_it_is_fitted_or_loaded():
    empty = PatchCodebook(num_codes=5, patch_size=PATCH)
    with pytest.raises(RuntimeError, match="fit"):
        empty(clips())
    full = codebook()
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(clips()), full(clips())) and bool(empty.fitted)


def test_codebook_of_more_codes_than_cells_names_both_numbers():
    with pytest.raises(ValueError, match=r"1 different cells.*num_codes=5"):
        PatchCodebook(num_codes=5, patch_size=PATCH).fit([torch.zeros_like(clips())], seed=0)
    with pytest.raises(ValueError, match="0 different cells"):
        PatchCodebook(num_codes=5, patch_size=PATCH).fit([], seed=0)


def test_impossible_sizes_name_the_fix():
    with pytest.raises(ValueError, match="picture_size=3 does not divide patch_size=8"):
        PatchCodebook(num_codes=5, patch_size=8, picture_size=3)
    with pytest.raises(ValueError, match="16 x 24 pixels do not fill cells of 7"):
        PatchCodebook(num_codes=5, patch_size=7, picture_size=7).fit([clips()], seed=0)


def test_k_means_moves_codes_that_lost_their_vectors(monkeypatch):
    vectors = torch.cat([torch.zeros(50, 2), torch.eye(2) * 9, torch.eye(2) * -9])
    monkeypatch.setattr("vlp.encoders.codebook._spread", lambda vectors, num_codes, _: vectors[:1].repeat(num_codes, 1))
    centroids = k_means(vectors, 5, 10, torch.Generator())
    assert _nearest(vectors, centroids)[1].max() < 1e-6 and len(centroids.unique(dim=0)) == 5


def test_nearest_in_chunks_equals_brute_force(monkeypatch):
    monkeypatch.setattr("vlp.encoders.codebook._CHUNK", 7)
    torch.manual_seed(0)
    vectors, centroids = torch.randn(30, 4), torch.randn(6, 4)
    codes, distances = _nearest(vectors, centroids)
    expected = torch.cdist(vectors, centroids).square().min(1)
    assert torch.equal(codes, expected.indices)
    torch.testing.assert_close(distances, expected.values, atol=1e-4, rtol=1e-4)


def test_tokenizers_have_nothing_to_train():
    assert not list(codebook().parameters())
    assert all(not p.requires_grad for p in vae().parameters())


def test_discrete_vae_has_the_published_size_and_names():
    with torch.device("meta"), pytest.warns(UserWarning):
        model = DiscreteVae(path=None, patch_size=32)
    names = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 53_786_240
    assert names["blocks.group_2.block_1.res_path.conv_4.weight"].shape == (512, 128, 1, 1)
    assert names["blocks.output.conv.weight"].shape == (8192, 2048, 1, 1)


def test_discrete_vae_loads_published_names(tmp_path):
    source = vae()
    published = {k.replace(".weight", ".w").replace(".bias", ".b"): v for k, v in source.state_dict().items()}
    save_file(published, tmp_path / "dvae.safetensors")
    path = str(tmp_path / "dvae.safetensors")
    loaded = DiscreteVae(path=path, patch_size=PATCH, hidden_dim=8, num_codes=11)
    assert torch.equal(loaded(clips()), source(clips()))


def test_discrete_vae_refuses_weights_of_another_size(tmp_path):
    save_file(vae().state_dict(), tmp_path / "dvae.safetensors")
    with pytest.raises(ValueError, match="of another shape"):
        DiscreteVae(path=str(tmp_path / "dvae.safetensors"), patch_size=PATCH, hidden_dim=12, num_codes=11)


def test_discrete_vae_reads_the_central_frame_of_a_tubelet():
    model, frames = vae(tubelet_size=3), clips()
    assert torch.equal(model(frames), vae()(frames[:, 1:2]))


def test_discrete_vae_computes_in_full_precision_under_autocast():
    model, dtypes = vae(), []
    model.blocks.register_forward_hook(lambda _module, _inputs, logits: dtypes.append(logits.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(clips())
    assert dtypes == [torch.float32]
