"""A video VAE in miniature: a small 3D KL VAE to train from scratch (Sec. 3.1)."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from data import to_float
from plumbing.seeds import Rows
from semantic import gaussian_kl
from toy.conv import ResBlock


@dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes of TinyVAE and its loss."""

    channels: int = 8  # C: fewer are easier to paint (chosen by what the painter then reaches)
    width: int = 96
    blocks: int = 2  # residual blocks on each side
    time_patch: int = 4  # frames of pixels per latent frame
    space_patch: int = 4  # pixels per latent position, each way
    kl_weight: float = 1e-3  # per latent element, against the mean of L1 + L2 per pixel
    span: int | None = None  # latent frames coded together, longer videos in chunks; None = all
    white: int = 2  # latents are whitened in squares of so many positions a side
    first = 0  # frames at the start that are a latent frame by themselves; not a field

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, h, w); ValueError names the multiples that fit."""
        time, space = self.time_patch, self.space_patch
        side = space * self.white
        if frames % time or height % side or width % side or not frames:
            raise ValueError(
                f"video of {frames} frames, {height} x {width}: the VAE needs multiples of "
                f"{time} frames and {side} pixels ({self.white} patches of {space})"
            )
        return frames // time, height // space, width // space


class TinyVAE(nn.Module):
    """Patches of pixels, residual 3D convolutions on the latent grid, patches of pixels."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        pixels = 3 * config.time_patch * config.space_patch**2
        width = config.width

        def tower(before: int, after: int) -> nn.Sequential:
            blocks = nn.Sequential(*(ResBlock(3, width) for _ in range(config.blocks)))
            ends = nn.Conv3d(before, width, 1), nn.Conv3d(width, after, 1)
            return nn.Sequential(OrderedDict(first=ends[0], blocks=blocks, last=ends[1]))

        self.encoder = tower(pixels, 2 * config.channels)
        self.decoder = tower(config.channels, pixels)
        square = config.channels * config.white**2  # numbers of a square of latents
        self.register_buffer("mean", torch.zeros(square))
        # Not torch.eye: on the meta device that imports the compiler, which takes a second.
        self.register_buffer("root", torch.zeros(square, square).fill_diagonal_(1))

    def raw_posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, C, T, h, w) of the raw latents, before normalisation."""
        self.config.grid(*video.shape[2:])
        time, space = self.config.time_patch, self.config.space_patch
        patches = rearrange(
            video, "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=time, p=space, q=space
        )
        coded = torch.cat([self.encoder(x) for x in self._chunks(patches)], 2)
        mean, log_variance = coded.chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        """Cut (B, c, T, h, w) into what is coded together."""
        return x.split(self.config.span or x.shape[2], 2)

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Decode raw latents (B, C, T, h, w) -> video (B, 3, F, H, W), not clamped."""
        time, space = self.config.time_patch, self.config.space_patch
        patches = torch.cat([self.decoder(x) for x in self._chunks(raw)], 2)
        return rearrange(
            patches, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=time, p=space, q=space
        )

    def loss(self, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L1 + L2 + KL loss and what to log. noise: (B, C, T, h, w), N(0, 1)."""
        mean, log_variance = (x.float() for x in self.raw_posterior(video))
        kl = gaussian_kl(mean, log_variance).mean()
        error = self.reconstruct(mean + noise * (0.5 * log_variance).exp()).float() - video
        l2 = error.square().mean()
        loss = error.abs().mean() + l2 + self.config.kl_weight * kl
        return loss, {"psnr": 10 * torch.log10(4 / l2.detach()), "kl": kl.detach()}

    def _squares(self, latents: Tensor) -> Tensor:
        """Return the numbers of each square: (B, C, T, h, w) -> (B, T, h/p, w/p, C p^2)."""
        p = self.config.white
        return rearrange(latents, "b c t (h p) (w q) -> b t h w (c p q)", p=p, q=p)

    def _frames(self, squares: Tensor) -> Tensor:
        """Put squares back, the inverse of `_squares`."""
        p = self.config.white
        return rearrange(squares, "b t h w (c p q) -> b c t (h p) (w q)", p=p, q=p)

    @torch.no_grad()
    def set_statistics(self, video: Tensor):
        """Measure mean and covariance of squares of latents, on clips (B, 3, F, H, W).

        `root` is the covariance's symmetric root: whitened by it, latents stay nearest to what they
        were. Why squares: of their directions the least has a 240th to a 520th of the variance of
        the greatest in `tiny`, and a loss on latents of unit variance alone hardly sees what is
        small, shapes above all (our choice; benchmarks/RECORDS.md).
        """
        squares = self._squares(self.raw_posterior(video)[0].float()).flatten(0, 3)
        self.mean.copy_(squares.mean(0))
        variances, directions = torch.linalg.eigh(squares.T.cov().cpu().double())
        # Directions of almost no variance are bfloat16's rounding: not to be blown up.
        deviations = variances.clamp(min=1e-4 * variances.mean()).sqrt()
        self.root.copy_(directions * deviations @ directions.T)

    @torch.no_grad()
    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of whitened latents, each (B, C, T, h, w) float32."""
        mean, log_variance = (self._squares(x.float()) for x in self.raw_posterior(video))
        with torch.autocast(video.device.type, enabled=False):  # which would round the latents
            inverse = torch.linalg.inv(self.root)
            variance = log_variance.exp() @ inverse.square()  # of each latent by itself
            mean = (mean - self.mean) @ inverse
        return self._frames(mean), self._frames(variance.log())

    def encode(self, video: Tensor) -> Tensor:
        """Return whitened latents: (B, 3, F, H, W) in [-1, 1] -> (B, C, T, h, w) float32."""
        return self.posterior(video)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return video in [-1, 1]: (B, C, T, h, w) -> (B, 3, F, H, W) float32."""
        with torch.autocast(latents.device.type, enabled=False):
            raw = self._squares(latents.float()) @ self.root + self.mean
        return self.reconstruct(self._frames(raw)).float().clamp(-1, 1)

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the same video, one chunk after the other."""
        yield from map(self.decode, self._chunks(latents))


class VAELearner(nn.ModuleDict):
    """The stage `vae`: reconstruction and KL of fresh clips."""

    def __init__(self, config: TinyVAEConfig, size: tuple[int, int, int]):
        super().__init__({"vae": TinyVAE(config)})
        self.tokens = math.prod(config.grid(*size))  # of a clip

    def draw(self, dataset, rows: Rows) -> dict[str, Tensor]:
        video = dataset.batch(rows.indices(len(dataset))).video  # (B, 3, F, H, W) uint8
        config = self["vae"].config
        return {
            "video": video,
            "noise": rows.normal(config.channels, *config.grid(*video.shape[2:])),
        }

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self["vae"].loss(to_float(video), noise)
