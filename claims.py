"""What the paper claims, and what would show it in miniature: the experiments of experiments.py.

An experiment has arms (a run that is trained and scored, once for each seed) and claims. A claim is
about a difference between scores; its limit is stated here, before anything is run
(`conclusions.py::RULE`). What a reader would ask besides is judged likewise and decides nothing
(`asks`).

A score is a percentage of prompts, or a mean over their objects (toy/scores.py). A way of making
videos (`experiments.py::way_of`) starts from text, or from a plan that the planner did not make.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from settings import Config
from toy.encoder import LatentEncoderConfig

PLAN = "text"  # the way text -> plan -> video
ORACLE = "oracle"  # from the z_sem of the real clip, with its text
ALONE = "oracle, no text"  # from that z_sem alone
ABLE = 80.0  # percent, of what an experiment measures, that the whole method has to get right
SHORT = 0.5  # where the whole recipe would leave nothing to improve
STEPS = {  # all step budgets, as shares of the preset's steps; 0: a single step
    "full": {},
    "half": {"latent": SHORT, "semantic": SHORT},
    "quarter": {"latent": SHORT / 2, "semantic": SHORT / 2},
    "painter": {"encoder": 0.5, "latent": SHORT},
    "untrained": {"encoder": 0.0, "latent": SHORT, "semantic": SHORT},
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
    parts: Callable[[Config], dict] | None = None  # other components of the preset
    compute: float | None = None  # of the base: its FLOPs, in those of the whole recipe
    line: str = ""  # which curve of score against compute it is a point of


@dataclass(frozen=True)
class Claim:
    """A difference between scores is above a limit, in points.

    A side is "arm | way", or "arm | way | score" where the score is another; of several the sum
    counts.
    """

    says: str
    more: tuple[str, ...]
    less: tuple[str, ...] = ()
    score: str = "exact"
    limit: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """What the paper says, what is run, and what is concluded from which differences."""

    name: str
    paper: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    asks: tuple[Claim, ...] = ()
    able: str = ""  # the side that has to reach ABLE, or nothing is concluded
    preset: str = "tiny"
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

    That of the paper's plans would give 31, 5.6 and 2.0 at 2048, 64 and 8 channels. Here it is
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
    able="full | text",
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
            "with text, a clip's own plan beats another's", ("full | oracle",), ("full | shuffled",)
        ),
        Claim("with text, a generated plan beats none", ("full | text",), ("full | dropped",)),
        Claim(
            "without text, a clip's own plan beats another's",
            ("full | oracle, no text",),
            ("full | shuffled, no text",),
        ),
    ),
    asks=(
        Claim(
            "generated plans are as good as real ones",
            ("full | text",),
            ("full | oracle",),
            limit=-5,
        ),
        *(
            Claim(
                f"the plan tells the {score} as well alone as with the text",
                ("full | oracle, no text",),
                ("full | oracle",),
                score,
                limit=-5,
            )
            for score in ("motion", "shape")
        ),
    ),
)

BASE = Experiment(
    "base",
    "On a par with the base model at equal training (Table 1).",
    able="full | text",
    arms=(
        Arm("full", line="plan"),
        Arm("half", steps="half", line="plan"),
        *(
            Arm(f"base x {x:g}", ways=("base", "base, guidance 3"), compute=x, line="base")
            for x in (1.0, 0.5, 2.0)
        ),
    ),
    claims=tuple(
        Claim(
            f"on a par at equal compute with the {way}",
            ("full | text",),
            (f"base x 1 | {way}",),
            limit=-5,
        )
        for way in ("base", "base, guidance 3")
    ),
    asks=(
        Claim("better at equal compute", ("full | text",), ("base x 1 | base",)),
        Claim("better than a base of twice the compute", ("full | text",), ("base x 2 | base",)),
    ),
)

START = Experiment(
    "start",
    "Both stages are fine-tuned from a pre-trained model (Sec. 3.2, 3.3).",
    able="scratch, full | text",
    arms=(
        *(
            Arm(f"{start}, {steps}", (f"start={start}",), steps, compute=1.0, line=start)
            for steps in ("quarter", "half")
            for start in ("base", "scratch")
        ),
        Arm("scratch, full", ("start=scratch",), compute=1.0, line="scratch"),
        Arm("the base", ways=("base",), compute=1.0, line="the base"),
    ),
    claims=(
        Claim(
            "better from the base, quarter of the steps",
            ("base, quarter | text",),
            ("scratch, quarter | text",),
        ),
    ),
    asks=(
        Claim(
            "better from the base, half of the steps",
            ("base, half | text",),
            ("scratch, half | text",),
        ),
        Claim(
            "the start gains more, at half of the steps, than the plan gains over the base",
            ("base, half | text", "the base | base"),
            ("scratch, half | text", "scratch, full | text"),
        ),
    ),
)

SPACE = Experiment(
    "space",
    "A semantic space converges faster than a compressed VAE space (Fig. 9).",
    able="semantic, full | text",
    arms=tuple(
        Arm(f"{space}, {steps}", (), steps, (PLAN, ORACLE), parts, line=space)
        for steps in ("half", "quarter", "full")
        for space, parts in (("semantic", None), ("VAE", latents_as_plan))
    ),
    claims=tuple(
        Claim(
            f"semantic is better, {steps} of the steps",
            (f"semantic, {steps} | text",),
            (f"VAE, {steps} | text",),
        )
        for steps in ("half", "quarter")
    ),
    asks=(
        Claim("semantic is better, all steps", ("semantic, full | text",), ("VAE, full | text",)),
        Claim(
            "real clips' plans are painted better, half of the steps",
            ("semantic, half | oracle",),
            ("VAE, half | oracle",),
        ),
    ),
)

DIMS = Experiment(
    "dims",
    "8 channels are no worse than 64, and both are better than 2048 (Table 3, Fig. 8).",
    able="8 | text",
    arms=(
        *(
            Arm(name, (), "half", (PLAN, ORACLE), partial(channels, count=count, kind=kind))
            for name, count, kind in (
                *(("8", 8, "mlp"), ("64", 64, "mlp"), ("none", None, "none")),
                *(("8 by PCA", 8, "pca"), ("2", 2, "mlp"), ("16", 16, "mlp"), ("4", 4, "mlp")),
            )
        ),
        *(  # at 8 nothing is shifted; the painters are those of above
            Arm(f"{name}, shifted", (), "half", (PLAN,), partial(shifted, count=count, kind=kind))
            for name, count, kind in (("64", 64, "mlp"), ("none", None, "none"), ("2", 2, "mlp"))
        ),
    ),
    claims=(
        Claim("8 no worse than 64", ("8 | text",), ("64 | text",), limit=-5),
        Claim("8 better than no compression", ("8 | text",), ("none | text",)),
        Claim("64 better than no compression", ("64 | text",), ("none | text",)),
    ),
    asks=(
        Claim("a shift helps without compression", ("none, shifted | text",), ("none | text",)),
        Claim("a shift helps at 64", ("64, shifted | text",), ("64 | text",)),
        Claim(
            "8 better than no compression with a shift", ("8 | text",), ("none, shifted | text",)
        ),
        Claim("PCA to 8 as good as the MLP", ("8 by PCA | text",), ("8 | text",), limit=-5),
        Claim("8 better than 2", ("8 | text",), ("2 | text",)),
    ),
)

NOISE = Experiment(
    "noise",
    "Noise on z_sem closes the gap between training and inference (Sec. 3.2).",
    able="tau 0.2 | text",
    arms=tuple(
        Arm(f"tau {tau:g}", (f"compressor.noise={tau}",), "half", (PLAN, ORACLE))
        for tau in (0.2, 0.0, 1.0, 0.5)
    ),
    claims=(
        Claim(
            "with noise, generated plans lose less against real ones",
            ("tau 0 | oracle", "tau 0.2 | text"),
            ("tau 0 | text", "tau 0.2 | oracle"),
        ),
    ),
    asks=tuple(
        Claim(f"tau {tau:g} better than none", (f"tau {tau:g} | text",), ("tau 0 | text",))
        for tau in (0.2, 0.5, 1.0)
    ),
)

KL = Experiment(
    "kl",
    "A Gaussian-like space is easier to sample (Sec. 3.2).",
    able="KL 3e-05 | text",
    arms=tuple(
        Arm(f"KL {weight:g}", (f"compressor.kl_weight={weight}",), "half", (PLAN, ORACLE))
        for weight in (3e-5, 0.0, 1e-3, 3e-4)
    ),
    claims=(
        Claim(
            "with a KL, generated plans lose less against real ones",
            ("KL 0 | oracle", "KL 3e-05 | text"),
            ("KL 0 | text", "KL 3e-05 | oracle"),
        ),
    ),
    asks=(
        Claim("videos from text are better with a KL", ("KL 3e-05 | text",), ("KL 0 | text",)),
        Claim(
            "a KL 33 times as strong kills the plan",
            ("KL 3e-05 | oracle",),
            ("KL 0.001 | oracle",),
            limit=50,
        ),
    ),
)

ENCODERS = Experiment(
    "encoders",
    "Left as future work (App. C): which training of the semantic encoder matters.",
    able="captions | text",
    arms=tuple(
        Arm(name, settings, steps, (PLAN, ORACLE, ALONE), parts)
        for name, settings, steps, parts in (
            ("captions", (), "half", None),
            ("hidden pixels", ("encoder.learns=hidden",), "half", None),
            ("random", ("stages.encoder.lr=0", "stages.encoder.muon_lr=0"), "untrained", None),
            ("VAE", (), "half", latents_as_plan),
        )
    ),
    claims=(Claim("captions better than random", ("captions | text",), ("random | text",)),),
    asks=(
        Claim(
            "hidden pixels as good as captions",
            ("hidden pixels | text",),
            ("captions | text",),
            limit=-5,
        ),
        Claim("VAE features as good as captions", ("VAE | text",), ("captions | text",), limit=-5),
        Claim("random as good as captions", ("random | text",), ("captions | text",), limit=-5),
        Claim(
            "plans of hidden pixels tell shapes better, without text",
            ("hidden pixels | oracle, no text",),
            ("captions | oracle, no text",),
            "shape",
        ),
    ),
)

REFERENCE = Experiment(
    "reference",
    "A reference's layout and motion are kept, texture and colour are free; fewer dimensions keep "
    "less (Fig. 4).",
    able="8 | oracle, no text | layout",
    arms=tuple(
        Arm(str(count), (), "half", ("vae", ALONE), partial(channels, count=count))
        for count in (8, 64, 2)
    ),
    claims=(
        Claim(
            "layout kept better than texture",
            ("8 | oracle, no text | layout",),
            ("8 | oracle, no text | texture",),
        ),
        Claim(
            "motion kept better than colour",
            ("8 | oracle, no text | motion",),
            ("8 | oracle, no text | colour",),
        ),
        Claim("8 keep less than 64", ("64 | oracle, no text",), ("8 | oracle, no text",)),
        Claim("2 keep less than 8", ("8 | oracle, no text",), ("2 | oracle, no text",)),
    ),
    shows=("exact", "number", "layout", "motion", "shape", "colour", "texture"),
)

COST = Experiment(
    "cost",
    "Windows keep the cost linear, and plan tokens are few, about one for 16 (Sec. 3.4).",
    arms=(Arm("painter", ways=("full", "windows", "tokens")),),
    claims=(
        Claim(
            "windows grow less per doubling than full attention",
            ("painter | full",),
            ("painter | windows",),
            "growth",
        ),
        Claim(
            "windows grow at most 2.2 times per doubling",
            (),
            ("painter | windows",),
            "growth",
            limit=-2.2,
        ),
        Claim(
            "at least 15 latent tokens per plan token at the paper's sizes",
            ("painter | tokens",),
            score="per plan token",
            limit=15,
        ),
    ),
    shows=("growth", "per plan token"),
)

LIGHTNING = Experiment(
    "lightning",
    "A low semantic rate loses fast events (Fig. 14, App. B.3).",
    able="8 fps | vae | flash",
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
            ("8 fps | oracle, no text",),
            ("2 fps | oracle, no text",),
            "flash",
        ),
    ),
    asks=(
        Claim(
            "at 8 fps four of five survive", ("8 fps | oracle, no text",), score="flash", limit=80
        ),
        Claim(
            "at 4 fps more than at 2",
            ("4 fps | oracle, no text",),
            ("2 fps | oracle, no text",),
            "flash",
        ),
    ),
    shows=("flash", "calm", "number", "motion"),
)

SWIN, FULL, LONGER = "Base-CT-Swin", "base, full attention", "Base-CT-Swin, 4 times as long"
LONG = Experiment(
    "long",
    "Long videos of SemanticGen drift less than those of Base-CT-Swin (Table 2).",
    able="plan | text | event",
    arms=(
        Arm("plan", steps="long"),
        Arm(SWIN, steps="long", ways=("base",)),
        Arm(FULL, ("latent.window=none",), "long", ("base",)),
        Arm(LONGER, steps="longer", ways=("base",)),
    ),
    claims=(
        Claim("colours and shapes drift less", (f"{SWIN} | base",), ("plan | text",), "drift"),
        Claim(
            "shapes are right throughout more often", ("plan | text",), (f"{SWIN} | base",), "shape"
        ),
        Claim("more events happen as told", ("plan | text",), (f"{SWIN} | base",), "event"),
    ),
    asks=tuple(
        Claim(
            f"more events happen as told than by the {arm}",
            ("plan | text",),
            (f"{arm} | base",),
            "event",
        )
        for arm in (FULL, LONGER)
    ),
    preset="tiny_long",
    shows=("exact", "number", "colour", "shape", "story", "event", "drift"),
)

EXPERIMENTS = (  # in the order of `all`
    *(PLANS, BASE, DIMS, NOISE, KL, SPACE, ENCODERS, REFERENCE, COST, LIGHTNING, LONG, START),
)
