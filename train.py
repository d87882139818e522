"""Training, one stage after the other.

    python train.py --stage all --tiny                   # from nothing to prompts, two CPU cores
    python train.py --stage latent --preset small        # one GPU
    torchrun --nproc-per-node 8 train.py --stage latent --preset small             # several
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from config import PRESETS, STAGES, Config, StageConfig, override, preset
from data import Folder, to_float, to_uint8
from plumbing.cache import Cache, Memory
from plumbing.device import computing, matmul_speed
from plumbing.files import UserError, check_target, command, require
from plumbing.metrics import Metrics
from plumbing.processes import Team, get_state, local, set_state, shared_like, whole
from plumbing.seeds import piece_seed
from plumbing.sheet import contact_sheet
from prepare import cache_parts, check_cache, clips_in_memory, clips_on_disk
from run import FLAGS, Run, add_part_flags, check_weights_named, parts_from_flags
from stages import stage_loss
from swin import fitting_window
from toy.world import World

LOG_EVERY = 20  # steps per line of metrics.jsonl
SAVE_EVERY = 200  # steps per training state
MEASURE_EVERY = 50  # steps between measurements of z_sem's deviation, which the painter's noise has
PATIENCE = 5  # steps in a row that may be skipped for a loss or gradient that is not finite


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the source of all that is random at one step of one stage."""
    return torch.Generator().manual_seed(piece_seed(f"{seed} {stage} {step}") % 2**63)


def encoded(
    run: Run, dataset: World | Folder | Cache, clips: int, team: Team | None = None
) -> Memory | Cache:
    """Return the clips as the frozen parts encode them: computed once, not again in each step.

    A folder's go to a cache in the run's own folder first; of the world the first `clips` are used.
    """
    if isinstance(dataset, World):
        return clips_in_memory(run, dataset).first(min(clips, len(dataset)))
    if isinstance(dataset, Folder):
        dataset = clips_on_disk(run, dataset.path, run.path / "cache", team or Team())
    check_cache(dataset, run)
    return dataset


def shorter(dataset: World | Folder, pieces: int) -> World | Folder:
    """Return the same world, or folder, in clips of a part of the length."""
    data = dataset.config
    if data.frames % pieces:
        raise UserError(f"pieces={pieces}: clips of {data.frames} frames do not divide by it")
    data = replace(data, frames=data.frames // pieces, events=max(1, data.events // pieces))
    if isinstance(dataset, Folder):
        return Folder(dataset.path, data, dataset.warn)
    return type(dataset)(data, dataset.split)


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


class Progress:
    """Where a stage is, and what it has by then: all that a training state holds."""

    def __init__(self, run: Run, stage: str, losses: nn.Module, seed: int):
        self.run, self.stage, self.losses, self.seed = run, stage, losses, seed
        self.config: StageConfig = getattr(run.config.stages, stage)
        self.ema = {name: x.detach().clone() for name, x in losses.state_dict().items()}
        self.optimizers = build_optimizers(losses, self.config)
        self.step = self.bad = 0  # steps done; of these the last so many were skipped
        self.seconds = 0.0  # of training, over all sittings
        self.pending: list[dict] = []  # logs of steps that have no line in metrics.jsonl yet

    def save(self, team: Team):
        """Write a state; the old one stays until the new one is complete."""
        state = get_state(self.losses, self.optimizers)
        state["ema"] = {name: whole(x).cpu() for name, x in self.ema.items()}
        for name in ("step", "bad", "seconds", "seed", "pending"):
            state[name] = getattr(self, name)
        if team.first:
            self.run.save_state(self.stage, state)

    def load(self, state: dict):
        """Go on from a saved state; UserError if it does not fit."""
        try:
            began_with = state["seed"]
            self.step, self.bad = int(state["step"]), int(state["bad"])
            self.seconds, self.pending = float(state["seconds"]), list(state["pending"])
            if not 0 <= self.bad <= self.step or not 0 <= self.seconds < math.inf:
                raise ValueError(f"step {self.step}, {self.bad} skipped, {self.seconds} s")
            if not all(isinstance(x, float) for logs in self.pending for x in logs.values()):
                raise ValueError("its logs are no numbers")
            if state["modules"].keys() != self.ema.keys() or not state["optimizers"]["state"]:
                raise ValueError("it has other weights")
            set_state(self.losses, self.optimizers, state)
            for name, x in self.ema.items():
                if state["ema"][name].shape != x.shape:
                    raise ValueError(f"its {name} has another shape")
                local(x).copy_(local(shared_like(state["ema"][name], x)))
        except (
            LookupError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            AssertionError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(
                f"{self.run.state_file(self.stage)} does not fit this run ({reason}): "
                "--fresh starts over"
            ) from None
        if began_with != self.seed:
            raise UserError(
                f"{self.run.path} was begun with --seed {began_with}: give it, or --fresh"
            )


# --- the loop ------------------------------------------------------------------------------------


def train_stage(run: Run, stage: str, dataset, seed: int, team: Team | None = None):
    """Train one stage to the end of its steps, from its saved state if there is one."""
    config: StageConfig = getattr(run.config.stages, stage)
    team = team or Team()
    if run.has(stage) and run.steps_of(stage) >= config.steps:
        if team.first:
            print(f"{stage}: already trained for {run.steps_of(stage)} steps")
        return
    rows = team.rows(config.batch, config.accumulate)
    state = run.load_state(stage)  # what cannot be read is refused before anything is computed
    clips = None
    if stage not in ("vae", "encoder"):
        clips = encoded(run, dataset, config.clips, team)
    elif config.pieces > 1:
        dataset = shorter(dataset, config.pieces)
    torch.manual_seed(piece_seed(f"{seed} {stage}") % 2**63)  # initial weights
    losses = stage_loss(run, stage, dataset, clips)
    if stage == "latent":
        features = clips.features(range(enough(clips, 2**15)))
        losses["compressor"].set_feature_statistics(features.to(run.device))
    flops = count_flops(run, losses, step_generator(seed, stage, 0), rows)
    prepare(losses, config)
    wrapped = team.wrap(losses, run.device)
    progress = Progress(run, stage, losses, seed)
    if state:
        progress.load(state)
    parameters = [p for p in losses.parameters() if p.requires_grad]
    if team.first:
        print(
            f"{stage}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, steps "
            f"{progress.step} to {config.steps} of {config.batch} clips, {run.config.dtype} on "
            f"{team.size} x {run.device.type}"
        )
    metrics = None
    if team.first:
        metrics = Metrics(run, stage, progress.step, progress.pending)
    peak = matmul_speed(run.device, run.config.dtype)
    speed = {"clips_s": config.batch, "tokens_s": config.batch * losses.tokens, "mfu": flops / peak}

    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc=stage,
        unit="step",
        dynamic_ncols=True,
        disable=not team.first,
    )
    lap = time.perf_counter()  # the last time that was counted, and the steps since
    with Interrupt() as interrupt, bar:
        while progress.step < config.steps:
            start = time.perf_counter()
            if stage == "latent" and progress.step % MEASURE_EVERY == 0:
                measure_plans(run, losses, features)
            values = one_step(progress, wrapped, parameters, rows, team)
            progress.step += 1
            progress.seconds += time.perf_counter() - start
            progress.pending.append(values)
            last = progress.step == config.steps
            if progress.step % LOG_EVERY == 0 or last:
                if team.first:
                    each = (time.perf_counter() - lap) / len(progress.pending)
                    line = metrics.write(
                        progress.step,
                        {"lr": lr_factor(progress.step - 1, config)},
                        {"seconds": progress.seconds} | {k: v / each for k, v in speed.items()},
                    )
                    bar.set_postfix(
                        loss=f"{line.get('loss', math.nan):.4f}", clips_s=f"{line['clips_s']:.0f}"
                    )
                    if line.get("active_channels") == 0 and progress.step > config.warmup:
                        bar.write(
                            f"warning: step {progress.step}: the plan has died (KL is 0); lower "
                            "kl_weight"
                        )
                progress.pending.clear()
                lap = time.perf_counter()
            bar.update()
            stop = team.any(interrupt.wanted)
            if progress.step % SAVE_EVERY == 0 or stop:
                progress.save(team)
            if stop:
                bar.write(
                    f"stopped; saved {run.state_file(stage)}: the same command goes on from it"
                )
                sys.exit(130)
            if config.preview_every and progress.step % config.preview_every == 0 and not last:
                finish(progress, dataset, clips, team)
    progress.save(team)  # before the weights: once they are there, the stage is done
    finish(progress, dataset, clips, team)
    if team.first:
        metrics.plot()
    team.wait()


def one_step(
    progress: Progress,
    wrapped: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[slice],
    team: Team,
) -> dict[str, float]:
    """Take one optimizer step and return its logs; skip it if it would not be finite.

    UserError after PATIENCE skipped ones in a row.
    """
    run, config, losses = progress.run, progress.config, progress.losses
    logs: dict[str, list[Tensor]] = {}
    seen = []  # the times of the batch, for the message if it cannot be used
    for k, piece in enumerate(rows):
        inputs = losses.draw(step_generator(progress.seed, progress.stage, progress.step), piece)
        seen += inputs["t"].tolist() if "t" in inputs else []
        team.sync(wrapped, k == len(rows) - 1)
        with computing(run.device, run.config.dtype):
            loss, found = wrapped(**inputs)
        (loss / len(rows)).backward()
        for name, x in {"loss": loss.detach(), **found}.items():
            logs.setdefault(name, []).append(x.float().flatten())
    norm = whole(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
    values = team.mean({name: torch.cat(x) for name, x in logs.items()})
    values["grad_norm"] = float(norm)
    factor = lr_factor(progress.step, config)
    good = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    for optimizer in progress.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if good:
            optimizer.step()
        optimizer.zero_grad()
    if good:
        progress.bad = 0
        update_ema(progress.ema, losses, ema_decay(progress.step, config))
        return values
    progress.bad += 1
    if progress.bad >= PATIENCE:
        rng = step_generator(progress.seed, progress.stage, progress.step)
        indices = losses.indices(rng).tolist()
        at = f"; t from {min(seen):.3f} to {max(seen):.3f}" if seen else ""
        raise UserError(
            f"{progress.stage}: loss {values['loss']} and gradient {values['grad_norm']} in "
            f"{progress.bad} steps in a row, the last at step {progress.step + 1}{at}; clips "
            f"{indices[:8]} ...; lower lr or muon_lr, the last saved state is intact"
        )
    return {"skipped": 1.0}


def measure_plans(run: Run, losses: nn.ModuleDict, features: Tensor):
    """Give the compressor the statistics of the z_sem that it makes at this moment of training.

    On the same features in every process, so that they do not depend on how a batch is shared.
    """
    weights = {name: whole(x) for name, x in losses["compressor"].state_dict().items()}
    with torch.random.fork_rng():
        copy = run.build("latent")["compressor"].to(run.device)
    copy.load_state_dict(weights)
    copy.set_statistics(features.to(run.device))
    for name, statistic in losses["compressor"].named_buffers():
        statistic.copy_(copy.get_buffer(name))


def prepare(losses: nn.ModuleDict, config: StageConfig):
    """Compile what is expensive and switch on recomputation, as the stage's configuration asks."""
    networks = [losses[name] for name in ("dit", "encoder") if name in losses]
    if "vae" in losses:
        networks = [losses["vae"].encoder, losses["vae"].decoder]
    for network in networks:
        if config.checkpoint and hasattr(network, "checkpoint"):
            network.checkpoint = True
        if config.compile:
            network.compile()


def count_flops(run: Run, losses: nn.Module, rng: torch.Generator, rows: Sequence[slice]) -> float:
    """Return this process's floating-point operations in one step, forward and backward, counted.

    Of matrix products, attention and convolutions; recomputation is not counted.
    """
    inputs = losses.draw(rng, rows[0])
    with FlopCounterMode(display=False) as counter, computing(run.device, run.config.dtype):
        losses(**inputs)[0].backward()
    losses.zero_grad(set_to_none=True)
    return counter.get_total_flops() * len(rows)


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], losses: nn.Module, decay: float):
    """ema <- decay ema + (1 - decay) weights, in place."""
    parameters = dict(losses.named_parameters())
    torch._foreach_lerp_(
        [local(ema[name]) for name in parameters],
        [local(p) for p in parameters.values()],
        1 - decay,
    )


def finish(progress: Progress, dataset, clips: Memory | Cache | None, team: Team):
    """Measure what later stages need, write the EMA weights and a preview."""
    run, stage = progress.run, progress.stage
    ema = {name: whole(x) for name, x in progress.ema.items()}
    ema = {name: x for name, x in ema.items() if not name.startswith("captioner.")}
    if team.first:
        with torch.random.fork_rng():
            modules = run.build(stage).to(run.device).eval()
        modules.load_state_dict(ema)
        if stage == "vae":
            some = dataset.batch(range(min(512, len(dataset))))
            modules["vae"].set_statistics(to_float(some.video).to(run.device))
        if stage == "latent":
            features = clips.features(range(enough(clips, 2**16)))
            modules["compressor"].set_statistics(features.to(run.device))
        note = {"steps": str(progress.step), "seconds": f"{progress.seconds:.0f}"}
        run.save(stage, modules.state_dict(), note)
        if stage != "encoder":
            run.unload()
            preview(run, stage, dataset, clips)
    team.wait()
    run.unload()


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
    source = dataset if stage == "vae" else clips
    indices = range(min(6, len(source)))
    captions = source.captions(indices)
    if stage == "vae":
        shown = dataset.batch(indices).video
        video = to_uint8(run.vae.decode(run.vae.encode(to_float(shown).to(run.device))))
        labels = "real", "through the VAE"
    else:
        if isinstance(clips, Cache):
            latents, _ = clips.latents(indices)
        else:  # of the world, which would encode all of its clips for these few
            latents = run.vae.encode(to_float(dataset.batch(indices).video).to(run.device))
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


def train(run: Run, stages: Sequence[str], dataset, seed: int, team: Team | None = None):
    """Train the stages named, and before each what it needs and the run does not have yet."""
    team = team or Team()
    for stage in stages:
        missing = [need for need in run.needs(stage) if not run.has(need)]
        if missing:
            names = " and ".join(missing)
            if team.first:
                print(f"{stage} needs {names} first: training {names}")
            train(run, missing, dataset, seed, team)
        if isinstance(dataset, Cache) and stage in ("vae", "encoder"):
            raise UserError(f"{dataset.path} has no pixels: train {stage} on the folder of videos")
        train_stage(run, stage, dataset, seed, team)


def configured(args: argparse.Namespace, out: Path, cache: Cache | None) -> Config:
    """Return the configuration that the command line asks for.

    Released parts are those of the flags, else the cache's, else those the run has already.
    """
    parts = {}
    if (out / "config.json").exists():
        old = Run.open(out)
        parts = {part: getattr(old.config, part) for part in FLAGS if old.released(part)}
    if cache:
        parts |= cache_parts(cache)
    settings = list(args.settings)
    if args.steps is not None:
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: at least 1")
        stages = STAGES[:4] if args.stage == "all" else (args.stage,)
        settings += [f"stages.{stage}.steps={args.steps}" for stage in stages]
    config = override(preset(args.preset), settings, **parts | parts_from_flags(args))
    if args.attention:
        window = None if args.attention == "full" else attention_window(config)
        config = replace(config, latent=replace(config.latent, window=window))
    check_weights_named(config)
    return config


def attention_window(config: Config) -> float:
    """Return the painter's T_w in seconds; a quarter of the clip where there is none yet."""
    rates = config.latent.rate, config.latent.context_rate
    return config.latent.window or float(fitting_window(rates, config.data.seconds / 4))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, choices=[*STAGES, "all"])
    parser.add_argument("--preset", default="paper", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="preset")
    parser.add_argument("--tiny-long", action="store_const", const="tiny_long", dest="preset")
    parser.add_argument("--data", type=Path, help="folder of videos, or a cache; else the world")
    parser.add_argument("--out", type=Path, help="run folder; runs/PRESET if not given")
    parser.add_argument(
        "--steps", type=int, help="steps of each stage named, instead of the preset's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument(
        "--attention",
        choices=["full", "swin"],
        help="of painter and base, over time; the preset's if not given (Base-CT-Swin: swin)",
    )
    parser.add_argument("--fresh", action="store_true", help="train the stages named anew")
    parser.add_argument("--shard", action="store_true", help="FSDP2: weights in shares")
    parser.add_argument("--tensorboard", action="store_true", help="metrics for TensorBoard too")
    add_part_flags(parser)
    args = parser.parse_args()
    out = args.out or Path("runs") / args.preset
    if not abs(args.seed) < 2**63:
        raise UserError(f"--seed {args.seed}: at most 63 bits")
    check_target(out, folder=True)
    cache = Cache(args.data) if args.data and (args.data / "cache.json").exists() else None
    config = configured(args, out, cache)
    if args.data is None and args.preset == "paper":
        raise UserError("preset paper learns from real videos: give --data FOLDER (or CACHE)")
    run, team = Run(out, config), Team(args.shard)
    stages = [args.stage]
    if args.stage == "all":
        stages = [stage for stage in STAGES[:4] if not run.released(stage)]
    elif run.released(args.stage):
        raise UserError(f"--stage {args.stage}: it has released weights, nothing is to be trained")
    for stage in stages:
        stage_config: StageConfig = getattr(config.stages, stage)
        team.rows(stage_config.batch, stage_config.accumulate)  # or say now that it cannot be
    if cache:
        if pixels := [stage for stage in stages if stage in ("vae", "encoder")]:
            raise UserError(f"{args.data} has no pixels: train {pixels[0]} on the folder of videos")
        check_cache(cache, run)
    try:
        data = config.data
        dataset = cache or (Folder(args.data, data) if args.data else World(data, "train"))
    except ValueError as error:
        raise UserError(str(error)) from None
    if isinstance(dataset, Folder) and team.first:
        dataset.check()
    if args.tensorboard:
        require("tensorboard", "tensorboard")
    if team.first:  # all that can be refused has been by now: nothing was made or forgotten
        run = Run.create(out, config)
    team.wait()
    run = Run.open(out)
    if run.device.type == "cuda":
        run.device = torch.device("cuda", team.local_rank)
        torch.cuda.set_device(run.device)
    if args.fresh and team.first:
        for stage in stages:
            run.forget(stage)
    team.wait()
    if args.tensorboard and team.first:
        from torch.utils.tensorboard import SummaryWriter

        run.board = SummaryWriter(str(out / "tensorboard"))
    train(run, stages, dataset, args.seed, team)
    team.leave()


if __name__ == "__main__":
    command(main)
