"""Parts that come with released weights: the flags that name them, their sizes, and the parts.

Three parts of the paper (Sec. 3.1, 3.2) are ready-made: semantic encoder, VAE, text encoder. A
fourth, a text-to-video transformer, is what planner, painter and base may start from. The user
names their weights; sizes and digests are read off them and kept in a run's configuration.
"""

import argparse
from dataclasses import replace

import torch
from torch import nn

from plumbing.device import computing
from plumbing.files import UserError
from semantic import ENCODERS, PretrainedEncoderConfig, describe_encoder
from settings import Config
from text import UMT5, UMT5Config, describe_text
from vae import WanVAE, WanVAEConfig, describe_vae
from wan import WanDiTConfig, describe_transformer

RELEASED = (PretrainedEncoderConfig, WanVAEConfig, UMT5Config)  # not trained here
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FLAGS = {  # what encodes clips -> (flags that name its weights, how to describe them, what fits)
    "encoder": (
        ("--qwen", "--encoder"),
        describe_encoder,
        "Qwen/Qwen2.5-VL-3B-Instruct, -7B-Instruct or -72B-Instruct",
    ),
    "vae": (("--vae",), describe_vae, WAN),
    "text": (("--text",), describe_text, WAN),
}
ALL = {**FLAGS, "dit": (("--dit",), describe_transformer, WAN)}  # and what the networks start from


def flag(part: str) -> str:
    """Return the flag that names a part's weights."""
    return ALL[part][0][0]


def describe(part: str, weights: str):
    """Return the configuration of released weights, in a folder or under a hub id."""
    return ALL[part][1](weights)


def add_part_flags(parser: argparse.ArgumentParser):
    """Add the flags that name released weights."""
    for part, (flags, _, fits) in ALL.items():
        parser.add_argument(
            *flags, dest=part, metavar="PATH_OR_ID", help=f"released weights, such as {fits}"
        )


def parts_from_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return {part: configuration} of the parts whose weights the flags name."""
    named = {part: getattr(args, part) for part in ALL if getattr(args, part) is not None}
    if empty := [flag(part) for part, weights in named.items() if not weights]:
        raise UserError(f"{empty[0]}: the name is empty; a folder of weights or a hub id")
    return {part: describe(part, weights) for part, weights in named.items()}


def networks(config: Config) -> dict[str, WanDiTConfig]:
    """Return those of planner and painter that are on a released transformer, by their fields."""
    both = {"latent": config.latent, "semantic": config.semantic}
    return {name: dit for name, dit in both.items() if isinstance(dit, WanDiTConfig)}


def placed(config: Config, parts: dict[str, object]) -> dict[str, object]:
    """Return parts as fields of a configuration: the networks hold what they start from."""
    if "dit" not in parts:
        return parts
    if not networks(config):
        raise UserError(f"--dit: the networks of preset {config.preset} are others than Wan's")
    parts = dict(parts)
    start = parts.pop("dit")
    return parts | {name: replace(dit, wan=start) for name, dit in networks(config).items()}


def check_weights_named(config: Config, start: bool = False):
    """Raise UserError, naming flags and what fits them, where released weights are not named.

    start: also where the networks are to start from some.
    """
    missing = []
    for part, (flags, _, fits) in FLAGS.items():
        chosen = getattr(config, part)
        if isinstance(chosen, RELEASED) and not chosen.weights:
            missing.append(f"{flags[0]} PATH_OR_ID ({fits})")
    if start and any(x.train != "all" and not x.wan.weights for x in networks(config).values()):
        missing.append(f"--dit PATH_OR_ID ({WAN})")
    if missing:
        names = ", ".join(missing)
        raise UserError(f"preset {config.preset} needs weights: {names}; --tiny needs none")


def load_released(config, device: torch.device) -> nn.Module:
    """Return the part that a configuration describes, frozen; UserError for an unknown encoder."""
    if isinstance(config, WanVAEConfig):
        return WanVAE(config, device)
    if isinstance(config, UMT5Config):
        return UMT5(config, device)
    if config.kind not in ENCODERS:
        raise UserError(f"an encoder {config.kind!r} is not known here")
    return ENCODERS[config.kind](config, device)


def computes(run, part: str):
    """Return the context in which a run's part computes: a released one in its own precision."""
    return computing(run.device, "float32" if run.released(part) else run.config.dtype)
