"""What experiments.py compares the method with: other compressors, encoders, a world that flashes.

PCA against numpy's SVD, folded latents against a loop, what a masked clip may not tell, and scores
of clips that are alike in a known way.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_run import MICRO, random_run
from torch.testing import assert_close

from claims import latents_as_plan
from config import tiny
from data import DataConfig, to_float
from evaluate import Evaluation
from plumbing.files import UserError
from plumbing.seeds import Rows
from run import Run
from semantic import Compressor, CompressorConfig
from settings import override
from toy.encoder import HIDDEN, HiddenLearner, TinyEncoderConfig
from toy.reader import read
from toy.scores import drift, drifts, flash_of, flash_scores, likeness
from toy.world import World

FLASHING = World(DataConfig(flashes=True), "test")
CALM = World(DataConfig(), "test")


# --- compressors --------------------------------------------------------------------------------


def features(channels: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=rng)
    return torch.einsum("bc...,dc->bd...", torch.randn(8, channels, 2, 4, 4, generator=rng), mix)


def fixed(kind: str, dim: int, channels: int) -> Compressor:
    made = Compressor(dim, CompressorConfig(kind=kind, channels=channels))
    made.set_feature_statistics(features(dim))
    made.set_statistics(features(dim))
    assert not list(made.parameters())  # nothing to learn
    return made


def test_pca_keeps_as_much_variance_as_numpys_svd():
    plan = fixed("pca", 6, 3).encode(features(6))
    flat = features(6).movedim(1, -1).flatten(0, -2).numpy()
    standard = (flat - flat.mean(0)) / flat.std(0, ddof=1)
    _, values, _ = np.linalg.svd(standard, full_matrices=False)
    kept = plan.movedim(1, -1).flatten(0, -2).numpy()
    assert_close(kept.var(0, ddof=1), (values[:3] ** 2 / (len(flat) - 1)), rtol=1e-3, atol=1e-4)
    assert_close(np.corrcoef(kept.T), np.eye(3), rtol=0, atol=1e-4)


def test_without_compression_a_plan_is_the_standardised_features():
    made = fixed("none", 6, 6)
    found = features(6)
    assert_close(made.encode(found).mean((0, 2, 3, 4)), torch.zeros(6), rtol=0, atol=1e-5)
    scale = found.std((0, 2, 3, 4)).reshape(-1, 1, 1, 1)
    centred = found - found.mean((0, 2, 3, 4)).reshape(-1, 1, 1, 1)
    assert_close(made.encode(found) * scale, centred, rtol=1e-4, atol=1e-4)
    z_sem, _ = made(found, torch.ones_like(found))
    assert (z_sem - made.encode(found)).abs().max() < 1e-3  # and has no variance


@pytest.mark.parametrize("kind", ["pca", "none"])
def test_plans_of_fixed_compressors_have_unit_variance(kind):
    made = fixed(kind, 6, 6)
    plans = made.normalise(made.encode(features(6))).transpose(0, 1).flatten(1)
    assert_close(plans.mean(1), torch.zeros(6), rtol=0, atol=1e-4)
    assert_close(plans.std(1), torch.ones(6), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["compressor.kind=lda"], "compressor.kind=lda: choose mlp, pca, none"),
        (["compressor.kind=none"], "of 128 features it cannot make 8"),
        (["compressor.kind=pca", "encoder.dim=16", "compressor.channels=17"], "it cannot make 17"),
        (["encoder.learns=audio"], "encoder.learns=audio: choose captions or hidden"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises((UserError, ValueError), match=message):
        override(tiny(), fields)


# --- encoders -----------------------------------------------------------------------------------


def test_plans_of_latents_have_the_grid_of_plans_of_features():
    usual = tiny()
    other = override(usual, (), **latents_as_plan(usual))
    assert other.plan_grid() == usual.plan_grid()
    assert other.latent_grid() == usual.latent_grid()
    numbers = [np.prod(c.plan_grid()) for c in (usual, other)]
    assert other.encoder.dim * numbers[1] == usual.vae.channels * np.prod(usual.latent_grid())


def test_features_of_latents_are_the_latents_of_their_place(tmp_path):
    """A run reads them with its own VAE; against a loop over places."""
    usual = override(tiny(), [*MICRO, "data.frames=16"])
    config = override(usual, (), **latents_as_plan(usual))
    made = random_run(tmp_path / "vae", stages=["vae"])
    run = Run.create(tmp_path / "run", config)
    run.weights_file("vae").write_bytes(made.weights_file("vae").read_bytes())
    clips = World(config.data, "test").batch([0, 1])
    assert clips.video.equal(clips.semantic_video)
    found, latents = (
        run.encoder.encode(to_float(clips.video)),
        run.vae.encode(to_float(clips.video)),
    )
    S, hs, ws = config.plan_grid()
    t, h, w = (n // m for n, m in zip(latents.shape[2:], (S, hs, ws), strict=True))
    assert S > 1 and found.shape == (2, config.encoder.dim, S, hs, ws)
    for s in range(S):
        for y in range(hs):
            for x in range(ws):
                place = latents[:, :, s * t : s * t + t, y * h : y * h + h, x * w : x * w + w]
                assert found[:, :, s, y, x].equal(place.flatten(1))
    test = Evaluation(run, "test", 2, seed=0)  # which shows each frame as often as is read
    assert 0 < test.scores(clips.video)["subject"] <= 100


HIDING = TinyEncoderConfig(dim=32, blocks=1, heads=2)
SIZE = (4, 16, 16)


def test_what_is_hidden_does_not_reach_the_features():
    torch.manual_seed(0)
    learner, hidden = HiddenLearner(HIDING, SIZE), torch.ones(1, 2, 2, 2)
    hidden[0, 1, 0, 1] = 0.0  # below HIDDEN
    video = torch.randint(256, (1, 3, *SIZE), dtype=torch.uint8)
    other = video.clone()
    other[..., 2:4, :8, 8:] = 255 - other[..., 2:4, :8, 8:]
    seen = []
    learner["encoder"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses = [learner(x, hidden)[0] for x in (video, other)]
    assert seen[0].equal(seen[1]) and losses[0] != losses[1]
    shown = seen[0] == to_float(video)
    assert not shown[..., 2:4, :8, 8:].all() and shown.float().mean() > 0.8
    # The loss is of the hidden place alone.
    place = learner["head"](learner["encoder"](seen[0]).movedim(1, -1))[0, 1, 0, 1]
    truth = to_float(video)[0, :, 2:4, :8, 8:].flatten()
    assert_close(losses[0], F.l1_loss(place, truth))


def test_hidden_parts_are_drawn_for_each_row_at_their_share():
    learner = HiddenLearner(HIDING, SIZE)
    data = World(DataConfig(frames=16, semantic_height=16, semantic_width=16), "train")
    both = [learner.draw(data, Rows(rows, "encoder")) for rows in (range(400), range(7, 9))]
    assert both[0]["hidden"][7:9].equal(both[1]["hidden"])
    share = (both[0]["hidden"] < HIDDEN).float().mean()
    assert abs(float(share) - HIDDEN) < 0.05


def test_hidden_pixels_are_learned():
    """From the rest of the clip: better than each place's own mean, which knows no clip."""
    torch.manual_seed(0)
    learner = HiddenLearner(HIDING, SIZE)
    levels = torch.randint(40, 216, (64, 3, 1, 1, 1)).to(torch.uint8)
    video = levels.expand(-1, -1, *SIZE).clone()  # plain clips, each of its own colour
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3)
    blind = (to_float(video) - to_float(video).mean(0)).abs().mean()
    for _ in range(80):
        loss, _ = learner(video, torch.rand(64, 2, 2, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < blind / 2, (loss, blind)


# --- flashes ------------------------------------------------------------------------------------


def test_half_of_the_clips_flash_once_and_nothing_else_changes():
    rows = range(200)
    both, calm = FLASHING.batch(rows), CALM.batch(rows)
    assert both.captions == calm.captions
    frames = [FLASHING.flash(i) for i in rows]
    assert 70 < sum(frame is not None for frame in frames) < 130
    assert len(set(frames)) == DataConfig().frames + 1  # each frame, and none
    assert not any(CALM.flash(i) for i in rows)
    for one, other, frame in zip(both.video, calm.video, frames, strict=True):
        differ = [k for k in range(one.shape[1]) if not one[:, k].equal(other[:, k])]
        assert differ == ([] if frame is None else [frame])
        assert flash_of(one) == frame and flash_of(other) is None


def test_the_low_rate_shows_the_flashes_of_its_own_frames():
    rows, own = range(60), set(FLASHING._low_rate_frames().tolist())
    low, calm = FLASHING.semantic_video(rows), CALM.semantic_video(rows)
    changed = (low != calm).flatten(1).any(1).tolist()
    assert changed == [FLASHING.flash(i) in own for i in rows] and 0 < sum(changed) < 30
    fast = World(DataConfig(flashes=True, semantic_fps=8.0), "test")
    assert set(range(DataConfig().frames)) == set(fast._low_rate_frames().tolist())


def test_flashes_do_not_hide_what_a_clip_shows():
    video = FLASHING.batch(range(60)).video
    assert [read(clip) for clip in video] == [CALM.scene(i) for i in range(60)]


@pytest.mark.parametrize(
    ("frame", "true", "flash", "calm"),
    [
        *((5, 5, 100, None), (6, 5, 100, None), (7, 5, 0, None), (None, 5, 0, None)),
        *((None, None, None, 100), (3, None, None, 0), (0, 0, 100, None)),
    ],
)
def test_a_flash_counts_within_a_frame_of_the_true_one(frame, true, flash, calm):
    video = torch.full((3, 16, 8, 8), 90, dtype=torch.uint8)
    if frame is not None:
        video[:, frame] = 200
    assert flash_scores(video, true) == {"flash": flash, "calm": calm}


# --- likeness -----------------------------------------------------------------------------------


def test_a_clip_keeps_all_of_itself_whatever_its_colours_and_brightness():
    for clip in CALM.batch(range(8)).video:
        assert likeness(clip, clip) == pytest.approx({"layout": 100, "texture": 100}, abs=0.1)
        turned = clip[[1, 2, 0]]  # other colours, objects where they were
        assert likeness(turned, clip) == pytest.approx({"layout": 100, "texture": 100}, abs=0.1)
        grey = clip.float().mean((0, 1, 2, 3), keepdim=True).expand(clip.shape).to(torch.uint8)
        assert likeness(grey, clip) == {"layout": 0, "texture": 0}  # nothing there


def test_another_clip_keeps_little():
    clips = CALM.batch(range(64)).video
    found = [likeness(a, b) for a, b in zip(clips.roll(1, 0), clips, strict=True)]
    assert np.mean([x["layout"] for x in found]) < 40
    assert abs(np.mean([x["texture"] for x in found])) < 30


def test_drift_is_the_mean_of_each_clips():
    clips = CALM.batch(range(4)).video
    scenes, zeros = [CALM.scene(i) for i in range(4)], lambda videos: torch.zeros(len(videos))
    clips[2, :, -4:] = 128  # its objects disappear
    each = drifts(clips, scenes, zeros)
    assert each["colour"].tolist() == each["shape"].tolist() == [0, 0, 100, 0]
    assert drift(clips, scenes, zeros)["colour"] == 25
