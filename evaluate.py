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
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor
from tqdm import tqdm

from config import check_number, clip_frames
from files import UserError, check_target, command, write_file
from reader import GREW, UNCLEAR, read, read_stories, things, tracks
from run import ASSETS, Run, computing
from sample import generate, paint, reference_plans
from world import GROWTH, MOTIONS, Thing, World, motions_of, to_float, to_uint8

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
VIEWS = ("subject", "flicker", "smooth", "moved")  # scores that know nothing of the prompt
LONG_SCORES = {  # of clips with several events, --long
    "exact": "clips in which number, colours, shapes, sizes and all events are right",
    "number": "clips with the right number of objects, each of them there in every event",
    "colour": "of these, clips whose colours are right, in order, from the first event to the last",
    "shape": "clips in which each shape is right in every event in which the object is large",
    "size": "clips in which no radius is ever a quarter off what the events make of it",
    "story": "clips in which colours and all events are right, in order",
    "event": "events that are right",
    **{name: SCORES[name] for name in VIEWS},
}
DRIFT = ("colour", "shape", *VIEWS)  # scores whose drift is told
ENDS = 0.15  # of a clip, its first and its last part: drift is by how much their scores differ
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
    scores = {name: 100 * sum(v) / len(v) for name, v in values.items() if v}
    return scores | {name: float(x.mean()) for name, x in views(run, videos).items()}


def size_kept(radii: Tensor, motion: str) -> bool:
    """Return whether an object's radii (F,) follow its events, up to one factor for all of them.

    They do as long as no error is large enough to be read as growth.
    """
    motions = motions_of(motion)
    growth = torch.tensor([0, *(MOTIONS[name][2] for name in motions)]).cumsum(0)
    times = torch.linspace(0, len(radii) - 1, len(growth)).round().long()  # where events meet
    error = radii[times].clamp(min=1e-3).log() - growth * math.log(GROWTH)
    return bool((error - error.mean()).abs().max() < GREW)


def long_agreement(video: Tensor, scene: Sequence[Thing], events: int) -> dict[str, list[float]]:
    """Return the accuracies of LONG_SCORES of one clip (3, F, H, W) uint8, 0 or 1."""
    found = read_stories(video, events)
    pairs = list(zip(found, scene, strict=False))
    right = {"number": len(found) == len(scene) and all(all(story.present) for story in found)}
    right["colour"] = right["number"] and all(f.colour == w.colour for f, w in pairs)
    right["shape"] = right["number"] and all(set(f.shapes) == {w.shape} for f, w in pairs)
    right["size"] = right["number"] and all(size_kept(f.radii, w.motion) for f, w in pairs)
    right["story"] = right["colour"] and all(f.motion == w.motion for f, w in pairs)
    right["exact"] = right["story"] and right["shape"] and right["size"]
    event = [0.0] * (events * len(scene))
    for k, (f, w) in enumerate(pairs):
        if f.colour == w.colour and f.motion != UNCLEAR:
            told = zip(f.motion.split(" then "), w.motion.split(" then "), strict=True)
            event[k * events : (k + 1) * events] = [float(a == b) for a, b in told]
    return {**{name: [float(value)] for name, value in right.items()}, "event": event}


def views(run: Run, videos: Tensor) -> dict[str, Tensor]:
    """Return the scores of VIEWS of each video (B, 3, F, H, W) uint8, (B,) each, in percent."""
    x = videos.float() / 255
    flicker = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(1).mean(1)
    bend = (x[:, :, 1:-1] - (x[:, :, 2:] + x[:, :, :-2]) / 2).abs().flatten(1).mean(1)
    return {
        "subject": subject_consistency(run, videos),
        "flicker": 100 * (1 - flicker),
        "smooth": 100 * (1 - bend),
        "moved": torch.tensor([motion_amount(video) for video in videos]),
    }


def end_scores(run: Run, videos: Tensor, scenes: Sequence[Sequence[Thing]]) -> dict[str, Tensor]:
    """Return the scores of DRIFT of each short piece of a clip, (B,) each, in percent."""
    colours, shapes = [], []
    for video, scene in zip(videos, scenes, strict=True):
        found = {thing.colour: thing for thing in things(video)}
        same = [found[w.colour].shape == w.shape for w in scene if w.colour in found]
        colours.append(100 * len(same) / len(scene))
        shapes.append(100 * sum(same) / len(scene))
    return {"colour": torch.tensor(colours), "shape": torch.tensor(shapes), **views(run, videos)}


def drift(run: Run, videos: Tensor, scenes: Sequence[Sequence[Thing]]) -> dict[str, float]:
    """Return FramePack's drift: the score of the first 15 % less that of the last 15 %.

    Of every score of DRIFT, absolute for each clip, then the mean over clips (B, 3, F, H, W) uint8.
    """
    frames = max(3, round(ENDS * videos.shape[2]))
    start = end_scores(run, videos[:, :, :frames], scenes)
    end = end_scores(run, videos[:, :, -frames:], scenes)
    return {name: float((start[name] - end[name]).abs().mean()) for name in DRIFT}


def score_long(
    run: Run, videos: Tensor, scenes: Sequence[Sequence[Thing]], events: int
) -> dict[str, float]:
    """Return every score of LONG_SCORES, and drifts as "drift of NAME"."""
    values: dict[str, list[float]] = {name: [] for name in LONG_SCORES}
    for video, scene in zip(videos, scenes, strict=True):
        for name, found in long_agreement(video, scene, events).items():
            values[name] += found
    scores = {name: 100 * sum(v) / len(v) for name, v in values.items() if v}
    scores |= {name: float(x.mean()) for name, x in views(run, videos).items()}
    return scores | {f"drift of {name}": x for name, x in drift(run, videos, scenes).items()}


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


def table(rows: dict[str, dict[str, float]], names: Sequence[str] = (*SCORES,)) -> str:
    """Return these scores as an aligned table, one line for each way of making videos."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name.split()[-1]:>9}" for name in names)]
    for name, scores in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{scores.get(s, math.nan):9.1f}" for s in names))
    return "\n".join(lines)


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
