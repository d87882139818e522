"""What the paper claims, and what would show it in miniature: the experiments of experiments.py.

An experiment has arms (a run that is trained and scored, once for each seed) and claims. A claim is
about a difference between scores of arms; its rule is stated here, before anything is run. What the
paper does not say but a reader would ask is measured beside it (`asks`) and decides nothing.

A score is a percentage of prompts, or a mean over their objects (toy/scores.py). A way of making
videos (`experiments.py::WAYS`) is from text, by the base, or from a plan that the planner did not
make.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from settings import Config
from toy.encoder import LatentEncoderConfig

PLAN = "text"  # the way text -> plan -> video
ORACLE = "oracle"  # from the z_sem of the real clip, with its text
ALONE = "oracle, no text"  # from that z_sem alone
SHORT = (
    0.5  # of the preset's steps of painter and planner, where full ones leave nothing to improve
)
STEPS = {  # all step budgets, as shares of the preset's steps
    "full": {},
    "half": {"latent": SHORT, "semantic": SHORT},
    "quarter": {"latent": SHORT / 2, "semantic": SHORT / 2},
    "painter": {"encoder": 0.5, "latent": SHORT},
    "untrained": {"encoder": 0.0, "latent": SHORT, "semantic": SHORT},  # 0: a single step
    "long": {"latent": 0.5, "semantic": 0.5, "base": 0.5},
    "longer": {"base": 2.0},  # four times what "long" gives the base
}


@dataclass(frozen=True)
class Arm:
    """One run of each seed, and how it makes the videos that are scored."""

    name: str
    settings: tuple[str, ...] = ()  # fields of the preset, by name
    steps: str = "full"  # a key of STEPS
    ways: tuple[str, ...] = (PLAN,)
    parts: Callable[[Config], dict] | None = None  # other components, and what they need
    compute: float | None = None  # of the base: its FLOPs, in those of the full recipe
    line: str = ""  # which curve of accuracy against compute it is a point of


@dataclass(frozen=True)
class Claim:
    """The sum of some scores less the sum of others is above `least`, in points.

    A side of it is (arm, way), or (arm, way, score) where the score is another.
    """

    says: str
    more: tuple[tuple[str, ...], ...]
    less: tuple[tuple[str, ...], ...]
    score: str = "exact"
    least: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """What the paper says, the arms that are run, and what is concluded from which differences."""

    name: str
    paper: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    asks: tuple[Claim, ...] = ()
    preset: str = "tiny"
    shows: tuple[str, ...] = ("exact", "number", "colour", "shape", "motion")


def latents_as_plan(config: Config) -> dict:
    """Return the parts with which plans are made of VAE latents, as many tokens as before."""
    vae, data = config.vae, config.data
    frames = round(2 * data.fps / data.semantic_fps)
    patch = data.height // config.plan_grid()[1]
    folded = frames // vae.time_patch * (patch // vae.space_patch) ** 2  # latents of a feature
    whole = {"semantic_fps": data.fps, "semantic_height": data.height, "semantic_width": data.width}
    encoder = LatentEncoderConfig(vae.channels * folded, frames, patch)
    return {"data": replace(data, **whole), "encoder": encoder}


def channels(config: Config, count: int | None = None, kind: str = "mlp") -> dict:
    """Return the compressor of so many channels; None: as many as the features have."""
    count = count or config.encoder.dim
    return {"compressor": replace(config.compressor, kind=kind, channels=count)}


def scaled_shift(config: Config, count: int | None = None, kind: str = "mlp") -> dict:
    """Return the same, with the planner's time shifted by RAE's rule: sqrt(dimension).

    Relative to the preset's channels, for which its schedule was chosen.
    """
    parts = channels(config, count, kind)
    more = parts["compressor"].channels / config.compressor.channels
    semantic = replace(config.stages.semantic, shift=config.stages.semantic.shift * more**0.5)
    return parts | {"stages": replace(config.stages, semantic=semantic)}


def both_shifts(name: str, count: int | None = None, kind: str = "mlp") -> tuple[Arm, Arm]:
    """Return two arms of so many channels: the planner's time as it is, and shifted."""
    fixed = partial(channels, count=count, kind=kind)
    shifted = partial(scaled_shift, count=count, kind=kind)
    return (
        Arm(name, steps="half", parts=fixed, ways=(PLAN, ORACLE, ALONE)),
        Arm(f"{name}, shifted", steps="half", parts=shifted),
    )


EXPERIMENTS = (
    Experiment(
        "plan",
        "The plan guides the painter (Fig. 3, 4).",
        arms=(
            Arm(
                "full",
                ways=(
                    *("real", "vae", PLAN, ORACLE, "shuffled", "zeroed", "dropped"),
                    *(ALONE, "shuffled, no text", "zeroed, no text"),
                ),
            ),
        ),
        claims=(
            Claim(
                "a clip's own plan helps more than another's, with text",
                more=(("full", ORACLE),),
                less=(("full", "shuffled"),),
            ),
            Claim(
                "a generated plan helps more than none, with text",
                more=(("full", PLAN),),
                less=(("full", "dropped"),),
            ),
            Claim(
                "a clip's own plan helps more than another's, without text",
                more=(("full", ALONE),),
                less=(("full", "shuffled, no text"),),
            ),
        ),
        asks=(
            Claim(
                "generated plans cost nothing against real clips' plans",
                more=(("full", PLAN),),
                less=(("full", ORACLE),),
                least=-5.0,
            ),
            Claim(
                "the plan alone tells the motion as well as with the text",
                more=(("full", ALONE, "motion"),),
                less=(("full", ORACLE, "motion"),),
                least=-5.0,
            ),
            Claim(
                "the plan alone tells the shape as well as with the text",
                more=(("full", ALONE, "shape"),),
                less=(("full", ORACLE, "shape"),),
                least=-5.0,
            ),
        ),
    ),
    Experiment(
        "base",
        "On a par with the base model at equal training (Table 1).",
        arms=(
            Arm("full", line="plan"),
            Arm("half", steps="half", line="plan"),
            *(
                Arm(
                    f"base x {compute:g}",
                    ways=("base", "base, guidance 3"),
                    compute=compute,
                    line="base",
                )
                for compute in (1.0, 0.5, 2.0)
            ),
        ),
        claims=tuple(
            Claim(
                f"at equal compute at most 5 points below the {way}",
                more=(("full", PLAN),),
                less=(("base x 1", way),),
                least=-5.0,
            )
            for way in ("base", "base, guidance 3")
        ),
        asks=(
            Claim(
                "at equal compute better than the base",
                more=(("full", PLAN),),
                less=(("base x 1", "base"),),
            ),
            Claim(
                "better than the base with twice the compute",
                more=(("full", PLAN),),
                less=(("base x 2", "base"),),
            ),
        ),
    ),
    Experiment(
        "start",
        "Both stages are fine-tuned from a pre-trained model (Sec. 3.2, 3.3).",
        arms=(
            *(
                Arm(f"{start}, {steps}", (f"start={start}",), steps, compute=1.0, line=start)
                for steps in ("quarter", "half")
                for start in ("base", "scratch")
            ),
            Arm("scratch, full", ("start=scratch",), line="scratch", compute=1.0),
            Arm("the base itself", ways=("base",), compute=1.0, line="the base itself"),
        ),
        claims=(
            Claim(
                "better from the base, a quarter of the steps",
                more=(("base, quarter", PLAN),),
                less=(("scratch, quarter", PLAN),),
            ),
        ),
        asks=(
            Claim(
                "better from the base, half of the steps",
                more=(("base, half", PLAN),),
                less=(("scratch, half", PLAN),),
            ),
            Claim(
                "the start matters more, at half of the steps, than the plan against the base",
                more=(("base, half", PLAN), ("the base itself", "base")),
                less=(("scratch, half", PLAN), ("scratch, full", PLAN)),
            ),
        ),
    ),
    Experiment(
        "space",
        "A semantic space converges faster than a compressed VAE space (Fig. 9).",
        arms=tuple(
            Arm(f"{space}, {steps}", steps=steps, parts=parts, ways=(PLAN, ORACLE), line=space)
            for steps in ("half", "quarter", "full")
            for space, parts in (("semantic", None), ("VAE", latents_as_plan))
        ),
        claims=tuple(
            Claim(
                f"better from semantic features, {steps} of the steps",
                more=((f"semantic, {steps}", PLAN),),
                less=((f"VAE, {steps}", PLAN),),
            )
            for steps in ("half", "quarter")
        ),
        asks=(
            Claim(
                "better from semantic features, all steps",
                more=(("semantic, full", PLAN),),
                less=(("VAE, full", PLAN),),
            ),
            Claim(
                "painted better from the plans of real clips, half of the steps",
                more=(("semantic, half", ORACLE),),
                less=(("VAE, half", ORACLE),),
            ),
        ),
    ),
    Experiment(
        "dims",
        "8 channels are no worse than 64, and both are better than 2048 (Table 3, Fig. 8).",
        arms=(
            *both_shifts("8", 8)[:1],  # the preset's: nothing to shift
            *both_shifts("64", 64),
            *both_shifts("none", kind="none"),
            *both_shifts("8 by PCA", 8, "pca")[:1],
            *both_shifts("2", 2),
            *both_shifts("16", 16)[:1],
            *both_shifts("4", 4)[:1],
        ),
        claims=(
            Claim("8 no worse than 64", more=(("8", PLAN),), less=(("64", PLAN),), least=-5.0),
            Claim("8 better than no compression", more=(("8", PLAN),), less=(("none", PLAN),)),
            Claim("64 better than no compression", more=(("64", PLAN),), less=(("none", PLAN),)),
        ),
        asks=(
            Claim(
                "the schedule explains some of it: no compression is better with a shift",
                more=(("none, shifted", PLAN),),
                less=(("none", PLAN),),
            ),
            Claim(
                "the schedule does not explain all of it: 8 better than none with a shift",
                more=(("8", PLAN),),
                less=(("none, shifted", PLAN),),
            ),
            Claim(
                "64 channels are better with a shift",
                more=(("64, shifted", PLAN),),
                less=(("64", PLAN),),
            ),
            Claim(
                "PCA does as well as the MLP",
                more=(("8 by PCA", PLAN),),
                less=(("8", PLAN),),
                least=-5.0,
            ),
            Claim("8 better than 2", more=(("8", PLAN),), less=(("2", PLAN),)),
        ),
    ),
    Experiment(
        "noise",
        "Noise on z_sem closes the gap between training and inference (Sec. 3.2).",
        arms=tuple(
            Arm(f"tau {tau:g}", (f"compressor.noise={tau}",), "half", (PLAN, ORACLE))
            for tau in (0.2, 0.0, 1.0, 0.5)
        ),
        claims=(
            Claim(
                "with noise, generated plans lose less against real clips' plans",
                more=(("tau 0", ORACLE), ("tau 0.2", PLAN)),
                less=(("tau 0", PLAN), ("tau 0.2", ORACLE)),
            ),
        ),
        asks=tuple(
            Claim(
                f"videos from text are better with tau {tau:g} than with none",
                more=((f"tau {tau:g}", PLAN),),
                less=(("tau 0", PLAN),),
            )
            for tau in (0.2, 0.5, 1.0)
        ),
    ),
    Experiment(
        "kl",
        "A Gaussian-like space is easier to sample (Sec. 3.2).",
        arms=tuple(
            Arm(f"KL {weight:g}", (f"compressor.kl_weight={weight}",), "half", (PLAN, ORACLE))
            for weight in (3e-5, 0.0, 1e-3, 3e-4)
        ),
        claims=(
            Claim(
                "with a KL, generated plans lose less against real clips' plans",
                more=(("KL 0", ORACLE), ("KL 3e-05", PLAN)),
                less=(("KL 0", PLAN), ("KL 3e-05", ORACLE)),
            ),
        ),
        asks=(
            Claim(
                "videos from text are better with a KL than without",
                more=(("KL 3e-05", PLAN),),
                less=(("KL 0", PLAN),),
            ),
            Claim(
                "a KL 33 times as strong kills the plan",
                more=(("KL 3e-05", ORACLE),),
                less=(("KL 0.001", ORACLE),),
                least=50.0,
            ),
        ),
    ),
    Experiment(
        "encoders",
        "Left as future work (App. C): which training of the semantic encoder matters.",
        arms=(
            Arm("captions", steps="half", ways=(PLAN, ORACLE, ALONE)),
            Arm("hidden pixels", ("encoder.learns=hidden",), "half", (PLAN, ORACLE, ALONE)),
            Arm(
                "random",
                ("stages.encoder.lr=0", "stages.encoder.muon_lr=0"),
                "untrained",
                (PLAN, ORACLE, ALONE),
            ),
            Arm("VAE", steps="half", parts=latents_as_plan, ways=(PLAN, ORACLE, ALONE)),
        ),
        claims=(
            Claim(
                "an encoder that learned to caption is better than a random one",
                more=(("captions", PLAN),),
                less=(("random", PLAN),),
            ),
        ),
        asks=(
            Claim(
                "self-supervised is at most 5 points below language-aligned",
                more=(("hidden pixels", PLAN),),
                less=(("captions", PLAN),),
                least=-5.0,
            ),
            Claim(
                "VAE features are at most 5 points below language-aligned",
                more=(("VAE", PLAN),),
                less=(("captions", PLAN),),
                least=-5.0,
            ),
            Claim(
                "plans of hidden pixels tell shapes better, without text",
                more=(("hidden pixels", ALONE, "shape"),),
                less=(("captions", ALONE, "shape"),),
            ),
        ),
    ),
    Experiment(
        "reference",
        "A reference's layout and motion are kept, texture and colour are free; fewer dimensions "
        "keep less (Fig. 4).",
        arms=tuple(
            Arm(name, steps="half", parts=parts, ways=("vae", ALONE))
            for name, parts in (
                ("8", partial(channels, count=8)),
                ("64", partial(channels, count=64)),
                ("2", partial(channels, count=2)),
            )
        ),
        claims=(
            Claim(
                "layout is kept better than texture",
                more=(("64", ALONE, "layout"),),
                less=(("64", ALONE, "texture"),),
            ),
            Claim(
                "motion is kept better than colour",
                more=(("64", ALONE, "motion"),),
                less=(("64", ALONE, "colour"),),
            ),
            Claim("8 keep less than 64", more=(("64", ALONE),), less=(("8", ALONE),)),
            Claim("2 keep less than 8", more=(("8", ALONE),), less=(("2", ALONE),)),
        ),
        shows=("number", "layout", "motion", "shape", "colour", "texture"),
    ),
    Experiment(
        "cost",
        "Windows keep the cost linear, and plan tokens are few, about one for 16 (Sec. 3.4).",
        arms=(Arm("painter", ways=("full", "windows", "tokens")),),
        claims=(
            Claim(
                "windows cost less per doubling of the length than full attention",
                more=(("painter", "full"),),
                less=(("painter", "windows"),),
                score="growth",
            ),
            Claim(
                "windows cost at most 2.2 times as much per doubling",
                more=(),
                less=(("painter", "windows"),),
                score="growth",
                least=-2.2,
            ),
            Claim(
                "at least 15 latent tokens per plan token, at the paper's sizes",
                more=(("painter", "tokens"),),
                less=(),
                score="per plan token",
                least=15.0,
            ),
        ),
        shows=("growth", "per plan token"),
    ),
    Experiment(
        "lightning",
        "A low semantic rate loses fast events (Fig. 14, App. B.3).",
        arms=tuple(
            Arm(
                f"{rate:g} fps",
                ("data.flashes=true", f"data.semantic_fps={rate}"),
                "painter",
                ("vae", ALONE),
            )
            for rate in (2.0, 8.0, 4.0)
        ),
        claims=(
            Claim(
                "a flash survives more often at 8 fps than at 2",
                more=(("8 fps", ALONE),),
                less=(("2 fps", ALONE),),
                score="flash",
            ),
        ),
        asks=(
            Claim(
                "at 8 fps four of five flashes survive",
                more=(("8 fps", ALONE),),
                less=(),
                score="flash",
                least=80.0,
            ),
            Claim(
                "at 4 fps more than at 2",
                more=(("4 fps", ALONE),),
                less=(("2 fps", ALONE),),
                score="flash",
            ),
        ),
        shows=("flash", "calm", "number", "motion"),
    ),
    Experiment(
        "long",
        "Long videos of SemanticGen drift less than those of Base-CT-Swin (Table 2).",
        arms=(
            Arm("plan", steps="long"),
            Arm("Base-CT-Swin", steps="long", ways=("base",)),
            Arm("base, full attention", ("latent.window=none",), "long", ("base",)),
            Arm("Base-CT-Swin, 4 times as long", steps="longer", ways=("base",)),
        ),
        claims=tuple(
            Claim(says, more, less, score)
            for says, score, more, less in (
                (
                    "colours and shapes drift less than Base-CT-Swin's",
                    "drift",
                    (("Base-CT-Swin", "base"),),
                    (("plan", PLAN),),
                ),
                (
                    "objects stay themselves more often",
                    "shape",
                    (("plan", PLAN),),
                    (("Base-CT-Swin", "base"),),
                ),
                (
                    "more events happen as told",
                    "event",
                    (("plan", PLAN),),
                    (("Base-CT-Swin", "base"),),
                ),
            )
        ),
        asks=(
            Claim(
                "more events happen as told than with full attention",
                more=(("plan", PLAN),),
                less=(("base, full attention", "base"),),
                score="event",
            ),
            Claim(
                "more events happen as told than by the base trained 4 times as long",
                more=(("plan", PLAN),),
                less=(("Base-CT-Swin, 4 times as long", "base"),),
                score="event",
            ),
        ),
        preset="tiny_long",
        shows=("exact", "number", "colour", "shape", "story", "event", "drift"),
    ),
)
