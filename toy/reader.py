"""Read what a video of the synthetic world shows, from its pixels alone.

`read(video)` returns the things in the order of a caption, so that a generated video can be checked
against its prompt word by word; `tracks(video)` returns where each object is and how large, frame
by frame. Both take any uint8 video (3, F, H, W) and never fail: a shape or a motion that is none of
the world's is "unclear", what has neither is no thing, and a video without things gives ().

Colour tells objects apart (two of a scene never share one), their centres and areas over time tell
the motion, and overlap with drawn templates tells the shape.
"""

import math
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toy.world import COLOURS, MOTIONS, SHAPES, Thing, coverage, tell

UNCLEAR = "unclear"  # a shape or a motion that is none of the world's

# Lengths are in units of a 32nd of the frame's shorter side, as in world.py; areas in such squares.
PURE = 0.3  # of a palette colour's chroma, in a pixel and its neighbours: less is background, noise
CORE = 0.5  # of an object's own chroma: its inside
SUPPORT = 0.35  # of a pixel's neighbourhood is inside: less is a speck
LEAST_AREA = 8.0  # mean over time; the smallest object of the world has about 20
LEAST_PRESENCE = 0.7  # share of the frames an object must be seen in
MOVED = 2.5  # way of the centre over the clip; the world's least is 4.3
GREW = math.log(1.25)  # of the radius; the world's least is log 1.6
STEADY = 1.5  # distance from constant motion, RMS; the world's are below 0.1
ALIKE = 0.65  # overlap with the best template; the world's are above 0.97, with much noise 0.8
LARGE = 0.85  # of an object's largest radius: smaller ones have too few pixels to tell a shape
SHAPE_FRAMES = 5  # frames compared with templates, the largest of the object

# The plane of chroma, orthogonal to grey: (2, 3).
CHROMA = np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32)
CHROMA /= np.linalg.norm(CHROMA, axis=1, keepdims=True)
PALETTE = CHROMA @ np.array(list(COLOURS.values()), np.float32).T  # (2, 6)


class Track(NamedTuple):
    """One object over time."""

    colour: str
    centres: Tensor  # (F, 2): x, y of the centre of mass, in widths and heights of the frame
    areas: Tensor  # (F,): in areas of the frame; 0 where it is not seen
    coverage: Tensor  # (F, H, W): how much of each pixel it covers, 0 to 1


def colour_coverage(video: np.ndarray) -> np.ndarray:
    """Return how much of each pixel each palette colour covers, (6, F, H, W), 0 to 1.

    A pixel on an object's edge mixes its colour with the background's, and so does its chroma: the
    share of the palette's chroma is the share of the pixel. Only the nearest hue gets it.
    """
    chroma = np.tensordot(CHROMA, video.astype(np.float32), 1)  # (2, F, H, W)
    chroma -= np.median(chroma.reshape(2, -1), axis=1)[:, None, None, None]  # the background's
    strength = np.linalg.norm(PALETTE, axis=0)  # (6,)
    share = np.tensordot((PALETTE / strength**2).T, chroma, 1)  # (6, F, H, W)
    share = np.where(share == share.max(0), share, 0).clip(0)
    for one in share:  # (F, H, W): a colour, without what is not near an object
        pure = one[neighbourhood(one) > PURE] if one.max(initial=0) > PURE else ()
        if not len(pure):
            one[:] = 0
            continue
        one /= max(CORE, np.quantile(pure, 0.8))  # the object's own chroma, paler or richer
        core = neighbourhood(np.where(one > CORE, one, 0)) > SUPPORT
        one *= neighbourhood(neighbourhood(core.astype(np.float32))) > 0
    return share.clip(0, 1)


def neighbourhood(x: np.ndarray) -> np.ndarray:
    """Return the mean over 3 x 3 pixels of (..., H, W); the edge is repeated."""
    for axis in (-2, -1):
        size = x.shape[axis]
        rows = np.arange(size)
        before, after = np.maximum(rows - 1, 0), np.minimum(rows + 1, size - 1)
        x = (x.take(before, axis) + x + x.take(after, axis)) / 3
    return x


def centre_of_mass(mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre (F, 2) as x, y in pixels and the area (F,) of mass (F, H, W)."""
    F, H, W = mass.shape
    area = mass.sum((1, 2))
    x = mass.sum(1) @ np.arange(0.5, W)
    y = mass.sum(2) @ np.arange(0.5, H)
    return np.stack([x, y], 1) / np.maximum(area, 1e-6)[:, None], area


def tracks(video: Tensor) -> list[Track]:
    """Return the objects of a video (3, F, H, W) uint8, in the order a caption names them."""
    found = []
    F, H, W = video.shape[1:]
    square = (min(H, W) / 32) ** 2  # of a unit, in pixels
    if F == 0 or square == 0:
        return []
    for colour, mass in zip(COLOURS, colour_coverage(video.cpu().numpy()), strict=True):
        if mass.sum() / F < LEAST_AREA * square:
            continue
        centres, areas = centre_of_mass(mass)
        if (areas > LEAST_AREA / 2 * square).mean() < LEAST_PRESENCE:
            continue
        centres, areas = torch.from_numpy(centres / [W, H]), torch.from_numpy(areas / (H * W))
        found.append(Track(colour, centres.float(), areas.float(), torch.from_numpy(mass)))
    return in_order(found, H, W)


def in_order(found: list[Track], height: int, width: int) -> list[Track]:
    """Sort left to right if they lie more side by side than one above the other, else downwards."""
    if not found:
        return []
    middles = torch.stack([track.centres.mean(0) for track in found])  # (objects, 2)
    spread = (middles.amax(0) - middles.amin(0)) * torch.tensor([width, height])
    axis = 0 if spread[0] >= spread[1] else 1
    return [found[i] for i in middles[:, axis].argsort()]


def read_motion(centres: np.ndarray, areas: np.ndarray) -> str:
    """Return the motion of an object from its centres (F, 2) and areas (F,), in units."""
    seen = areas > LEAST_AREA / 2
    if not seen.any():
        return UNCLEAR
    path = np.column_stack([centres, np.sqrt(areas / math.pi)])[seen]  # (F, 3): x, y, radius
    middle = path.mean(0)
    time = np.linspace(-0.5, 0.5, len(areas))[seen]
    time -= time.mean()
    change = time @ path / max(time @ time, 1e-6)  # (3,): over the clip, along the line of best fit
    astray = path - middle - time[:, None] * change
    if np.sqrt((astray**2).sum(1).mean()) > STEADY:
        return UNCLEAR
    growth = 2 * math.atanh(np.clip(change[2] / 2 / middle[2], -0.99, 0.99))  # log last over first
    axis = int(np.abs(change[:2]).argmax())
    way = change[axis]
    # Growing moves the centre of mass a little, and moving blurs the area: the clearer one counts.
    if abs(growth) / GREW > max(1, abs(way) / MOVED):
        return "grows" if growth > 0 else "shrinks"
    if abs(way) > MOVED:
        step = (0, np.sign(way), 0) if axis == 0 else (np.sign(way), 0, 0)  # y, x, growth
        return next(motion for motion, direction in MOTIONS.items() if direction == step)
    return "stays still"


@lru_cache
def moments(shape: str) -> tuple[float, float]:
    """Return a shape's area in squares of its radius, and how far below its middle its mass is."""
    pixels = np.arange(0.5, 800, dtype=np.float32)
    centre, area = centre_of_mass(coverage(shape, [400.0], [400.0], [300.0], pixels, pixels))
    return area[0] / 300**2, (centre[0, 1] - 400) / 300


def read_shape(mass: np.ndarray, centres: np.ndarray, areas: np.ndarray) -> str:
    """Return the shape whose template overlaps an object best.

    mass: (F, H, W) its coverage. centres: (F, 2), areas: (F,) pixels.
    """
    best = areas.argsort()[-SHAPE_FRAMES:]
    best = best[areas[best] > 0]
    mass, centres, areas = mass[best], centres[best].astype(np.float32), areas[best]
    y, x = (np.arange(0.5, size, dtype=np.float32) for size in mass.shape[1:])
    overlaps = {}
    for shape in SHAPES:
        area, below = moments(shape)
        radius = np.sqrt(areas / area)  # (F,)
        sharp = coverage(shape, centres[:, 1] - below * radius, centres[:, 0], radius, y, x)
        for template in (sharp, neighbourhood(sharp)):  # a blurred square is no circle
            overlap = np.minimum(mass, template).sum() / np.maximum(mass, template).sum()
            overlaps[overlap] = shape
    return overlaps[max(overlaps)] if max(overlaps) > ALIKE else UNCLEAR


def stretches(frames: int, events: int) -> list[slice]:
    """Return the frames of each of the equally long events of a clip; some edges are shared."""
    edges = [k * (frames - 1) / events for k in range(events + 1)]  # some lie between two frames
    return [slice(ceil(a), floor(b) + 1) for a, b in pairwise(edges)]


def read_motions(centres: np.ndarray, areas: np.ndarray, events: int) -> str:
    """Return the motions of an object in the stretches of a clip, as a caption tells them.

    centres: (F, 2), areas: (F,), in units.
    """
    found = [read_motion(centres[s], areas[s]) for s in stretches(len(areas), events)]
    return UNCLEAR if set(found) == {UNCLEAR} else tell(found)


def pixels(track: Track) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a track's coverage (F, H, W), centres (F, 2) and areas (F,) in pixels."""
    H, W = track.coverage.shape[1:]
    return track.coverage.numpy(), track.centres.numpy() * [W, H], track.areas.numpy() * (H * W)


def things(video: Tensor, events: int = 1) -> list[Thing]:
    """Return a thing for every track of a video (3, F, H, W) uint8, unclear ones too."""
    unit, found = min(video.shape[2:]) / 32, []
    for track in tracks(video):
        mass, centres, areas = pixels(track)
        motion = read_motions(centres / unit, areas / unit**2, events)
        found.append(Thing(track.colour, read_shape(mass, centres, areas), motion))
    return found


def read(video: Tensor, events: int = 1) -> tuple[Thing, ...]:
    """Return the things a video (3, F, H, W) uint8 shows, in the order a caption names them.

    events: motions of a thing, one after another (world.py).
    """
    return tuple(
        thing
        for thing in things(video, events)
        if thing.shape != UNCLEAR or thing.motion != UNCLEAR
    )


class Story(NamedTuple):
    """One object over the events of a clip."""

    colour: str
    motion: str  # of all events, as a caption tells it
    present: list[bool]  # in each event: is it there throughout
    shapes: list[str]  # in each event in which it is large at some time
    radii: Tensor  # (F,): of a disc of its area, in units; 0 where it is not seen


def read_stories(video: Tensor, events: int) -> list[Story]:
    """Return the objects of a video (3, F, H, W) uint8 with what they are in each event."""
    unit, parts, found = min(video.shape[2:]) / 32, stretches(video.shape[1], events), []
    for track in tracks(video):
        mass, centres, areas = pixels(track)
        seen = areas > LEAST_AREA / 2 * unit**2
        large = [s for s in parts if areas[s].max(initial=0) > LARGE**2 * areas.max()]
        found.append(
            Story(
                track.colour,
                read_motions(centres / unit, areas / unit**2, events),
                [bool(seen[s].sum() >= LEAST_PRESENCE * len(seen[s])) for s in parts],
                [read_shape(mass[s], centres[s], areas[s]) for s in large],
                torch.from_numpy(np.sqrt(areas / math.pi) / unit).float(),
            )
        )
    return found
