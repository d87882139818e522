"""A semantic encoder in miniature: a video transformer that predicts captions, then freezes.

It stands in for Qwen2.5-VL's vision tower (Sec. 3.2), which was trained by language alignment too.
Two others to compare it with (Fig. 9, App. C): the same network trained without captions, and
VAE latents in place of features.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data import to_float
from plumbing.seeds import Rows
from semantic import pair_grid
from toy.conv import MatrixConv, ResBlock
from vae import VideoVAE

PATCH = 8  # pixels per feature, each way: three halvings
HIDDEN = 0.6  # share of the features whose pixels HiddenLearner hides


@dataclass(frozen=True)
class TinyEncoderConfig:
    """Sizes of TinyEncoder and of the captioner that trains it."""

    learns: str = "captions"  # or "hidden": the pixels of hidden parts of a clip, from the others
    dim: int = 128  # d
    blocks: int = 3
    heads: int = 4
    rate: float = 1.0  # pairs of frames per second: half the semantic frame rate
    span: int | None = None  # pairs that it reads together, longer videos in chunks; None = all
    caption_blocks: int = 2
    caption_words: int = 16  # longer captions are cut

    def __post_init__(self):
        if self.learns not in ("captions", "hidden"):
            raise ValueError(f"encoder.learns={self.learns}: choose captions or hidden")
        if self.dim < 16 or self.dim % 16 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim}: must divide by 16 and by the {self.heads} heads")

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws); ValueError names the multiples that fit."""
        return pair_grid(frames, height, width, PATCH)


class TinyEncoder(nn.Module):
    """Three stride-2 convolutions over pairs of frames, then a transformer over all tokens."""

    def __init__(self, config: TinyEncoderConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        blocks = (
            MatrixConv(2, dim // 4, dim // 2, stride=2),
            ResBlock(2, dim // 2),
            MatrixConv(2, dim // 2, dim, stride=2),
            ResBlock(2, dim),
        )
        first = nn.Conv2d(6, dim // 4, 3, stride=2, padding=1)
        self.stem = nn.Sequential(
            OrderedDict(first=first, act=nn.GELU(), blocks=nn.Sequential(*blocks))
        )
        waves = torch.logspace(-2, 2, 8, base=2, device="cpu")
        self.register_buffer("waves", waves, persistent=False)  # in no file, so never on "meta"
        self.positions = nn.Linear(3 * 2 * len(self.waves), dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, video: Tensor) -> Tensor:
        """Return features with gradient: (B, 3, F, H, W) in [-1, 1] -> (B, d, S, hs, ws)."""
        frames = 2 * self.config.span if self.config.span else video.shape[2]
        return torch.cat([self._read(chunk) for chunk in video.split(frames, 2)], 2)

    def _read(self, video: Tensor) -> Tensor:
        """Do the same for a chunk of video, whose time starts at 0."""
        pairs, height, width = self.config.grid(*video.shape[2:])
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
        coords = torch.cartesian_prod(*axes)  # (S hs ws, 3)
        angles = 2 * torch.pi * coords[..., None] * self.waves  # (S hs ws, 3, waves)
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
        """Return logits (B, M, V) of each next token after ids (B, M) that begin with `end`.

        V: the vocabulary's words, `end` and `unknown`.
        """
        memory = rearrange(features, "b d s h w -> b (s h w) d")
        x = self.embedding(ids) + self.places[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, memory, tgt_mask=mask.to(memory), tgt_is_causal=True)
        return self.head(self.norm(x))

    @classmethod
    def lengths(cls, ids: Tensor) -> Tensor:
        """Return how many ids of each caption (B, words + 1) are predicted: up to the first end."""
        return (ids != cls.end).sum(1) + 1  # (B,)

    def loss(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return next-word cross-entropy, summed over a caption, and whether it is right in full.

        features: (B, d, S, hs, ws); ids: (B, M) of `tokenize`, perhaps cut after the longest
        caption. Returns (B,), (B,) 0 or 1.
        """
        logits = self(features, F.pad(ids[:, :-1], (1, 0), value=self.end)).float()
        counted = torch.arange(ids.shape[1], device=ids.device) < self.lengths(ids)[:, None]
        loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # (B, M)
        right = (logits.argmax(-1) == ids) | ~counted
        return (loss * counted).sum(1), right.all(1).float()


class EncoderLearner(nn.ModuleDict):
    """The stage `encoder`: captions of fresh clips, predicted word by word from the features."""

    def __init__(self, config: TinyEncoderConfig, size: tuple[int, int, int], captions):
        """size: of the low-rate video. captions: some of the dataset's, of all words in it."""
        vocabulary = sorted({word for caption in captions for word in caption.lower().split()})
        captioner = Captioner(config, vocabulary)
        super().__init__({"encoder": TinyEncoder(config), "captioner": captioner})
        self.tokens = math.prod(config.grid(*size))  # of a clip
        # A constant, not the batch's own mean: so a row's loss does not depend on its company.
        lengths = [min(len(caption.split()), config.caption_words) + 1 for caption in captions]
        self.words = sum(lengths) / max(1, len(lengths))

    def draw(self, dataset, rows: Rows) -> dict[str, Tensor]:
        indices = rows.indices(len(dataset))
        ids = self["captioner"].tokenize(dataset.captions(indices))
        longest = int(Captioner.lengths(ids).max())
        return {"video": dataset.semantic_video(indices), "ids": ids[:, :longest]}

    def forward(self, video: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """video: (B, 3, F, H, W) uint8; ids: (B, M). Returns the mean loss of a word."""
        loss, exact = self["captioner"].loss(self["encoder"](to_float(video)), ids)  # (B,), (B,)
        return loss.mean() / self.words, {"exact": exact}


class HiddenLearner(nn.ModuleDict):
    """The stage `encoder` without captions: pixels of hidden parts of a clip, from the others.

    Self-supervised, as the masked autoencoders that SemanticGen names as drop-ins; our choice: as
    plain as SimMIM, with black in place of what is hidden and a linear map from features to pixels.
    """

    def __init__(self, config: TinyEncoderConfig, size: tuple[int, int, int], captions=()):
        """size: of the low-rate video. captions: not used."""
        head = nn.Linear(config.dim, 2 * 3 * PATCH**2)
        super().__init__({"encoder": TinyEncoder(config), "head": head})
        self.tokens = math.prod(config.grid(*size))  # of a clip

    def draw(self, dataset, rows: Rows) -> dict[str, Tensor]:
        video = dataset.semantic_video(rows.indices(len(dataset)))
        grid = self["encoder"].config.grid(*video.shape[2:])
        hidden = rows.draw(lambda rng: torch.rand(grid, generator=rng))
        return {"video": video, "hidden": hidden}

    def forward(self, video: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """video: (B, 3, F, H, W) uint8; hidden: (B, S, hs, ws), hidden where below HIDDEN."""
        sizes, hidden = {"two": 2, "p": PATCH, "q": PATCH}, hidden < HIDDEN
        pixels = to_float(video)
        cubes = rearrange(pixels, "b c (s two) (h p) (w q) -> b s h w (c two p q)", **sizes)
        black = repeat(hidden, "b s h w -> b 1 (s two) (h p) (w q)", **sizes)
        features = self["encoder"](pixels.masked_fill(black, -1))  # (B, d, S, hs, ws)
        error = (self["head"](features.movedim(1, -1)).float() - cubes).abs().mean(-1)
        loss = (error * hidden).flatten(1).sum(1) / hidden.flatten(1).sum(1).clamp(min=1)  # (B,)
        return loss.mean(), {}


LEARNERS = {"captions": EncoderLearner, "hidden": HiddenLearner}  # by what an encoder learns


@dataclass(frozen=True)
class LatentEncoderConfig:
    """Sizes of LatentEncoder; the low rate has to be the video's own."""

    dim: int  # d: the latents' channels times the latents of a feature
    frames: int = 8  # of the video, for one feature
    patch: int = PATCH  # pixels per feature, each way

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (S, hs, ws); ValueError names the multiples that fit."""
        if frames % self.frames or height % self.patch or width % self.patch or not frames:
            raise ValueError(
                f"video of {frames} frames, {height} x {width}: features need multiples of "
                f"{self.frames} frames and {self.patch} pixels"
            )
        return frames // self.frames, height // self.patch, width // self.patch


class LatentEncoder(nn.Module):
    """VAE latents in place of semantic features (the control of Fig. 9).

    Neighbouring latents are folded into one feature's channels: as few tokens as a plan has, and
    nothing is lost before the compressor.
    """

    def __init__(self, config: LatentEncoderConfig, vae: VideoVAE):
        super().__init__()
        self.config = config
        self.vae = (vae,)  # a tuple hides it: it is another part's, already on its device

    def encode(self, video: Tensor) -> Tensor:
        """Return the features: (B, 3, F, H, W) in [-1, 1] -> (B, d, S, hs, ws) float32."""
        S, hs, ws = self.config.grid(*video.shape[2:])
        (vae,) = self.vae
        latents = vae.encode(video)
        sizes = {"s": S, "h": hs, "w": ws}
        return rearrange(latents, "b c (s r) (h p) (w q) -> b (c r p q) s h w", **sizes)
