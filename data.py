"""What a clip is: its length, rates and sizes; and folders of real videos as datasets of clips.

Every clip comes at two rates: `video` for the VAE, and a few frames of the same stretch of time for
the semantic encoder (Sec. 3.2). Video is uint8 `(B, 3, F, H, W)`. Frames are chosen by timestamp:
the frame at t is what a player shows at t. A dataset (`World`, `Folder`) has `config`, `len`,
`batch(indices)`, `captions(indices)`, `semantic_video(indices)` (only the low-rate frames), and
`shorter(pieces)` (the same in shorter clips).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plumbing.cache import hash_of
from plumbing.captions import list_videos
from plumbing.files import UserError, refuse
from plumbing.video import fit, frames_at


@dataclass(frozen=True)
class DataConfig:
    """Length, rates and sizes of clips, the world's or a folder's."""

    frames: int = 16  # frames per clip, as the VAE sees it
    fps: float = 8.0  # their rate (paper: 24)
    height: int = 32
    width: int = 32
    semantic_fps: float = 2.0  # the semantic encoder's own low rate (paper: 1.6)
    semantic_height: int = 32
    semantic_width: int = 32
    objects: int = 2  # at most so many objects in a clip of the synthetic world, 1 or 2
    events: int = 1  # motions of an object of that world, one after another
    flashes: bool = False  # half of that world's clips have a bright frame

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0 and name != "flashes":
                raise ValueError(f"data.{name} is {value}: it must be above 0")
        if self.objects > 2:
            raise ValueError(f"data.objects is {self.objects}: 1 or 2")
        if self.frames < 4 * self.events and self.events > 1:
            raise ValueError(f"data.events is {self.events}: {self.frames} frames are too few")

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return self.frames / self.fps

    def of_length(self, frames: int) -> "DataConfig":
        """Return the same for videos of so many frames; their events are another matter."""
        return replace(self, frames=frames, events=1)

    def shorter(self, pieces: int) -> "DataConfig":
        """Return the same for clips of 1 / pieces of the length; UserError if it does not fit."""
        if self.frames % pieces:
            raise UserError(f"pieces={pieces}: clips of {self.frames} frames do not divide by it")
        frames, events = self.frames // pieces, max(1, self.events // pieces)
        return replace(self, frames=frames, events=events)

    @property
    def semantic_frames(self) -> int:
        """Frames of a clip at the low rate: as many pairs as begin before its last frame."""
        last = (self.frames - 1) / self.fps
        return 2 * max(1, ceil(last * self.semantic_fps / 2 - 1e-9))

    @property
    def semantic_times(self) -> list[float]:
        """Seconds into the clip of each frame at the low rate; beyond the end, the last frame's."""
        last = (self.frames - 1) / self.fps
        return [min(k / self.semantic_fps, last) for k in range(self.semantic_frames)]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.frames, self.height, self.width

    @property
    def semantic_size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip at the low rate."""
        return self.semantic_frames, self.semantic_height, self.semantic_width


class Batch(NamedTuple):
    """Clips at both rates, the same stretch of time."""

    video: Tensor  # (B, 3, F, H, W) uint8
    semantic_video: Tensor  # (B, 3, Fs, Hs, Ws) uint8
    captions: list[str]


def to_float(video: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded; what lies outside is clamped."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --- clips of a video ---------------------------------------------------------------------------


def cut(path: Path, config: DataConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the consecutive clips of a video at both rates, at least one, in one pass over it.

    Each is (3, F, H, W) and (3, Fs, Hs, Ws), uint8. The rest at the end is left out.
    """
    high, low = [k / config.fps for k in range(config.frames)], config.semantic_times
    moments = sorted({*high, *low})
    times = (k * config.seconds + moment for k in count() for moment in moments)
    pictures = frames_at(path, times, config.fps)
    for clip in count():
        video, semantic_video = [], []
        for moment, (image, playing) in zip(moments, pictures, strict=False):
            if not playing and clip > 0:
                return
            if moment in high:
                video.append(fit(image, config.height, config.width))
            if moment in low:
                picture = fit(image, config.semantic_height, config.semantic_width)
                semantic_video += low.count(moment) * [picture]
        yield torch.stack(video, 1), torch.stack(semantic_video, 1)


def reference_clip(path: Path, config: DataConfig) -> Batch:
    """Return the first config.seconds of a video as a batch of one, without a caption."""
    with closing(cut(Path(path), config)) as clips:
        video, semantic_video = next(clips)
    return Batch(video[None], semantic_video[None], [""])


def clips_of(file: Path, caption: str, config: DataConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the clips of a captioned video (`cut`).

    UserError if it cannot be used. It may come after some clips: then do not use these either.
    """
    if not caption:
        raise UserError(f"{file}: no caption, or one that is empty or not UTF-8")
    yield from cut(file, config)


# --- folders ------------------------------------------------------------------------------------


class Folder:
    """Clips of real videos: consecutive pieces of config.seconds, at least one of each video.

    The folder holds captions.jsonl, or NAME.txt beside each video (`list_videos`). The videos are
    read when the first clip is asked for. What cannot be read is named, counted and `skipped`;
    UserError if nothing can.
    """

    MEMORY = 2 * 1024**3  # bytes of clips that are kept; other videos are decoded when asked for

    def __init__(self, path: Path, config: DataConfig, warn: Callable[[str], None] = print):
        self.path, self.config, self.warn = Path(path), config, warn
        self.videos = list_videos(self.path)
        self.skipped: list[tuple[Path, str]] = []  # file, reason
        self._kept: dict[tuple[Path, str], list[tuple[Tensor, Tensor]]] = {}

    @cached_property
    def _clips(self) -> list[tuple[Path, int, str]]:
        """The file of each clip, which of its clips it is, and the caption."""
        clips = []
        for file, text in self.videos:
            try:
                clips += [(file, k, text) for k in range(len(self._load(file, text)))]
            except UserError as error:
                self.skipped.append((file, str(error).removeprefix(f"{file}: ")))
                self.warn(f"skipped {error}")
        if self.skipped:
            self.warn(f"{self.path}: skipped {len(self.skipped)} of {len(self.videos)} videos")
        if not clips:
            file, reason = self.skipped[0]
            raise UserError(f"{self.path}: no video can be used; the first: {file}: {reason}")
        return clips

    def check(self):
        """Raise UserError if no video begins with a readable clip; stops at the first that does."""
        first = None
        for file, text in self.videos:
            try:
                with closing(clips_of(file, text, self.config)) as clips:
                    next(clips)
                return
            except UserError as error:
                first = first or error
        raise UserError(f"{self.path}: no video can be used; the first: {first}")

    def shorter(self, pieces: int) -> "Folder":
        """Return the same videos in clips of 1 / pieces of the length."""
        return Folder(self.path, self.config.shorter(pieces), self.warn) if pieces > 1 else self

    @property
    def listing(self) -> str:
        """16 hexadecimal digits that stand for the names and captions of its videos."""
        videos = ((file.relative_to(self.path).as_posix(), text) for file, text in self.videos)
        return hash_of(list(videos))

    def __len__(self) -> int:
        return len(self._clips)

    def batch(self, indices: Sequence[int]) -> Batch:
        video = torch.stack([self._clip(i)[0] for i in indices])
        return Batch(video, self.semantic_video(indices), self.captions(indices))

    def semantic_video(self, indices: Sequence[int]) -> Tensor:
        """Return only the low-rate frames, (B, 3, Fs, Hs, Ws) uint8."""
        return torch.stack([self._clip(i)[1] for i in indices])

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self._clips[i][2] for i in indices]

    def _clip(self, index: int) -> tuple[Tensor, Tensor]:
        file, k, text = self._clips[index]
        return self._load(file, text)[k]

    def _load(self, file: Path, caption: str) -> list[tuple[Tensor, Tensor]]:
        """Return all clips of a video at both rates, decoded once if memory allows."""
        if (file, caption) not in self._kept:
            clips = list(clips_of(file, caption, self.config))
            kept = sum(len(x) for x in self._kept.values()) + len(clips)
            if self._kept and kept * (clips[0][0].numel() + clips[0][1].numel()) > self.MEMORY:
                self._kept.popitem()  # the newest: the others stay
            self._kept[file, caption] = clips
        return self._kept[file, caption]


if __name__ == "__main__":
    refuse("data.py has no commands; use prepare.py preview, or prepare.py precompute")
