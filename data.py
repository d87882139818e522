"""Folders of real videos as datasets, and a look at any dataset's clips.

A dataset (`World`, `Folder`) has `config`, `len`, `batch(indices)`, `captions(indices)` and
`semantic_video(indices)` (only the low-rate frames). Video is uint8 `(B, 3, F, H, W)`. Every clip
comes at two rates: `video` for the VAE, and a few frames of the same stretch of time for the
semantic encoder. Frames are chosen by timestamp: the frame at t is what a player shows at t.

    python data.py preview --data FOLDER --out preview.png
    python data.py precompute FOLDER --out CACHE --qwen WEIGHTS --vae WEIGHTS --text WEIGHTS
"""

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from io import BytesIO
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import Tensor

from files import UserError, check_target, command, require, write_file
from world import Batch, DataConfig, World


def semantic_times(config: DataConfig) -> list[float]:
    """Return the seconds into a clip of each semantic frame; beyond the end, the last frame's."""
    last = (config.frames - 1) / config.fps
    return [min(k / config.semantic_fps, last) for k in range(config.semantic_frames)]


# --- real videos --------------------------------------------------------------------------------

PILLOW = (".gif", ".webp", ".apng", ".png")  # read without PyAV
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".webp", ".apng")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # frames in a folder
TOLERANCE = 1e-3  # seconds: some containers round timestamps to a millisecond
LARGEST = 8192 * 4320  # pixels of a frame: a damaged file may claim any number, and memory for it
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is larger, and it warns before it refuses
STILL = 10.0  # seconds: a frame that stays longer, for hours perhaps, is cut to this
Picture = Callable[[], Image.Image]  # only the frames that are used get converted to RGB


def frames_by_pillow(path: Path) -> Iterator[tuple[float, Picture]]:
    """Yield (seconds until which it is on screen, picture) of each frame; the first starts at 0."""
    until = 0.0
    with open_image(path) as file:
        for image in ImageSequence.Iterator(file):
            check_size(*image.size)  # a later frame may be larger
            picture = image.copy()  # decodes, which also sets the duration
            until += (image.info.get("duration") or 100) / 1000  # players take 0 for 100 ms
            yield until, picture.copy


def open_image(path: Path) -> Image.Image:
    """Open an image without decoding it; UserError if it claims to be larger than any video."""
    image = Image.open(path)
    try:
        check_size(*image.size)
    except UserError:
        image.close()
        raise
    return image


def check_size(width: int, height: int):
    """Raise UserError, before there is memory for it, if a frame is larger than any video's."""
    if width * height > LARGEST:
        raise UserError(f"frames of {width} x {height} pixels: too large")


def frames_by_av(path: Path) -> Iterator[tuple[float, Picture]]:
    """Likewise for what ffmpeg reads."""
    av = require("av", "video")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError("there is no video in it")
        if container.format.name == "tty":  # ffmpeg draws text files
            raise UserError("it is text, not a video")
        stream, first, start, before = container.streams.video[0], None, 0.0, None
        check_size(stream.width, stream.height)
        usual = 1 / float(stream.average_rate or 25)  # seconds a frame
        for frame in container.decode(stream):
            if first is None:
                first = start = frame.time or 0.0
            else:
                in_order = frame.time is not None and frame.time > start
                start = frame.time if in_order else start + usual  # raw streams have no times
                yield start - first, partial(upright, before)
            before = frame
        if before is not None:
            length = float(before.duration * stream.time_base) or usual
            yield start - first + length, partial(upright, before)


def upright(frame) -> Image.Image:
    """Return a frame of PyAV, turned (counter-clockwise) as the video's metadata asks."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def frames_by_name(folder: Path, fps: float) -> Iterator[tuple[float, Picture]]:
    """Likewise for a folder of images, in the order of their names, at a constant rate."""
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    for k, image in enumerate(images, 1):
        yield k / fps, lambda path=image: ImageOps.exif_transpose(open_image(path))


def without_long_stills(
    frames: Iterable[tuple[float, Picture]],
) -> Iterator[tuple[float, Picture]]:
    """Cut what is on screen for longer than STILL to it.

    Nothing happens in what is left out, and however long a file says that a frame stays, its clips
    are few.
    """
    before = left_out = 0.0
    for until, picture in frames:
        left_out += max(0.0, until - before - STILL)
        before = until
        yield until - left_out, picture


def frames_at(path: Path, times: Iterable[float], fps: float) -> Iterator[tuple[Image.Image, bool]]:
    """Yield the picture on screen at each of the ascending times, in one pass over a video.

    After the end the last one is held, and the bool, True until then, is False. fps is for a folder
    of images, which has no times of its own. UserError if the video cannot be read.
    """
    try:
        if path.is_dir():
            frames = frames_by_name(path, fps)
        elif path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError("neither a file nor a folder")
        else:
            frames = (frames_by_pillow if path.suffix.lower() in PILLOW else frames_by_av)(path)
        times, picture = iter(times), None
        time = next(times)
        with closing(frames):
            for until, picture in without_long_stills(frames):
                image = None
                while time < until - TOLERANCE:
                    image = image or picture()
                    yield image, True
                    if (time := next(times, None)) is None:
                        return
        if picture is None:
            raise UserError("there are no frames in it")
        image = picture()
        for _ in chain([time], times):
            yield image, False
    except Exception as error:  # whatever a decoder makes of a broken file
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        reason = (reason or type(error).__name__) if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: {reason}") from None


def fit(image: Image.Image, height: int, width: int) -> Tensor:
    """Cut the middle of an image to the target's aspect and resize it: (3, H, W) uint8."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    scale = min(image.width / width, image.height / height)
    left = max(0.0, (image.width - scale * width) / 2)
    top = max(0.0, (image.height - scale * height) / 2)
    box = (left, top, image.width - left, image.height - top)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(rearrange(np.array(image), "h w c -> c h w"))


def read_video(path: Path, times: Sequence[float], height: int, width: int, fps=8.0) -> Tensor:
    """Return the frames on screen at ascending times, (3, len(times), H, W) uint8 (`frames_at`)."""
    return torch.stack([fit(x, height, width) for x, _ in frames_at(Path(path), times, fps)], 1)


def cut(path: Path, config: DataConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the consecutive clips of a video at both rates, at least one, in one pass over it.

    Each is (3, F, H, W) and (3, Fs, Hs, Ws), uint8. The rest at the end is left out.
    """
    high, low = [k / config.fps for k in range(config.frames)], semantic_times(config)
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


def list_videos(folder: Path) -> list[tuple[Path, str]]:
    """Return (file, caption) of a dataset folder; the caption is "" where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    listing = folder / "captions.jsonl"
    if listing.exists() and not listing.is_file():
        raise UserError(f"{listing} is not a file")
    if not listing.exists():
        files = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in VIDEOS)
        if not files:
            raise UserError(f"{folder}: neither captions.jsonl nor any video is in it")
        texts = [p.with_suffix(".txt") for p in files]
        texts = [p.read_text("utf-8", "replace") if p.is_file() else "" for p in texts]
        return [(file, " ".join(text.split())) for file, text in zip(files, texts, strict=True)]
    entries = []
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = Path(entry["video"]), " ".join(entry["caption"].split())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            form = '{"video": "relative/path.mp4", "caption": "..."}'
            raise UserError(f"{listing}, line {number}: expected {form}") from None
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{listing}, line {number}: {name} must lie in the folder")
        entries.append((folder / name, text))
    if not entries:
        raise UserError(f"{listing}: empty, expected one line for each video")
    return entries


def clips_of(file: Path, caption: str, config: DataConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the clips of a captioned video (`cut`).

    UserError, perhaps after some clips, if it cannot be used: what breaks anywhere is not trusted.
    """
    if not caption:
        raise UserError(f"{file}: no caption, or an empty one")
    yield from cut(file, config)


class Folder:
    """Clips of real videos: consecutive pieces of config.seconds, at least one of each video.

    The folder holds captions.jsonl with lines {"video": "relative/path.mp4", "caption": "..."}, or
    NAME.txt beside each video. The videos are read when the first clip is asked for. What cannot be
    read is named, counted and `skipped`; UserError if nothing can.
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
                self._kept.popitem()  # the last one came last
            self._kept[file, caption] = clips
        return self._kept[file, caption]


# --- looking at clips ---------------------------------------------------------------------------


def shown_frames(frames: int) -> list[int]:
    """Return which frames of a video a sheet shows: up to 8, the first and the last with them."""
    return np.linspace(0, frames - 1, min(frames, 8)).round().astype(int).tolist()


def contact_sheet(videos: Tensor, labels: Sequence[str], path: Path | None = None) -> Image.Image:
    """Draw one row for each clip, up to 8 of its frames under its label; write it as PNG to path.

    videos: (B, 3, F, H, W) uint8
    """
    B, _, F, H, W = videos.shape
    scale, gap, line = max(1, round(128 / max(H, W))), 4, 18  # pixels
    H, W = H * scale, W * scale
    numbers = shown_frames(F)
    width = max(480, len(numbers) * (W + gap) + gap)
    font = ImageFont.load_default(14)
    columns = int((width - 2 * gap) / font.getlength("W"))
    texts = [textwrap.wrap(x[:5000], columns, max_lines=20, placeholder=" ...") for x in labels]
    height = sum(len(text) * line + H + 2 * gap for text in texts)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for video, text in zip(videos, texts, strict=True):
        for row in text:
            draw.text((gap, y), row, "black", font)
            y += line
        for column, frame in enumerate(rearrange(video[:, numbers], "c f h w -> f h w c")):
            picture = Image.fromarray(frame.numpy()).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (W + gap), y))
        y += H + 2 * gap
    if path is not None:
        buffer = BytesIO()
        sheet.save(buffer, "png")
        write_file(path, buffer.getvalue())
    return sheet


def preview(args: argparse.Namespace):
    """Draw a sheet of the first clips of a folder, or of the synthetic world."""
    for name, value, most in (("--count", args.count, 1000), ("--size", args.size, 1024)):
        if not 1 <= value <= most:
            raise UserError(f"{name} {value}: at least 1, at most {most}")
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: a sheet is a .png")
    check_target(args.out)
    config = DataConfig(height=args.size, width=args.size)
    dataset = Folder(args.data, config) if args.data else World(config, "train")
    clips = dataset.batch(range(min(args.count, len(dataset))))
    contact_sheet(clips.video, clips.captions, args.out)
    print(f"{args.out}: {len(clips.captions)} of {len(dataset)} clips")


def precompute(args: argparse.Namespace):
    """Encode a folder of videos into a cache; under torchrun, each process takes its share."""
    import cache  # these know this file, and this command alone needs them
    from config import override, preset
    from run import Run, check_weights_named, parts_from_flags

    check_target(args.out, folder=True)
    base = Run.open(args.parts).config if args.parts else preset(args.preset)
    config = override(base, args.settings, **parts_from_flags(args))
    check_weights_named(config)
    run = Run(args.parts or args.out, config)
    if not args.parts and not (run.released("vae") and run.released("encoder")):
        raise UserError(f"preset {args.preset} trains parts of its own: name a run that has them")
    if run.device.type == "cuda":
        run.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    rank, processes = (int(os.environ.get(x, d)) for x, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    cache.precompute(args.folder, args.out, run, args.dtype, rank, processes)


def main():
    from run import add_part_flags

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("preview", help="draw a sheet of clips with captions")
    one.add_argument("--data", type=Path, help="folder of videos; without: the synthetic world")
    one.add_argument("--out", type=Path, default=Path("preview.png"))
    one.add_argument("--count", type=int, default=8, help="clips")
    one.add_argument("--size", type=int, default=32, help="height and width of a clip, pixels")
    one.set_defaults(run_command=preview)
    two = commands.add_parser("precompute", help="encode a folder of videos into a feature cache")
    two.add_argument("folder", type=Path, help="folder of videos with captions")
    two.add_argument("--out", type=Path, required=True, help="folder of the cache")
    # Not --run, which torchrun would take for one of its own.
    two.add_argument("--parts", type=Path, help="a run, whose parts and sizes are taken")
    two.add_argument("--preset", default="paper", help="where no run is named")
    two.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="stored")
    two.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    add_part_flags(two)
    two.set_defaults(run_command=precompute)
    args = parser.parse_args()
    command(lambda: args.run_command(args))


if __name__ == "__main__":
    main()
