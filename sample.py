"""Sampling: text (or a reference video) to video files.

SemanticGen Fig. 3c: text -> planner -> z_sem -> painter (with the text again) -> VAE decoder. With
a reference (Fig. 4), z_sem comes from a real video through encoder and compressor instead.

    python sample.py                                            # shipped weights, a default prompt
    python sample.py "a red circle moves left" --run runs/tiny --seed 1 --out samples/red.webp
    python sample.py --reference clip.mp4

Every sample has its own noise, fixed by seed and prompt: it does not depend on what else is drawn.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from config import check_number, clip_frames
from data import reference_clip, to_float, to_uint8
from flow import euler, guidance_weights
from parts import add_part_flags, parts_from_flags
from plumbing.files import UserError, check_target, command, require
from plumbing.seeds import text_seed
from plumbing.sheet import contact_sheet, shown_frames
from plumbing.video import write_video
from run import ASSETS, Run
from vae import VideoVAE

PROMPTS = ("a red circle moves left and a blue square grows",)  # where the user names none
SUFFIXES = (".gif", ".webp", ".png", ".mp4")


def guided(
    dit: torch.nn.Module,
    text: Tensor,
    guidance: float,
    context: Tensor | None = None,
    context_guidance: float | None = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return velocity(z, t) with guidance, first towards the plan, if any, then the text.

    text: (B, L, dim); context: (B, K, S, hs, ws). Conditions that weigh anything run as one batch.
    context_guidance None: the plan is dropped throughout, also where the text is there.
    """
    if context is None or context_guidance is None:
        keep, scales = [(False, False), (True, False)], (guidance,)  # (text, context)
    else:
        keep = [(False, False), (False, True), (True, True)]
        scales = (context_guidance, guidance)
    weights = guidance_weights(*scales)
    used = [(weight, *kept) for weight, kept in zip(weights, keep, strict=True) if weight]
    texts = torch.cat([text * kept_text for _, kept_text, _ in used])  # the null text is zero

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        n = len(used)
        conditions = {}
        if context is not None:
            kept = torch.tensor([kept for *_, kept in used], device=z.device)
            conditions = {
                "context": context.repeat(n, 1, 1, 1, 1),
                "keep_context": kept.repeat_interleave(len(z)),
            }
        out = dit(z.repeat(n, 1, 1, 1, 1), t.repeat(n), texts, **conditions).float()
        return sum(w * v for (w, *_), v in zip(used, out.chunk(n), strict=True))

    return velocity


def draw_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return N(0, 1) noise (B, *shape), each sample's from its own seed."""
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise).to(device)


@torch.no_grad()
def sample_plans(
    run: Run, prompts: Sequence[str], seeds: Sequence[int], frames: int | None = None, **options
) -> Tensor:
    """Stage 1: text -> z_sem (B, K, S, hs, ws), for a video of `frames`, or of the trained length.

    options: steps, guidance; by default the run's.
    """
    config = run.config
    grid = config.plan_grid(frames)
    noise = draw_noise(seeds, (config.compressor.channels, *grid), run.device)
    text = run.text.encode(prompts).to(run.device)
    velocity = guided(run.planner, text, options.get("guidance", config.sample.guidance))
    steps = options.get("steps", config.sample.steps)
    plan = euler(velocity, noise, steps, config.stages.semantic.shift)
    return run.compressor.denormalise(plan)


@torch.no_grad()
def paint_latents(
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    plans: Tensor | None,
    frames: int | None = None,
    **options,
) -> Tensor:
    """Stage 2: text and z_sem (B, K, S, hs, ws) -> VAE latents (B, C, T, h, w).

    plans None: the base model, which knows no plans. options: steps, latent_guidance,
    context_guidance (base: base_guidance); by default the run's.
    """
    config = run.config
    option = {**vars(config.sample), **options}
    grid = config.latent_grid(frames)
    # Other seeds than the plan's noise has: the two must not be correlated. Torch's CPU generator
    # reads the lower 32 bits of a seed alone, so an offset would have to lie in these.
    others = [text_seed(f"paint {seed}") % 2**32 for seed in seeds]
    noise = draw_noise(others, (config.vae.channels, *grid), run.device)
    text = run.text.encode(prompts).to(run.device)
    if plans is None:
        velocity = guided(run.base, text, option["base_guidance"])
        shift = config.stages.base.shift
    else:
        velocity = guided(
            run.painter, text, option["latent_guidance"], plans, option["context_guidance"]
        )
        shift = config.stages.latent.shift
    return euler(velocity, noise, option["steps"], shift)


def paint(run: Run, *args, **options) -> Tensor:
    """Stage 2 and the VAE: the arguments of `paint_latents` -> video (B, 3, F, H, W) uint8."""
    return to_uint8(run.vae.decode(paint_latents(run, *args, **options)))


def decode_pieces(vae: VideoVAE, latents: Tensor) -> Iterator[Tensor]:
    """Yield the video of one sample's latents (1, C, T, h, w) in pieces (3, f, H, W) uint8."""
    for piece in vae.decode_pieces(latents):
        yield to_uint8(piece)[0].cpu()


@torch.no_grad()
def reference_plans(run: Run, semantic_video: Tensor) -> Tensor:
    """Return the z_sem of real videos (Fig. 4): (B, 3, F, H, W) uint8 at the low rate."""
    features = run.encoder.encode(to_float(semantic_video).to(run.device))
    return run.compressor.encode(features)


def generate(
    run: Run, prompts: Sequence[str], seeds: Sequence[int], frames: int | None = None, **options
) -> Tensor:
    """Both stages: text -> video (B, 3, F, H, W) uint8. options: of `sample_plans` and `paint`."""
    plans = sample_plans(run, prompts, seeds, frames, **options)
    return paint(run, prompts, seeds, plans, frames, **options)


def prompt_seed(seed: int, prompt: str) -> int:
    """Return the seed of one sample, a function of the user's seed and of the prompt alone."""
    return text_seed(f"{seed} {prompt}") % 2**32


@torch.no_grad()
def show_stage(run: Run, stage: str, source):
    """Write samples/STAGE.png: what a stage does with a few clips.

    source: what the stage draws from, pixels or encoded clips.
    """
    indices = range(min(6, len(source)))
    captions = source.captions(indices)
    if stage == "vae":
        shown = source.batch(indices).video
        video = to_uint8(run.vae.decode(run.vae.encode(to_float(shown).to(run.device))))
        labels = "real", "through the VAE"
    else:
        latents, _ = source.latents(indices)
        shown = to_uint8(run.vae.decode(latents.to(run.device))).cpu()
        if stage == "latent":
            plans = run.compressor.encode(source.features(indices).to(run.device))
            video = paint(run, captions, indices, plans)
        elif stage == "semantic":
            video = generate(run, captions, indices)
        else:
            video = paint(run, captions, indices, None)
        made = {"latent": "painted from its plan", "semantic": "from text", "base": "from text"}
        labels = "real, through the VAE", made[stage]
    both = torch.stack([shown, video.cpu()], 1).flatten(0, 1)
    texts = [f"{label}: {caption}" for caption in captions for label in labels]
    contact_sheet(both, texts, run.path / "samples" / f"{stage}.png")


# --- files --------------------------------------------------------------------------------------


def written(out: Path, videos: int) -> list[Path]:
    """Return the files that --out stands for: an animation for each video, if any, and a sheet."""
    names = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(videos)] if videos > 1 else [out]
    return [*(names if out.suffix != ".png" else ()), out.with_suffix(".png")]


class Picked:
    """Passes a video's pieces on, and keeps the few frames of it that a contact sheet shows."""

    def __init__(self, pieces: Iterable[Tensor], frames: int):
        self.pieces, self.numbers = pieces, shown_frames(frames)
        self.kept: list[Tensor] = []  # each (3, H, W) uint8

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for piece in self.pieces:  # (3, f, H, W)
            inside = [n - start for n in self.numbers if start <= n < start + piece.shape[1]]
            self.kept += piece[:, inside].unbind(1)
            start += piece.shape[1]
            yield piece


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", metavar="prompt")
    parser.add_argument("--run", type=Path, default=ASSETS, help="run folder with the weights")
    parser.add_argument("--reference", type=Path, help="a video whose plan is used, not stage 1's")
    parser.add_argument(
        "--base", action="store_true", help="sample the base model, which has no plan"
    )
    parser.add_argument("--seconds", type=float, help="length; the trained one if not given")
    parser.add_argument("--steps", type=int, help="Euler steps of each stage")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="G",
        help="one; or two: planner, painter; or three: planner, painter's text, painter's plan",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples/sample.webp"), help=f"{SUFFIXES}")
    add_part_flags(parser)
    args = parser.parse_args()
    if args.out.suffix not in SUFFIXES:
        raise UserError(
            f"--out {args.out}: nobody writes that suffix; choose {', '.join(SUFFIXES)}"
        )
    if args.steps is not None:
        check_number("sample.steps", args.steps, f"--steps {args.steps}")
    for scale in args.guidance or ():
        check_number("guidance", scale, f"--guidance {scale}")
    for name in written(args.out, max(1, len(args.prompts))):
        check_target(name)
        if args.reference and name.exists() and name.resolve() == args.reference.resolve():
            raise UserError(f"--out {args.out}: the reference {args.reference} would be lost")
    if args.reference and (args.base or args.seconds is not None):
        raise UserError("--reference: its plan has its own length, and the base knows no plans")
    if any(not prompt.strip() for prompt in args.prompts):
        raise UserError("a prompt is empty: leave it out for the default prompt")

    if args.out.suffix == ".mp4":
        require("av", "video")
    run = Run.open(args.run)
    run.point_to(parts_from_flags(args))
    data = run.config.data
    options = {"steps": args.steps} if args.steps else {}
    if args.guidance:
        planner, painter, plan = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2)}.get(
            len(args.guidance), (None, None, None)
        )
        if planner is None:
            raise UserError(f"--guidance: one to three numbers, not {len(args.guidance)}")
        options["guidance"] = args.guidance[planner]
        options["latent_guidance"] = options["base_guidance"] = args.guidance[painter]
        options["context_guidance"] = args.guidance[plan]
    frames = clip_frames(run.config, args.seconds) if args.seconds is not None else data.frames

    if args.reference:
        clip = reference_clip(args.reference, data)
        plans, real = reference_plans(run, clip.semantic_video), clip.video
        prompts = args.prompts or [""]
    else:
        prompts = args.prompts or list(PROMPTS)
    names = written(args.out, len(prompts))
    shown = [real[0][:, shown_frames(real.shape[2])]] if args.reference else []
    for i, prompt in enumerate(prompts):  # one by one: bit for bit the same in any company
        seeds, plan = [prompt_seed(args.seed, prompt)], None
        if args.reference:
            plan = plans
        elif not args.base:
            plan = sample_plans(run, [prompt], seeds, frames, **options)
        latents = paint_latents(run, [prompt], seeds, plan, frames, **options)
        pieces = Picked(decode_pieces(run.vae, latents), frames)
        if args.out.suffix == ".png":
            for _ in pieces:
                pass
        else:
            write_video(names[i], pieces, data.fps)
            print(names[i])
        shown.append(torch.stack(pieces.kept, 1))
    labels = list(prompts)
    if args.reference:
        labels = [f"reference: {args.reference.name}"]
        labels += [f"painted from its plan{', ' + p if p else ''}" for p in prompts]
    contact_sheet(torch.stack(shown), labels, names[-1])
    print(names[-1])


if __name__ == "__main__":
    command(main)
