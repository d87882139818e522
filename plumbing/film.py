"""What ffmpeg reads, as a player shows it.

Which stream, when each frame is on screen, and how it looks. One chain of ffmpeg's filters, built
for each frame that is used (`shown`), fills in the lines between those of a field, makes pixels
square, turns the picture upright and its colours into RGB. High dynamic range is mapped here: most
builds of ffmpeg lack the filter for it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.files import UserError, require

LARGEST = 8192 * 4320  # pixels of a frame: a damaged file may claim any number, and memory for it
Picture = Callable[[], Image.Image]  # only the frames that are used get converted to RGB


def check_size(width: int, height: int):
    """Raise UserError, before there is memory for it, if a frame is larger than any video's."""
    if width * height > LARGEST:
        raise UserError(f"frames of {width} x {height} pixels: too large")


def frames_by_av(path: Path) -> Iterator[tuple[float, Picture]]:
    """Yield (seconds until which it is on screen, picture) of each frame; the first starts at 0."""
    av = require("av", "video")
    # Without "file:" a colon ends a protocol's name. A title that is not UTF-8 is not looked at.
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        if container.format.name == "tty":  # ffmpeg draws text files
            raise UserError("it is text, not a video")
        stream = main_stream(container)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        check_size(max(stream.width, round(stream.width * aspect)), stream.height)
        if aspect == stream.codec_context.sample_aspect_ratio:  # not the container's own
            aspect = "sar"  # of each frame, which may change
        usual = 1 / float(stream.average_rate or 25)  # seconds a frame
        first, start = None, 0.0
        held = deque(maxlen=2)  # the frame that is on screen, after the one before it
        for frame in decoded(container, stream):
            # These store when a frame is decoded, not when it is shown: B-frames have a wrong pts.
            stamp = frame.dts if container.format.name in ("avi", "asf") else frame.pts
            time = None if stamp is None else float(stamp * frame.time_base)
            if first is None:
                first = start = time or 0.0
            else:
                in_order = time is not None and time > start
                start = time if in_order else start + usual  # raw streams have no times
                yield start - first, partial(shown, held[-1], [*held, frame], aspect)
            held.append(frame)
        if held:
            length = float(frame.duration * frame.time_base) or usual
            yield start - first + length, partial(shown, frame, [*held], aspect)


def main_stream(container):
    """Return the video stream that ffmpeg takes: a default one or a large one, never a cover."""
    flags = require("av.stream", "video").Disposition
    films = [x for x in container.streams.video if not x.disposition & flags.attached_pic]
    known = [x for x in films if x.codec_context]
    if not known:
        raise UserError("ffmpeg does not know its codec" if films else "there is no video in it")
    # ffmpeg's own rule: to be the default one is worth five million pixels.
    return max(known, key=lambda x: x.width * x.height + 5e6 * bool(x.disposition & flags.default))


def decoded(container, stream) -> Iterator:
    """Yield the frames of a stream, with the alpha that ffmpeg's own VP8 and VP9 leave out.

    UserError at the first that is damaged.
    """
    decoder = stream.codec_context
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if library and stream.metadata.get("alpha_mode") == "1":
        decoder = require("av", "video").CodecContext.create(library, "r")
    joined = container.format.name == "mpegts"  # where such files are, a packet seems corrupt
    for packet in container.demux(stream):
        frames = decoder.decode(packet)
        if (packet.is_corrupt and not joined) or any(frame.is_corrupt for frame in frames):
            raise UserError("a frame is damaged, or cut off")
        yield from frames


def shown(frame, around: Sequence, aspect: Fraction | str) -> Image.Image:
    """Return a frame of PyAV as a player shows it.

    around: the frame between its neighbours in time. aspect: width of a pixel over its height, or
    "sar", what the frame says itself.
    """
    steps, pushed = [], [frame]
    if frame.interlaced_frame:  # the lines of the other field are made from the neighbours'
        steps.append(("bwdif", "mode=send_frame"))
        pushed = [x for x in around if layout(x) == layout(frame)]
    steps.append(("scale", f"max(1, round(iw * {aspect})):ih:eval=frame"))
    square = filtered(pushed, steps)[pushed.index(frame)]
    wide = frame.color_trc in HDR or frame.color_primaries == BT2020
    alpha = frame.format.has_palette or any(x.is_alpha for x in frame.format.components)
    form = ("format", "rgb48le" if wide else "rgba" if alpha else "rgb24")
    pixels = filtered([square], [*orientation(frame), form])[0].to_ndarray()
    return Image.fromarray(to_sdr(pixels, frame.color_trc) if wide else pixels)


def filtered(frames: Sequence, steps: Sequence[tuple[str, str | None]]) -> list:
    """Return what a chain of ffmpeg's filters makes of frames that are laid out alike."""
    graph = require("av.filter", "video").Graph()
    graph.threads = 1  # starting more takes longer than the work
    steps = [("buffer", layout(frames[0])), *steps, ("buffersink", None)]
    graph.link_nodes(*(graph.add(*step) for step in steps)).configure()
    for frame in [*frames, None]:
        graph.push(frame)
    return [graph.pull() for _ in frames]


def layout(frame) -> str:
    """Return what a filter graph has to know of a frame of PyAV."""
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000:"
        f"colorspace={frame.colorspace}:range={frame.color_range}"
    )


def orientation(frame) -> list[tuple[str, str | None]]:
    """Return the filters that turn and mirror a frame, in steps of 90 degrees, as its matrix asks.

    The matrix takes a place (x, y) of the frame to (a x + c y, b x + d y) on the screen.
    """
    try:
        a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    except KeyError:
        return []
    except ValueError:  # PyAV stops at side data of a kind that is new to it, but has the rotation
        turn = math.radians(frame.rotation)
        a, b, c, d = math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn)
    steps = []
    if abs(b) + abs(c) > abs(a) + abs(d):
        steps, a, d = [("transpose", "cclock_flip")], c, b
    return steps + [("hflip", None)] * (a < 0) + [("vflip", None)] * (d < 0)


# --- high dynamic range, and primaries of BT.2020 -------------------------------------------------

BT2020, PQ, HLG = 9, 16, 18  # primaries and transfer functions, as ffmpeg numbers them
HDR = (PQ, HLG)
WHITE = 203  # candelas per square metre of what is white in SDR (ITU-R BT.2408)
KNEE = 0.85  # of that white: brighter light is compressed to stay below it
LUMINANCE = np.float32([0.2627, 0.6780, 0.0593])  # of the primaries of BT.2020
BT709 = np.float32(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


@cache
def light_of(transfer: int) -> np.ndarray:
    """Return the light of each 16-bit signal (ITU-R BT.2100): on screen; for HLG, in the scene."""
    signal = np.arange(65536) / 65535
    if transfer not in HDR:  # that of `srgb_of`: greys stay as they are
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
        return light.astype(np.float32)
    if transfer == PQ:
        root = signal ** (32 / 2523)
        light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
        return (10000 / WHITE * light ** (8192 / 1305)).astype(np.float32)
    bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(signal <= 0.5, signal**2 / 3, bright).astype(np.float32)


@cache
def srgb_of() -> np.ndarray:
    """Return the 8-bit sRGB value of each 16-bit light."""
    light = np.arange(65536) / 65535
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * value + 0.5).astype(np.uint8)


def to_sdr(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Map BT.2020 of any dynamic range, (H, W, 3) uint16, to sRGB uint8."""
    light = light_of(transfer)[pixels]
    if transfer == HLG:  # on a screen of 1000 candelas per square metre
        light *= 1000 / WHITE * (light @ LUMINANCE)[..., None] ** 0.2
    if transfer in HDR:
        above = np.maximum(light - KNEE, 0) / (1 - KNEE)
        light = np.minimum(light, KNEE) + (1 - KNEE) * above / (1 + above)
    light = (light @ BT709.T).clip(0, 1)
    return srgb_of()[(65535 * light).astype(np.uint16)]
