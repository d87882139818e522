"""What the paper claims, and what would show it in miniature: the experiments of experiments.py.

An experiment has arms (a run that is trained and scored, once for each seed) and claims, each with
a rule that is stated here, before anything is run:

    "tau 0 | oracle - tau 0 | text > 5"    # ARM | WAY | SCORE: "text" and "exact" if not said

It is about the difference of scores, in points (`conclusions.py::RULE` says how it is judged). What
a reader would ask besides is judged likewise and decides nothing (`asks`).

A score is a percentage of prompts, or a mean over their objects (toy/scores.py). A way of making
videos (`experiments.py::way_of`) starts from text, or from a plan that the planner did not make.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from settings import Config
from toy.encoder import LatentEncoderConfig

PLAN = "text"  # the way text -> plan -> video
ORACLE = "oracle"  # from the z_sem of the real clip, with its text
ALONE = "oracle, no text"  # from that z_sem alone
COPIED = ("vae", ALONE, "shuffled, no text")  # the last one: what is alike by chance
GUIDED = ("base", "base, guidance 3")
ABLE = 80.0  # percent, of what an experiment measures, that the whole method has to get right
STEPS = {  # all step budgets, as shares of the preset's steps; 0: a single step
    "full": {},
    "half": {"latent": 0.5, "semantic": 0.5},
    "quarter": {"latent": 0.25, "semantic": 0.25},
    "untrained": {"encoder": 0.0},
}


@dataclass(frozen=True)
class Arm:
    """One run of each seed, and how it makes the videos that are scored."""

    name: str
    settings: tuple[str, ...] = ()  # fields of the preset, by name
    steps: str = "full"  # a key of STEPS
    ways: tuple[str, ...] = (PLAN,)
    parts: Callable[[Config], dict] | None = None  # other components of the preset
    compute: float | None = None  # of the base: its FLOPs, in those of the whole recipe
    line: str = ""  # which curve of score against compute it is a point of


@dataclass(frozen=True)
class Experiment:
    """What the paper says, what is run, and what is concluded by which rules."""

    name: str
    paper: str
    arms: tuple[Arm, ...]
    claims: dict[str, str]  # what is claimed -> its rule
    asks: dict[str, str] = field(default_factory=dict)
    able: str = ""  # the side of a rule that has to reach ABLE, or nothing is concluded
    preset: str = "tiny"
    seeds: int = 2  # with fewer nothing is decided
    shows: tuple[str, ...] = ("exact", "number", "colour", "shape", "motion")


# --- other components ---------------------------------------------------------------------------


def latents_as_plan(config: Config) -> dict:
    """Return the parts with which plans are made of VAE latents, as many tokens as before."""
    vae, data = config.vae, config.data
    frames = round(2 * data.fps / data.semantic_fps)
    patch = data.height // config.plan_grid()[1]
    folded = frames // vae.time_patch * (patch // vae.space_patch) ** 2  # latents of a feature
    whole = {"semantic_fps": data.fps, "semantic_height": data.height, "semantic_width": data.width}
    encoder = LatentEncoderConfig(vae.channels * folded, frames, patch)
    return {"data": replace(data, **whole), "encoder": encoder}


def channels(config: Config, count: int | None, kind: str = "mlp") -> dict:
    """Return the compressor of so many channels; None: as many as the features have."""
    count = count or config.encoder.dim
    return {"compressor": replace(config.compressor, kind=kind, channels=count)}


def shifted(config: Config, count: int | None, kind: str = "mlp") -> dict:
    """Return the same, with the planner's time shifted by RAE's rule: by the root of the dimension.

    That of the paper's plans would give 32, 5.6 and 2.0 at 2048, 64 and 8 channels. Here it is
    relative to the preset's channels, for which the preset's schedule was chosen.
    """
    parts = channels(config, count, kind)
    more = parts["compressor"].channels / config.compressor.channels
    semantic = replace(config.stages.semantic, shift=config.stages.semantic.shift * more**0.5)
    return parts | {"stages": replace(config.stages, semantic=semantic)}


# --- the experiments ----------------------------------------------------------------------------

PLANS = Experiment(
    "plan",
    "The plan guides the painter (Fig. 3, 4).",
    able="full",
    arms=(
        Arm(
            "full",
            ways=(
                *("real", "vae", PLAN, ORACLE, "shuffled", "zeroed", "dropped"),
                *(ALONE, "shuffled, no text", "zeroed, no text"),
            ),
        ),
    ),
    claims={
        "with text, a clip's own plan beats another's": "full | oracle - full | shuffled > 0",
        "with text, a generated plan beats a dropped one": "full | text - full | dropped > 0",
        "without text, a clip's own plan beats another's": (
            "full | oracle, no text - full | shuffled, no text > 0"
        ),
    },
    asks={
        "generated plans are as good as real ones": "full | text - full | oracle > -5",
        **{
            f"the plan tells the {score} as well alone as with the text": (
                f"full | oracle, no text | {score} - full | oracle | {score} > -5"
            )
            for score in ("motion", "shape")
        },
    },
)

DEEPER = "base x 1, 4 blocks"  # at equal compute
BASE = Experiment(
    "base",
    "On a par with the base model at equal training (Table 1).",
    able="full",
    arms=(
        Arm("full", line="plan"),
        Arm("half", steps="half", line="plan"),
        *(Arm(f"base x {x:g}", ways=GUIDED, compute=x, line="base") for x in (1.0, 0.5, 2.0)),
        Arm(DEEPER, ("latent.depth=4",), ways=GUIDED, compute=1.0, line="base, 4 blocks"),
    ),
    claims={
        "on a par at equal compute": "full - base x 1 | base > -5",
        "on a par with the base at guidance 3": "full - base x 1 | base, guidance 3 > -5",
        "on a par with a base of twice the blocks, half the steps": f"full - {DEEPER} | base > -5",
    },
    asks={
        "better at equal compute": "full - base x 1 | base > 0",
        "better than a base of twice the blocks, half the steps": f"full - {DEEPER} | base > 0",
        "better than a base of twice the compute": "full - base x 2 | base > 0",
    },
)

START = Experiment(
    "start",
    "Both stages are fine-tuned from a pre-trained model (Sec. 3.2, 3.3).",
    able="scratch, full",
    arms=(
        *(
            Arm(f"{start}, {steps}", (f"start={start}",), steps, compute=1.0, line=start)
            for steps in ("quarter", "half")
            for start in ("base", "scratch")
        ),
        Arm("scratch, full", ("start=scratch",), compute=1.0, line="scratch"),
        Arm("the base", ways=("base",), compute=1.0, line="the base"),
    ),
    claims={"better from the base, quarter of the steps": "base, quarter - scratch, quarter > 0"},
    asks={
        "better from the base, half of the steps": "base, half - scratch, half > 0",
        "the start gains more, at half of the steps, than the plan gains over the base": (
            "base, half - scratch, half - scratch, full + the base | base > 0"
        ),
    },
)

SPACE = Experiment(
    "space",
    "A semantic space converges faster than a compressed VAE space (Fig. 9).",
    able="semantic, full",
    arms=tuple(
        Arm(f"{space}, {steps}", (), steps, (PLAN, ORACLE), parts, line=space)
        for steps in ("half", "quarter", "full")
        for space, parts in (("semantic", None), ("VAE", latents_as_plan))
    ),
    claims={
        f"semantic is better, {steps} of the steps": f"semantic, {steps} - VAE, {steps} > 0"
        for steps in ("half", "quarter")
    },
    asks={
        "semantic is better, all steps": "semantic, full - VAE, full > 0",
        "real clips' plans are painted better, half of the steps": (
            "semantic, half | oracle - VAE, half | oracle > 0"
        ),
    },
)

DIMS = Experiment(
    "dims",
    "8 channels are no worse than 64, and both are better than 2048 (Table 3, Fig. 8).",
    able="8",
    arms=(
        *(
            Arm(name, (), "full", (PLAN, ORACLE), partial(channels, count=count, kind=kind))
            for name, count, kind in (
                *(("8", 8, "mlp"), ("64", 64, "mlp"), ("none", None, "none")),
                *(("8 by PCA", 8, "pca"), ("2", 2, "mlp"), ("16", 16, "mlp"), ("4", 4, "mlp")),
            )
        ),
        *(  # at 8 nothing is shifted; the painters are those of above
            Arm(f"{name}, shifted", (), "full", (PLAN,), partial(shifted, count=count, kind=kind))
            for name, count, kind in (("64", 64, "mlp"), ("none", None, "none"), ("2", 2, "mlp"))
        ),
    ),
    claims={
        "8 no worse than 64": "8 - 64 > -5",
        "8 better than no compression": "8 - none > 0",
        "64 better than no compression": "64 - none > 0",
    },
    asks={
        "a shift helps without compression": "none, shifted - none > 0",
        "a shift helps at 64": "64, shifted - 64 > 0",
        "8 better than no compression with a shift": "8 - none, shifted > 0",
        "PCA to 8 as good as the MLP": "8 by PCA - 8 > -5",
        "8 better than 2": "8 - 2 > 0",
    },
)

NOISE = Experiment(
    "noise",
    "Noise on z_sem closes the gap between training and inference (Sec. 3.2).",
    able="tau 0.2",
    arms=tuple(
        Arm(f"tau {tau:g}", (f"compressor.noise={tau}",), "full", (PLAN, ORACLE))
        for tau in (0.2, 0.0, 1.0, 0.5)
    ),
    claims={
        "with noise, generated plans lose less against real ones": (
            "tau 0 | oracle - tau 0 | text - tau 0.2 | oracle + tau 0.2 | text > 0"
        ),
    },
    asks={f"tau {tau} better than none": f"tau {tau} - tau 0 > 0" for tau in ("0.2", "0.5", "1")},
)

KL = Experiment(
    "kl",
    "A Gaussian-like space is easier to sample (Sec. 3.2).",
    able="KL 3e-05",
    arms=tuple(
        Arm(f"KL {weight:g}", (f"compressor.kl_weight={weight}",), "full", (PLAN, ORACLE))
        for weight in (3e-5, 0.0, 1e-3, 3e-4)
    ),
    claims={
        "with a KL, generated plans lose less against real ones": (
            "KL 0 | oracle - KL 0 | text - KL 3e-05 | oracle + KL 3e-05 | text > 0"
        ),
    },
    asks={
        "videos from text are better with a KL": "KL 3e-05 - KL 0 > 0",
        "a KL 33 times as strong kills the plan": "KL 3e-05 | oracle - KL 0.001 | oracle > 50",
    },
)

ENCODERS = Experiment(
    "encoders",
    "Left as future work (App. C): which training of the semantic encoder matters.",
    able="captions",
    arms=tuple(
        Arm(name, settings, steps, (PLAN, ORACLE, ALONE), parts)
        for name, settings, steps, parts in (
            ("captions", (), "full", None),
            ("hidden pixels", ("encoder.learns=hidden",), "full", None),
            ("random", ("stages.encoder.lr=0", "stages.encoder.muon_lr=0"), "untrained", None),
            ("VAE", (), "full", latents_as_plan),
        )
    ),
    claims={"captions better than random": "captions - random > 0"},
    asks={
        "hidden pixels as good as captions": "hidden pixels - captions > -5",
        "VAE features as good as captions": "VAE - captions > -5",
        "random as good as captions": "random - captions > -5",
        "plans of hidden pixels tell shapes better, without text": (
            "hidden pixels | oracle, no text | shape - captions | oracle, no text | shape > 0"
        ),
    },
)

REFERENCE = Experiment(
    "reference",
    "A reference's layout and motion are kept, texture and colour are free; fewer dimensions keep "
    "less (Fig. 4).",
    able="8 | oracle, no text | layout",
    arms=tuple(
        Arm(str(count), (), "full", COPIED, partial(channels, count=count)) for count in (8, 64, 2)
    ),
    claims={
        "of what the VAE keeps, layout is kept better than texture": (
            "8 | oracle, no text | layout - 8 | vae | layout"
            " - 8 | oracle, no text | texture + 8 | vae | texture > 0"
        ),
        "motion is kept better than colour": (
            "8 | oracle, no text | motion - 8 | oracle, no text | colour > 0"
        ),
        "8 keep less than 64": "64 | oracle, no text - 8 | oracle, no text > 0",
        "2 keep less than 8": "8 | oracle, no text - 2 | oracle, no text > 0",
    },
    shows=("exact", "number", "layout", "motion", "shape", "colour", "texture"),
)

COST = Experiment(
    "cost",
    "Windows keep the cost linear, and plan tokens are few, about one for 16 (Sec. 3.4).",
    arms=(Arm("painter", ways=("full", "windows", "tokens")),),
    claims={
        "windows grow less per doubling than full attention": (
            "painter | full | growth - painter | windows | growth > 0"
        ),
        "windows grow at most 2.2 times per doubling": "painter | windows | growth < 2.2",
        "at least 15 latent tokens per plan token at the paper's sizes": (
            "painter | tokens | per plan token > 15"
        ),
    },
    seeds=1,  # it times one machine
    shows=("growth", "per plan token"),
)

LIGHTNING = Experiment(
    "lightning",
    "A low semantic rate loses fast events (Fig. 14, App. B.3).",
    able="8 fps | oracle, no text | flash",
    arms=tuple(
        Arm(f"{rate:g} fps", ("data.flashes=true", f"data.semantic_fps={rate}"), "full", COPIED)
        for rate in (2.0, 8.0, 4.0)
    ),
    claims={
        "a flash survives more often at 8 fps than at 2": (
            "8 fps | oracle, no text | flash - 2 fps | oracle, no text | flash > 0"
        ),
    },
    asks={
        "at 8 fps four of five survive": "8 fps | oracle, no text | flash > 80",
        "at 4 fps more than at 2": (
            "4 fps | oracle, no text | flash - 2 fps | oracle, no text | flash > 0"
        ),
    },
    shows=("flash", "calm", "number", "motion"),
)

SWIN, FULL = "Base-CT-Swin", "base, full attention"
DEEP, LONGER = f"{SWIN}, 4 blocks", f"{SWIN}, 4 times as long"
LONG = Experiment(
    "long",
    "Long videos of SemanticGen drift less than those of Base-CT-Swin (Table 2).",
    able="plan | text | event",
    arms=(
        Arm("plan"),
        Arm(SWIN, ways=("base",), compute=1.0),
        Arm(FULL, ("latent.window=none", "stages.base.pieces=1"), ways=("base",), compute=1.0),
        Arm(DEEP, ("latent.depth=4",), ways=("base",), compute=1.0),
        Arm(LONGER, ways=("base",), compute=4.0),
    ),
    claims={
        "colours and shapes drift less": f"{SWIN} | base | drift - plan | text | drift > 0",
        "shapes are right throughout more often": (
            f"plan | text | shape - {SWIN} | base | shape > 0"
        ),
        "more events happen as told": f"plan | text | event - {SWIN} | base | event > 0",
    },
    asks={
        f"more events happen as told than by the {arm}": (
            f"plan | text | event - {arm} | base | event > 0"
        )
        for arm in (FULL, DEEP, LONGER)
    },
    preset="tiny_long",
    shows=("exact", "number", "colour", "shape", "story", "event", "drift"),
)

EXPERIMENTS = (  # in the order of `all`
    *(PLANS, BASE, DIMS, NOISE, KL, SPACE, ENCODERS, REFERENCE, COST, LIGHTNING, LONG, START),
)
