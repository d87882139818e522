"""Configurations: one frozen dataclass per component, presets, and fields set by name.

Each component's dataclass stands beside the component; here they are put together, checked against
each other, and turned into text and back. No file is touched and no weights are built.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from model import DiT, DiTConfig
from semantic import Compressor, CompressorConfig, TinyEncoder, TinyEncoderConfig
from text import HashTextConfig
from vae import TinyVAE, TinyVAEConfig
from world import DataConfig

DTYPES = ("auto", "float32", "bfloat16")
MAY_BE_ZERO = {  # other numbers must be above zero
    *("latent.context_channels", "latent.context_rate", "semantic.context_channels"),
    *("semantic.context_rate", "vae.kl_weight", "compressor.kl_weight", "compressor.noise"),
    *("latent.time_features", "semantic.time_features"),
}
STAGES = ("vae", "encoder", "latent", "semantic", "base")  # in the order of training


class UserError(ValueError):
    """Something the user can put right, in one line."""


@dataclass(frozen=True)
class StageConfig:
    """How one stage is trained."""

    steps: int
    batch: int
    lr: float = 2e-3  # of AdamW
    optimizer: str = "muon"  # for the matrices inside blocks, AdamW for the rest; or adamw for all
    muon_lr: float = 2e-2
    weight_decay: float = 0.01
    warmup: int = 50  # steps of linear warm-up, then cosine down to final_lr
    final_lr: float = 0.05  # as a share of the peak
    grad_clip: float = 1.0
    ema: float = 0.998
    clips: int = 8192  # kept in memory, encoded once (stages on frozen encoders)
    time: str = "logit_normal"  # distribution of t
    shift: float = 1.0  # of t, in training and in sampling alike
    text_dropout: float = 0.1  # share of samples without text, for guidance
    context_dropout: float = 0.1  # share of samples without a plan; drawn apart from the text's

    def __post_init__(self):
        choices = {"optimizer": ("muon", "adamw"), "time": ("logit_normal", "uniform")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)}: choose {' or '.join(known)}")
        for name in ("steps", "batch", "clips", "shift"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class StageConfigs:
    vae: StageConfig
    encoder: StageConfig
    latent: StageConfig
    semantic: StageConfig
    base: StageConfig


@dataclass(frozen=True)
class SampleConfig:
    """Defaults of sampling. Guidance 1 = conditional only, 0 = unconditional only."""

    steps: int = 20  # Euler steps of each stage
    guidance: float = 2.0  # text, stage 1
    latent_guidance: float = 2.0  # text, stage 2
    context_guidance: float = 2.0  # plan, stage 2
    base_guidance: float = 2.0  # text, base


@dataclass(frozen=True)
class Config:
    """One dataclass per component, and how each stage is trained."""

    preset: str
    data: DataConfig
    vae: TinyVAEConfig
    text: HashTextConfig
    encoder: TinyEncoderConfig
    compressor: CompressorConfig
    latent: DiTConfig  # stage 2, the painter; without its context also the base
    semantic: DiTConfig  # stage 1, the planner
    stages: StageConfigs
    sample: SampleConfig
    dtype: str = "auto"  # of the matrix products in training; auto = the faster one, measured

    def __post_init__(self):
        check_fit(self)


def check_fit(config: Config):
    """Raise UserError where the components' sizes do not fit each other."""
    for name, value in flat_fields(config).items():
        least = 0 if name in MAY_BE_ZERO else 1e-12
        number = isinstance(value, int | float) and name.split(".")[0] not in ("stages", "sample")
        if number and name != "compressor.log_variance" and not least <= value < 1e9:
            raise UserError(f"{name}={value}: must be above 0")
    data, latent, semantic = config.data, config.latent, config.semantic
    expected = {
        "latent.channels": (latent.channels, config.vae.channels),
        "latent.rate": (latent.rate, data.fps / config.vae.time_patch),
        "latent.context_channels": (latent.context_channels, config.compressor.channels),
        "latent.context_rate": (latent.context_rate, data.semantic_fps / 2),
        "latent.text_dim": (latent.text_dim, config.text.dim),
        "semantic.channels": (semantic.channels, config.compressor.channels),
        "semantic.rate": (semantic.rate, data.semantic_fps / 2),
        "semantic.text_dim": (semantic.text_dim, config.text.dim),
        "semantic.context_channels": (semantic.context_channels, 0),
        "encoder.rate": (config.encoder.rate, data.semantic_fps / 2),
    }
    for name, (value, fits) in expected.items():
        if value != fits:
            raise UserError(f"{name} is {value}, but the other parts need {fits}")
    if config.dtype not in DTYPES:
        raise UserError(f"dtype={config.dtype}: choose {', '.join(DTYPES)}")
    try:
        with torch.device("meta"):  # sizes only: nothing is computed
            vae, encoder = TinyVAE(config.vae), TinyEncoder(config.encoder)
            Compressor(config.encoder.dim, config.compressor)
            latents = vae.grid(data.frames, data.height, data.width)
            plan = encoder.grid(data.semantic_frames, data.semantic_height, data.semantic_width)
            for dit, grid in ((latent, latents), (semantic, plan)):
                context = torch.empty(1, dit.context_channels, *plan)
                DiT(dit)(
                    torch.empty(1, dit.channels, *grid),
                    torch.empty(1),
                    torch.empty(1, 1, dit.text_dim),
                    context if dit.context_channels else None,
                )
    except (ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise UserError(f"sizes do not fit: {str(error).splitlines()[0]}") from None


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
            vae=StageConfig(steps=500, batch=16, ema=0.99),
            encoder=StageConfig(steps=1600, batch=64),
            latent=StageConfig(steps=1800, batch=32),
            semantic=StageConfig(steps=1200, batch=64),
            base=StageConfig(steps=5000, batch=32),
        ),
        sample=SampleConfig(),
    )


def small() -> Config:
    """The same world at 64 x 64 pixels and four seconds, for one GPU."""
    config = tiny()
    data = replace(
        config.data, frames=48, fps=12.0, height=64, width=64, semantic_height=64, semantic_width=64
    )
    rate = data.fps / config.vae.time_patch
    wide = dict(width=384, depth=8, heads=6, space_cycles=4.0)
    return replace(
        config,
        preset="small",
        data=data,
        vae=replace(config.vae, width=192),
        encoder=replace(config.encoder, dim=256, blocks=6),
        latent=replace(config.latent, rate=rate, **wide),
        semantic=replace(config.semantic, **wide),
        stages=StageConfigs(
            vae=StageConfig(steps=4000, batch=32, lr=1e-3),
            encoder=StageConfig(steps=6000, batch=128, lr=1e-3),
            latent=StageConfig(steps=20000, batch=64, lr=1e-3, clips=32768, ema=0.9995),
            semantic=StageConfig(steps=10000, batch=128, lr=1e-3, clips=32768, ema=0.9995),
            base=StageConfig(steps=30000, batch=64, lr=1e-3, clips=32768, ema=0.9995),
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny, "small": small}


# --- configurations as text ---------------------------------------------------------------------


def flat_fields(config, prefix: str = "") -> dict[str, object]:
    """Return {"latent.width": 128, ...} for every leaf of nested dataclasses."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            fields |= flat_fields(value, f"{prefix}{field.name}.")
        else:
            fields[prefix + field.name] = value
    return fields


def parse_value(text: str, kind: type, name: str):
    """Read a field's value by its declared type; UserError if the text does not fit."""
    optional = isinstance(kind, types.UnionType)
    if optional and text.lower() == "none":
        return None
    if optional:
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text}: expected {kind.__name__}") from None


def build(kind: type, values: dict, prefix: str = ""):
    """Build a dataclass from flat fields; every field must be there, and none besides."""
    arguments = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            arguments[name] = build(hint, values, f"{prefix}{name}.")
        else:
            arguments[name] = values[prefix + name]
    return kind(**arguments)


def field_types(kind: type, prefix: str = "") -> dict[str, type]:
    """Return the declared type of every flat field."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = dataclasses.is_dataclass(hint)
        found |= field_types(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return found


def override(config: Config, settings: list[str]) -> Config:
    """Apply ["latent.width=192", ...]; an unknown field is a UserError that names the near ones.

    A field's last part alone will do where only one component has it.
    """
    values, hints = flat_fields(config), field_types(Config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected field=value")
        matches = [f for f in values if f == name or f.endswith("." + name)]
        if len(matches) != 1:
            near = matches or difflib.get_close_matches(name, values, 4, 0.4)
            near = near or [f for f in values if name.split(".")[-1] in f][:4]
            problem = "could be any of" if matches else "no such field; near ones:"
            raise UserError(f"--set {name}: {problem} {', '.join(near) or 'none'}")
        values[matches[0]] = parse_value(text, hints[matches[0]], matches[0])
    try:
        return build(Config, values)
    except ValueError as error:
        raise UserError(str(error)) from None
