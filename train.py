"""Training, one stage after the other.

    python train.py --stage all --tiny                   # from nothing to prompts, two CPU cores
    python train.py --stage latent --preset small        # one GPU
    python train.py --stage all --tiny --data FOLDER     # your own videos
    python train.py --stage latent --data FOLDER --qwen WEIGHTS --vae WEIGHTS --text WEIGHTS

SemanticGen trains the painter first (stage `latent`, Sec. 3.2): it teaches the compressor what a
plan must hold. Then the planner (stage `semantic`, Sec. 3.3), on the frozen compressor's plans.
Before both, in miniature, what the paper takes ready-made: the VAE (`vae`) and the semantic encoder
(`encoder`, by predicting captions). `base` is the control: the painter's network without any plan.

Everything random at a step is drawn from one generator seeded by (seed, stage, step), so a run that
goes on equals one that never stopped, and the step is all there is to remember.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sample
from cache import Cache, Memory, precompute
from config import PRESETS, STAGES, Config, StageConfig, override, preset
from data import Folder, contact_sheet
from files import UserError, command
from flow import flow_loss, path, sample_time
from run import (
    FLAGS,
    Metrics,
    Run,
    add_part_flags,
    check_weights_named,
    computing,
    parts_from_flags,
)
from semantic import Captioner
from text import piece_seed
from world import World, to_float, to_uint8

Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]

LOG_EVERY = 20  # steps per line of metrics.jsonl
SAVE_EVERY = 200  # steps per training state


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the source of all that is random at one step of one stage."""
    return torch.Generator().manual_seed(piece_seed(f"{seed} {stage} {step}") % 2**63)


def encoded(run: Run, dataset: World | Folder | Cache, clips: int) -> Memory | Cache:
    """Return the clips as the frozen parts encode them: computed once, not again in each step.

    A folder's go to a cache in the run's own folder first; of the world the first `clips` are used.
    """
    if isinstance(dataset, World):
        return Memory(run, dataset, min(clips, len(dataset)))
    if isinstance(dataset, Folder):
        precompute(dataset.path, run.path / "cache", run)
        run.unload()
        dataset = Cache(run.path / "cache")
    dataset.check(run)
    return dataset


# --- one loss for each stage ---------------------------------------------------------------------


def vae_loss(run: Run, modules: nn.ModuleDict, dataset, batch: int) -> Loss:
    """Reconstruction and KL of fresh clips."""
    vae, data = modules["vae"], run.config.data
    grid = (vae.channels, *vae.grid(data.frames, data.height, data.width))

    def loss(rng: torch.Generator):
        indices = torch.randint(len(dataset), (batch,), generator=rng).tolist()
        video = to_float(dataset.batch(indices).video).to(run.device)
        return vae.loss(video, torch.randn(batch, *grid, generator=rng).to(run.device))

    return loss


def encoder_loss(run: Run, modules: nn.ModuleDict, dataset, batch: int) -> Loss:
    """Captions of fresh clips, predicted from the features."""

    def loss(rng: torch.Generator):
        indices = torch.randint(len(dataset), (batch,), generator=rng).tolist()
        video = to_float(dataset.semantic_video(indices)).to(run.device)
        return modules["captioner"].loss(modules["encoder"](video), dataset.captions(indices))

    return loss


def diffusion_loss(run: Run, modules: nn.ModuleDict, clips: Memory | Cache, stage: str) -> Loss:
    """Flow matching (Eq. 3) of painter, planner or base; with KL where the plans are learned."""
    config: StageConfig = getattr(run.config.stages, stage)
    dit, device = modules["dit"], run.device
    compressor = modules["compressor"] if stage == "latent" else None
    if stage == "semantic":
        compressor = run.painter["compressor"]

    def loss(rng: torch.Generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(device)

        def keep(dropout: float) -> Tensor:
            return (torch.rand(config.batch, generator=rng) >= dropout).to(device)

        indices = torch.randint(len(clips), (config.batch,), generator=rng)
        tokens = clips.text(indices).to(device) * keep(config.text_dropout)[:, None, None]
        conditions, z, kl = {}, None, None
        if stage != "base":
            features = clips.features(indices).to(device)
            noise = normal(len(features), compressor.channels, *features.shape[2:])
            z, kl = compressor(features, noise)
        if stage == "latent":
            context = compressor.perturb(z, normal(config.batch), normal(*z.shape))
            conditions = {"context": context, "keep_context": keep(config.context_dropout)}
        if stage == "semantic":
            data = compressor.normalise(z)
        else:
            data, log_variance = (x.to(device) for x in clips.latents(indices))
            if config.posterior:
                data = data + normal(*data.shape) * (0.5 * log_variance).exp()
        noise = normal(*data.shape)
        t = sample_time(config.batch, config.time, config.shift, rng).to(device)
        velocity = dit(path(data, noise, t), t, tokens, **conditions)
        by_sample = flow_loss(velocity, data, noise)  # (B,)
        logs = {"flow": by_sample.detach().mean()}
        for i in range(4):  # the loss by quarters of t
            inside = (t * 4).long().clamp(max=3) == i
            logs[f"flow_t{i}"] = by_sample.detach()[inside].mean() if inside.any() else torch.nan
        if stage != "latent":
            return by_sample.mean(), logs
        logs |= {"kl": kl.detach().sum(), "active_channels": (kl.detach() > 0.1).sum()}
        return by_sample.mean() + compressor.config.kl_weight * kl.sum(), logs

    return loss


# --- optimisation --------------------------------------------------------------------------------


def build_optimizers(modules: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside blocks and AdamW for the rest, or AdamW for all."""
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if ".blocks." in name and p.ndim == 2]
    if config.optimizer == "adamw":
        muon = []
    elif config.optimizer != "muon":
        raise UserError(f"optimizer={config.optimizer}: choose muon or adamw")
    chosen = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers = [
        torch.optim.AdamW(
            rest, config.lr, (0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                muon, config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original"
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, config: StageConfig) -> float:
    """Return the learning rate at a step over its peak: linear warm-up, then cosine down."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def ema_decay(step: int, config: StageConfig) -> float:
    """Return the EMA's decay after a step: shorter at first, so that the start is forgotten."""
    return min(config.ema, (1 + step) / (10 + step))


class Interrupt:
    """While open, Ctrl-C and SIGTERM do not stop the program but set `wanted`, to save first."""

    def __enter__(self):
        self.wanted = False
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if self.wanted:
            raise KeyboardInterrupt  # asked twice
        self.wanted = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# --- the loop ------------------------------------------------------------------------------------


def train_stage(run: Run, stage: str, dataset, seed: int):
    """Train one stage to the end of its steps, from its saved state if there is one."""
    config: StageConfig = getattr(run.config.stages, stage)
    torch.manual_seed(piece_seed(f"{seed} {stage}") % 2**63)  # initial weights
    modules = run.build(stage)
    if stage == "encoder":
        modules["captioner"] = Captioner(run.config.encoder, vocabulary(dataset))
    modules.to(run.device).train()
    clips = encoded(run, dataset, config.clips) if stage in ("latent", "semantic", "base") else None
    if stage == "latent":
        features = clips.features(range(enough(clips, 2**15)))
        modules["compressor"].set_feature_statistics(features.to(run.device))
    ema = {name: x.detach().clone() for name, x in modules.state_dict().items()}
    optimizers = build_optimizers(modules, config)
    state = run.load_state(stage)
    step, seconds, pending = 0, 0.0, []
    if state:
        try:
            step, seconds = state["step"], state["seconds"]
            pending = state.get("pending", [])  # runs begun before it was kept
            modules.load_state_dict(state["modules"])
            ema = {name: x.to(run.device) for name, x in state["ema"].items()}
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            began_with = state.get("seed", seed)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{run.state_file(stage)} does not fit this run ({reason}): --fresh starts over"
            ) from None
        if began_with != seed:
            raise UserError(f"{run.path} was begun with --seed {began_with}: give it, or --fresh")
    if step >= config.steps and run.has(stage):
        print(f"{stage}: already trained for {step} steps")
        return
    parameters = [p for p in modules.parameters() if p.requires_grad]
    print(
        f"{stage}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, steps {step} to "
        f"{config.steps} of {config.batch} clips, {run.config.dtype} on {run.device.type}"
    )
    if stage == "vae":
        loss_of = vae_loss(run, modules, dataset, config.batch)
    elif stage == "encoder":
        loss_of = encoder_loss(run, modules, dataset, config.batch)
    else:
        loss_of = diffusion_loss(run, modules, clips, stage)
    metrics = Metrics(run.path / "metrics.jsonl", stage, step, pending)

    def save_state():
        run.save_state(
            stage,
            {
                "step": step,
                "seconds": seconds,
                "seed": seed,
                "pending": metrics.pending,
                "modules": modules.state_dict(),
                "ema": ema,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            },
        )

    bar = tqdm(total=config.steps, initial=step, desc=stage, unit="step", dynamic_ncols=True)
    with Interrupt() as interrupt, bar:
        while step < config.steps:
            start = time.perf_counter()
            with computing(run.device, run.config.dtype):
                loss, logs = loss_of(step_generator(seed, stage, step))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            factor = lr_factor(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, modules, ema_decay(step, config))
            step += 1
            if not torch.isfinite(loss):
                raise UserError(
                    f"{stage}: the loss is {loss.item()} at step {step}; lower lr or muon_lr"
                )
            seconds += time.perf_counter() - start
            metrics.add({"loss": loss.detach(), "grad_norm": norm, **logs})
            if step % LOG_EVERY == 0 or step == config.steps:
                speed = config.batch / (time.perf_counter() - start)
                line = metrics.write(step, factor, seconds)
                bar.set_postfix(loss=f"{line['loss']:.4f}", clips_s=f"{speed:.0f}")
                if line.get("active_channels") == 0 and step > config.warmup:
                    bar.write(f"warning: step {step}: the plan has died (KL is 0); lower kl_weight")
            bar.update()
            if step % SAVE_EVERY == 0 or interrupt.wanted:
                save_state()
            if interrupt.wanted:
                bar.write(
                    f"stopped; saved {run.state_file(stage)}: the same command goes on from it"
                )
                sys.exit(130)
    note = {"steps": str(step), "seconds": f"{seconds:.0f}"}
    finish(run, stage, modules, ema, dataset, clips, note)
    save_state()
    metrics.plot()


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], modules: nn.Module, decay: float):
    """ema <- decay ema + (1 - decay) weights, in place."""
    parameters = dict(modules.named_parameters())
    torch._foreach_lerp_([ema[name] for name in parameters], list(parameters.values()), 1 - decay)


def finish(
    run: Run,
    stage: str,
    modules: nn.ModuleDict,
    ema: dict[str, Tensor],
    dataset,
    clips: Memory | Cache | None,
    note: dict[str, str],
):
    """Measure what later stages need, write the EMA weights and a preview."""
    modules = modules.eval()
    raw = {name: x.clone() for name, x in modules.state_dict().items()}
    modules.load_state_dict(ema)
    if stage == "vae":
        some = dataset.batch(range(min(512, len(dataset))))
        modules["vae"].set_statistics(to_float(some.video).to(run.device))
    if stage == "latent":
        features = clips.features(range(enough(clips, 2**16)))
        modules["compressor"].set_statistics(features.to(run.device))
    tensors = {k: x for k, x in modules.state_dict().items() if not k.startswith("captioner.")}
    run.save(stage, tensors, note)
    modules.load_state_dict(raw)
    run.unload()
    if stage != "encoder":
        preview(run, stage, dataset, clips)


def enough(clips: Memory | Cache, tokens: int) -> int:
    """Return how many clips have about that many semantic tokens: enough for statistics."""
    return min(len(clips), max(1, tokens // clips.features([0])[0, 0].numel()))


@torch.no_grad()
def preview(run: Run, stage: str, dataset, clips: Memory | Cache | None):
    """Write samples/STAGE.png: what this stage does with a few clips of the dataset.

    Not where the VAE is a released one: there a sample takes long, and sample.py makes it.
    """
    if run.released("vae"):
        return
    indices = range(min(6, len(dataset)))
    captions = dataset.captions(indices)
    if stage == "vae":
        shown = dataset.batch(indices).video
        video = to_uint8(run.vae.decode(run.vae.encode(to_float(shown).to(run.device))))
        labels = "real", "through the VAE"
    else:
        latents, _ = clips.latents(indices)
        shown = to_uint8(run.vae.decode(latents.to(run.device))).cpu()
        if stage == "latent":
            plans = run.painter["compressor"].encode(clips.features(indices).to(run.device))
            video = sample.paint(run, captions, indices, plans)
        elif stage == "semantic":
            video = sample.generate(run, captions, indices)
        else:
            video = sample.paint(run, captions, indices, None)
        made = {"latent": "painted from its plan", "semantic": "from text", "base": "from text"}
        labels = "real, through the VAE", made[stage]
    both = torch.stack([shown, video.cpu()], 1).flatten(0, 1)
    texts = [f"{label}: {caption}" for caption in captions for label in labels]
    contact_sheet(both, texts, run.path / "samples" / f"{stage}.png")


def vocabulary(dataset) -> list[str]:
    """Return the words of a dataset's captions, sorted."""
    captions = dataset.captions(range(min(4096, len(dataset))))
    return sorted({word for caption in captions for word in caption.lower().split()})


def train(run: Run, stages: Sequence[str], dataset, seed: int):
    """Train the stages named, and before each what it needs and the run does not have yet."""
    for stage in stages:
        missing = [need for need in run.needs(stage) if not run.has(need)]
        if missing:
            print(f"{stage} needs {' and '.join(missing)} first: training {' and '.join(missing)}")
            train(run, missing, dataset, seed)
        if isinstance(dataset, Cache) and stage in ("vae", "encoder"):
            raise UserError(f"{dataset.path} has no pixels: train {stage} on the folder of videos")
        train_stage(run, stage, dataset, seed)


def configured(args: argparse.Namespace, out: Path, cache: Cache | None) -> Config:
    """Return the configuration that the command line asks for.

    Released parts are those of the flags, else the cache's, else those the run has already.
    """
    parts = {}
    if (out / "config.json").exists():
        old = Run.open(out)
        parts = {part: getattr(old.config, part) for part in FLAGS if old.released(part)}
    if cache:
        parts |= cache.parts()
    settings = list(args.settings)
    if args.steps is not None:
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: at least 1")
        stages = STAGES[:4] if args.stage == "all" else (args.stage,)
        settings += [f"stages.{stage}.steps={args.steps}" for stage in stages]
    config = override(preset(args.preset), settings, **parts | parts_from_flags(args))
    check_weights_named(config)
    return config


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, choices=[*STAGES, "all"])
    parser.add_argument("--preset", default="paper", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="preset")
    parser.add_argument("--data", type=Path, help="folder of videos, or a cache; else the world")
    parser.add_argument("--out", type=Path, help="run folder; runs/PRESET if not given")
    parser.add_argument(
        "--steps", type=int, help="steps of each stage named, instead of the preset's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument("--fresh", action="store_true", help="train the stages named anew")
    add_part_flags(parser)
    args = parser.parse_args()
    out = args.out or Path("runs") / args.preset
    cache = Cache(args.data) if args.data and (args.data / "cache.json").exists() else None
    config = configured(args, out, cache)
    if args.data is None and args.preset == "paper":
        raise UserError("preset paper learns from real videos: give --data FOLDER (or CACHE)")
    if cache:
        cache.check(Run(out, config))
    run = Run.create(out, config)
    stages = [args.stage]
    if args.stage == "all":
        stages = [stage for stage in STAGES[:4] if not run.released(stage)]
    elif run.released(args.stage):
        raise UserError(f"--stage {args.stage}: it has released weights, nothing is to be trained")
    if args.fresh:
        for stage in stages:
            run.forget(stage)
    try:
        data = config.data
        dataset = cache or (Folder(args.data, data) if args.data else World(data, "train"))
    except ValueError as error:
        raise UserError(str(error)) from None
    train(run, stages, dataset, args.seed)


if __name__ == "__main__":
    command(main)
