"""The diffusion transformer (DiT) of both stages and of the base model.

SemanticGen App. A: a block is spatial attention (within a frame), 3D attention (over space and
time), cross-attention (to the text) and an FFN; before each of them the timestep is mapped to a
scale that is applied together with RMSNorm. Sec. 3.2: in-context conditioning, the noisy latents
and the semantics form one sequence; only the latents are denoised. Sec. 3.4: with a window, 3D
attention stays within windows of time, which shift by half in odd layers (swin.py).

One class, three uses: painter (stage 2: VAE latents, with semantics as context), planner (stage 1:
the semantics are what is denoised, no context) and base (VAE latents, no context).

Letters: B batch; C T h w channels, frames, height, width of what is denoised; K S hs ws those of
the context; N tokens; D width; A heads; d width of a head; L text tokens. Tokens run frame by
frame, latents first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin import Stream, windowed_attention, windows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, A, N, d) -> (B, A, N, d)


class Grid(NamedTuple):
    """The tokens of one stream: so many frames, of height x width tokens each."""

    frames: int
    height: int
    width: int
    rate: float  # frames per second

    @property
    def stream(self) -> Stream:
        """Frames of so many tokens: all that windows ask for."""
        return Stream(self.frames, self.height * self.width, self.rate)

    @property
    def tokens(self) -> int:
        """Tokens of all frames."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of one DiT. The paper gives none; the `paper` preset follows Wan2.1-1.3B."""

    channels: int  # C of what is denoised
    rate: float  # its frames per second
    text_dim: int  # width of the text encoder's tokens
    context_channels: int = 0  # K of the in-context semantics; 0 = no context
    context_rate: float = 0.0  # their frames per second
    patch: int = 1  # a token is patch x patch positions of a frame
    width: int = 128  # D
    depth: int = 4  # blocks
    heads: int = 2  # A
    ffn: int = 4  # hidden width of the FFN over D
    space_cycles: float = 2.0  # highest position frequency per frame side: half its tokens
    time_features: bool = True  # absolute time at the input too, not only y and x
    window: float | None = None  # seconds of a 3D attention window; None = full attention

    def __post_init__(self):
        head = self.width // max(1, self.heads)
        if self.heads < 1 or self.width % self.heads or head % 2 or head < 6:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: each needs an even width, at least 6"
            )

    @property
    def without_plan(self) -> "DiTConfig":
        """The base's network. Its windows have no plan to tell them when they are: it has time."""
        return replace(self, context_channels=0, time_features=True)

    def layout(self, latents: Sequence[int], context: Sequence[int] | None) -> list[Grid]:
        """Return the grid of latents (T, h, w) and of semantics (S, hs, ws), if there are any.

        Raises ValueError where they do not fit.
        """
        (frames, height, width), p = latents, self.patch
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} do not divide into patches of {p}")
        if (context is not None) != bool(self.context_channels):
            raise ValueError(
                f"context {'given' if context is not None else 'missing'}, "
                f"but context_channels is {self.context_channels}"
            )
        streams = [Grid(frames, height // p, width // p, self.rate)]
        if context is not None:
            streams.append(Grid(*context, self.context_rate))
        return streams


def to_tokens(z: Tensor, patch: int = 1) -> Tensor:
    """Cut frames into patches: (B, C, T, h, w) -> (B, T h/patch w/patch, C patch^2)."""
    return rearrange(z, "b c t (h p) (w q) -> b (t h w) (c p q)", p=patch, q=patch)


def to_frames(x: Tensor, grid: Grid, patch: int = 1) -> Tensor:
    """Put patches back, the inverse of `to_tokens`: (B, N, C patch^2) -> (B, C, T, h, w)."""
    sizes = {"t": grid.frames, "h": grid.height, "p": patch, "q": patch}
    return rearrange(x, "b (t h w) (c p q) -> b c t (h p) (w q)", **sizes)


def grid_coords(
    frames: int, height: int, width: int, rate: float, device: torch.device | None = None
) -> Tensor:
    """Return (seconds, y, x) of every token's centre, (frames * height * width, 3); y, x in [0, 1].

    So streams of any rates line up; after Wan's first latent, of one frame, all are 3 frames late.
    """
    axes = [
        (torch.arange(count, device=device) + 0.5) / extent
        for count, extent in ((frames, rate), (height, height), (width, width))
    ]
    return torch.cartesian_prod(*axes)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features by their token's angles: RoPE. x (..., N, d); cos, sin (N, d/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Positions(nn.Module):
    """Angles of a token's coordinates: used by RoPE, and as Fourier features added at the input.

    RoPE tells only how far apart two tokens are; the features tell where a token is (our choice).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        pairs = config.width // config.heads // 2
        space = pairs // 3  # pairs of y, as many of x; the first pairs are of time
        time = pairs - 2 * space
        self.first = 0 if config.time_features else time  # of the pairs seen at the input
        # Cycles per second (from a minute's wave up to half the frame rate) and per frame side.
        seconds = torch.logspace(-6, math.log2(config.rate / 2), time, base=2, device="cpu")
        side = torch.logspace(-2, math.log2(config.space_cycles), space, base=2, device="cpu")
        cycles = torch.block_diag(seconds, side, side)  # (3, d/2)
        self.register_buffer("cycles", cycles, persistent=False)  # in no file, so never on "meta"
        self.features = nn.Linear(2 * (pairs - self.first), config.width)

    def forward(self, coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """coords (N, 3) -> features (N, D), cos (N, d/2), sin (N, d/2)."""
        # No matrix product: autocast would round it, and large angles would mean nothing.
        angles = 2 * math.pi * (coords[:, :, None] * self.cycles).sum(1)  # (N, d/2)
        cos, sin = angles.cos(), angles.sin()
        seen = torch.cat([cos[:, self.first :], sin[:, self.first :]], -1)
        return self.features(seen), cos, sin


def timestep_waves(t: Tensor) -> Tensor:
    """Return sines and cosines of t, (B,) in [0, 1] -> (B, 256): fast to slow waves, as usual."""
    frequencies = 1000 * torch.logspace(0, -4, 128, device=t.device)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class NormOnCPU(torch.autograd.Function):
    """`rms_norm` in fewer passes over memory. y = r x, so dx = r (dy - y mean(y dy))."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(1e-6).rsqrt_()  # (..., 1)
        y = r * x
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        return torch.addcmul(dy, y, (y * dy).mean(-1, keepdim=True), value=-1).mul_(r)


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last axis to unit root mean square: (..., D) -> (..., D)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return NormOnCPU.apply(x)  # torch's own is several times slower in bf16
    if x.is_cuda:  # there torch's own is one kernel
        with torch.autocast("cuda", enabled=False):  # which would compute in float32 from here on
            return F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from q (B, A, N, d) to k, v (B, A, M, d) -> (B, A, N, d)."""
    if q.device.type == "cpu" and k.shape[-2] <= 256:  # several times faster than the fused one
        weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, A, N, M)
        dtype = torch.promote_types(q.dtype, torch.float32)  # in bf16 it takes several times longer
        return weights.softmax(-1, dtype=dtype).to(v) @ v
    return F.scaled_dot_product_attention(q, k, v)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, frame_tokens: Sequence[int]) -> Tensor:
    """Attend within each frame only. q, k, v: (B, A, N, d); frame_tokens: tokens of each frame."""
    runs = [(tokens, len(list(run))) for tokens, run in groupby(frame_tokens)]  # of equal frames
    sizes, out = [tokens * frames for tokens, frames in runs], []
    for (_, frames), *qkv in zip(runs, *(x.split(sizes, 2) for x in (q, k, v)), strict=True):
        qkv = (rearrange(x, "b a (f n) d -> (b f) a n d", f=frames) for x in qkv)
        out.append(rearrange(attention(*qkv), "(b f) a n d -> b a (f n) d", f=frames))
    return torch.cat(out, 2)


def attention_over_time(
    grids: Sequence[Grid], window: float | None, device: torch.device
) -> list[Attend]:
    """Return the 3D attention of even and of odd layers: full, or in windows (Sec. 3.4)."""
    if window is None:
        return [attention, attention]
    streams = [grid.stream for grid in grids]
    groups = [windows(streams, window, shifted, device) for shifted in (False, True)]
    return [partial(windowed_attention, groups=each, attend=attention) for each in groups]


class SelfAttention(nn.Module):
    """Multi-head attention among tokens; q and k are RMS-normalised (our choice) and rotated."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gain = nn.Parameter(torch.ones(2, 1, 1, 1, width // heads))  # of q and of k
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, N, D) -> (B, N, D); attend decides who sees whom."""
        qkv = rearrange(self.qkv(x), "b n (three a d) -> three b a n d", three=3, a=self.heads)
        q, k = rotate(rms_norm(qkv[:2]) * self.gain.to(qkv), cos.to(qkv), sin.to(qkv))
        return self.out(rearrange(attend(q, k, qkv[2]), "b a n d -> b n (a d)"))


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens to the text; q and k are RMS-normalised here, too.

    It has no mask: the rows that pad a short text take part. They are zeros until `DiT.text_in`
    adds its biases; then they are one and the same row, whatever the text. (Wan does so, too.)
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, N, D), text (B, L, D) -> (B, N, D)."""
        q = rearrange(self.q(x), "b n (a d) -> b a n d", a=self.heads)
        k, v = rearrange(self.kv(text), "b l (two a d) -> two b a l d", two=2, a=self.heads)
        return self.out(rearrange(attention(rms_norm(q), rms_norm(k), v), "b a n d -> b n (a d)"))


class Block(nn.Module):
    """Spatial attention, 3D attention, cross-attention, FFN (App. A).

    Each is x + f(RMSNorm(x) * (1 + scale(t))); their outputs start at zero, so that the block
    begins as the identity (our choice).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, heads = config.width, config.heads
        self.scale = nn.Linear(width, 4 * width)
        self.spatial = SelfAttention(width, heads)
        self.attention_3d = SelfAttention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.ffn_in = nn.Linear(width, config.ffn * width)
        self.ffn_out = nn.Linear(config.ffn * width, width)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        cos: Tensor,
        sin: Tensor,
        within_frame: Attend,
        within_window: Attend,
    ) -> Tensor:
        """x (B, N, D), time (B, D), text (B, L, D), cos and sin (N, d/2) -> (B, N, D)."""
        scales = (1 + self.scale(time)).to(x)[:, None].chunk(4, -1)  # 4 x (B, 1, D)
        x = x + self.spatial(rms_norm(x) * scales[0], cos, sin, within_frame)
        x = x + self.attention_3d(rms_norm(x) * scales[1], cos, sin, within_window)
        x = x + self.cross(rms_norm(x) * scales[2], text)
        return x + self.ffn_out(F.gelu(self.ffn_in(rms_norm(x) * scales[3])))


class DiT(nn.Module):
    """Velocity of noisy latents, given time, text and, for the painter, semantics in context."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        patch_channels = config.channels * config.patch**2
        self.latents_in = nn.Linear(patch_channels, width)
        self.type_embedding = nn.Parameter(torch.zeros(2, width))  # latents, context
        if config.context_channels:
            self.context_in = nn.Linear(config.context_channels, width)
            self.null_context = nn.Parameter(torch.zeros(width))  # stands where a plan is dropped
        self.positions = Positions(config)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.text_in = nn.Sequential(
            nn.Linear(config.text_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.scale_out = nn.Linear(width, width)
        self.latents_out = nn.Linear(width, patch_channels)
        self.run_block = nn.Module.__call__  # or another way to run it, that saves memory or time
        if not self.type_embedding.is_meta:  # there values come from a file
            self.init_weights()

    def init_weights(self):
        """Xavier for every matrix, then zeros: block outputs, all scales of t, the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero = [self.scale_out, self.latents_out]
        for block in self.blocks:
            zero += [block.scale, block.ffn_out]
            zero += [part.out for part in (block.spatial, block.attention_3d, block.cross)]
        for module in zero:
            nn.init.zeros_(module.weight)
        nn.init.normal_(self.type_embedding, std=0.5)
        if self.config.context_channels:
            nn.init.normal_(self.null_context, std=0.5)

    def join_streams(
        self, z: Tensor, context: Tensor | None, keep_context: Tensor | None
    ) -> Tensor:
        """Return latents and semantics as one sequence (Sec. 3.2: [z_t, z_sem]), (B, N, D)."""
        latents = self.latents_in(to_tokens(z, self.config.patch))  # (B, T h/p w/p, D)
        if context is None:
            return latents
        semantics = self.context_in(to_tokens(context))  # (B, S hs ws, D)
        if keep_context is not None:
            semantics = semantics.where(keep_context[:, None, None], self.null_context.to(latents))
        return torch.cat([latents, semantics], 1)

    def place(self, grids: Sequence[Grid], start: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return what tells a token its place and stream, (N, D); RoPE's cos and sin, (N, d/2)."""
        coords = torch.cat([grid_coords(*grid, self.type_embedding.device) for grid in grids])
        coords = torch.cat([coords[:, :1] + start, coords[:, 1:]], 1)  # (N, 3)
        features, cos, sin = self.positions(coords)
        # By token, with the features: torch 2.13 fails to compile, in bfloat16 on a CPU, the
        # gradients of two biases that are added to all tokens alike.
        types = zip(self.type_embedding, grids, strict=False)  # without a plan only the first
        types = torch.cat([e.expand(grid.tokens, -1) for e, grid in types])  # (N, D)
        return features + types, cos, sin

    def who_sees_whom(self, grids: Sequence[Grid]) -> tuple[Attend, list[Attend]]:
        """Return spatial attention, and the 3D attention of even and of odd layers."""
        frame_tokens = [grid.height * grid.width for grid in grids for _ in range(grid.frames)]
        spatial = partial(frame_attention, frame_tokens=frame_tokens)
        return spatial, attention_over_time(grids, self.config.window, self.type_embedding.device)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        context: Tensor | None = None,
        keep_context: Tensor | None = None,
        start: Tensor | float = 0.0,
    ) -> Tensor:
        """Return the velocity of z, (B, C, T, h, w).

        z: noisy latents; t: (B,) in [0, 1], 1 = noise; text: (B, L, text_dim), zeros = the null
        text; context: (B, K, S, hs, ws) semantics, exactly when the config has a context;
        keep_context: (B,) bool, False = this sample's plan is dropped; start: seconds of the video
        before z. Raises ValueError for sizes or conditions that do not fit the config.
        """
        grids = self.config.layout(z.shape[2:], None if context is None else context.shape[2:])
        x = self.join_streams(z, context, keep_context)  # (B, N, D)
        places, cos, sin = self.place(grids, start)  # (N, D), (N, d/2), (N, d/2)
        x = x + places.to(x)
        time = F.silu(self.time_in(timestep_waves(t)))  # (B, D)
        text = self.text_in(text)  # (B, L, D)
        within_frame, over_time = self.who_sees_whom(grids)
        for layer, block in enumerate(self.blocks):
            x = self.run_block(block, x, time, text, cos, sin, within_frame, over_time[layer % 2])
        x = x[:, : grids[0].tokens]  # the semantics have done their work
        x = self.latents_out(rms_norm(x) * (1 + self.scale_out(time)).to(x)[:, None])
        return to_frames(x, grids[0], self.config.patch)
