"""sample.py: guidance against its formula, seeds bit for bit, and files against what was written.

A stand-in network whose velocity is a known function of its conditions shows which of them guidance
asks for and how it weighs the answers. The rest runs on a micro run with random weights: what it
draws is noise, but every prompt, seed and plan changes it.
"""

import contextlib
import itertools
import json
import math
import shutil
import sys
import weakref
from collections import Counter
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_run import call, one_line, random_run
from torch import Tensor, nn

import evaluate
import flags
import sample
from config import clip_frames, paper, tiny
from data import reference_clip
from encode import clips_in_memory
from flags import frames_of
from flow import euler
from model import DiT
from plumbing.device import computing
from plumbing.files import UserError
from plumbing.seeds import draw_noise, text_seed
from plumbing.sheet import shown_frames
from plumbing.video import enlarge, write_video
from run import Run
from sample import (
    decode,
    generate,
    guided,
    paint,
    paint_latents,
    prompt_seed,
    reference_plans,
    sample_plans,
    show_stage,
    through_vae,
)
from semantic import Compressor
from settings import SampleConfig, override
from toy.encoder import TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE
from toy.world import World

PROMPT, OTHER = "a red circle moves left", "a blue square grows and a cyan cross stays still"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return random_run(tmp_path_factory.mktemp("sample") / "run")


def read_video(path) -> Tensor:
    """Return the frames of an animation as Pillow reads them, (3, F, H, W) uint8."""
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.array(image.convert("RGB")))
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


def durations(path) -> list[float]:
    """Return the milliseconds of each frame of an animation."""
    with Image.open(path) as image:
        found = []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            found.append(image.info["duration"])
    return found


# --- guidance -----------------------------------------------------------------------------------


class Known:
    """Stands for a DiT: velocity z + t + 10 text + 100 plan of each sample, plan 0 if dropped."""

    def __init__(self):
        self.asked = []  # for every call: (B,) whether text was there, (B,) whether the plan was

    def __call__(self, z, t, text, context=None, keep_context=None) -> Tensor:
        words = text.mean((1, 2))
        plan = torch.zeros(len(z), dtype=z.dtype)
        if context is not None:
            kept = torch.ones(len(z), dtype=torch.bool) if keep_context is None else keep_context
            plan = context.mean((1, 2, 3, 4)) * kept
        self.asked.append((words != 0, plan != 0))
        offset = t + 10 * words + 100 * plan
        return z + offset.reshape(-1, 1, 1, 1, 1)


def conditions(samples: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(samples, *shape, generator=generator)

    return {"z": normal(2, 2, 4, 4), "t": normal().sigmoid(), "text": normal(3, 5)} | {
        "context": normal(4, 1, 2, 2)
    }


def velocities(given: dict[str, Tensor]) -> list[Tensor]:
    """Return the stand-in's velocity under no condition, the plan, and plan and text."""
    none, text, plan = torch.zeros(3, 3, 5), given["text"], given["context"]
    return [
        Known()(given["z"], given["t"], x, c) for x, c in ((none, None), (none, plan), (text, plan))
    ]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_by_text_alone(guidance):
    given, dit = conditions(), Known()
    found = guided(dit, given["text"], guidance)(given["z"], given["t"])
    without = Known()(given["z"], given["t"], torch.zeros(3, 3, 5))
    with_text = Known()(given["z"], given["t"], given["text"])
    torch.testing.assert_close(found, without + guidance * (with_text - without))
    ((text, plan),) = dit.asked
    expected = {0.0: [False] * 3, 1.0: [True] * 3}.get(guidance, [False] * 3 + [True] * 3)
    assert text.tolist() == expected and not plan.any()


@pytest.mark.parametrize("by_text", [0.0, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("by_plan", [0.0, 1.0, 0.6, 3.0])
def test_guidance_by_plan_then_text(by_text, by_plan):
    given, dit = conditions(), Known()
    velocity = guided(dit, given["text"], by_text, given["context"], by_plan)
    found = velocity(given["z"], given["t"])
    none, plan, both = velocities(given)
    expected = none + by_plan * (plan - none) + by_text * (both - plan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "by_text, by_plan, asked",
    [
        (1.0, 1.0, [(True, True)]),
        (0.0, 0.0, [(False, False)]),
        (0.0, 1.0, [(False, True)]),
        (1.0, 2.0, [(False, False), (False, True), (True, True)]),
        (2.0, 2.0, [(False, False), (True, True)]),
        (2.0, 1.0, [(False, True), (True, True)]),
        (2.0, 3.0, [(False, False), (False, True), (True, True)]),
    ],
)
def test_only_what_weighs_anything_is_computed(by_text, by_plan, asked):
    """In one batch: scale 1 asks the conditional model alone, scale 0 the unconditional alone."""
    given, dit = conditions(), Known()
    velocity = guided(dit, given["text"], by_text, given["context"], by_plan)
    for calls in (1, 2):
        velocity(given["z"], given["t"])
        assert len(dit.asked) == calls
    text, plan = dit.asked[0]
    assert list(zip(text.tolist(), plan.tolist(), strict=True)) == [
        a for a in asked for _ in range(3)
    ]


def test_guidance_keeps_samples_apart():
    given = conditions()
    velocity = guided(Known(), given["text"], 2.5, given["context"], 1.5)
    together = velocity(given["z"], given["t"])
    for i in range(3):
        one = {name: x[i : i + 1] for name, x in given.items()}
        alone = guided(Known(), one["text"], 2.5, one["context"], 1.5)(one["z"], one["t"])
        torch.testing.assert_close(together[i : i + 1], alone)


# --- noise and seeds ----------------------------------------------------------------------------


def test_noise_is_each_samples_own():
    cpu = torch.device("cpu")
    noise = draw_noise([5, 6, 5], (4, 2, 8, 8), cpu)
    assert noise.shape == (3, 4, 2, 8, 8)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(draw_noise([6], (4, 2, 8, 8), cpu)[0], noise[1])
    many = draw_noise(range(100), (4, 2, 8, 8), cpu)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


def test_noise_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_noise([1, 2], (3,), torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_prompts_are_the_same_on_every_machine():
    seeds = {prompt_seed(seed, prompt) for seed in (0, 1, 10) for prompt in (PROMPT, OTHER, "")}
    assert len(seeds) == 9 and all(0 <= seed < 2**40 for seed in seeds)
    assert prompt_seed(0, PROMPT) == 1254755399  # written down once
    assert prompt_seed(1, "0 x") != prompt_seed(10, " x")


def test_plan_and_painting_start_from_different_noise(run, monkeypatch):
    """Not from the same numbers, or the plan would show in the noise.

    Torch's generator on the CPU looks at the lower 32 bits of a seed alone.
    """
    drawn = []

    def record(seeds, shape, device):
        drawn.append((list(seeds), tuple(shape)))
        return draw_noise(seeds, shape, device)

    monkeypatch.setattr(sample, "draw_noise", record)
    generate(run, [PROMPT, OTHER], [3, 4])
    (plan_seeds, plan_shape), (paint_seeds, paint_shape) = drawn
    assert plan_shape == (4, 1, 2, 2) and paint_shape == (8, 2, 4, 4)
    for each in range(2):
        plan, latents = (draw_noise([s[each]], (64,), "cpu")[0] for s in (plan_seeds, paint_seeds))
        assert abs(torch.corrcoef(torch.stack([plan, latents]))[0, 1]) < 0.4


# --- sampling -----------------------------------------------------------------------------------


def test_shapes_of_both_stages(run):
    text = run.text.encode([PROMPT, OTHER])
    plans = sample_plans(run, text, [0, 1])
    assert plans.shape == (2, 4, 1, 2, 2) and plans.dtype == torch.float32
    video = paint(run, text, [0, 1], plans)
    assert video.shape == (2, 3, 8, 16, 16) and video.dtype == torch.uint8
    assert torch.equal(video, generate(run, [PROMPT, OTHER], [0, 1]))


def test_same_seed_and_prompt_give_the_same_video(run):
    first = generate(run, [PROMPT], [7])
    torch.manual_seed(99)
    assert torch.equal(generate(run, [PROMPT], [7]), first)
    assert not torch.equal(generate(run, [PROMPT], [8]), first)
    assert not torch.equal(generate(run, [OTHER], [7]), first)


def test_the_painter_heeds_text_plan_and_seed(run):
    texts = run.text.encode([PROMPT, OTHER]).split(1)
    plans = [sample_plans(run, text, [seed]) for seed, text in enumerate(texts)]
    same = paint(run, texts[0], [0], plans[0])
    for text, seed, plan in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert not torch.equal(paint(run, texts[text], [seed], plans[plan]), same)
    assert not torch.equal(paint(run, texts[0], [0], None), same)  # the base


def test_plans_are_rescaled_to_what_the_painter_saw(run):
    compressor = run.compressor
    before = sample_plans(run, run.text.encode([PROMPT]), [0])
    mean, std = compressor.mean.clone(), compressor.std.clone()
    compressor.mean += 3
    compressor.std *= 2
    after = sample_plans(run, run.text.encode([PROMPT]), [0])
    compressor.mean.copy_(mean)
    compressor.std.copy_(std)
    torch.testing.assert_close(after, before * 2 + 3)


def test_plans_of_references_are_those_of_encoder_and_compressor(run):
    clips = World(run.config.data, "train").semantic_video(range(3))
    features = run.encoder.encode(clips.float() / 127.5 - 1)
    expected = run.compressor.posterior(features)[0]
    torch.testing.assert_close(reference_plans(run, clips), expected)


@pytest.mark.parametrize("option", ["steps", "guidance", "latent_guidance", "context_guidance"])
def test_options_replace_the_runs_own(run, option):
    own = run.config.sample
    first = generate(run, [PROMPT], [0])
    assert torch.equal(generate(run, [PROMPT], [0], options=own), first)
    other = replace(own, **{option: getattr(own, option) + 3})
    assert not torch.equal(generate(run, [PROMPT], [0], options=other), first)


def test_each_stage_has_its_own_scales_and_shift(run):
    """Against the solver called by hand."""
    shifts = {"latent": 2, "semantic": 3, "base": 4}
    other, text = copy(run), run.text.encode([PROMPT])
    other.config = override(run.config, [f"stages.{k}.shift={a}" for k, a in shifts.items()])
    options = SampleConfig(4, 1.5, 2.5, 3.5, 4.5)
    small = draw_noise([5], (4, 1, 2, 2), run.device)
    large = draw_noise([text_seed("paint 5") % 2**32], (8, 2, 4, 4), run.device)
    plan = sample_plans(other, text, [5], options=options)
    painted, based = (paint_latents(other, text, [5], x, options=options) for x in (plan, None))
    with torch.no_grad(), computing(run.device, "float32"):
        expected = euler(guided(run.planner, text, 1.5), small, 4, 3.0)
        torch.testing.assert_close(plan, expected * run.compressor.std + run.compressor.mean)
        expected = euler(guided(run.painter, text, 2.5, plan, 3.5), large, 4, 2.0)
        torch.testing.assert_close(painted, expected)
        torch.testing.assert_close(based, euler(guided(run.base, text, 4.5), large, 4, 4.0))


def test_the_base_has_a_guidance_of_its_own(run):
    own, text = run.config.sample, run.text.encode([PROMPT])
    first = paint(run, text, [0], None)
    others = [replace(own, guidance=5.0, latent_guidance=5.0), replace(own, base_guidance=5.0)]
    same, other = (paint(run, text, [0], None, options=options) for options in others)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_an_option_of_another_name_is_an_error(run):
    with pytest.raises(TypeError, match="guidence"):
        SampleConfig(guidence=3)
    for function in (generate, paint, sample_plans):
        with pytest.raises(TypeError, match="guidence"):
            function(run, [PROMPT], [0], guidence=3)


def test_real_clips_go_through_the_vae(run):
    video = World(run.config.data, "test").batch([0, 1]).video
    expected = run.vae.decode(run.vae.encode(video.float() / 127.5 - 1))
    found = through_vae(run, video)
    assert found.dtype == torch.uint8
    assert (found.float() / 127.5 - 1 - expected).abs().max() < 0.51 / 127.5


def test_steps_are_network_calls(run, monkeypatch):
    calls = []
    for stage, dit in (("plan", run.planner), ("paint", run.painter)):
        forward = dit.forward
        count = lambda *a, f=forward, s=stage, **k: (calls.append(s), f(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(dit, "forward", count)
    generate(run, [PROMPT], [0], options=SampleConfig(steps=3))
    assert calls == ["plan"] * 3 + ["paint"] * 3


@pytest.mark.parametrize("stage", ["vae", "latent", "semantic", "base"])
def test_a_preview_shows_what_its_stage_makes(run, monkeypatch, stage):
    """Below each of six clips: what it goes through, or what is painted from its plan or text."""
    shown, rows = [], range(6)
    monkeypatch.setattr(sample, "contact_sheet", lambda *x: shown.append(x))
    world = World(run.config.data, "train")
    source = world if stage == "vae" else clips_in_memory(run, world)
    show_stage(run, stage, source)
    captions = world.captions(rows)
    text = run.text.encode(captions)
    if stage == "vae":
        real = world.batch(rows).video
        made = through_vae(run, real)
    else:
        real, plans = decode(run, source.latents(rows)[0]), None
        if stage == "latent":
            plans = run.compressor.encode(source.features(rows)).detach()
        if stage == "semantic":
            plans = sample_plans(run, text, rows)
        made = paint(run, text, rows, plans)
    ((videos, labels, file),) = shown
    assert torch.equal(videos[::2], real) and torch.equal(videos[1::2], made)
    told = [label.split(": ", 1)[1] for label in labels]
    assert told[::2] == told[1::2] == captions and file == run.path / "samples" / f"{stage}.png"


# --- length -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, seconds, frames",
    [
        ([], 2, 16),  # tiny: pairs of 2 fps are 8 frames apart, latents 4
        ([], 4.0, 32),
        ([], 1.2, 8),
        ([], 3.6, 32),
        (
            ["data.semantic_fps=4", "latent.context_rate=2", "semantic.rate=2", "encoder.rate=2"],
            1.5,
            12,
        ),
    ],
)
def test_length_is_a_whole_number_of_latents_and_pairs(tmp_path, settings, seconds, frames):
    assert clip_frames(override(tiny(), settings), seconds) == frames


@pytest.mark.parametrize("seconds", [0, 0.3, -2.0, math.nan, math.inf])
def test_impossible_lengths(tmp_path, seconds):
    with pytest.raises(UserError, match="--seconds"):
        clip_frames(tiny(), seconds)


def test_longer_than_trained(run):
    assert generate(run, [PROMPT], [0], frames=24).shape == (1, 3, 24, 16, 16)
    text = run.text.encode([PROMPT])
    assert paint(run, text, [0], None, 16).shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize("seconds", [2, 2.0, 4.0])
def test_a_length_that_can_be_met_is_not_told(run, capsys, seconds):
    assert frames_of(run, seconds) == 8 * seconds and frames_of(run, None) == 8
    out = capsys.readouterr().out  # but that it is longer than what was learned
    assert out == "it has learned clips of 1 s: what is told may not happen later than that\n"


@pytest.mark.parametrize(
    "config, seconds, told",
    [
        (tiny(), 1.2, "--seconds 1.2: 8 frames are made, 1 s"),
        (tiny(), 1.9, "--seconds 1.9: 16 frames are made, 2 s"),
        (
            tiny(),
            3.6,
            "--seconds 3.6: 32 frames are made, 4 s\n"
            "it has learned clips of 2 s: what is told may not happen later than that",
        ),
        (paper(), 5.0, "--seconds 5: 121 frames are made, 5.04167 s"),  # the first one is alone
    ],
)
def test_a_length_that_cannot_be_met_is_told(tmp_path, capsys, config, seconds, told):
    frames_of(Run(tmp_path, config), seconds)
    assert capsys.readouterr().out == told + "\n"


# --- precision ----------------------------------------------------------------------------------


@contextlib.contextmanager
def products():
    """Collect the dtypes that matrix products and convolutions of all networks have meanwhile."""
    found = set()

    def note(module, _, output):
        if isinstance(module, nn.Linear | nn.Conv3d):
            found.add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_networks_compute_in_the_runs_dtype_and_the_solver_in_float32(run, tmp_path, dtype):
    other = copy(run)
    other.config = replace(run.config, dtype=dtype)
    text, clips = run.text.encode([PROMPT]), World(run.config.data, "test").batch([0])
    made = {}
    for name, work in {
        "plan": lambda: sample_plans(other, text, [0]),
        "reference": lambda: reference_plans(other, clips.semantic_video),
        "latents": lambda: paint_latents(other, text, [0], made["plan"]),
        "base": lambda: paint_latents(other, text, [0], None),
        "video": lambda: decode(other, made["latents"]),
        "through the VAE": lambda: through_vae(other, clips.video),
    }.items():
        with products() as found:
            made[name] = work()
        assert found == {getattr(torch, dtype)}, name
    assert all(made[name].dtype == torch.float32 for name in ("plan", "reference", "latents"))
    out = tmp_path / "x.webp"
    Run.create(tmp_path / "run", other.config)
    for file in run.path.glob("*.safetensors"):
        shutil.copy(file, tmp_path / "run")
    assert call(sample.main, PROMPT, "--run", tmp_path / "run", "--out", out) == 0
    seeds = [prompt_seed(0, PROMPT)]
    assert torch.equal(read_video(out), enlarge(generate(other, [PROMPT], seeds)[0]))


def test_precision_changes_little(run):
    """Two steps from the same noise: the solver adds up small errors of a bfloat16 (2^-8) each."""
    other, text = copy(run), run.text.encode([PROMPT])
    other.config = replace(run.config, dtype="bfloat16")
    exact, rough = (sample_plans(each, text, [0]) for each in (run, other))
    error = (exact - rough).norm() / exact.norm()
    assert 1e-6 < error < 0.02


# --- what is in memory --------------------------------------------------------------------------

PARTS = ("vae", "encoder", "text", "compressor", "painter", "planner", "base")


class Watched(Run):
    """A run that remembers which of its parts were in memory while each of them worked."""

    parts: ClassVar[dict[str, weakref.ref]] = {}
    together: ClassVar[dict[str, set[str]]] = {}

    @classmethod
    def begin(cls, monkeypatch):
        monkeypatch.setattr(flags, "Run", cls)
        cls.parts, cls.together = {}, {}
        for kind, work in [
            (DiT, "forward"),
            (Compressor, "posterior"),
            (Compressor, "denormalise"),
            (TinyEncoder, "encode"),
            (TinyVAE, "decode_pieces"),
            (HashText, "encode"),
        ]:
            monkeypatch.setattr(kind, work, cls.watching(getattr(kind, work)))
        for name in PARTS:
            part = cached_property(cls.remembering(name, getattr(Run, name).func))
            part.__set_name__(cls, name)
            monkeypatch.setattr(cls, name, part, raising=False)

    @classmethod
    def remembering(cls, name: str, load):
        def loaded(self):
            part = load(self)
            cls.parts[name] = weakref.ref(part)
            return part

        return loaded

    @classmethod
    def watching(cls, work):
        def watched(part, *args, **kwargs):
            there = {name: ref() for name, ref in cls.parts.items() if ref() is not None}
            (mine,) = (name for name, other in there.items() if other is part)
            cls.together.setdefault(mine, set()).update(there)
            return work(part, *args, **kwargs)

        return watched


@pytest.mark.parametrize(
    "arguments, together",
    [
        ([PROMPT, OTHER], [{"text"}, {"planner", "compressor"}, {"painter"}, {"vae"}]),
        (["--base", PROMPT, OTHER], [{"text"}, {"base"}, {"vae"}]),
        (["--reference"], [{"encoder", "compressor"}, {"text"}, {"painter"}, {"vae"}]),
    ],
)
def test_a_part_is_let_go_when_its_work_is_done(run, tmp_path, monkeypatch, arguments, together):
    """Two prompts, so that what one leaves behind would be there while the other is worked on."""
    if "--reference" in arguments:
        write_video(tmp_path / "clip.webp", [World(run.config.data, "test").batch([0]).video[0]], 8)
        arguments = [*arguments, tmp_path / "clip.webp", "--", PROMPT, OTHER]
    Watched.begin(monkeypatch)
    out = ["--run", run.path, "--out", tmp_path / "x.gif"]
    assert call(sample.main, *out, *arguments) == 0
    assert Watched.together.keys() == set.union(*together)
    for name, there in Watched.together.items():
        (expected,) = (group for group in together if name in group)
        assert there <= expected, name


class StandIn:
    """A part at full size that has its shapes, but neither its weights nor its work."""

    def __init__(self, work=None, **offers):
        self.work = work
        vars(self).update(offers)

    def __call__(self, *args, **kwargs):
        return self.work(*args, **kwargs)


def parameters(config, *sizes) -> int:
    with torch.device("meta"):
        module = Compressor(*sizes, config) if sizes else DiT(config)
    return sum(x.numel() for x in module.parameters())


def test_text_to_video_at_full_size(tmp_path, monkeypatch, capsys):
    """The encoder is never opened, and no two large parts are ever in memory together."""
    named = {
        part: replace(getattr(paper(), part), weights="x") for part in ("vae", "encoder", "text")
    }
    config = override(paper(), ["sample.steps=1", "dtype=float32"], **named)
    shapes, now, most = {}, Counter(), [0]

    def velocity(z, t, text, context=None, keep_context=None):
        shapes.setdefault("plan" if context is None else "latents", tuple(z.shape[1:]))
        shapes["text"] = tuple(text.shape[1:])
        if context is not None:
            shapes["context"] = tuple(context.shape[1:])
        return torch.zeros_like(z)

    def decode_pieces(latents):
        shapes["decoded"] = tuple(latents.shape[1:])
        yield from torch.zeros(1, 3, 121, 6, 10).split(16, 2)

    dits = {
        name: 4 * parameters(getattr(config, stage))
        for name, stage in (("planner", "semantic"), ("painter", "latent"))
    }
    tokens = torch.zeros(1, config.text.words, config.text.dim)
    parts = {  # bytes in memory, what is offered
        "text": (11.4e9, {"config": config.text, "count": len, "encode": lambda texts: tokens}),
        "planner": (dits["planner"], {"work": velocity}),
        "compressor": (1e6, {"denormalise": lambda plan: plan}),
        "painter": (dits["painter"], {"work": velocity}),
        "vae": (0.5e9, {"decode_pieces": decode_pieces}),
    }
    for name, (size, offers) in parts.items():

        def opened(run, name=name, size=size, offers=offers):
            part = StandIn(**offers)
            now[name] = size
            weakref.finalize(part, now.pop, name)
            most[0] = max(most[0], now.total())
            return part

        found = cached_property(opened)
        found.__set_name__(Run, name)
        monkeypatch.setattr(Run, name, found)
    monkeypatch.setattr(Run, "encoder", property(lambda run: pytest.fail("the encoder was opened")))
    monkeypatch.setattr(Run, "check_there", lambda run, stage: None)
    monkeypatch.setattr(Run, "finished", lambda run, stage: stage in ("latent", "semantic"))
    Run.create(tmp_path / "run", config)
    arguments = ["--run", tmp_path / "run", "--out", tmp_path / "x.png"]
    assert call(sample.main, PROMPT, OTHER, *arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "x.png")]  # nothing is a preview
    plan, latents = (
        (8, 4, 17, 30),
        (16, 31, 60, 104),
    )  # 5 s: 8 frames of 476 x 840, 121 of 480 x 832
    expected = {"plan": plan, "context": plan, "latents": latents, "decoded": latents}
    assert shapes == {**expected, "text": (512, 4096)}
    together = [("text",), ("planner", "compressor"), ("painter",), ("vae",)]
    assert most[0] == max(sum(parts[name][0] for name in group) for group in together)


# --- files --------------------------------------------------------------------------------------


def random_video(frames: int = 5, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, frames, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    "height, width, factor", [(16, 24, 16), (32, 32, 8), (100, 60, 2), (256, 256, 1), (300, 400, 1)]
)
def test_small_videos_are_enlarged_a_whole_number_of_times(height, width, factor):
    video = random_video(2, height, width)
    large = enlarge(video)
    assert large.shape == (3, 2, height * factor, width * factor)
    for y, x in itertools.product({0, factor - 1}, repeat=2):
        assert torch.equal(large[..., y::factor, x::factor], video)


def test_webp_keeps_every_pixel(tmp_path):
    video = random_video()
    write_video(tmp_path / "video.webp", [video], 8.0)
    assert torch.equal(read_video(tmp_path / "video.webp"), enlarge(video))
    assert durations(tmp_path / "video.webp") == [125] * 5


@pytest.mark.parametrize("fps, milliseconds", [(8.0, 620), (10.0, 500), (24.0, 200), (4.0, 1250)])
def test_gif_keeps_frames_and_their_time(tmp_path, fps, milliseconds):
    """In hundredths of a second: 5 / 8 become 0.62, 5 / 24 become 0.20."""
    video = random_video()
    write_video(tmp_path / "video.gif", [video], fps)
    found = read_video(tmp_path / "video.gif")
    assert found.shape == enlarge(video).shape
    assert sum(durations(tmp_path / "video.gif")) == milliseconds
    assert all(abs(x - 1000 / fps) < 10 for x in durations(tmp_path / "video.gif"))


def test_gif_keeps_flat_colours(tmp_path):
    video = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    for frame, colour in enumerate([(220, 40, 40), (40, 180, 60), (50, 80, 230)]):
        video[:, frame] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    write_video(tmp_path / "video.gif", [video], 8.0)
    assert torch.equal(read_video(tmp_path / "video.gif"), enlarge(video))


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_a_video_that_stands_still_lasts_as_long(tmp_path, suffix):
    """Writers may join frames that are alike, but not shorten the clip."""
    video = random_video(3)[:, [0, 0, 0, 1, 1, 2]]
    write_video(tmp_path / f"video.{suffix}", [video], 10.0)
    assert sum(durations(tmp_path / f"video.{suffix}")) == 600


@pytest.mark.parametrize("fps, size", [(8.0, (16, 24)), (23.976, (257, 301)), (24.0, (256, 256))])
def test_mp4_is_within_a_few_grey_levels(tmp_path, fps, size):
    av = pytest.importorskip("av")
    height, width = size
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    frames = [200 * (x + y) / 2 + 5 * i for i in range(6)]
    video = torch.stack(frames).expand(3, -1, -1, -1).to(torch.uint8).clone()
    write_video(tmp_path / "video.mp4", [video], fps)
    with av.open(str(tmp_path / "video.mp4")) as file:
        stream = file.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    expected = enlarge(video).permute(1, 2, 3, 0).numpy()
    expected = expected[:, : expected.shape[1] // 2 * 2, : expected.shape[2] // 2 * 2]
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() < 16 and difference.mean() < 3, (difference.max(), difference.mean())


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_pieces_make_the_file_of_the_whole(tmp_path, suffix):
    video = random_video(11)
    write_video(tmp_path / f"whole{suffix}", [video], 8.0)
    write_video(tmp_path / f"pieces{suffix}", iter(video.split([4, 1, 6], 1)), 8.0)
    whole, pieces = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_a_decoder_that_fails_leaves_no_file(tmp_path, suffix):
    def pieces():
        yield random_video()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_video(tmp_path / f"x{suffix}", pieces(), 8.0)
    assert not list(tmp_path.iterdir())


def test_an_mp4_is_written_as_it_is_decoded(tmp_path):
    """One piece is asked for when the one before has been encoded, not sooner."""
    pytest.importorskip("av")
    sizes = []

    def pieces():
        for _ in range(40):
            (temporary,) = tmp_path.iterdir()
            sizes.append(temporary.stat().st_size)
            yield random_video(6, 64, 64)

    write_video(tmp_path / "x.mp4", pieces(), 8.0)
    assert sizes[0] == 0 and sizes[20] > 0 and sizes[39] > sizes[20]


def test_the_sheet_shows_the_frames_of_the_whole(run, tmp_path, monkeypatch):
    """Although no part of the program ever has all of them."""
    shown = []
    monkeypatch.setattr(sample, "contact_sheet", lambda *x: shown.append(x[0]))
    arguments = [PROMPT, "--run", run.path, "--out", tmp_path / "x.png", "--seconds", 3]
    assert call(sample.main, *arguments) == 0
    whole = generate(run, [PROMPT], [prompt_seed(0, PROMPT)], 24)
    assert torch.equal(shown[0], whole[:, :, [0, 3, 7, 10, 13, 16, 20, 23]])


def test_mp4_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"semanticgen\[video\]"):
        write_video(tmp_path / "video.mp4", [random_video()], 8.0)
    assert not list(tmp_path.iterdir())


# --- the command line ---------------------------------------------------------------------------


def test_videos_are_the_same_in_any_company(run, tmp_path, capsys):
    """Bit for bit, alone or between others: a sample is a function of seed and prompt alone."""
    alone, between = tmp_path / "alone.webp", tmp_path / "between.webp"
    assert call(sample.main, PROMPT, "--run", run.path, "--out", alone) == 0
    assert capsys.readouterr().out.split() == [str(alone), str(tmp_path / "alone.png")]
    assert call(sample.main, OTHER, PROMPT, "two", "--run", run.path, "--out", between) == 0
    names = [f"between-{i}.webp" for i in (1, 2, 3)]
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in (*names, "between.png")]
    videos = [read_video(tmp_path / name) for name in names]
    assert torch.equal(read_video(alone), videos[1])
    assert not torch.equal(videos[0], videos[1]) and not torch.equal(videos[1], videos[2])
    assert videos[1].shape == (3, 8, 256, 256)
    expected = generate(run, [PROMPT], [prompt_seed(0, PROMPT)])[0]
    assert torch.equal(videos[1], enlarge(expected))


@pytest.mark.parametrize(
    "arguments, options",
    [
        (["--seed", "4"], {}),
        (["--steps", "3"], {"steps": 3}),
        (
            ["--guidance", "1.5"],
            dict.fromkeys(["guidance", "latent_guidance", "context_guidance"], 1.5),
        ),
        (["--guidance", "3", "1"], {"guidance": 3, "latent_guidance": 1, "context_guidance": 1}),
        (
            ["--guidance", "3", "1", "4"],
            {"guidance": 3, "latent_guidance": 1, "context_guidance": 4},
        ),
        (["--base", "--guidance", "1.5"], {"base_guidance": 1.5}),
        (["--base", "--guidance", "3", "1", "4"], {"base_guidance": 1}),
        (["--negative", OTHER], {}),
        (["--negative", OTHER, "--base"], {}),
    ],
)
def test_arguments_reach_the_sampler(run, tmp_path, arguments, options):
    out = tmp_path / "x.webp"
    assert call(sample.main, PROMPT, "--run", run.path, "--out", out, *arguments) == 0
    seeds = [prompt_seed(4 if "--seed" in arguments else 0, PROMPT)]
    options, text = replace(run.config.sample, **options), run.text.encode([PROMPT])
    if "--negative" in arguments:
        text = torch.stack([text, run.text.encode([OTHER])])
    base = "--base" in arguments
    plans = None if base else sample_plans(run, text, seeds, options=options)
    expected = paint(run, text, seeds, plans, options=options)
    assert torch.equal(read_video(out), enlarge(expected[0]))


def test_a_prompt_that_is_not_read_to_its_end_is_told(run, tmp_path, capsys):
    """The rest is not read: the video is that of the first words."""
    words = [f"w{k}" for k in range(run.config.text.words)]
    fits, longer = " ".join(words), " ".join([*words, "and", "more"])
    out = tmp_path / "x.webp"
    assert call(sample.main, fits, longer, longer + " words", "--run", run.path, "--out", out) == 0
    first, second, *files = capsys.readouterr().out.splitlines()
    assert "the first 16 of its 18 words" in first and first.startswith("w0 w1")
    assert "the first 16 of its 19 words" in second and len(files) == 4
    assert torch.equal(run.text.encode([longer]), run.text.encode([fits]))


@pytest.mark.parametrize("prompt", ["x " * 10**6, "\x1b[31m \udcff\n" + "y\t" * 20])
def test_what_is_told_of_a_prompt_is_one_short_line(run, tmp_path, capsys, prompt):
    assert call(sample.main, "--run", run.path, "--out", tmp_path / "x.png", "--", prompt) == 0
    told, file = capsys.readouterr().out.splitlines()
    assert told.isprintable() and len(told) < 150 and file == str(tmp_path / "x.png")


def test_previews_are_told(tmp_path, capsys):
    """Each in one line, by the name of its network; what is finished is not mentioned."""
    run = random_run(tmp_path / "run")
    notes = {"vae": (500, 500), "latent": (200, 1800), "semantic": (1200, 1200), "base": (7, 9)}
    for stage, (steps, of) in notes.items():
        run.save(stage, load_file(run.weights_file(stage)), {"steps": steps, "of": of})
    for other in ("semantic", "base"):  # they name the weights that they were trained on
        run.save(other, load_file(run.weights_file(other)), {"steps": notes[other][0], "of": 9})
    painter, base = "painter: a preview at step 200 of 1800", "base: a preview at step 7 of 9"
    out = ["--run", run.path, "--out", tmp_path / "x.png"]
    assert call(sample.main, PROMPT, *out) == 0
    assert capsys.readouterr().out.splitlines() == [painter, str(tmp_path / "x.png")]
    assert call(sample.main, PROMPT, *out, "--base") == 0
    assert capsys.readouterr().out.splitlines() == [base, str(tmp_path / "x.png")]
    few = ["--run", run.path, "--prompts", 2, "--steps", 1]
    for arguments, told in (([], painter), (["--base"], base)):
        assert call(evaluate.main, *few, *arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith(told + "\n") and out.count("a preview") == 1


def test_longer_videos_on_the_command_line(run, tmp_path):
    out = tmp_path / "x.webp"
    assert call(sample.main, "--run", run.path, "--out", out, "--seconds", 3) == 0
    assert read_video(out).shape == (3, 24, 256, 256)
    assert sum(durations(out)) == 3000


def test_the_sheet_alone(run, tmp_path, capsys):
    assert call(sample.main, PROMPT, OTHER, "--run", run.path, "--out", tmp_path / "x.png") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "x.png")]


def test_the_base_model_needs_no_planner(tmp_path):
    run = random_run(tmp_path / "run", stages=["vae", "base"])
    out = tmp_path / "x.webp"
    assert call(sample.main, PROMPT, "--run", run.path, "--out", out, "--base") == 0
    expected = paint(run, run.text.encode([PROMPT]), [prompt_seed(0, PROMPT)], None)[0]
    assert torch.equal(read_video(out), enlarge(expected))


@pytest.mark.parametrize("prompts", [[], [PROMPT], [PROMPT, OTHER]])
def test_a_reference_video_stands_in_for_stage_one(tmp_path, prompts, monkeypatch):
    """Its plan is painted once for each prompt, without stage 1's weights (SemanticGen Fig. 4).

    The sheet shows it above them; the animations are the painted ones.
    """
    shown, draw = [], sample.contact_sheet
    monkeypatch.setattr(sample, "contact_sheet", lambda *x: shown.append(x) or draw(*x))
    run = random_run(tmp_path / "run", stages=["vae", "encoder", "latent"])
    clip = World(run.config.data, "test").batch([0])
    reference, out = tmp_path / "clip.webp", tmp_path / "x.webp"
    write_video(reference, [clip.video[0]], run.config.data.fps)
    arguments = [*prompts, "--reference", reference, "--run", run.path, "--out", out]
    assert call(sample.main, *arguments) == 0
    several = len(prompts) > 1
    files = [tmp_path / f"x-{i + 1}.webp" for i in range(len(prompts))] if several else [out]
    painted = [read_video(file) for file in files]
    assert sorted(tmp_path.glob("x*.webp")) == sorted(files) and (tmp_path / "x.png").exists()
    ((sheet, labels, _),) = shown
    assert len(sheet) == len(labels) == len(files) + 1
    original = clip.video[0][:, shown_frames(clip.video.shape[2])].float()
    assert (sheet[0].float() - original).abs().mean() < 2  # made small again
    plan = reference_plans(run, reference_clip(reference, run.config.data).semantic_video)
    for prompt, video in zip(prompts or [""], painted, strict=True):
        expected = paint(run, run.text.encode([prompt]), [prompt_seed(0, prompt)], plan)[0]
        assert torch.equal(video, enlarge(expected))


@pytest.mark.parametrize("name", ["12:30:05", "http:x", "a b%d", "-", "~", "[x]"])
def test_names_are_only_names(run, tmp_path, monkeypatch, capsys, name):
    """Of what is written and of a reference, in the current folder: ffmpeg knows them as URLs."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    out = ["--run", run.path, f"--out={name}.mp4"]
    assert call(sample.main, *out, "--", PROMPT) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [f"{name}.mp4", f"{name}.png"]
    again = ["--run", run.path, "--out", "again.webp", f"--reference={name}.mp4"]
    assert call(sample.main, *again) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"{name}.mp4", f"{name}.png"),
        *("again.webp", "again.png"),
    }


@pytest.mark.parametrize("missing", ["vae", "encoder", "latent", "semantic"])
def test_a_run_without_weights_says_which(tmp_path, capsys, missing):
    stages = [s for s in ("vae", "encoder", "latent", "semantic") if s != missing]
    run = random_run(tmp_path, stages=stages)
    command = [PROMPT, "--run", run.path, "--out", tmp_path / "x.webp"]
    if missing == "encoder":  # only a reference is read by it
        assert call(sample.main, *command) == 0
        command = ["--reference", tmp_path / "x.webp", *command[1:3], "--out", tmp_path / "y.webp"]
        capsys.readouterr()
    assert call(sample.main, *command) == 2
    one_line(capsys, f"{missing}.safetensors", f"--stage {missing}")


def test_a_run_of_another_version_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"format": 0, "config": {}}))
    assert call(sample.main, PROMPT, "--run", tmp_path) == 2
    one_line(capsys, "format 0")
