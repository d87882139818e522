"""vae.py against closed forms: patches without layers, torch.distributions, the parts of the loss.

With the convolutions replaced by the identity only the cutting into patches is left, and it must go
back to the very video. Then: what the statistics do to latents and what `decode` undoes, and that
the whole learns one clip in a few steps. Fixed seeds.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, randn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from toy.vae import ResBlock, TinyVAE, TinyVAEConfig

SMALL = TinyVAEConfig(channels=3, width=16, blocks=1, time_patch=2, space_patch=4, white=1)


def clips(B: int = 2, frames: int = 4, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    """Return random video (B, 3, F, H, W) in [-1, 1]."""
    return randn(B, 3, frames, height, width, seed=seed).tanh()


def awake(config: TinyVAEConfig = SMALL, seed: int = 0) -> TinyVAE:
    """Return a VAE with nothing left at zero, so that every layer carries weight."""
    return seeded(TinyVAE, config, seed=seed)


# --- the grid and the patches ------------------------------------------------------------------

counts = st.integers(1, 3)


@settings(max_examples=30)
@given(counts, counts, counts, counts, st.integers(1, 4))
def test_patches_alone_go_back_to_the_video(T, h, w, time_patch, space_patch):
    config = replace(SMALL, time_patch=time_patch, space_patch=space_patch)
    vae = TinyVAE(config)
    vae.encoder = vae.decoder = nn.Identity()
    video = clips(2, T * time_patch, h * space_patch, w * space_patch)
    if 3 * time_patch * space_patch**2 % 2:  # the halves of a patch stand for mean and log-variance
        video = torch.cat([video, video], 1)
    halves = torch.cat(vae.raw_posterior(video), 1)
    assert halves.shape[2:] == vae.config.grid(*video.shape[2:]) == (T, h, w)
    assert vae.reconstruct(halves).equal(video)


def test_a_latent_sees_its_own_patch_and_paints_it():
    """Without residual blocks nothing crosses the borders of patches."""
    vae = awake(replace(SMALL, blocks=0))
    video = clips().requires_grad_()
    mean, _ = vae.raw_posterior(video)
    raw = mean.detach().requires_grad_()
    painted = vae.reconstruct(raw)
    for t, y, x in [(0, 0, 0), (1, 1, 2), (0, 1, 0), (1, 0, 1)]:
        patch = torch.zeros(4, 8, 12, dtype=torch.bool)
        patch[2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = True
        (seen,) = torch.autograd.grad(mean[:, :, t, y, x].sum(), video, retain_graph=True)
        assert seen.ne(0).equal(patch.expand_as(seen))
        (used,) = torch.autograd.grad(painted[..., patch].sum(), raw, retain_graph=True)
        place = torch.zeros(2, 2, 3, dtype=torch.bool)
        place[t, y, x] = True
        assert used.ne(0).equal(place.expand_as(used))


@pytest.mark.parametrize(
    "size", [(3, 8, 8), (2, 6, 8), (2, 8, 10), (0, 8, 8)], ids=lambda size: "x".join(map(str, size))
)
def test_a_size_that_does_not_divide_is_refused(size):
    message = f"video of {size[0]} frames, {size[1]} x {size[2]}: .* multiples of 2 frames and 4 "
    with pytest.raises(ValueError, match=message):
        SMALL.grid(*size)
    with pytest.raises(ValueError, match=message):
        TinyVAE(SMALL).encode(torch.zeros(1, 3, *size))


# --- the layers --------------------------------------------------------------------------------


def test_a_residual_block_is_that_of_torchs_convolutions():
    block, x = awake().encoder[1][0], randn(2, 16, 2, 3, 4)
    weights = [conv.weight.view(16, 16, 3, 3, 3) for conv in (block.first, block.second)]
    inside = F.conv3d(F.silu(block.norm(x)), weights[0], block.first.bias, padding=1)
    expected = x + F.conv3d(F.silu(inside), weights[1], block.second.bias, padding=1)
    assert_close(block(x), expected)


def test_kernels_start_orthogonal():
    """As matrices, which is how Muon keeps them: no direction of the output starts out louder."""
    weight = ResBlock(3, 16).first.weight
    assert weight.shape == (16, 16 * 27)
    assert_close(weight @ weight.T, torch.eye(16))


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    """GroupNorm takes its statistics from one sample; a batch norm would not."""
    vae, video = awake(), clips(3)
    video[1] *= 0.01
    video[2] += 3
    raw = vae.raw_posterior(video)[0]
    painted = vae.reconstruct(raw)
    for i in range(3):
        assert_close(vae.raw_posterior(video[i : i + 1])[0], raw[i : i + 1])
        assert_close(vae.reconstruct(raw[i : i + 1]), painted[i : i + 1])


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 2e-3, 5.0])
def test_the_loss_is_l1_plus_l2_plus_weighted_kl(weight):
    vae, video, noise = awake(replace(SMALL, kl_weight=weight)), clips(), randn(2, 3, 2, 2, 3)
    loss, log = vae.loss(video, noise)
    mean, log_variance = vae.raw_posterior(video)
    posterior = Normal(mean, log_variance.exp().sqrt())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
    error = vae.reconstruct(posterior.loc + posterior.scale * noise) - video
    assert_close(loss, error.abs().mean() + (error**2).mean() + weight * kl)
    assert_close(log["kl"], kl)
    assert_close(log["psnr"], 10 * torch.log10(2.0**2 / (error**2).mean()), 1e-4)
    assert not any(x.requires_grad for x in log.values())


def test_kl_is_zero_at_the_standard_normal():
    vae = TinyVAE(SMALL)
    nn.init.zeros_(vae.encoder[-1].weight)
    nn.init.zeros_(vae.encoder[-1].bias)
    assert vae.loss(clips(), torch.zeros(2, 3, 2, 2, 3))[1]["kl"] == 0


def test_a_wild_log_variance_leaves_the_loss_finite():
    vae = TinyVAE(SMALL)
    for bias in (-1e4, 1e4):
        nn.init.constant_(vae.encoder[-1].bias[3:], bias)
        loss = vae.loss(clips(), randn(2, 3, 2, 2, 3))[0]
        assert loss.isfinite(), f"{loss} at a log-variance of {bias}"


def test_one_clip_is_learned():
    """From below 10 dB; nothing but the loss and a plain optimizer."""
    torch.manual_seed(0)
    vae = TinyVAE(SMALL)
    place = torch.linspace(0, 3, 16)
    video = torch.stack([(place[:, None] * k + place + k).sin() for k in range(3)])  # (3, 16, 16)
    video = 0.8 * video[None, :, None] * torch.tensor([1.0, 0.8, 0.6, 0.4])[:, None, None]
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-2)
    noise = torch.Generator().manual_seed(1)
    found = []
    for _ in range(100):
        loss, log = vae.loss(video, torch.randn(1, 3, 2, 4, 4, generator=noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(log["psnr"].item())
    vae.set_statistics(video)
    psnr = 10 * torch.log10(4 / (vae.decode(vae.encode(video)) - video).square().mean())
    assert found[0] < 15 and psnr > 20, f"{found[0]:.1f} dB at first, {psnr:.1f} dB at the end"


# --- the statistics ----------------------------------------------------------------------------


def squares(latents: Tensor, side: int) -> Tensor:
    """Return the numbers of each square of positions, (squares, C side^2): cut out one by one."""
    B, _, T, h, w = latents.shape
    corners = [
        (b, t, y, x)
        for b in range(B)
        for t in range(T)
        for y in range(0, h, side)
        for x in range(0, w, side)
    ]
    cut = [latents[b, :, t, y : y + side, x : x + side].reshape(-1) for b, t, y, x in corners]
    return torch.stack(cut)


@pytest.mark.parametrize("white", [1, 2])
@torch.no_grad()
def test_latents_of_the_clips_they_were_measured_on_are_white(white):
    """Zero mean, and within squares unit variance and no correlation."""
    vae, video = awake(replace(SMALL, white=white)), clips(64, height=16, width=16) + 0.3
    before = torch.corrcoef(squares(vae.raw_posterior(video)[0], white).T)
    assert (before - torch.eye(len(before))).abs().max() > 0.1  # there is something to whiten
    vae.set_statistics(video)
    latents = vae.encode(video)
    assert latents.shape == (64, 3, 2, 4, 4) and latents.dtype == torch.float32
    assert_close(squares(latents, white).mean(0), 0.0)
    assert_close(squares(latents, white).T.cov(), torch.eye(3 * white**2), 1e-3)


@torch.no_grad()
def test_no_turn_is_nearer_to_the_raw_latents():
    """Of all roots of the covariance the symmetric one: the least is moved (ZCA)."""
    vae, video = awake(), clips(64)
    vae.set_statistics(video)
    assert_close(vae.root, vae.root.T)
    assert torch.linalg.eigvalsh(vae.root).min() > 0
    raw = squares(vae.raw_posterior(video)[0], 1)
    assert_close(vae.root @ vae.root, raw.T.cov())


@torch.no_grad()
def test_what_does_not_vary_is_not_blown_up():
    vae, video = awake(), clips(8)
    vae.encoder[-1].weight[1] = 0  # a channel without information
    vae.set_statistics(video)
    assert vae.encode(video).abs().max() < 100
    nn.init.zeros_(vae.encoder[-1].weight)
    vae.set_statistics(video)
    assert vae.encode(video).isfinite().all()


means = st.lists(st.floats(-5, 5), min_size=12, max_size=12)
deviations = st.lists(st.floats(0.01, 20), min_size=12, max_size=12)


@settings(max_examples=20)
@given(means, deviations, st.integers(0, 99))
@torch.no_grad()
def test_a_draw_of_white_latents_is_the_white_draw(means, deviations, seed):
    """The mean exactly; the log-variance, of each latent by itself, in each variance."""
    vae, video = awake(replace(SMALL, white=2)), clips(width=8)
    turn = torch.linalg.qr(randn(12, 12, seed=seed))[0]
    vae.mean.copy_(torch.tensor(means))
    vae.root.copy_(turn * torch.tensor(deviations) @ turn.T)
    raw = vae.raw_posterior(video)
    mean, log_variance = vae.posterior(video)
    back = squares(mean, 2) @ vae.root.T
    assert_close(back, squares(raw[0], 2) - vae.mean, 1e-3)
    inverse = turn / torch.tensor(deviations) @ turn.T
    each = [inverse @ x.exp().diag() @ inverse.T for x in squares(raw[1], 2)]
    expected = torch.stack([x.diagonal() for x in each])
    assert_close(squares(log_variance, 2), expected.log(), 1e-3)
    assert vae.encode(video).equal(mean)


@settings(max_examples=20)
@given(means, deviations, st.integers(0, 99))
@torch.no_grad()
def test_decode_undoes_encode_whatever_the_statistics(means, deviations, seed):
    vae, video = awake(replace(SMALL, white=2)), clips(width=8)
    expected = vae.reconstruct(vae.raw_posterior(video)[0]).clamp(-1, 1)
    turn = torch.linalg.qr(randn(12, 12, seed=seed))[0]
    vae.mean.copy_(torch.tensor(means))
    vae.root.copy_(turn * torch.tensor(deviations) @ turn.T)
    assert_close(vae.decode(vae.encode(video)), expected, 1e-3)


@torch.no_grad()
def test_autocast_does_not_round_the_latents():
    vae, video = awake(), clips()
    vae.set_statistics(clips(8))
    with torch.autocast("cpu", torch.bfloat16):
        raw, latents = vae.raw_posterior(video)[0].float(), vae.encode(video)
    expected = (squares(raw, 1) - vae.mean) @ torch.linalg.inv(vae.root)
    assert latents.dtype == torch.float32
    assert_close(squares(latents, 1), expected, 1e-5)


def test_decoded_video_stays_in_range():
    vae = awake()
    raw = 50 * randn(1, 3, 2, 2, 2)
    assert vae.reconstruct(raw).abs().max() > 1
    video = vae.decode(raw)
    assert video.min() == -1 and video.max() == 1


def test_the_statistics_travel_with_the_weights():
    vae, other = awake(), TinyVAE(SMALL)
    vae.set_statistics(clips(8))
    other.load_state_dict(vae.state_dict())
    assert other.encode(clips()).equal(vae.encode(clips()))


def test_encode_and_decode_make_no_graph():
    vae = awake()
    latents = vae.encode(clips().requires_grad_())
    assert not latents.requires_grad
    assert not vae.decode(latents.requires_grad_()).requires_grad


# --- stretches ----------------------------------------------------------------------------------


def test_stretches_are_coded_each_by_itself():
    """With a span, a long video is what its stretches are alone; piece by piece it is the same."""
    config = TinyVAEConfig(width=8, blocks=1, channels=4, span=2)
    torch.manual_seed(0)
    vae = TinyVAE(config).eval()
    video = torch.rand(2, 3, 20, 16, 16) * 2 - 1  # two stretches of 8 frames, and half a one
    latents = vae.encode(video)
    alone = [vae.encode(part) for part in video.split(8, 2)]
    assert torch.equal(latents, torch.cat(alone, 2)) and latents.shape[2] == 5
    pieces = list(vae.decode_pieces(latents))
    assert [piece.shape[2] for piece in pieces] == [8, 8, 4]
    assert torch.equal(torch.cat(pieces, 2), vae.decode(latents))
    whole = TinyVAE(TinyVAEConfig(**{**vars(config), "span": None})).eval()
    whole.load_state_dict(vae.state_dict())
    assert len(list(whole.decode_pieces(latents))) == 1
    assert not torch.equal(whole.encode(video), latents)  # there, all frames know one another
