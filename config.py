"""Presets, and the sizes that they lead to.

python config.py --preset paper --seconds 5 60      # shapes and numbers of tokens
python config.py --preset wan --seconds 5 60        # also what fine-tuning the painter takes
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from data import DataConfig
from model import DiTConfig
from plumbing.fields import add_set_flag
from plumbing.files import UserError, command
from semantic import CompressorConfig, PretrainedEncoderConfig
from settings import Config, SampleConfig, StageConfig, StageConfigs, override
from swin import fitting_window
from text import UMT5Config
from toy.encoder import TinyEncoderConfig
from toy.text import HashTextConfig
from toy.vae import TinyVAEConfig
from vae import WanVAEConfig
from wan import TRAINED, WanConfig, WanDiTConfig, build_dit

LONGEST = 3600  # seconds of a video that is sampled


def tiny() -> Config:
    """A world of 32 x 32 pixels and two seconds; trains on two CPU cores in minutes."""
    data = DataConfig()
    vae, text, compressor = TinyVAEConfig(), HashTextConfig(), CompressorConfig()
    pairs = data.semantic_fps / 2
    latent = DiTConfig(
        channels=vae.channels,
        rate=data.fps / vae.time_patch,
        text_dim=text.dim,
        context_channels=compressor.channels,
        context_rate=pairs,
        patch=2,
        depth=2,
    )
    return Config(
        preset="tiny",
        data=data,
        vae=vae,
        text=text,
        encoder=TinyEncoderConfig(rate=pairs),
        compressor=compressor,
        latent=latent,
        semantic=DiTConfig(channels=compressor.channels, rate=pairs, text_dim=text.dim),
        stages=StageConfigs(
            vae=StageConfig(steps=600, batch=8, ema=0.99),
            encoder=StageConfig(steps=430, batch=64),
            latent=StageConfig(steps=2300, batch=16, clips=4096, shift=6.0, text_dropout=0.25),
            semantic=StageConfig(steps=700, batch=32, clips=4096),
            base=StageConfig(steps=4500, batch=16, clips=4096, shift=6.0),
        ),
        sample=SampleConfig(),
    )


def tiny_long() -> Config:
    """Four times as long, with four events for each object: windows over time (Sec. 3.4).

    VAE and encoder are those of `tiny`: they learn from two seconds, and read longer clips in
    chunks of that length. The planner sees the whole clip. The painter sees windows of two seconds
    and no absolute time, so it paints any part alike; it learns from stretches of half a clip. The
    planner learns at higher noise than usual: there the text decides, and it tells a story.
    """
    config = tiny()
    stages = config.stages
    return override(
        config,
        preset="tiny_long",
        data=replace(config.data, frames=64, events=4),
        vae=replace(config.vae, span=4),
        text=replace(config.text, words=32, before=1),
        encoder=replace(config.encoder, span=2),
        # With two heads and 20 % of texts dropped it lost stories (benchmarks/RECORDS.md).
        latent=replace(config.latent, heads=4, window=2.0, time_features=False),
        semantic=replace(config.semantic, heads=4),
        stages=StageConfigs(
            vae=replace(stages.vae, pieces=4),
            encoder=replace(stages.encoder, pieces=4),
            latent=replace(stages.latent, steps=2300, batch=8, pieces=2, text_dropout=0.3),
            semantic=replace(stages.semantic, steps=2400, batch=8, shift=2.0),
            base=replace(stages.base, pieces=2),
        ),
    )


def small() -> Config:
    """The same world at 64 x 64 pixels and four seconds, for one GPU."""
    config = tiny()
    sides = dict.fromkeys(("height", "width", "semantic_height", "semantic_width"), 64)
    wide = dict(width=384, depth=8, heads=6, space_cycles=4.0)
    usual = dict(lr=1e-3, clips=32768, ema=0.9995, compile=True)
    return override(
        config,
        preset="small",
        data=replace(config.data, frames=48, fps=12.0, **sides),
        vae=replace(config.vae, width=192),
        encoder=replace(config.encoder, dim=256, blocks=6),
        latent=replace(config.latent, **wide),
        semantic=replace(config.semantic, **wide),
        stages=StageConfigs(
            vae=StageConfig(steps=4000, batch=32, lr=1e-3),
            encoder=StageConfig(steps=6000, batch=128, lr=1e-3),
            latent=StageConfig(steps=20000, batch=64, shift=6.0, **usual),
            semantic=StageConfig(steps=10000, batch=128, **usual),
            base=StageConfig(steps=30000, batch=64, shift=6.0, **usual),
        ),
    )


def paper() -> Config:
    """Real videos, 480p and 24 fps, 5 seconds; Qwen2.5-VL's tower, Wan's VAE, umT5 (Sec. 3, 4).

    From the paper: semantic encoder, both rates, 8 channels of z_sem, steps (of Table 3). The DiTs
    have the width, depth and heads of Wan2.1-1.3B. The rest is our choice. Never trained here.
    """
    config = tiny()
    # Frames whose sides the VAE and the tower can divide: multiples of 16 and of 28.
    data = DataConfig(
        frames=121,
        fps=24.0,
        height=480,
        width=832,
        semantic_fps=1.6,
        semantic_height=476,
        semantic_width=840,
    )
    wan = dict(width=1536, depth=30, heads=12, ffn=6, time_features=False)
    usual = StageConfig(  # one clip at a time, its blocks recomputed: for one large GPU
        **dict(steps=10000, batch=8, accumulate=8, checkpoint=True, compile=True),
        **dict(lr=1e-4, optimizer="adamw", warmup=1000, final_lr=0.1, ema=0.9999),
    )
    return override(
        config,
        preset="paper",
        data=data,
        vae=WanVAEConfig(),
        text=UMT5Config(),
        encoder=PretrainedEncoderConfig(),
        latent=replace(config.latent, space_cycles=15.0, **wan),
        semantic=replace(config.semantic, space_cycles=8.5, **wan),
        stages=StageConfigs(
            vae=usual,  # of no use while the VAE and the encoder are released ones
            encoder=usual,
            latent=replace(usual, shift=3.0),
            semantic=replace(usual, steps=50000),
            base=replace(usual, shift=3.0),
        ),
        sample=replace(config.sample, steps=50),
    )


def wan() -> Config:
    """Fine-tuning from Wan2.1-T2V-1.3B's transformer, 480p and 16 fps, 5 seconds (Sec. 3).

    Semantic encoder, VAE and text encoder are those of `paper`. Our choice: LoRA, and most texts
    dropped at first, so that the painter learns to listen to a plan that it has never seen.
    """
    config = paper()
    usual = replace(config.stages.latent, steps=5000, warmup=100, ema=0.999, compile=False)
    return override(
        config,
        preset="wan",
        data=replace(config.data, frames=81, fps=16.0),
        latent=WanDiTConfig(channels=16, rate=4.0, text_dim=4096),
        semantic=WanDiTConfig(channels=8, rate=0.8, text_dim=4096, patch=1, of_plans=True),
        stages=replace(
            config.stages,
            latent=replace(usual, text_dropout_start=0.9),
            semantic=replace(usual, shift=1.0),
            base=usual,
        ),
        sample=replace(config.sample, latent_guidance=5.0, base_guidance=5.0),
    )


def wan_tiny() -> Config:
    """The same in miniature, on VAE, encoder and text of `tiny`.

    Stage `base` makes what is started from: without --dit it learns from nothing.
    """
    config = tiny()
    sizes = WanConfig(channels=8, text_dim=64, heads=5, head_width=32, depth=4, ffn=640, waves=64)
    dit = WanDiTConfig(channels=8, rate=2.0, text_dim=64, train="all", rank=16, wan=sizes)
    dropped = dict(text_dropout=0.3, text_dropout_start=0.9, text_dropout_steps=300)
    stages = replace(config.stages, latent=replace(config.stages.latent, **dropped))
    return override(config, preset="wan_tiny", latent=dit, semantic=dit, stages=stages)


PRESETS = {each.__name__: each for each in (tiny, tiny_long, small, paper, wan, wan_tiny)}


def preset(name: str) -> Config:
    """Return a preset by name; UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: choose {', '.join(PRESETS)}")
    return PRESETS[name]()


def attention_window(config: Config) -> float:
    """Return the painter's T_w in seconds; if it has none, what fits best to a quarter clip."""
    rates = config.latent.rate, config.latent.context_rate
    window = config.latent.window or float(fitting_window(rates, config.data.seconds / 4))
    if window >= min(config.latent_grid()[0] / rates[0], config.plan_grid()[0] / rates[1]):
        print(f"windows of {window:g} s, the shortest that fit, hold the clip: attention is full")
    return window


def clip_frames(config: Config, seconds: float) -> int:
    """Return the frames of a video of about that length: whole latents and features."""
    data, vae = config.data, config.vae
    whole = math.lcm(vae.time_patch, max(1, round(data.fps / config.latent.context_rate)))
    frames = round(seconds * data.fps / whole) * whole if math.isfinite(seconds) else 0
    if not whole <= frames <= LONGEST * data.fps:
        least = whole / data.fps
        raise UserError(f"--seconds {seconds}: the shortest clip is {least} s, the longest an hour")
    return frames + vae.first


def shapes(config: Config, seconds: float) -> dict[str, object]:
    """Return shapes and numbers of tokens of a video of about that length, by name."""
    frames = clip_frames(config, seconds)
    data = config.data.of_length(frames)
    plan = config.plan_grid(frames)
    painted, planned = config.latent_tokens(frames), config.plan_tokens(frames)
    return {
        "video": (3, *data.size),
        "low-rate video": (3, *data.semantic_size),
        "VAE latents": (config.vae.channels, *config.latent_grid(frames)),
        "semantic features": (config.encoder.dim, *plan),
        "z_sem": (config.compressor.channels, *plan),
        "latent tokens": painted,
        "plan tokens": planned,
        "latent tokens per plan token": round(painted / planned, 1),
    }


# Bytes that a block keeps until its backward pass, over tokens x width: bf16 products, Wan's own
# float32 islands. Counted on a block of Wan's proportions; attention's own memory is not in it.
BLOCK = {"lora": 76, "attention": 60, "all": 97}


def memory(config: Config, trained: str, seconds: Sequence[float]) -> dict[str, object]:
    """Return what training the painter takes by arithmetic, by name; memory in GB (10^9 bytes).

    On one device, blocks recomputed, one clip at a time, AdamW. trained: lora, attention or all.
    """
    released = replace(config.latent.wan, weights="named")  # on the meta device none are read
    with torch.device("meta"):
        dit = build_dit(replace(config.latent, train=trained, wan=released))
    every = sum(p.numel() for p in dit.parameters())
    learned = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    # float32: the weights; of what is trained gradient, two moments of AdamW, EMA.
    states = {"weights": 4 * every / 1e9, "gradients, AdamW, EMA": 16 * learned / 1e9}
    found = {
        "parameters, millions": every / 1e6,
        "trained, millions": learned / 1e6,
        "its file, MB": 4 * learned / 1e6,
        **{f"{name}, GB": x for name, x in states.items()},
    }
    for length in seconds:
        frames = clip_frames(config, length)
        tokens = config.latent_tokens(frames) + config.plan_tokens(frames)
        # Of each block its input and what its self-attention gave; and one block.
        kept = 4 * config.latent.wan.depth + BLOCK[trained]
        activations = tokens * config.latent.wan.width * kept / 1e9
        found[f"activations, {length:g} s, GB"] = activations
        found[f"all of it, {length:g} s, GB"] = activations + sum(states.values())
    return {name: f"{x:,.1f}" for name, x in found.items()}


def print_table(title: str, columns: dict[str, dict[str, object]]):
    """Print a table in Markdown; columns: {heading: {name of the row: cell}}."""
    print(f"| {title} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        cells = [x[name] for x in columns.values()]
        cells = [" x ".join(map(str, x)) if isinstance(x, tuple) else x for x in cells]
        cells = [x if isinstance(x, str) else f"{x:,}" for x in cells]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description="Shapes and numbers of tokens of a preset.")
    parser.add_argument("--preset", default="paper", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5.0, 60.0])
    add_set_flag(parser)
    args = parser.parse_args()
    config = override(preset(args.preset), args.settings)
    print_table(
        args.preset, {f"{seconds:g} s": shapes(config, seconds) for seconds in args.seconds}
    )
    if isinstance(config.latent, WanDiTConfig):
        print()
        print_table("painter", {x: memory(config, x, args.seconds) for x in TRAINED})


if __name__ == "__main__":
    command(main)
