"""Shifted windows over time for attention in long videos: cost grows linearly with length.

SemanticGen Sec. 3.4, Fig. 5: the VAE latents and the semantics of the same stretch of video of T_w
seconds share one attention window; in odd layers the windows shift by T_w / 2. Our choices: windows
are stretches of time, not rolled masks, so time does not wrap around; windows of equal composition
are one attention call, so no mask is needed and no token is wasted.

    even layers   |------ T_w ------|------ T_w ------|------ T_w ------|- left -|
    odd layers    |- T_w/2 -|------ T_w ------|------ T_w ------|----- left -----|

Tokens run stream by stream (latents, then semantics), within a stream frame by frame. Any number
of streams works; one alone is the model without a plan (Base-CT-Swin). All streams are cut at the
same seconds, and only where the shortest one still has frames. What a longer one has beyond that
(a causal VAE makes one latent more, of the first frame alone) is in the last window, with the end
of the plan; latents after the first then stand three of the video's frames late.

Letters: N tokens; W windows of one group; n tokens of a window; D width; B batch; d head width.
Public: Stream, fitting_window, window_bounds, windows, partition, merge, windowed_attention.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stream(NamedTuple):
    """The layout of one stream: frame i starts at second i / rate."""

    frames: int  # frames of this stream (latent frames T, or semantic frames S)
    tokens: int  # tokens per frame
    rate: float  # frames per second


def fitting_window(rates: Sequence[float], near: float) -> Fraction:
    """Return the T_w nearest to `near` seconds whose halves hold whole frames of every rate.

    Raises ValueError for a rate that is not positive.
    """
    pairs = [2 / _rate(rate) for rate in rates]  # seconds of two frames, one for each half
    shortest = Fraction(  # the least common multiple of these fractions
        math.lcm(*(pair.numerator for pair in pairs)),
        math.gcd(*(pair.denominator for pair in pairs)),
    )
    return max(1, round(_seconds(near) / shortest)) * shortest


def window_bounds(
    duration: float, window: float | None, shifted: bool
) -> list[tuple[Fraction, Fraction]]:
    """Return the (start, end) seconds of all windows (Fig. 5), in order; together [0, duration).

    Window k covers [k T_w, (k + 1) T_w); a shifted layer starts with a half window; the last window
    is what is left. Without T_w, or with T_w >= duration, there is one window: full attention.
    Raises ValueError for a T_w that is not positive.
    """
    duration = _seconds(duration)
    if window in (None, math.inf) or _seconds(window) >= duration:
        return [(Fraction(0), duration)]
    window = _seconds(window)
    if window <= 0:
        raise ValueError(f"a window of {float(window)} s: its length must be positive")
    first = window / 2 if shifted else window
    cuts = [first + k * window for k in range(math.ceil((duration - first) / window))]
    return list(zip([Fraction(0), *cuts], [*cuts, duration], strict=True))


def windows(
    streams: Sequence[Stream],
    window: float | None,
    shifted: bool,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Return the tokens of all windows of a layer (Sec. 3.4), in groups that are one call each.

    A group is a LongTensor (W, n): W windows with the same number of frames of each stream, n
    token indices each, in the order of the sequence. Every token is in exactly one window. There
    are at most three groups: first, middle and last windows. Raises ValueError for an empty stream,
    a T_w or rate of 0 or less and, naming a length that works, where T_w or T_w / 2 would cut
    through a frame. Cached, so cheap to call in every forward pass; do not write into the result.
    """
    if torch.compiler.is_compiling():  # fractions cannot be traced: this runs as plain Python
        # Not a decorator, which would import the compiler whether it is needed or not.
        return torch.compiler.disable(windows)(streams, window, shifted, device)
    return list(_windows(tuple(streams), window, bool(shifted), torch.device(device)))


def partition(x: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """Gather the windows of each group: x (..., N, D) -> [(..., W, n, D)]."""
    return [
        x.index_select(-2, group.flatten().to(x.device)).unflatten(-2, group.shape)
        for group in groups
    ]


def merge(parts: Sequence[Tensor], groups: Sequence[Tensor]) -> Tensor:
    """Put the windows back in place, the inverse of partition: [(..., W, n, D)] -> (..., N, D)."""
    flat = torch.cat([part.flatten(-3, -2) for part in parts], -2)  # (..., N, D), window by window
    order = torch.cat([group.flatten() for group in groups]).to(flat.device)  # (N,)
    return torch.empty_like(flat).index_copy_(-2, order, flat)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attend within windows only (Sec. 3.4). q, k, v: (B, heads, N, d) -> (B, heads, N, d).

    groups: of `windows`. attend: any attention over (B, heads, n, d). It is called once per group
    and sees W times as many heads: windows are as independent of one another as heads are, and the
    gathered tensors lie in memory in that order. (A fifth axis would cost SDPA its fused kernels.)
    """
    if len(groups) == 1 and len(groups[0]) == 1:  # one window of all tokens is full attention
        return attend(q, k, v)
    parts = []
    for group, *qkv in zip(groups, *(partition(x, groups) for x in (q, k, v)), strict=True):
        out = attend(*(x.flatten(1, 2) for x in qkv))  # (B, heads * W, n, d)
        parts.append(out.unflatten(1, (-1, len(group))))  # (B, heads, W, n, d)
    return merge(parts, groups)


# --- inner parts: exact fractions, so that no rounding decides which window a frame is in ---------


def _rate(rate: float) -> Fraction:
    """Return a frame rate as the fraction it stands for: 1.6 is 8/5, 29.97002997 is 30000/1001."""
    exact = Fraction(rate).limit_denominator(10_000)
    if exact <= 0:
        raise ValueError(f"a rate of {rate} frames/s: it must be positive")
    return exact


def _seconds(seconds: float) -> Fraction:
    """Return a time as the fraction it stands for: 2.5 is 5/2, and 1.66666667 is 5/3."""
    return Fraction(seconds).limit_denominator(1_000_000)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what a sampling run leaves in the cache must serve training too
def _windows(
    streams: tuple[Stream, ...], window: float | None, shifted: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Do the work of `windows`: plain Python over windows, tensors over tokens."""
    for stream in streams:
        if stream.frames < 1 or stream.tokens < 1:
            raise ValueError(f"{stream} is empty: leave it out")
    rates = [_rate(stream.rate) for stream in streams]
    duration = min(stream.frames / rate for stream, rate in zip(streams, rates, strict=True))
    starts = [start for start, _ in window_bounds(duration, window, shifted)]
    if len(starts) > 1 and any((_seconds(window) * rate / 2).denominator != 1 for rate in rates):
        raise ValueError(
            f"a window of {window} s, and half of it, must hold whole frames at "
            f"{' and '.join(str(stream.rate) for stream in streams)} frames/s: "
            f"{float(fitting_window(rates, window))} s does"
        )
    # Window k of a stream is its frames edges[k] to edges[k + 1]; the last takes all that is left.
    edges = [
        [int(start * rate) for start in starts] + [stream.frames]
        for stream, rate in zip(streams, rates, strict=True)
    ]
    alike: dict[tuple[int, ...], list[int]] = {}  # frames of each stream -> windows that hold them
    for k in range(len(starts)):
        alike.setdefault(tuple(edge[k + 1] - edge[k] for edge in edges), []).append(k)

    groups = []
    for composition, members in alike.items():
        columns, before = [], 0  # before: tokens of the streams before this one
        for stream, edge, frames in zip(streams, edges, composition, strict=True):
            first = torch.tensor([edge[k] for k in members], device=device) * stream.tokens  # (W,)
            within = torch.arange(frames * stream.tokens, device=device)  # a window's run of tokens
            columns.append(before + first[:, None] + within)  # (W, frames * tokens)
            before += stream.frames * stream.tokens
        groups.append(torch.cat(columns, 1))  # (W, n): latents, then semantics, of these seconds
    return tuple(groups)
