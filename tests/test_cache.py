"""cache.py: what is read from a cache against encoding the same clips directly, and kills.

A run of random weights encodes a folder of small animations. However often the work is killed, and
by however many processes it is done, the folder that comes out is the same, byte for byte.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from helpers import tree
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_parallel import CONTEXT
from test_run import MICRO, call, one_line, random_run

import data
import encode
import plumbing.cache as cache_module
import prepare
import sample
import stages
import train
from data import Folder, to_float
from plumbing.cache import Cache, Memory, fingerprint, video_file
from plumbing.fields import flat_fields
from plumbing.files import UserError
from plumbing.seeds import Rows
from plumbing.video import write_video as write_mp4
from plumbing.weights import digest, digest_of
from run import Run
from toy.encoder import TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE
from toy.world import World


def write_video(path: Path, seed: int, clips: int):
    """Write a lossless animation of `clips` seconds at 8 frames a second, all frames different."""
    rng = random.Random(seed)
    frames = [Image.new("RGB", (16, 16), tuple(rng.randbytes(3))) for _ in range(8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        path, lossless=True, save_all=True, append_images=(frames * clips)[1:], duration=125
    )


def write_folder(folder: Path, videos: int) -> Path:
    """Write videos of one to five clips, with captions of one to four words."""
    rows = []
    for k in range(videos):
        write_video(folder / f"clips/{k}.webp", k, 1 + k * 2 % 5)
        rows.append({"video": f"clips/{k}.webp", "caption": " ".join("abcd"[: 1 + k % 4])})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return random_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("videos"), 8)


def made(folder: Path, out: Path, run: Run, dtype: str = "float32") -> Cache:
    assert encode.encode_folder(run, folder, out, dtype)
    return Cache(out)


# --- what is in it ------------------------------------------------------------------------------


def test_captions_that_are_cut_are_told(tmp_path, run, folder, capsys):
    short = other_run(tmp_path / "short", run, "text.words=3")
    found = made(folder, tmp_path / "cache", short)
    assert "2 of 8 captions are longer than the 3 words that are read" in capsys.readouterr().out
    assert found.text(range(1)).shape[1] == 3
    made(folder, tmp_path / "whole", run)
    assert "captions" not in capsys.readouterr().out


def test_a_cache_holds_what_the_parts_make_of_each_clip(tmp_path, run, folder, monkeypatch):
    monkeypatch.setattr(HashText, "null", lambda text: torch.ones(1, text.config.dim))
    found, clips = made(folder, tmp_path, run), Folder(folder, run.config.data)
    assert len(found) == len(clips) == 24
    assert len(list((tmp_path / "videos").iterdir())) == 8
    indices = [21, 0, 5, 13, 8, 4, 3]  # in any order, of all videos
    batch = clips.batch(indices)
    assert found.captions(indices) == batch.captions
    for i, x in enumerate(indices):  # each alone, as it was encoded
        mean, log_variance = run.vae.posterior(to_float(batch.video[i : i + 1]))
        features = run.encoder.encode(to_float(batch.semantic_video[i : i + 1]))
        assert torch.equal(found.latents([x])[0], mean)
        assert torch.equal(found.latents([x])[1], log_variance)
        assert torch.equal(found.features([x]), features)
    assert torch.equal(found.text(indices), run.text.encode(batch.captions))
    assert torch.equal(found.null_text(), torch.ones(1, run.config.text.dim))
    assert torch.equal(found.latents(indices)[0][2], found.latents([5])[0][0])


def test_stored_in_half_precision(tmp_path, run, folder):
    half = made(folder, tmp_path / "half", run, dtype="bfloat16")
    full = made(folder, tmp_path / "full", run)
    for one, other in ((half.latents([7]), full.latents([7])), (half.text([7]), full.text([7]))):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float())
    assert half.features([7]).dtype == torch.float32


def test_no_text_is_padding_alone(tmp_path, run, folder):
    """Tokens are kept without the padding, and get it back."""
    found = made(folder, tmp_path, run)
    content = load_file(video_file(tmp_path, "clips/0.webp", "a"))
    assert content["text"].shape == (1, run.config.text.dim)
    assert found.text([0]).shape == (1, run.config.text.words, run.config.text.dim)


def test_memory_offers_the_same_of_the_world(run):
    world = World(run.config.data)
    memory = encode.clips_in_memory(run, world).first(5)
    batch = world.batch([3, 1])
    assert len(memory) == 5 and memory.captions([3, 1]) == batch.captions
    mean, log_variance = run.vae.posterior(to_float(batch.video))
    torch.testing.assert_close(memory.latents([3, 1])[0], mean)
    torch.testing.assert_close(memory.latents([3, 1])[1], log_variance)
    features = run.encoder.encode(to_float(batch.semantic_video))
    torch.testing.assert_close(memory.features([3, 1]), features, rtol=1e-2, atol=1e-2)
    assert torch.equal(memory.text(torch.tensor([3, 1])), run.text.encode(batch.captions))


def test_memory_encodes_what_is_asked_for_once(monkeypatch):
    """A later stage may ask for more; a look at six clips does not encode thousands."""
    monkeypatch.setattr(cache_module, "CHUNK", 4)
    seen = {"latents": [], "features": [], "text": []}

    def encode(kind: str, indices) -> torch.Tensor:
        seen[kind] += indices
        return torch.tensor([[i, -i] for i in indices])

    memory = Memory(99, str, {kind: partial(encode, kind) for kind in seen})
    assert memory.features([5, 2, 6]).tolist() == [[5, -5], [2, -2], [6, -6]]
    assert seen == {"latents": [], "features": list(range(8)), "text": []}
    first, more = memory.first(10), memory.first(20)
    assert first.latents(range(10))[1].tolist() == [-i for i in range(10)]
    assert first.features(range(10)).dtype == torch.float32
    assert more.features(range(20))[:, 0].tolist() == list(range(20))
    assert more.latents([19, 0])[0].tolist() == [19, 0]
    assert [len(memory), len(first), len(more)] == [99, 10, 20]
    for kind, last in (("latents", 16), ("features", 20), ("text", 0)):
        assert sorted(seen[kind]) == sorted(set(seen[kind])) and len(seen[kind]) == last


def test_what_cannot_be_read_is_named_and_the_rest_is_there(tmp_path, run, capsys):
    folder = write_folder(tmp_path / "videos", 4)
    (folder / "clips/1.webp").write_bytes(b"")
    whole = (folder / "clips/2.webp").read_bytes()
    (folder / "clips/2.webp").write_bytes(whole[: len(whole) // 2])
    with open(folder / "captions.jsonl", "a") as file:
        file.write('{"video": "nowhere.webp", "caption": "x"}\n')
        file.write('{"video": "clips/3.webp", "caption": " "}\n')
    other_run(tmp_path / "run", run)
    capsys.readouterr()
    parts = ["--parts", tmp_path / "run", "--out", tmp_path / "cache"]
    assert call(prepare.main, "precompute", folder, *parts) == 0
    found, lines = Cache(tmp_path / "cache"), capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:4]] == [
        *(f"skipped {folder}/{x}" for x in ("clips/1.webp", "clips/2.webp", "nowhere.webp")),
        f"skipped {folder}/clips/3.webp",
    ]
    assert lines[4].endswith(f"{len(found)} clips of 6 videos, 4 skipped")
    assert [line.split(":")[0].strip() for line in lines[5:]] == [
        *("clips/1.webp", "clips/2.webp", "nowhere.webp", "clips/3.webp")
    ]
    assert str(folder) not in "\n".join(lines[5:])
    assert lines[7].endswith(": no such file") and "no caption" in lines[8]
    assert len(found) == len(Folder(folder, run.config.data, lambda _: None)) >= 3


def test_nothing_readable_is_an_error_of_the_cache(tmp_path, run):
    folder = write_folder(tmp_path / "videos", 1)
    (folder / "clips/0.webp").write_bytes(b"")
    with pytest.raises(UserError, match=r"no clips.*clips/0\.webp: cannot identify"):
        made(folder, tmp_path / "cache", run)


# --- kills and processes ------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 5])
def test_any_number_of_processes_makes_the_same_cache(tmp_path, run, folder, processes):
    made(folder, tmp_path / "one", run)
    for rank in range(processes):
        done = encode.encode_folder(run, folder, tmp_path / "many", "float32", rank, processes)
        assert done == (rank == processes - 1)
        if not done:
            with pytest.raises(UserError, match=r"not finished \(\d of 8 videos are missing\)"):
                Cache(tmp_path / "many")
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_captions_come_in_portions_before_their_videos(tmp_path, run, folder, monkeypatch):
    """The tokens of all captions of a large folder would fill the memory."""
    made(folder, tmp_path / "whole", run)
    monkeypatch.setattr(encode, "PORTION", 3)
    held, encoded = [], type(run.text).encode

    def counted(self, texts):
        held.append(len(list((tmp_path / "parts").rglob("videos/*.safetensors"))))
        return encoded(self, texts)

    monkeypatch.setattr(type(run.text), "encode", counted)
    made(folder, tmp_path / "parts", run)
    assert held == [0, 0, 0, 3, 3, 3, 6, 6]  # files that are there when a caption is encoded
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_files_of_others_stay(tmp_path, run, folder):
    """Of what lies in a cache, only what this project wrote goes with its video."""
    foreign, left = (tmp_path / f"cache/videos/{x}.safetensors" for x in ("lora", f"a-{'0' * 16}"))
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    left.touch()
    made(folder, tmp_path / "cache", run)
    assert foreign.exists() and not left.exists()


def test_settings_of_another_program_are_no_cache(tmp_path):
    (tmp_path / "cache.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"cache.json is not that of a cache"):
        Cache(tmp_path)


def encode_share(folder: Path, out: Path, run_path: Path, rank: int, processes: int):
    """In a process of its own."""
    encode.encode_folder(Run.open(run_path), folder, out, "float32", rank, processes)


def encode_until_killed(folder: Path, out: Path, run_path: Path, delay: float | None):
    """In a process of its own: precompute, and be killed after `delay` seconds."""
    run = Run.open(run_path)
    if delay is not None:
        kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        kill.daemon = True
        kill.start()
    encode.encode_folder(run, folder, out, "float32")


def test_killed_at_ten_moments_and_started_again(tmp_path, run):
    """The cache is that of an undisturbed run, byte for byte, and no video is encoded twice."""
    folder, out = write_folder(tmp_path / "videos", 100), tmp_path / "killed"

    def start(where: Path, delay: float | None) -> int:
        process = CONTEXT.Process(
            target=encode_until_killed, args=(folder, where, run.path, delay), daemon=True
        )
        process.start()
        process.join()
        return process.exitcode

    assert start(tmp_path / "undisturbed", None) == 0
    times = [file.stat().st_mtime for file in (tmp_path / "undisturbed").rglob("*.safetensors")]
    latest = (max(times) - min(times)) / 10  # of a kill: ten of them come before the end
    rng, kills, written = random.Random(0), 0, {}
    while (code := start(out, rng.uniform(0.0, latest))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        for file in out.rglob("*.safetensors"):  # what is whole stays as it is
            stamp = file.stat().st_mtime_ns
            assert written.setdefault(file, stamp) == stamp, file
        if kills >= 10:
            assert start(out, None) == 0
            break
    assert kills >= 10, f"it was done after {kills} kills"
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_finished_cache_is_left_alone(tmp_path, run, folder, monkeypatch):
    made(folder, tmp_path, run)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(encode, "encode_clips", None)
    monkeypatch.setattr(encode, "clips_of", None)
    made(folder, tmp_path, run)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_folder_of_other_videos_does_not_replace_what_is_there(tmp_path, run, folder):
    made(folder, tmp_path / "cache", run)
    before, other = tree(tmp_path / "cache"), write_folder(tmp_path / "other", 2)
    names = (other / "captions.jsonl").read_text().replace("clips/", "more/")
    (other / "captions.jsonl").write_text(names)
    (other / "clips").rename(other / "more")
    with pytest.raises(UserError, match="holds other videos' clips: name another folder"):
        made(other, tmp_path / "cache", run)
    assert tree(tmp_path / "cache") == before


def test_three_processes_at_once(tmp_path, run, folder):
    """Each with its share, as torchrun starts them."""
    made(folder, tmp_path / "one", run)
    processes = [
        CONTEXT.Process(target=encode_share, args=(folder, tmp_path / "many", run.path, rank, 3))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_parts_are_in_memory_one_after_the_other(tmp_path, run, folder, monkeypatch):
    """The text encoder is the largest of them, and nobody's input."""
    seen = []

    def watched(encode):
        def watch(*args):
            seen.append({"vae", "encoder", "text"} & vars(run).keys())
            return encode(*args)

        return watch

    for kind, name in ((HashText, "encode"), (TinyVAE, "posterior"), (TinyEncoder, "encode")):
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    for part in ("text", "vae", "encoder", "painter"):
        getattr(run, part)  # is in memory, as after another stage
    made(folder, tmp_path, run)
    assert [x for x, _ in groupby(seen)] == [{"text"}, {"vae", "encoder"}]
    assert not {"vae", "encoder", "text", "painter"} & vars(run).keys()


# --- videos that change -------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path, folder) -> Path:
    """A copy of four videos, one that is cut off, one that is not there, and frames in a folder."""
    mine = tmp_path / "mine"
    for k in range(4):
        (mine / "clips").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"clips/{k}.webp", mine / "clips")
    whole = (mine / "clips/3.webp").read_bytes()
    (mine / "clips/3.webp").write_bytes(whole[: len(whole) // 2])
    (mine / "frames").mkdir()
    for k in range(12):
        Image.new("RGB", (16, 16), (20 * k, 0, 99)).save(mine / f"frames/{k:02d}.png")
    videos = [f"clips/{k}.webp" for k in range(4)] + ["frames", "nowhere.webp"]
    write_captions(mine, *((video, f"a {k}") for k, video in enumerate(videos)))
    return mine


def write_captions(folder: Path, *rows: tuple[str, str]):
    lines = [json.dumps({"video": video, "caption": caption}) + "\n" for video, caption in rows]
    (folder / "captions.jsonl").write_text("".join(lines))


def captions(folder: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
    return [(row["video"], row["caption"]) for row in rows]


def replace_film(folder: Path):
    write_video(folder / "clips/0.webp", 77, 1)


def replace_by_one_of_the_same_time(folder: Path):
    stat = (folder / "clips/1.webp").stat()
    write_video(folder / "clips/1.webp", 79, 2)
    os.utime(folder / "clips/1.webp", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_one_as_old(folder: Path):
    """Another film of the same size and, as after `cp -p`, an older time."""
    film = folder / "clips/0.webp"
    content, old = bytearray(film.read_bytes()), film.stat().st_mtime - 1000
    content[-1] ^= 255
    film.write_bytes(content)
    os.utime(film, (old, old))


def replace_by_one_of_the_same_age(folder: Path):
    """Another film of the same size, which even has the time of the one before."""
    film = folder / "clips/0.webp"
    content, stat = bytearray(film.read_bytes()), film.stat()
    content[-1] ^= 255
    film.write_bytes(content)
    os.utime(film, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap(folder: Path, one: str, other: str):
    contents = [(folder / name).read_bytes() for name in (one, other)]
    for name, content in zip((other, one), contents, strict=True):
        (folder / name).write_bytes(content)


def rename_frames(folder: Path):
    for name, new in (("00", "x"), ("01", "00"), ("x", "01")):
        (folder / f"frames/{name}.png").rename(folder / f"frames/{new}.png")


def number_frames(folder: Path):
    """1, 2, ..., 12 are played in this order; by their letters they would be 1, 10, 11, 12, 2."""
    frames = sorted((folder / "frames").iterdir())
    for frame, name in zip(frames, sorted(str(k) for k in range(1, 13)), strict=True):
        frame.rename(frame.with_name(f"{name}.png"))


def touch_all(folder: Path):
    for file in folder.rglob("*"):
        os.utime(file, (1e9, 1e9))


def rename_film(folder: Path):
    (folder / "clips/0.webp").rename(folder / "new.webp")
    write_captions(folder, ("new.webp", "a 0"), *captions(folder)[1:])


def add_film(folder: Path):
    write_video(folder / "clips/0 new.webp", 78, 2)
    write_captions(folder, ("clips/0 new.webp", "a new one"), *captions(folder))


def repair(folder: Path):
    write_video(folder / "clips/3.webp", 3, 2)


def film_into_frames(folder: Path):
    (folder / "clips/0.webp").unlink()
    shutil.copytree(folder / "frames", folder / "clips/0.webp")


CHANGES = {  # what is done to the folder, and the videos that are encoded for it
    "nothing": (lambda x: None, []),
    "only touched": (touch_all, []),
    "another film": (replace_film, ["clips/0.webp"]),
    "another film of the same size, older": (replace_by_one_as_old, ["clips/0.webp"]),
    "another film of the same size and time": (replace_by_one_of_the_same_age, ["clips/0.webp"]),
    "another film, of the same time": (replace_by_one_of_the_same_time, ["clips/1.webp"]),
    "a film that is longer": (
        lambda x: write_video(x / "clips/0.webp", 0, 3),
        ["clips/0.webp"],
    ),
    "a film that is shorter": (
        lambda x: write_video(x / "clips/1.webp", 1, 1),
        ["clips/1.webp"],
    ),
    "a film that is cut off now": (
        lambda x: os.truncate(x / "clips/1.webp", 200),
        ["clips/1.webp"],
    ),
    "a film that is gone now": (lambda x: (x / "clips/1.webp").unlink(), ["clips/1.webp"]),
    "two films that swapped their names": (
        lambda x: swap(x, "clips/0.webp", "clips/1.webp"),
        ["clips/0.webp", "clips/1.webp"],
    ),
    "a film that was cut off, in full": (repair, ["clips/3.webp"]),
    "a film that was not there": (
        lambda x: write_video(x / "nowhere.webp", 5, 1),
        ["nowhere.webp"],
    ),
    "a film that is a folder of frames now": (film_into_frames, ["clips/0.webp"]),
    "one frame of a folder": (
        lambda x: shutil.copy(x / "frames/05.png", x / "frames/00.png"),
        ["frames"],
    ),
    "one more frame": (
        lambda x: shutil.copy(x / "frames/00.png", x / "frames/99.png"),
        ["frames"],
    ),
    "one frame less": (lambda x: (x / "frames/11.png").unlink(), ["frames"]),
    "two frames that swapped their names": (rename_frames, ["frames"]),
    "frames in another order": (number_frames, ["frames"]),
    "what a system keeps beside frames": (
        lambda x: (x / "frames/.DS_Store").write_bytes(b"."),
        [],
    ),
    "a film of another name": (rename_film, ["new.webp"]),
    "another caption": (
        lambda x: write_captions(x, ("clips/0.webp", "b"), *captions(x)[1:]),
        ["clips/0.webp"],
    ),
    "one film more": (add_film, ["clips/0 new.webp"]),
    "one film less": (lambda x: write_captions(x, *captions(x)[1:]), []),
    "another order": (lambda x: write_captions(x, *captions(x)[::-1]), []),
    "a film twice": (lambda x: write_captions(x, *captions(x), captions(x)[0]), []),
    "a film twice, with two captions": (
        lambda x: write_captions(x, *captions(x), ("clips/0.webp", "b")),
        ["clips/0.webp"],
    ),
    "two films alone, one of another name": (
        lambda x: (rename_film(x), write_captions(x, *captions(x)[:2])),
        ["new.webp"],
    ),
}


def contents(cache: Path) -> dict[str, object]:
    """Return all that a cache holds; not the times of the videos that it was made of."""
    found: dict[str, object] = {"header": (cache / "cache.json").read_bytes()}
    for file in (cache / "videos").iterdir():
        with safe_open(file, "pt") as content:
            made_of = json.loads(content.metadata()["made_of"])
            kinds = sorted(content.keys())
            tensors = {kind: content.get_tensor(kind).tolist() for kind in kinds}
        found[file.name] = {**made_of, "stamp": ...}, tensors
    return found


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_costs_what_has_changed(
    tmp_path, run, changing, monkeypatch, change, expected
):
    """What comes out is what a new cache of the folder would hold."""
    made(changing, tmp_path / "cache", run)
    change(changing)
    encoded = []

    def clips_of(file, *rest):
        encoded.append(str(file.relative_to(changing)))
        return data.clips_of(file, *rest)

    monkeypatch.setattr(encode, "clips_of", clips_of)
    made(changing, tmp_path / "cache", run)
    assert encoded == expected
    made(changing, tmp_path / "new", run)
    assert contents(tmp_path / "cache") == contents(tmp_path / "new")


def test_a_film_that_is_listed_twice_is_encoded_once(tmp_path, run, changing, monkeypatch):
    write_captions(changing, *2 * [("clips/1.webp", "a 1")], ("clips/0.webp", "a 0"))
    encoded = []

    def clips_of(file, *rest):
        encoded.append(file.name)
        return data.clips_of(file, *rest)

    monkeypatch.setattr(encode, "clips_of", clips_of)
    found = made(changing, tmp_path / "cache", run)
    assert encoded == ["1.webp", "0.webp"]
    assert found.captions(range(len(found))) == ["a 1"] * 6 + ["a 0"]
    assert torch.equal(found.features([0]), found.features([3]))


def test_what_killed_processes_left_is_swept(tmp_path, run, changing):
    found = made(changing, tmp_path / "cache", run)
    before, file = tree(tmp_path / "cache"), video_file(tmp_path / "cache", "frames", "a 4")
    dead = multiprocessing.get_context("fork").Process()
    dead.start()
    dead.join()
    for whole in (file, found.path / "cache.json"):
        whole.with_name(f".{whole.name}.{dead.pid}.tmp").write_bytes(b"half")
    made(changing, tmp_path / "cache", run)
    assert tree(tmp_path / "cache") == before


def test_what_is_moved_is_not_encoded_again(tmp_path, run, changing, monkeypatch):
    """The cache, the folder of videos, or both; what is lost of it is made again."""
    before = made(changing, tmp_path / "cache", run)
    content = contents(tmp_path / "cache")
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    shutil.move(changing, tmp_path / "somewhere")
    monkeypatch.setattr(encode, "clips_of", None)
    again = made(tmp_path / "somewhere", tmp_path / "elsewhere", run)
    assert contents(tmp_path / "elsewhere") == content  # no folder's name is in it
    assert again.listing == before.listing
    monkeypatch.undo()
    video_file(tmp_path / "elsewhere", "clips/2.webp", "a 2").unlink()
    with pytest.raises(UserError, match="1 of 6 videos are missing"):
        Cache(tmp_path / "elsewhere")
    for cache in ("elsewhere", "new"):
        made(tmp_path / "somewhere", tmp_path / cache, run)
        assert contents(tmp_path / cache) == content


def test_a_listing_is_of_names_and_captions(tmp_path, run, changing):
    listings = [made(changing, tmp_path / "cache", run).listing]
    for change in (replace_film, add_film, rename_film):
        change(changing)
        listings.append(made(changing, tmp_path / "cache", run).listing)
    assert listings[0] == listings[1] and len(set(listings)) == 3


def test_a_change_that_is_not_encoded_to_the_end_leaves_no_old_clip(
    tmp_path, run, changing, monkeypatch
):
    made(changing, tmp_path / "cache", run)
    replace_film(changing)
    add_film(changing)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "encode_clips", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(changing, tmp_path / "cache", run)
    with pytest.raises(UserError, match=r"not finished \(2 of 7 videos are missing\)"):
        Cache(tmp_path / "cache")
    monkeypatch.undo()
    made(changing, tmp_path / "cache", run)
    made(changing, tmp_path / "new", run)
    assert contents(tmp_path / "cache") == contents(tmp_path / "new")


def test_what_was_skipped_for_a_missing_library_is_tried_again(tmp_path, run, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    film = torch.randint(256, (3, 16, 32, 32), dtype=torch.uint8)
    write_mp4(folder / "a.mp4", [film], 8.0)
    write_video(folder / "b.webp", 0, 1)
    write_captions(folder, ("a.mp4", "a"), ("b.webp", "b"))
    monkeypatch.setitem(sys.modules, "av", None)
    found = made(folder, tmp_path / "cache", run)
    [(name, reason)] = found.skipped
    assert name == "a.mp4" and "av" in reason and len(found) == 1
    monkeypatch.undo()
    assert made(folder, tmp_path / "cache", run).captions(range(3)) == ["a", "a", "b"]


# --- a stale cache ------------------------------------------------------------------------------


def other_run(path: Path, run: Run, *settings: str) -> Run:
    """Return a run with the same weights and other settings."""
    other = random_run(path, *settings)
    for stage in ("vae", "encoder"):
        other.weights_file(stage).write_bytes(run.weights_file(stage).read_bytes())
    return other


def test_a_cache_fits_the_run_that_made_it_and_its_like(tmp_path, run, folder):
    found = made(folder, tmp_path / "cache", run)
    encode.check_cache(found, run)
    encode.check_cache(
        found, other_run(tmp_path / "like", run, "latent.width=64", "stages.latent.batch=5")
    )


@pytest.mark.parametrize(
    "setting, said",
    [
        ("data.fps=4", "data.fps 8.0 -> 4.0"),
        ("data.frames=16", "data.frames 8 -> 16"),
        ("data.height=32 data.width=32", "data.height 16 -> 32"),
        ("text.words=8", "text.words 16 -> 8"),
    ],
)
def test_other_rates_and_sizes_are_named(tmp_path, run, folder, setting, said):
    found = made(folder, tmp_path / "cache", run)
    other = other_run(tmp_path / "other", run, *setting.split())
    with pytest.raises(UserError, match="is stale") as error:
        encode.check_cache(found, other)
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="is stale"):
        encode.encode_folder(other, folder, tmp_path / "cache", "float32")


@pytest.mark.parametrize("stage", ["vae", "encoder"])
def test_other_weights_are_named(tmp_path, run, folder, stage):
    found = made(folder, tmp_path / "cache", run)
    other = other_run(tmp_path / "other", run)
    tensors = load_file(other.weights_file(stage))
    next(iter(tensors.values())).flatten()[0] += 1
    other.save(stage, tensors, {})
    with pytest.raises(UserError, match=rf"is stale \({stage}.digest \w+ -> \w+\)"):
        encode.check_cache(found, other)
    other.weights_file(stage).unlink()
    with pytest.raises(UserError, match="not trained yet"):
        encode.check_cache(found, other)
    with pytest.raises(UserError, match=f"has no {stage} yet"):
        encode.encode_folder(other, folder, tmp_path / "more")


def test_another_precision_is_not_mixed_in(tmp_path, run, folder):
    made(folder, tmp_path / "cache", run)
    with pytest.raises(UserError, match="stored float32 -> bfloat16"):
        encode.encode_folder(run, folder, tmp_path / "cache", "bfloat16")


def test_another_way_of_reading_is_named(tmp_path, run, folder, monkeypatch):
    """What decodes videos has changed: what an earlier version has encoded may look different."""
    found = made(folder, tmp_path / "cache", run)
    monkeypatch.setattr(encode, "READER", 99)
    for use in (
        lambda: encode.check_cache(found, run),
        lambda: encode.encode_folder(run, folder, tmp_path / "cache", "float32"),
    ):
        with pytest.raises(UserError, match=r"is stale \(reader \d+ -> 99\)"):
            use()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 99}', b"\x00\xff"])
def test_foreign_headers_are_one_line(tmp_path, run, folder, content):
    made(folder, tmp_path, run)
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Cache(tmp_path)
    assert "cache.json" in str(error.value) and "\n" not in str(error.value)


def test_a_header_changed_by_hand_is_noticed(tmp_path, run, folder):
    made(folder, tmp_path, run)
    file = tmp_path / "cache.json"
    file.write_text(file.read_text().replace('"data.fps": 8.0', '"data.fps": 4.0'))
    with pytest.raises(UserError, match="changed by hand"):
        Cache(tmp_path)


def test_a_cache_of_an_earlier_version_is_refused_in_one_line(tmp_path, run, folder):
    header = {"format": 1, "hash": "0" * 16, "groups": 1, "key": {}, "parts": {}}
    (tmp_path / "cache.json").write_text(json.dumps(header))
    for use in (Cache, partial(encode.encode_folder, run, folder)):
        with pytest.raises(UserError, match=r"format 1, .*one file a video: remove") as error:
            use(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["short", "pickle", "gone"])
def test_damaged_files_are_one_line_and_are_encoded_anew(tmp_path, run, folder, damage):
    found = made(folder, tmp_path, run)
    file = video_file(tmp_path, *found.header["videos"][3])
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage == "short" else b"\x80\x04." + content)
    with pytest.raises(UserError, match=f"{file.name} is damaged") as error:
        found.latents([9])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="precompute again"):
        Cache(tmp_path)
    made(folder, tmp_path, run)
    assert file.read_bytes() == content


# --- training on it -----------------------------------------------------------------------------


def trained(out: Path) -> dict[str, torch.Tensor]:
    files = {p.name: load_file(p) for p in out.glob("*.safetensors")}
    return {f"{file} {name}": x for file, content in files.items() for name, x in content.items()}


def test_a_folder_is_encoded_first_and_a_cache_of_it_trains_the_same(
    tmp_path, folder, no_curves, monkeypatch, capsys
):
    """The command line, from videos to a sample of a reference; then again from a cache alone."""
    one, other = tmp_path / "one", tmp_path / "other"
    common = ["--tiny", "--set", *MICRO, "--out"]
    assert call(train.main, "--stage", "all", "--data", folder, *common, one) == 0
    assert Cache(one / "cache").captions([0]) == ["a"]
    assert (
        call(prepare.main, "precompute", folder, "--parts", one, "--out", tmp_path / "cache") == 0
    )
    assert tree(tmp_path / "cache") == tree(one / "cache")

    Run.create(other, Run.open(one).config)
    for stage in ("vae", "encoder"):
        (other / f"{stage}.safetensors").write_bytes((one / f"{stage}.safetensors").read_bytes())
    monkeypatch.setattr(Run, "encoder", property(lambda run: pytest.fail("encoder in memory")))
    monkeypatch.setattr(Run, "text", property(lambda run: pytest.fail("text in memory")))
    monkeypatch.setattr(train, "preview", lambda *_: None)
    for stage in ("latent", "semantic"):
        command = ["--stage", stage, "--data", tmp_path / "cache", *common, other]
        assert call(train.main, *command) == 0
        assert "cache was not made as preset tiny: frames 16 -> 8" in capsys.readouterr().out
    found, expected = trained(other), trained(one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    monkeypatch.undo()
    video = folder / "clips/0.webp"
    assert call(sample.main, "--run", other, "--reference", video, "--out", tmp_path / "x.png") == 0
    capsys.readouterr()
    assert call(train.main, "--stage", "vae", "--data", tmp_path / "cache", *common, other) == 2
    one_line(capsys, "has no pixels")
    wrong = [*common[:2], *MICRO, "text.words=9", "--out"]
    assert call(train.main, "--stage", "latent", "--data", tmp_path / "cache", *wrong, "no") == 2
    one_line(capsys, "is stale", "text.words 16 -> 9")


def test_latents_may_be_drawn_from_the_posterior(tmp_path, run, folder):
    """Off, data is the mean; on, it has the posterior's deviation around it."""
    clips = made(folder, tmp_path / "cache", run)
    mean, log_variance = clips.latents([0])

    class OneClip(Cache):
        def __len__(self):
            return 1

    for posterior in (False, True):
        settings = ["stages.base.batch=500", f"stages.base.posterior={posterior}"]
        other = other_run(tmp_path / str(posterior), run, *settings)
        base, rows = stages.Base(other.config), Rows(range(500), 0, "base", 0)
        drawn = base.draw(OneClip(tmp_path / "cache"), rows)["latents"]
        deviation = (drawn - mean).square().mean(0).sqrt()
        expected = (0.5 * log_variance[0]).exp() * posterior
        assert (deviation - expected).abs().max() < 0.2 * max(1e-3, expected.max())


def test_parts_come_back_from_a_cache(tmp_path, run, folder):
    parts = encode.cache_parts(made(folder, tmp_path, run))
    assert parts == {name: getattr(run.config, name) for name in parts}
    assert parts.keys() == {"data", "vae", "encoder", "text"}
    assert flat_fields(run.config.data) == flat_fields(parts["data"])


def test_weights_are_not_read_again_after_many_videos(tmp_path):
    """Those of a text encoder have 20 GB."""
    for name in range(300):
        (tmp_path / f"{name}").write_text(f"{name}")
    digest([tmp_path / "0"])
    for name in range(1, 300):
        fingerprint(tmp_path / f"{name}", content=True)
    read = digest_of.cache_info().misses
    digest([tmp_path / "0"])
    assert digest_of.cache_info().misses == read
