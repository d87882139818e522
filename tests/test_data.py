"""Folders of real videos against known frames.

Folders are written here: each frame of a test video has its own colour, so that which frame was
taken is read from one pixel.
"""

import json
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import read_video
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare
from data import DataConfig, Folder, list_videos, reference_clip
from plumbing.files import UserError
from plumbing.sheet import contact_sheet
from toy.world import World

CONFIG = DataConfig()


def test_sizes_and_times_of_a_clip_at_both_rates():
    config = DataConfig(frames=17, fps=16, height=48, semantic_fps=1.6, semantic_width=28)
    assert config.seconds == 17 / 16 and config.size == (17, 48, 32)
    assert config.semantic_size == (2, 32, 28) and config.semantic_times == [0, 1 / 1.6]
    assert DataConfig(frames=3).semantic_times == [0, 0.25]  # the last frame begins at 2 / 8 s


# --- folders of real videos ---------------------------------------------------------------------
# Frame k of a test video is the grey 10 k + 20: `shades` reads back which frames were taken.


def picture(k, width=32, height=32):
    return Image.new("RGB", (width, height), (10 * k + 20,) * 3)


def shades(video):
    return ((video[0, :, 16, 16].float() - 20) / 10).round().int().tolist()


def write_animation(path, durations, width=32):
    """Write lossless frames 0, 1, ... shown for so many milliseconds each."""
    images = [picture(k, width) for k in range(len(durations))]
    options = {".webp": {"lossless": True}, ".gif": {}, ".apng": {"format": "png"}}[path.suffix]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=durations, loop=0, **options
    )


def write_mp4(path, images, times):
    """Write images shown from the given milliseconds on."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_captions(folder, *names):
    lines = [json.dumps({"video": name, "caption": f"caption of {name}"}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def open_folder(folder, config=CONFIG):
    said = []
    opened = Folder(folder, config, said.append)
    assert len(opened) > 0  # reads the videos
    return opened, said


VARIABLE = [250, 500, 100, 400, 750, 1000, 1500]  # milliseconds: 4.5 seconds
#  shown from 0, 250, 750, 850, 1250, 2000, 3000: what is on screen every 1/8 and every 1/2 second
ON_SCREEN = [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4]
ON_SCREEN += [5] * 8 + [6] * 8
ON_SCREEN_LOW = [0, 1, 3, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("suffix", [".webp", ".apng", ".gif"])
def test_animations_are_cut_by_timestamp(tmp_path, suffix):
    write_animation(tmp_path / f"clip{suffix}", VARIABLE)
    write_captions(tmp_path, f"clip{suffix}")
    folder, said = open_folder(tmp_path)
    assert len(folder) == 2 and not said and not folder.skipped  # half a second is left over
    clips = folder.batch([0, 1])
    assert clips.video.shape == (2, 3, 16, 32, 32) and clips.video.dtype == torch.uint8
    assert shades(clips.video[0]) + shades(clips.video[1]) == ON_SCREEN
    assert shades(clips.semantic_video[0]) + shades(clips.semantic_video[1]) == ON_SCREEN_LOW
    assert torch.equal(folder.semantic_video([1]), clips.semantic_video[1:])
    assert clips.captions == folder.captions([0, 1]) == [f"caption of clip{suffix}"] * 2


def test_mp4_is_cut_by_timestamp(tmp_path):
    starts = [0, 250, 750, 850, 1250, 2000, 3000, 4500]
    write_mp4(tmp_path / "clip.mp4", [picture(k) for k in range(8)], starts)
    write_captions(tmp_path, "clip.mp4")
    clips = open_folder(tmp_path)[0].batch([0, 1])
    assert shades(clips.video[0]) + shades(clips.video[1]) == ON_SCREEN
    assert shades(clips.semantic_video[0]) + shades(clips.semantic_video[1]) == ON_SCREEN_LOW


def test_rotation_metadata_turns_the_picture_upright(tmp_path):
    flag = Image.new("RGB", (64, 32), "black")
    flag.paste("white", (0, 0, 32, 32))  # the left half
    file = tmp_path / "clip.mp4"
    write_mp4(file, [flag] * 3, [0, 100, 200])
    content = bytearray(file.read_bytes())
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    matrix = content.index(b"tkhd") + 44  # of the track header: a player turns by it
    content[matrix : matrix + 36] = clockwise
    file.write_bytes(content)
    frame = read_video(file, [0], 64, 32)[0, 0].float()
    assert frame[:28].min() > 200 and frame[36:].max() < 55  # left is up now


def test_a_folder_of_images_is_a_video_at_the_config_s_rate(tmp_path):
    (tmp_path / "shot").mkdir()
    for k in range(16):
        picture(k).save(tmp_path / "shot" / f"{k:03}.png")
    (tmp_path / "shot" / "notes.md").write_text("not a frame")
    write_captions(tmp_path, "shot")
    clips = open_folder(tmp_path)[0].batch([0])
    assert shades(clips.video[0]) == list(range(16))
    assert shades(clips.semantic_video[0]) == [0, 4, 8, 12]


@pytest.mark.parametrize("durations", [[125] * 3, [1000], [125, 1500]])
def test_a_short_video_is_one_clip_that_holds_its_last_frame(tmp_path, durations):
    write_animation(tmp_path / "clip.webp", durations)
    write_captions(tmp_path, "clip.webp")
    folder, _ = open_folder(tmp_path)
    last = len(durations) - 1
    assert len(folder) == 1
    assert shades(folder.batch([0]).video[0]) == [min(k, last) for k in range(16)]
    assert shades(folder.semantic_video([0])[0]) == [0] + 3 * [last]


@settings(max_examples=20)
@example([20] * 6 + [288, 406, 562], 1, 1)  # ends a millisecond after a frame begins
@given(
    st.lists(st.integers(20, 900), min_size=2, max_size=20), st.integers(1, 12), st.integers(1, 9)
)
def test_every_frame_is_the_one_on_screen(tmp_path_factory, durations, frames, semantic_fps):
    folder = tmp_path_factory.mktemp("folder")
    write_animation(folder / "clip.apng", durations)
    ends = np.cumsum(durations) / 1000 - 1e-3  # containers round to a millisecond

    def on_screen(time):
        return min(int((ends <= time).sum()), len(ends) - 1)

    write_captions(folder, "clip.apng")
    config = DataConfig(frames=frames, semantic_fps=semantic_fps)
    clips, _ = open_folder(folder, config)
    assert len(clips) == max(1, int(np.ceil(ends[-1] * 8)) // frames)
    batch = clips.batch(range(len(clips)))
    for c in range(len(clips)):
        start = c * config.seconds
        assert shades(batch.video[c]) == [on_screen(start + k / 8) for k in range(frames)]
        low = [on_screen(start + time) for time in config.semantic_times]
        assert shades(batch.semantic_video[c]) == low


def test_frames_are_cropped_in_the_middle_and_resized_for_each_rate(tmp_path):
    image = Image.new("RGB", (120, 40), "red")
    image.paste("blue", (40, 0, 80, 40))  # the middle third
    image.save(tmp_path / "clip.png")
    config = DataConfig(semantic_height=10, semantic_width=30)
    clip = reference_clip(tmp_path / "clip.png", config)
    assert clip.video.shape == (1, 3, 16, 32, 32)
    assert clip.semantic_video.shape == (1, 3, 4, 10, 30)
    blue = torch.tensor([0, 0, 255])[:, None, None]
    assert (clip.video[0, :, 0, :, 2:-2] == blue).all()
    assert (clip.semantic_video[0, :, 0, :, :7] == blue.flip(0)).all()
    assert (clip.semantic_video[0, :, 0, :, 13:17] == blue).all()


def test_read_video_and_reference_clip_agree(tmp_path):
    write_animation(tmp_path / "clip.webp", VARIABLE)
    clip = reference_clip(tmp_path / "clip.webp", CONFIG)
    assert clip.captions == [""]
    times = [k / 8 for k in range(16)]
    assert torch.equal(read_video(tmp_path / "clip.webp", times, 32, 32), clip.video[0])
    assert shades(read_video(tmp_path / "clip.webp", [0, 0, 4.4, 99], 32, 32)) == [0, 0, 6, 6]


def test_what_cannot_be_read_is_named_counted_and_skipped(tmp_path):
    write_animation(tmp_path / "good.webp", [1000, 1000])
    whole = (tmp_path / "good.webp").read_bytes()
    (tmp_path / "empty.gif").touch()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video " * 99)
    (tmp_path / "text.webp").write_text("this is no video " * 99)
    (tmp_path / "cut.webp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no frames").mkdir()
    bad = ["empty.gif", "empty.mp4", "text.mp4", "text.webp", "cut.webp", "no frames", "gone.mp4"]
    write_captions(tmp_path, *bad[:3], "good.webp", *bad[3:])
    folder, said = open_folder(tmp_path)
    assert len(folder) == 1
    assert [file.name for file, _ in folder.skipped] == bad
    assert all(reason and "\n" not in reason for _, reason in folder.skipped)
    assert folder.skipped[-1][1] == "no such file"
    assert said[:-1] == [f"skipped {file}: {reason}" for file, reason in folder.skipped]
    assert "skipped 7 of 8" in said[-1]


def test_a_broken_stream_is_skipped_even_if_it_starts_well(tmp_path):
    images = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(12)]
    file = tmp_path / "a.apng"
    images[0].save(file, "png", save_all=True, append_images=images[1:], duration=200)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 20])  # within a frame
    write_captions(tmp_path, "a.apng")
    with pytest.raises(UserError, match="no video can be used"):
        open_folder(tmp_path)


def test_captions_beside_the_videos(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("a.webp", "b.gif", "more/c.apng"):
        write_animation(tmp_path / name, [1000, 1000])
    (tmp_path / "a.txt").write_text("one thing\n")
    (tmp_path / "more" / "c.txt").write_text("another  thing")
    folder, said = open_folder(tmp_path)
    assert folder.captions([0, 1]) == ["one thing", "another thing"]
    assert [file.name for file, _ in folder.skipped] == ["b.gif"] and "caption" in said[0]


TEXTS = {  # the bytes of "a dog runs" and a little more
    "UTF-8": b"a dog runs\n",
    "a mark": "a dog runs\n".encode("utf-8-sig"),
    "UTF-16 with its mark": "a dog runs\r\n".encode("utf-16"),
    "UTF-16, the other order": b"\xfe\xff" + "a dog runs".encode("utf-16-be"),
    "UTF-16 without a mark": "a dog runs".encode("utf-16-le"),
    "the other order without a mark": "a dog runs\r\n".encode("utf-16-be"),
    "UTF-32": "a dog runs".encode("utf-32"),
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbfa dog runs",
    "lines": b"\r\n a dog\r\n\truns\r\n",
    "old lines": b"a dog\rruns",
}
NO_TEXTS = {
    "Latin-1": "a caf\xe9".encode("latin-1"),
    "Windows": "a dog\u2019s day".encode("cp1252"),
    "Shift JIS": "\u72ac\u304c\u8d70\u308b".encode("shift-jis"),
    "half of UTF-16": "a dog runs".encode("utf-16")[:-1],
    "Cyrillic in UTF-16 without a mark": "\u043f\u0451\u0441".encode("utf-16-le"),
    "empty": b"",
    "a mark alone": b"\xef\xbb\xbf",
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_captions_are_read_as_their_bytes_say(tmp_path, content):
    write_animation(tmp_path / "one.webp", [1000])
    (tmp_path / "one.txt").write_bytes(content)
    folder, said = open_folder(tmp_path)
    assert folder.captions([0]) == ["a dog runs"] and not said


@pytest.mark.parametrize("content", NO_TEXTS.values(), ids=NO_TEXTS)
def test_bytes_that_are_no_text_are_named_and_skipped(tmp_path, content):
    for name in ("one", "two"):
        write_animation(tmp_path / f"{name}.webp", [1000])
    (tmp_path / "one.txt").write_bytes(content)
    (tmp_path / "two.txt").write_text("a cat sleeps")
    folder, said = open_folder(tmp_path)
    assert folder.captions(range(len(folder))) == ["a cat sleeps"]
    assert "one.webp" in said[0] and "not UTF-8" in said[0] and "skipped 1 of 2" in said[1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_listings_are_read_as_their_bytes_say(tmp_path, encoding):
    """With two kinds of line ends, and a character that some take for one."""
    write_animation(tmp_path / "one.webp", [1000])
    texts = ["a dog runs", "\u72ac a\x85b\u2028c \u00e9"]
    lines = [json.dumps({"video": "one.webp", "caption": x}, ensure_ascii=False) for x in texts]
    (tmp_path / "captions.jsonl").write_bytes("\r\n\n".join(lines).encode(encoding))
    assert open_folder(tmp_path)[0].captions([0, 1]) == [texts[0], " ".join(texts[1].split())]


def test_a_line_that_is_no_text_is_skipped_alone(tmp_path):
    write_animation(tmp_path / "one.webp", [1000])
    line = b'{"video": "one.webp", "caption": "%s"}\n'
    (tmp_path / "captions.jsonl").write_bytes(line % b"a caf\xe9" + line % "a café".encode())
    folder, said = open_folder(tmp_path)
    assert folder.captions(range(len(folder))) == ["a café"] and "not UTF-8" in said[0]


def test_a_mark_of_the_byte_order_that_is_escaped(tmp_path):
    write_animation(tmp_path / "one.webp", [1000])
    row = {"video": "one.webp", "caption": "\ufeffa dog runs"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    assert open_folder(tmp_path)[0].captions([0]) == ["a dog runs"]


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    for name in ("disk/a.webp", "data/sub/b.webp"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_animation(tmp_path / name, [1000])
        (tmp_path / name).with_suffix(".txt").write_text(name)
    data = tmp_path / "data"
    (data / ".hidden").mkdir()
    links = {"disk": "../disk", "again": "sub", "sub/itself": "..", ".hidden/sub": "../sub"}
    for name, target in links.items():
        (data / name).symlink_to(target)
    assert [text for _, text in list_videos(data)] == ["disk/a.webp", "data/sub/b.webp"]


def test_hidden_files_and_folders_do_not_count(tmp_path):
    names = ["a.webp", "sub/b.webp", ".ipynb_checkpoints/x.webp", "sub/.Trash/deep/y.webp"]
    for name in [*names, "._a.webp", "sub/._b.webp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_animation(tmp_path / name, [1000])
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert [text for _, text in list_videos(tmp_path)] == ["a.webp", "sub/b.webp"]
    (tmp_path / ".all").mkdir()
    (tmp_path / "a.webp").rename(tmp_path / ".all" / "a.webp")  # a folder that is asked for counts
    assert [file.name for file, _ in list_videos(tmp_path / ".all")] == ["a.webp"]


@pytest.mark.parametrize(
    "suffix",
    [
        *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv"),
        *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".ogv", ".mxf", ".dv", ".rm"),
        *(".y4m", ".MOV", ".MTS", ".Mp4", ".GIF"),
    ],
)
def test_videos_are_known_by_their_usual_names(tmp_path, suffix):
    for name in (f"a{suffix}", "notes.md", "a.srt"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("a dog runs")
    assert list_videos(tmp_path) == [(tmp_path / f"a{suffix}", "a dog runs")]


def test_frames_of_a_captioned_folder_are_no_videos(tmp_path):
    for folder in ("clip", "more"):  # more.txt is not there
        (tmp_path / folder).mkdir()
        for k in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{k}.webp")
    (tmp_path / "clip.txt").write_text("a dog runs")
    assert list_videos(tmp_path)[0] == (tmp_path / "clip", "a dog runs")
    assert [file.parent.name for file, _ in list_videos(tmp_path)[1:]] == ["more"] * 3


def test_what_has_a_caption_is_read_or_named(tmp_path):
    """By any name; but not what lies beside a video of that name, and no notes."""
    write_animation(tmp_path / "a.webp", [1000])
    write_mp4(tmp_path / "b.mp4", [picture(3)] * 2, [0, 100])
    (tmp_path / "b.mp4").rename(tmp_path / "b.amv")
    for name in ("a.json", "a.jpg", "c.xyz", "readme.md", "d.TXT"):
        (tmp_path / name).write_bytes(b"no video")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    folder, said = open_folder(tmp_path)
    assert folder.captions(range(len(folder))) == ["caption a", "caption b"]
    assert [file.name for file, _ in folder.skipped] == ["c.xyz"] and "c.xyz: " in said[0]


def test_captions_whose_names_are_in_capitals(tmp_path):
    write_animation(tmp_path / "one.webp", [1000])
    (tmp_path / "one.webp").rename(tmp_path / "ONE.WEBP")
    (tmp_path / "ONE.TXT").write_text("a dog runs")
    assert open_folder(tmp_path)[0].captions([0]) == ["a dog runs"]


def test_a_folder_of_images_with_a_caption_beside_it(tmp_path):
    (tmp_path / "shot.1").mkdir()
    for k in range(16):
        picture(k).save(tmp_path / "shot.1" / f"{k}.png")
    (tmp_path / "shot.txt").write_text("a dog runs")
    folder, _ = open_folder(tmp_path)
    assert shades(folder.batch([0]).video[0]) == list(range(16))


def test_without_pyav_an_mp4_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    write_animation(tmp_path / "a.gif", [1000])
    (tmp_path / "b.mp4").touch()
    write_captions(tmp_path, "a.gif", "b.mp4")
    folder, _ = open_folder(tmp_path)
    assert len(folder) == 1
    assert 'pip install "semanticgen[video]"' in folder.skipped[0][1]


def test_videos_beyond_the_memory_are_decoded_again(tmp_path, monkeypatch):
    for k, name in enumerate("abc"):
        write_animation(tmp_path / f"{name}.webp", [1000 + 100 * k] * (k + 1))
    write_captions(tmp_path, "a.webp", "b.webp", "c.webp")
    kept = open_folder(tmp_path)[0].batch([0, 1, 2])
    monkeypatch.setattr(Folder, "MEMORY", 100_000)  # one of the clips
    folder, _ = open_folder(tmp_path)
    for i in (2, 0, 1, 1, 0):
        assert torch.equal(folder.batch([i]).video[0], kept.video[i])
    assert len(folder._kept) == 1


# --- looking at clips ---------------------------------------------------------------------------


def test_contact_sheet_shows_the_whole_label(tmp_path):
    videos = World(CONFIG, "train").batch(range(2)).video
    short = contact_sheet(videos, ["one", "two"])
    long = contact_sheet(videos, ["one", "a very long label " * 20], tmp_path / "sheet.png")
    assert long.width == short.width and long.height > short.height
    with Image.open(tmp_path / "sheet.png") as written:
        assert written.size == long.size
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_contact_sheet_spreads_its_frames_over_the_clip():
    """Frame k of 20 is the grey k: a pixel of each column tells which one is shown."""
    video = torch.arange(20, dtype=torch.uint8)[:, None, None].expand(1, 3, 20, 8, 8)
    sheet = contact_sheet(video, ["one"])
    found = [sheet.getpixel((4 + 132 * k + 64, 18 + 64))[0] for k in range(8)]
    assert found == [0, 3, 5, 8, 11, 14, 16, 19]


def test_preview_on_the_command_line(tmp_path, monkeypatch, capsys):
    command = ["prepare.py", "preview", "--count", "2", "--out", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(sys, "argv", command)
    prepare.main()
    assert (tmp_path / "sheet.png").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        prepare.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "no such folder" in said
