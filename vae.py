"""Video VAEs: pixels to the latents that stage 2 denoises, and back.

The paper uses a 3D VAE that it does not describe further (Sec. 3.1). Here it is `WanVAE`, Wan2.1's;
the miniature's is `TinyVAE` in toy/vae.py. Latents are normalised, so that the diffusion sees about
zero mean and unit variance whatever the VAE's own scale is: Wan's by the mean and the deviation of
each channel, which are published with its weights; TinyVAE measures its own, and whitens.

Layouts: video (B, 3, F, H, W) float in [-1, 1]; latents (B, C, T, h, w).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from plumbing.files import UserError, require
from plumbing.weights import digest, fill, loading, locate, read_settings, size, tensor_files


class VAEConfig(Protocol):
    """What the configuration of a VAE says."""

    channels: int  # C
    time_patch: int  # frames per latent frame, after the first ones
    space_patch: int  # pixels per latent position, each way
    first: int  # frames at the start that are a latent frame by themselves

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, h, w) for a video of that size; ValueError names the sizes that fit."""


class VideoVAE(Protocol):
    """What a VAE offers."""

    config: VAEConfig

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, C, T, h, w) of normalised latents."""

    def encode(self, video: Tensor) -> Tensor:
        """Return normalised latents (B, C, T, h, w), the mean of the posterior."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return video (B, 3, F, H, W) in [-1, 1]."""

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the same video piece by piece, so that not all of it is in memory."""


# --- a released VAE -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WanVAEConfig:
    """Which weights of Wan's VAE, and its sizes; `describe_vae` reads them off the weights."""

    weights: str = ""  # folder or hub id, with the VAE in it or in its folder vae; "" = none named
    digest: str = ""  # stands for the content of its weights
    channels: int = 16  # C
    time_patch: int = 4
    space_patch: int = 8
    dtype: str = "float32"  # of its weights in memory
    tile: int | None = None  # pixels: larger frames are coded in tiles of this side, blended
    first = 1  # frames at the start that are a latent frame by themselves; not a field

    def __post_init__(self):
        patch = self.space_patch
        if self.tile is not None and (self.tile % patch or self.tile < 2 * patch):
            raise ValueError(
                f"tile {self.tile}: must be a multiple of {patch}, at least {2 * patch}"
            )

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, h, w); ValueError names the sizes that fit (Wan's own code drops the rest)."""
        time, space = self.time_patch, self.space_patch
        if frames < 1 or (frames - 1) % time or height % space or width % space:
            near = max(0, round((frames - 1) / time)) * time + 1
            raise ValueError(
                f"video of {frames} frames, {height} x {width}: Wan's VAE needs {time}k + 1 "
                f"frames (such as {near}) and multiples of {space} pixels"
            )
        return (frames - 1) // time + 1, height // space, width // space


def vae_folder(weights: str) -> str:
    """Return "vae/" where the VAE is part of a pipeline's repository, else ""."""
    return "vae/" if locate(weights, "vae/config.json") else ""


def describe_vae(weights: str) -> WanVAEConfig:
    """Return the configuration of released weights of Wan's VAE, in a folder or under a hub id.

    UserError if they are not an AutoencoderKLWan in safetensors.
    """
    folder = vae_folder(weights)
    settings = read_settings(weights, f"{folder}config.json")
    kind = settings.get("_class_name")
    if kind != "AutoencoderKLWan":
        raise UserError(
            f"{weights} holds a {kind!r}, not AutoencoderKLWan: repositories whose names end in "
            "-Diffusers have one"
        )
    files = tensor_files(weights, stem=f"{folder}diffusion_pytorch_model")
    return WanVAEConfig(
        weights=weights,
        digest=digest([locate(weights, f"{folder}config.json"), *files.values()]),
        channels=size(weights, settings, "z_dim", default=16),
        time_patch=size(weights, settings, "scale_factor_temporal", default=4),
        space_patch=size(weights, settings, "scale_factor_spatial", default=8),
    )


class WanVAE(nn.Module):
    """The VAE of Wan2.1 through diffusers (extra `wan`): 16 channels, 4 x 8 x 8, causal in time.

    The first frame is a latent frame by itself, hence 4k + 1 frames. It codes four frames at a
    time, so that the memory of its layers does not grow with a video's length; `tile` bounds it
    over height and width.
    """

    def __init__(self, config: WanVAEConfig, device: torch.device | str = "cpu"):
        """Load the weights. UserError if they are not readable or not complete."""
        super().__init__()
        self.config = config
        diffusers = require("diffusers", "wan")
        folder = vae_folder(config.weights)
        settings = read_settings(config.weights, f"{folder}config.json")
        with loading(config.weights, "Wan's VAE"), torch.device("meta"):
            self.model = diffusers.AutoencoderKLWan.from_config(settings)
        files = tensor_files(config.weights, stem=f"{folder}diffusion_pytorch_model")
        fill(self.model, config.weights, files, getattr(torch, config.dtype))
        if config.tile:
            step = config.tile * 3 // 4 // config.space_patch * config.space_patch  # whole latents
            self.model.enable_tiling(config.tile, config.tile, step, step)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.model.config, f"latents_{name}"))
            self.register_buffer(name, values.view(-1, 1, 1, 1))
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of normalised latents, (B, C, T, h, w) float32."""
        self.config.grid(*video.shape[2:])  # diffusers would drop what does not fit
        raw = self.model.encode(video.to(self.model.dtype)).latent_dist
        mean, log_variance = raw.mean.float(), raw.logvar.float()
        return (mean - self.mean) / self.std, log_variance - 2 * self.std.log()

    def encode(self, video: Tensor) -> Tensor:
        """Return normalised latents: (B, 3, F, H, W) in [-1, 1] -> (B, C, T, h, w) float32."""
        return self.posterior(video)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return video in [-1, 1]: (B, C, T, h, w) -> (B, 3, 4 (T - 1) + 1, H, W) float32."""
        raw = (latents * self.std + self.mean).to(self.model.dtype)
        return self.model.decode(raw).sample.float()

    @torch.no_grad()
    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the same video, the frames of one latent frame after the other.

        As in diffusers' own loop, which keeps all frames; with tiles the whole video at once.
        """
        if self.config.tile or self.model.config.patch_size is not None:
            yield self.decode(latents)
            return
        raw = self.model.post_quant_conv((latents * self.std + self.mean).to(self.model.dtype))
        # What each convolution has to know of the frames before.
        memory = [None] * sum(isinstance(m, nn.Conv3d) for m in self.model.decoder.modules())
        for k, frame in enumerate(raw.split(1, 2)):
            out = self.model.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=k == 0)
            yield out.float().clamp(-1, 1)
