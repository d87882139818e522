"""evaluate.py: scores against numbers worked out by hand, and real clips against a full mark.

Agreement with a prompt is counted on written-out cases; motion, flicker and smoothness on videos
drawn here, for which they are known in closed form. Whatever samples runs on random weights: there
only what reaches the painter is compared, not what it paints.
"""

import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import call, one_line, random_run
from torch import Tensor

import evaluate
from config import tiny
from data import DataConfig
from evaluate import Evaluation
from flags import frames_of
from plumbing.files import UserError
from run import Run
from sample import reference_plans, through_vae
from settings import SampleConfig, override
from toy.scores import (
    DRIFT,
    LONG_SCORES,
    SCORES,
    agreement,
    choose,
    drift,
    long_agreement,
    motion_amount,
    of_each,
    score,
    size_kept,
    subject_consistency,
    table,
)
from toy.world import Thing, World

RED = Thing("red", "circle", "moves left")
BLUE = Thing("blue", "square", "grows")
MODELS = ["text -> plan -> video", "never-shown combinations"]
PLANS = ["oracle", "shuffled", "zeroed", "dropped"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return random_run(tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture
def consistency(run):
    """Subject consistency as the run's encoder sees it."""
    size = run.config.data.semantic_size[1:]
    return partial(subject_consistency, encode=run.encoder.encode, size=size)


@pytest.fixture
def evaluation(run) -> Evaluation:
    return Evaluation(run, "test", 4, seed=0)


# --- what a video shows -------------------------------------------------------------------------

ALL = {"exact": 1, "number": 1, "colour": 1, "shape": 1, "motion": 1}
CASES = {  # found, wanted, the mean of each score that is not 1
    "one, right": ((RED,), (RED,), {}),
    "two, right": ((RED, BLUE), (RED, BLUE), {}),
    "wrong order": (
        (BLUE, RED),
        (RED, BLUE),
        {"exact": 0, "colour": 0, "shape": 0, "motion": 0},
    ),
    "one missing": (
        (RED,),
        (RED, BLUE),
        {"exact": 0, "number": 0, "colour": 0.5, "shape": 0.5, "motion": 0.5},
    ),
    "the first missing": (
        (BLUE,),
        (RED, BLUE),
        {"exact": 0, "number": 0, "colour": 0, "shape": 0, "motion": 0},
    ),
    "nothing there": (
        (),
        (RED,),
        {"exact": 0, "number": 0, "colour": 0, "shape": 0, "motion": 0},
    ),
    "one too many": ((RED, BLUE), (RED,), {"exact": 0, "number": 0}),
    "another colour": ((RED._replace(colour="cyan"),), (RED,), {"exact": 0, "colour": 0}),
    "another shape": ((RED._replace(shape="cross"),), (RED,), {"exact": 0, "shape": 0}),
    "another motion of one": (
        (RED, BLUE._replace(motion="shrinks")),
        (RED, BLUE),
        {"exact": 0, "motion": 0.5},
    ),
    "unclear": (
        (Thing("red", "unclear", "unclear"),),
        (RED,),
        {"exact": 0, "shape": 0, "motion": 0},
    ),
}


@pytest.mark.parametrize("found, wanted, wrong", CASES.values(), ids=CASES)
def test_agreement_by_hand(found, wanted, wrong):
    scores = agreement(found, wanted)
    assert scores.pop("one" if len(wanted) == 1 else "two") == scores["exact"]
    assert {name: sum(x) / len(x) for name, x in scores.items()} == ALL | wrong
    assert all(len(scores[name]) == len(wanted) for name in ("colour", "shape", "motion"))


def test_real_clips_have_full_marks(consistency):
    """At the size the reader is made for; one and two objects, every motion."""
    world = World(DataConfig(), "test")
    indices = range(48)
    scenes = [world.scene(i) for i in indices]
    assert {len(scene) for scene in scenes} == {1, 2}
    scores = score(world.batch(indices).video, scenes, 1, consistency)
    for name in ("exact", "one", "two", "number", "colour", "shape", "motion"):
        assert scores[name] == 100, name
    assert list(scores) == list(SCORES)
    assert 95 < scores["flicker"] < 100 and 98 < scores["smooth"] < 100
    shifted = score(world.batch(indices).video, scenes[1:] + scenes[:1], 1, consistency)
    assert shifted["exact"] < 10 and shifted["colour"] < 50


def test_scores_are_means_over_prompts_and_over_objects(consistency):
    """Three prompts, one video wrong: its two objects weigh in objects' scores, it in its own."""
    world = World(DataConfig(), "test")
    one, two = (next(i for i in itertools.count() if len(world.scene(i)) == n) for n in (1, 2))
    videos = world.batch([one, two, two]).video
    videos[2] = 100  # grey: nothing there
    scenes = [world.scene(i) for i in (one, two, two)]
    scores = score(videos, scenes, 1, consistency)
    assert scores["exact"] == scores["number"] == pytest.approx(200 / 3)
    assert (scores["one"], scores["two"]) == (100, 50)
    assert scores["colour"] == scores["shape"] == scores["motion"] == pytest.approx(60)  # 3 of 5
    each = of_each(videos, scenes, 1)
    assert len(each) == 5 and all(right == [100, 100, 0] for right in each.values())


# --- motion, flicker, smoothness ----------------------------------------------------------------


def sliding(step: float, height: int = 32, width: int = 32, frames: int = 9) -> Tensor:
    """A red square of 8 pixels on grey that goes right by `step` pixels a frame, (3, F, H, W)."""
    video = torch.full((3, frames, height, width), 110, dtype=torch.uint8)
    for frame in range(frames):
        left = 4 + round(frame * step)
        red = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
        video[:, frame, 10:18, left : left + 8] = red
    return video


@pytest.mark.parametrize("step", [0, 1, 2])
def test_motion_is_the_way_of_the_centre(step):
    assert motion_amount(sliding(step)) == pytest.approx(100 * 8 * step / 32, abs=0.5)


@pytest.mark.parametrize("height, width", [(32, 64), (40, 32), (64, 64)])
def test_motion_is_in_percent_of_the_shorter_side(height, width):
    video = sliding(2, height, width)
    assert motion_amount(video) == pytest.approx(100 * 16 / min(height, width), abs=0.5)
    turned = motion_amount(video.transpose(2, 3))
    assert turned == pytest.approx(motion_amount(video), abs=0.5)


def test_motion_is_the_mean_over_objects():
    video = sliding(2)
    video[:, :, 22:30, 12:20] = torch.tensor([50, 80, 230], dtype=torch.uint8)[:, None, None, None]
    assert motion_amount(video) == pytest.approx(100 * 16 / 32 / 2, abs=0.5)


def test_growing_is_motion():
    """A square of side 4 to 12: the radius of the disc of its area grows by 8 / sqrt(pi)."""
    video = torch.full((3, 5, 32, 32), 110, dtype=torch.uint8)
    for frame, half in enumerate([2, 3, 4, 5, 6]):
        box = slice(16 - half, 16 + half)
        video[:, frame, box, box] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    expected = 100 * 8 / math.sqrt(math.pi) / 32
    assert motion_amount(video) == pytest.approx(expected, rel=0.1)
    assert motion_amount(video.flip(1)) == pytest.approx(expected, rel=0.1)


def test_frozen_and_empty_videos_have_no_motion():
    world = World(DataConfig(), "train")
    for video in world.batch(range(8)).video:
        assert motion_amount(video[:, :1].expand(-1, 16, -1, -1)) == 0
    assert motion_amount(torch.full((3, 8, 32, 32), 90, dtype=torch.uint8)) == 0


def test_motion_of_the_worlds_clips():
    """Objects alone travel 9 to 11 of 32 units (world.py), or grow from 6 .. 7.5 / 1.7 units."""
    world = World(DataConfig(), "train")
    indices = [i for i in range(120) if len(world.scene(i)) == 1]
    for i, video in zip(indices, world.batch(indices).video, strict=True):
        ((_, shape, motion),) = world.scene(i)
        moved = motion_amount(video)
        if motion == "stays still":
            assert moved < 1.5, (i, shape, moved)
        elif motion in ("grows", "shrinks"):
            assert 4 < moved < 14, (i, shape, moved)
        else:
            assert 26 < moved < 37, (i, shape, moved)


def repeated(levels: list[int]) -> Tensor:
    """A flat grey video, (1, 3, F, 16, 16), of these levels."""
    frames = torch.tensor(levels, dtype=torch.uint8)
    return frames[None, None, :, None, None].expand(1, 3, -1, 16, 16)


@pytest.mark.parametrize(
    "levels, flicker, bend",
    [
        ([90] * 8, 0, 0),
        (list(range(20, 100, 10)), 10, 0),  # a ramp: each frame is the mean of its neighbours
        (list(range(100, 20, -10)), 10, 0),
        ([50, 80] * 4, 30, 30),
        ([0, 255, 0, 255], 255, 255),
        ([10 * k * k for k in range(5)], 40, 10),  # second difference 20, half of it
        ([50, 50, 50, 50, 90, 90, 90, 90], 40 / 7, 2 * 20 / 6),  # one jump
    ],
)
def test_flicker_and_smoothness_in_closed_form(consistency, levels, flicker, bend):
    scores = score(repeated(levels), [(RED,)], 1, consistency)
    assert scores["flicker"] == pytest.approx(100 - 100 * flicker / 255, abs=1e-3)
    assert scores["smooth"] == pytest.approx(100 - 100 * bend / 255, abs=1e-3)


# --- subject consistency ------------------------------------------------------------------------


def test_frozen_videos_are_consistent(run, consistency):
    video = World(run.config.data, "test").batch(range(4)).video[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert consistency(video).tolist() == pytest.approx([100] * 4, abs=1e-3)


def test_changing_videos_are_less_consistent(run, consistency):
    clips = World(run.config.data, "test").batch(range(8)).video
    changing = clips[:, :, 0].transpose(0, 1)[None]  # (1, 3, 8, H, W): another clip in each frame
    frozen = clips[:1, :, :1].expand(-1, -1, 8, -1, -1)
    assert consistency(changing) < 99.99 < consistency(frozen)


def test_consistency_by_hand(run, consistency):
    video = World(run.config.data, "test").batch([3]).video
    frames = video[0].transpose(0, 1).float() / 127.5 - 1  # (F, 3, H, W)
    features = [run.encoder.encode(x[None, :, None].expand(-1, -1, 2, -1, -1)) for x in frames]
    features = [x.double().mean((2, 3, 4)).flatten() for x in features]

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    terms = [
        (cosine(features[k], features[0]) + cosine(features[k], features[k - 1])) / 2
        for k in range(1, len(features))
    ]
    expected = 100 * sum(terms) / len(terms)
    assert consistency(video).item() == pytest.approx(expected, abs=1e-3)


def test_consistency_does_not_depend_on_the_batch(run, consistency):
    """40 videos of 8 frames are more than the encoder is shown at a time."""
    video = World(run.config.data, "test").batch(range(40)).video
    together = consistency(video)
    alone = torch.cat([consistency(x[None]) for x in video])
    assert together.shape == (40,)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_videos_of_another_size_are_resized(run, consistency):
    """The encoder reads the frames of the original, a little softer."""
    read = []

    def encode(pairs):
        read.append(pairs)
        return run.encoder.encode(pairs)

    video = World(run.config.data, "test").batch([3]).video
    large = video.repeat_interleave(2, -1).repeat_interleave(3, -2)
    expected, found = consistency(video, encode=encode), consistency(large, encode=encode)
    assert (read[1] - read[0]).abs().mean() < 0.01  # measured: 0.006; turned over: 0.1
    assert abs(found - expected) < 0.2  # measured: 0.07; a black video: 0.4


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [2, 5, 40])
@pytest.mark.parametrize("split", ["test", "held_out"])
def test_half_of_the_prompts_have_one_object(prompts, split):
    world = World(DataConfig(), split)
    indices = choose(world, prompts)
    counts = [len(world.scene(i)) for i in indices]
    assert counts.count(1) == (prompts + 1) // 2 and counts.count(2) == prompts // 2
    assert indices == sorted(set(indices)) == choose(World(DataConfig(), split), prompts)
    assert choose(world, 1) == [next(i for i in itertools.count() if len(world.scene(i)) == 1)]


def test_a_world_of_single_objects():
    world = World(DataConfig(objects=1), "test")
    assert choose(world, 6) == list(range(6))


def test_an_evaluation_is_of_its_split(run):
    for split in ("test", "held_out"):
        evaluation = Evaluation(run, split, 4, seed=0)
        world = World(run.config.data, split)
        assert evaluation.captions == world.captions(evaluation.indices)
        assert evaluation.scenes == [world.scene(i) for i in evaluation.indices]
        assert torch.equal(evaluation.real, world.batch(evaluation.indices).video)
    assert not set(Evaluation(run, "test", 4, 0).seeds) & set(Evaluation(run, "test", 4, 1).seeds)


def test_chunks_do_not_matter(evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 3)
    slices = []
    chunked = evaluation.videos(
        lambda rows: (slices.append(rows), evaluation.real[rows])[1], "real"
    )
    assert len(slices) == 2 and torch.equal(chunked, evaluation.real)


# --- plans --------------------------------------------------------------------------------------


class Painted:
    """Stands for `paint`: keeps what it is given and returns grey videos."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(evaluate, "paint", self)

    def __call__(self, run, text, seeds, plans, frames=None, options=None):
        self.text, self.seeds, self.plans, self.options = text, seeds, plans, options
        return torch.zeros(len(text), 3, 8, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("told", [True, False])
def test_the_right_plans_reach_the_painter(evaluation, run, monkeypatch, told):
    oracle = reference_plans(run, evaluation.low_rate)
    expected = {"oracle": oracle, "shuffled": oracle[[1, 2, 3, 0]], "zeroed": 0 * oracle}
    text = run.text.encode(evaluation.captions)
    painted, options = Painted(monkeypatch), SampleConfig(steps=3)
    for plans, z_sem in expected.items():
        for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
            evaluation.from_plans(rows, options, plans, told)
            torch.testing.assert_close(painted.plans, z_sem[rows])
            assert torch.equal(painted.text, text[rows] if told else 0 * text[rows])
            assert painted.seeds == evaluation.seeds[rows]
            assert painted.options == options
    assert not torch.equal(oracle[0], oracle[1]) and text.any()


@pytest.mark.parametrize("told", [True, False])
def test_a_dropped_plan_is_never_shown_to_the_painter(evaluation, run, monkeypatch, told):
    """The painter sees its null context in every sample that weighs anything."""
    kept = []
    forward = run.painter.forward

    def record(z, t, text, context=None, keep_context=None):
        kept.append(keep_context)
        return forward(z, t, text, context, keep_context)

    monkeypatch.setattr(run.painter, "forward", record)
    evaluation.from_plans(slice(0, 2), run.config.sample, "dropped", told)
    assert kept and not any(keep.any() for keep in kept)


def test_a_dropped_plan_can_be_a_runs_own_option(tmp_path):
    """With it, no plan matters."""
    run = random_run(tmp_path, "sample.context_guidance=None")
    assert (
        run.config.sample.context_guidance
        is None
        is Run.open(tmp_path).config.sample.context_guidance
    )
    text, plans = run.text.encode(["a red circle"]), torch.randn(2, 1, 4, 1, 2, 2)
    one, other = (evaluate.paint(run, text, [0], plan) for plan in plans)
    assert torch.equal(one, other)


def test_text_to_video_and_base_take_their_own_way(evaluation, run, monkeypatch):
    painted, options = Painted(monkeypatch), SampleConfig(steps=1, base_guidance=1.5)
    evaluation.sampled(slice(1, 3), options, base=True)
    assert painted.plans is None and painted.options == options
    assert torch.equal(painted.text, run.text.encode(evaluation.captions[1:3]))
    assert painted.seeds == evaluation.seeds[1:3]
    video = evaluation.sampled(slice(0, 2), options)
    captions, seeds = evaluation.captions[:2], evaluation.seeds[:2]
    assert torch.equal(video, evaluate.generate(run, captions, seeds, options=options))


# --- the command line ---------------------------------------------------------------------------


def rows_of(out: str) -> dict[str, list[float]]:
    """Return the printed table as name -> numbers."""
    header, *lines = out[out.index(" exact ") :].split("\n\n")[0].splitlines()
    assert header.split() == list(SCORES)
    rows = [line.rsplit(maxsplit=len(SCORES)) for line in lines]
    return {name: [float(x) for x in numbers] for name, *numbers in rows}


def strict(text: str):
    """Parse JSON as the standard has it: without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, SampleConfig, dict]]:
    """What is sampled, in order: of which split, with which options, in which way."""
    found = []

    def noted(way):
        def noting(self, rows, options, **how):
            found.append((self.world.split, options, how))
            return way(self, rows, options, **how)

        return noting

    for name in ("sampled", "from_plans"):
        monkeypatch.setattr(Evaluation, name, noted(getattr(Evaluation, name)))
    return found


@pytest.mark.parametrize("model", ["--plans", "--base"])
def test_all_rows_on_the_command_line(run, tmp_path, capsys, asked, model):
    """Each is of the split and the way that its name tells."""
    file = tmp_path / "deep" / "scores.json"
    arguments = ["--prompts", 4, "--steps", 1, "--json", file, model]
    assert call(evaluate.main, "--run", run.path, *arguments) == 0
    out = capsys.readouterr().out
    name = "base: text -> video" if model == "--base" else MODELS[0]
    sampled = {name: ("test", {"base": model == "--base"})}
    for plans, told in itertools.product(PLANS if model == "--plans" else (), ("with", "no")):
        how = {"plans": plans, "told": told == "with"}
        sampled[f"{plans} plan, {told} text"] = ("test", how)
    sampled[MODELS[1]] = ("held_out", sampled[name][1])
    names = ["real clips", "VAE reconstructions", *sampled]
    assert [(split, how) for split, _, how in asked] == list(sampled.values())
    content = strict(file.read_text())
    assert list(content["scores"]) == names
    assert content["prompts"] == 4 and content["seed"] == 0
    printed = rows_of(out)
    assert list(printed) == names
    for name, scores in content["scores"].items():
        assert list(scores) == list(SCORES)
        assert all(0 <= x <= 100 + 1e-3 for k, x in scores.items() if k != "moved"), name
        assert printed[name] == pytest.approx(list(scores.values()), abs=0.051)
    assert "4 prompts" in out and all(how in out for how in SCORES.values())


def test_the_same_seed_gives_the_same_scores(run, tmp_path):
    found = []
    for seed in (0, 0, 1):
        file = tmp_path / f"{len(found)}.json"
        arguments = [
            "--run",
            run.path,
            "--prompts",
            2,
            "--steps",
            1,
            "--seed",
            seed,
            "--json",
            file,
        ]
        assert call(evaluate.main, *arguments) == 0
        found.append(strict(file.read_text())["scores"])
    assert found[0] == found[1] != found[2]
    assert found[0]["real clips"] == found[2]["real clips"]


def test_another_precision_beside_the_runs_own(run, tmp_path, capsys):
    """The same samples, which differ by a little."""
    file = tmp_path / "scores.json"
    few = ["--run", run.path, "--prompts", 2, "--steps", 1]
    assert call(evaluate.main, *few, "--dtypes", "--json", file) == 0
    out, found = capsys.readouterr().out, strict(file.read_text())["scores"]
    decibels = found["bfloat16"]["psnr"]
    assert 30 < decibels < 80 and rows_of(out).keys() == found.keys()
    assert f"PSNR between samples in float32 and in bfloat16: {decibels:.1f} dB" in out
    Run.create(tmp_path / "run", replace(run.config, dtype="bfloat16"))
    for weights in run.path.glob("*.safetensors"):
        shutil.copy(weights, tmp_path / "run")
    few[1] = tmp_path / "run"
    assert call(evaluate.main, *few, "--dtypes", "--json", file) == 0
    turned = strict(file.read_text())["scores"]
    assert turned["float32"]["psnr"] == decibels
    assert turned[MODELS[0]] == {k: v for k, v in found["bfloat16"].items() if k != "psnr"}


@pytest.mark.parametrize(("model", "name"), [([], MODELS[0]), (["--base"], "base: text -> video")])
def test_guidance_scales_side_by_side(run, capsys, asked, model, name):
    arguments = ["--run", run.path, "--prompts", 2, "--steps", 1, "--sweep", *model]
    assert call(evaluate.main, *arguments) == 0
    printed, scales = rows_of(capsys.readouterr().out), (1.0, 1.5, 2.0, 3.0, 4.0)
    assert all(f"guidance {g}" in printed for g in scales)
    used = [SampleConfig(1, *[g] * 4) for g in scales]
    assert [options for _, options, _ in asked[1:-1]] == used
    assert printed[f"guidance {run.config.sample.guidance}"] == printed[name]


def test_a_world_of_single_objects_on_the_command_line(tmp_path, capsys):
    run = random_run(tmp_path / "run", "data.objects=1")
    file = tmp_path / "scores.json"
    arguments = ["--run", run.path, "--prompts", 2, "--steps", 1, "--json", file]
    assert call(evaluate.main, *arguments) == 0
    scores = strict(file.read_text())["scores"]["real clips"]
    assert scores["one"] == scores["exact"] and scores.get("two") is None


def test_the_table_is_aligned():
    row = dict.fromkeys(SCORES, 99.95)
    lines = table({"a": row, "a longer name": dict.fromkeys(SCORES, float("nan"))}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 3
    for name in SCORES:
        assert name in lines[0]


def test_clips_too_short_for_their_events_are_refused(tmp_path):
    config = override(tiny(), ["events=4", "vae.time_patch=2", "semantic_fps=8"])
    with pytest.raises(UserError, match=r"events is 2: 6 frames are too few"):
        Evaluation(Run(tmp_path, config), "test", 2, 0, long=True, frames=6)


def test_a_model_that_is_not_there_is_told_before_anything_is_sampled(tmp_path, capsys):
    half = random_run(tmp_path / "half", stages=["vae", "encoder", "latent", "semantic"])
    assert call(evaluate.main, "--run", half.path, "--prompts", 2, "--steps", 1, "--base") == 2
    one_line(capsys, "base.safetensors", "--stage base")


# --- long clips ---------------------------------------------------------------------------------

STORY = "moves left then right then grows then shrinks"
EVENTS = 4
LONG_DATA = DataConfig(frames=64, events=EVENTS)


class Told(World):
    """The world's clips with other things in them: what else is random stays as it was."""

    def __init__(self, *things: Thing):
        super().__init__(LONG_DATA, "test")
        self.told = things

    def _scene(self, rng) -> tuple[Thing, ...]:
        return self.told


def clip_of(*things: Thing, index: int = 0) -> Tensor:
    return Told(*things).batch([index]).video[0]


def long_scores(video: Tensor, *scene: Thing) -> dict[str, float]:
    return {name: sum(v) / len(v) for name, v in long_agreement(video, scene, EVENTS).items()}


HERO = Thing("red", "circle", STORY)
FRIEND = Thing("blue", "square", "grows then up then stays still then down")
RIGHT = dict.fromkeys(("exact", "number", "colour", "shape", "size", "story", "event"), 1.0)


@settings(max_examples=15, deadline=None)
@given(index=st.integers(0, 10_000))
def test_real_stories_have_full_marks(index):
    world = World(LONG_DATA, "test")
    found = long_agreement(world.batch([index]).video[0], world.scene(index), EVENTS)
    assert {name: sum(v) / len(v) for name, v in found.items()} == RIGHT
    assert len(found["event"]) == EVENTS * len(world.scene(index))


def test_an_object_that_becomes_another_one_halfway():
    half = [*clip_of(HERO).chunk(2, 1)]
    other_shape = torch.cat([half[0], clip_of(HERO._replace(shape="cross")).chunk(2, 1)[1]], 1)
    assert long_scores(other_shape, HERO) == {**RIGHT, "shape": 0, "exact": 0}
    other_colour = torch.cat([half[0], clip_of(HERO._replace(colour="cyan")).chunk(2, 1)[1]], 1)
    assert not any(long_scores(other_colour, HERO).values())
    gone = torch.cat([half[0], clip_of(HERO)[:, :1].expand(-1, 32, -1, -1)], 1)  # it stands still
    assert long_scores(gone, HERO) | {"size": 0} == {
        **RIGHT,
        **dict.fromkeys(("exact", "story", "size"), 0),
        "event": 0.5,
    }


def test_an_object_that_is_not_there_all_the_time():
    both, one = clip_of(HERO, FRIEND), clip_of(HERO)
    video = torch.cat([both[:, :-16], one[:, -16:]], 1)  # the friend leaves for the last event
    found = long_scores(video, HERO, FRIEND)
    assert found["number"] == found["colour"] == found["exact"] == 0


def test_events_in_another_order():
    told = HERO._replace(motion="moves right then left then grows then shrinks")
    found = long_scores(clip_of(HERO), told)
    assert found == {**RIGHT, "exact": 0, "story": 0, "event": 0.5}


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5])
def test_sizes_are_compared_up_to_one_factor(factor):
    radii = torch.tensor([5.0] * 33 + [5 + 3.5 * k / 16 for k in range(1, 17)])
    radii = torch.cat([radii, radii[33:].flip(0)])[:65] * factor
    assert size_kept(radii, STORY)
    assert not size_kept(radii, "moves left then right then stays still then up")
    assert not size_kept(torch.full((65,), 5.0), STORY)


def test_drift_is_between_the_ends(consistency):
    still = clip_of(HERO)[:, :1].expand(-1, 40, -1, -1)
    other = clip_of(HERO._replace(shape="square"))[:, :1].expand(-1, 24, -1, -1)
    videos = torch.stack([torch.cat([still, still[:, :24]], 1), torch.cat([still, other], 1)])
    found = drift(videos, [(HERO,), (HERO,)], consistency)
    assert found["shape"] == 50  # none in the first clip, all in the second
    assert found["colour"] == found["flicker"] == found["smooth"] == found["moved"] == 0
    assert abs(found["subject"]) < 1e-3
    dark = torch.cat([still, other * 0], 1)[None]  # nothing there at the end
    assert drift(dark, [(HERO,)], consistency)["colour"] == 100


def test_drift_of_flicker_in_closed_form(consistency):
    video = torch.zeros(1, 3, 60, 32, 32, dtype=torch.uint8)
    video[:, :, 51::2] = 51  # a fifth of the range, in every second frame of the last 15 %
    found = drift(video, [(HERO,)], consistency)
    assert found["flicker"] == pytest.approx(20) and found["smooth"] == pytest.approx(20)


def test_only_the_ends_count(consistency):
    video = clip_of(HERO)[None].clone()
    before = drift(video, [(HERO,)], consistency)
    video[:, :, 10:-10] = 0  # 15 % of 64 frames are 10
    assert drift(video, [(HERO,)], consistency) == before


@pytest.mark.slow
def test_long_scores_on_the_command_line(tmp_path, capsys):
    settings = ["data.frames=16", "data.events=2", "vae.span=2", "encoder.span=1", "text.words=20"]
    run = random_run(tmp_path / "run", *settings)
    file = tmp_path / "x.json"
    arguments = ["--run", run.path, "--long", "--prompts", 2, "--plans", "oracle", "--steps", 1]
    assert call(evaluate.main, *arguments, "--seconds", 4, "--json", file) == 0
    content = json.loads(file.read_text())
    rows = content["scores"]
    assert [*rows] == ["real clips", "VAE reconstructions", MODELS[0], *ORACLE, MODELS[1]]
    names = [*LONG_SCORES, *(f"drift of {name}" for name in DRIFT)]
    assert all([*scores] == names for scores in rows.values()) and content["seconds"] == 4
    told = capsys.readouterr().out
    assert "drift of" in told and "first 15 %" in told
    assert call(evaluate.main, "--run", run.path, "--seconds", 4) == 2
    one_line(capsys, "--seconds: of --long only")


ORACLE = ["oracle plan, with text", "oracle plan, no text"]


def test_other_lengths_tell_as_many_events_more(tmp_path):
    run = random_run(tmp_path, "data.frames=16", "data.events=2", "text.words=20")
    longer = Evaluation(run, "test", 2, seed=0, long=True, frames=frames_of(run, 8.0))
    assert longer.frames == 64 and longer.world.config.events == 8
    assert longer.real.shape[2] == 64 and longer.captions[0].count(" then ") >= 7
    assert through_vae(run, longer.real[:1]).shape[2] == 64
