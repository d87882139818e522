"""Training, one stage after the other.

    python train.py --stage all --tiny                   # from nothing to prompts, two CPU cores
    python train.py --stage latent --preset small        # one GPU
    torchrun --nproc-per-node 8 train.py --stage latent --preset small             # several
    python train.py --stage all --tiny --data FOLDER     # your own videos
    python train.py --stage latent --data FOLDER --qwen WEIGHTS --vae WEIGHTS --text WEIGHTS

SemanticGen trains the painter first (stage `latent`, Sec. 3.2), then the planner (`semantic`, Sec.
3.3). What each stage trains, and by which loss, is in stages.py; here is the one loop for all.

Everything random at a step is drawn from generators seeded by (seed, stage, step, row). So a run
that goes on equals one that never stopped, although its state holds no random numbers.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache as kept
from pathlib import Path

import torch
from torch import Tensor, nn

from chain import check_begun, check_order, check_origin, data_note
from config import PRESETS, attention_window, preset
from data import Folder, to_float
from encode import cache_parts, check_cache, clips_in_memory, clips_on_disk
from optim import ema_decay, lr_factor, update_ema
from parts import add_part_flags, check_weights_named, parts_from_flags, placed
from plumbing.cache import Cache, Memory
from plumbing.device import computing, moved, prepared_ahead, spare_processes
from plumbing.fields import add_set_flag, command_line, differences, flat_fields
from plumbing.files import UserError, check_target, command, require, to_path
from plumbing.folder import locked
from plumbing.metrics import Reporter
from plumbing.processes import Interrupt, Team, whole
from plumbing.progress import Progress
from run import HELD, Run
from sample import show_stage
from settings import STARTS, Config, StageConfig, override
from stages import ORDER, RECIPE, USES, measured, some_features, spread, work
from start import begin
from toy.world import World

LOG_EVERY = 20  # steps per line of metrics.jsonl
SAVE_EVERY = 200  # steps per training state
MEASURE_EVERY = 50  # steps between measurements of z_sem's deviation: its noise is relative to it


# --- the loop ------------------------------------------------------------------------------------


def train_stage(
    run: Run, stage: str, dataset, clips: Callable, seed: int, team: Team, board=None, anew=()
):
    """Train one stage to the end of its steps, from its saved state if there is one.

    dataset: clips as pixels; clips(): the same clips encoded, which is done when first asked for.
    anew: this stage starts over, and what is left of these goes, once nothing can be refused.
    """
    config: StageConfig = getattr(run.config.stages, stage)
    data, state = data_note(dataset), None
    if not anew:
        state = run.load_state(stage)
        check_origin(run, stage, data, seed, state)
        if run.finished(stage) and run.steps_of(stage) >= config.steps:
            team.say(f"{stage}: already trained for {run.steps_of(stage)} steps")
            return
    source = source_of(stage, config, dataset, clips)
    run.let_go()
    if run.device.type == "cuda":  # whose memory is not what Python goes by
        gc.collect()  # the learner before this one is in a circle with what saved its state
    progress = begin(run, stage, source, data, seed, state, team)
    state = None  # it is as large as all that is trained
    for old in anew if team.first else ():
        run.forget(old)
    rows = team.rows(config.batch, config.accumulate)
    team.say(
        f"{progress}, steps {progress.step} to {max(progress.step, config.steps)} of "
        f"{config.batch} clips, {run.config.dtype} on {team.size} x {run.device.type}"
    )
    reporter = Reporter(progress, run.path, team, work(run, progress, source, rows), board)
    with Interrupt() as interrupt, reporter.bar:
        for batch in batches(run, progress, source, rows):
            if stage == "latent" and progress.step % MEASURE_EVERY == 0:
                measure_plans(run, progress, source)
            progress.pending.append(one_step(run, progress, batch, team))
            progress.step += 1
            done, now = progress.step == config.steps, {"lr": lr_factor(progress.step - 1, config)}
            if stage == "latent" and (progress.step % SAVE_EVERY == 0 or done):
                now["influence"] = influence(run, progress, source, rows, team)
            reporter.after_step(now, LOG_EVERY)
            stop = team.any(interrupt.wanted)
            shown = config.preview_every and progress.step % config.preview_every == 0
            if progress.step % SAVE_EVERY == 0 or stop or done or shown:
                progress.save(run.state_file(stage), team)  # before the weights, which need it
            if stop:
                saved = f"stopped; saved {run.state_file(stage)}: the same command goes on from it"
                reporter.bar.write(f"{saved} (without --fresh)")
                sys.exit(130)
            if shown and not done:
                write_ema(run, progress, source, team)
                preview(run, stage, source, team)
    write_ema(run, progress, source, team)
    preview(run, stage, source, team)
    reporter.finish()


def source_of(stage: str, config: StageConfig, dataset: World | Folder | Cache, clips: Callable):
    """Return what a stage draws its batches from: pixels, or encoded clips."""
    if stage not in USES:
        return dataset.shorter(config.pieces)
    found = clips()
    return found.first(config.clips, USES[stage]) if isinstance(found, Memory) else found


def batches(run: Run, progress: Progress, source, rows: Sequence[range]):
    """Yield the batch of each step, from the next one on: the inputs of each of its micro-batches.

    Processes prepare the next ones while a GPU computes; on a CPU they would only be in the way.
    """

    def prepare(step: int) -> list[dict[str, Tensor]]:
        return [progress.modules.draw(source, progress.rows(part, step)) for part in rows]

    workers = 0
    if run.device.type == "cuda":
        size = sum(x.nbytes for inputs in prepare(progress.step) for x in inputs.values())
        workers = spare_processes(2 if progress.stage in USES else 8, size)  # two read enough
    yield from prepared_ahead(prepare, range(progress.step, progress.of), workers)


def one_step(run: Run, progress: Progress, batch: list[dict], team: Team) -> dict[str, float]:
    """Take one optimizer step and return its logs; skip it if it would not be finite.

    UserError after PATIENCE skipped ones in a row.
    """
    config: StageConfig = getattr(run.config.stages, progress.stage)
    logs: dict[str, list[Tensor]] = {}
    for k, inputs in enumerate(batch):
        team.sync(progress.wrapped, k == len(batch) - 1)
        with computing(run.device, run.config.dtype):
            loss, found = progress.wrapped(**moved(inputs, run.device))
        with computing(run.device, "float32"):  # recomputation needs the same attention kernels
            (loss / len(batch)).backward()
        for name, x in {"loss": loss.detach(), **found}.items():
            logs.setdefault(name, []).append(x.float().flatten())
    norm = whole(nn.utils.clip_grad_norm_(progress.parameters, config.grad_clip))
    logs["grad_norm"] = [norm.detach().float().flatten()]
    values = team.mean({name: torch.cat(x) for name, x in logs.items()})  # waits for the device
    good = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    for optimizer in progress.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(progress.step, config)
        if good:
            with computing(run.device, run.config.dtype):  # Muon multiplies matrices, too
                optimizer.step()
        optimizer.zero_grad()
    if not good:
        return progress.skip(batch, values)
    progress.bad = 0
    update_ema(progress.ema, progress.modules, ema_decay(progress.step, config))
    return values


def measure_plans(run: Run, progress: Progress, source):
    """Give the compressor the statistics of the z_sem that it makes at this moment of training.

    Every process measures the same features: how a batch is shared does not matter.
    """
    compressor = progress.modules["compressor"]
    weights = {f"compressor.{name}": whole(x) for name, x in compressor.state_dict().items()}
    found = measured(run.config, progress.stage, weights, some_features(run, source, 2**15))
    for name, statistic in compressor.named_buffers():
        statistic.copy_(found[f"compressor.{name}"])


@torch.no_grad()
def influence(run: Run, progress: Progress, source, rows: Sequence[range], team: Team) -> float:
    """Return by how much the loss rises where each clip is shown another one's plan.

    The clips and the noise are those of the step just done; the other clip is the next row's. Near
    0 the painter does not listen: its text drowns the plan out.
    """
    found: list[Tensor] = []
    for part in rows:
        inputs, others = (
            progress.modules.draw(source, progress.rows(range(a, b), progress.step - 1))
            for a, b in ((part.start, part.stop), (part.start + 1, part.stop + 1))
        )
        shown = progress.rows(part, progress.step - 1).indices(progress.clips)
        inputs["text"] = source.text(shown)  # none dropped, nor any plan
        inputs["keep_context"] = torch.ones(len(part), dtype=torch.bool)
        shuffled = {**inputs, **{name: others[name] for name in ("features", "plan_noise")}}
        with computing(run.device, run.config.dtype):
            right, wrong = (
                progress.wrapped(**moved(x, run.device))[1]["flow"] for x in (inputs, shuffled)
            )
        found.append((wrong - right).flatten())
    return round(team.mean({"influence": torch.cat(found)})["influence"], 6)


# --- what a stage leaves behind ------------------------------------------------------------------


def write_ema(run: Run, progress: Progress, source, team: Team):
    """Write the EMA weights, with the statistics by which later stages normalise.

    They are measured here: EMA weights make other latents and plans than the weights in training.
    """
    stage, ema = progress.stage, progress.whole_ema(team)
    if team.first:
        tensors = {name: x for name, x in ema.items() if name.split(".")[0] in HELD[stage]}
        if stage == "vae":
            video = to_float(source.batch(spread(source, 512)).video)
            tensors = measured(run.config, stage, tensors, video.to(run.device))
        if stage == "latent":
            tensors = measured(run.config, stage, tensors, some_features(run, source, 2**16))
        note = {x: getattr(progress, x) for x in ("of", "seed", "data")} | {"steps": progress.step}
        run.save(stage, tensors, {**note, "seconds": round(progress.seconds)})
    team.wait()
    run.let_go()


def preview(run: Run, stage: str, source, team: Team):
    """Write samples/STAGE.png; not with a released VAE, whose samples take long."""
    if team.first and stage != "encoder" and not run.released("vae"):
        show_stage(run, stage, source)
        run.let_go()
    team.wait()


# --- the command ---------------------------------------------------------------------------------


def train(run: Run, stages: Sequence[str], dataset, seed: int, team=None, board=None, fresh=False):
    """Train the stages named, and before each what it needs and the run does not have yet.

    fresh: they start over, and what was trained on them is removed.
    """
    team = team or Team()

    @kept
    def clips():
        """Return the clips as the frozen parts encode them: computed once for all stages.

        A folder's go to a cache in the run's own folder first.
        """
        if isinstance(dataset, World):
            return clips_in_memory(run, dataset)
        if isinstance(dataset, Folder):
            return clips_on_disk(run, dataset.path, run.path / "cache", team)
        return dataset

    anew = tuple(stages) if fresh else ()
    check_order(run, () if fresh else stages, team.say)
    for stage in stages:
        # A folder is encoded into one cache for all stages: VAE and encoder have to be there.
        caching = stage in USES and isinstance(dataset, Folder)
        encoders = [x for x in ("vae", "encoder") if caching and not run.released(x)]
        needs = dict.fromkeys((*encoders, *run.needs(stage)))
        if missing := [need for need in needs if not run.finished(need)]:
            team.say("{0} needs {1} first: training {1}".format(stage, " and ".join(missing)))
        for each in (*missing, stage):
            train_stage(run, each, dataset, clips, seed, team, board, anew if each == stage else ())
        anew = ()  # with the first of them all were forgotten


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--stage", required=True, choices=[*ORDER, "all"])
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--preset", help=f"{', '.join(PRESETS)}; else the run's own, or paper")
    one.add_argument("--tiny", action="store_const", const="tiny", dest="preset")
    one.add_argument("--tiny-long", action="store_const", const="tiny_long", dest="preset")
    parser.add_argument("--data", type=to_path, help="folder of videos, or a cache; else the world")
    parser.add_argument("--out", type=to_path, help="run folder; runs/PRESET if not given")
    steps = "of each stage named, and of the base with --start base; else the preset's"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--seed", type=int, default=0, help="of weights, clips, noise")
    add_set_flag(parser)
    attention = "of painter and base, over time; the preset's if not given (Base-CT-Swin: swin)"
    start = "of planner and painter: from nothing, or from the run's base, trained first"
    parser.add_argument("--start", choices=STARTS, help=start)
    parser.add_argument("--attention", choices=["full", "swin"], help=attention)
    fresh = "train the stages named anew; what was trained on them is removed, too"
    parser.add_argument("--fresh", action="store_true", help=fresh)
    parser.add_argument("--shard", action="store_true", help="FSDP2: weights in shares")
    parser.add_argument("--tensorboard", action="store_true", help="metrics for TensorBoard too")
    add_part_flags(parser)
    args = parser.parse_args()
    if args.preset is None and not (args.out and (args.out / "config.json").exists()):
        args.preset = "paper"
    args.out = args.out or Path("runs") / args.preset
    if not abs(args.seed) < 2**63:
        raise UserError(f"--seed {args.seed}: at most 63 bits")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1")
    check_target(args.out, folder=True)
    return args


def configured(args: argparse.Namespace, cache: Cache | None) -> Config:
    """Return the configuration that the command line asks for.

    Released parts are those of the flags, else the cache's, else those that a run of the same
    preset has already. Of a cache sizes and rates of the clips are taken, too.
    """
    parts = {}
    if (args.out / "config.json").exists():
        old = Run.open(args.out)
        parts = old.released_parts if args.preset in (None, old.config.preset) else {}
    if cache:
        parts |= cache_parts(cache)
    settings = list(args.settings)
    if args.steps is not None:
        stages = RECIPE if args.stage == "all" else (args.stage,)
        stages = (*stages, "base") if args.start == "base" else stages
        settings += [f"stages.{stage}.steps={args.steps}" for stage in stages]
    chosen = old.config if args.preset is None else preset(args.preset)
    config = override(chosen, settings, **placed(chosen, parts | parts_from_flags(args)))
    if args.start:
        config = replace(config, start=args.start)
    if args.attention:
        window = None if args.attention == "full" else attention_window(config)
        config = replace(config, latent=replace(config.latent, window=window))
    check_weights_named(config, start=True)
    if args.data is None and config.preset in ("paper", "wan"):
        raise UserError(f"preset {config.preset} learns from videos: give --data FOLDER (or CACHE)")
    return config


def named_stages(args: argparse.Namespace, run: Run, team: Team) -> list[str]:
    """Return the stages to train; UserError if one has nothing to train, or cannot be shared."""
    stages = [args.stage]
    if args.stage == "all":
        stages = [stage for stage in RECIPE if not run.released(stage)]
    elif run.released(args.stage):
        raise UserError(f"--stage {args.stage}: it has released weights, nothing is to be trained")
    for stage in stages:
        config: StageConfig = getattr(run.config.stages, stage)
        team.rows(config.batch, config.accumulate)
    return stages


def open_data(args: argparse.Namespace, run: Run, cache: Cache | None, stages: Sequence[str]):
    """Return the dataset that the command line names; UserError if it cannot be used."""
    if cache:
        if pixels := [stage for stage in stages if stage in ("vae", "encoder")]:
            raise UserError(f"{args.data} has no pixels: train {pixels[0]} on the folder of videos")
        check_cache(cache, run)
        return cache
    return Folder(args.data, run.config.data) if args.data else World(run.config.data, "train")


def main():
    args, board = arguments(), None
    cache = Cache(args.data) if args.data and (args.data / "cache.json").exists() else None
    run, team = Run(args.out, configured(args, cache)), Team(args.shard)
    if cache and args.preset:
        usual, found = preset(args.preset).data, run.config.data
        if told := differences(flat_fields(usual), flat_fields(found)):
            team.say(f"{args.data} was not made as preset {args.preset}: {', '.join(told)}")
    stages = named_stages(args, run, team)
    dataset = open_data(args, run, cache, stages)
    if isinstance(dataset, Folder) and team.first:
        dataset.check()
    check_begun(run, () if args.fresh else stages, data_note(dataset), args.seed)
    if args.tensorboard:
        require("tensorboard", "tensorboard")
    # Most of what can be refused was refused above: up to here nothing was written.
    with locked(args.out) if team.first else nullcontext():
        if team.first:
            Run.create(args.out, run.config)
        team.wait()
        run = Run.open(args.out)
        run.device = team.device(run.device)
        if args.tensorboard and team.first:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(args.out / "tensorboard"))
        train(run, stages, dataset, args.seed, team, board, args.fresh)
    if "semantic" in stages:
        team.say(f"done; now: python sample.py --run {args.out}")
    team.leave()


if __name__ == "__main__":
    command(main)
