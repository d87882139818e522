"""Films against what a player shows: ffmpeg's rules, and formulas of the standards.

Every film is written here, by PyAV or Pillow or as bytes, with a picture whose right look is known.
"""

import gc
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_video
from PIL import Image

import plumbing.film as film
from plumbing.files import UserError
from plumbing.video import fit, frames_at, write_video

av = pytest.importorskip("av")
TV, FULL = 1, 2  # ranges, as ffmpeg numbers them
BT709, BT2020, PQ, HLG = 1, 9, 16, 18


def write_film(path, frames, codec="ffv1", pix_fmt="bgr0", rate=25, aspect=None, **options):
    """Write arrays (H, W, 3 or 4) uint8, or frames of PyAV as they are."""
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = pix_fmt
        for k, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                form = "rgba" if frame.shape[-1] == 4 else "rgb24"
                frame = av.VideoFrame.from_ndarray(frame, form).reformat(format=pix_fmt)
            if k == 0:
                stream.width, stream.height = frame.width, frame.height
                if aspect:
                    stream.codec_context.sample_aspect_ratio = aspect
                for tag in ("colorspace", "color_range", "color_trc", "color_primaries"):
                    setattr(stream.codec_context, tag, getattr(frame, tag))
            frame.pts, frame.time_base = k, Fraction(1) / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def look(path, time=0.0) -> np.ndarray:
    """Return the picture on screen at a time, of its own size, (H, W, 3)."""
    image, _ = next(frames_at(Path(path), [time], 8.0))
    return np.asarray(image.convert("RGB")).astype(int)


def plain(colour, height=64, width=64) -> np.ndarray:
    return np.full((height, width, len(colour)), colour, np.uint8)


def disc(height, width, radius, aspect=1.0) -> np.ndarray:
    """Return a white disc on black, as it is stored where pixels have an aspect."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - width / 2) * aspect) ** 2 + (y - height / 2) ** 2 < radius**2
    return np.repeat((255 * inside)[..., None], 3, 2).astype(np.uint8)


# --- orientation --------------------------------------------------------------------------------

QUARTERS = np.array([[[230, 20, 20], [20, 230, 20]], [[20, 20, 230], [230, 230, 230]]])
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
MATRICES += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def turned(a, b, c, d) -> np.ndarray:
    """Return where the quarters are on screen: (x, y) comes to (a x + c y, b x + d y)."""
    out = np.zeros_like(QUARTERS)
    for y in (-1, 1):
        for x in (-1, 1):
            out[int(b * x + d * y > 0), int(a * x + c * y > 0)] = QUARTERS[int(y > 0), int(x > 0)]
    return out


def check_quarters(picture, expected, tolerance=12):
    height, width, _ = picture.shape
    found = picture[height // 4 :: height // 2, width // 4 :: width // 2]
    assert abs(found - expected).max() <= tolerance, found.tolist()


def quarters(height=32, width=64) -> np.ndarray:
    return QUARTERS.repeat(height // 2, 0).repeat(width // 2, 1).astype(np.uint8)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_film_is_turned_and_mirrored_as_its_track_asks(tmp_path, matrix):
    file = write_film(tmp_path / "a.mp4", [quarters()] * 2, "mpeg4", "yuv420p", qscale="1")
    content, (a, b, c, d) = bytearray(file.read_bytes()), (x << 16 for x in matrix)
    at = content.index(b"tkhd") + 44  # of the track header: a player turns by it
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    picture = look(file)
    assert picture.shape[:2] == ((32, 64) if matrix[0] else (64, 32))
    check_quarters(picture, turned(*matrix))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_rotation_and_a_mirror_in_other_containers(tmp_path, suffix):
    """The same matrix, written by ffmpeg: a quarter to the left, then mirrored."""
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90, hflip=suffix != ".mkv")  # which has rotations alone
        container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), "rgb24")))
        container.mux(stream.encode())
    expected = np.rot90(QUARTERS)
    check_quarters(
        look(tmp_path / f"a{suffix}"), expected[:, ::-1] if suffix != ".mkv" else expected
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_turned_as_their_exif_asks(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(quarters())
    (tmp_path / "shot").mkdir()
    image.save(tmp_path / f"a{suffix}", exif=exif)
    image.save(tmp_path / "shot" / f"a{suffix}", exif=exif)
    matrix = [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1)]  # of the EXIF standard
    matrix += [(0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)]
    for path in (tmp_path / f"a{suffix}", tmp_path / "shot"):
        check_quarters(look(path), turned(*matrix[orientation - 1]), 60)


def test_a_phones_second_picture_is_not_shown(tmp_path):
    """MPO: a photograph, and in the same file what its light or depth was."""
    first, second = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (64, 32), "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    red, _, blue = read_video(tmp_path / "a.jpg", [0, 0.15, 1], 32, 32).float().mean((1, 2, 3))
    assert red > 250 and blue < 5


def test_motion_jpeg_with_exif(tmp_path):
    """ffmpeg passes EXIF on in a form that PyAV has no name for."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj444p"
        for k in range(2):
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts = stream, k, k
            packet.time_base = Fraction(1, 25)
            container.mux(packet)
    check_quarters(look(tmp_path / "a.mov"), turned(0, 1, -1, 0))


# --- the shape of pixels ------------------------------------------------------------------------


ASPECTS = {  # suffix, codec, width of a pixel over its height, width of the picture
    "PAL, wide": (".mp4", "mpeg4", "64/45", 1024),
    "PAL": (".mkv", "libx264", "16/15", 768),
    "higher than wide": (".mov", "libx264", "8/9", 640),
    "DivX": (".avi", "mpeg4", "64/45", 1024),
    "DVD": (".mpg", "mpeg2video", "64/45", 1024),
    "square": (".mp4", "mpeg4", "1", 720),
}


@pytest.mark.parametrize("suffix, codec, aspect, width", ASPECTS.values(), ids=ASPECTS)
def test_pixels_are_made_square(tmp_path, suffix, codec, aspect, width):
    aspect = Fraction(aspect)
    picture = disc(576, 720, 200, aspect)
    file = write_film(tmp_path / f"a{suffix}", [picture] * 2, codec, "yuv420p", aspect=aspect)
    shown = look(file)[..., 0] > 127
    assert shown.shape == (576, width)
    across, down = shown.any(0).sum(), shown.any(1).sum()
    assert abs(across - 400) <= 4 and abs(down - 400) <= 2, (across, down)


def test_the_container_s_aspect_is_enough(tmp_path):
    """Matroska says how wide a picture is shown, whatever the stream in it says."""
    file = write_film(tmp_path / "a.mkv", [disc(60, 60, 20, 2)] * 2)
    unknown, width = b"\x54\xb2\x81\x04", b"\x54\xb0\x81\x78"  # DisplayUnit, DisplayWidth 120
    assert file.read_bytes().count(unknown) == 1
    file.write_bytes(file.read_bytes().replace(unknown, width))
    shown = look(file)[..., 0] > 127
    assert shown.shape == (60, 120)
    assert abs(shown.any(0).sum() - 40) <= 2 and abs(shown.any(1).sum() - 40) <= 2


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 120, 100, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_rotation(-90)
        picture = disc(100, 120, 40, 2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    shown = look(tmp_path / "a.mp4")[..., 0] > 127
    assert shown.shape == (240, 100)
    assert abs(shown.any(0).sum() - 80) <= 2 and abs(shown.any(1).sum() - 80) <= 2


@pytest.mark.parametrize("aspects", [(1, 2), (2, 1)])
def test_pixels_whose_aspect_changes_are_made_square(tmp_path, aspects):
    """As in a broadcast of a wide film after one that is not."""
    parts = b""
    for aspect in map(Fraction, aspects):
        picture = [disc(60, 80, 20, aspect)] * 4
        options = {"codec": "libx264", "pix_fmt": "yuv420p", "aspect": aspect}
        parts += write_film(tmp_path / "a.h264", picture, **options).read_bytes()
    (tmp_path / "a.h264").write_bytes(parts)
    for aspect, time in zip(aspects, (0.1, 0.2), strict=True):
        shown = look(tmp_path / "a.h264", time)[..., 0] > 127
        assert shown.shape == (60, 80 * aspect)
        assert abs(shown.any(0).sum() - 40) <= 2 and abs(shown.any(1).sum() - 40) <= 2


def test_pixels_too_wide_for_any_picture_are_refused(tmp_path):
    black = [plain((0, 0, 0), 1000, 1000)]
    file = write_film(tmp_path / "a.mkv", black, "mpeg4", "yuv420p", aspect=Fraction(200))
    with pytest.raises(UserError, match="200000 x 1000 pixels: too large"):
        look(file)


# --- fields -------------------------------------------------------------------------------------


def interlace(fields, top_first: bool) -> list[np.ndarray]:
    """Weave pictures (H, W, 3), two by two: even rows from one, odd rows from the other."""
    out = []
    for early, late in zip(fields[::2], fields[1::2], strict=True):
        frame = (late if top_first else early).copy()
        frame[::2] = (early if top_first else late)[::2]
        out.append(frame)
    return out


def bar(at: int, height=96, width=128) -> np.ndarray:
    picture = plain((16, 16, 16), height, width)
    picture[:, at : at + 16] = 235
    return picture


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
@pytest.mark.parametrize("first", ["tff", "bff"])
def test_fields_are_made_frames(tmp_path, first, suffix):
    fields = [bar(4 * k) for k in range(16)]
    frames = interlace(fields, first == "tff")
    assert abs(np.diff(frames[3].astype(int), axis=0)).max() > 200  # combed
    options = {"x264_params": f"{first}=1:crf=1"}
    file = write_film(tmp_path / f"a{suffix}", frames, "libx264", "yuv420p", **options)
    for k in range(8):
        picture = look(file, k / 25)
        assert abs(np.diff(picture, axis=0)).mean() < 2, k
        where = picture[48, :, 0].argmax()
        expected = fields[2 * k][48, :, 0].argmax()
        assert abs(where - expected) <= 4, (k, where, expected)


def test_fields_are_made_frames_as_ffmpeg_does(tmp_path):
    fields = [np.roll(disc(96, 128, 30), 3 * k, 1) for k in range(12)]
    file = write_film(
        tmp_path / "a.mkv", interlace(fields, True), "libx264", "yuv420p", x264_params="tff=1"
    )
    graph = av.filter.Graph()
    with av.open(str(file)) as container:
        source = graph.add_buffer(template=container.streams.video[0])
        filters = [graph.add("bwdif", "mode=send_frame"), graph.add("format", "rgb24")]
        graph.link_nodes(source, *filters, graph.add("buffersink")).configure()
        for frame in [*container.decode(video=0), None]:
            graph.push(frame)
    for k in range(6):
        difference = abs(graph.pull().to_ndarray().astype(int) - look(file, k / 25))
        assert difference.max() == 0, (k, difference.max())


INTERLACED = {  # suffix, codec, format
    "DVD": (".mpg", "mpeg2video", "yuv420p"),
    "a camera's": (".mov", "prores_ks", "yuv422p10le"),
    "broadcast": (".mxf", "mpeg2video", "yuv422p"),
}


@pytest.mark.parametrize("suffix, codec, pix_fmt", INTERLACED.values(), ids=INTERLACED)
@pytest.mark.parametrize("first", ["tff", "bff"])
def test_fields_of_other_codecs(tmp_path, suffix, codec, pix_fmt, first):
    fields = [bar(4 * k) for k in range(16)]
    graph, frames = av.filter.Graph(), []
    source = graph.add("buffer", "video_size=128x96:pix_fmt=rgb24:time_base=1/25")
    filters = [graph.add("setfield", first), graph.add("format", pix_fmt)]
    graph.link_nodes(source, *filters, graph.add("buffersink")).configure()
    for k, picture in enumerate(interlace(fields, first == "tff")):
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.pts = k
        graph.push(frame)
        frames.append(graph.pull())
    file = write_film(tmp_path / f"a{suffix}", frames, codec, pix_fmt, flags="+ilme+ildct")
    for k in range(8):
        picture = look(file, k / 25)
        assert abs(np.diff(picture, axis=0)).mean() < 2, k
        assert abs(picture[48, :, 0] - fields[2 * k][48, :, 0]).mean() < 4, k


def test_progressive_frames_are_left_alone(tmp_path):
    lines = plain((0, 0, 0))
    lines[::2] = 255
    file = write_film(tmp_path / "a.mkv", [lines] * 3)
    assert (look(file, 1 / 25) == lines).all()


# --- alpha --------------------------------------------------------------------------------------


def red_over_hidden_green() -> np.ndarray:
    picture = plain((0, 255, 0, 0))
    picture[disc(64, 64, 20)[..., 0] > 0] = (255, 0, 0, 255)
    return picture


ALPHA = {  # suffix, codec, format
    "VP9": (".webm", "libvpx-vp9", "yuva420p"),
    "VP9 in Matroska": (".mkv", "libvpx-vp9", "yuva420p"),
    "VP8": (".webm", "libvpx", "yuva420p"),
    "Animation": (".mov", "qtrle", "argb"),
    "ProRes 4444": (".mov", "prores_ks", "yuva444p10le"),
    "PNG": (".mov", "png", "rgba"),
    "PNG of 16 bits": (".mov", "png", "rgba64be"),
    "grey PNG": (".mov", "png", "ya8"),
    "FFV1": (".mkv", "ffv1", "yuva420p"),
}


@pytest.mark.parametrize("suffix, codec, pix_fmt", ALPHA.values(), ids=ALPHA)
def test_what_is_transparent_is_black(tmp_path, suffix, codec, pix_fmt):
    options = {"auto_alt_ref": "0"} if codec == "libvpx" else {}
    frames = [red_over_hidden_green()] * 3
    file = write_film(tmp_path / f"a{suffix}", frames, codec, pix_fmt, **options)
    video = read_video(file, [0, 1 / 25, 2 / 25], 64, 64).int()
    red = torch.tensor([76] * 3 if pix_fmt == "ya8" else [255, 0, 0])  # its luma, without colours
    assert (video[:, :, 32, 32] - red[:, None]).abs().max() <= 12
    assert video[:, :, 4, 4].max() <= 12 and video[:, :, 60].max() <= 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_in_an_image_is_black(tmp_path, mode):
    red = Image.fromarray(red_over_hidden_green())
    options = {}
    if mode in ("RGBA", "LA"):
        image = red.convert(mode)
    else:  # colour 0 is green and transparent, colour 1 is red
        image = Image.fromarray(red_over_hidden_green()[..., 3] // 255)
        if mode == "P":
            image.putpalette([0, 255, 0, 255, 0, 0])
        options = {"transparency": 0}
    image.save(tmp_path / "a.png", **options)
    video = read_video(tmp_path / "a.png", [0], 64, 64)[:, 0].int()
    assert video[:, 4, 4].max() == 0
    if mode != "L":
        assert video[0, 32, 32] >= 76


def test_frames_of_an_animation_are_blended_over_those_before(tmp_path):
    """An .apng: a part of each frame is put over what is left, at last over what was before."""
    frames = [Image.new("RGBA", (32, 32)) for _ in range(3)]
    frames[0].paste((255, 0, 0, 255), (0, 0, 8, 8))
    frames[1].paste((0, 0, 255, 128), (16, 16, 24, 24))
    frames[2].paste((0, 255, 0, 255), (8, 8, 16, 16))
    options = {"save_all": True, "append_images": frames[1:], "duration": 125, "blend": 1}
    for disposal, stays in ((0, 1), (2, 0)):
        frames[0].save(tmp_path / "a.apng", "png", disposal=disposal, **options)
        second, third = read_video(tmp_path / "a.apng", [0.125, 0.25], 32, 32).unbind(1)
        assert second[:, 20, 20].tolist() == [0, 0, 128]
        assert third[:, 12, 12].tolist() == [0, 255, 0]
        assert second[:, 4, 4].tolist() == third[:, 4, 4].tolist() == [255 * stays, 0, 0]
        assert third[:, 20, 20].tolist() == [0, 0, 128 * stays]


def test_what_an_apng_shows_elsewhere_is_no_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:], "duration": 125}
    frames[0].save(tmp_path / "a.apng", "png", default_image=True, **options)
    video = read_video(tmp_path / "a.apng", [0, 1 / 8], 32, 32)
    assert video[:, :, 4, 4].T.tolist() == [[0, 255, 0], [0, 0, 255]]


# --- colours ------------------------------------------------------------------------------------

COLOURS = np.array(
    [[250, 250, 250], [200, 30, 40], [30, 180, 60], [40, 60, 220], [128, 128, 128], [16, 16, 16]]
)
COLOURS = np.concatenate([COLOURS, [[235, 210, 50], [0, 0, 0], [220, 150, 120]]])
TO_BT2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)  # ITU-R BT.2087


def light_of_srgb(value) -> np.ndarray:
    value = np.asarray(value) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def pq(light) -> np.ndarray:
    """Return the PQ signal of light in candelas per square metre (SMPTE ST 2084)."""
    y = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(light) -> np.ndarray:
    """Return the HLG signal of light on a screen of 1000 candelas (ITU-R BT.2100)."""
    luminance = (light @ [0.2627, 0.6780, 0.0593] / 1000)[..., None]
    scene = light / 1000 * np.maximum(luminance, 1e-9) ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    bright = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, (3 * scene) ** 0.5, bright)


def stripes(values, size=32) -> np.ndarray:
    return np.asarray(values)[None].repeat(size, 0).repeat(size, 1)


def middles(picture, count, size=32) -> np.ndarray:
    return picture[size // 2, size // 2 :: size][:count]


def write_hdr(path, signal, transfer, codec="ffv1", pix_fmt="yuv420p10le"):
    pixels = np.round(stripes(signal).clip(0, 1) * 65535).astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(pixels, "rgb48le")
    frame = frame.reformat(format=pix_fmt, dst_colorspace=BT2020, dst_color_range=TV)
    frame.colorspace, frame.color_range = BT2020, TV
    frame.color_primaries, frame.color_trc = BT2020, transfer
    return write_film(path, [frame] * 2, codec, pix_fmt)


@pytest.mark.parametrize("suffix, codec", [(".mkv", "ffv1"), (".mp4", "libx264")])
@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_a_film_of_high_dynamic_range_looks_like_its_original(tmp_path, transfer, suffix, codec):
    light = 203 * light_of_srgb(COLOURS) @ TO_BT2020.T
    signal = pq(light) if transfer == PQ else hlg(light)
    file = write_hdr(tmp_path / f"a{suffix}", signal, transfer, codec)
    difference = abs(middles(look(file), len(COLOURS)) - COLOURS)
    assert difference.max() <= 8, difference.tolist()


@pytest.mark.parametrize("transfer", [BT709, 2, 14])
def test_wide_primaries_are_mapped_to_those_of_a_screen(tmp_path, transfer):
    """BT.2020 without high dynamic range; the transfer function may be unknown."""
    light = (light_of_srgb(COLOURS) @ TO_BT2020.T).clip(0, 1)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    picture = look(write_hdr(tmp_path / "a.mkv", signal, transfer))
    assert abs(middles(picture, len(COLOURS)) - COLOURS).max() <= 6


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_brighter_light_stays_apart_up_to_white(tmp_path, transfer):
    light = np.array([100, 150, 203, 300, 400])[:, None].repeat(3, 1).astype(float)
    signal = pq(light) if transfer == PQ else hlg(light)
    shades = middles(look(write_hdr(tmp_path / "a.mkv", signal, transfer)), 5)[:, 1]
    assert (np.diff(shades) > 0).all() and shades[-1] <= 255, shades


RANGES = {  # format, matrix, range
    "BT.601": ("yuv444p", 5, TV),
    "BT.709": ("yuv444p", BT709, TV),
    "BT.2020": ("yuv444p", BT2020, TV),
    "full range": ("yuv444p", BT709, FULL),
    "ten bits": ("yuv444p10le", BT709, TV),
    "ten bits, full range": ("yuv444p10le", BT709, FULL),
    "RGB of ten bits": ("gbrp10le", 0, FULL),
    "RGB of 16 bits": ("gbrp16le", 0, FULL),
}


@pytest.mark.parametrize("pix_fmt, matrix, limits", RANGES.values(), ids=RANGES)
def test_matrix_and_range_are_those_that_the_film_names(tmp_path, pix_fmt, matrix, limits):
    """The colours are converted here by the formulas of the matrices."""
    red, blue = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}.get(matrix, (0, 0))
    r, g, b = COLOURS.T / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    bits = 16 if "16" in pix_fmt else 10 if "10" in pix_fmt else 8
    if pix_fmt.startswith("gbr"):
        codes = [x * (2**bits - 1) for x in (g, b, r)]
    elif limits == FULL:
        codes = [x * (2**bits - 1) + (k > 0) * 2 ** (bits - 1) for k, x in enumerate(planes)]
    else:
        codes = [x * (219, 224)[k > 0] + (16, 128)[k > 0] for k, x in enumerate(planes)]
        codes = [x * 2 ** (bits - 8) for x in codes]
    frame = av.VideoFrame(32 * len(COLOURS), 32, pix_fmt)
    for plane, code in zip(frame.planes, codes, strict=True):
        code = stripes(np.round(code)).astype(np.uint8 if bits == 8 else np.uint16)
        padded = np.zeros((32, plane.line_size // code.itemsize), code.dtype)
        padded[:, : code.shape[1]] = code
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range = matrix, limits
    file = write_film(tmp_path / "a.mkv", [frame] * 2, "ffv1", pix_fmt)
    difference = abs(middles(look(file), len(COLOURS)) - COLOURS)
    assert difference.max() <= 3, difference.tolist()


def png_of(pixels: np.ndarray, kind: int) -> bytes:
    """Return a 16-bit PNG of (H, W, channels) uint16; kind: 0 grey, 2 RGB, 4 grey+alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("value, expected", [(0, 0), (32768, 128), (65535, 255), (257 * 30, 30)])
@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_images_of_16_bits(tmp_path, kind, channels, value, expected):
    (tmp_path / "shot").mkdir()
    pixels = np.full((8, 8, channels), value)
    if kind in (4, 6):
        pixels[..., -1] = 65535
    (tmp_path / "shot" / "a.png").write_bytes(png_of(pixels, kind))
    (tmp_path / "a.apng").write_bytes(png_of(pixels, kind))
    for path in (tmp_path / "shot", tmp_path / "a.apng"):
        assert (read_video(path, [0], 8, 8) == expected).all()


@pytest.mark.parametrize("suffix", [".tif", ".pgm"])
def test_other_images_of_16_bits(tmp_path, suffix):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / f"a{suffix}")
    assert (read_video(tmp_path / f"a{suffix}", [0], 8, 8) == 128).all()


def test_fractions_for_pixels_are_refused(tmp_path):
    """Whether white is 1, 255 or something else is not said."""
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="fractions"):
        look(tmp_path / "a.tif")


# --- which stream, and when ---------------------------------------------------------------------


def test_a_cover_is_not_the_film(tmp_path):
    from av.stream import Disposition

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        film = container.add_stream("mpeg4", rate=25)
        film.width = film.height = 64
        film.pix_fmt = "yuv420p"
        cover = container.add_stream("png", rate=25)
        cover.width = cover.height = 512
        cover.pix_fmt, cover.disposition = "rgb24", Disposition.attached_pic
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(plain((0, 255, 0), 512, 512), "rgb24"))
        )
        for _ in range(3):
            container.mux(film.encode(av.VideoFrame.from_ndarray(plain((255, 0, 0)), "rgb24")))
        container.mux(film.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    moov = content.index(b"moov") - 4  # after the pictures, whose places therefore stay
    trak, udta = (content.index(name, moov) - 4 for name in (b"trak", b"udta"))
    first = content[:trak] + content[udta:] + content[trak:udta]
    (tmp_path / "b.mp4").write_bytes(first)
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(tmp_path / name)) as container:
            covers = [bool(x.disposition & Disposition.attached_pic) for x in container.streams]
        assert covers == ([False, True] if name == "a.mp4" else [True, False])
        assert abs(look(tmp_path / name)[32, 32] - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_larger_of_two_films(tmp_path, chosen):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = []
        for k, grey in enumerate((50, 200)):
            stream = container.add_stream("ffv1", rate=25)
            stream.width = stream.height = 128 if k == chosen else 64
            stream.pix_fmt = "bgr0"
            stream.disposition = 0
            streams.append((stream, plain((grey,) * 3, stream.height, stream.width)))
        for stream, picture in streams:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode())
    assert look(tmp_path / "a.mkv")[0, 0, 0] == (50, 200)[chosen]


def test_a_cover_alone_is_no_film(tmp_path):
    from av.stream import Disposition

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("png", rate=25)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "rgb24", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(plain((0, 255, 0)), "rgb24")))
        container.mux(cover.encode())
    with pytest.raises(UserError, match="no video in it"):
        look(tmp_path / "a.mp4")


def test_an_unknown_codec_is_named(tmp_path):
    file = write_film(tmp_path / "a.mp4", [plain((9, 9, 9))], "libx264", "yuv420p")
    file.write_bytes(file.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(UserError, match="does not know its codec"):
        look(file)


ORDER = {  # suffix, codec, options: all with B-frames
    "H.264 in AVI": (".avi", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "many B-frames in AVI": (
        ".avi",
        "libx264",
        {"bf": "4", "x264_params": "b-adapt=0:b-pyramid=2"},
    ),
    "MPEG-4 in AVI": (".avi", "mpeg4", {"bf": "2"}),
    "H.264": (".mp4", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "Matroska": (".mkv", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "a transport stream": (".ts", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "a program stream": (".mpg", "mpeg2video", {"bf": "2"}),
    "a camera's": (".MTS", "mpeg2video", {"bf": "2"}),
    "Flash": (".flv", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "Windows Media": (".wmv", "wmv2", {}),
    "H.264 in ASF": (".asf", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "a telephone's": (".3gp", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
    "Ogg": (".ogv", "libvpx", {}),
    "MXF": (".mxf", "mpeg2video", {"bf": "2"}),
    "raw": (".y4m", "rawvideo", {}),
    "upper case": (".MOV", "libx264", {"bf": "2", "x264_params": "b-adapt=0"}),
}


@pytest.mark.parametrize("suffix, codec, options", ORDER.values(), ids=ORDER)
def test_frames_are_in_time(tmp_path, suffix, codec, options):
    """Frame k, of its own grey, is on screen from k / 25 to (k + 1) / 25 seconds."""
    greys = [10 + 20 * k for k in range(12)]
    frames = [plain((grey,) * 3) for grey in greys]
    file = write_film(tmp_path / f"a{suffix}", frames, codec, "yuv420p", **options)
    for shift in (0.002, 0.038):
        video = read_video(file, [k / 25 + shift for k in range(12)], 64, 64)
        found = video[0, :, 32, 32].int()
        assert (found - torch.tensor(greys)).abs().max() < 10, found.tolist()


def test_only_frames_that_are_used_are_converted(tmp_path, monkeypatch):
    file = write_film(tmp_path / "a.mkv", [plain((10 * k,) * 3) for k in range(20)])
    used = []
    monkeypatch.setattr(film, "shown", lambda *x, shown=film.shown: used.append(x[0]) or shown(*x))
    found = read_video(file, [0.001, 0.401, 0.402, 0.761], 64, 64)[0, :, 0, 0].tolist()
    assert found == [0, 100, 100, 190] and len(used) == 3


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_film("12-30.mkv", [plain((200,) * 3)])
    Path("12-30.mkv").rename("12:30:05.mkv")
    assert (look("12:30:05.mkv") == 200).all()


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mp4"])
def test_a_title_that_is_not_utf8_does_not_matter(tmp_path, suffix):
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        container.metadata["title"] = "caf\u00e9"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(plain((200,) * 3), "rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert "caf\u00e9".encode() in content
    (tmp_path / f"a{suffix}").write_bytes(content.replace("caf\u00e9".encode(), b"caf\xe9 "))
    assert abs(look(tmp_path / f"a{suffix}") - 200).max() <= 4


@pytest.mark.parametrize("codec", ["mjpeg", "libx264"])
def test_a_frame_that_is_cut_off_is_refused(tmp_path, codec):
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    file = write_film(tmp_path / "a.avi", noise, codec, pix_fmt)
    content = file.read_bytes()
    last = content.rindex(b"00dc", 0, content.index(b"idx1"))  # a frame follows its size
    file.write_bytes(content[: (last + content.index(b"idx1")) // 2])
    with pytest.raises(UserError, match="damaged, or cut off"):
        read_video(file, [k / 25 for k in range(8)], 64, 64)


# --- folders of images --------------------------------------------------------------------------

NAMES = {  # as they are shown
    "numbers": [f"f{k}.png" for k in range(1, 13)],
    "zeros before some": ["f01.png", "f2.png", "f03.png", "f9.png", "f010.png", "f11.png"],
    "two numbers": ["s1_f2.png", "s1_f10.png", "s2_f1.png", "s10_f1.png"],
    "numbers alone": ["1.png", "2.jpg", "10.png"],
    "upper case": ["F1.PNG", "f2.png", "F10.png"],
    "no numbers": ["a.png", "b.png", "c.png"],
}


@pytest.mark.filterwarnings("error")
def test_a_broken_image_of_a_folder_is_closed(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    with pytest.raises(UserError, match="truncated"):
        list(frames_at(tmp_path, [0.0], 8.0))
    gc.collect()  # an open file would warn now


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_images_are_shown_in_the_order_of_their_numbers(tmp_path, names):
    for k, name in enumerate(names):
        Image.new("RGB", (8, 8), (20 * k,) * 3).save(tmp_path / name)
    (tmp_path / ".f0.png").write_bytes(b"what a system keeps beside a file")
    video = read_video(tmp_path, [k / 8 for k in range(len(names))], 8, 8)
    assert abs(video[0, :, 4, 4] - 20.0 * torch.arange(len(names))).max() <= 2


# --- our own ------------------------------------------------------------------------------------


def test_our_mp4_says_which_colours_it_has(tmp_path):
    video = torch.from_numpy(stripes(COLOURS)).permute(2, 0, 1)[:, None].repeat(1, 8, 1, 1)
    write_video(tmp_path / "a.mp4", [video.byte()], 8.0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (BT709, TV)
        assert (context.color_trc, context.color_primaries) == (BT709, BT709)
    found = middles(look(tmp_path / "a.mp4"), len(COLOURS), 256)
    assert abs(found - COLOURS).max() <= 4, found.tolist()
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("suffix, tick", [(".gif", 0.010), (".webp", 0.001)])
@pytest.mark.parametrize("fps", [4, 8, 12, 15, 24, 25, 29.97, 30])
def test_our_animations_keep_their_length(tmp_path, suffix, tick, fps):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (3, 16, 8, 8), generator=generator, dtype=torch.uint8)
    write_video(tmp_path / f"a{suffix}", [video], fps)
    ends, until = [], 0
    with Image.open(tmp_path / f"a{suffix}") as file:
        for k in range(file.n_frames):
            file.seek(k)
            file.load()
            until += file.info["duration"] / 1000
            ends.append(until)
    for k, end in enumerate(ends, 1):
        assert -tick - 1e-9 < end - k / fps <= 1e-9  # so that a frame is there at its time
    times = [k / fps for k in range(16)]
    found = read_video(tmp_path / f"a{suffix}", times, 8, 8)
    close = (found.float() - video).abs().flatten(2).mean(2)  # a palette is not exact
    assert (close < 30).all()  # pictures of noise differ by 85


def test_transparent_pictures_are_cut_over_black():
    image = Image.fromarray(red_over_hidden_green())
    assert (fit(image, 64, 64)[:, 4, 4] == 0).all() and fit(image, 64, 64)[0, 32, 32] == 255
