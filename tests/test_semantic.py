"""semantic.py against torch.distributions, statistics of many draws, and a word-by-word captioner.

The compressor's KL, sampling and statistics are checked in closed form or on many draws; the
encoder's layout by which single pixels reach which token; the captioner's loss against a loop that
predicts one word after the other and knows only the words before it. Fixed seeds.
"""

import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, randn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from config import tiny
from run import Run
from semantic import Compressor, CompressorConfig
from settings import override
from toy.encoder import Captioner, TinyEncoder, TinyEncoderConfig

CHOICES = (Path(__file__).parents[1] / "docs/choices.md").read_text(encoding="utf-8")
SMALL = TinyEncoderConfig(dim=32, blocks=2, heads=2, caption_blocks=2, caption_words=6)
VOCABULARY = ["a", "red", "blue", "circle", "moves", "left", "and", "cross"]
CAPTIONS = ["a red circle moves left", "a blue cross", "a", "blue and red and blue and red and a"]


# --- the compressor ----------------------------------------------------------------------------

features = randn(4, 12, 3, 2, 5)  # (B, d, S, hs, ws)


def compressor(**fields) -> Compressor:
    return seeded(Compressor, 12, CompressorConfig(channels=3, hidden=16, **fields))


def test_the_published_and_documented_numbers_are_the_defaults():
    """K = 8 is best in the paper's Table 3; the others are those of the table of choices."""
    config = CompressorConfig()
    made = Compressor(12, config)
    assert [tuple(p.shape) for p in made.parameters()] == [(256, 12), (256,), (16, 256), (16,)]
    assert made.config.channels == config.channels == 8
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+?) \| `compressor\.\w+` \|$", CHOICES, re.M))
    assert rows.pop("KL weight").startswith("3e-5 on nats per token") and config.kl_weight == 3e-5
    assert rows.pop("log-variance at the start") == "-4" and config.log_variance == -4
    assert rows.pop("noise on z_sem").startswith("0.2 abs(N(0, 1))") and config.noise == 0.2
    assert not rows
    with pytest.raises(FrozenInstanceError):
        config.noise = 0.3


def test_kl_is_torchs_and_z_sem_is_mean_plus_deviation_times_noise():
    made, noise = compressor(), randn(4, 3, 3, 2, 5, seed=1)
    mean, log_variance = made.posterior(features)
    assert mean.shape == log_variance.shape == noise.shape
    posterior = Normal(mean, log_variance.exp().sqrt())
    z_sem, kl = made(features, noise)
    assert_close(z_sem, posterior.loc + posterior.scale * noise)
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean((0, 2, 3, 4))
    assert expected.min() > 0.01 and expected.std() > 0.01  # channels differ
    assert_close(kl, expected)


def test_kl_is_zero_at_the_standard_normal():
    made = compressor()
    nn.init.zeros_(made.mlp[2].weight)
    nn.init.zeros_(made.mlp[2].bias)
    z_sem, kl = made(features, noise := randn(4, 3, 3, 2, 5))
    assert kl.eq(0).all() and z_sem.equal(noise)


def test_encode_is_the_posteriors_mean():
    made = compressor()
    plan = made.encode(features.clone().requires_grad_())
    assert plan.equal(made.posterior(features)[0]) and not plan.requires_grad
    assert_close(plan, made(features, torch.zeros(4, 3, 3, 2, 5))[0], 0.0)


def test_each_place_is_compressed_alone():
    """An MLP of each feature vector: z_sem at (b, s, y, x) is that vector's own posterior."""
    made = compressor()
    plan = made.encode(features)
    for b, s, y, x in [(0, 0, 0, 0), (3, 2, 1, 4), (1, 2, 0, 3)]:
        alone = made.mlp(features[b, :, s, y, x])[:3]
        assert_close(plan[b, :, s, y, x], alone)


@pytest.mark.parametrize("log_variance", [-4.0, -1.0])
def test_a_fresh_posterior_has_about_unit_means_and_the_variance_it_is_told(log_variance):
    config = CompressorConfig(channels=8, hidden=256, log_variance=log_variance)
    made = seeded(Compressor, 128, config, shake=0.0)
    mean, found = made.posterior(randn(16, 128, 2, 4, 4))
    assert_close(found, log_variance)
    std = mean.std((0, 2, 3, 4))
    assert ((std > 0.3) & (std < 2)).all(), f"deviations of the means: {std.tolist()}"
    rows = made.mlp[2].weight[:8]
    assert_close(rows @ rows.T, 4 * torch.eye(8))  # uncorrelated, of length 2


@pytest.mark.parametrize("bias, bound", [(-1e4, -20.0), (1e4, 10.0)])
def test_a_wild_log_variance_is_bounded(bias, bound):
    made = compressor()
    nn.init.constant_(made.mlp[2].bias[3:], bias)
    assert_close(made.posterior(features)[1], bound, 0.0)
    z_sem, kl = made(features, randn(4, 3, 3, 2, 5))
    assert z_sem.isfinite().all() and kl.isfinite().all()


@pytest.mark.parametrize("log_variance", [-4.0, 0.5])
def test_plans_have_zero_mean_and_unit_variance_noise_included(log_variance):
    """The law of total variance, seen on many draws: at 0.5 most of the variance is noise."""
    made = compressor(log_variance=log_variance)
    made.mlp[2].bias.data[3:] += torch.tensor([-1.0, 0.0, 1.0])  # channels differ
    many = 3 * randn(64, 12, 2, 4, 4, seed=3) + randn(12, 1, 1, 1, seed=4)
    made.set_statistics(many)
    draws = torch.cat([made(many, randn(64, 3, 2, 4, 4, seed=i))[0] for i in range(20)])
    assert draws.std((0, 2, 3, 4)).sub(1).abs().min() > 0.02  # there is something to normalise
    plans = made.normalise(draws)
    assert_close(plans.mean((0, 2, 3, 4)), 0.0, 0.03)
    assert_close(plans.std((0, 2, 3, 4)), 1.0, 0.03)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.01, 9)), min_size=3, max_size=3))
def test_denormalise_undoes_normalise(statistics):
    made, z_sem = compressor(), randn(2, 3, 2, 2, 2)
    mean, std = torch.tensor(statistics).T.reshape(2, 3, 1, 1, 1)
    made.mean.copy_(mean)
    made.std.copy_(std)
    plan = made.normalise(z_sem)
    assert_close(plan[1, 2], (z_sem[1, 2] - statistics[2][0]) / statistics[2][1], 1e-3)
    assert_close(made.denormalise(plan), z_sem)


def test_scaled_and_shifted_features_compress_alike_once_measured():
    """Towers have features of uneven scales: their statistics take that out."""
    scale, shift = 10 ** randn(12, 1, 1, 1, seed=5), 100 * randn(12, 1, 1, 1, seed=6)
    plans = []
    for these in (features, features * scale + shift):
        made = compressor()
        made.set_feature_statistics(these)
        plans.append(made.encode(these))
    assert_close(plans[1], plans[0], 0.02)  # float32 around shifts of hundreds
    unmeasured = compressor().encode(features).std().item()
    assert unmeasured == pytest.approx(plans[0].std().item(), rel=0.5)


def test_a_feature_that_never_changes_is_a_zero():
    still = features.clone()
    still[:, 3] = 0.75  # its sums are exact
    made = compressor()
    made.set_feature_statistics(still)
    assert made.feature_std.min().item() == made.feature_std[3].item() == pytest.approx(1e-6)
    made.feature_std[3] = 1.0
    plan = made.encode(still)
    made.feature_std[3] = 1e-6
    assert plan.isfinite().all() and made.encode(still).equal(plan)


def test_statistics_are_numbers_without_a_graph():
    made = compressor()
    learned = features.clone().requires_grad_()
    made.set_feature_statistics(learned)
    made.set_statistics(learned)
    assert not any(buffer.requires_grad for buffer in made.buffers())


def test_training_noise_has_deviation_tau_times_level_of_each_channels_own():
    """Per sample, relative to z_sem's own deviation, whatever the sign of the level (RAE)."""
    made = compressor(noise=0.3)
    made.std.copy_(torch.tensor([0.5, 1.0, 7.0]).view(3, 1, 1, 1))
    z_sem, noise = randn(4, 3, 2, 2, 2), randn(4, 3, 2, 2, 2, seed=1)
    level = torch.tensor([0.0, 1.0, -1.0, 2.5])
    added = made.perturb(z_sem, level, noise) - z_sem
    for b, size in enumerate([0.0, 1.0, 1.0, 2.5]):
        for k, std in enumerate([0.5, 1.0, 7.0]):
            assert_close(added[b, k], 0.3 * size * std * noise[b, k])


def test_every_statistic_travels_with_the_weights():
    made, other = compressor(), Compressor(12, CompressorConfig(channels=3, hidden=16))
    made.set_feature_statistics(2 * features + 1)
    made.set_statistics(features)
    other.load_state_dict(made.state_dict())
    assert other.normalise(other.encode(features)).equal(made.normalise(made.encode(features)))


def test_under_autocast_the_posterior_is_float32():
    with torch.autocast("cpu", torch.bfloat16):
        z_sem, kl = compressor()(features, randn(4, 3, 3, 2, 5))
    assert z_sem.dtype == kl.dtype == torch.float32


# --- the encoder -------------------------------------------------------------------------------


def clips(B: int = 2, frames: int = 4, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return randn(B, 3, frames, height, width, seed=seed).tanh()


def test_features_lie_on_the_grid():
    encoder = TinyEncoder(SMALL)
    assert encoder.config.grid(4, 16, 24) == (2, 2, 3)
    found = encoder.encode(clips())
    assert found.shape == (2, encoder.config.dim, 2, 2, 3) and found.dtype == torch.float32


@pytest.mark.parametrize("size", [(3, 16, 16), (0, 16, 16), (2, 12, 16), (2, 16, 20)])
def test_a_size_that_does_not_divide_is_refused(size):
    message = f"{size[0]} frames, {size[1]} x {size[2]}: .* pairs of frames and multiples of 8 "
    for refuse in (SMALL.grid, lambda *s: TinyEncoder(SMALL).encode(clips(1, *s))):
        with pytest.raises(ValueError, match=message):
            refuse(*size)


@pytest.mark.parametrize("s, y, x", [(0, 0, 0), (1, 0, 2), (0, 1, 1), (1, 1, 2)])
def test_a_token_reads_its_two_frames_and_most_of_all_its_place(s, y, x):
    """Without blocks: what its features hang on lies closest around the pixel (8 y, 8 x)."""
    encoder = seeded(TinyEncoder, TinyEncoderConfig(dim=32, blocks=0))
    video = clips().requires_grad_()
    token = encoder(video)[1, :, s, y, x]
    (gradient,) = torch.autograd.grad((token * randn(*token.shape)).sum(), video)
    energy = gradient.square().sum(1)  # (B, F, H, W)
    mine = energy[1, 2 * s : 2 * s + 2].sum(0)  # (H, W)
    assert energy.sum().item() == pytest.approx(mine.sum().item())
    around = F.pad(mine, (4, 0, 4, 0), value=torch.nan).unfold(0, 8, 8).unfold(1, 8, 8)
    assert around.flatten(2).nanmean(2).argmax() == 3 * y + x  # (hs, ws)


def test_every_pixel_is_seen_and_the_two_frames_of_a_pair_are_told_apart():
    encoder = seeded(TinyEncoder, TinyEncoderConfig(dim=32, blocks=0))
    video = clips().requires_grad_()
    weights = randn(*encoder(video).shape)
    (gradient,) = torch.autograd.grad((encoder(video) * weights).sum(), video)
    assert gradient.ne(0).all()
    turned = video.detach().unflatten(2, (2, 2)).flip(3).flatten(2, 3)
    assert (encoder.encode(turned) - encoder.encode(video)).abs().max() > 0.1


def blind(encoder: TinyEncoder):
    """Let the stem's last convolutions see nothing."""
    _, _, halving, block = encoder.stem.blocks
    for convolution in (halving, block.second):
        nn.init.zeros_(convolution.weight)


def test_places_and_seconds_are_told():
    """The same pixels everywhere: only positions can make the tokens differ."""
    encoder = seeded(TinyEncoder, SMALL)
    blind(encoder)
    tokens = encoder.encode(clips(1))[0].flatten(1).T  # (S hs ws, d)
    gaps = torch.cdist(tokens, tokens) + 10 * torch.eye(len(tokens))
    assert gaps.min() > 0.1, f"two tokens differ by only {gaps.min():.3g}"
    slow = seeded(TinyEncoder, TinyEncoderConfig(**vars(SMALL) | {"rate": 0.5}))
    blind(slow)
    first, second = slow.encode(clips(1))[0].unbind(1)
    assert (first - encoder.encode(clips(1))[0, :, 0]).abs().max() > 0.01  # attends to the second
    assert (first - second).abs().max() > 0.1


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    encoder, video = seeded(TinyEncoder, SMALL), clips(3)
    video[1] *= 0.01
    together = encoder.encode(video)
    for i in range(3):
        assert_close(encoder.encode(video[i : i + 1]), together[i : i + 1])


def test_encode_makes_no_graph_and_train_mode_changes_nothing():
    """Dropout or batch statistics would; torch also has a faster path of its own in eval mode."""
    encoder, video = seeded(TinyEncoder, SMALL), clips().requires_grad_()
    found = encoder.train().encode(video)
    assert not found.requires_grad
    assert_close(encoder.eval().encode(video), found)
    assert_close(encoder(video), found)
    assert encoder(video).requires_grad


def test_in_a_run_the_encoder_is_frozen(tmp_path):
    config = override(tiny(), ["encoder.dim=32", "encoder.blocks=1"])
    trained = Run(tmp_path, config, torch.device("cpu"))
    trained.save(
        "encoder",
        {f"encoder.{k}": v for k, v in TinyEncoder(config.encoder).state_dict().items()},
        {},
    )
    encoder = Run(tmp_path, config, torch.device("cpu")).encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    video = clips(1, 4, 32, 32)
    built = TinyEncoder(config.encoder)
    built.load_state_dict(encoder.state_dict())
    assert_close(encoder.encode(video), built.encode(video))


# --- the captioner -----------------------------------------------------------------------------


def test_captions_become_ids_filled_up_with_end():
    """end 0, unknown 1, then the vocabulary; cut after caption_words, always room for one end."""
    captioner = Captioner(SMALL, VOCABULARY)
    assert captioner.tokenize(
        ["A Red  circle", "", "a green left", " ".join(["cross"] * 9)]
    ).tolist() == [
        [2, 3, 5, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [2, 1, 7, 0, 0, 0, 0],
        [9, 9, 9, 9, 9, 9, 0],
    ]


def test_loss_is_that_of_predicting_word_after_word():
    """Each word, and the first end, from the words before it and the clip; nothing after."""
    captioner, found = seeded(Captioner, SMALL, VOCABULARY), randn(4, 32, 2, 1, 2)
    total, count, right = 0.0, 0, 0
    for b, caption in enumerate(CAPTIONS):
        words = caption.split()[: SMALL.caption_words]
        ids = [captioner.vocabulary[word] for word in words] + [captioner.end]
        said = []
        for i, word in enumerate(ids):
            told = torch.tensor([[captioner.end, *ids[:i]]])
            scores = captioner(found[b : b + 1], told)[0, -1]
            total -= scores.log_softmax(0)[word]
            said.append(scores.argmax().item())
        count += len(ids)
        right += said == ids
    ids = captioner.tokenize(CAPTIONS)
    loss, exact = captioner.loss(found, ids)
    assert captioner.lengths(ids).tolist() == [6, 4, 2, 7] and count == 6 + 4 + 2 + 7
    assert_close(loss.sum(), total)
    assert exact.sum().item() == right


def test_a_word_never_sees_the_words_after_it():
    captioner, found = seeded(Captioner, SMALL, VOCABULARY), randn(1, 32, 2, 1, 2)
    ids = torch.tensor([[0, 2, 3, 5, 6]])
    before = captioner(found, ids)
    for i in range(1, 5):
        other = ids.clone()
        other[0, i:] = 4
        after = captioner(found, other)
        assert_close(after[:, :i], before[:, :i])
        assert (after[:, i] - before[:, i]).abs().max() > 0.01


def test_the_next_word_depends_on_the_order_of_those_before_it():
    """In one block: in two, the causal mask alone would tell it."""
    config = TinyEncoderConfig(**vars(SMALL) | {"caption_blocks": 1})
    captioner, found = seeded(Captioner, config, VOCABULARY), randn(1, 32, 2, 1, 2)
    one, other = (captioner(found, torch.tensor([ids]))[0, -1] for ids in ([0, 2, 3], [2, 0, 3]))
    assert (one - other).abs().max() > 0.01


def test_the_loss_reaches_the_features_of_its_own_clip_only():
    captioner, found = seeded(Captioner, SMALL, VOCABULARY), randn(4, 32, 2, 1, 2)
    found.requires_grad_()
    for b in range(4):
        part = captioner.loss(found[b : b + 1], captioner.tokenize(CAPTIONS[b : b + 1]))[0]
        (gradient,) = torch.autograd.grad(part, found)
        assert gradient.ne(0).flatten(1).any(1).tolist() == [i == b for i in range(4)]


def test_unknown_words_are_one_word_and_case_is_ignored():
    captioner, found = seeded(Captioner, SMALL, VOCABULARY), randn(1, 32, 2, 1, 2)
    losses = [
        captioner.loss(found, captioner.tokenize([text]))[0].item()
        for text in ("a pink circle", "A mauve Circle", "a red circle")
    ]
    assert losses[0] == losses[1] != losses[2]


def test_eight_captions_are_learned():
    """Encoder and captioner together, from different videos; the bar is one word in fifty wrong."""
    encoder, captioner = (
        seeded(TinyEncoder, SMALL, shake=0),
        seeded(Captioner, SMALL, VOCABULARY, shake=0),
    )
    captions = [
        f"a {c} {s} {m}"
        for c in ("red", "blue")
        for s in ("circle", "cross")
        for m in ("moves left", "left")
    ]
    video = clips(8, 2, 16, 16)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *captioner.parameters()], 3e-3)
    losses = []
    for _ in range(60):
        ids = captioner.tokenize(captions)
        loss, exact = captioner.loss(encoder(video), ids)
        loss = loss.sum() / captioner.lengths(ids).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.7 * math.log(10) and losses[-1] < 0.02, (
        f"{losses[0]:.2f} to {losses[-1]:.3f}"
    )
    assert exact.all()


def test_an_encoder_with_a_span_reads_stretches_each_by_itself():
    config = TinyEncoderConfig(**vars(SMALL) | {"span": 2})
    encoder = seeded(TinyEncoder, config)
    video = clips(2, 10, 16, 16)  # two stretches of two pairs, and one pair
    found = encoder.encode(video)
    alone = torch.cat([encoder.encode(part) for part in video.split(4, 2)], 2)
    assert found.shape[2] == 5 and torch.equal(found, alone)
    everything = seeded(TinyEncoder, SMALL)
    everything.load_state_dict(encoder.state_dict())
    assert not torch.allclose(everything.encode(video)[:, :, :2], found[:, :, :2])
