"""Scores of a run on prompts of the synthetic world, beside the ceiling that real clips set.

    python evaluate.py --run runs/tiny                # text -> plan -> video
    python evaluate.py --run runs/tiny --plans        # also with other plans than stage 1's
    python evaluate.py --run runs/tiny --base         # the base model instead
    python evaluate.py --run runs/tiny --sweep        # at several guidance scales

What a video shows is read from its pixels alone (reader.py). Every score is a mean in percent:
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor
from tqdm import tqdm

from config import check_number
from files import UserError, check_target, command, write_file
from reader import read, tracks
from run import ASSETS, Run, computing
from sample import generate, paint, reference_plans
from world import Thing, World, to_float, to_uint8

SCORES = {  # name -> how it is computed
    "exact": "prompts whose objects are all there, in order, each right in all its attributes",
    "one": "exact, of the prompts with one object",
    "two": "exact, of the prompts with two objects",
    "number": "prompts with the right number of objects",
    "colour": "objects of the prompts whose colour is right, in order",
    "shape": "objects whose shape is right",
    "motion": "objects whose motion is right",
    "subject": "cosine of each frame's features with the first's and the last frame's before it",
    "flicker": "100 - mean difference of neighbouring frames, in percent of the range",
    "smooth": "100 - mean difference of a frame from the mean of its neighbours, likewise",
    "moved": "path of the objects' centres and change of their radius, in percent of the frame",
}
PLANS = ("oracle", "shuffled", "zeroed", "dropped")  # other plans than stage 1's
SCALES = ("guidance", "latent_guidance", "context_guidance", "base_guidance")
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)  # all scales alike in --sweep
CHUNK = 64  # videos sampled at a time


def agreement(found: Sequence[Thing], wanted: Sequence[Thing]) -> dict[str, list[float]]:
    """Return the accuracies of one video: 0 or 1 for it, or for each object of its prompt."""
    exact = float(tuple(found) == tuple(wanted))
    pairs = list(zip(wanted, [*found, *[None] * len(wanted)], strict=False))
    return {
        "exact": [exact],
        "one" if len(wanted) == 1 else "two": [exact],
        "number": [float(len(found) == len(wanted))],
        **{
            name: [float(f is not None and getattr(f, name) == getattr(w, name)) for w, f in pairs]
            for name in ("colour", "shape", "motion")
        },
    }


def motion_amount(video: Tensor) -> float:
    """Return path length plus change of radius of each object, mean, in percent of the frame.

    video: (3, F, H, W) uint8. A frozen video has 0, whatever its flicker and consistency.
    """
    height, width = video.shape[-2:]
    sides = torch.tensor([width, height]) / min(height, width)
    moved = []
    for track in tracks(video):
        steps = (track.centres.diff(dim=0) * sides).norm(dim=1)  # (F - 1,) of the shorter side
        radius = (track.areas * sides.prod() / torch.pi).sqrt()  # (F,) of a disc of that area
        moved.append(float(steps.sum() + (radius[-1] - radius[0]).abs()))
    return 100 * sum(moved) / len(moved) if moved else 0.0


@torch.no_grad()
def subject_consistency(run: Run, video: Tensor) -> Tensor:
    """Return VBench's subject consistency with our encoder instead of DINO, (B,) in percent.

    video: (B, 3, F, H, W) uint8. Each frame is shown to the encoder as a pair of itself.
    """
    data = run.config.data
    frames = rearrange(to_float(video), "b c f h w -> (b f) c h w")
    size = (data.semantic_height, data.semantic_width)
    if frames.shape[2:] != size:
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
    pairs = repeat(frames, "n c h w -> n c two h w", two=2)
    features = torch.cat([run.encoder.encode(x.to(run.device)).cpu() for x in pairs.split(256)])
    features = F.normalize(reduce(features, "n d s h w -> n d", "mean"), dim=1)
    features = features.unflatten(0, (len(video), -1))  # (B, F, d)
    with_first = (features[:, 1:] * features[:, :1]).sum(-1)  # (B, F - 1)
    with_last = (features[:, 1:] * features[:, :-1]).sum(-1)
    return 50 * (with_first + with_last).mean(1)


def score(run: Run, videos: Tensor, scenes: Sequence[Sequence[Thing]]) -> dict[str, float]:
    """Return every score of SCORES: videos (B, 3, F, H, W) uint8, made for those scenes."""
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    for video, scene in zip(videos, scenes, strict=True):
        for name, found in agreement(read(video, run.config.data.events), scene).items():
            values[name] += found
        values["moved"].append(motion_amount(video) / 100)
    x = videos.float() / 255
    flicker = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(1).mean(1)
    bend = (x[:, :, 1:-1] - (x[:, :, 2:] + x[:, :, :-2]) / 2).abs().flatten(1).mean(1)
    values["flicker"], values["smooth"] = (1 - flicker).tolist(), (1 - bend).tolist()
    values["subject"] = (subject_consistency(run, videos) / 100).tolist()
    return {name: 100 * sum(v) / len(v) for name, v in values.items() if v}


def psnr(videos: Tensor, real: Tensor) -> float:
    """Return the mean PSNR of clips (B, 3, F, H, W) uint8 in dB, of those that are not equal."""
    error = (videos.float() - real.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error[error > 0])).mean())


def choose(world: World, prompts: int) -> list[int]:
    """Return the first indices of a world with as many one-object as two-object scenes."""
    half, found, index = (prompts + 1) // 2, {1: [], 2: []}, 0
    limit = {1: half, 2: prompts - half} if world.config.objects > 1 else {1: prompts, 2: 0}
    while any(len(found[n]) < limit[n] for n in found):
        n = len(world.scene(index))
        if len(found[n]) < limit[n]:
            found[n].append(index)
        index += 1
    return sorted(found[1] + found[2])


class Evaluation:
    """The prompts of one split with their real clips, and ways to make videos for them."""

    def __init__(self, run: Run, split: str, prompts: int, seed: int):
        try:
            self.run, self.world = run, World(run.config.data, split)
        except ValueError as error:  # it learned from real videos, of another aspect
            raise UserError(f"{run.path}: {error}") from None
        self.indices = choose(self.world, prompts)
        self.scenes = [self.world.scene(i) for i in self.indices]
        self.seeds = [(seed * 1_000_003 + i) % 2**63 for i in self.indices]
        clips = self.world.batch(self.indices)
        self.captions, self.real, self.low_rate = clips.captions, clips.video, clips.semantic_video

    def by_chunks(self, make, label: str) -> dict[str, float]:
        """Score the videos that make(rows: slice) -> (b, 3, F, H, W) returns."""
        starts = tqdm(range(0, len(self.indices), CHUNK), label, unit="chunk", leave=False)
        with computing(self.run.device, self.run.config.dtype):
            videos = torch.cat([make(slice(start, start + CHUNK)).cpu() for start in starts])
        return score(self.run, videos, self.scenes)

    def reconstructions(self, rows: slice) -> Tensor:
        """The ceiling: real clips through the VAE."""
        video = to_float(self.real[rows]).to(self.run.device)
        return to_uint8(self.run.vae.decode(self.run.vae.encode(video)))

    def from_text(self, rows: slice, **options) -> Tensor:
        return generate(self.run, self.captions[rows], self.seeds[rows], **options)

    def from_base(self, rows: slice, **options) -> Tensor:
        return paint(self.run, self.captions[rows], self.seeds[rows], None, **options)

    def from_plans(self, rows: slice, plans: str, text: bool, **options) -> Tensor:
        """Paint from plans that stage 1 did not make.

        plans: "oracle", z_sem of the real clip; "shuffled", of the next clip in the list; "zeroed",
        all zeros; "dropped", the null context that guidance knows.
        """
        shift = 1 if plans == "shuffled" else 0
        low_rate = self.low_rate.roll(-shift, 0)[rows]
        z_sem = reference_plans(self.run, low_rate)
        if plans == "zeroed":
            z_sem = torch.zeros_like(z_sem)
        if plans == "dropped":
            options = {**options, "context_guidance": None}
        captions = self.captions[rows] if text else [""] * len(low_rate)
        return paint(self.run, captions, self.seeds[rows], z_sem, **options)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the scores as an aligned table, one line for each way of making videos."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>9}" for name in SCORES)]
    for name, scores in rows.items():
        lines.append(
            f"{name:<{width}}" + "".join(f"{scores.get(s, float('nan')):9.1f}" for s in SCORES)
        )
    return "\n".join(lines)


def main():
    explained = "\n".join(f"  {name:<9}{how}" for name, how in SCORES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{explained}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=ASSETS, help="run folder; the shipped weights")
    parser.add_argument("--prompts", type=int, default=512, help="half with one object, half two")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--steps", type=int, help="Euler steps of each stage")
    parser.add_argument("--plans", action="store_true", help="oracle, shuffled, zeroed plans too")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--sweep", action="store_true", help="guidance 1, 1.5, 2, 3, 4 as well")
    parser.add_argument("--json", type=Path, help="write the scores there as well")
    args = parser.parse_args()
    if not 2 <= args.prompts <= 100_000:
        raise UserError(f"--prompts {args.prompts}: at least 2, one object and two; at most 100000")
    if args.base and args.plans:
        raise UserError("--base --plans: the base model knows no plans; give one of the two")
    if args.steps is not None:
        check_number("sample.steps", args.steps, f"--steps {args.steps}")
    if args.json:
        check_target(args.json)
    run = Run.open(args.run)
    _ = run.vae, run.encoder, run.base if args.base else (run.painter, run.planner)  # or say so now
    options = {"steps": args.steps} if args.steps else {}
    test = Evaluation(run, "test", args.prompts, args.seed)
    train = set(World(run.config.data, "train").captions(range(run.config.stages.latent.clips)))
    new = sum(caption not in train for caption in test.captions)
    print(f"{len(test.captions)} prompts, {new} of them not among the training captions")

    held_out = Evaluation(run, "held_out", args.prompts, args.seed)
    make, name = Evaluation.from_text, "text -> plan -> video"
    if args.base:
        make, name = Evaluation.from_base, "base: text -> video"
    ways = {
        "real clips": lambda rows: test.real[rows],
        "VAE reconstructions": test.reconstructions,
        name: lambda rows: make(test, rows, **options),
    }
    for plans in PLANS if args.plans else ():
        for text, words in ((True, "with text"), (False, "no text")):
            ways[f"{plans} plan, {words}"] = lambda rows, plans=plans, text=text: test.from_plans(
                rows, plans, text, **options
            )
    for g in GUIDANCE if args.sweep else ():
        scales = dict.fromkeys(SCALES, g)
        ways[f"guidance {g}"] = lambda rows, scales=scales: make(test, rows, **options, **scales)
    rows = {name: test.by_chunks(way, name) for name, way in ways.items()}
    rows["never-shown combinations"] = held_out.by_chunks(
        lambda rows: make(held_out, rows, **options), "never-shown combinations"
    )
    vae_psnr = psnr(test.reconstructions(slice(0, CHUNK)).cpu(), test.real[:CHUNK])
    print(table(rows))
    print(f"\nPSNR of the first {len(test.real[:CHUNK])} VAE reconstructions: {vae_psnr:.1f} dB")
    print("\n" + explained)
    if args.json:
        content = {"run": str(args.run), "prompts": args.prompts, "seed": args.seed}
        content |= {"vae_psnr": vae_psnr, "scores": rows}
        write_file(args.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    command(main)
