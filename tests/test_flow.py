"""flow.py against closed forms: the ends of the path, the sign of time, and Gaussian data.

For Gaussian data N(m, s^2) everything is known. With var(t) = (1 - t)^2 s^2 + t^2, the best
velocity is E[noise - data | z_t] = -m + (t - (1 - t) s^2) / var(t) * (z_t - (1 - t) m), and the ODE
that it drives takes noise e to z_t = (1 - t) m + sqrt(var(t)) e, so to m + s e at t = 0. Float64
throughout, except where a dtype is the point; fixed generators.
"""

import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_close, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.func import jvp

import flow
from flow import (
    euler,
    expand_time,
    flow_loss,
    guidance_weights,
    path,
    sample_time,
    shift_time,
    time_grid,
    velocity_target,
)

numbers = st.floats(-100, 100, allow_subnormal=False)
times = st.floats(0, 1, allow_subnormal=False)
shifts = st.floats(0.1, 12)
means, spreads = st.floats(-3, 3), st.floats(0.3, 3)


@st.composite
def batches(draw, count: int = 2) -> list[Tensor]:
    """Draw `count` float64 tensors of one shape (B, C, ...) with up to five axes."""
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=5, max_side=3))
    return [
        torch.from_numpy(draw(arrays.arrays("float64", shape, elements=numbers)))
        for _ in range(count)
    ]


def guide(velocities: list[Tensor], *scales: float) -> Tensor:
    """Combine v_0, v_1, ... as the weights say."""
    return sum(w * v for w, v in zip(guidance_weights(*scales), velocities, strict=True))


# --- the convention table, row by row ----------------------------------------------------------


@given(batches())
def test_t_0_is_data(pair):
    data, noise = pair
    assert path(data, noise, torch.zeros(len(data))).equal(data)


@given(batches())
def test_t_1_is_noise(pair):
    data, noise = pair
    assert path(data, noise, torch.ones(len(data))).equal(noise)


@given(batches(), st.data())
def test_path_is_equation_1(pair, draws):
    """Each sample of the batch has its own t."""
    data, noise = pair
    t = [draws.draw(times) for _ in data]
    z = path(data, noise, torch.tensor(t, dtype=torch.float64))
    for b in range(len(data)):
        assert_close(z[b], (1 - t[b]) * data[b] + t[b] * noise[b], 1e-10)


@given(batches(), times)
def test_velocity_is_the_derivative_of_the_path_by_t(pair, t):
    data, noise = pair
    t = torch.full((len(data),), t, dtype=torch.float64)
    _, derivative = jvp(lambda t: path(data, noise, t), (t,), (torch.ones_like(t),))
    assert_close(derivative, velocity_target(data, noise), 1e-10)


def test_velocity_points_from_the_data_to_the_noise():
    data, noise = torch.tensor([2.0]), torch.tensor([7.0])
    assert velocity_target(data, noise).item() == 5.0


@given(st.integers(1, 50), shifts)
def test_sampling_goes_from_t_1_down_to_0_with_negative_steps(steps, shift):
    seen = []
    z = euler(lambda z, t: seen.append(t) or torch.ones_like(z), torch.zeros(3, 2), steps, shift)
    assert all(t.shape == (3,) for t in seen)  # as networks and `path` take it
    seen = torch.stack(seen)[:, 0]
    assert len(seen) == steps and seen[0].item() == pytest.approx(1, abs=1e-6)
    assert (seen.diff() < 0).all() and seen[-1] > 0  # the network is never asked at t = 0
    assert_close(z, -1.0, 1e-5)  # dz/dt = +1, so going back by one second of t lowers z by 1


@given(batches(), st.floats(-4, 12))
def test_guidance_0_is_unconditional_and_1_conditional_on_all_channels(pair, scale):
    unconditional, conditional = pair
    assert guide(pair, 0.0).equal(unconditional)
    assert guide(pair, 1.0).equal(conditional)
    # Affine in the scale, element by element: no channel is left out (as some codebases do).
    guided = guide(pair, scale)
    assert_close(guided - unconditional, scale * (conditional - unconditional), 1e-9)


@given(times, shifts)
def test_shift_above_1_moves_t_towards_the_noise(t, shift):
    t = torch.tensor(t, dtype=torch.float64)
    assert_close(shift_time(t, shift), shift * t / (1 + (shift - 1) * t), 1e-10)
    moved = shift_time(t, shift) - t
    assert moved * (shift - 1) >= -1e-12
    assert shift_time(torch.tensor(0.5), 3.0).item() == 0.75


CONVENTIONS = {  # row of the table in flow.py -> the tests above that assert it
    "t = 0": [test_t_0_is_data],
    "t = 1": [test_t_1_is_noise],
    "path (Eq. 1)": [test_path_is_equation_1],
    "velocity": [
        test_velocity_is_the_derivative_of_the_path_by_t,
        test_velocity_points_from_the_data_to_the_noise,
    ],
    "sampling (Eq. 4)": [test_sampling_goes_from_t_1_down_to_0_with_negative_steps],
    "guidance scale": [test_guidance_0_is_unconditional_and_1_conditional_on_all_channels],
    "shift a": [test_shift_above_1_moves_t_towards_the_noise],
}


def test_every_row_of_the_convention_table_has_its_test():
    rows = [line.split("|")[1].strip() for line in flow.__doc__.splitlines() if line[:1] == "|"]
    assert rows[2:] == list(CONVENTIONS)  # after the table's head and the rule below it


# --- Euler -------------------------------------------------------------------------------------


@given(batches(), st.integers(1, 30))
def test_the_exact_velocity_recovers_the_data_in_any_number_of_steps(pair, steps):
    """One step suffices: the path is straight."""
    data, noise = pair
    velocity = velocity_target(data, noise)
    assert_close(euler(lambda z, t: velocity, noise, 1), data, 1e-10)
    assert_close(euler(lambda z, t: velocity, noise, steps), data, 1e-10)


@given(batches(), st.integers(1, 20), shifts)
def test_back_and_forth_along_a_constant_velocity_changes_nothing(pair, steps, shift):
    start, velocity = pair
    there = euler(lambda z, t: velocity, start, steps, shift)
    assert_close(euler(lambda z, t: -velocity, there, steps, shift), start, 1e-10)


def test_a_velocity_of_plus_one_lowers_z_by_one():
    """The paper writes its update without a sign; with a positive dt, z would rise."""
    z = euler(lambda z, t: torch.ones_like(z), torch.full((2, 3), 5.0), 7)
    assert_close(z, 4.0, 1e-6)


@given(st.integers(1, 40), shifts)
def test_each_step_uses_the_velocity_at_its_start(steps, shift):
    """dz/dt = t: a left Riemann sum over the grid, exactly."""
    grid = time_grid(steps, shift).double()
    z = euler(lambda z, t: expand_time(t, z).expand_as(z), torch.zeros(2, 1).double(), steps, shift)
    assert_close(z, ((grid[1:] - grid[:-1]) * grid[:-1]).sum().item(), 1e-12)


def test_euler_follows_the_state_and_not_only_the_time():
    """dz/dt = z by n steps is z (1 - 1/n)^n."""
    z = euler(lambda z, t: z, torch.ones(1, dtype=torch.float64), 10)
    assert_close(z, 0.9**10, 1e-6)


def gaussian_velocity(m: float, s: float):
    """Return E[noise - data | z_t] for data N(m, s^2): see the head of this file."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, z)
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (z - (1 - t) * m)

    return velocity


@settings(max_examples=20)
@given(means, spreads, st.sampled_from([1.0, 3.0]))
def test_gaussian_samples_have_the_mean_and_variance_of_the_data(m, s, shift):
    noise = randn(20_000, 1, dtype=torch.float64)
    samples = euler(gaussian_velocity(m, s), noise, 300, shift)
    bound = 4 / math.sqrt(len(noise))  # four standard errors; then the error of 300 steps
    mean, variance = samples.mean().item(), samples.var().item()
    assert abs(mean - m) < bound * s + 0.001, f"mean {mean:.4f}, not {m}"
    assert abs(variance / s**2 - 1) < bound * math.sqrt(2) + 0.035, f"{variance:.4f}, not {s**2}"


@settings(max_examples=20)
@given(means, spreads, st.sampled_from([1.0, 0.5, 3.0]))
def test_euler_converges_at_first_order_to_the_closed_form(m, s, shift):
    noise = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    exact = m + s * noise
    steps = (200, 400, 800)
    errors = [(euler(gaussian_velocity(m, s), noise, n, shift) - exact).abs().max() for n in steps]
    for coarse, fine in pairwise(errors):
        order = math.log2(coarse / fine)
        assert 0.98 < order < 1.01, f"order {order:.3f}, errors {[e.item() for e in errors]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_solver_integrates_in_float32_whatever_the_velocity_dtype(dtype):
    """In bfloat16 the neighbours of 256 are 255 and 258: a step of 0.01 would change nothing."""
    for start in (torch.float32, dtype):
        seen = set()
        z = euler(
            lambda z, t, seen=seen: seen.add((z.dtype, t.dtype)) or torch.ones_like(z).to(dtype),
            torch.full((2, 1), 256).to(start),
            100,
        )
        wide = torch.promote_types(start, torch.float32)
        assert z.dtype == wide and seen == {(wide, wide)}
        assert_close(z, 255.0, 1e-3)


def test_the_solver_leaves_its_noise_alone():
    noise = randn(4, 3, dtype=torch.float64)
    kept = noise.clone()
    euler(lambda z, t: z, noise, 3)
    assert noise.equal(kept)


# --- the loss ----------------------------------------------------------------------------------


@given(batches(3))
def test_loss_of_each_sample_is_the_mean_square_of_its_error(triple):
    velocity, data, noise = triple
    loss = flow_loss(velocity, data, noise)
    assert loss.shape == (len(data),) and loss.dtype == torch.float32
    for b in range(len(data)):
        error = velocity[b] - (noise[b] - data[b])
        assert loss[b].item() == pytest.approx(error.square().mean().item(), rel=1e-4, abs=1e-6)
    assert flow_loss(velocity_target(data, noise), data, noise).abs().max() < 1e-6


def test_loss_is_float32_whatever_the_dtype_of_the_network():
    """The square of 300 is beyond float16."""
    zero = torch.zeros(2, 4).half()
    loss = flow_loss(zero + 300, zero, zero)
    assert loss.dtype == torch.float32 and loss.tolist() == [90_000, 90_000]


@settings(max_examples=25)
@given(means, spreads, st.floats(0.02, 0.98))
def test_the_loss_is_least_at_the_conditional_expectation(m, s, t):
    """Among models v = a + b z_t, and among constants v = a, where it is E[noise - data] = -m.

    The expectation over data and noise is exact, by Gauss-Hermite quadrature, so that no sampling
    error hides a wrong target; the loss is quadratic in the model: one Newton step is its optimum.
    """
    nodes = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)  # exact to the fifth power
    data = (m + s * nodes).repeat_interleave(3)[:, None]  # (9, 1), each with each noise
    noise = nodes.repeat(3)[:, None]
    weight = weights.repeat_interleave(3) * weights.repeat(3)
    z = path(data, noise, torch.full((9,), t, dtype=torch.float64))

    def best(features: Tensor) -> Tensor:  # (9, P) -> (P,)
        model = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
        loss = (weight * flow_loss(features @ model[:, None], data, noise)).sum()
        (gradient,) = torch.autograd.grad(loss, model, create_graph=True)
        hessian = torch.stack(
            [torch.autograd.grad(g, model, retain_graph=True)[0] for g in gradient]
        )
        return model.detach() - torch.linalg.solve(hessian, gradient.detach())

    a, b = best(torch.cat([torch.ones_like(z), z], 1))
    points = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    expected = gaussian_velocity(m, s)(points, torch.full((3,), t, dtype=torch.float64))
    assert_close(a + b * points, expected, 1e-3)
    assert_close(best(torch.ones_like(z)), -m, 1e-4)


# --- guidance ----------------------------------------------------------------------------------


@given(st.lists(st.floats(-4, 12), max_size=4))
def test_guidance_weights_sum_to_one(scales):
    weights = guidance_weights(*scales)
    assert len(weights) == len(scales) + 1
    assert sum(weights) == pytest.approx(1)


@given(batches(3), st.floats(-4, 12), st.floats(-4, 12))
def test_two_conditions_have_a_scale_each(triple, text, plan):
    """The usual form: v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1)."""
    v0, v1, v2 = triple
    assert_close(guide(triple, text, plan), v0 + text * (v1 - v0) + plan * (v2 - v1), 1e-9)
    assert guide(triple, 0.0, 0.0).equal(v0)
    assert guide(triple, 1.0, 0.0).equal(v1)
    assert guide(triple, 1.0, 1.0).equal(v2)


def test_guidance_needs_one_velocity_more_than_scales():
    with pytest.raises(ValueError):
        guide([torch.zeros(1)], 2.0)


# --- the shift and the times -------------------------------------------------------------------


@given(shifts)
def test_shift_keeps_the_ends_and_the_order(shift):
    t = shift_time(torch.linspace(0, 1, 101, dtype=torch.float64), shift)
    assert t[0].item() == 0 and t[-1].item() == pytest.approx(1, abs=1e-14)
    assert (t.diff() > 0).all()


@given(times, shifts, shifts)
def test_shifts_compose_by_multiplication_and_have_an_inverse(t, a, b):
    t = torch.tensor(t, dtype=torch.float64)
    assert_close(shift_time(shift_time(t, b), a), shift_time(t, a * b), 1e-10)
    assert_close(shift_time(shift_time(t, a), 1 / a), t, 1e-10)
    assert shift_time(t, 1.0).equal(t)


@given(st.integers(1, 200), shifts)
def test_time_grid_is_the_shifted_even_grid_from_1_to_0(steps, shift):
    grid = time_grid(steps, shift)
    assert grid.shape == (steps + 1,) and grid[-1].item() == 0
    even = 1 - torch.arange(steps + 1).double() / steps
    assert_close(grid.double(), shift_time(even, shift), 1e-6)


def test_without_a_shift_the_times_are_even():
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [0, -1])
def test_time_grid_needs_a_step(steps):
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(steps)


def closed_form_cdf(t: Tensor, distribution: str, shift: float) -> Tensor:
    t = t / (shift - (shift - 1) * t)  # the inverse shift, written out
    return torch.special.ndtr(torch.logit(t)) if distribution == "logit_normal" else t


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_times_follow_their_distribution(distribution, shift):
    """Kolmogorov-Smirnov: the largest gap between the empirical and the exact distribution."""
    n = 100_000
    t = sample_time(n, distribution, shift, torch.Generator().manual_seed(0))
    assert t.shape == (n,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    exact = closed_form_cdf(t.double().sort().values, distribution, shift)
    gap = (exact - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 1.63 / math.sqrt(n), f"gap {gap:.4f}"  # exceeded by chance once in a hundred
    quantile = exact.new_tensor([0.1, 0.5, 0.9])
    assert_close(
        closed_form_cdf(t.double().quantile(quantile), distribution, shift), quantile, 0.005
    )


def test_logit_normal_times_are_never_the_ends_and_favour_the_middle():
    t = sample_time(100_000, generator=torch.Generator().manual_seed(0))
    assert t.min() > 0 and t.max() < 1
    inside = ((t > 0.25) & (t < 0.75)).double().mean().item()
    assert inside == pytest.approx(math.erf(math.log(3) / math.sqrt(2)), abs=0.01)  # 0.728


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_times_are_reproducible_by_their_generator_alone(distribution):
    draws = [
        sample_time(8, distribution, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    state = torch.get_rng_state()
    sample_time(8, distribution, generator=torch.Generator())
    assert torch.get_rng_state().equal(state)


def test_an_unknown_time_distribution_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosine'.*logit_normal.*uniform"):
        sample_time(1, "cosine")
