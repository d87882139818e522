"""Sampling: text (or a reference video) to video files.

SemanticGen Fig. 3c: text -> planner -> z_sem -> painter (with the text again) -> VAE decoder. With
a reference (Fig. 4), z_sem comes from a real video through encoder and compressor instead.

    python sample.py                                            # shipped weights, a default prompt
    python sample.py "a red circle moves left" --run runs/tiny --seed 1 --out samples/red.webp
    python sample.py --reference clip.mp4

Every sample has its own noise, fixed by seed and prompt: it does not depend on what else is drawn.
Networks compute in the run's dtype, the solver in float32.
"""

import argparse
import functools
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data import reference_clip, to_float, to_uint8
from flags import add_run_flags, encode_prompts, frames_of, open_run, options_of
from flow import euler, guidance_weights
from parts import computes
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command, require, to_path
from plumbing.seeds import draw_noise, text_seed
from plumbing.sheet import contact_sheet, picked, shown_frames
from plumbing.video import write_video
from run import Run
from stages import RECIPE

PROMPTS = ("a red circle moves left and a blue square grows",)  # where the user names none
SUFFIXES = (".gif", ".webp", ".png", ".mp4")


def guided(dit: nn.Module, text: Tensor, guidance: float, context=None, context_guidance=1.0):
    """Return velocity(z, t) with guidance, first towards the plan, if any, then the text.

    text: (B, L, dim), or (2, B, L, dim), the second in place of the null text; context: (B, K, S,
    hs, ws). Only velocities of a weight are computed, as one batch. context_guidance None: the plan
    is dropped, with the text and without.
    """
    text, null = text if text.ndim == 4 else (text, torch.zeros_like(text))
    if context is None or context_guidance is None:
        keep, scales = [(False, False), (True, False)], (guidance,)  # (text, context)
    else:
        keep = [(False, False), (False, True), (True, True)]
        scales = (context_guidance, guidance)
    weights = guidance_weights(*scales)
    used = [(weight, *kept) for weight, kept in zip(weights, keep, strict=True) if weight]
    n, texts = len(used), torch.cat([text if told else null for _, told, _ in used])
    conditions = {}
    if context is not None:
        kept = torch.tensor([plan for *_, plan in used], device=context.device)
        conditions["context"] = context.repeat(n, 1, 1, 1, 1)
        conditions["keep_context"] = kept.repeat_interleave(len(context))

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        out = dit(z.repeat(n, 1, 1, 1, 1), t.repeat(n), texts, **conditions).float()
        return sum(w * v for (w, *_), v in zip(used, out.chunk(n), strict=True))

    return velocity


def computed_by(part: str) -> Callable:
    """Let a function, whose first argument is a run, compute as a part of it, without gradients."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def computed(run: Run, *args, **kwargs):
            with torch.no_grad(), computes(run, part):
                return function(run, *args, **kwargs)

        return computed

    return decorate


@computed_by("planner")
def sample_plans(run: Run, text: Tensor, seeds: Sequence[int], frames=None, options=None) -> Tensor:
    """Stage 1: text (B, L, dim) -> z_sem (B, K, S, hs, ws).

    frames (of the video) and options (SampleConfig) are the run's if not given, here and below.
    """
    config, options = run.config, options or run.config.sample
    velocity = guided(run.planner, text.to(run.device), options.guidance)
    shape = config.compressor.channels, *config.plan_grid(frames)
    noise = draw_noise(seeds, shape, run.device)
    plans = euler(velocity, noise, options.steps, config.stages.semantic.shift)
    return run.compressor.denormalise(plans)


@computed_by("painter")
def paint_latents(
    run: Run, text: Tensor, seeds: Sequence[int], plans: Tensor | None, frames=None, options=None
) -> Tensor:
    """Stage 2: text and z_sem (B, K, S, hs, ws) -> VAE latents (B, C, T, h, w).

    plans None: the base model, which knows no plans.
    """
    config, options, text = run.config, options or run.config.sample, text.to(run.device)
    if plans is None:
        velocity, stage = guided(run.base, text, options.base_guidance), config.stages.base
    else:
        scales = options.latent_guidance, plans, options.context_guidance
        velocity, stage = guided(run.painter, text, *scales), config.stages.latent
    # Other seeds than the plan's noise has: the two must not be correlated. Torch's CPU generator
    # reads the lower 32 bits of a seed alone, so an offset would have to lie in these.
    seeds = [text_seed(f"paint {seed}") % 2**32 for seed in seeds]
    noise = draw_noise(seeds, (config.vae.channels, *config.latent_grid(frames)), run.device)
    return euler(velocity, noise, options.steps, stage.shift)


@computed_by("vae")
def decode(run: Run, latents: Tensor) -> Tensor:
    """VAE latents (B, C, T, h, w) -> video (B, 3, F, H, W) uint8."""
    return to_uint8(run.vae.decode(latents.to(run.device)))


@computed_by("vae")
def through_vae(run: Run, video: Tensor) -> Tensor:
    """Real video (B, 3, F, H, W) uint8 to latents and back: what no sample can surpass."""
    return decode(run, run.vae.encode(to_float(video).to(run.device)))


@computed_by("compressor")
def reference_plans(run: Run, semantic_video: Tensor) -> Tensor:
    """Return the z_sem of real videos (Fig. 4): (B, 3, F, H, W) uint8 at the low rate."""
    with computes(run, "encoder"):  # as it encodes the world for training
        features = run.encoder.encode(to_float(semantic_video).to(run.device))
    return run.compressor.encode(features)


def paint(run: Run, *args, **options) -> Tensor:
    """Stage 2 and the VAE: the arguments of `paint_latents` -> video (B, 3, F, H, W) uint8."""
    return decode(run, paint_latents(run, *args, **options))


def generate(run: Run, prompts: Sequence[str], seeds: Sequence[int], frames=None, options=None):
    """Both stages and the VAE: prompts, each with a seed -> video (B, 3, F, H, W) uint8."""
    text = run.text.encode(prompts)
    plans = sample_plans(run, text, seeds, frames, options)
    return paint(run, text, seeds, plans, frames, options)


def prompt_seed(seed: int, prompt: str) -> int:
    """Return the seed of one sample, a function of the user's seed and of the prompt alone."""
    return text_seed(f"{seed} {prompt}") % 2**32


@computed_by("painter")
def show_stage(run: Run, stage: str, source):
    """Write samples/STAGE.png: what a stage does with a few clips.

    source: what the stage draws from, pixels or encoded clips.
    """
    indices = range(min(6, len(source)))
    captions = source.captions(indices)
    if stage == "vae":
        real = source.batch(indices).video
        rows = {"real": real, "through the VAE": through_vae(run, real)}
    else:
        text, plans, label = run.text.encode(captions), None, "from text"
        if stage == "semantic":
            plans = sample_plans(run, text, indices)
        if stage == "latent":
            plans = run.compressor.encode(source.features(indices).to(run.device))
            label = "painted from its plan"
        rows = {"real, through the VAE": decode(run, source.latents(indices)[0])}
        rows[label] = paint(run, text, indices, plans)
    videos = torch.stack([x.cpu() for x in rows.values()], 1).flatten(0, 1)
    labels = [f"{label}: {caption}" for caption in captions for label in rows]
    contact_sheet(videos, labels, run.path / "samples" / f"{stage}.png")


# --- the command --------------------------------------------------------------------------------


def written(out: Path, videos: int) -> list[Path]:
    """Return the files that --out stands for: an animation for each video, if any, and a sheet."""
    names = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(videos)] if videos > 1 else [out]
    return [*(names if out.suffix != ".png" else ()), out.with_suffix(".png")]


def arguments() -> argparse.Namespace:
    """Read the command line; UserError for what cannot be, before anything is loaded."""
    parser = command_line(__doc__)
    parser.add_argument("prompts", nargs="*", metavar="prompt")
    parser.add_argument("--reference", type=to_path, help="a video, whose plan is used")
    parser.add_argument("--base", action="store_true", help="the base model, which has no plan")
    how = "one; or two: planner, painter; or three: planner, painter's text, painter's plan"
    parser.add_argument("--negative", help="a text to lead away from, in place of the null text")
    parser.add_argument("--guidance", type=float, nargs="+", default=(), metavar="G", help=how)
    parser.add_argument("--out", type=Path, default="samples/sample.webp", help=", ".join(SUFFIXES))
    add_run_flags(parser)
    args = parser.parse_args()
    if args.out.suffix not in SUFFIXES:
        raise UserError(f"--out {args.out}: the name must end in {', '.join(SUFFIXES)}")
    for name in written(args.out, max(1, len(args.prompts))):
        check_target(name)
        place = name.resolve()  # a reference may be a folder of images
        if (film := args.reference) and film.exists() and film.resolve() in (place, place.parent):
            raise UserError(f"--out {args.out}: the reference {film} would be lost or changed")
    if args.reference and (args.base or args.seconds is not None):
        raise UserError("--reference: its plan has its own length, and the base knows no plans")
    if any(not prompt.strip() for prompt in args.prompts):
        raise UserError("a prompt is empty: leave it out for the default prompt")
    if args.out.suffix == ".mp4":
        require("av", "video")
    return args


@computed_by("vae")
def write_sample(run: Run, latents: Tensor, frames: int, file: Path | None) -> Tensor:
    """Decode one sample into a file, if any, piece by piece; return what a sheet shows of it."""
    kept: list[Tensor] = []
    pieces = (to_uint8(x)[0].cpu() for x in run.vae.decode_pieces(latents.to(run.device)))
    pieces = picked(pieces, shown_frames(frames), kept)
    if file:
        write_video(file, pieces, run.config.data.fps)
        print(file)
    deque(pieces, 0)  # those that no file asked for
    return torch.stack(kept, 1)


def main():
    args = arguments()
    used = ("base",) if args.base else ("encoder", "latent") if args.reference else RECIPE[2:]
    run = open_run(args, ("vae", *used))
    options = options_of(run, args.steps, args.guidance)
    frames = frames_of(run, args.seconds)
    prompts = args.prompts or ([""] if args.reference else list(PROMPTS))
    shown, labels, plan = [], prompts, None
    if args.reference:
        clip = reference_clip(args.reference, run.config.data)
        plan = reference_plans(run, clip.semantic_video)
        run.let_go("encoder", "compressor")
        shown = [clip.video[0][:, shown_frames(frames)]]
        labels = [f"painted from its plan{', ' + p if p else ''}" for p in prompts]
        labels = [f"reference: {args.reference.name}", *labels]
    # One by one through the networks: a sample is bit for bit the same in any company. Each part is
    # let go when its work is done.
    texts = encode_prompts(run, prompts, args.negative)
    seeds = [[prompt_seed(args.seed, prompt)] for prompt in prompts]
    run.let_go("text")
    plans = [plan] * len(prompts)
    if plan is None and not args.base:
        plans = [sample_plans(run, *x, frames, options) for x in zip(texts, seeds, strict=True)]
        run.let_go("planner", "compressor")
    each = zip(texts, seeds, plans, strict=True)
    latents = [paint_latents(run, *x, frames, options).cpu() for x in each]
    run.let_go("painter", "base")
    *files, sheet = written(args.out, len(prompts))
    for x, file in zip(latents, files or [None] * len(prompts), strict=True):
        shown.append(write_sample(run, x, frames, file))
    contact_sheet(torch.stack(shown), labels, sheet)
    print(sheet)


if __name__ == "__main__":
    command(main)
