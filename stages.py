"""What each stage minimises: its batches, drawn whole and taken in rows, and its loss.

A stage's loss is a module that holds what is trained ("vae"; "encoder", "captioner"; "compressor",
"dit"). `draw` returns the inputs of `forward` for some rows of a batch; all its randomness comes
from the generator and is drawn for the whole batch, so that rows are the same however a batch is
cut. `forward` returns the loss, a mean over the rows, and what to log, by sample or as a mean.

SemanticGen Sec. 3.2 and 3.3: painter and planner learn by flow matching (Eq. 3), the painter's
compressor with it and with its KL.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import StageConfig
from data import to_float
from flow import flow_loss, path, sample_time
from plumbing.cache import Cache, Memory
from plumbing.files import UserError
from run import Run
from toy.encoder import Captioner

Logs = dict[str, Tensor]


class VAELoss(nn.ModuleDict):
    """Reconstruction and KL of fresh clips."""

    def __init__(self, run: Run, dataset):
        super().__init__(run.build("vae"))
        self.dataset, self.device, data = dataset, run.device, dataset.config
        self.batch = run.config.stages.vae.batch
        vae = run.config.vae
        self.grid = (vae.channels, *vae.grid(data.frames, data.height, data.width))
        self.tokens = math.prod(self.grid[1:])  # of a clip

    def indices(self, rng: torch.Generator) -> Tensor:
        """Draw the clips of a batch, (B,), with repetition."""
        return torch.randint(len(self.dataset), (self.batch,), generator=rng)

    def draw(self, rng: torch.Generator, rows: slice) -> dict[str, Tensor]:
        indices = self.indices(rng)
        noise = torch.randn(self.batch, *self.grid, generator=rng)
        video = to_float(self.dataset.batch(indices[rows].tolist()).video)
        return {"video": video.to(self.device), "noise": noise[rows].to(self.device)}

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Logs]:
        return self["vae"].loss(video, noise)


class CaptionLoss(nn.ModuleDict):
    """Captions of fresh clips, predicted word by word from the encoder's features."""

    def __init__(self, run: Run, dataset):
        super().__init__(run.build("encoder"))
        self["captioner"] = Captioner(run.config.encoder, vocabulary(dataset))
        self.dataset, self.device, data = dataset, run.device, dataset.config
        self.batch = run.config.stages.encoder.batch
        low_rate = (data.semantic_frames, data.semantic_height, data.semantic_width)
        self.tokens = math.prod(run.config.encoder.grid(*low_rate))

    def indices(self, rng: torch.Generator) -> Tensor:
        """Draw the clips of a batch, (B,), with repetition."""
        return torch.randint(len(self.dataset), (self.batch,), generator=rng)

    def draw(self, rng: torch.Generator, rows: slice) -> dict[str, Tensor]:
        indices = self.indices(rng).tolist()
        ids = self["captioner"].tokenize(self.dataset.captions(indices))  # (B, words + 1)
        video = to_float(self.dataset.semantic_video(indices[rows]))
        words = Captioner.lengths(ids).float().mean()  # to predict, the end with them
        return {
            "video": video.to(self.device),
            "ids": ids[rows].to(self.device),
            "words": words.to(self.device),
        }

    def forward(self, video: Tensor, ids: Tensor, words: Tensor) -> tuple[Tensor, Logs]:
        """words: the mean length in the whole batch, for the mean over all its words."""
        loss, exact = self["captioner"].loss(self["encoder"](video), ids)  # (rows,), (rows,)
        return loss.mean() / words, {"exact": exact}


class DiffusionLoss(nn.ModuleDict):
    """Flow matching (Eq. 3) of painter, planner or base; with KL where the plans are learned."""

    def __init__(self, run: Run, stage: str, clips: Memory | Cache):
        super().__init__(run.build(stage))
        self.stage, self.clips, self.device = stage, clips, run.device
        self.config: StageConfig = getattr(run.config.stages, stage)
        # The planner's compressor is the painter's, frozen; it is not among what is trained.
        self.frozen = (run.painter["compressor"],) if stage == "semantic" else ()
        dit, data = self["dit"].config, run.config.data
        low_rate = (data.semantic_frames, data.semantic_height, data.semantic_width)
        plan = run.config.encoder.grid(*low_rate)
        latents = run.config.vae.grid(data.frames, data.height, data.width)
        # A clip can be cut where a frame of the plan and one of the latents begin together: not at
        # all where they are not as long as each other, as with a VAE whose first frame is alone.
        alike = plan[0] * run.config.latent.rate == latents[0] * run.config.latent.context_rate
        self.cuts = math.gcd(plan[0], latents[0]) if alike else 1
        self.seconds, pieces = data.seconds, self.config.pieces
        if self.cuts % pieces:
            raise UserError(
                f"stages.{stage}.pieces={pieces}: plan and latents can be cut together into "
                f"{self.cuts} equal stretches, which do not divide by it"
            )
        planned, painted = math.prod(plan), math.prod(latents) // dit.patch**2
        tokens = {"latent": painted + planned, "semantic": planned, "base": painted}[stage]
        self.tokens = tokens // pieces  # of a clip

    @property
    def compressor(self) -> nn.Module:
        return self.frozen[0] if self.frozen else self["compressor"]

    def indices(self, rng: torch.Generator) -> Tensor:
        """Draw the clips of a batch, (B,), with repetition."""
        return torch.randint(len(self.clips), (self.config.batch,), generator=rng)

    def stretch(self, rng: torch.Generator) -> tuple[Callable[[Tensor], Tensor], float]:
        """Choose the stretch of the clips that this step learns from: 1 / pieces of their length.

        Returns what cuts it out of (B, c, frames, h, w) at either rate, and the second it starts.
        """
        if self.config.pieces == 1:
            return (lambda x: x), 0.0
        long = self.cuts // self.config.pieces
        first = int(torch.randint(self.cuts - long + 1, (1,), generator=rng))

        def cut(x: Tensor) -> Tensor:
            each = x.shape[2] // self.cuts  # frames between two places to cut
            return x.narrow(2, first * each, long * each)

        return cut, first / self.cuts * self.seconds

    def draw(self, rng: torch.Generator, rows: slice) -> dict[str, Tensor]:
        config = self.config

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)[rows].to(self.device)

        def keep(dropout: float) -> Tensor:
            return (torch.rand(config.batch, generator=rng) >= dropout)[rows].to(self.device)

        indices = self.indices(rng)[rows]
        cut, start = self.stretch(rng)
        inputs = {
            "start": torch.tensor(start, device=self.device),
            "text": self.clips.text(indices).to(self.device)
            * keep(config.text_dropout)[:, None, None],
        }
        if self.stage != "base":
            inputs["features"] = cut(self.clips.features(indices)).to(self.device)
            plan = (config.batch, self.compressor.config.channels, *inputs["features"].shape[2:])
            inputs["plan_noise"] = normal(*plan)
        if self.stage == "latent":
            inputs["level"], inputs["perturbation"] = normal(config.batch), normal(*plan)
            inputs["keep_context"] = keep(config.context_dropout)
        shape = plan if self.stage == "semantic" else None
        if self.stage != "semantic":
            mean, log_variance = (cut(x).to(self.device) for x in self.clips.latents(indices))
            shape = (config.batch, *mean.shape[1:])
            inputs["latents"] = mean
            if config.posterior:
                inputs["latents"] = mean + normal(*shape) * (0.5 * log_variance).exp()
        inputs["noise"] = normal(*shape)
        inputs["t"] = sample_time(config.batch, config.time, config.shift, rng)[rows]
        inputs["t"] = inputs["t"].to(self.device)
        return inputs

    def forward(
        self,
        text: Tensor,
        noise: Tensor,
        t: Tensor,
        latents: Tensor | None = None,
        features: Tensor | None = None,
        plan_noise: Tensor | None = None,
        level: Tensor | None = None,
        perturbation: Tensor | None = None,
        keep_context: Tensor | None = None,
        start: Tensor | float = 0.0,
    ) -> tuple[Tensor, Logs]:
        """Rows of: text (B, L, dim); latents (B, C, T, h, w); features (B, d, S, hs, ws); the rest
        is noise like what it is for, t (B,) and keep_context (B,) bool; start: seconds, ()."""
        data, conditions = latents, {}
        if features is not None:
            z_sem, kl = self.compressor(features, plan_noise)
        if self.stage == "semantic":
            data = self.compressor.normalise(z_sem)
        if self.stage == "latent":
            context = self.compressor.perturb(z_sem, level, perturbation)
            conditions = {"context": context, "keep_context": keep_context}
        velocity = self["dit"](path(data, noise, t), t, text, start=start, **conditions)
        by_sample = flow_loss(velocity, data, noise)  # (rows,)
        logs = {"flow": by_sample.detach()}
        for i in range(4):  # the loss by quarters of t
            inside = (t * 4).long().clamp(max=3) == i
            logs[f"flow_t{i}"] = logs["flow"].where(inside, torch.nan)
        if self.stage != "latent":
            return by_sample.mean(), logs
        logs |= {"kl": kl.detach().sum(), "active_channels": (kl.detach() > 0.1).sum()}
        return by_sample.mean() + self.compressor.config.kl_weight * kl.sum(), logs


def stage_loss(run: Run, stage: str, dataset, clips: Memory | Cache | None) -> nn.ModuleDict:
    """Return a stage's loss around freshly initialised modules, on the run's device."""
    if stage == "vae":
        losses = VAELoss(run, dataset)
    elif stage == "encoder":
        losses = CaptionLoss(run, dataset)
    else:
        losses = DiffusionLoss(run, stage, clips)
    return losses.to(run.device).train()


def vocabulary(dataset) -> list[str]:
    """Return the words of a dataset's captions, sorted."""
    captions = dataset.captions(range(min(4096, len(dataset))))
    return sorted({word for caption in captions for word in caption.lower().split()})
