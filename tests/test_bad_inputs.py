"""A corpus of what a user can get wrong, by hand and by hypothesis, against one rule.

Every refusal is one line on stderr that says what was wrong, with exit code 2; no traceback, and on
the disk nothing is new, changed or gone (`refused` compares the whole desk before and after). What
argparse refuses itself prints its usage. What is only odd, such as a prompt of emoji, has to work.

Each test has a desk of its own, its working folder: a run of random weights, a cache made by it, a
folder of two videos, and a few things that are none of these.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import typing
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_video, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from test_run import MICRO, Payload, call, micro, random_run

import config
import encode
import evaluate
import prepare
import run
import sample
import train
from data import DataConfig, Folder, cut
from plumbing.cache import Cache, hash_of, video_file
from plumbing.fields import field_types, flat_fields
from plumbing.files import UserError, one_line
from plumbing.metrics import Metrics
from plumbing.sheet import contact_sheet
from run import Run
from settings import Config
from stages import ORDER
from toy.text import HashText, HashTextConfig

MAINS = {module.__name__: module.main for module in (config, evaluate, prepare, run, sample, train)}
MINI = ["--tiny", "--set", *MICRO]
CONFIG = DataConfig()


# --- the desk -----------------------------------------------------------------------------------


def write_animation(path: Path, durations, size=(16, 16), **options):
    """Write frames of different greys, each on screen for so many milliseconds."""
    images = [Image.new("RGB", size, (10 * k + 20,) * 3) for k in range(len(durations))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    desk = tmp_path_factory.mktemp("template") / "desk"
    made = random_run(desk / "run")
    videos = desk / "videos"
    videos.mkdir()
    for name in ("one", "two"):
        write_animation(videos / f"{name}.webp", [125] * 16, lossless=True)
    lines = [json.dumps({"video": f"{n}.webp", "caption": f"a {n}"}) for n in ("one", "two")]
    (videos / "captions.jsonl").write_text("\n".join(lines))
    encode.encode_folder(made, videos, desk / "cache", "float32")
    (desk / "empty").mkdir()
    shutil.copy(videos / "one.webp", desk / "clip.webp")
    shutil.copy(videos / "one.webp", desk / "clip.png")  # read by content
    (desk / "text.txt").write_text("no video at all\n" * 99)
    shutil.copy(desk / "text.txt", desk / "text.mp4")
    return desk


@pytest.fixture
def desk(template, tmp_path, monkeypatch) -> Path:
    """A fresh copy of the template as the working folder."""
    shutil.copytree(template, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def check_line(error: str, *words: str):
    """Check that a whole stderr is one line of ours, with these words in it."""
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert error.strip().removeprefix("error:").strip() and "Traceback" not in error
    assert error[:-1].isprintable() and len(error) < 3000, error
    assert all(word in error for word in words), error


def refused(capsys, main, *argv, words=(), timeout: int = 20):
    """Check that a command line is refused as the rule says, and leaves the desk as it was."""
    before = tree(Path())
    capsys.readouterr()
    with soon(timeout):
        code = call(main, *argv)
    error = capsys.readouterr().err
    assert code == 2, (code, error)
    check_line(error, *words)
    assert tree(Path()) == before, [k for k in tree(Path()) if k not in before]


@contextlib.contextmanager
def soon(seconds: int):
    """Fail, instead of waiting for ever, where something takes longer than it may."""

    def stop(*_):
        pytest.fail(f"it took more than {seconds} s")  # which no `except Exception` takes

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def test_the_check_can_fail(desk, capsys):
    """Of each part of the rule, a command that breaks it alone."""

    def leaves_a_file():
        Path("left").touch()
        raise UserError("x")

    def loses_a_file():
        Path("clip.webp").unlink()
        raise UserError("x")

    def says_two_lines():
        print("error: first", file=sys.stderr)
        raise UserError("x")

    def says_nothing():
        raise UserError("")

    def waits():
        signal.pause()

    for main in (leaves_a_file, loses_a_file, says_two_lines, says_nothing, lambda: None):
        with pytest.raises(AssertionError):
            refused(capsys, main)
    with pytest.raises(pytest.fail.Exception, match="more than 1 s"):
        refused(capsys, waits, timeout=1)
    with pytest.raises(ZeroDivisionError):
        refused(capsys, lambda: 1 / 0)

    def says_what_is_wrong():
        raise UserError("a name\nwith \x1b two lines and \udcff")

    refused(capsys, says_what_is_wrong, words=[r"a name\nwith \x1b two lines and \udcff"])


def test_what_a_line_cannot_hold_is_escaped():
    assert one_line("plain – ä 😀") == "plain – ä 😀"
    assert one_line("a\nb\tc\r\x00\u2028\ud800") == r"a\nb\tc\r\x00\u2028\ud800"
    assert len(one_line("x" * 10**6)) < 2100


# --- fields -------------------------------------------------------------------------------------

NAN, INF = ("nan", "NaN", "-nan"), ("inf", "-inf", "1e400")
FIELDS = {  # field -> what it cannot be
    "stages.latent.lr": [*NAN, *INF, "-1", "1e30", "fast", "", "0x1", "1,5"],
    "stages.latent.muon_lr": ["nan", "inf", "-0.1", "11", "None"],
    "stages.latent.weight_decay": ["nan", "inf", "-1", "1e30"],
    "stages.latent.warmup": ["nan", "-1", "1.5", "1e30", str(10**30)],
    "stages.latent.final_lr": ["nan", "-0.1", "1.1", "inf"],
    "stages.latent.grad_clip": ["nan", "inf", "0", "-1", "1e30"],
    "stages.latent.ema": ["nan", "-0.5", "1.5", "inf", "true"],
    "stages.latent.text_dropout": ["nan", "7", "-1", "inf", "10%"],
    "stages.latent.context_dropout": ["nan", "7", "-1", "inf"],
    "stages.latent.shift": ["nan", "inf", "0", "-1", "1e30"],
    "stages.latent.steps": ["0", "-1", "1.5", "nan", "1e30", str(10**30), "٣.٥", "9" * 5000],
    "stages.latent.batch": ["0", "-1", "1e30", str(10**30), "many"],
    "stages.latent.clips": ["0", "-1", str(10**30)],
    "stages.latent.accumulate": ["0", "-2", str(10**30)],
    "stages.vae.accumulate": ["2", "7"],  # a batch of three has no such pieces
    "stages.latent.preview_every": ["0", "-1", "often", "nan"],
    "stages.latent.optimizer": ["sgd", "", "Muon", "None"],
    "stages.latent.time": ["normal", "", "uniform "],
    "stages.latent.compile": ["maybe", "1", ""],
    "sample.steps": ["0", "-1", "nan", "1e30", str(10**30)],
    "sample.guidance": ["nan", "inf", "-inf", "1e30", "two"],
    "sample.latent_guidance": ["nan", "inf", "-1e30"],
    "sample.context_guidance": ["nan", "inf", "off"],
    "sample.base_guidance": ["nan", "inf", "101"],
    "data.frames": ["0", "-8", "6", "7", "nan", "1e30", str(10**30)],
    "data.fps": ["0", "-8", "nan", "inf", "1e30", "1e-30"],
    "data.height": ["0", "-16", "17", "30", str(10**30), "24"],  # 24: another aspect
    "data.width": ["0", "-1", "15", str(10**30)],
    "data.semantic_fps": ["0", "nan", "inf", "1e30"],
    "data.semantic_height": ["0", "12", "-8"],
    "data.semantic_width": ["0", "12", str(10**9)],
    "data.objects": ["0", "3", "-1", "one"],
    "compressor.channels": ["0", "-1", str(10**12)],
    "compressor.hidden": ["0", "-1", str(10**30)],
    "compressor.kl_weight": ["nan", "-1", "inf", "1e30"],
    "compressor.log_variance": ["nan", "inf", "1e30", "-1e30"],
    "compressor.noise": ["nan", "-1", "inf", "1e30"],
    "vae.channels": ["0", "-1", str(10**30)],
    "vae.width": ["0", "-8", "9", str(10**30)],
    "vae.blocks": ["0", "-1", str(10**9)],
    "vae.time_patch": ["0", "-4", "3"],
    "vae.space_patch": ["0", "-4", "3"],
    "vae.kl_weight": ["nan", "-1", "inf"],
    "vae.white": ["0", "-1", "3", str(10**30)],
    "text.words": ["0", "-1", str(10**30)],
    "text.dim": ["0", "-1", str(10**30)],
    "encoder.dim": ["0", "-4", "30", "nan"],
    "encoder.blocks": ["0", "-1", str(10**9)],
    "encoder.heads": ["0", "-1", "3"],
    "encoder.rate": ["0", "nan", "2"],
    "encoder.caption_blocks": ["0", "-1", str(10**9)],
    "encoder.caption_words": ["0", "-1", str(10**30)],
    "latent.width": ["0", "-1", "33", "wide", "32.0", str(10**30)],
    "latent.depth": ["0", "-1", str(10**9)],
    "latent.heads": ["0", "-1", "3", "16"],
    "latent.ffn": ["0", "-1", str(10**30)],
    "latent.patch": ["0", "-1", "3"],
    "latent.space_cycles": ["0", "nan", "inf", "-1"],
    "latent.window": ["0", "nan", "inf", "-1"],
    "latent.channels": ["3"],
    "semantic.text_dim": ["7"],
    "dtype": ["float8", "", "int64"],
}
SIZES = ("height", "width", "frames", "heads", "dim", "patch", "white", "accumulate")
SETTINGS = [(field, value) for field, values in FIELDS.items() for value in values]


@pytest.fixture
def untrained(monkeypatch):
    """What trains says "accepted": whoever comes as far as that has been."""

    def accepted(*_):
        raise AssertionError("accepted")

    monkeypatch.setattr(train, "train", accepted)


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_that_cannot_be(desk, capsys, untrained, field):
    stage = field.split(".")[1] if field.startswith("stages.") else "vae"
    for value in FIELDS[field]:
        name = field.split(".")[-1]
        said = [] if any(x in name for x in SIZES) else [name]  # one size does not fit another
        arguments = ["--stage", stage, "--out", "new", *MINI, f"{field}={value}"]
        refused(capsys, train.main, *arguments, words=said or [value.lstrip("-")[:9]])


def test_the_settings_of_the_corpus_would_do_without_the_mistake(desk, untrained):
    for stage in ORDER:
        with pytest.raises(AssertionError, match="accepted"):
            call(train.main, "--stage", stage, "--out", "new", *MINI, "stages.latent.ema=0")
    assert (desk / "new/config.json").exists()


# --- command lines ------------------------------------------------------------------------------

TRAIN = ["--stage", "vae", "--out", "new"]
COMMANDS = [  # command, arguments, words of the message
    # train.py: names
    ("train", [*TRAIN, "--preset", "gigantic"], ["gigantic", "choose tiny"]),
    ("train", [*TRAIN, "--preset", ""], ["--preset", "choose tiny"]),
    ("train", [*TRAIN, "--preset", "Tiny"], ["Tiny", "choose tiny"]),
    ("train", [*TRAIN, "--preset", "ti\nny"], [r"ti\nny"]),
    ("train", [*TRAIN], ["--qwen", "--tiny"]),
    ("train", [*TRAIN, *MINI, "latent.widht=64"], ["latent.widht", "latent.width"]),
    ("train", [*TRAIN, *MINI, "width=64"], ["could be any of", "vae.width"]),
    ("train", [*TRAIN, *MINI, "lr=1"], ["could be any of", "stages.vae.lr"]),
    ("train", [*TRAIN, *MINI, "latent.width"], ["expected field=value"]),
    ("train", [*TRAIN, *MINI, "=3"], ["no such field"]),
    ("train", [*TRAIN, *MINI, "latent.=3"], ["no such field"]),
    ("train", [*TRAIN, *MINI, ".width=3"], ["no such field"]),
    ("train", [*TRAIN, *MINI, "a\nb=3"], [r"a\nb", "no such field"]),
    ("train", [*TRAIN, *MINI, "\udcff=3"], [r"\udcff", "no such field"]),
    ("train", [*TRAIN, *MINI, "x" * 100_000 + "=3"], ["no such field"]),
    ("train", [*TRAIN, *MINI, "latent.width=" + "9" * 100_000], ["latent.width", "expected int"]),
    ("train", [*TRAIN, *MINI, "stages.vae=3"], ["no such field"]),
    ("train", [*TRAIN, *MINI, "latent.width=64", "latent.heads=7"], ["64 over 7 heads"]),
    ("train", [*TRAIN, *MINI, "data.frames=12", "vae.time_patch=8"], ["multiples of 8 frames"]),
    ("train", [*TRAIN, *MINI, "data.height=32"], ["aspect"]),
    ("train", [*TRAIN, *MINI, *(f"{n}=1000000" for n in ("data.height", "data.width"))], []),
    # train.py: numbers
    ("train", [*TRAIN, *MINI, "--steps", "0"], ["--steps 0", "at least 1"]),
    ("train", [*TRAIN, *MINI, "--steps", "-5"], ["--steps -5", "at least 1"]),
    ("train", [*TRAIN, *MINI, "--steps", str(10**30)], ["steps", "at most 1e+09"]),
    ("train", [*TRAIN, *MINI, "--seed", str(10**1000)], ["--seed", "63 bits"]),
    ("train", [*TRAIN, *MINI, "--seed", str(-(10**1000))], ["--seed", "63 bits"]),
    # train.py: files
    (
        "train",
        [*TRAIN, "--preset", "wan_tiny", "--set", "latent.wan.head_width=33"],
        ["head_width 33", "even"],
    ),
    ("train", [*TRAIN[:3], "text.txt", *MINI], ["text.txt is a file", "name a folder"]),
    ("train", [*TRAIN[:3], "text.txt/new", *MINI], ["text.txt is a file, not a folder"]),
    ("train", [*TRAIN[:3], "n" * 300, *MINI], ["File name too long"]),
    ("train", [*TRAIN[:3], "run", *MINI, "latent.width=64"], ["latent.width 32 -> 64"]),
    ("train", [*TRAIN, *MINI, "--data", "nowhere"], ["nowhere", "no such folder"]),
    ("train", [*TRAIN, *MINI, "--data", "text.txt"], ["text.txt", "no such folder"]),
    ("train", [*TRAIN, *MINI, "--data", "empty"], ["empty", "neither captions.jsonl nor any"]),
    ("train", [*TRAIN, *MINI, "--data", "cache"], ["cache has no pixels", "train vae"]),
    (
        "prepare",
        ["precompute", "empty", "--out", "empty"],
        ["empty is the folder of videos itself: name another"],
    ),
    (
        "prepare",
        ["precompute", "empty", "--out", "new", "--parts", "run", "--preset", "tiny"],
        ["--parts --preset", "one of the two"],
    ),
    ("train", ["--stage", "all", *TRAIN[2:], *MINI, "--data", "cache"], ["no pixels"]),
    ("train", ["--stage", "base", *TRAIN[2:], *MINI, "--data", "cache"], ["is stale"]),
    (
        "train",
        ["--stage", "base", *MINI, "text.words=9", "--out", "run", "--data", "cache"],
        ["is stale", "text.words 16 -> 9"],
    ),
    ("train", [*TRAIN[:3], "run", *MINI, "--fresh", "--data", "nowhere"], ["no such folder"]),
    ("train", [*TRAIN[:3], "run", *MINI, "--fresh", "--data", "empty"], ["neither captions"]),
    ("train", [*TRAIN, *MINI, "--qwen", ""], ["--qwen", "empty"]),
    ("train", [*TRAIN, *MINI, "--vae", "empty"], ["empty has no config.json"]),
    ("train", [*TRAIN, *MINI, "--text", "text.txt"], ["text.txt", "neither a folder"]),
    ("train", [*TRAIN, *MINI, "--text", "no/such/place"], ["no/such/place", "neither a folder"]),
    # sample.py
    ("sample", ["x", ""], ["a prompt is empty"]),
    ("sample", [" \t\n\u2003 "], ["a prompt is empty"]),
    ("sample", ["--steps", "0"], ["--steps 0", "at least 1"]),
    ("sample", ["--steps", "-1"], ["--steps -1", "at least 1"]),
    ("sample", ["--steps", str(10**12)], ["--steps", "at most 10000"]),
    ("sample", ["--seconds", "0.1"], ["--seconds 0.1", "1.0 s"]),
    ("sample", ["--seconds", "nan"], ["--seconds nan", "1.0 s"]),
    ("sample", ["--seconds", "inf"], ["--seconds inf"]),
    ("sample", ["--seconds", "-2"], ["--seconds -2"]),
    ("sample", ["--seconds", "0"], ["--seconds 0"]),
    ("sample", ["--seconds", "1e12"], ["--seconds", "an hour"]),
    ("sample", ["--seconds", "1e300"], ["--seconds", "an hour"]),
    ("sample", ["--seconds", "2", "--reference", "clip.webp"], ["--reference", "its own length"]),
    ("sample", ["--guidance", "nan"], ["--guidance nan", "at most 100"]),
    ("sample", ["--guidance", "inf"], ["--guidance inf"]),
    ("sample", ["--guidance", "1", "Infinity"], ["--guidance inf"]),
    ("sample", ["--guidance", "-1000"], ["--guidance -1000"]),
    ("sample", ["--guidance", "1e30"], ["--guidance 1e+30"]),
    ("sample", ["--guidance", "1", "2", "3", "4"], ["--guidance: one to three numbers, not 4"]),
    ("sample", ["--out", "x"], ["--out x", ".webp"]),
    ("sample", ["--out", "x.avi"], [".avi", ".webp", ".mp4"]),
    ("sample", ["--out", "x.WEBP"], ["x.WEBP", ".webp"]),
    ("sample", ["--out", ""], ["--out", ".webp"]),
    ("sample", ["--out", "empty"], ["--out empty", ".webp"]),
    ("sample", ["--out", "a.webp"], ["a.webp is a folder"]),
    ("sample", ["--out", "a.gif"], ["a.png is a folder"]),
    ("sample", ["--out", "a.webp/b.webp/c.png"], ["b.webp is a file, not a folder"]),
    ("sample", ["--out", "text.txt/x.webp"], ["text.txt is a file, not a folder"]),
    ("sample", ["--out", "n" * 300 + ".webp"], ["too long"]),
    ("sample", ["--reference", "clip.webp", "--out", "clip.webp"], ["would be lost"]),
    ("sample", ["--reference", "clip.png", "--out", "clip.webp"], ["would be lost"]),
    ("sample", ["--reference", "clip.webp", "--out", "empty/../clip.webp"], ["would be lost"]),
    ("sample", ["--reference", "videos", "--out", "videos/1.webp"], ["would be lost"]),
    ("sample", ["--reference", "clip.webp", "--base"], ["--reference", "the base"]),
    ("sample", ["--reference", "nowhere.mp4"], ["nowhere.mp4", "no such file"]),
    ("sample", ["--reference", "empty"], ["empty", "no frames"]),
    ("sample", ["--reference", "run"], ["run", "no frames"]),
    ("sample", ["--reference", "text.txt"], ["text.txt", "it is text"]),
    ("sample", ["--reference", "text.mp4"], ["text.mp4", "nvalid data"]),
    ("sample", ["--reference", "run/vae.safetensors"], ["vae.safetensors"]),
    ("sample", ["--reference", "\udcff.mp4"], [r"\udcff.mp4", "no such file"]),
    ("sample", ["--run", "nowhere"], ["nowhere is no run", "train.py"]),
    ("sample", ["--run", "empty"], ["empty is no run", "train.py"]),
    ("sample", ["--run", "text.txt"], ["text.txt is no run"]),
    ("sample", ["--run", "clip.webp/x"], ["clip.webp/x is no run"]),
    ("sample", ["--run", "cache"], ["cache is no run"]),
    ("sample", ["--run", "no\nrun"], [r"no\nrun is no run"]),
    ("sample", ["--vae", "empty"], ["empty has no config.json"]),
    ("sample", ["--vae", ""], ["--vae", "empty"]),
    # evaluate.py
    ("evaluate", ["--prompts", "1"], ["--prompts 1", "at least 2"]),
    ("evaluate", ["--prompts", "0"], ["--prompts 0"]),
    ("evaluate", ["--prompts", "-7"], ["--prompts -7"]),
    ("evaluate", ["--prompts", str(10**12)], ["--prompts", "at most"]),
    ("evaluate", ["--steps", "0"], ["--steps 0", "at least 1"]),
    ("evaluate", ["--steps", str(10**12)], ["--steps", "at most"]),
    ("evaluate", ["--base", "--plans"], ["--base --plans", "knows no plans"]),
    ("evaluate", ["--json", "empty"], ["empty is a folder"]),
    ("evaluate", ["--json", "text.txt/x.json"], ["text.txt is a file"]),
    ("evaluate", ["--run", "nowhere"], ["nowhere is no run", "train.py"]),
    ("evaluate", ["--run", "text.txt"], ["text.txt is no run"]),
    # prepare.py
    ("prepare", ["preview", "--count", "0"], ["--count 0", "at least 1"]),
    ("prepare", ["preview", "--count", "-1"], ["--count -1", "at least 1"]),
    ("prepare", ["preview", "--count", str(10**12)], ["--count", "at most"]),
    ("prepare", ["preview", "--size", "0"], ["--size 0", "at least 1"]),
    ("prepare", ["preview", "--size", str(10**9)], ["--size", "at most"]),
    ("prepare", ["preview", "--out", "empty"], ["empty", ".png"]),
    ("prepare", ["preview", "--out", "x.jpg"], ["x.jpg", ".png"]),
    ("prepare", ["preview", "--out", "a.png"], ["a.png is a folder"]),
    ("prepare", ["preview", "--out", "text.txt/x.png"], ["text.txt is a file"]),
    ("prepare", ["preview", "--data", "nowhere"], ["nowhere", "no such folder"]),
    ("prepare", ["preview", "--data", "clip.webp"], ["clip.webp", "no such folder"]),
    ("prepare", ["preview", "--data", "empty"], ["empty", "neither captions.jsonl"]),
    ("prepare", ["preview", "--data", "cache"], ["cache", "neither captions.jsonl"]),
    ("prepare", ["precompute", "videos", "--out", "new"], ["--qwen"]),
    ("prepare", ["precompute", "videos", "--out", "new", "--preset", "x"], ["choose tiny"]),
    ("prepare", ["precompute", "videos", "--out", "new", "--preset", "tiny"], ["name a run"]),
    ("prepare", ["precompute", "nowhere", "--out", "new", "--parts", "run"], ["no such folder"]),
    ("prepare", ["precompute", "empty", "--out", "new", "--parts", "run"], ["neither captions"]),
    ("prepare", ["precompute", "videos", "--out", "new", "--parts", "nowhere"], ["is no run"]),
    ("prepare", ["precompute", "videos", "--out", "text.txt", "--parts", "run"], ["is a file"]),
    ("prepare", ["precompute", "videos", "--out", "text.txt/x", "--parts", "run"], ["is a file"]),
    (
        "prepare",
        ["precompute", "videos", "--out", "cache", "--parts", "run"],
        ["is stale", "stored"],
    ),
    (
        "prepare",
        ["precompute", "videos", "--out", "new", "--parts", "run", "--set", "data.fps=nan"],
        ["data.fps=nan"],
    ),
    # run.py
    ("run", ["export", "nowhere", "new"], ["nowhere is no run"]),
    ("run", ["export", "text.txt", "new"], ["text.txt is no run"]),
    ("run", ["export", "run", "run"], ["is the run itself"]),
    ("run", ["export", "run", "empty/../run"], ["is the run itself"]),
    ("run", ["export", "run", "text.txt"], ["text.txt is a file"]),
    ("run", ["export", "run", "text.txt/x"], ["text.txt is a file"]),
    # config.py
    ("config", ["--preset", "gigantic"], ["choose tiny"]),
    ("config", ["--seconds", "nan"], ["--seconds nan"]),
    ("config", ["--seconds", "5", "-1"], ["--seconds -1"]),
    ("config", ["--seconds", "inf"], ["--seconds inf"]),
    ("config", ["--seconds", "1e30"], ["--seconds 1e+30"]),
    ("config", ["--set", "data.fps=0"], ["data.fps=0"]),
    ("config", ["--set", "latent.widht=3"], ["latent.width"]),
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_line_that_cannot_be(desk, capsys, untrained, number):
    name, arguments, words = COMMANDS[number]
    for folder in ("a.webp", "a.png"):
        Path(folder).mkdir()
    Path("a.webp/b.webp").touch()
    if name in ("sample", "evaluate") and "--run" not in arguments:
        arguments = [*arguments, "--run", "run"]
    if name == "sample" and "--out" not in arguments:
        arguments = [*arguments, "--out", "new.webp"]
    refused(capsys, MAINS[name], *arguments, words=words)


USAGE = [
    ("train", [*TRAIN, "--tiny", "--preset", "small"]),
    ("train", []),
    ("train", ["--stage", "everything", "--tiny"]),
    ("train", ["--stage", "vae", "--tiny", "--no-such-option"]),
    ("train", ["--stage", "vae", "--tiny", "--steps", "many"]),
    ("train", ["--stage", "vae", "--tiny", "--steps", "1.5"]),
    ("train", ["--stage", "vae", "--tiny", "--seed", "one"]),
    ("train", ["--stage", "vae", "--tiny", "--seed", "9" * 5000]),
    ("train", ["--stage", "vae", "--tiny", "--set"]),
    ("sample", ["--seed", "1e3"]),
    ("sample", ["--guidance", "two"]),
    ("sample", ["--guidance"]),
    ("sample", ["--guidance", "1", "-inf"]),
    ("sample", ["--seconds", "long"]),
    ("sample", ["--steps", "nan"]),
    ("evaluate", ["--prompts", "some"]),
    ("train", [*TRAIN[:3], "", *MINI]),
    ("train", [*TRAIN, *MINI, "--data", ""]),
    ("prepare", ["precompute", "videos", "--out", ""]),
    ("evaluate", ["a prompt"]),
    ("prepare", []),
    ("prepare", ["look"]),
    ("prepare", ["precompute", "videos"]),
    ("prepare", ["precompute", "videos", "--out", "new", "--dtype", "int8"]),
    ("prepare", ["preview", "--count", "x"]),
    ("run", []),
    ("run", ["import", "run", "new"]),
    ("run", ["export", "run"]),
    ("config", ["--seconds", "x"]),
]


@pytest.mark.parametrize("name, arguments", USAGE)
def test_argparse_shows_how_a_command_is_used(desk, capsys, untrained, name, arguments):
    before = tree(Path())
    assert call(MAINS[name], *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: ") and "error: " in error and "Traceback" not in error
    assert tree(Path()) == before


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("train", [*TRAIN[:3], "closed/new", *MINI]),
        ("sample", ["--run", "run", "--out", "closed/x.webp"]),
        ("prepare", ["preview", "--out", "closed/x.png"]),
        ("run", ["export", "run", "closed/new"]),
    ],
)
def test_a_folder_that_may_not_be_written(desk, capsys, untrained, name, arguments):
    Path("closed").mkdir(mode=0o500)
    if os.access("closed", os.W_OK):
        pytest.skip("root may write anywhere")
    refused(capsys, MAINS[name], *arguments, words=["closed", "no permission"])


WRITERS = [
    ("train", [*TRAIN, *MINI]),
    ("sample", ["x", "--run", "run", "--out", "new/x.webp"]),
    ("sample", ["x", "y", "--run", "run", "--out", "x.gif"]),
    ("prepare", ["preview", "--out", "new/deep/x.png"]),
    ("prepare", ["precompute", "videos", "--parts", "run", "--out", "new"]),
    ("run", ["export", "run", "new"]),
]


@pytest.mark.parametrize("name, arguments", WRITERS)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk(desk, capsys, untrained, monkeypatch, name, arguments, function):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    where = arguments[-1] if name == "run" else arguments[arguments.index("--out") + 1]
    refused(capsys, MAINS[name], *arguments, words=[Path(where).stem, "No space left"])


@contextlib.contextmanager
def no_room():
    """A file may not grow, as on a disk that is really full: libraries meet it in their own way.

    Around the command alone: pytest writes files, too.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "name, arguments, file",
    [
        ("train", [*TRAIN, *MINI], "config.json"),  # not the lock
        ("sample", ["x", "--run", "run", "--out", "new/x.mp4"], "x.mp4"),
        ("run", ["export", "run", "new"], "vae.safetensors"),
    ],
)
def test_no_room_for_a_file(desk, capsys, name, arguments, file):
    with no_room():
        refused(capsys, MAINS[name], *arguments, words=[file, "File too large"])


def test_no_room_for_a_line_of_metrics(desk):
    with no_room(), pytest.raises(OSError) as error:
        Metrics(desk, "vae", 0).write(1, [], {}, {})
    assert error.value.filename == str(desk / "metrics.jsonl")


def test_too_little_memory_is_one_line(desk, capsys):
    def greedy():
        torch.empty(2**60, dtype=torch.uint8)

    refused(capsys, greedy, words=["out of memory", "smaller"])


def test_what_remains_of_odd_names_is_said(desk, capsys):
    """A name that no encoding has can be written to, and the command says so and goes on."""
    assert call(sample.main, "x", "--run", "run", "--out", "\udcff\n.png") == 0
    assert Path("\udcff\n.png").exists() and r"\udcff" in capsys.readouterr().out


def test_a_run_in_training_is_not_exported_over(desk, capsys):
    shutil.copytree("run", "other")
    Path("other/vae.state").touch()
    refused(capsys, run.main, "export", "run", "other", words=["in training", "name another"])


def test_a_run_of_another_aspect_cannot_be_evaluated(desk, capsys):
    random_run(Path("films"), "data.height=32")
    refused(capsys, evaluate.main, "--run", "films", "--prompts", 2, words=["films", "aspect"])


# --- prompts ------------------------------------------------------------------------------------

PROMPTS = {
    "not of this world": "two dogs argue about Kant",
    "one letter": "a",
    "punctuation": "?!.,;:-–—…'\"()[]{}<>/\\|@#$%^&*~`",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🔴⬅️",
    "control characters": "\x01\x02\x1b[31mred\x1b[0m\x07\x08",
    "null characters": "a\x00red\x00circle",
    "only null characters": "\x00\x00",
    "lone surrogates": "\ud800 \udfff\udc80",
    "from another encoding": "\udce9t\udce9",
    "right to left": "דג אדום \u202eabc",
    "marks without letters": "\u0301\u0302\u0303" * 50,
    "no width": "\u200b\u200d\ufeff",
    "line ends": "a\nred\r\ncircle\u2028moves",
    "options": "--seed=3 -x",
    "markup": "<b>%s{}${HOME}`ls`</b>",
    "thousands of words": "a red circle " * 5000,
    "a megabyte": "".join(chr(97 + (k * k + k // 26) % 26) for k in range(2**20)),
    "a megabyte of one letter": "a" * 2**20,
    "a megabyte of line ends": "x" + "\n" * 2**20 + "y",
    "all planes": "".join(chr(k) for k in range(0, 0x110000, 997)),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_string_is_a_prompt(desk, prompt):
    with soon(20):
        assert call(sample.main, "--run", "run", "--out", "x.png", "--", prompt) == 0
    with Image.open("x.png") as sheet:
        assert sheet.height < 1500


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=()), min_size=1))
def test_any_string_has_tokens(prompt):
    tokens = HashText(HashTextConfig()).encode([prompt])
    assert tokens.isfinite().all() and tokens.any() == bool(prompt.split())
    contact_sheet(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8), [prompt])


# --- captions -----------------------------------------------------------------------------------

GOOD = '{"video": "one.webp", "caption": "a one"}'
OTHER = '{"video": "two.webp", "caption": "a two"}'


def entry(video, caption="x") -> str:
    return json.dumps({"video": video, "caption": caption})


REFUSED_CAPTIONS = {  # content, words of the message
    "empty": (b"", ["empty"]),
    "blank": (b" \n\t\n\r\n", ["empty"]),
    "binary": (bytes(range(256)) * 9, ["line 1: expected"]),
    "no JSON": (b"one.webp a one", ["line 1: expected"]),
    "CSV": (b"video,caption\none.webp,a one", ["line 1: expected"]),
    "cut off": (f"{OTHER}\n{GOOD[:-5]}".encode(), ["line 2: expected"]),
    "an array after a blank line": (f"{GOOD}\n\n[]".encode(), ["line 3: expected"]),
    "an array": (f"[{GOOD}]".encode(), ["line 1: expected"]),
    "all in one array": (f"[\n{GOOD},\n{OTHER}\n]".encode(), ["line 1: expected"]),
    "two in a line": (f"{GOOD} {OTHER}".encode(), ["line 1: expected"]),
    "a string": (b'"one.webp"', ["line 1: expected"]),
    "null": (b"null", ["line 1: expected"]),
    "a number": (b"3", ["line 1: expected"]),
    "other keys": (b'{"file": "one.webp", "text": "x"}', ["line 1: expected"]),
    "no video": (b'{"caption": "x"}', ["line 1: expected"]),
    "no caption": (b'{"video": "one.webp"}', ["line 1: expected"]),
    "a list of captions": (b'{"video": "one.webp", "caption": ["x"]}', ["line 1: expected"]),
    "a number as caption": (b'{"video": "one.webp", "caption": 3}', ["line 1: expected"]),
    "null as caption": (b'{"video": "one.webp", "caption": null}', ["line 1: expected"]),
    "a number as video": (b'{"video": 3, "caption": "x"}', ["line 1: expected"]),
    "an object as video": (b'{"video": {}, "caption": "x"}', ["line 1: expected"]),
    "nested too deep": (b"[" * 200_000 + b"]" * 200_000, ["line 1: expected"]),
    "nested too deep inside": (b'{"video": ' + b'{"a":' * 99_999, ["line 1: expected"]),
    "UTF-16, cut off": (f"{GOOD}\n{OTHER[:-5]}".encode("utf-16"), ["line 2: expected"]),
    "not UTF-8": (entry("one.webp", "caf@").encode().replace(b"@", b"\xe9"), ["not UTF-8"]),
    "null bytes": (b"\x00" * 100, ["line 1: expected"]),
    "a null byte inside": (GOOD.encode()[:9] + b"\x00" + GOOD.encode()[9:], ["line 1"]),
    "a path outside": (entry("../clip.webp").encode(), ["must lie in the folder"]),
    "a path around": (entry("x/../../clip.webp").encode(), ["must lie in the folder"]),
    "an absolute path": (entry("/etc/passwd").encode(), ["must lie in the folder"]),
    "no path": (entry("").encode(), ["must lie in the folder"]),
    "the folder itself": (entry("./").encode(), ["must lie in the folder"]),
    "a blank caption": (entry("one.webp", " \n").encode(), ["no caption", "no video can be used"]),
    "no such video": (entry("gone.webp").encode(), ["gone.webp", "no such file"]),
    "one long line": (entry("one.webp").encode() * 9999, ["line 1: expected"]),
    "a folder without frames": (entry("empty").encode(), ["no frames"]),
    "a null character in a name": (entry("a\0.mp4").encode(), ["no such file"]),
    "a surrogate in a name": (entry("\ud800.webp").encode(), ["no such file"]),
    "a line end in a name": (entry("a\nb.webp").encode(), [r"a\nb.webp", "no such file"]),
    "a name too long": (entry("n" * 300 + ".webp").encode(), ["no such file"]),
    "the listing itself": (entry("captions.jsonl").encode(), ["captions.jsonl", "nvalid data"]),
}
ODD_CAPTIONS = {  # content that works, how many clips
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), 1),
    "CRLF": (f"{GOOD}\r\n\r\n{OTHER}\r\n".encode(), 2),
    "UTF-16": (f"{GOOD}\r\n{OTHER}\r\n".encode("utf-16"), 2),
    "UTF-16 without a mark": (f"{GOOD}\n{OTHER}".encode("utf-16-be"), 2),
    "CR": (f"{GOOD}\r{OTHER}".encode(), 2),
    "duplicates": (f"{GOOD}\n{GOOD}\n{GOOD}".encode(), 3),
    "two captions": (f"{GOOD}\n{entry('one.webp', 'another')}".encode(), 2),
    "keys twice": (b'{"video": "x", "video": "one.webp", "caption": "y"}', 1),
    "more keys": (b'{"id": 3, "video": "./one.webp", "caption": "y", "fps": null}', 1),
    "a megabyte": (entry("one.webp", "a red circle " * 80_000).encode(), 1),
    "a megabyte of one word": (entry("one.webp", "é" * 2**20).encode(), 1),
    "null characters": (entry("one.webp", "a\0b\0").encode(), 1),
    "surrogates": (entry("one.webp", "\ud800").encode(), 1),
    "a surrogate beside": (f"{entry(chr(0xD800) + '.webp')}\n{GOOD}".encode(), 1),
    "videos that are missing": (f"{entry('gone.mp4')}\n{GOOD}\n{entry('no.gif')}".encode(), 1),
}


@pytest.mark.parametrize("content, words", REFUSED_CAPTIONS.values(), ids=REFUSED_CAPTIONS)
def test_captions_that_cannot_be(desk, capsys, untrained, content, words):
    Path("videos/captions.jsonl").write_bytes(content)
    Path("videos/empty").mkdir()
    words = ["videos/", *words]
    refused(capsys, prepare.main, "preview", "--data", "videos", "--out", "x.png", words=words)
    refused(capsys, train.main, *TRAIN, *MINI, "--data", "videos", words=words)


@pytest.mark.parametrize("content, clips", ODD_CAPTIONS.values(), ids=ODD_CAPTIONS)
def test_captions_that_are_only_odd(desk, capsys, content, clips):
    Path("videos/captions.jsonl").write_bytes(content)
    assert call(prepare.main, "preview", "--data", "videos", "--out", "x.png") == 0
    said = capsys.readouterr()
    assert f"{clips} of {clips} clips" in said.out and not said.err
    arguments = ["precompute", "videos", "--parts", "run", "--out", "new", "--dtype", "float32"]
    assert call(prepare.main, *arguments) == 0
    assert len(Cache(Path("new"))) == clips * 2  # of one second, not of two


def test_captions_that_are_no_file(desk, capsys):
    Path("videos/captions.jsonl").unlink()
    Path("videos/captions.jsonl").mkdir()
    refused(capsys, prepare.main, "preview", "--data", "videos", words=["captions.jsonl", "no"])
    Path("videos/captions.jsonl").rmdir()
    os.mkfifo("videos/captions.jsonl")
    refused(capsys, prepare.main, "preview", "--data", "videos", words=["captions.jsonl", "no"])


# --- videos -------------------------------------------------------------------------------------


def gif_of(width: int, height: int) -> bytes:
    """Return a GIF that claims a size and has one small frame."""
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + bytes(6)
    frame = b"," + struct.pack("<HHHH", 0, 0, 1, 1) + b"\x00\x02\x02D\x01\x00;"
    return screen + frame


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def mp4(path: Path, frames: int = 12, size: int = 64, sound: bool = False, rate: int = 8):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        if sound:
            stream = container.add_stream("aac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
            frame.rate = 44100
            container.mux(stream.encode(frame))
        else:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for k in range(frames):
                image = Image.new("RGB", (size, size), (20 * k, 100, 50))
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def half(write):
    """Return a writer of the first half of what another one writes."""

    def cut_off(path: Path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return cut_off


def noise(path: Path):
    images = [Image.effect_noise((32, 32), 90 + k) for k in range(8)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=250)


def loop(path: Path):
    path.symlink_to(path.name)


def dangling(path: Path):
    path.symlink_to("nowhere")


def endless(path: Path):
    path.symlink_to("/dev/zero")


def folder_of_texts(path: Path):
    path.mkdir()
    (path / "1.png").write_text("no image")


def bomb_in_folder(path: Path):
    path.mkdir()
    (path / "1.png").write_bytes(png_of(50000, 50000))


BROKEN_VIDEOS = {  # name, how to write it, words of the reason
    "no bytes": ("a.mp4", Path.touch, []),
    "no bytes, gif": ("a.gif", Path.touch, []),
    "text": ("a.mp4", lambda path: path.write_text("no video " * 99), ["nvalid data"]),
    "text, webm": ("a.webm", lambda path: path.write_text("no video " * 99), ["nvalid data"]),
    "text, gif": ("a.gif", lambda path: path.write_text("no video " * 99), []),
    "a playlist": ("a.mp4", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), []),
    "a script": ("a.mp4", lambda path: path.write_text("ffconcat version 1.0\nfile one.webp"), []),
    "half a gif": ("a.gif", half(noise), []),
    "half a webp": ("a.webp", half(noise), []),
    "half an mp4": ("a.mp4", half(mp4), []),
    "sound alone": ("a.mp4", lambda path: mp4(path, sound=True), ["no video in it"]),
    "a bomb, gif": ("a.gif", lambda p: p.write_bytes(gif_of(50000, 50000)), ["50000 x 50000"]),
    "a bomb, png": ("a.apng", lambda p: p.write_bytes(png_of(50000, 50000)), ["nvalid data"]),
    "half a bomb": ("a.apng", lambda p: p.write_bytes(png_of(10000, 10000)), ["10000 x 10000"]),
    "a bomb in a folder": ("a", bomb_in_folder, ["50000"]),
    "no pixels": ("a.apng", lambda path: path.write_bytes(png_of(16, 16)), []),
    "a size of zero": ("a.apng", lambda path: path.write_bytes(png_of(0, 16)), []),
    "a link to itself": ("a.gif", loop, ["no such file"]),
    "a link to nowhere": ("a.mp4", dangling, ["no such file"]),
    "an endless file": ("a.gif", endless, ["neither a file nor a folder"]),
    "a pipe": ("a.mp4", os.mkfifo, ["neither a file nor a folder"]),
    "a pipe, gif": ("a.gif", os.mkfifo, ["neither a file nor a folder"]),
    "a folder": ("a.mp4", Path.mkdir, ["no frames"]),
    "a folder of texts": ("a.mp4", folder_of_texts, []),
    "zeros": ("a.mkv", lambda path: path.write_bytes(bytes(10**5)), []),
}
ODD_VIDEOS = {  # name, how to write it, how many clips of two seconds
    "one frame": ("a.gif", lambda path: write_animation(path, [100]), 1),
    "an image": ("a.gif", lambda path: Image.new("RGB", (9, 9)).save(path, "bmp"), 1),
    "a jpeg": ("a.webp", lambda path: Image.new("L", (9, 9)).save(path, "jpeg"), 1),
    "one pixel": ("a.gif", lambda path: write_animation(path, [1000] * 2, (1, 1)), 1),
    "very tall": ("a.webp", lambda path: write_animation(path, [1000] * 2, (3, 5000)), 1),
    "very wide": ("a.apng", lambda p: write_animation(p, [999] * 2, (5000, 1), format="png"), 1),
    "one frame, mp4": ("a.mp4", lambda path: mp4(path, frames=1), 1),
    "very fast": ("a.mp4", lambda path: mp4(path, rate=60000), 1),
    "no duration": ("a.gif", lambda path: write_animation(path, [0] * 25), 1),  # 100 ms each
    "655 s a frame": ("a.gif", lambda path: write_animation(path, [655350] * 3), 15),
    "4 h a frame": ("a.webp", lambda path: write_animation(path, [15_000_000] * 2), 10),
    "18 h a frame": ("a.apng", lambda p: write_animation(p, [65535] * 2, format="png"), 10),
    "transparent": ("a.gif", lambda path: Image.new("RGBA", (9, 9)).save(path), 1),
}


@pytest.mark.parametrize("name, write, words", BROKEN_VIDEOS.values(), ids=BROKEN_VIDEOS)
def test_a_broken_video(desk, capsys, untrained, name, write, words):
    """Alone it is the reason for a refusal; beside a good one it is named and skipped."""
    write(Path("videos") / name)
    Path("videos/captions.jsonl").write_text(entry(name))
    arguments = ["preview", "--data", "videos", "--out"]
    refused(capsys, prepare.main, *arguments, "x.png", words=["no video can be used", *words])
    refused(capsys, train.main, *TRAIN, *MINI, "--data", "videos", words=words)
    refused(capsys, sample.main, "--run", "run", "--reference", f"videos/{name}", words=words)
    Path("videos/captions.jsonl").write_text(f"{entry(name)}\n{GOOD}\n")
    assert call(prepare.main, *arguments, "x.png") == 0
    said = capsys.readouterr()
    assert f"skipped videos/{name}: " in said.out and "skipped 1 of 2" in said.out and not said.err


@pytest.mark.parametrize("name, write, clips", ODD_VIDEOS.values(), ids=ODD_VIDEOS)
def test_a_video_that_is_only_odd(desk, capsys, name, write, clips):
    write(Path("videos") / name)
    Path("videos/captions.jsonl").write_text(entry(name))
    with soon(20):
        assert call(prepare.main, "preview", "--data", "videos", "--out", "x.png") == 0
    assert f"of {clips} clips" in capsys.readouterr().out


def test_videos_without_captions(desk, capsys):
    Path("videos/captions.jsonl").unlink()
    refused(capsys, prepare.main, "preview", "--data", "videos", words=["no caption"])
    Path("videos/one.txt").mkdir()
    refused(capsys, prepare.main, "preview", "--data", "videos", words=["no caption"])
    Path("videos/two.txt").write_bytes(b"\xff\xfe a \x00 caption")
    assert call(prepare.main, "preview", "--data", "videos") == 0


def test_a_video_that_may_not_be_read(desk, capsys):
    Path("videos/one.webp").chmod(0)
    if os.access("videos/one.webp", os.R_OK):
        pytest.skip("root may read anything")
    assert call(prepare.main, "preview", "--data", "videos") == 0
    assert "Permission denied" in capsys.readouterr().out


def test_a_still_is_cut_and_what_follows_is_there(tmp_path):
    """White after an hour of black is shown ten seconds in."""
    write_animation(tmp_path / "a.apng", [3_600, 500, 500], format="png")
    content = bytearray((tmp_path / "a.apng").read_bytes())
    delay = content.index(b"fcTL") + 4 + 20  # of the first frame: numerator, denominator
    content[delay : delay + 4] = struct.pack(">HH", 3600, 1)
    control = content[delay - 24 : delay + 6]
    content[delay + 6 : delay + 10] = struct.pack(">I", zlib.crc32(bytes(control)))
    (tmp_path / "a.apng").write_bytes(content)
    clips = [video[0, :, 16, 16].tolist() for video, _ in cut(tmp_path / "a.apng", CONFIG)]
    assert clips == [[20] * 16] * 5
    frames = read_video(tmp_path / "a.apng", [9.9, 10.1, 10.6], 8, 8)[0, :, 4, 4].tolist()
    assert frames == [20, 30, 40]


# --- weights ------------------------------------------------------------------------------------


def header(size: int) -> bytes:
    return struct.pack("<Q", size)


def renamed(content: bytes) -> bytes:
    return save({f"model.{name}": x for name, x in load(content).items()})


def reshaped(content: bytes) -> bytes:
    return save({name: x.flatten() for name, x in load(content).items()})


def payload() -> bytes:
    return pickle.dumps({"step": 1, "modules": Payload(Path("made by the payload"))})


DAMAGE = {  # what becomes of a file of safetensors
    "empty": lambda x: b"",
    "one byte": lambda x: x[:1],
    "half a length": lambda x: x[:7],
    "no header": lambda x: x[:8],
    "half a header": lambda x: x[:60],
    "half": lambda x: x[: len(x) // 2],
    "one byte less": lambda x: x[:-1],
    "one byte more": lambda x: x + b"\0",
    "random": lambda x: bytes((k * k * 7919 >> 5) % 256 for k in range(5000)),
    "zeros": lambda x: bytes(len(x)),
    "text": lambda x: b"these are weights\n" * 99,
    "a length of 2^63": lambda x: header(2**63) + x[8:],
    "a length of 2^64 - 1": lambda x: header(2**64 - 1) + x[8:],
    "a length beyond the file": lambda x: header(len(x)) + x[8:],
    "a length of zero": lambda x: header(0) + x[8:],
    "no JSON": lambda x: header(9) + b"{" * 9,
    "nested too deep": lambda x: header(100_000) + b"[" * 100_000,
    "a list": lambda x: header(2) + b"[]",
    "no tensors": lambda x: header(2) + b"{}",
    "wrong offsets": lambda x: (
        header(71) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999]}}'
    ),
    "a pickle": lambda x: payload(),
    "foreign names": renamed,
    "other shapes": reshaped,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights(desk, capsys, damage):
    alone("run")
    for k, stage in enumerate(("vae", "semantic")):
        file = Path(f"run/{stage}.safetensors")
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        words = [file.name, "does not fit"]
        refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=words)
        refused(capsys, run.main, "export", "run", "new", words=words)
        if k == 0:
            refused(capsys, evaluate.main, "--run", "run", "--prompts", 2, words=words)
        file.write_bytes(whole)
    assert not Path("made by the payload").exists()


def alone(run: str):
    """Take from a run's weights what they say of each other: that they belong together."""
    for file in Path(run).glob("*.safetensors"):
        save_file(load_file(file), file)


def test_weights_of_another_stage_or_configuration(desk, capsys):
    alone("run")
    shutil.copy("run/semantic.safetensors", "run/vae.safetensors")
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["vae.safetensors"])
    wider = random_run(Path("wider"), "vae.width=16")
    shutil.copy(wider.weights_file("vae"), "run/vae.safetensors")
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["size mismatch"])


def test_folders_and_links_in_the_place_of_weights(desk, capsys, untrained):
    file = Path("run/vae.safetensors")
    file.unlink()
    file.mkdir()
    words = ["vae.safetensors is not a file"]
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=words)
    refused(capsys, run.main, "export", "run", "new", words=words)
    file.rmdir()
    file.symlink_to("nowhere")
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["--stage vae"])


def test_weights_that_are_not_finite_or_of_another_precision_are_weights(desk):
    alone("run")
    for stage in ("vae", "semantic"):
        file = f"run/{stage}.safetensors"
        spoilt = {name: torch.full_like(x, torch.nan) for name, x in load_file(file).items()}
        save_file({name: x.double() for name, x in spoilt.items()}, file)
    assert call(sample.main, "--run", "run", "--out", "x.png") == 0


def test_weights_without_a_note_are_exported(desk):
    alone("run")
    assert call(run.main, "export", "run", "new") == 0 and Run.open("new").has("vae")


@settings(max_examples=60)
@given(st.data())
def test_weights_cut_and_flipped_anywhere(template, tmp_path_factory, data):
    """Refused in one line, or taken: a flipped number is a number."""
    folder = tmp_path_factory.mktemp("flipped") / "run"
    shutil.copytree(template / "run", folder)
    mutate(folder / "vae.safetensors", data)
    with contextlib.suppress(UserError):
        _ = Run.open(folder).vae


def mutate(file: Path, data):
    """Cut a file off somewhere, or change some of its bytes, mostly near the start."""
    content = bytearray(file.read_bytes())
    last = len(content) - 1
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, min(last, 200)) | st.integers(0, last))]
    else:
        for _ in range(data.draw(st.integers(1, 8), "bytes changed")):
            place = data.draw(st.integers(0, min(last, 200)) | st.integers(0, last))
            content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)


# --- training states ----------------------------------------------------------------------------

STATES = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("state"),
    "random": lambda file: file.write_bytes(DAMAGE["random"](b"")),
    "a pickle": lambda file: file.write_bytes(payload()),
    "a payload": lambda file: torch.save({"step": Payload(Path("made by the payload"))}, file),
    "weights": lambda file: shutil.copy("run/vae.safetensors", file),
    "a list": lambda file: torch.save([1, 2], file),
    "a tensor": lambda file: torch.save(torch.zeros(3), file),
    "another program's": lambda file: torch.save({"model": {}, "epoch": 3}, file),
    "half": lambda file: (torch.save({"x": torch.zeros(999)}, file), os.truncate(file, 999)),
}


@pytest.mark.parametrize("write", STATES.values(), ids=STATES)
def test_damaged_states(desk, capsys, write):
    write(Path("run/base.state"))
    arguments = ["--stage", "base", "--out", "run", *MINI, "--steps", 9]
    before = tree(Path())
    assert call(train.main, *arguments) == 2
    line = capsys.readouterr().err.split("\r")[-1]  # after the bars of what was encoded
    check_line(line.lstrip(), "base.state", "--fresh")
    assert "weights_only" not in line  # no advice to run what is in it
    assert not Path("made by the payload").exists()
    after = tree(Path())
    assert after.pop("run/config.json") != before.pop("run/config.json")  # the steps
    assert after == before


def test_a_folder_in_the_place_of_a_state(desk, capsys):
    Path("run/vae.state").mkdir()
    arguments = ["--stage", "base", "--out", "run", *MINI]
    refused(capsys, train.main, *arguments, words=["vae.state is not a file"])


METRICS = [b"{\n", b"[]\n", b"3\n", b'{"stage": "vae"}\n', b'{"stage": 1, "step": 2}\n', b"\xff\n"]


@pytest.mark.parametrize("line", METRICS)
def test_metrics_that_are_not_ours(desk, line):
    Path("run/metrics.jsonl").write_bytes(b'{"stage": "vae", "step": 2, "loss": 1}\n' + line)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .*remove it"):
        Metrics(Path("run"), "vae", 0)


# --- caches -------------------------------------------------------------------------------------


def changed(**fields):
    """Return what changes fields of a JSON object; `...` removes one."""

    def change(content: bytes) -> bytes:
        made = {**json.loads(content), **fields}
        return json.dumps({k: v for k, v in made.items() if v is not ...}).encode()

    return change


def sealed(**fields):
    """Return what changes fields of a header, as a writer of such headers would have it."""

    def change(content: bytes) -> bytes:
        made = json.loads(changed(**fields)(content))
        del made["hash"]
        return json.dumps({"hash": hash_of(made), **made}).encode()

    return change


def parts_with(**fields):
    def change(content: bytes) -> bytes:
        made = json.loads(content)
        made["parts"] |= {name.replace("__", "."): value for name, value in fields.items()}
        return json.dumps(made).encode()

    return change


JSON_DAMAGE = {
    "empty": lambda x: b"",
    "half": lambda x: x[: len(x) // 2],
    "random": DAMAGE["random"],
    "a list": lambda x: b"[]",
    "null": lambda x: b"null",
    "a string": lambda x: b'"x"',
    "an empty object": lambda x: b"{}",
    "nested too deep": lambda x: b"[" * 200_000,
    "a huge number": lambda x: b"9" * 5000,
    "UTF-16": lambda x: x[:99].decode().encode("utf-16"),
}
HEADERS = JSON_DAMAGE | {
    "another format": changed(format=99),
    "a format in words": changed(format="one"),
    "no format": changed(format=...),
    "no hash": changed(hash=...),
    "a number as hash": changed(hash=3),
    "another hash": changed(hash="0" * 16),
    "no key": changed(key=...),
    "a list as key": changed(key=[1]),
    "another key": changed(key={}),
    "another key, and its hash": sealed(key={}),
    "no shapes": changed(shapes=...),
    "other shapes": changed(shapes={"latents": [1], "features": [1], "text": [1, 1]}),
    "other shapes, and their hash": sealed(
        shapes={"latents": [1], "features": [1], "text": [1, 1]}
    ),
    "no videos": changed(videos=...),
    "an empty list of videos": changed(videos=[]),
    "videos as names": changed(videos=["one.webp"]),
    "very many videos": changed(videos=[["one.webp", "x"]] * 9999),
    "another caption": changed(videos=[["one.webp", "a one"], ["two.webp", "a three"]]),
    "another caption, and its hash": sealed(
        videos=[["one.webp", "a one"], ["two.webp", "a three"]]
    ),
    "no parts": changed(parts=...),
    "a list as parts": changed(parts=[]),
    "empty parts": changed(parts={}),
    "a part of another type": parts_with(text__words="many"),
    "a part that is not a number": parts_with(data__fps=float("nan")),
    "a part that cannot be": parts_with(vae__channels=-1),
    "another part": parts_with(text__words=9),
}


def noted(change):
    """Return what changes what a video's file says that it was made of."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        note = json.loads(content[8 : 8 + length])["__metadata__"]
        note["made_of"] = change(note["made_of"].encode()).decode("utf-8", "replace")
        return save(load(content), note)

    return damage


NOTES = {name: noted(change) for name, change in JSON_DAMAGE.items()} | {
    "no notes": lambda x: save(load(x)),
    "other notes": lambda x: save(load(x), {"format": "pt"}),
    **{f"no {field}": noted(changed(**{field: ...})) for field in ("video", "key", "clips")},
    "another key": noted(changed(key="0" * 16)),
    "another video": noted(changed(video=["two.webp", "a two"])),
    "another caption": noted(changed(video=["one.webp", "a two"])),
    "a number as video": noted(changed(video=3)),
    "more clips": noted(changed(clips=3)),
    "very many clips": noted(changed(clips=10**15)),
    "fewer clips": noted(changed(clips=1)),
    "less than none": noted(changed(clips=-2)),
    "clips in words": noted(changed(clips="two")),
    "more words": lambda x: save(
        load(x) | {"text": torch.zeros(999, load(x)["text"].shape[1])},
        json.loads(x[8 : 8 + int.from_bytes(x[:8], "little")])["__metadata__"],
    ),
}
CACHED = ["--stage", "latent", "--out", "run", *MINI, "--data", "cache", "--steps", "6"]


@pytest.fixture
def encoded_again(monkeypatch):
    """All of a cache is read, as training would sooner or later."""

    def read_all(_, stages, dataset, *rest):
        for index in range(len(dataset)):
            dataset.latents([index]), dataset.features([index]), dataset.text([index])
        raise AssertionError("accepted")

    monkeypatch.setattr(train, "train", read_all)


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_damaged_headers(desk, capsys, encoded_again, damage):
    file = Path("cache/cache.json")
    file.write_bytes(damage(file.read_bytes()))
    refused(capsys, train.main, *CACHED, words=["cache"])


ENCODED = DAMAGE | NOTES | {"a folder": None, "gone": ...}


@pytest.mark.parametrize("damage", ENCODED.values(), ids=ENCODED)
def test_damaged_videos(desk, capsys, encoded_again, damage):
    file = video_file(Path("cache"), "one.webp", "a one")
    content = file.read_bytes()
    file.unlink()
    if damage is None:
        file.mkdir()
    elif damage is not ...:
        file.write_bytes(damage(content))
    words = ["not finished", "1 of 2"] if damage is ... else [file.name, "precompute again"]
    refused(capsys, train.main, *CACHED, words=words)
    assert not Path("made by the payload").exists()


def test_the_cache_of_the_corpus_would_do_without_the_damage(desk, encoded_again):
    with pytest.raises(AssertionError, match="accepted"):
        call(train.main, *CACHED)


def test_what_is_damaged_or_gone_is_encoded_anew(desk, capsys):
    arguments = ["precompute", "videos", "--parts", "run", "--out", "cache", "--dtype", "float32"]
    shutil.rmtree("cache")  # these videos are copies: their times are others than it knows
    assert call(prepare.main, *arguments) == 0
    before, file = tree(Path("cache")), video_file(Path("cache"), "one.webp", "a one")
    for damage in (lambda: file.write_bytes(b"[]"), file.unlink, Path("cache/cache.json").unlink):
        damage()
        assert call(prepare.main, *arguments) == 0
        assert tree(Path("cache")) == before
    Path("cache/cache.json").write_bytes(b"[]")
    refused(capsys, prepare.main, *arguments, words=["cache.json"])


# --- configurations -----------------------------------------------------------------------------

CONFIGURATIONS = JSON_DAMAGE | {
    "another format": changed(format=99),
    "a format in words": changed(format="one"),
    "no format": changed(format=...),
    "no fields": changed(config=...),
    "a list of fields": changed(config=[]),
    "fields in words": changed(config="tiny"),
    "no field": changed(config={}),
    "another program's": lambda x: b'{"model_type": "qwen2_5_vl", "format": 1, "config": null}',
}
FLAT = flat_fields(micro())


@pytest.mark.parametrize("damage", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_damaged_configurations(desk, capsys, untrained, damage):
    file = Path("run/config.json")
    file.write_bytes(damage(file.read_bytes()))
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["run/config.json"])
    refused(capsys, train.main, *TRAIN[:3], "run", *MINI, words=["run/config.json"])
    refused(capsys, run.main, "export", "run", "new", words=["run/config.json"])


def test_a_pipe_and_a_folder_in_the_place_of_a_configuration(desk, capsys):
    file = Path("run/config.json")
    file.unlink()
    os.mkfifo(file)
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["config.json is not"])
    file.unlink()
    file.mkdir()
    refused(capsys, sample.main, "--run", "run", "--out", "x.png", words=["config.json is not"])


def opened(folder: Path, fields: dict) -> Run | None:
    """Return the run with these flat fields, None where they are refused in a line."""
    content = {"format": run.FORMAT, "versions": {}, "config": fields}
    (folder / "config.json").write_text(json.dumps(content))
    try:
        return Run.open(folder)
    except UserError as error:
        assert str(error).startswith(f"{folder}") and str(error).isprintable()
        return None


@pytest.mark.parametrize("name", FLAT)
def test_every_field_damaged_in_every_way(tmp_path, name):
    """Removed, it has its default or is missed; of another type or beyond reason, it is refused."""
    fields = {k: v for k, v in FLAT.items() if k != name}
    found = opened(tmp_path, fields)
    assert found is None or flat_fields(found.config).keys() == FLAT.keys()
    kind, may_be_null = (
        type(FLAT[name]),
        type(None) in typing.get_args(field_types(Config, FLAT)[name]),
    )
    wrong = {"list": [], "object": {}, "huge": 10**400, "below": -(10**9), "nan": float("nan")}
    wrong |= {"string": "x"} if kind is not str else {"number": 3}
    wrong |= {} if may_be_null else {"null": None}
    wrong |= {"bool": True} if kind is not bool else {"number": 1}
    for value in wrong.values():
        assert opened(tmp_path, FLAT | {name: value}) is None, (name, value)
    assert opened(tmp_path, FLAT) is not None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=4,
)


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(FLAT)) | st.text(max_size=9), anything, max_size=3))
def test_configurations_with_anything_in_them(tmp_path_factory, changes):
    """Refused in a line, or opened as what the file says."""
    found = opened(tmp_path_factory.mktemp("run"), FLAT | changes)
    if found is not None:
        assert flat_fields(found.config) == FLAT | changes | {"dtype": found.config.dtype}


@settings(max_examples=40)
@given(st.data())
def test_configurations_cut_and_flipped_anywhere(template, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(template / "run/config.json", folder)
    mutate(folder / "config.json", data)
    with contextlib.suppress(UserError):
        Run.open(folder)


@settings(max_examples=40)
@given(st.data())
def test_caches_cut_and_flipped_anywhere(template, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated") / "cache"
    shutil.copytree(template / "cache", folder)
    files = [folder / "cache.json", *sorted(folder.glob("videos/*"))]
    mutate(data.draw(st.sampled_from(files)), data)
    with contextlib.suppress(UserError):
        found = Cache(folder)
        for read in (found.latents, found.features, found.text, found.captions):
            read(range(len(found)))


@pytest.fixture(scope="module")
def small_videos(tmp_path_factory) -> dict[str, bytes]:
    folder, found = tmp_path_factory.mktemp("small"), {}
    for suffix in (".gif", ".webp", ".apng", ".mp4"):
        path = folder / f"video{suffix}"
        if suffix == ".mp4":
            mp4(path, frames=8)
        elif suffix == ".apng":
            write_animation(path, [250] * 8, format="png")
        else:
            noise(path)
        found[suffix] = path.read_bytes()
    return found


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng", ".mp4"])
@settings(max_examples=60)
@given(st.data())
def test_videos_cut_and_flipped_anywhere(small_videos, tmp_path_factory, suffix, data):
    """Decoded or refused in a line, soon."""
    path = tmp_path_factory.mktemp("flipped") / f"video{suffix}"
    path.write_bytes(small_videos[suffix])
    mutate(path, data)
    with soon(10), contextlib.suppress(UserError):
        for video, semantic_video in cut(path, CONFIG):
            assert video.shape == (3, 16, 32, 32) and semantic_video.shape == (3, 4, 32, 32)


@settings(max_examples=60)
@given(st.binary(max_size=300) | st.lists(anything, max_size=3).map(lambda x: json.dumps(x)))
def test_captions_with_anything_in_them(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("videos")
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "captions.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        len(Folder(folder, CONFIG, lambda _: None))
    assert str(error.value).isprintable()


# --- how many -----------------------------------------------------------------------------------


def test_the_corpus_has_hundreds_of_entries():
    tables = [COMMANDS, USAGE, WRITERS, SETTINGS, PROMPTS, REFUSED_CAPTIONS, ODD_CAPTIONS]
    tables += [BROKEN_VIDEOS, ODD_VIDEOS, DAMAGE, STATES, METRICS, HEADERS, ENCODED]
    tables += [CONFIGURATIONS]
    entries = [str(entry) for entry in chain(COMMANDS, USAGE, WRITERS, SETTINGS)]
    assert len(set(entries)) == len(entries)  # no two alike
    assert sum(len(table) for table in tables) >= 600
