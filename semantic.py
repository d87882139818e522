"""The semantic side of stage 2: the compressor, and the frozen encoder whose features it reads.

SemanticGen Sec. 3.2. The encoder reads pairs of frames at a low rate and returns features
(B, d, S, hs, ws), S = pairs. The `Compressor`, an MLP, turns each of them into the mean and the
variance of K channels; a KL term pulls them towards N(0, I); a sample is z_sem (B, K, S, hs, ws),
the plan. There is no decoder back to d: the painter's loss trains the compressor.

The paper's encoder is the vision tower of Qwen2.5-VL (`QwenVisionTower`); `VJEPA2` is another one
that it names. Both are released; one to train from scratch is `toy/encoder.py`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from plumbing.files import UserError, require
from plumbing.weights import digest, fill, loading, locate, read_settings, size, tensor_files

# --- the compressor -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressorConfig:
    """Sizes of the compressor, and its regularisation. The paper gives K alone."""

    kind: str = "mlp"  # or fixed ones, to compare: "pca"; "none", the features as they are
    channels: int = 8  # K: the paper tries 64 and 8, and 8 is best (Table 3)
    hidden: int = 256
    kl_weight: float = 3e-5  # of the KL, summed over channels (results/kl)
    log_variance: float = -4.0  # where the log-variance starts: low, or the posterior collapses
    noise: float = 0.2  # tau: noise on z_sem of tau * |N(0, 1)| times its deviation, as in RAE


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of N(mean, exp(log_variance)) from N(0, 1) in nats, elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class Compressor(nn.Module):
    """An MLP from d features to the mean and log-variance of K channels, and their KL."""

    def __init__(self, dim: int, config: CompressorConfig):
        super().__init__()
        self.config = config
        hidden, channels = config.hidden, config.channels
        if config.kind == "mlp":
            ends = nn.Linear(dim, hidden), nn.Linear(hidden, 2 * channels)
            self.mlp = nn.Sequential(ends[0], nn.SiLU(), ends[1])
            last = ends[1]  # means first, then log-variances
            nn.init.orthogonal_(last.weight[:channels], gain=2.0)  # means of about unit scale
            nn.init.zeros_(last.weight[channels:])
            nn.init.zeros_(last.bias)
            nn.init.constant_(last.bias[channels:], config.log_variance)
        else:  # nothing to learn, and no variance
            self.register_buffer("projection", torch.zeros(channels, dim).fill_diagonal_(1))
        # Features of pretrained towers have uneven scales: standardise them first.
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_std", torch.ones(dim))
        # z_sem's own: the training noise is in proportion to its deviation, and the planner
        # generates plans of unit variance.
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1, 1))

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, d, S, hs, ws) -> mean and log-variance (B, K, S, hs, ws) float32."""
        x = (features.movedim(1, -1) - self.feature_mean) / self.feature_std
        if self.config.kind == "mlp":
            mean, log_variance = self.mlp(x).float().movedim(-1, 1).chunk(2, 1)
        else:
            mean = (x @ self.projection.T).float().movedim(-1, 1)
            log_variance = torch.full_like(mean, -20)
        return mean, log_variance.clamp(-20, 10)

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sample z_sem and return it with its KL.

        features: (B, d, S, hs, ws); noise: (B, K, S, hs, ws), N(0, 1). Returns z_sem, like noise,
        and the KL of each channel, (K,) in nats per token: sum it for the loss.
        """
        mean, log_variance = self.posterior(features)
        kl = gaussian_kl(mean, log_variance)  # (B, K, S, hs, ws)
        return mean + noise * (0.5 * log_variance).exp(), kl.transpose(0, 1).flatten(1).mean(1)

    def perturb(self, z_sem: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Add the training noise that prepares the painter for imperfect plans (Sec. 3.2, RAE).

        It is relative to z_sem's deviation. level: (B,) N(0, 1), whose absolute value says how much
        noise a sample gets; noise: like z_sem, N(0, 1).
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
        if self.config.kind == "pca":  # in the directions in which they vary most
            cov = torch.cov(((flat - self.feature_mean) / self.feature_std).T)
            directions = torch.linalg.eigh(cov).eigenvectors.T.flip(0)  # (d, d), most first
            self.projection.copy_(directions[: len(self.projection)])

    @torch.no_grad()
    def set_statistics(self, features: Tensor):
        """Measure z_sem's mean and deviation per channel, sampling noise included, on features."""
        mean, log_variance = (x.transpose(0, 1).flatten(1) for x in self.posterior(features))
        variance = mean.var(1) + log_variance.exp().mean(1)
        self.mean.copy_(mean.mean(1).view_as(self.mean))
        self.std.copy_(variance.sqrt().view_as(self.std))


# --- what an encoder offers ---------------------------------------------------------------------


class EncoderConfig(Protocol):
    """What the configuration of a semantic encoder says."""

    dim: int  # d

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws) for a low-rate video of that size; ValueError names what fits."""


class SemanticEncoder(Protocol):
    """What a semantic encoder offers."""

    config: EncoderConfig

    def encode(self, video: Tensor) -> Tensor:
        """Return features (B, d, S, hs, ws) of a low-rate video (B, 3, F, H, W) in [-1, 1]."""


def pair_grid(frames: int, height: int, width: int, patch: int) -> tuple[int, int, int]:
    """Return (S, hs, ws) of an encoder that reads pairs of frames in squares of patch pixels."""
    if frames % 2 or height % patch or width % patch or not frames:
        raise ValueError(
            f"semantic video of {frames} frames, {height} x {width}: the encoder needs pairs "
            f"of frames and multiples of {patch} pixels"
        )
    return frames // 2, height // patch, width // patch


# --- released encoders --------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainedEncoderConfig:
    """Which released encoder, and its sizes; `describe_encoder` reads them off its weights."""

    kind: str = "qwen2_5_vl"  # "model_type" in its config.json, a key of ENCODERS
    weights: str = ""  # folder or hub id; "" = none named
    digest: str = ""  # stands for the content of its weights
    dim: int = 2048  # d: 2048 in the 3B model, 3584 in 7B, 8192 in 72B
    patch: int = 28  # pixels per feature, each way
    side: int | None = None  # the only height and width it reads; None = any multiples of patch
    dtype: str = "bfloat16"  # of its weights in memory
    chunk: int = 16  # pairs of frames (or clips, of an encoder that looks across them) at a time

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws); ValueError names the sizes that fit."""
        if self.side and (height, width) != (self.side, self.side):
            raise ValueError(
                f"semantic video of {height} x {width}: {self.kind} reads {self.side} x "
                f"{self.side} alone; set data.semantic_height and data.semantic_width"
            )
        return pair_grid(frames, height, width, self.patch)


class QwenVisionTower(nn.Module):
    """The vision tower of Qwen2.5-VL, alone: the paper's semantic encoder (Sec. 3.2).

    It is loaded from a full Qwen2.5-VL checkpoint. Only the shards that hold the tower are fetched
    and opened; the language model is never read. transformers (extra `qwen`) computes the tower.
    Its processor would need torchvision, so pixels are prepared here.

    The tower attends within one pair of frames and never across: its features know motion only
    within a pair, and all structure over time is the DiT's to model. Pairs are therefore one batch,
    and encoding them in chunks is the same as encoding them at once.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], from CLIP
    std = (0.26862954, 0.26130258, 0.27577711)
    prefix = re.compile(r"(model\.)?visual\.")  # as released; as some versions saved it

    def __init__(self, config: PretrainedEncoderConfig, device: torch.device | str = "cpu"):
        """Load the weights. UserError if any tensor is missing, foreign or of another size."""
        super().__init__()
        self.config = config
        self.tower = self._read(config.weights, getattr(torch, config.dtype)).to(device)
        self.register_buffer("mean_rgb", torch.tensor(self.mean, device=device).view(3, 1, 1, 1))
        self.register_buffer("std_rgb", torch.tensor(self.std, device=device).view(3, 1, 1, 1))
        self.eval().requires_grad_(False)

    @classmethod
    def describe(cls, weights: str, settings: dict) -> PretrainedEncoderConfig:
        """Return the configuration of a checkpoint whose config.json says `settings`."""
        vision = settings.get("vision_config")
        if not isinstance(vision, dict):
            raise UserError(f"{weights}: config.json has no vision tower, no vision_config")
        dim = size(weights, vision, "out_hidden_size")
        side = size(weights, vision, "patch_size", default=14)
        patch = side * size(weights, vision, "spatial_merge_size", default=2)
        files = [locate(weights, "config.json"), *tensor_files(weights, cls.prefix.match).values()]
        return PretrainedEncoderConfig(weights=weights, digest=digest(files), dim=dim, patch=patch)

    @classmethod
    def _read(cls, weights: str, dtype: torch.dtype) -> nn.Module:
        """Return the tower in dtype; at most one tensor is in memory besides it."""
        transformers = require("transformers", "qwen")
        settings = dict(read_settings(weights)["vision_config"])

        def build(**changes) -> nn.Module:
            from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as configuration

            config = configuration.Qwen2_5_VLVisionConfig(**{**settings, **changes})
            return transformers.Qwen2_5_VisionTransformerPretrainedModel(config)

        # RoPE's frequencies are in no checkpoint, must stay float32, and depend on the heads' width
        # alone: a tower of one head without blocks has them.
        with loading(weights, "a vision tower"):
            head = settings["hidden_size"] // settings["num_heads"]
            small = build(hidden_size=head, num_heads=1, depth=0)
            with torch.device("meta"):  # no memory for what is read anyway
                tower = build()
        files = tensor_files(weights, cls.prefix.match)
        fill(tower, weights, files, dtype, lambda name: cls.prefix.sub("", name, 1))
        for name, buffer in small.rotary_pos_emb.named_buffers():
            setattr(tower.rotary_pos_emb, name, buffer.detach().clone())
        return tower

    def patches(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and cut: pairs of frames (P, 3, 2, H, W) in [-1, 1] -> patches and their grids.

        Returns (P h w, 1176) patches of 14 x 14 pixels and 2 frames, in the tower's order (squares
        of 2 x 2 patches, which it merges, one after the other), and (P, 3) sizes (1, h, w).
        """
        side, merged = self.tower.patch_size, self.tower.spatial_merge_size
        pixels = ((pairs + 1) / 2 - self.mean_rgb) / self.std_rgb
        sizes = {"a": merged, "b": merged, "p": side, "q": side}
        rows = rearrange(pixels, "n c t (h a p) (w b q) -> (n h w a b) (c t p q)", **sizes)
        size = (1, pairs.shape[-2] // side, pairs.shape[-1] // side)
        return rows, torch.tensor([size] * len(pairs), device=rows.device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return features (B, d, S, hs, ws) float32 of a low-rate video (B, 3, F, H, W)."""
        pairs, height, width = self.config.grid(*video.shape[2:])
        x = rearrange(video, "b c (s two) h w -> (b s) c two h w", two=2)
        merged = []
        for part in x.split(self.config.chunk):
            out = self.tower(*self.patches(part))
            # pooler_output is in the order of the patches, last_hidden_state in that of windows;
            # older versions of transformers return the former alone.
            merged.append((out if isinstance(out, Tensor) else out.pooler_output).float())
        sizes = {"s": pairs, "h": height, "w": width}
        return rearrange(torch.cat(merged), "(b s h w) d -> b d s h w", **sizes)


class VJEPA2(nn.Module):
    """V-JEPA 2, another encoder that the paper names: self-supervised, and it looks across time.

    It reads pairs of frames of one size in patches of 16 pixels. transformers (extra `qwen`)
    computes it.
    """

    mean = (0.485, 0.456, 0.406)  # of RGB in [0, 1], from ImageNet
    std = (0.229, 0.224, 0.225)
    heads = re.compile(r"(vjepa2\.)?(predictor|pooler|classifier)\.")  # not needed here

    def __init__(self, config: PretrainedEncoderConfig, device: torch.device | str = "cpu"):
        """Load the weights. UserError if any tensor is missing, foreign or of another size."""
        super().__init__()
        self.config = config
        transformers = require("transformers", "qwen")
        with loading(config.weights, "V-JEPA 2"), torch.device("meta"):
            settings = transformers.VJEPA2Config(**read_settings(config.weights))
            self.model = transformers.VJEPA2Model(settings)
        del self.model.predictor  # only the encoder's features are used
        files = self._files(config.weights)
        dtype = getattr(torch, config.dtype)
        fill(self.model, config.weights, files, dtype, lambda name: name.removeprefix("vjepa2."))
        self.register_buffer("mean_rgb", torch.tensor(self.mean).view(3, 1, 1))
        self.register_buffer("std_rgb", torch.tensor(self.std).view(3, 1, 1))
        self.to(device).eval().requires_grad_(False)

    @classmethod
    def describe(cls, weights: str, settings: dict) -> PretrainedEncoderConfig:
        """Return the configuration of weights whose config.json says `settings`."""
        return PretrainedEncoderConfig(
            kind="vjepa2",
            weights=weights,
            digest=digest([locate(weights, "config.json"), *cls._files(weights).values()]),
            dim=size(weights, settings, "hidden_size"),
            patch=size(weights, settings, "patch_size", default=16),
            side=size(weights, settings, "crop_size", default=256),
            chunk=1,
        )

    @classmethod
    def _files(cls, weights: str) -> dict[str, Path]:
        """Return {tensor name: file} of all but the heads."""
        return tensor_files(weights, lambda name: not cls.heads.match(name))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return features (B, d, S, hs, ws) float32 of a low-rate video (B, 3, F, H, W)."""
        pairs, height, width = self.config.grid(*video.shape[2:])
        x = rearrange(video, "b c f h w -> b f c h w")
        x = (((x + 1) / 2 - self.mean_rgb) / self.std_rgb).to(self.model.dtype)
        tokens = [
            self.model(part, skip_predictor=True).last_hidden_state.float()
            for part in x.split(self.config.chunk)
        ]
        sizes = {"s": pairs, "h": height, "w": width}
        return rearrange(torch.cat(tokens), "b (s h w) d -> b d s h w", **sizes)


ENCODERS = {"qwen2_5_vl": QwenVisionTower, "vjepa2": VJEPA2}  # by model_type of their config.json


def describe_encoder(weights: str) -> PretrainedEncoderConfig:
    """Return the configuration of released weights, in a folder or under a hub id.

    Reads all files that the encoder needs, for their digest. UserError if they are not those of an
    encoder known here.
    """
    settings = read_settings(weights)
    kind = settings.get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"{weights} holds a {kind!r}, not one of the encoders {', '.join(ENCODERS)}"
        )
    return ENCODERS[kind].describe(weights, settings)
