"""Scores of a run on prompts of the synthetic world, beside the ceiling that real clips set.

    python evaluate.py --run runs/tiny                # text -> plan -> video
    python evaluate.py --run runs/tiny --plans        # also with other plans than stage 1's
    python evaluate.py --run runs/tiny --base         # the base model instead
    python evaluate.py --run runs/tiny --sweep        # at several guidance scales
    python evaluate.py --run runs/tiny_long --long    # stories: identity, events, drift
    python evaluate.py --run runs/tiny --dtypes       # the same samples in another precision

What a video shows is read from its pixels alone (toy/reader.py). Scores are means in percent:
"""

import argparse
import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from tqdm import tqdm

from flags import add_run_flags, frames_of, open_run, options_of
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command, to_path, write_file
from run import Run
from sample import generate, paint, reference_plans, through_vae
from settings import SampleConfig
from stages import RECIPE
from toy.scores import choose, explained, psnr, report, score, subject_consistency
from toy.world import World

PLANS = ("oracle", "shuffled", "zeroed", "dropped")  # other plans than stage 1's
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)  # all scales alike in --sweep
CHUNK = 64  # videos sampled at a time


class Evaluation:
    """The prompts of one split with their real clips, and ways to make videos for them.

    A way returns the videos (b, 3, F, H, W) uint8 of some rows, a slice.
    """

    def __init__(self, run: Run, split: str, prompts: int, seed: int, long=False, frames=None):
        """long: score with LONG_SCORES. frames: of a clip, with events as long as in training."""
        data, self.run, self.long = run.config.data, run, long
        self.frames = frames or data.frames
        events = max(1, round(data.events * self.frames / data.frames))
        try:
            self.world = World(replace(data, frames=self.frames, events=events), split)
        except ValueError as error:  # learned from videos of another aspect; or too short a clip
            raise UserError(f"{run.path}: {error}") from None
        self.indices = choose(self.world, prompts)
        self.scenes = [self.world.scene(i) for i in self.indices]
        self.seeds = [(seed * 1_000_003 + i) % 2**63 for i in self.indices]
        clips = self.world.batch(self.indices)
        self.captions, self.real, self.low_rate = clips.captions, clips.video, clips.semantic_video

    def videos(self, way: Callable[[slice], Tensor], label: str) -> Tensor:
        """Return what a way makes for all prompts, a chunk at a time, under a progress bar."""
        starts = tqdm(range(0, len(self.indices), CHUNK), label, unit="chunk", leave=False)
        return torch.cat([way(slice(start, start + CHUNK)).cpu() for start in starts])

    def scores(self, videos: Tensor) -> dict[str, float]:
        """Return every score of videos, one for each prompt."""
        config, encode = self.run.config, lambda x: self.run.encoder.encode(x.to(self.run.device))
        size, again = config.data.semantic_size[1:], config.feature_frames
        consistency = partial(subject_consistency, encode=encode, size=size, again=again)
        return score(videos, self.scenes, self.world.config.events, consistency, self.long)

    def sampled(self, rows: slice, options: SampleConfig, base=False) -> Tensor:
        """Text -> plan -> video; base: by the base model, which has no plan."""
        if not base:
            return generate(self.run, self.captions[rows], self.seeds[rows], self.frames, options)
        text = self.run.text.encode(self.captions[rows])
        return paint(self.run, text, self.seeds[rows], None, self.frames, options)

    def from_plans(self, rows: slice, options: SampleConfig, plans: str, told: bool) -> Tensor:
        """Paint from plans that stage 1 did not make; told: with the text.

        plans: "oracle", z_sem of the real clip; "shuffled", of the next clip in the list; "zeroed",
        all zeros; "dropped", the null context that guidance knows.
        """
        low_rate = self.low_rate.roll(-1 if plans == "shuffled" else 0, 0)[rows]
        z_sem = reference_plans(self.run, low_rate)
        if plans == "zeroed":
            z_sem = torch.zeros_like(z_sem)
        if plans == "dropped":
            options = replace(options, context_guidance=None)
        text = self.run.text.encode(self.captions[rows] if told else [""] * len(z_sem))
        return paint(self.run, text, self.seeds[rows], z_sem, self.frames, options)


# --- the command --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Read the command line; UserError for what cannot be, before anything is loaded."""
    parser = command_line(f"{__doc__}{explained()}\nWith --long:\n{explained(long=True)}")
    add_run_flags(parser)
    parser.add_argument("--prompts", type=int, help="half one object, half two; 512, --long: 128")
    parser.add_argument("--long", action="store_true", help="scores of clips with several events")
    parser.add_argument("--plans", nargs="*", choices=PLANS, help="plans that stage 1 did not make")
    parser.add_argument("--base", action="store_true", help="the base model instead")
    parser.add_argument("--sweep", action="store_true", help="guidance 1, 1.5, 2, 3, 4 as well")
    parser.add_argument("--dtypes", action="store_true", help="float32 and bfloat16, and the PSNR")
    parser.add_argument("--json", type=to_path, help="write the scores there as well")
    args = parser.parse_args()
    args.prompts = args.prompts if args.prompts is not None else 128 if args.long else 512
    args.plans = list(PLANS) if args.plans == [] else args.plans or []
    if args.seconds is not None and not args.long:
        raise UserError("--seconds: of --long only")
    if not 2 <= args.prompts <= 100_000:
        raise UserError(f"--prompts {args.prompts}: at least 2, one object and two; at most 100000")
    if args.base and args.plans:
        raise UserError("--base --plans: the base model knows no plans; give one of the two")
    if args.json:
        check_target(args.json)
    return args


def ways_of(test: Evaluation, args: argparse.Namespace, name: str) -> dict[str, Callable]:
    """Return the ways of making videos that the command line asks for, by name; name: the main."""
    options = options_of(test.run, args.steps)
    ways = {
        "real clips": lambda rows: test.real[rows],
        "VAE reconstructions": lambda rows: through_vae(test.run, test.real[rows]),
        name: partial(test.sampled, options=options, base=args.base),
    }
    for plans, told in product(args.plans, (True, False)):
        way = partial(test.from_plans, options=options, plans=plans, told=told)
        ways[f"{plans} plan, {'with' if told else 'no'} text"] = way
    for g in GUIDANCE if args.sweep else ():
        scaled = options_of(test.run, args.steps, (g,))
        ways[f"guidance {g}"] = partial(test.sampled, options=scaled, base=args.base)
    return ways


def main():
    args = arguments()
    used = ("base",) if args.base else RECIPE[2:]
    run = open_run(args, ("vae", "encoder", *used))
    _ = options_of(run, args.steps), run.vae, run.encoder  # or say so now
    _ = run.base if args.base else (run.painter, run.planner)
    kind = (args.prompts, args.seed, args.long, frames_of(run, args.seconds))
    test, held_out = (Evaluation(run, split, *kind) for split in ("test", "held_out"))
    clips = max(getattr(run.config.stages, stage).clips for stage in used)
    train = set(World(run.config.data, "train").captions(range(clips)))
    new = sum(caption not in train for caption in test.captions)
    if (data := run.note(used[0]).get("data", {})).get("listing"):
        print(f"it learned from {data['name']}, the prompts are of the synthetic world")
    print(f"{len(test.captions)} prompts, {new} of them not among the training captions")
    name = "base: text -> video" if args.base else "text -> plan -> video"
    ways, unseen = ways_of(test, args, name), ways_of(held_out, args, name)[name]
    dtype = "bfloat16" if run.config.dtype == "float32" else "float32"
    if args.dtypes:
        other = copy(run)
        other.config = replace(run.config, dtype=dtype)
        ways[dtype] = ways_of(Evaluation(other, "test", *kind), args, name)[name]
    videos = {label: test.videos(way, label) for label, way in ways.items()}
    rows = {label: test.scores(made) for label, made in videos.items()}
    label = "never-shown combinations"
    rows[label] = held_out.scores(held_out.videos(unseen, label))
    print(report(rows, args.long))
    decibels = psnr(videos["VAE reconstructions"][:CHUNK], test.real[:CHUNK])
    print(f"\nPSNR of the first {min(CHUNK, args.prompts)} VAE reconstructions: {decibels:.1f} dB")
    if args.dtypes:
        rows[dtype]["psnr"] = difference = psnr(videos[dtype], videos[name])
        print(f"PSNR between samples in {run.config.dtype} and in {dtype}: {difference:.1f} dB")
    print(f"\n{explained(args.long)}")
    if args.json:
        content = {**vars(args), "dtype": run.config.dtype, "vae_psnr": decibels, "scores": rows}
        write_file(args.json, json.dumps(content, indent=1, default=str).encode())


if __name__ == "__main__":
    command(main)
