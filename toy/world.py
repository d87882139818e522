"""The synthetic captioned world: one or two coloured shapes that move over a textured background.

Its captions say all that matters, so that a reader of pixels (reader.py) can tell whether a video
shows what its prompt asked for. Clips are drawn on demand; clip i of a split is a function of
(split, i) alone. The background is not mentioned: a nuisance that a plan may forget.

    "a red circle moves left"    "a blue square grows and a cyan cross stays still"

In long clips (`events` above 1) each object does one thing after another, all for equally long:

    "a red circle moves left then up then stays still then right"

With `flashes` half of the clips have one frame mixed with 60 % white, which no caption tells.

Two objects always differ in colour; their order is left to right where they lie side by side, top
to bottom where one lies above the other. A tenth of the combinations of colour, shape and motion is
never shown in training (`is_held_out`).

Layouts: video (B, 3, F, H, W) uint8; lengths of a scene in 32nds of the frame.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Batch, DataConfig
from plumbing.files import UserError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 210, 50),
    "magenta": (210, 60, 210),
    "cyan": (60, 210, 220),
}
MOTIONS = {  # verb phrase -> direction (y, x) and sense of growth
    "moves left": (0, -1, 0),
    "moves right": (0, 1, 0),
    "moves up": (-1, 0, 0),
    "moves down": (1, 0, 0),
    "stays still": (0, 0, 0),
    "grows": (0, 0, 1),
    "shrinks": (0, 0, -1),
}
GROWTH = 1.7  # radius at the large end over radius at the small end
FLASH = 0.6  # share of white in a flash
EXTENT = 1.1  # no shape reaches further than this many radii from its centre
SPLITS = ("train", "test", "held_out")
CHUNK = 32  # clips drawn at a time: larger ones fall out of the processor's cache


class Thing(NamedTuple):
    """One object of a scene, as its caption tells it."""

    colour: str
    shape: str
    motion: str  # or several: "moves left then up then stays still"


# --- shapes: signed distances, negative inside, in units of the radius ---------------------------


def circle(x, y):
    return np.sqrt(x * x + y * y) - 1


def square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def triangle(x, y):
    """Tip at the top (0, -1.1), base from (-1.1, 0.8) to (1.1, 0.8)."""
    side = (1.9 * np.abs(x) - 1.1 * (y + 1.1)) / np.hypot(1.9, 1.1)
    return np.maximum(side, y - 0.8)


def cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.36, np.maximum(x, y) - 1.05)


SHAPES = {"circle": circle, "square": square, "triangle": triangle, "cross": cross}


def coverage(shape: str, y, x, radius, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that a shape covers, (..., H, W): its anti-aliased mask.

    y, x, radius: (...) in pixels; rows (H,) and columns (W,): centres of the pixels.
    """
    radius = np.asarray(radius, np.float32)[..., None, None]
    dy = (rows[:, None] - np.asarray(y, np.float32)[..., None, None]) / radius
    dx = (columns - np.asarray(x, np.float32)[..., None, None]) / radius
    return np.clip(0.5 - SHAPES[shape](dx, dy) * radius, 0, 1)


# --- captions ------------------------------------------------------------------------------------


def caption(scene: Sequence[Thing]) -> str:
    """Tell a scene in words."""
    return " and ".join(f"a {thing.colour} {thing.shape} {thing.motion}" for thing in scene)


def tell(motions: Sequence[str]) -> str:
    """Join motions that follow one another: ["moves left", "moves up"] -> "moves left then up"."""
    return " then ".join([motions[0], *(motion.removeprefix("moves ") for motion in motions[1:])])


def motions_of(text: str) -> list[str]:
    """Undo `tell`; ValueError if a part is no motion of this world."""
    first, *others = text.split(" then ")
    found = [first, *(f"moves {x}" if f"moves {x}" in MOTIONS else x for x in others)]
    if unknown := [motion for motion in found if motion not in MOTIONS]:
        raise ValueError(f"{unknown[0]!r} is no motion of this world")
    return found


def is_held_out(thing: Thing) -> bool:
    """Whether a combination is never shown in training: 17 of 168; every pair of attributes is.

    Of several motions the first counts.
    """
    colour, first = list(COLOURS).index(thing.colour), motions_of(thing.motion)[0]
    shape, motion = list(SHAPES).index(thing.shape), list(MOTIONS).index(first)
    return (colour + 2 * shape + 3 * motion) % 10 == 0


COMBINATIONS = [Thing(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]


class World:
    """Captioned clips without end, drawn anti-aliased."""

    def __init__(self, config: DataConfig, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: choose {', '.join(SPLITS)}")
        if config.height * config.semantic_width != config.width * config.semantic_height:
            raise UserError(
                f"the world is drawn in one aspect: {config.height} x {config.width} and "
                f"{config.semantic_height} x {config.semantic_width} differ"
            )
        self.config, self.split = config, split
        self.things = [t for t in COMBINATIONS if is_held_out(t) == (split == "held_out")]

    def __len__(self) -> int:
        return 2**31

    def shorter(self, pieces: int) -> "World":
        """Return the same split in clips of 1 / pieces of the length."""
        return type(self)(self.config.shorter(pieces), self.split)

    def scene(self, index: int) -> tuple[Thing, ...]:
        """Return what clip `index` shows."""
        return self._scene(self._rng(index))

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return captions without drawing."""
        return [caption(self.scene(i)) for i in indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Draw clips at both rates."""
        config = self.config
        video = self._draw(indices, np.arange(config.frames), config.height, config.width)
        low = self._low_rate_frames()
        if (config.semantic_height, config.semantic_width) == (config.height, config.width):
            semantic_video = video[:, :, torch.from_numpy(low)]
        else:
            semantic_video = self.semantic_video(indices)
        return Batch(video, semantic_video, self.captions(indices))

    def semantic_video(self, indices: Sequence[int]) -> Tensor:
        """Draw only the frames of the low rate, (B, 3, Fs, Hs, Ws) uint8."""
        config = self.config
        frames = self._low_rate_frames()
        return self._draw(indices, frames, config.semantic_height, config.semantic_width)

    def flash(self, index: int) -> int | None:
        """Return the frame in which clip `index` flashes, if it does."""
        if not self.config.flashes:
            return None
        frames = self.config.frames
        rng = np.random.default_rng([SPLITS.index(self.split), index, 1])
        frame = int(rng.integers(2 * frames))  # of numbers of its own: the rest stays as it is
        return frame if frame < frames else None

    def _low_rate_frames(self) -> np.ndarray:
        """The frame on screen at each k / semantic_fps; the last one holds."""
        return np.floor(np.array(self.config.semantic_times) * self.config.fps + 1e-6).astype(int)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([SPLITS.index(self.split), int(index)])

    def _scene(self, rng: np.random.Generator) -> tuple[Thing, ...]:
        count = int(rng.integers(1, self.config.objects + 1))
        things: list[Thing] = []
        while len(things) < count:
            thing = self.things[rng.integers(len(self.things))]
            if thing.colour not in [t.colour for t in things]:
                things.append(thing)
        if self.config.events == 1:
            return tuple(things)
        return tuple(thing._replace(motion=self._story(rng, thing.motion)) for thing in things)

    def _story(self, rng: np.random.Generator, first: str) -> str:
        """Draw what an object does after its first motion.

        It is at one of two places each way and of one of two sizes: it can go left if it is on the
        right, shrink if it is large, and stay as it is. It starts large unless it grows first.
        """
        told, state = [first], [int(rng.integers(2)), int(rng.integers(2)), 1]  # y, x, size
        for axis, change in enumerate(MOTIONS[first]):
            if change:
                state[axis] = (change + 1) // 2  # where the first motion has led
        while len(told) < self.config.events:
            axis = int(rng.integers(4))
            step = [0, 0, 0]
            if axis < 3:
                step[axis] = 1 - 2 * state[axis]
                state[axis] = 1 - state[axis]
            told.append(next(name for name, change in MOTIONS.items() if change == tuple(step)))
        return tell(told)

    def _layout(self, index: int):
        """Return all that is random in a clip: [(thing, tint, path (E + 1, 3))], texture.

        A path is y, x, radius at the start of each of the E events and at the end; lengths in units
        of a 32nd of the frame's shorter side.
        """
        rng, config = self._rng(index), self.config
        scene = self._scene(rng)
        size = np.array([config.height, config.width]) * 32 / min(config.height, config.width)
        cells = np.tile(np.concatenate([[0, 0], size]), (len(scene), 1))  # top, left, bottom, right
        if len(scene) > 1:
            axis = int(rng.integers(2))  # 0: one above the other; 1: side by side
            edges = np.linspace(0, size[axis], len(scene) + 1)
            cells[:, axis], cells[:, axis + 2] = edges[:-1], edges[1:]
        objects = []
        for thing, cell in zip(scene, cells, strict=True):
            radius = rng.uniform(6.0, 7.5) if len(scene) == 1 else rng.uniform(4.6, 5.3)
            changes = np.array([MOTIONS[motion] for motion in motions_of(thing.motion)])  # (E, 3)
            room = cell[2:] - cell[:2] - 2 * EXTENT * radius  # in which the centre can lie
            along = abs(changes[:, :2]).max(0)
            travel = rng.uniform(*((9, 11) if len(scene) == 1 else (5, 8)))
            travel = along * np.minimum(travel, room)  # at least 4.3 in the short side of a half
            low = cell[:2] + EXTENT * radius + rng.uniform(size=2) * (room - travel)
            if len(scene) > 1:  # near the middle the other way, so that their order is clear
                low[1 - axis] = size[1 - axis] / 2 + rng.uniform(-4.5, 4.5) - travel[1 - axis] / 2
            # Up or left, or smaller, counts from the far place, or the full size, back.
            levels = np.concatenate([np.zeros((1, 3)), np.cumsum(changes, 0)])  # (E + 1, 3)
            places = low + travel * (levels - levels.min(0))[:, :2]
            radii = radius / GROWTH ** (levels.max(0) - levels)[:, 2]
            tint = rng.uniform(0.88, 1.05)
            objects.append((thing, tint, np.column_stack([places, radii])))
        grey = (
            rng.uniform(70, 150) + rng.uniform(-25, 25, (4, 4, 1)) + rng.uniform(-6, 6, (4, 4, 3))
        )
        return objects, grey

    def _draw(self, indices: Sequence[int], frames: np.ndarray, height: int, width: int) -> Tensor:
        """Draw the named frames of clips, (B, 3, frames, height, width) uint8."""
        chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
        video = torch.cat([self._draw_chunk(c, frames, height, width) for c in chunks])
        for clip, index in zip(video, indices if self.config.flashes else (), strict=False):
            now = torch.from_numpy(frames == self.flash(index))
            clip[:, now] = (clip[:, now] * (1 - FLASH) + 255 * FLASH).to(clip.dtype)
        return video

    def _draw_chunk(self, indices, frames, height, width) -> Tensor:
        layouts = [self._layout(i) for i in indices]
        grey = np.stack([grey for _, grey in layouts]).astype(np.float32)  # (B, 4, 4, 3)
        ys, xs = _upsampling(height), _upsampling(width)
        texture = np.einsum("hi,bijc,wj->bchw", ys, grey, xs, optimize=True)
        video = np.repeat(texture[:, :, None], len(frames), 2)  # (B, 3, F, H, W)

        unit = min(height, width) / 32  # pixels
        events = self.config.events
        when = events * frames / max(1, self.config.frames - 1)  # 0 at the first frame, in events
        event = np.minimum(when.astype(int), events - 1)  # (F,)
        later = (when - event).astype(float)[:, None]  # (F, 1): the share of it that is over
        rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in (height, width))
        flat = [(b, *thing) for b, (objects, _) in enumerate(layouts) for thing in objects]
        for shape in SHAPES:
            mine = [entry for entry in flat if entry[1].shape == shape]
            if not mine:
                continue
            paths = np.stack([entry[3] for entry in mine]) * unit  # (n, E + 1, 3)
            now = paths[:, event] * (1 - later) + paths[:, event + 1] * later  # (n, F, 3)
            masks = coverage(shape, *np.moveaxis(now, -1, 0), rows, columns)  # (n, F, H, W)
            for mask, (b, thing, tint, *_) in zip(masks, mine, strict=True):
                colour = np.minimum(np.array(COLOURS[thing.colour]) * tint, 255)
                for channel in range(3):
                    video[b, channel] += mask * (np.float32(colour[channel]) - video[b, channel])
        return torch.from_numpy((video + 0.5).astype(np.uint8))


def _upsampling(size: int, coarse: int = 4) -> np.ndarray:
    """Return the weights (size, coarse) of smooth interpolation from a coarse grid."""
    place = (np.arange(size) + 0.5) / size * (coarse - 1)
    distance = np.abs(place[:, None] - np.arange(coarse))
    weights = np.where(distance < 1, 0.5 + 0.5 * np.cos(np.pi * distance), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
