"""The stages of training: what each one trains, on what, and by which loss (Fig. 3a and 3b).

| stage    | network | trains            | learns                               | loss      |
|----------|---------|-------------------|--------------------------------------|-----------|
| vae      |         | VAE               | to reconstruct video (toy/vae.py)    | L1, L2, KL |
| encoder  |         | semantic encoder  | to caption video (toy/encoder.py)    | next word |
| latent   | painter | compressor, DiT   | latents, given z_sem and text        | flow, KL  |
| semantic | planner | DiT               | z_sem, given text                    | flow      |
| base     | base    | DiT               | latents, given text: the control     | flow      |

The painter comes first (Sec. 3.2): its loss teaches the compressor what a plan must hold. Then the
planner learns the frozen compressor's plans (Sec. 3.3). VAE and encoder are ready-made in the
paper; only the miniature trains them. Both, and the text encoder, are frozen while a DiT learns:
encode.py computes what they make of clips once, before the stage begins, and a DiT's stage reads
it by index (`latents`, `features`, `text`).

A learner holds the modules of one stage. `draw` returns the inputs of `forward` for some rows of a
batch, on the CPU; `forward` returns the loss, a mean over the rows, and what to log.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flow import flow_loss, path, sample_time
from plumbing.device import count_flops, matmul_speed, recomputed
from plumbing.seeds import Rows
from semantic import Compressor
from settings import Config, StageConfig
from toy.encoder import LEARNERS
from toy.vae import TinyVAE, VAELearner
from wan import build_dit

Logs = dict[str, Tensor]  # each a mean, or a value of each row
NEEDS = {  # stage -> the stages whose weights it is trained on; the keys in the order of training
    "vae": (),
    "encoder": (),
    "latent": ("vae", "encoder"),
    "semantic": ("vae", "encoder", "latent"),
    "base": ("vae",),
}
USES = {  # stage of a DiT -> what it reads of encoded clips
    "latent": ("latents", "features", "text"),
    "semantic": ("features", "text"),
    "base": ("latents", "text"),
}
ORDER = tuple(NEEDS)
RECIPE = ORDER[:4]  # all but the control


def needs_of(config: Config, stage: str) -> tuple[str, ...]:
    """Return the stages whose weights a stage is trained on, or starts from, in order."""
    needs = NEEDS[stage]
    if config.start == "base" and stage in ("latent", "semantic"):
        return (*needs[:2], "base", *needs[2:])  # before the painter, which starts from it too
    return needs


# --- what the DiTs' stages have in common -------------------------------------------------------


def flow_matching(
    dit: nn.Module, data: Tensor, noise: Tensor, t: Tensor, text: Tensor, **conditions
) -> tuple[Tensor, Logs]:
    """Return the flow-matching loss (Eq. 3) and its logs, also by quarters of t.

    data, noise: (B, ...); t: (B,); text: (B, L, dim); conditions: further inputs of the DiT.
    """
    velocity = dit(path(data, noise, t), t, text, **conditions)
    by_row = flow_loss(velocity, data, noise)  # (B,)
    logs = {"flow": by_row.detach()}
    for quarter in range(4):
        inside = (t * 4).long().clamp(max=3) == quarter
        logs[f"flow_t{quarter}"] = logs["flow"].where(inside, torch.nan)
    return by_row.mean(), logs


def draw_flow(rows: Rows, shape: tuple[int, ...], stage: StageConfig) -> dict[str, Tensor]:
    """Draw the noise (B, *shape) and the time (B,) of flow matching."""
    noise = rows.normal(*shape)
    t = rows.draw(lambda rng: sample_time(1, stage.time, stage.shift, rng)[0])
    return {"noise": noise, "t": t}


def draw_text(clips, indices: list[int], rows: Rows, stage: StageConfig) -> Tensor:
    """Return the captions' tokens (B, L, dim); a dropped caption is the null text, all zeros."""
    dropout = stage.text_dropout
    if stage.text_dropout_start is not None:
        left = max(0.0, 1 - rows.step / stage.text_dropout_steps)
        dropout += (stage.text_dropout_start - dropout) * left
    return clips.text(indices) * rows.kept(dropout)[:, None, None]


def draw_latents(clips, indices, cut: Callable, rows: Rows, posterior: bool) -> Tensor:
    """Return VAE latents (B, C, T, h, w): the posterior's mean, or a draw from it."""
    mean, log_variance = (cut(x) for x in clips.latents(indices))
    if not posterior:
        return mean
    return mean + rows.normal(*mean.shape[1:]) * (0.5 * log_variance).exp()


def choose_stretch(config: Config, name: str, rows: Rows) -> tuple[Callable, Tensor]:
    """Choose the stretch that a step learns from, 1 / pieces of a clip, the same of all its clips.

    Returns a function that cuts the stretch out of (B, c, frames, h, w) at either rate, and the
    second at which the stretch starts. There a frame of the plan and one of the latents begin
    together (`Config.stretches`).
    """
    places = config.stretches()
    length = places // getattr(config.stages, name).pieces
    first = int(torch.randint(places - length + 1, (), generator=rows.common))

    def cut(x: Tensor) -> Tensor:
        each = x.shape[2] // places  # frames between two places
        return x.narrow(2, first * each, length * each)

    return cut, torch.tensor(first / places * config.data.seconds)


# --- the three DiTs -----------------------------------------------------------------------------


class Painter(nn.ModuleDict):
    """Stage 2, trained first (Sec. 3.2, Fig. 3a): compressor and DiT learn together.

    Frozen, and read from encoded clips: VAE, semantic encoder, text encoder.
    """

    def __init__(self, config: Config):
        compressor = Compressor(config.encoder.dim, config.compressor)
        super().__init__({"compressor": compressor, "dit": build_dit(config.latent)})
        self.config = config
        self.tokens = config.latent_tokens() + config.plan_tokens()  # of a clip

    def draw(self, clips, rows: Rows) -> dict[str, Tensor]:
        stage = self.config.stages.latent
        indices = rows.indices(len(clips))
        cut, start = choose_stretch(self.config, "latent", rows)
        features = cut(clips.features(indices))  # (B, d, S, hs, ws)
        plan = (self["compressor"].config.channels, *features.shape[2:])
        latents = draw_latents(clips, indices, cut, rows, stage.posterior)
        return {
            "latents": latents,  # (B, C, T, h, w)
            "features": features,
            "text": draw_text(clips, indices, rows, stage),
            "keep_context": rows.kept(stage.context_dropout),  # dropped apart from the text
            "plan_noise": rows.normal(*plan),
            "level": rows.normal(),
            "perturbation": rows.normal(*plan),
            "start": start,
            **draw_flow(rows, latents.shape[1:], stage),
        }

    def forward(
        self,
        latents: Tensor,
        features: Tensor,
        text: Tensor,
        keep_context: Tensor,
        plan_noise: Tensor,
        level: Tensor,
        perturbation: Tensor,
        start: Tensor,
        noise: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Logs]:
        compressor = self["compressor"]
        z_sem, kl = compressor(features, plan_noise)  # (B, K, S, hs, ws), (K,)
        context = compressor.perturb(z_sem, level, perturbation)  # stage 1's is imperfect too
        conditions = {"context": context, "keep_context": keep_context, "start": start}
        loss, logs = flow_matching(self["dit"], latents, noise, t, text, **conditions)
        logs |= {"kl": kl.detach().sum(), "active_channels": (kl.detach() > 0.1).sum()}
        return loss + compressor.config.kl_weight * kl.sum(), logs


class Planner(nn.ModuleDict):
    """Stage 1, trained second (Sec. 3.3, Fig. 3b): a DiT learns the frozen compressor's plans.

    Frozen, and read from encoded clips: semantic encoder, text encoder. The frozen compressor is
    small, and runs in each step.
    """

    def __init__(self, config: Config, compressor: Compressor):
        super().__init__({"dit": build_dit(config.semantic)})
        self.config = config
        self.frozen = (compressor,)  # a tuple hides it from nn.Module: it is not trained
        self.tokens = config.plan_tokens() // config.semantic.patch**2

    def draw(self, clips, rows: Rows) -> dict[str, Tensor]:
        stage = self.config.stages.semantic
        indices = rows.indices(len(clips))
        cut, start = choose_stretch(self.config, "semantic", rows)
        features = cut(clips.features(indices))
        plan = (self.config.compressor.channels, *features.shape[2:])
        return {
            "features": features,
            "text": draw_text(clips, indices, rows, stage),
            "plan_noise": rows.normal(*plan),
            "start": start,
            **draw_flow(rows, plan, stage),
        }

    def forward(
        self,
        features: Tensor,
        text: Tensor,
        plan_noise: Tensor,
        start: Tensor,
        noise: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Logs]:
        (compressor,) = self.frozen
        z_sem, _ = compressor(features, plan_noise)
        plan = compressor.normalise(z_sem)  # zero mean, unit variance
        return flow_matching(self["dit"], plan, noise, t, text, start=start)


class Base(nn.ModuleDict):
    """The control, from text alone: the painter's network without a plan. With `--dit`: Base-CT."""

    def __init__(self, config: Config):
        super().__init__({"dit": build_dit(config.base)})
        self.config = config
        self.tokens = config.latent_tokens()

    def draw(self, clips, rows: Rows) -> dict[str, Tensor]:
        stage = self.config.stages.base
        indices = rows.indices(len(clips))
        cut, start = choose_stretch(self.config, "base", rows)
        latents = draw_latents(clips, indices, cut, rows, stage.posterior)
        return {
            "latents": latents,
            "text": draw_text(clips, indices, rows, stage),
            "start": start,
            **draw_flow(rows, latents.shape[1:], stage),
        }

    def forward(
        self, latents: Tensor, text: Tensor, start: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, Logs]:
        return flow_matching(self["dit"], latents, noise, t, text, start=start)


def learner(config: Config, stage: str, captions=(), compressor: nn.Module | None = None):
    """Return the learner of a stage, freshly initialised.

    captions: some of the dataset's, whose words the encoder's captioner learns. compressor: the
    painter's, frozen, whose plans the planner learns.
    """
    return {
        "vae": lambda: VAELearner(config.vae, config.data.size),
        "encoder": lambda: LEARNERS[config.encoder.learns](
            config.encoder, config.data.semantic_size, captions
        ),
        "latent": lambda: Painter(config),
        "semantic": lambda: Planner(config, compressor),
        "base": lambda: Base(config),
    }[stage]()


def measured(config: Config, stage: str, weights: dict[str, Tensor], data: Tensor):
    """Return a stage's weights with the statistics by which later stages normalise.

    weights: whole tensors by name. Stage `vae`: data is video (B, 3, F, H, W), and the statistics
    are those of its latents. Stage `latent`: data is features (B, d, S, hs, ws), and the statistics
    are those of z_sem.
    """
    with torch.device("meta"):  # without initial values: the weights take their place
        if stage == "vae":
            name, part = "vae", TinyVAE(config.vae)
        else:
            name, part = "compressor", Compressor(config.encoder.dim, config.compressor)
    module = nn.ModuleDict({name: part})
    own = {n: x for n, x in weights.items() if n.partition(".")[0] == name}
    module.load_state_dict({n: x.to(data.device, copy=True) for n, x in own.items()}, assign=True)
    part.set_statistics(data)
    return weights | module.state_dict()


def set_up(modules: nn.ModuleDict, config: StageConfig):
    """Compile blocks and switch on recomputation, as the stage's fields ask.

    Each block by itself: blocks share what is compiled, so that it takes no longer for thirty.
    """
    networks = [modules[name] for name in ("dit", "encoder") if name in modules]
    if "vae" in modules:
        networks = [modules["vae"].encoder, modules["vae"].decoder]
    for network in networks:
        recompute = config.checkpoint and hasattr(network, "run_block")
        if config.compile:
            for block in network.blocks:  # without the hooks by which FSDP gathers its weights
                run = partial(recomputed, block.forward) if recompute else block.forward
                block.forward = torch.compile(run)
        elif recompute:
            network.run_block = recomputed


def spread(source, most: int) -> list[int]:
    """Return the indices of so many clips, evenly spaced: neighbours may come of one film."""
    count = min(most, len(source))
    return [k * len(source) // count for k in range(count)]


def some_captions(stage: str, source) -> list[str]:
    """Return captions, enough to hold all usual words, for the stage that reads them."""
    return source.captions(spread(source, 4096)) if stage == "encoder" else []


def some_features(run, clips, tokens: int) -> Tensor:
    """Return features (clips, d, S, hs, ws) of some clips, about so many tokens."""
    return clips.features(spread(clips, max(1, tokens // run.config.plan_tokens()))).to(run.device)


def step_flops(config: Config, stage: str, source, rows: Rows) -> int:
    """Return the FLOPs of a step on these rows, counted on a twin in which nothing is computed."""
    with torch.device("meta"):
        compressor = Compressor(config.encoder.dim, config.compressor)
        twin = learner(config, stage, some_captions(stage, source), compressor)
    return count_flops(twin, twin.draw(source, rows))


def work(run, progress, source, rows: Sequence[range]) -> dict[str, float]:
    """Return how much of each logged rate one step does: clips, tokens and, for mfu, peak seconds.

    Peak seconds: what its FLOPs take at the device's full speed.
    """
    config: StageConfig = getattr(run.config.stages, progress.stage)
    flops = step_flops(run.config, progress.stage, source, progress.rows(rows[0], 0)) * len(rows)
    return {
        "clips_s": config.batch,
        "tokens_s": config.batch * progress.modules.tokens // config.pieces,
        "mfu": flops / matmul_speed(run.device, run.config.dtype),
    }
