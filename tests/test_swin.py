"""swin.py against a naive rule: tokens attend iff their frames start in the same window of time.

The rule is written here once more, in plain Python loops over exact fractions, and everything is
compared with it: the groups, the attention (outputs and gradients, against dense attention with the
rule as a mask), what each output can depend on, and the amount of work.
"""

import math
import re
from fractions import Fraction
from itertools import count, pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swin import (
    Stream,
    fitting_window,
    merge,
    partition,
    window_bounds,
    windowed_attention,
    windows,
)

# 60 s of Wan latents (a causal VAE: one frame more than 60 * 6), and of semantics at 1.6 / 2 fps.
MINUTE = [Stream(361, 4, 6.0), Stream(48, 2, 0.8)]


class Case(NamedTuple):
    """One arrangement, in exact fractions; `streams` holds the floats that swin.py is given."""

    frames: list[int]
    tokens: list[int]
    rates: list[Fraction]
    window: Fraction
    shifted: bool

    @property
    def streams(self) -> list[Stream]:
        rates = [float(rate) for rate in self.rates]
        return [Stream(*s) for s in zip(self.frames, self.tokens, rates, strict=True)]

    @property
    def groups(self) -> list[Tensor]:
        return windows(self.streams, float(self.window), self.shifted)

    @property
    def size(self) -> int:
        return sum(f * n for f, n in zip(self.frames, self.tokens, strict=True))

    def rule(self) -> list[tuple[int, int, int]]:
        """Return (window, stream, frame) of every token, naively."""
        duration = min(f / rate for f, rate in zip(self.frames, self.rates, strict=True))
        tokens = []
        for stream in range(len(self.frames)):
            for frame in range(self.frames[stream]):
                second = frame / self.rates[stream]
                number, cut = 0, self.window / 2 if self.shifted else self.window
                while self.window < duration and cut < duration and cut <= second:
                    number, cut = number + 1, cut + self.window
                tokens += [(number, stream, frame)] * self.tokens[stream]
        return tokens

    def mask(self) -> Tensor:
        """Return who may see whom, (N, N) bool."""
        number = torch.tensor([number for number, _, _ in self.rule()])
        return number[:, None] == number[None, :]


@st.composite
def cases(draw, max_streams: int = 2, max_windows: int = 4, max_tokens: int = 3) -> Case:
    """Draw streams whose rates fit the window, of about equal or of quite different durations."""
    half = draw(
        st.sampled_from([Fraction(1, 3), Fraction(1), Fraction(5, 2), Fraction(1001, 6000)])
        | st.fractions(Fraction(1, 10), 6, max_denominator=12)
    )
    per_half = draw(st.lists(st.integers(1, 4), min_size=1, max_size=max_streams))
    rates = [Fraction(frames) / half for frames in per_half]
    halves = draw(st.fractions(Fraction(1, 4), 2 * max_windows, max_denominator=8))  # duration
    frames = []
    for each in per_half:
        whole = math.ceil(halves * each)
        tail = draw(st.integers(-1, 2) | st.integers(-4 * each, 4 * each))
        frames.append(max(1, whole + tail))
    tokens = draw(st.lists(st.integers(1, max_tokens), min_size=len(frames), max_size=len(frames)))
    return Case(frames, tokens, rates, 2 * half, draw(st.booleans()))


small = cases(max_windows=3, max_tokens=2)  # for what costs N^2 and more


def random_qkv(case: Case, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 2, case.size, 5)  # q, k, v of (B, heads, N, d)
    return list(torch.randn(shape, dtype=dtype, generator=generator))


def depends(function, case: Case) -> Tensor:
    """Return (N, N) bool: output token i has a gradient to input token j."""
    x = torch.randn(case.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(function, x[None, None], vectorize=True)
    return jacobian[0, 0, :, :, 0, 0].ne(0).any(-1).any(1)  # (N, d, N, d) -> (N, N)


# --- the groups --------------------------------------------------------------------------------


@given(cases())
def test_every_token_is_in_exactly_one_window(case):
    indices = torch.cat([group.flatten() for group in case.groups])
    assert indices.dtype == torch.int64
    assert indices.sort().values.tolist() == list(range(case.size))


@given(cases())
def test_windows_are_those_of_the_rule_in_sequence_order(case):
    expected: dict[int, list[int]] = {}
    for token, (number, _, _) in enumerate(case.rule()):
        expected.setdefault(number, []).append(token)
    found = [window for group in case.groups for window in group.tolist()]
    assert sorted(found) == sorted(expected.values())


@given(cases(max_windows=12))
def test_windows_of_equal_composition_share_a_group(case):
    rule = case.rule()

    def composition(window: list[int]) -> tuple[int, ...]:
        frames = {rule[token][1:] for token in window}
        return tuple(sum(stream == s for stream, _ in frames) for s in range(len(case.frames)))

    groups = [{composition(window) for window in group.tolist()} for group in case.groups]
    assert all(len(group) == 1 for group in groups)  # alike within a group
    assert len(set().union(*groups)) == len(groups)  # and different between groups
    assert len(groups) <= (3 if case.shifted else 2)  # first, middle, last


@given(cases(max_streams=3))
def test_no_window_is_without_any_stream(case):
    """The tail rule: a trailing latent frame never sits in a window without a plan."""
    windows_of = [
        {n for n, stream, _ in case.rule() if stream == s} for s in range(len(case.frames))
    ]
    assert all(numbers == windows_of[0] for numbers in windows_of)
    ends = [0]
    for stream in case.streams:
        ends.append(ends[-1] + stream.frames * stream.tokens)
    for group in case.groups:
        for start, end in pairwise(ends):
            assert ((group >= start) & (group < end)).any(1).all()


@given(cases(max_streams=1))
def test_one_stream_alone_works(case):
    """Base-CT-Swin, the paper's control without semantics."""
    assert sum(group.numel() for group in case.groups) == case.size
    assert all((group.diff(dim=1) == 1).all() for group in case.groups)  # stretches, not a comb


def test_a_minute_of_video():
    even, odd = (windows(MINUTE, 5.0, shifted) for shifted in (False, True))
    window, half = 30 * 4 + 4 * 2, 15 * 4 + 2 * 2
    assert [tuple(group.shape) for group in even] == [(11, window), (1, window + 4)]
    assert [tuple(group.shape) for group in odd] == [(1, half), (11, window), (1, half + 4)]
    assert odd[0][0].tolist() == [*range(60), *range(361 * 4, 361 * 4 + 4)]


def test_time_does_not_wrap_around():
    for group in windows(MINUTE, 5.0, True):
        first, last = (group == 0).any(1), (group == 361 * 4 - 1).any(1)
        assert not (first & last).any()


@pytest.mark.parametrize(
    "rates, window",
    [([6, 0.8], 5), ([6.0, 1.6], 5), ([29.97], 200 / 2997), ([24000 / 1001, 1.6], 1251.25)],
)
def test_rates_that_are_no_exact_floats_fit(rates, window):
    streams = [Stream(math.ceil(3.25 * window * rate), 1, rate) for rate in rates]
    for shifted in (False, True):
        groups = windows(streams, window, shifted)
        assert sum(len(group) for group in groups) == 4


# --- bounds ------------------------------------------------------------------------------------


def test_bounds_by_hand():
    assert window_bounds(12, 5.0, False) == [(0, 5), (5, 10), (10, 12)]
    assert window_bounds(12, 5.0, True) == [(0, 2.5), (2.5, 7.5), (7.5, 12)]
    assert window_bounds(10, 5.0, False) == [(0, 5), (5, 10)]  # no empty window at the end
    assert window_bounds(7.5, 5.0, True) == [(0, 2.5), (2.5, 7.5)]
    assert window_bounds(0.3, 0.1, False)[1] == (Fraction(1, 10), Fraction(2, 10))


@given(
    st.fractions(Fraction(1, 10), 50, max_denominator=50),
    st.fractions(Fraction(1, 2), 60, max_denominator=50),
    st.booleans(),
)
def test_bounds_tile_the_duration(duration, window, shifted):
    bounds = window_bounds(float(duration), float(window), shifted)
    starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
    assert starts == [0, *ends[:-1]] and ends[-1] == duration
    lengths = [end - start for start, end in bounds]
    if window >= duration:
        assert lengths == [duration]
    else:
        assert lengths[0] == (window / 2 if shifted else window)
        assert all(length == window for length in lengths[1:-1])
        assert 0 < lengths[-1] <= window


# --- partition and merge -----------------------------------------------------------------------


@given(cases(), st.lists(st.integers(1, 3), max_size=3))
def test_merge_undoes_partition(case, leading):
    x = torch.arange(math.prod(leading) * case.size * 2).reshape(*leading, case.size, 2)
    parts = partition(x, case.groups)
    for part, group in zip(parts, case.groups, strict=True):
        assert part.shape == (*leading, *group.shape, 2)
        assert part.equal(x[..., group, :])
    assert merge(parts, case.groups).equal(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_merge_keeps_the_dtype(dtype):
    groups = windows(MINUTE, 5.0, True)
    x = torch.randn(2, 361 * 4 + 48 * 2, 3).to(dtype)
    assert merge(partition(x, groups), groups).equal(x)


def test_groups_are_made_where_they_are_asked_for_and_serve_tensors_elsewhere():
    """The meta device stands for a GPU: it refuses to be mixed with the CPU just as a GPU does."""
    here, there = windows(MINUTE, 5.0, True), windows(MINUTE, 5.0, True, "meta")
    assert [group.shape for group in there] == [group.shape for group in here]
    assert {group.device.type for group in there} == {"meta"}
    x = torch.empty(2, 361 * 4 + 48 * 2, 3, device="meta")
    merged = merge(partition(x, here), here)
    assert merged.device == x.device and merged.shape == x.shape


# --- attention against the rule ----------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@settings(max_examples=50)
@given(case=cases())
def test_equals_dense_attention_with_the_rule_as_mask(dtype, tolerance, case):
    upstream = random_qkv(case, dtype, seed=2)[0]
    results = []
    for attend in (
        lambda q, k, v: windowed_attention(q, k, v, case.groups),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=case.mask()),
    ):
        qkv = [x.requires_grad_() for x in random_qkv(case, dtype)]
        out = attend(*qkv)
        results.append([out, *torch.autograd.grad(out, qkv, upstream)])
    for windowed, dense in zip(*results, strict=True):
        assert_close(windowed, dense, tolerance)


@settings(max_examples=50)
@given(small)
def test_output_i_depends_on_input_j_exactly_when_the_rule_says(case):
    found = depends(lambda x: windowed_attention(x, x, x, case.groups), case)
    assert found.equal(case.mask())


@settings(max_examples=25)
@given(small)
def test_two_layers_join_what_either_joins(case):
    layers = [case._replace(shifted=shifted) for shifted in (False, True)]

    def two_layers(x: Tensor) -> Tensor:
        for layer in layers:
            x = windowed_attention(x, x, x, layer.groups)
        return x

    even, odd = (layer.mask().double() for layer in layers)
    assert depends(two_layers, case).equal(odd @ even > 0)


def test_a_shifted_layer_joins_neighbouring_windows():
    case = Case([24, 4], [1, 2], [Fraction(6), Fraction(1)], Fraction(2), shifted=False)
    even, odd = (case._replace(shifted=shifted).mask() for shifted in (False, True))
    before, after = 11, 12  # the latent frames on either side of the cut at second 2
    assert not even[after, before]
    assert odd[after, before]
    reach = (odd.double() @ even.double()) > 0  # an even layer, then an odd one
    assert reach[after, 0]  # second 2 hears of second 0 ...
    assert not odd[after, 0] and not even[after, 0]  # ... which neither layer shows it
    assert not reach[0, 23]  # but time is crossed one window after the other
    reach = (even.double() @ odd.double() @ even.double()) > 0
    assert reach[after:, :after].all() and reach[:after, after:].all()


@given(cases(), st.data())
def test_not_even_nan_leaks_out_of_a_window(case, data):
    token = data.draw(st.integers(0, case.size - 1))
    q, k, v = random_qkv(case)
    v[:, :, token] = torch.nan
    found = windowed_attention(q, k, v, case.groups).isnan()
    assert found.equal(case.mask()[:, token, None].expand_as(found))


@given(cases(), st.fractions(1, 5, max_denominator=7))
def test_a_window_of_the_duration_or_more_is_full_attention(case, factor):
    duration = min(f / rate for f, rate in zip(case.frames, case.rates, strict=True))
    q, k, v = random_qkv(case)
    full = F.scaled_dot_product_attention(q, k, v)
    for window in (float(duration), float(factor * duration), math.inf, None):
        groups = windows(case.streams, window, case.shifted)
        assert [group.tolist() for group in groups] == [[list(range(case.size))]]
        assert windowed_attention(q, k, v, groups).equal(full)
        assert windowed_attention(q, k, v, groups, lambda q, k, v: q) is q  # nothing is copied


@given(cases())
def test_no_token_is_wasted(case):
    """The attention scores computed are exactly the pairs that the rule allows, in few calls."""
    q, k, v = random_qkv(case)
    seen = []

    def attend(q, k, v):
        seen.append(q.shape)
        assert q.ndim == 4 and q.shape == k.shape == v.shape and q.is_contiguous()
        return F.scaled_dot_product_attention(q, k, v)

    windowed_attention(q, k, v, case.groups, attend)
    assert len(seen) == len(case.groups)
    scores = sum(batch * heads * n * n for batch, heads, n, _ in seen)
    assert scores == 2 * 2 * int(case.mask().sum())


def test_work_grows_linearly_with_length():
    def scores(seconds: int) -> int:
        streams = [Stream(6 * seconds + 1, 64, 6.0), Stream(4 * seconds // 5, 16, 0.8)]
        return sum(group.shape[0] * group.shape[1] ** 2 for group in windows(streams, 5.0, True))

    minute = scores(120) - scores(60)
    assert scores(300) - scores(240) == minute > 0


def test_attend_may_change_the_dtype_and_width():
    """As under autocast; and keys of one width may carry values of another."""
    groups = windows(MINUTE, 5.0, True)
    x = torch.randn(1, 2, 361 * 4 + 48 * 2, 4)
    v = torch.randn(1, 2, 361 * 4 + 48 * 2, 7)
    out = windowed_attention(x, x, v, groups, lambda q, k, v: v.bfloat16())
    assert out.equal(v.bfloat16())


# --- refusals ----------------------------------------------------------------------------------

rates = st.sampled_from([1.6, 0.8, 24 / 4, 7.5, 1 / 3, 24000 / 1001]) | st.integers(1, 30)


@given(
    st.lists(rates, min_size=1, max_size=2), st.fractions(Fraction(1, 8), 40, max_denominator=1000)
)
def test_a_window_that_does_not_fit_is_refused_and_one_that_does_is_named(rates, window):
    window = float(window)
    exact = [Fraction(rate).limit_denominator(1001) for rate in rates]

    # Independent of swin.py: walk over pairs of frames of one stream until the other agrees.
    pairs = (2 * n / exact[0] for n in count(1))
    shortest = next(length for length in pairs if (length * exact[-1] / 2).denominator == 1)
    fitting = [n * shortest for n in range(1, 2 + math.ceil(window / shortest))]
    nearest = min(abs(float(length) - window) for length in fitting)

    longest = 2.5 * max(window, float(shortest))
    streams = [Stream(math.ceil(longest * rate) + 1, 1, rate) for rate in rates]
    if nearest < 1e-9:
        windows(streams, window, True)
        return
    with pytest.raises(ValueError, match="must hold whole frames") as error:
        windows(streams, window, True)
    named = float(re.search(r"frames/s: (\S+) s does", str(error.value))[1])
    assert abs(abs(named - window) - nearest) < 1e-6  # the nearest ...
    many = [Stream(math.ceil(3.25 * named * rate), 1, rate) for rate in rates]
    for shifted in (False, True):
        assert sum(len(group) for group in windows(many, named, shifted)) == 4  # ... and it works


def test_the_error_for_the_papers_rates_names_five_seconds():
    with pytest.raises(ValueError, match=r"6\.0 and 0\.8 frames/s: 5\.0 s does"):
        windows(MINUTE, 4.0, False)
    assert fitting_window([6.0, 0.8], 4) == fitting_window([6.0, 0.8], 0.1) == 5
    assert fitting_window([6.0, 0.8], 8) == 10


def test_half_a_window_must_hold_whole_frames_too():
    one = [Stream(12, 1, 1.0)]
    with pytest.raises(ValueError, match=r"2\.0 s does|4\.0 s does"):
        windows(one, 3.0, False)  # three frames, but one and a half in the shifted layer
    windows(one, 4.0, False)


def test_a_window_that_does_not_fit_is_refused_with_a_single_cut_too():
    with pytest.raises(ValueError, match="must hold whole frames"):
        windows([Stream(4, 1, 1.0)], 3.0, False)
    (whole,) = windows([Stream(3, 1, 1.0)], 3.0, False)  # nothing is cut, so any length will do
    assert whole.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("window", [0, -5.0])
def test_a_window_must_be_positive(window):
    with pytest.raises(ValueError, match="positive"):
        windows(MINUTE, window, False)


@pytest.mark.parametrize(
    "stream, message",
    [
        (Stream(0, 2, 0.8), "empty"),
        (Stream(48, 0, 0.8), "empty"),
        (Stream(48, 2, 0.0), "positive"),
        (Stream(48, 2, -1.0), "positive"),
    ],
)
def test_a_stream_of_nothing_is_refused(stream, message):
    """Silently it would turn every window into full attention: a stream of no duration."""
    with pytest.raises(ValueError, match=message):
        windows([MINUTE[0], stream], 5.0, False)


# --- the cache and the compiler ----------------------------------------------------------------


def test_groups_are_computed_once_and_the_list_is_ones_own():
    first = windows(MINUTE, 5.0, True)
    again = windows(tuple(MINUTE), 5.0, True, torch.device("cpu"))
    assert all(a is b for a, b in zip(first, again, strict=True))
    first.clear()
    assert len(windows(MINUTE, 5.0, True)) == 3


def test_the_cache_does_not_grow_with_every_length_of_clip():
    streams = [Stream(17, 1, 6.0)]
    first = windows(streams, 1.0, False)[0]
    for frames in range(100, 400):
        windows([Stream(frames, 1, 6.0)], 100.0, False)
    again = windows(streams, 1.0, False)[0]
    assert again is not first and again.equal(first)


def test_groups_first_asked_for_while_sampling_serve_training():
    streams = [Stream(13, 3, 6.0)]  # of no other test: not in the cache yet
    with torch.inference_mode():
        windows(streams, 1.0, True)
    x = torch.randn(1, 1, 39, 4, requires_grad=True)
    windowed_attention(x, x, x, windows(streams, 1.0, True)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shifted", [False, True])
def test_a_compiled_model_takes_clips_of_any_length(shifted):
    """The groups, too, are those of plain Python: of this window and device (meta, for a GPU)."""

    def layer(x: Tensor) -> tuple[Tensor, list[Tensor]]:  # (B, heads, T, tokens, d)
        groups = windows([Stream(x.shape[2], x.shape[3], 6.0)], 2.0, shifted, x.device)
        x = x.flatten(2, 3)
        return windowed_attention(x, x, x, groups), groups

    compiled = torch.compile(layer, backend="eager")
    for frames in (14, 19, 26, 27):  # the second length makes the compiler treat it as a symbol
        x = torch.randn(1, 2, frames, 2, 4)
        (out, groups), (expected, same) = compiled(x), layer(x)
        assert_close(out, expected, 1e-6)
        assert all(a is b for a, b in zip(groups, same, strict=True))
    _, groups = compiled(x.to("meta"))
    assert {group.device.type for group in groups} == {"meta"}
