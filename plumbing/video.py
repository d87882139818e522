"""Video files: the picture that a player shows at a time, and animations written.

film.py reads what ffmpeg knows, Pillow images and animations of images; a folder of images is a
video too. All three yield frames in one form: until when one is on screen, and its picture.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from plumbing.files import UserError, replacing, require, write_file
from plumbing.film import Picture, check_size, frames_by_av

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # frames in a folder
PILLOW = (".gif", *IMAGES)  # read without PyAV; an .apng is not: Pillow blends its frames wrongly
VIDEOS = (".gif", ".apng", ".webp", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm")
VIDEOS += (".avi", ".wmv", ".asf", ".flv", ".f4v", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts")
VIDEOS += (".m2ts", ".ogv", ".mxf", ".dv", ".rm", ".rmvb", ".y4m")
READER = 3  # version of the code that reads: what an earlier one has cached may look different
TOLERANCE = 1e-3  # seconds: some containers round timestamps to a millisecond
STILL = 10.0  # seconds: a frame that stays longer, for hours perhaps, is cut to this
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is larger, and it warns before it refuses


# --- images, by Pillow --------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """Read an image upright; UserError, before it is decoded, if it is larger than any video."""
    with Image.open(path) as image:
        check_size(*image.size)
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its metadata asks; 16-bit greys, which Pillow would clip, become 8-bit."""
    if image.mode == "F":
        raise UserError("its pixels are fractions, of no known range: save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
    return image


def frames_by_pillow(path: Path) -> Iterator[tuple[float, Picture]]:
    """Yield the frames of an image or an animation, as `frames_by_av` does."""
    until = 0  # milliseconds
    with Image.open(path) as file:
        # The second picture of a phone's photograph (MPO) is of its depth or light.
        for image in [file] if file.format == "MPO" else ImageSequence.Iterator(file):
            check_size(*image.size)  # of each: a later one may be larger
            picture = image.copy()  # decodes, which also sets the duration
            until += image.info.get("duration") or 100  # players take 0 for 100 ms
            yield until / 1000, partial(upright, picture)


def frames_by_name(folder: Path, fps: float) -> Iterator[tuple[float, Picture]]:
    """Likewise for a folder of images, in the order of the numbers in their names."""
    images = [p for p in folder.glob("[!.]*") if p.suffix.lower() in IMAGES and p.is_file()]
    for k, image in enumerate(sorted(images, key=natural), 1):
        yield k / fps, partial(read_image, image)


def natural(path: Path) -> tuple:
    """Return a key that sorts f2 before f10."""
    words = re.split(r"(\d+)", path.name.lower())  # every other one is a number
    return [int(word) if k % 2 else word for k, word in enumerate(words)], path.name


# --- what is on screen at a time ----------------------------------------------------------------


def without_long_stills(frames: Iterable[tuple[float, Picture]]) -> Iterator[tuple[float, Picture]]:
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


def enlarge(video: Tensor, least: int = 256) -> Tensor:
    """Repeat the pixels of a small video (3, F, H, W) a whole number of times, to be seen."""
    factor = max(1, least // video.shape[-2])
    return video.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def write_video(path: Path, pieces: Iterable[Tensor], fps: float):
    """Write an animation; the suffix says which: .gif, .webp (lossless) or .mp4 (needs PyAV).

    pieces: (3, f, H, W) uint8, one after the other; small ones are enlarged. An .mp4 is written as
    they come, so that its length takes no memory; Pillow wants all pictures of the others at once.
    """
    arrays = (rearrange(enlarge(x).cpu().numpy(), "c f h w -> f h w c") for x in pieces)
    pictures = chain.from_iterable(arrays)
    if path.suffix == ".mp4":
        write_mp4(path, pictures, fps)
        return
    images = [Image.fromarray(picture) for picture in pictures]
    tick = 10 if path.suffix == ".gif" else 1  # milliseconds: the format's unit of time
    # No frame begins after its time, so that who asks what is shown then finds it.
    ends = [int(k * 1000 / fps / tick) * tick for k in range(len(images) + 1)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    buffer = BytesIO()
    images[0].save(
        buffer,
        path.suffix[1:],
        save_all=True,
        append_images=images[1:],
        duration=[end - start for start, end in pairwise(ends)],
        loop=0,
        **options,
    )
    write_file(path, buffer.getvalue())


def write_mp4(path: Path, pictures: Iterable[np.ndarray], fps: float):
    """Encode pictures (H, W, 3) uint8 as they come, with BT.709 colours, and said to be so."""
    av = require("av", "video")
    stream = None
    options = {"movflags": "faststart"}  # a browser can begin before it has all
    whole = path.absolute()  # else ffmpeg takes what stands before a colon for a protocol
    with replacing(whole) as output, av.open(output.name, "w", "mp4", options=options) as file:
        for picture in pictures:
            height, width = (side - side % 2 for side in picture.shape[:2])  # yuv420p
            if stream is None:
                stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height = width, height
                stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
                stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
                stream.color_range = 1  # limited
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]))
            colours = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
            file.mux(stream.encode(frame.reformat(format="yuv420p", **colours)))
        file.mux(stream.encode())
