"""Scores of videos of the synthetic world, read from their pixels alone.

Only subject consistency needs a network: `encode` is that of a semantic encoder, pairs of frames
(B, 3, 2, H, W) in [-1, 1] -> features (B, d, 1, hs, ws). It stands in for the DINO of VBench.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from data import to_float
from toy.reader import GREW, MOVED, UNCLEAR, read, read_stories, things, tracks
from toy.world import GROWTH, MOTIONS, Thing, World, motions_of

SCORES = {  # name -> how it is computed
    "exact": "prompts whose objects are all there, in order, each right in all its attributes",
    "one": "exact, of the prompts with one object",
    "two": "exact, of the prompts with two objects",
    "number": "prompts with the right number of objects",
    "colour": "objects of the prompts whose colour is right, in order",
    "shape": "objects whose shape is right",
    "motion": "objects whose motion is right",
    "subject": "cosine of a frame's features with those of the first frame and of the one before",
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
    "size": "clips in which all radii stay within a quarter of what the events ask for",
    "story": "clips in which colours and all events are right, in order",
    "event": "events that are right",
    **{name: SCORES[name] for name in VIEWS},
}
DRIFT = ("colour", "shape", *VIEWS)  # scores whose drift is told
FLASHED = 32  # grey levels of a frame above the median frame; the world's flashes are 58 at least
ENDS = 0.15  # of a clip, its first and its last part: drift is by how much their scores differ


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
def subject_consistency(
    videos: Tensor, encode: Callable, size: Sequence[int], again: int = 2
) -> Tensor:
    """Return VBench's subject consistency of videos (B, 3, F, H, W) uint8, (B,) in percent.

    Each frame is shown to the encoder `again` times, as a pair; size: the (H, W) that it reads.
    """
    frames = rearrange(to_float(videos), "b c f h w -> (b f) c h w")
    if frames.shape[2:] != (*size,):
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
    pairs = repeat(frames, "n c h w -> n c again h w", again=again)
    features = torch.cat([encode(x).cpu() for x in pairs.split(256)])
    features = F.normalize(reduce(features, "n d s h w -> n d", "mean"), dim=1)
    features = features.unflatten(0, (len(videos), -1))  # (B, F, d)
    with_first = (features[:, 1:] * features[:, :1]).sum(-1)  # (B, F - 1)
    with_last = (features[:, 1:] * features[:, :-1]).sum(-1)
    return 50 * (with_first + with_last).mean(1)


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


def views(videos: Tensor, consistency: Callable) -> dict[str, Tensor]:
    """Return the scores of VIEWS of each video (B, 3, F, H, W) uint8, (B,) each, in percent.

    consistency: what returns the subject consistency of videos, as `subject_consistency` does.
    """
    x = videos.float() / 255
    flicker = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(1).mean(1)
    bend = (x[:, :, 1:-1] - (x[:, :, 2:] + x[:, :, :-2]) / 2).abs().flatten(1).mean(1)
    return {
        "subject": consistency(videos),
        "flicker": 100 * (1 - flicker),
        "smooth": 100 * (1 - bend),
        "moved": torch.tensor([motion_amount(video) for video in videos]),
    }


def end_scores(
    videos: Tensor, scenes: Sequence[Sequence[Thing]], consistency: Callable
) -> dict[str, Tensor]:
    """Return the scores of DRIFT of the first or the last part of clips, (B,) each, in percent."""
    colours, shapes = [], []
    for video, scene in zip(videos, scenes, strict=True):
        found = {thing.colour: thing for thing in things(video)}
        same = [found[w.colour].shape == w.shape for w in scene if w.colour in found]
        colours.append(100 * len(same) / len(scene))
        shapes.append(100 * sum(same) / len(scene))
    seen = {"colour": torch.tensor(colours), "shape": torch.tensor(shapes)}
    return seen | views(videos, consistency)


def drifts(
    videos: Tensor, scenes: Sequence[Sequence[Thing]], consistency: Callable
) -> dict[str, Tensor]:
    """Return FramePack's drift: by how much a score of the last 15 % differs from the first's.

    Of every score of DRIFT, absolute, for each of the clips (B, 3, F, H, W) uint8, (B,).
    """
    frames = max(3, round(ENDS * videos.shape[2]))
    start = end_scores(videos[:, :, :frames], scenes, consistency)
    end = end_scores(videos[:, :, -frames:], scenes, consistency)
    return {name: (start[name] - end[name]).abs() for name in DRIFT}


def drift(
    videos: Tensor, scenes: Sequence[Sequence[Thing]], consistency: Callable
) -> dict[str, float]:
    """Return the mean over clips of their `drifts`."""
    each = drifts(videos, scenes, consistency)
    return {name: float(values.mean()) for name, values in each.items()}


def accuracies(
    video: Tensor, scene: Sequence[Thing], events: int, long: bool
) -> dict[str, list[float]]:
    """Return those of LONG_SCORES, or of SCORES, that compare a video with its prompt."""
    return long_agreement(video, scene, events) if long else agreement(read(video, events), scene)


def of_each(
    videos: Tensor, scenes: Sequence[Sequence[Thing]], events: int, long: bool = False
) -> dict[str, list[float]]:
    """Return the accuracies of each video (B, 3, F, H, W) uint8, in percent.

    Those of SCORES that compare with the prompt, means over its objects; or of LONG_SCORES.
    """
    found: dict[str, list[float]] = {}
    for video, scene in zip(videos, scenes, strict=True):
        right = accuracies(video, scene, events, long)
        for name in right.keys() - {"one", "two"}:  # which are `exact`, of some
            found.setdefault(name, []).append(100 * sum(right[name]) / len(right[name]))
    return dict(sorted(found.items()))


def likeness(video: Tensor, reference: Tensor) -> dict[str, float]:
    """Return what a video (3, F, H, W) uint8 keeps of its reference beyond a caption, in percent.

    layout: objects of the reference near which there is one, whatever it looks like. texture:
    correlation of the background's brightness.
    """
    here, there = tracks(video), tracks(reference)
    unit = 32 * torch.tensor(video.shape[:1:-1]) / min(video.shape[2:])  # (W, H) of a frame
    places = [torch.stack([(a.centres - b.centres) * unit for a in here]) for b in there if here]
    near = [bool(x.norm(dim=-1).mean(1).min() < MOVED) for x in places]
    covered = sum(track.coverage for track in [*here, *there])  # (F, H, W)
    both = torch.stack([video.float().mean(0), reference.float().mean(0)])  # (2, F, H, W)
    bare = both[:, covered < 0.05] if here or there else both.flatten(1)
    correlation = torch.corrcoef(bare)[0, 1].nan_to_num() if bare.shape[1] > 1 else torch.zeros(())
    return {"layout": 100 * sum(near) / max(1, len(there)), "texture": 100 * float(correlation)}


def flash_of(video: Tensor) -> int | None:
    """Return the frame of a video (3, F, H, W) uint8 that is a flash, if one is."""
    bright = video.float().mean((0, 2, 3))  # (F,)
    above = bright - bright.median()
    return int(above.argmax()) if above.max() > FLASHED else None


def flash_scores(video: Tensor, true: int | None) -> dict[str, float | None]:
    """Return whether a flash is there within a frame of the true one, and none without, in percent.

    None where it does not apply: flash to a clip without one, calm to one with.
    """
    found = flash_of(video)
    if true is None:
        return {"flash": None, "calm": 100.0 * (found is None)}
    return {"flash": 100.0 * (found is not None and abs(found - true) <= 1), "calm": None}


def score(
    videos: Tensor,
    scenes: Sequence[Sequence[Thing]],
    events: int,
    consistency: Callable,
    long: bool = False,
) -> dict[str, float]:
    """Return every score of videos (B, 3, F, H, W) uint8 made for those scenes, in percent.

    events: of each object in a clip. long: those of LONG_SCORES, and drifts as "drift of NAME",
    instead of those of SCORES.
    """
    values: dict[str, list[float]] = {name: [] for name in (LONG_SCORES if long else SCORES)}
    for video, scene in zip(videos, scenes, strict=True):
        right = accuracies(video, scene, events, long)
        for name, found in right.items():
            values[name] += found
    scores = {name: 100 * sum(v) / len(v) for name, v in values.items() if v}
    scores |= {name: float(x.mean()) for name, x in views(videos, consistency).items()}
    if long:
        drifts = drift(videos, scenes, consistency)
        scores |= {f"drift of {name}": x for name, x in drifts.items()}
    return scores


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


def table(rows: dict[str, dict[str, float]], names: Sequence[str] = (*SCORES,)) -> str:
    """Return these scores as an aligned table, one line for each way of making videos."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name.split()[-1]:>9}" for name in names)]
    for name, scores in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{scores.get(s, math.nan):9.1f}" for s in names))
    return "\n".join(lines)


def report(rows: dict[str, dict[str, float]], long: bool) -> str:
    """Return all scores as a table; long: those of LONG_SCORES, and their drifts as another."""
    if not long:
        return table(rows)
    drifts = table(rows, [f"drift of {name}" for name in DRIFT])
    return f"{table(rows, (*LONG_SCORES,))}\n\ndrift of\n{drifts}"


def explained(long: bool = False) -> str:
    """Tell how each score is computed, one a line."""
    lines = [f"  {name:<9}{how}" for name, how in (LONG_SCORES if long else SCORES).items()]
    if long:
        lines += ["Drift is by how much a score differs between the first 15 % of a clip and"]
        lines += ["the last (FramePack). A video that stands still has none: see moved."]
    return "\n".join(lines)
