"""The semantic side of stage 2: a frozen video encoder and the KL-regularised compressor.

SemanticGen Sec. 3.2. The encoder reads pairs of frames at a low rate and returns features
(B, d, S, hs, ws), S = pairs; the `Compressor`, an MLP, turns each of them into a mean and a
variance of K channels, pulled towards N(0, I) by a KL term; the sample is z_sem (B, K, S, hs, ws),
the plan. There is no decoder back to d: the compressor learns from the painter's loss plus KL.

The paper's encoder is the vision tower of Qwen2.5-VL. `TinyEncoder` is its miniature: a small video
transformer that learns language alignment (it predicts captions through `Captioner`), then freezes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SemanticEncoder(Protocol):
    """What a semantic encoder offers: `dim` d, the `grid` of its features, and `encode`."""

    dim: int

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws) for a low-rate video of that size; ValueError if it cannot be."""

    def encode(self, video: Tensor) -> Tensor:
        """Return features (B, d, S, hs, ws) of a low-rate video (B, 3, F, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class TinyEncoderConfig:
    """Sizes of TinyEncoder and of the captioner that trains it."""

    dim: int = 128  # d
    blocks: int = 4
    heads: int = 4
    rate: float = 1.0  # pairs of frames per second: half the semantic frame rate
    caption_blocks: int = 2
    caption_words: int = 16  # longer captions are cut

    def __post_init__(self):
        if self.dim < 4 or self.dim % 4 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim}: must divide by 4 and by the {self.heads} heads")


class TinyEncoder(nn.Module):
    """Three stride-2 convolutions over pairs of frames, then a transformer over all tokens."""

    patch = 8  # pixels per token, each way: three halvings

    def __init__(self, config: TinyEncoderConfig):
        super().__init__()
        self.config = config
        self.dim = dim = config.dim
        self.stem = nn.Sequential(
            nn.Conv2d(6, dim // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.register_buffer("waves", torch.logspace(-2, 2, 8, base=2), persistent=False)
        self.positions = nn.Linear(3 * 2 * len(self.waves), dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(dim)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws); ValueError names the multiples that fit."""
        if frames % 2 or height % self.patch or width % self.patch or not frames:
            raise ValueError(
                f"semantic video of {frames} frames, {height} x {width}: the encoder needs pairs "
                f"of frames and multiples of {self.patch} pixels"
            )
        return frames // 2, height // self.patch, width // self.patch

    def forward(self, video: Tensor) -> Tensor:
        """Return features with gradient: (B, 3, F, H, W) in [-1, 1] -> (B, d, S, hs, ws)."""
        pairs, height, width = self.grid(*video.shape[2:])
        x = self.stem(rearrange(video, "b c (s two) h w -> (b s) (two c) h w", two=2))
        x = rearrange(x, "(b s) d h w -> b (s h w) d", s=pairs)
        x = x + self.positions(self._waves(pairs, height, width)).to(x)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.norm(x), "b (s h w) d -> b d s h w", s=pairs, h=height, w=width)

    def _waves(self, pairs: int, height: int, width: int) -> Tensor:
        """Fourier features of each token's (seconds, y, x), (S hs ws, 3 * 2 * waves)."""
        axes = (
            torch.arange(pairs, device=self.waves.device) / self.config.rate,
            (torch.arange(height, device=self.waves.device) + 0.5) / height,
            (torch.arange(width, device=self.waves.device) + 0.5) / width,
        )
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3, 1)
        angles = 2 * torch.pi * coords * self.waves  # (S hs ws, 3, waves)
        return torch.cat([angles.cos(), angles.sin()], -1).flatten(1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return the frozen features: (B, 3, F, H, W) in [-1, 1] -> (B, d, S, hs, ws) float32."""
        return self(video).float()


class Captioner(nn.Module):
    """A causal transformer that predicts a caption word by word from the features.

    Only there to train the encoder by language alignment, as Qwen2.5-VL's tower was; then dropped.
    """

    end = 0  # token id of "caption ends"; also what the first word is predicted from
    unknown = 1  # token id of words outside the vocabulary

    def __init__(self, config: TinyEncoderConfig, vocabulary: Sequence[str]):
        super().__init__()
        dim, self.words = config.dim, config.caption_words
        self.vocabulary = {word: i + 2 for i, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary) + 2, dim)
        self.places = nn.Parameter(torch.randn(self.words + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                dim, config.heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(config.caption_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(vocabulary) + 2)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids (B, words + 1): words, then `end` to fill up."""
        ids = torch.full((len(captions), self.words + 1), self.end)
        for row, caption in zip(ids, captions, strict=True):
            words = caption.lower().split()[: self.words]
            row[: len(words)] = torch.tensor([self.vocabulary.get(w, self.unknown) for w in words])
        return ids

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return logits (B, M, words) of each next token after ids (B, M) that begin with `end`."""
        memory = rearrange(features, "b d s h w -> b (s h w) d")
        x = self.embedding(ids) + self.places[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, memory, tgt_mask=mask.to(memory), tgt_is_causal=True)
        return self.head(self.norm(x))

    def loss(self, features: Tensor, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return next-word cross-entropy to the first `end`; logs the share of captions right."""
        ids = self.tokenize(captions).to(features.device)
        used = max(len(caption.split()) for caption in captions) + 1
        ids = ids[:, : min(used, self.words + 1)]  # (B, M)
        logits = self(features, F.pad(ids[:, :-1], (1, 0), value=self.end)).float()
        ended = (ids == self.end).cumsum(1) > 1  # past the first `end`: no loss
        loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        right = (logits.argmax(-1) == ids) | ended
        return loss[~ended].mean(), {"exact": right.all(1).float().mean()}


@dataclass(frozen=True)
class CompressorConfig:
    """Sizes of the compressor and its regularisation (none of them given in the paper but K)."""

    channels: int = 8  # K: the paper tries 64 and 8, and 8 is best (Table 3)
    hidden: int = 256
    kl_weight: float = 3e-5  # on KL summed over channels; larger ones kill the plan
    log_variance: float = -4.0  # where the log-variance starts: low, or the posterior collapses
    noise: float = 0.2  # tau: z_sem is trained with noise of deviation tau * |N(0, 1)|, as in RAE


class Compressor(nn.Module):
    """MLP from d features to the mean and log-variance of K channels; KL towards N(0, I)."""

    def __init__(self, dim: int, config: CompressorConfig):
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, 2 * config.channels)
        )
        nn.init.orthogonal_(
            self.mlp[2].weight[: config.channels], gain=2.0
        )  # means of about unit scale
        nn.init.zeros_(self.mlp[2].weight[config.channels :])
        nn.init.zeros_(self.mlp[2].bias)
        nn.init.constant_(self.mlp[2].bias[config.channels :], config.log_variance)
        # Features of pretrained towers have uneven scales: standardise them first.
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_std", torch.ones(dim))
        # Statistics of z_sem, for the planner: it generates plans of unit variance.
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(config.channels, 1, 1, 1))

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, d, S, hs, ws) -> mean and log-variance (B, K, S, hs, ws) float32."""
        x = (features.movedim(1, -1) - self.feature_mean) / self.feature_std
        mean, log_variance = self.mlp(x).float().movedim(-1, 1).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sample z_sem and return it with its KL.

        features: (B, d, S, hs, ws); noise: (B, K, S, hs, ws), N(0, 1). Returns z_sem, like noise,
        and the KL of each channel, (K,) in nats per token: sum it for the loss.
        """
        mean, log_variance = self.posterior(features)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)  # (B, K, S, hs, ws)
        return mean + noise * (0.5 * log_variance).exp(), kl.transpose(0, 1).flatten(1).mean(1)

    def perturb(self, z_sem: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Add the training noise that prepares the painter for imperfect plans (Sec. 3.2, RAE).

        level: (B,) N(0, 1), its size decides how much each sample gets; noise: like z_sem, N(0, 1).
        """
        sigma = self.config.noise * level.abs().reshape(-1, 1, 1, 1, 1)
        return z_sem + sigma * self.std * noise

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Return the plan of a reference: the posterior's mean, (B, K, S, hs, ws)."""
        return self.posterior(features)[0]

    def normalise(self, z_sem: Tensor) -> Tensor:
        """Return z_sem at zero mean and unit variance: what the planner learns to sample."""
        return (z_sem - self.mean) / self.std

    def denormalise(self, plan: Tensor) -> Tensor:
        """Undo `normalise`: the planner's sample -> z_sem for the painter."""
        return plan * self.std + self.mean

    @torch.no_grad()
    def set_feature_statistics(self, features: Tensor):
        """Measure the features' mean and deviation per channel on (B, d, S, hs, ws)."""
        flat = features.float().movedim(1, -1).flatten(0, -2)  # (B S hs ws, d)
        self.feature_mean.copy_(flat.mean(0))
        self.feature_std.copy_(flat.std(0) + 1e-6)

    @torch.no_grad()
    def set_statistics(self, features: Tensor):
        """Measure z_sem's mean and deviation per channel, sampling noise included, on features."""
        mean, log_variance = (x.transpose(0, 1).flatten(1) for x in self.posterior(features))
        variance = mean.var(1) + log_variance.exp().mean(1)
        self.mean.copy_(mean.mean(1).view_as(self.mean))
        self.std.copy_(variance.sqrt().view_as(self.std))
