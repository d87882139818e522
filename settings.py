"""One run's settings: a frozen dataclass per component, put together; fields set by name.

Each component's dataclass stands beside the component; here they are checked against each other
and turned into text and back. No file is touched and no weights are built.

A new field is a line in its component's dataclass, with a default, which older runs then have. A
preset that differs sets it in config.py. `LIMITS` has its range, unless the usual one of
`check_number` will do; `run.py::FREE` names it if it may change while a run is trained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from data import DataConfig
from model import DiTConfig
from plumbing.fields import build, check_types, field_types, find_field, flat_fields, parse_value
from plumbing.files import UserError
from semantic import CompressorConfig, PretrainedEncoderConfig
from swin import windows
from text import UMT5Config
from toy.encoder import LatentEncoderConfig, TinyEncoderConfig
from toy.text import HashTextConfig
from toy.vae import TinyVAE, TinyVAEConfig
from vae import WanVAEConfig
from wan import WanDiTConfig

DTYPES = ("auto", "float32", "bfloat16")
COMPRESSORS = ("mlp", "pca", "none")
STARTS = ("scratch", "base")
Network = DiTConfig | WanDiTConfig  # of planner, painter and base
LIMITS = {  # least and greatest value of a field, by its last name or its whole one
    **dict.fromkeys(("context_channels", "context_rate", "kl_weight", "noise"), (0, 1e6)),
    **dict.fromkeys(("blocks", "caption_blocks", "depth"), (1, 1000)),
    **dict.fromkeys(("fps", "semantic_fps"), (0.01, 1000)),
    "objects": (1, 2),
    "before": (0, 16),
    "log_variance": (-20, 10),
    **dict.fromkeys(("steps", "clips", "preview_every"), (1, 1e9)),
    **dict.fromkeys(("lr", "muon_lr"), (0, 10)),
    **dict.fromkeys(("weight_decay", "warmup"), (0, 1e9)),
    **dict.fromkeys(("final_lr", "ema", "text_dropout", "context_dropout"), (0, 1)),
    **{"text_dropout_start": (0, 1), "latent_zero": (-1, 1)},
    "grad_clip": (1e-9, 1e9),
    "shift": (1e-3, 1e3),
    "sample.steps": (1, 10_000),
    **dict.fromkeys(("guidance", "latent_guidance", "context_guidance"), (-100, 100)),
    "base_guidance": (-100, 100),
}


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
    clips: int = 8192  # of the synthetic world, encoded once and kept in memory (the DiTs' stages)
    time: str = "logit_normal"  # distribution of t; or uniform
    shift: float = 1.0  # of t, in training and in sampling alike
    posterior: bool = False  # latents drawn from the VAE's posterior at each step, else its mean
    text_dropout: float = 0.1  # share of samples without text, for guidance
    context_dropout: float = 0.1  # share of samples without a plan; drawn apart from the text's
    # At first more samples are without text, fewer with each step, so that the plan is listened to.
    text_dropout_start: float | None = None  # at the first step; None = text_dropout
    text_dropout_steps: int = 1000  # until it is text_dropout
    accumulate: int = 1  # micro-batches of a process's share of a batch, to save memory
    compile: bool = False  # torch.compile: pays for long stages; rounds a little differently
    checkpoint: bool = False  # recompute blocks in the backward pass, to save memory
    preview_every: int | None = None  # steps between previews; None = at the end alone
    pieces: int = 1  # a step learns from a stretch of each clip, 1 / pieces of its length

    def __post_init__(self):
        choices = {"optimizer": ("muon", "adamw"), "time": ("logit_normal", "uniform")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)}: choose {' or '.join(known)}")


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
    context_guidance: float | None = 2.0  # plan, stage 2; None = the plan is dropped
    base_guidance: float = 2.0  # text, base


@dataclass(frozen=True)
class Config:
    """One dataclass per component, and how each stage is trained."""

    preset: str
    data: DataConfig
    vae: TinyVAEConfig | WanVAEConfig
    text: HashTextConfig | UMT5Config
    encoder: TinyEncoderConfig | PretrainedEncoderConfig | LatentEncoderConfig
    compressor: CompressorConfig
    latent: Network  # stage 2, the painter; without its context also the base
    semantic: Network  # stage 1, the planner
    stages: StageConfigs
    sample: SampleConfig
    start: str = "scratch"  # what painter and planner start from; or base: the run's trained one
    dtype: str = "auto"  # of matrix products and of what flows between them; auto: the faster

    def __post_init__(self):
        check_fit(self)

    @property
    def base(self) -> Network:
        """The control's network: the painter's without a plan."""
        return self.latent.without_plan

    @property
    def feature_frames(self) -> int:
        """Frames at the low rate for one feature: a pair, unless the encoder says otherwise."""
        return round(self.data.semantic_fps / self.latent.context_rate)

    def latent_grid(self, frames: int | None = None) -> tuple[int, int, int]:
        """Return (T, h, w) of the VAE latents of a video of `frames`, or of the trained length."""
        return self.vae.grid(*self.data.of_length(frames or self.data.frames).size)

    def plan_grid(self, frames: int | None = None) -> tuple[int, int, int]:
        """Return (S, hs, ws) of z_sem, likewise."""
        return self.encoder.grid(*self.data.of_length(frames or self.data.frames).semantic_size)

    def stretches(self) -> int:
        """Return into how many equal stretches plan and latents can be cut together.

        Where the two are not equally long (a VAE whose first frame is alone) there is but one.
        """
        plan, latents = self.plan_grid()[0], self.latent_grid()[0]
        alike = math.isclose(plan * self.latent.rate, latents * self.latent.context_rate)
        return math.gcd(plan, latents) if alike else 1

    def latent_tokens(self, frames: int | None = None) -> int:
        """Return how many tokens a video's latents are."""
        return math.prod(self.latent_grid(frames)) // self.latent.patch**2

    def plan_tokens(self, frames: int | None = None) -> int:
        """Return how many tokens its plan is."""
        return math.prod(self.plan_grid(frames))

    @property
    def encoded(self) -> dict[str, tuple[int, ...]]:
        """The shapes of an encoded clip; of its latents there are mean and log-variance."""
        return {
            "latents": (2, self.vae.channels, *self.latent_grid()),
            "features": (self.encoder.dim, *self.plan_grid()),
            "text": (self.text.words, self.text.dim),
        }


def check_number(name: str, value: float, shown: str | None = None):
    """Raise UserError if a field's number is out of its range; shown: as the user wrote it."""
    usual = (1 if isinstance(value, int) else 1e-6, 1e6)
    least, greatest = LIMITS.get(name) or LIMITS.get(name.split(".")[-1]) or usual
    if not least <= value <= greatest:  # nor is NaN
        shown = shown or f"{name}={value}"
        raise UserError(f"{shown}: at least {least:g}, at most {greatest:g}")


def joints(values: dict[str, object]) -> dict[str, object]:
    """Return the fields that follow from those of other parts: channels, rates, text's width."""
    # Per second: features, which are of pairs of frames unless the encoder says otherwise.
    pairs = values["data.semantic_fps"] / values.get("encoder.frames", 2)
    fields = {
        "latent.channels": values["vae.channels"],
        "latent.rate": values["data.fps"] / values["vae.time_patch"],
        "latent.context_channels": values["compressor.channels"],
        "latent.context_rate": pairs,
        "latent.text_dim": values["text.dim"],
        "semantic.channels": values["compressor.channels"],
        "semantic.rate": pairs,
        "semantic.text_dim": values["text.dim"],
        "semantic.context_channels": 0,
    }
    if "encoder.rate" in values:
        fields["encoder.rate"] = pairs
    first = values["vae.class"] == WanVAEConfig.__name__  # is a latent frame by itself
    centre = (values["vae.time_patch"] - 1) / 2  # of a latent frame, in frames
    for dit in ("latent", "semantic"):
        if values[f"{dit}.class"] == WanDiTConfig.__name__:
            patch = 2 * values["vae.space_patch"]  # pixels of a token
            fields |= {
                f"{dit}.of_plans": dit == "semantic",
                f"{dit}.patch": 1 if dit == "semantic" else 2,
                f"{dit}.latent_rate": fields["latent.rate"],
                f"{dit}.latent_zero": (centre if first else -centre) / values["vae.time_patch"],
                f"{dit}.rows": values["data.height"] // patch,
                f"{dit}.columns": values["data.width"] // patch,
            }
    return fields


def check_fit(config: Config):
    """Raise UserError where the components' sizes do not fit each other."""
    values = flat_fields(config)
    for name, fits in joints(values).items():
        if values[name] != fits:
            raise UserError(f"{name} is {values[name]}, but the other parts need {fits}")
    kind, channels, dim = config.compressor.kind, config.compressor.channels, config.encoder.dim
    if kind not in COMPRESSORS:
        raise UserError(f"compressor.kind={kind}: choose {', '.join(COMPRESSORS)}")
    if (kind == "none" and channels != dim) or (kind == "pca" and channels > dim):
        raise UserError(f"compressor.kind={kind}: of {dim} features it cannot make {channels}")
    precisions = dict.fromkeys((x for x in values if x.endswith(".dtype")), DTYPES[1:])
    for name, known in {"dtype": DTYPES, "start": STARTS, **precisions}.items():
        if values[name] not in known:
            raise UserError(f"{name}={values[name]}: choose {', '.join(known)}")
    check_sizes(config.data, config.vae, config.encoder, config.latent, config.semantic)
    places = config.stretches()
    for stage in ("latent", "semantic", "base"):
        if places % (pieces := values[f"stages.{stage}.pieces"]):
            raise UserError(
                f"stages.{stage}.pieces={pieces}: plan and latents can be cut together into "
                f"{places} equal stretches, which do not divide by it"
            )
    vae, encoder = (config.data.shorter(values[f"stages.{x}.pieces"]) for x in ("vae", "encoder"))
    try:
        config.vae.grid(*vae.size), config.encoder.grid(*encoder.semantic_size)
    except ValueError as error:
        raise UserError(f"pieces of stages vae and encoder: {error}") from None


@lru_cache(maxsize=64)  # a configuration is built several times on the way to a run
def check_sizes(data, vae, encoder, latent: Network, semantic: Network):
    """Raise UserError where the parts cannot be built, or do not take each other's shapes."""
    try:
        if math.prod(data.size) > 2**40:
            raise ValueError(f"a clip of {' x '.join(map(str, data.size))} values fills any memory")
        latents = vae.grid(data.frames, data.height, data.width)
        plan = encoder.grid(data.semantic_frames, data.semantic_height, data.semantic_width)
        if isinstance(vae, TinyVAEConfig):
            with torch.device("meta"):  # sizes only: nothing is computed
                TinyVAE(replace(vae, blocks=1))  # all blocks are of one size
        for dit, grid in ((latent, latents), (semantic, plan)):
            grids = dit.layout(grid, plan if dit.context_channels else None)
            # As long as takes more than one window: a longer video may be asked for.
            times = 1 + math.ceil((dit.window or 0) / data.seconds)
            streams = [  # of one token a frame: only time matters
                each.stream._replace(frames=times * each.frames, tokens=1) for each in grids
            ]
            windows(streams, dit.window, shifted=False)
    except (ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise UserError(f"sizes do not fit: {str(error).splitlines()[0]}") from None


def check_values(values: Mapping[str, object]):
    """Raise UserError if a flat field has another type than it declares, or is out of its range."""
    check_types(Config, values)
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(name, value)


def from_fields(values: Mapping[str, object]) -> Config:
    """Return the configuration that flat fields stand for; UserError if they stand for none."""
    try:
        return build(Config, values)
    except KeyError as error:
        raise UserError(f"the field {error} is missing") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def override(config: Config, settings: Sequence[str] = (), **parts) -> Config:
    """Return a configuration with other parts (data=..., vae=..., ...) and fields set by name.

    settings: ["latent.width=192", ...]; a field's last part alone will do where only one component
    has it, and an unknown one is a UserError that names the near ones. What joins the parts
    (channels, rates, width of the text) follows them.
    """
    values = flat_fields(config, **parts)
    kinds, chosen = field_types(Config, values), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected field=value")
        name = find_field(name, values)
        chosen[name] = parse_value(text, kinds[name], name)
    values |= chosen
    check_values(values)
    return from_fields({**values, **joints(values), **chosen})
