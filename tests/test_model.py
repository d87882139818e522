"""model.py against a naive DiT, closed forms, and other paths to the same numbers.

`naive_dit` is the whole network once more: one sample at a time, tokens built in Python loops,
complex numbers for RoPE, one dense attention matrix per head under the rule of who sees whom. The
real one must equal it in every arrangement. The other tests ask for what must hold whatever the
weights are: the zero start, independence of samples, dropped plans, shifts of time, every parameter
in use. Float32 where coordinates are computed, float64 elsewhere; fixed seeds.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from config import tiny
from flow import flow_loss, path
from model import (
    Block,
    DiT,
    DiTConfig,
    Positions,
    attention,
    frame_attention,
    grid_coords,
    rms_norm,
    rotate,
    timestep_waves,
)
from plumbing.device import recomputed

PAINTER = DiTConfig(
    channels=3,
    rate=2.0,
    text_dim=5,
    context_channels=4,
    context_rate=1.0,
    patch=2,
    width=32,
    depth=2,
    heads=2,
)
PLANNER = DiTConfig(channels=4, rate=1.0, text_dim=5, width=28, depth=2, heads=2)
BASE = replace(PAINTER, context_channels=0)
ROLES = {"painter": PAINTER, "planner": PLANNER, "base": BASE}
roles = pytest.mark.parametrize("config", ROLES.values(), ids=ROLES)

coordinate = st.floats(-20, 20, allow_subnormal=False)
places = st.tuples(coordinate, coordinate, coordinate)


def awake(config: DiTConfig, seed: int = 0) -> DiT:
    """Return a DiT with nothing left at zero, so that every path carries weight."""
    return seeded(DiT, config, seed=seed, shake=0.2)


def inputs(config: DiTConfig, B: int = 2, frames: int = 4, side=(4, 6), seed: int = 1) -> dict:
    """Return what a DiT reads: z, t, text, and context where the config has one."""
    found = {
        "z": randn(B, config.channels, frames, *side, seed=seed),
        "t": torch.linspace(0.2, 0.9, B),
        "text": randn(B, 3, config.text_dim, seed=seed + 1),
    }
    if config.context_channels:
        pairs = max(1, round(frames / config.rate * config.context_rate))
        found["context"] = randn(B, config.context_channels, pairs, 2, 3, seed=seed + 2)
    return found


def pick(batch: dict, i: int) -> dict:
    return {name: x[i : i + 1] for name, x in batch.items()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float):
    """Compare relative to the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
    assert difference <= tolerance, f"max difference {difference:.3g} > {tolerance:.3g}"


def apart(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


# --- the naive DiT -----------------------------------------------------------------------------


def naive_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """q (N, D), k, v (M, D), mask (N, M) -> (N, D), head by head."""
    out = []
    for a in range(heads):
        part = slice(a * q.shape[1] // heads, (a + 1) * q.shape[1] // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(part.stop - part.start)
        out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, part])
    return torch.cat(out, 1)


def normed(x: Tensor, heads: int = 1, gain: Tensor | float = 1.0) -> Tensor:
    """RMS-normalise each head's part of (N, D)."""
    parts = x.unflatten(1, (heads, -1))
    return (F.rms_norm(parts, parts.shape[-1:], eps=1e-6) * gain).flatten(1)


def turned(x: Tensor, heads: int, angles: Tensor) -> Tensor:
    """RoPE by complex numbers: features i and i + d/2 of a head are one; angles (N, d/2)."""
    a, b = x.unflatten(1, (heads, 2, -1)).unbind(2)  # (N, heads, d/2)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.stack([z.real, z.imag], 2).flatten(1)


def naive_self_attention(part, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
    heads = part.heads
    q, k, v = part.qkv(x).chunk(3, 1)
    q = turned(normed(q, heads, part.gain[0].flatten()), heads, angles)
    k = turned(normed(k, heads, part.gain[1].flatten()), heads, angles)
    return part.out(naive_attention(q, k, v, heads, mask))


def naive_block(block: Block, x, time, text, angles, same_frame: Tensor, same_window: Tensor):
    scale = (1 + block.scale(time)).chunk(4)
    x = x + naive_self_attention(block.spatial, normed(x) * scale[0], angles, same_frame)
    x = x + naive_self_attention(block.attention_3d, normed(x) * scale[1], angles, same_window)
    cross, heads = block.cross, block.cross.heads
    k, v = cross.kv(text).chunk(2, 1)
    q, k = normed(cross.q(normed(x) * scale[2]), heads), normed(k, heads)
    everyone = torch.ones(len(q), len(k), dtype=torch.bool)
    x = x + cross.out(naive_attention(q, k, v, heads, everyone))
    return x + block.ffn_out(F.gelu(block.ffn_in(normed(x) * scale[3])))


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    first, _, second = layers
    hidden = x @ first.weight.T + first.bias
    return hidden / (1 + (-hidden).exp()) @ second.weight.T + second.bias


def frequencies(config: DiTConfig) -> list[tuple[int, float]]:
    """Return (axis, cycles) of every pair of a head's features, as the docstring tells them."""
    pairs = config.width // config.heads // 2
    space = pairs // 3

    def geometric(low: float, high: float, n: int) -> list[float]:
        return [low * (high / low) ** (i / max(1, n - 1)) for i in range(n)]

    side = geometric(1 / 4, config.space_cycles, space)
    time = geometric(1 / 64, config.rate / 2, pairs - 2 * space)
    return [(axis, c) for axis, cycles in enumerate((time, side, side)) for c in cycles]


def naive_dit(model: DiT, z: Tensor, t: Tensor, text: Tensor, context: Tensor | None = None):
    """One sample: z (C, T, h, w), t (), text (L, text_dim), context (K, S, hs, ws) or None."""
    config, p = model.config, model.config.patch
    _, T, h, w = z.shape
    tokens, coords, starts, frames = [], [], [], []
    for f, y, x in product(range(T), range(h // p), range(w // p)):
        patch = z[:, f, y * p : (y + 1) * p, x * p : (x + 1) * p]
        tokens.append(model.latents_in(patch.flatten()) + model.type_embedding[0])
        coords.append(((f + 0.5) / config.rate, (y + 0.5) / (h // p), (x + 0.5) / (w // p)))
        starts.append(f / config.rate)
        frames.append(("latents", f))
    if context is not None:
        _, S, hs, ws = context.shape
        for s, y, x in product(range(S), range(hs), range(ws)):
            tokens.append(model.context_in(context[:, s, y, x]) + model.type_embedding[1])
            coords.append(((s + 0.5) / config.context_rate, (y + 0.5) / hs, (x + 0.5) / ws))
            starts.append(s / config.context_rate)
            frames.append(("context", s))

    cycles = frequencies(config)
    angles = torch.tensor(
        [[2 * math.pi * c * place[axis] for axis, c in cycles] for place in coords]
    )
    seen = [i for i, (axis, _) in enumerate(cycles) if axis > 0 or config.time_features]
    waves = torch.cat([angles.cos()[:, seen], angles.sin()[:, seen]], 1)
    x = torch.stack(tokens) + model.positions.features(waves)
    waves = torch.tensor([1000 * 10 ** (-4 * i / 127) for i in range(128)]) * t
    time = F.silu(mlp(model.time_in, torch.cat([waves.cos(), waves.sin()])))
    text = mlp(model.text_in, text)

    def number(start: float, layer: int) -> int:  # of the window that a frame starts in
        if config.window is None:
            return 0
        return math.floor(start / config.window + (0.5 if layer % 2 else 0))

    same_frame = torch.tensor([[a == b for b in frames] for a in frames])
    for layer, block in enumerate(model.blocks):
        numbers = torch.tensor([number(start, layer) for start in starts])
        x = naive_block(block, x, time, text, angles, same_frame, numbers[:, None] == numbers)

    out = torch.zeros_like(z)
    for i, (f, y, x_) in enumerate(product(range(T), range(h // p), range(w // p))):
        patch = model.latents_out(normed(x[i : i + 1])[0] * (1 + model.scale_out(time)))
        out[:, f, y * p : (y + 1) * p, x_ * p : (x_ + 1) * p] = patch.view(-1, p, p)
    return out


ARRANGEMENTS = {
    "painter": PAINTER,
    "windows": replace(PAINTER, window=2.0),
    "relative time": replace(PAINTER, window=2.0, time_features=False, depth=3, heads=4, patch=1),
    "other rates": replace(
        PAINTER, rate=3.0, context_rate=1.5, window=4 / 3, ffn=2, space_cycles=3.0
    ),
    "planner": PLANNER,
    "planner in windows": replace(PLANNER, window=2.0, patch=2),
    "base in windows": replace(BASE, window=1.0),
}


@pytest.mark.parametrize("frames", [8, 11])
@pytest.mark.parametrize("config", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@torch.no_grad()
def test_equals_the_naive_dit(config, frames):
    model, batch = awake(config), inputs(config, frames=frames, side=(2, 4))
    out = model(**batch)
    for i in range(2):
        expected = naive_dit(model, **{name: x[i] for name, x in batch.items()})
        assert_close(out[i], expected, 1e-4)  # t's fastest wave turns 1000 radians, in float32


# --- the start ---------------------------------------------------------------------------------


@roles
def test_a_fresh_dit_says_zero_so_its_loss_is_that_of_saying_nothing(config):
    batch, noise = inputs(config), randn(2, config.channels, 4, 4, 6, seed=7)
    data = batch["z"]
    velocity = DiT(config)(**batch | {"z": path(data, noise, batch["t"])})
    assert velocity.eq(0).all(), f"largest output {velocity.abs().max():.3g}"
    expected = torch.stack([((n - d) ** 2).mean() for n, d in zip(noise, data, strict=True)])
    assert_close(flow_loss(velocity, data, noise), expected, 1e-6)


def test_a_fresh_block_is_exactly_the_identity():
    config = replace(PAINTER, width=24)
    blocks = DiT(config).blocks
    x, time, text = randn(2, 5, 24), randn(2, 24, seed=1), randn(2, 3, 24, seed=2)
    cos, sin, _ = randn(3, 5, 6, seed=3)
    for block in blocks:
        assert block(x, time, text, cos, sin, attention, attention).equal(x)


def test_matrices_start_as_xaviers():
    """Uniform up to sqrt(6 / (in + out)), if not as zeros."""
    for name, weight in DiT(PAINTER).named_parameters():
        if weight.ndim == 2 and "embedding" not in name and weight.any():
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.9 * bound < weight.abs().max() <= bound, name


def test_fresh_blocks_do_not_scale_with_time():
    """Every scale(t) starts at zero, not only the outputs: the first steps see plain RMSNorm."""
    model = DiT(PAINTER)
    for layer in [model.scale_out, *(block.scale for block in model.blocks)]:
        assert layer(randn(2, PAINTER.width)).eq(0).all()


def test_what_tells_streams_apart_starts_at_half_a_unit():
    """Type embeddings and the null plan are drawn from N(0, 0.5^2): as large as other features."""
    model = DiT(replace(PAINTER, width=4096, depth=0))
    for drawn in (*model.type_embedding, model.null_context):
        assert drawn.std().item() == pytest.approx(0.5, rel=0.05) and abs(drawn.mean()) < 0.05


@pytest.mark.parametrize("role", ["latent", "semantic", "base"])
def test_every_parameter_gets_gradient_once_off_the_zero_start(role):
    """The last layer leaves zero in the first step, the blocks' outputs in the second."""
    config = tiny().semantic if role == "semantic" else tiny().latent
    config = replace(config, width=48, depth=2, heads=2)
    config = replace(config, context_channels=0) if role == "base" else config
    torch.manual_seed(0)
    model, batch = DiT(config), inputs(config, B=4, side=(4, 4))
    batch["keep_context"] = torch.tensor([True, False, True, False]) if "context" in batch else None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    target = randn(*batch["z"].shape, seed=9)
    for _ in range(3):
        optimizer.zero_grad()
        (model(**batch) - target).square().mean().backward()
        optimizer.step()  # the third one's gradients stay, to be looked at
    dead = {
        name: p.grad.eq(0).float().mean().item()
        for name, p in model.named_parameters()
        if p.grad is None or p.grad.eq(0).any()
    }
    if role != "latent":
        assert dead.pop("type_embedding") == 0.5  # that of a context which is not there
    assert not dead, f"share of elements without gradient: {dead}"


# --- samples and conditions --------------------------------------------------------------------


@roles
def test_a_sample_does_not_depend_on_the_others(config):
    model, batch = awake(config), inputs(config, B=3)
    leaves = {name: x.requires_grad_() for name, x in batch.items()}
    out = model(**leaves)
    for i in range(3):
        gradients = torch.autograd.grad(out[i].sum(), list(leaves.values()), retain_graph=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            moved = [bool(g.ne(0).any()) for g in gradient]
            assert moved == [i == j for j in range(3)], f"output {i} depends on {name} of {moved}"
        assert_close(model(**pick(leaves, i)), out[i : i + 1], 1e-5)


@torch.no_grad()
def test_a_dropped_plan_is_the_null_plan_whatever_it_held():
    model, batch = awake(PAINTER), inputs(PAINTER, B=3)
    keep = torch.tensor([True, False, True])
    out = model(**batch, keep_context=keep)

    kept = model(**batch)
    assert_close(out[keep], kept[keep], 1e-5)
    assert apart(out[1], kept[1]) > 0.1

    other = batch | {"context": batch["context"].clone()}
    other["context"][1] = torch.nan  # not even this gets through
    assert model(**other, keep_context=keep).equal(out)

    nn.init.zeros_(model.context_in.weight)  # another path: whatever comes in is the null embedding
    model.context_in.bias.copy_(model.null_context)
    assert_close(model(**batch)[1], out[1], 1e-5)


@torch.no_grad()
def test_the_null_text_is_zeros_of_any_length_and_text_is_a_set():
    """All keys alike: attention returns their value, however many; and nothing orders the keys."""
    model, batch = awake(PAINTER), inputs(PAINTER)
    null = [model(**batch | {"text": torch.zeros(2, L, PAINTER.text_dim)}) for L in (1, 3, 16)]
    assert_close(null[0], null[1], 1e-5)
    assert_close(null[2], null[1], 1e-5)
    told = model(**batch)
    assert apart(told, null[1]) > 0.1
    assert_close(model(**batch | {"text": batch["text"].flip(1)}), told, 1e-5)


@torch.no_grad()
def test_padding_of_the_text_takes_part_as_one_more_row_each():
    """No mask: after `text_in` a row of zeros is its biases, and shares the softmax, as in Wan."""
    model, batch = awake(PAINTER), inputs(PAINTER)
    short = model(**batch)
    padded = batch | {"text": F.pad(batch["text"], (0, 0, 0, 4))}
    rows = model.text_in(padded["text"])[:, -4:]
    assert rows.equal(rows[:1, :1].expand_as(rows)) and rows.norm(dim=-1).min() > 0.1
    assert apart(model(**padded), short) > 0.05
    expected = naive_dit(model, **{name: x[0] for name, x in padded.items()})
    assert_close(model(**padded)[0], expected, 1e-4)  # where nobody is left out either

    for layer in (model.text_in[0], model.text_in[2]):  # without biases they would be keys of zero
        layer.bias.zero_()
    assert not model.text_in(padded["text"])[:, -4:].any()


@torch.no_grad()
def test_every_condition_matters():
    model, batch = awake(PAINTER), inputs(PAINTER)
    out = model(**batch)
    for name, x in batch.items():
        changed = model(**batch | {name: x + 0.3})
        assert apart(changed, out) > 0.05, f"{name} changes nothing"


@pytest.mark.parametrize("window", [None, 2.0])
def test_recomputation_gives_the_same_gradients_and_runs_blocks_twice(window):
    model, batch = awake(replace(PAINTER, window=window)), inputs(PAINTER)
    batch["keep_context"] = torch.tensor([True, False])
    runs, found = [], []
    for block in model.blocks:
        block.scale.register_forward_hook(lambda *_: runs.append(1))
    for times, model.run_block in enumerate((nn.Module.__call__, recomputed), 1):
        runs.clear()
        model.zero_grad()
        model(**batch).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        assert len(runs) == len(model.blocks) * times
    for usual, again in zip(*found, strict=True):
        assert again.equal(usual)


def test_gradient_modes_give_the_same_numbers():
    model, batch = awake(replace(PAINTER, window=2.0)), inputs(PAINTER)
    out = model(**batch)
    assert out.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert model(**batch).equal(out)


# --- positions ---------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Return q at `here` times k at `there`, in float64, (n,) for n pairs of places (n, 3)."""
    positions = Positions(PAINTER).double()
    (_, cos, sin), (_, cos_there, sin_there) = positions(here), positions(there)
    return (rotate(q, cos, sin) * rotate(k, cos_there, sin_there)).sum(-1)


@given(places, places, places)
def test_rope_does_not_see_a_common_shift(here, there, shift):
    q, k = randn(2, 1, 16, dtype=torch.float64)
    here, there, shift = torch.tensor([[here], [there], [shift]], dtype=torch.float64)
    assert_close(scores(q, k, here + shift, there + shift), scores(q, k, here, there), 1e-9)


@given(places, places)
def test_rope_is_the_sum_of_waves_of_the_difference(here, there):
    """For q = k of unit pairs: sum of cos(2 pi cycles difference), so it depends on each axis."""
    q = torch.cat([torch.ones(8), torch.zeros(8)])[None].double()
    found = scores(q, q, *torch.tensor([[here], [there]], dtype=torch.float64))
    waves = [
        math.cos(2 * math.pi * c * (here[axis] - there[axis])) for axis, c in frequencies(PAINTER)
    ]
    difference = abs(found.item() - sum(waves))
    assert difference < 1e-4, f"{difference:.3g}"  # the frequencies are stored in float32


@pytest.mark.parametrize("axis", range(3))
def test_rope_tells_near_from_far_on_every_axis(axis):
    q = torch.cat([torch.ones(8), torch.zeros(8)])[None].double()
    here, there = torch.zeros(2, 1, 3, dtype=torch.float64)
    there[0, axis] = 0.1
    assert scores(q, q, here, here).item() - scores(q, q, here, there).item() > 0.01


@given(places, st.integers(0, 2**31))
def test_rotation_keeps_lengths(place, seed):
    x = randn(1, 16, seed=seed, dtype=torch.float64)
    _, cos, sin = Positions(PAINTER).double()(torch.tensor([place], dtype=torch.float64))
    assert_close(rotate(x, cos, sin).norm(), x.norm(), 1e-12)


@pytest.mark.parametrize("time_features", [True, False])
@pytest.mark.parametrize("window", [None, 2.0])
@torch.no_grad()
def test_a_common_shift_of_time_shows_only_in_the_time_features(monkeypatch, time_features, window):
    config = replace(PAINTER, time_features=time_features, window=window)
    model, batch = awake(config), inputs(config)
    out = model(**batch)
    late = grid_coords
    monkeypatch.setattr(
        model_file, "grid_coords", lambda *size: late(*size) + torch.tensor([3.7, 0.0, 0.0])
    )
    shifted = model(**batch)
    if time_features:
        assert apart(shifted, out) > 0.05
        for parameter in model.positions.features.parameters():
            parameter.zero_()
        shifted = model(**batch)
        monkeypatch.undo()
        out = model(**batch)
    assert_close(shifted, out, 2e-5)


@torch.no_grad()
def test_a_shift_in_space_shows_in_the_features(monkeypatch):
    """Where an object is in the frame is told, with RoPE it would only be relative."""
    model, batch = awake(PAINTER), inputs(PAINTER)
    out = model(**batch)
    for axis in (1, 2):
        shift = 0.2 * torch.eye(3)[axis]
        with monkeypatch.context() as patch:
            patch.setattr(model_file, "grid_coords", lambda *size, s=shift: grid_coords(*size) + s)
            assert apart(model(**batch), out) > 0.05


sizes = st.integers(1, 5)


@given(sizes, sizes, sizes, st.sampled_from([0.8, 1.0, 2.0, 6.0, 7.5]))
def test_grid_coords_are_the_centres_in_the_order_of_tokens(frames, height, width, rate):
    expected = [
        ((f + 0.5) / rate, (y + 0.5) / height, (x + 0.5) / width)
        for f in range(frames)
        for y in range(height)
        for x in range(width)
    ]
    found = grid_coords(frames, height, width, rate)
    assert_close(found, torch.tensor(expected, dtype=found.dtype), 1e-6)


@given(st.integers(1, 8), st.sampled_from([0.5, 0.8, 1.0]), st.integers(1, 8))
def test_the_two_streams_line_up_in_time(per_pair, pair_rate, pairs):
    """The latents of one pair of frames have their mean in time where the pair has its place."""
    latents = grid_coords(pairs * per_pair, 2, 2, pair_rate * per_pair)[:, 0]
    semantics = grid_coords(pairs, 1, 1, pair_rate)[:, 0]
    assert_close(latents.view(pairs, -1).mean(1), semantics, 1e-5)


def test_the_dit_gives_each_stream_its_own_rate():
    model, seen = awake(PAINTER), []
    model.positions.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(**inputs(PAINTER))
    expected = [grid_coords(4, 2, 3, PAINTER.rate), grid_coords(2, 2, 3, PAINTER.context_rate)]
    assert_close(seen[0], torch.cat(expected), 0.0)


def test_nothing_about_positions_is_stored():
    """Else weights would not fit a configuration with other frequencies."""
    model = DiT(PAINTER)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_angles_are_exact_under_autocast():
    """A minute is hundreds of radians: with the 8 bits of bfloat16 they would mean nothing."""
    positions, coords = Positions(PAINTER), grid_coords(120, 1, 1, PAINTER.rate)
    _, cos, sin = positions(coords)
    with torch.autocast("cpu", torch.bfloat16):
        _, cos_autocast, sin_autocast = positions(coords)
    assert_close(cos_autocast, cos, 0.0)
    assert_close(sin_autocast, sin, 0.0)


@pytest.mark.parametrize("window", [None, 2.0])
@torch.no_grad()
def test_bfloat16_autocast_is_close_to_float32(window):
    model, batch = awake(replace(PAINTER, window=window)), inputs(PAINTER)
    out = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch).float()
    difference = ((rounded - out).norm() / out.norm()).item()
    assert 0 < difference < 0.03, f"relative difference {difference:.3g}"


@torch.no_grad()
def test_under_autocast_tokens_stay_in_bfloat16(monkeypatch):
    """One sum with float32 would make all that follows twice as large, and slower."""
    seen = []
    monkeypatch.setattr(model_file, "attention", lambda *qkv: seen.extend(qkv) or attention(*qkv))
    model, batch = awake(PAINTER), inputs(PAINTER)
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(model(**batch))
    assert len(seen) == len(model.blocks) * (3 * 3 + 2) + 1
    assert {x.dtype for x in seen} == {torch.bfloat16}


# --- attention ---------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40) | st.sampled_from([255, 256, 257]),  # on either side of its own path
    st.integers(2, 9),
)
def test_attention_is_scaled_dot_product_attention(B, A, N, M, d):
    upstream, results = randn(B, A, N, d, seed=5, dtype=torch.float64), []
    for attend in (attention, F.scaled_dot_product_attention):
        shapes = [(B, A, N, d), (B, A, M, d), (B, A, M, d)]
        qkv = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
        out = attend(*(x.requires_grad_() for x in qkv))
        results.append([out, *torch.autograd.grad(out, qkv, upstream)])
    for ours, torchs in zip(*results, strict=True):
        if ours.norm() > 1e-9 or torchs.norm() > 1e-9:  # of one key, q's gradient is nothing
            assert_close(ours, torchs, 1e-9)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=7))
def test_frame_attention_is_dense_attention_within_frames(frame_tokens):
    frame = torch.tensor([f for f, n in enumerate(frame_tokens) for _ in range(n)])
    q, k, v = randn(3, 2, 2, len(frame), 4, dtype=torch.float64)
    mask = frame[:, None] == frame
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(frame_attention(q, k, v, frame_tokens), expected, 1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_rms_norm_is_torchs(dtype, tolerance):
    x = randn(3, 5, 16, dtype=dtype) * torch.tensor([1e-4, 1.0, 1e3], dtype=dtype)[:, None, None]
    assert_close(rms_norm(x), F.rms_norm(x, (16,), eps=1e-6), tolerance)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)]
)
def test_norm_on_a_cpu_and_its_gradient_are_those_of_the_plain_one(dtype, tolerance, monkeypatch):
    scales = torch.tensor([1e-4, 1.0, 1e3])[:, None, None]  # at the first one 1e-6 counts
    x = (randn(3, 5, 16) * scales).to(dtype).mT.contiguous().mT.requires_grad_()
    g, found = randn(3, 5, 16, seed=1).to(dtype), []
    for compiling in (False, True):  # what is compiled has the plain one
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda now=compiling: now)
        y = rms_norm(x)
        found.append((y, torch.autograd.grad(y, x, g)[0] * scales))
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, tolerance)


def test_timestep_waves_differ_for_times_a_thousandth_apart():
    """From slow waves, that tell 0 from 1, to fast ones, that tell one step from the next."""
    features = timestep_waves(torch.linspace(0, 1, 1001))
    assert features.shape == (1001, 256)
    gaps = torch.cdist(features, features) + 10 * torch.eye(1001)
    assert gaps.min() > 1, f"nearest times differ by {gaps.min():.3g} of {math.sqrt(256):.3g}"
    for dtype in (torch.bfloat16, torch.float64):  # t of another dtype is read in float32
        t = torch.tensor([0.3]).to(dtype)
        assert timestep_waves(t).equal(timestep_waves(t.float()))
    slowest = features[:, [127, 255]]
    assert (slowest.diff(dim=0)[:, 1] > 0).all()  # its sine rises all the way: no time comes twice


@roles
@torch.no_grad()
def test_a_window_of_the_whole_clip_is_full_attention(config):
    model, batch = awake(config), inputs(config)
    out = model(**batch)
    for window in (4 / config.rate, 60.0):
        windowed = DiT(replace(config, window=window))
        windowed.load_state_dict(model.state_dict())
        assert windowed(**batch).equal(out)


@torch.no_grad()
def test_what_follows_a_window_does_not_touch_it():
    """One unshifted layer: the first window of a long clip comes out as a clip of its own."""
    config = replace(PAINTER, window=2.0, depth=1)
    model, batch = awake(config), inputs(config, frames=12)
    short = batch | {"z": batch["z"][:, :, :4], "context": batch["context"][:, :, :2]}
    assert_close(model(**batch)[:, :, :4], model(**short), 1e-5)
    full = DiT(replace(config, window=None))
    full.load_state_dict(model.state_dict())
    assert apart(full(**batch)[:, :, :4], full(**short)) > 0.01


@pytest.mark.parametrize("layer", [0, 1])
def test_even_layers_have_whole_windows_and_odd_ones_begin_with_half(layer):
    """The other layer is left at its start, the identity; 8 frames of half a second, window 2 s."""
    config = replace(PLANNER, rate=2.0, window=2.0)
    model, fresh = awake(config), DiT(config)
    model.blocks[1 - layer] = fresh.blocks[1 - layer]
    z = randn(1, 4, 8, 1, 1).requires_grad_()
    out = model(z, torch.tensor([0.5]), randn(1, 3, 5))
    found = [
        torch.autograd.grad(out[:, :, f].sum(), z, retain_graph=True)[0].ne(0).any(1).flatten()
        for f in range(8)
    ]
    window = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2]][layer])
    assert torch.stack(found).equal(window[:, None] == window)


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_patches_go_back_where_they_came_from(patch):
    """Identity weights; latents of plus and minus one, which RMSNorm leaves as they are."""
    width = 8 * patch**2
    config = DiTConfig(channels=8, rate=2.0, text_dim=5, patch=patch, width=width, heads=1)
    model = DiT(config)
    for linear in (model.latents_in, model.latents_out):
        linear.weight.copy_(torch.eye(width))
    for parameter in (model.type_embedding, *model.positions.features.parameters()):
        parameter.zero_()
    z = randn(2, 8, 3, 4, 6).sign()
    assert_close(model(z, torch.rand(2), torch.zeros(2, 1, 5)), z, 1e-6)


@roles
@torch.no_grad()
def test_the_same_weights_serve_other_lengths_and_sizes(config):
    """No size is built in: `equals_the_naive_dit` says that the numbers are right as well."""
    model = awake(config)
    for frames, side in ((1, (2, 2)), (4, (4, 6)), (9, (6, 2))):
        batch = inputs(config, frames=frames, side=side)
        out = model(**batch)
        assert out.shape == batch["z"].shape and out.isfinite().all()


@pytest.mark.parametrize("side, named", [((3, 4), "3 x 4"), ((4, 5), "4 x 5")])
def test_a_size_that_does_not_divide_is_refused(side, named):
    with pytest.raises(ValueError, match=f"{named} do not divide into patches of 2"):
        DiT(PAINTER)(**inputs(PAINTER, side=side))


def test_a_missing_or_needless_context_is_refused():
    batch = inputs(PAINTER)
    with pytest.raises(ValueError, match="context given, but context_channels is 0"):
        DiT(BASE)(**batch)
    del batch["context"]
    with pytest.raises(ValueError, match="context missing, but context_channels is 4"):
        DiT(PAINTER)(**batch)


@pytest.mark.parametrize("width, heads", [(30, 4), (28, 4), (16, 4), (0, 2), (8, 8)])
def test_heads_that_cannot_be_are_refused(width, heads):
    """Not dividing, odd, too narrow for three axes of positions."""
    with pytest.raises(ValueError, match=f"width {width} over {heads} heads"):
        replace(PLANNER, width=width, heads=heads)


def test_a_window_that_does_not_fit_the_rates_is_refused():
    with pytest.raises(ValueError, match=r"2\.0 s does"):
        awake(replace(PAINTER, window=1.5))(**inputs(PAINTER))


@pytest.mark.parametrize("features", [False, True])
def test_only_absolute_features_know_when_a_stretch_starts(features):
    """Without them a painter does the same with the same latents and plan at any time."""
    torch.manual_seed(0)
    config = DiTConfig(8, 2.0, 6, 4, 1.0, width=32, heads=2, window=2.0, time_features=features)
    dit = DiT(config)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, plan = torch.randn(2, 8, 8, 2, 2), torch.randn(2, 4, 4, 2, 2)
    given = z, torch.rand(2), torch.randn(2, 3, 6), plan
    early, late = dit(*given), dit(*given, start=torch.tensor(6.0))
    assert torch.allclose(early, late, atol=1e-4) != features


def test_a_start_is_the_place_in_the_whole():
    """A stretch of whole windows, told its start, is what it is inside the whole clip."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(8, 2.0, 6, width=32, heads=2, depth=1, window=2.0))
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, t, text = torch.randn(1, 8, 12, 2, 2), torch.rand(1), torch.randn(1, 3, 6)
    whole = dit(z, t, text)
    part = dit(z[:, :, 4:8], t, text, start=2.0)
    torch.testing.assert_close(part, whole[:, :, 4:8], atol=1e-4, rtol=1e-4)


# --- weights, the compiler, the meta device ----------------------------------------------------


def test_a_dit_without_windows_is_compiled_as_one_graph():
    model, batch = awake(replace(PAINTER, depth=1)), inputs(PAINTER)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**batch), model(**batch), 1e-6)


@pytest.mark.parametrize("window", [None, 2.0])
def test_work_can_be_counted_without_doing_it(window):
    """Forward and backward on the meta device: as many as where numbers are computed."""
    counts = []
    for device in ("cpu", "meta"):
        model = DiT(replace(PAINTER, window=window)).to(device)
        batch = {name: x.to(device) for name, x in inputs(PAINTER, frames=8).items()}
        with FlopCounterMode(display=False) as counter:
            model(**batch).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0, counts
