"""Scores of a run on prompts of the synthetic world, beside the ceiling that real clips set.

    python evaluate.py --run runs/tiny                # text -> plan -> video
    python evaluate.py --run runs/tiny --plans        # also with other plans than stage 1's
    python evaluate.py --run runs/tiny --base         # the base model instead
    python evaluate.py --run runs/tiny --sweep        # at several guidance scales
    python evaluate.py --run runs/tiny_long --long    # stories: identity, events, drift

What a video shows is read from its pixels alone (reader.py). Every score is a mean in percent:
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import check_number, clip_frames
from data import to_float, to_uint8
from plumbing.device import computing
from plumbing.files import UserError, check_target, command, write_file
from run import ASSETS, Run
from sample import generate, paint, reference_plans
from toy.scores import DRIFT, LONG_SCORES, SCORES, choose, psnr, score, score_long, table
from toy.world import World

PLANS = ("oracle", "shuffled", "zeroed", "dropped")  # other plans than stage 1's
SCALES = ("guidance", "latent_guidance", "context_guidance", "base_guidance")
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)  # all scales alike in --sweep
CHUNK = 64  # videos sampled at a time


class Evaluation:
    """The prompts of one split with their real clips, and ways to make videos for them."""

    def __init__(
        self,
        run: Run,
        split: str,
        prompts: int,
        seed: int,
        long: bool = False,
        seconds: float | None = None,
    ):
        """long: score with LONG_SCORES. seconds: other than trained, with events as long as then"""
        data, self.run, self.long, self.frames = run.config.data, run, long, None
        if seconds is not None:
            self.frames = clip_frames(run.config, seconds)
            events = max(1, round(data.events * self.frames / data.frames))
            data = replace(data, frames=self.frames, events=events)
        try:
            self.world = World(data, split)
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
        if self.long:
            return score_long(self.run, videos, self.scenes, self.world.config.events)
        return score(self.run, videos, self.scenes)

    def reconstructions(self, rows: slice) -> Tensor:
        """The ceiling: real clips through the VAE."""
        video = to_float(self.real[rows]).to(self.run.device)
        return to_uint8(self.run.vae.decode(self.run.vae.encode(video)))

    def from_text(self, rows: slice, **options) -> Tensor:
        return generate(self.run, self.captions[rows], self.seeds[rows], self.frames, **options)

    def from_base(self, rows: slice, **options) -> Tensor:
        return paint(self.run, self.captions[rows], self.seeds[rows], None, self.frames, **options)

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
        return paint(self.run, captions, self.seeds[rows], z_sem, self.frames, **options)


def main():
    explained, explained_long = (
        "\n".join(f"  {name:<9}{how}" for name, how in kind.items())
        for kind in (SCORES, LONG_SCORES)
    )
    explained_long += "\nDrift is by how much a score differs between the first 15 % of a clip and"
    explained_long += "\nthe last (FramePack). A video that stands still has none: see moved."
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{explained}\nWith --long:\n{explained_long}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, default=ASSETS, help="run folder; the shipped weights")
    parser.add_argument(
        "--prompts", type=int, help="half with one object, half two; 512 if not given, --long: 128"
    )
    parser.add_argument("--long", action="store_true", help="scores of clips with several events")
    parser.add_argument("--seconds", type=float, help="with --long: another length than trained")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--steps", type=int, help="Euler steps of each stage")
    parser.add_argument(
        "--plans",
        nargs="*",
        choices=PLANS,
        help="plans that stage 1 did not make",
    )
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--sweep", action="store_true", help="guidance 1, 1.5, 2, 3, 4 as well")
    parser.add_argument("--json", type=Path, help="write the scores there as well")
    args = parser.parse_args()
    if args.prompts is None:
        args.prompts = 128 if args.long else 512
    if args.plans == []:
        args.plans = list(PLANS)
    if args.seconds is not None and not args.long:
        raise UserError("--seconds: of --long only")
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
    kind = {"long": args.long, "seconds": args.seconds}
    test = Evaluation(run, "test", args.prompts, args.seed, **kind)
    train = set(World(run.config.data, "train").captions(range(run.config.stages.latent.clips)))
    new = sum(caption not in train for caption in test.captions)
    print(f"{len(test.captions)} prompts, {new} of them not among the training captions")

    held_out = Evaluation(run, "held_out", args.prompts, args.seed, **kind)
    make, name = Evaluation.from_text, "text -> plan -> video"
    if args.base:
        make, name = Evaluation.from_base, "base: text -> video"
    ways = {
        "real clips": lambda rows: test.real[rows],
        "VAE reconstructions": test.reconstructions,
        name: lambda rows: make(test, rows, **options),
    }
    for plans in args.plans or ():
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
    print(table(rows, (*LONG_SCORES,) if args.long else (*SCORES,)))
    if args.long:
        print("\ndrift of\n" + table(rows, [f"drift of {name}" for name in DRIFT]))
    print(f"\nPSNR of the first {len(test.real[:CHUNK])} VAE reconstructions: {vae_psnr:.1f} dB")
    print("\n" + (explained_long if args.long else explained))
    if args.json:
        content = {"run": str(args.run), "prompts": args.prompts, "seed": args.seed, **kind}
        content |= {"vae_psnr": vae_psnr, "scores": rows}
        write_file(args.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    command(main)
