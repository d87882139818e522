"""train.py: an interrupted run against one that never stopped, and each loss against its formula.

Everything runs in float32 on the CPU with micro settings, where equal means bit for bit: weights,
EMA, optimizer states and metrics. The diffusion losses are recomputed from what a stand-in for the
network was shown: with a single clip the data is known, so the noise follows from z_t and t.
"""

import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_run import MICRO, call, micro, modules_of, one_line, random_run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import run as run_module
import sample
import train
from chain import check_chain
from config import tiny, tiny_long
from data import Folder
from encode import clips_in_memory
from flow import shift_time
from optim import Muon, build_optimizers, changed_schedule, ema_decay, lr_factor, update_ema
from plumbing import processes, progress
from plumbing.device import computing, matmul_speed, prepared_ahead, recomputed, spare_processes
from plumbing.files import UserError
from plumbing.folder import write_state
from plumbing.metrics import Metrics, Reporter
from plumbing.processes import Team
from plumbing.progress import Progress
from plumbing.seeds import Rows
from run import Run, export
from semantic import Compressor
from settings import override
from stages import NEEDS, ORDER, RECIPE, Painter, learner, work
from start import begin
from toy.world import World

ROOT = Path(__file__).parent.parent


class Few(World):
    """The first eight clips."""

    def __len__(self) -> int:
        return 8


def few(run: Run) -> Few:
    return Few(run.config.data, "train")


PLOT = Metrics.plot


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A line of metrics every two steps; no pictures, which take most of the time."""
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "preview", lambda *_: None)
    monkeypatch.setattr(Metrics, "plot", lambda _: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """All stages, trained for six steps without a stop, with pictures."""
    run = Run.create(tmp_path_factory.mktemp("trained") / "run", micro())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 2)
        train.train(run, ORDER, few(run), seed=0)
    return run


def copy_of(run: Run, path: Path, stages, *settings: str) -> Run:
    """Return a new run that has the weights of those stages of another one."""
    copy = Run.create(path, micro(*settings))
    for stage in stages:
        shutil.copy(run.weights_file(stage), copy.weights_file(stage))
    return copy


def source_for(run: Run, stage: str, clips: int = 8):
    """Return what a stage draws from: the first clips, as pixels or encoded."""
    if stage in ("vae", "encoder"):
        return few(run)
    return clips_in_memory(run, few(run)).first(clips)


def stop_at(monkeypatch, stop: int, action=lambda: signal.raise_signal(signal.SIGTERM)):
    """Do something, by default send SIGTERM to ourselves, when step `stop` begins."""
    one_step = train.one_step

    def stopped(run, progress, *others):
        if progress.step + 1 == stop:
            action()
        return one_step(run, progress, *others)

    monkeypatch.setattr(train, "one_step", stopped)


def interrupted(run: Run, stage: str, stop: int) -> Run:
    """Train a stage with a SIGTERM during step `stop`, then open the folder anew and go on."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        stop_at(patch, stop)
        train.train(run, [stage], few(run), seed=0)
    assert exit.value.code == 130
    assert run.load_state(stage)["step"] == stop and not run.has(stage)
    torch.manual_seed(12345)  # the next process has other random numbers than this one had
    resumed = Run.open(run.path)
    train.train(resumed, [stage], few(run), seed=0)
    return resumed


def assert_equal(actual, expected, name: str = ""):
    """Check that two nests of dicts, lists and tensors are the same, bit for bit."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), name
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_equal(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), name
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(a, e, f"{name}.{i}")
    else:
        assert actual == expected, name


def metrics(run: Run, stage: str) -> list[dict]:
    """Return the lines of a stage, without what a clock says."""
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    clock = ("seconds", "clips_s", "tokens_s", "mfu")
    return [{k: v for k, v in x.items() if k not in clock} for x in lines if x["stage"] == stage]


def weights(run: Run, stage: str) -> dict[str, Tensor]:
    return load_file(run.weights_file(stage))


# --- resumption and seeds -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ORDER)
def test_a_run_that_goes_on_equals_one_that_never_stopped(trained, tmp_path, stage):
    run = interrupted(copy_of(trained, tmp_path, NEEDS[stage]), stage, stop=4)
    assert_equal(weights(run, stage), weights(trained, stage))  # EMA
    state, expected = run.load_state(stage), trained.load_state(stage)
    assert state.keys() >= {"step", "seconds", "modules", "ema", "optimizers"}
    del state["seconds"], expected["seconds"]
    assert_equal(state, expected)
    assert metrics(run, stage) == metrics(trained, stage)
    assert [line["step"] for line in metrics(run, stage)] == [2, 4, 6]


WRONG_STATES = {  # what somebody, or a broken disk, could have made of a state -> what is said
    "no step": (lambda s: s.pop("step"), "step"),
    "no seed": (lambda s: s.pop("seed"), "seed"),
    "another seed": (lambda s: s.update(seed=7), "--seed 7"),
    "a step before the first": (lambda s: s.update(step=-1), "step -1"),
    "a step that is text": (lambda s: s.update(step="three"), "three"),
    "a step that is nothing": (lambda s: s.update(step=None), "int"),
    "a step that is no number": (lambda s: s.update(step=math.nan), "NaN"),
    "more skipped than done": (lambda s: s.update(bad=5), "5 skipped"),
    "time that is no number": (lambda s: s.update(seconds=math.nan), "nan s"),
    "endless time": (lambda s: s.update(seconds=math.inf), "inf s"),
    "logs that are a number": (lambda s: s.update(pending=3), "int"),
    "logs of no names": (lambda s: s.update(pending=[3.0]), "values"),
    "logs that are text": (lambda s: s.update(pending=[{"loss": "low"}]), "no numbers"),
    "no weights": (lambda s: s.pop("modules"), "modules"),
    "weights of no names": (lambda s: s.update(modules=[]), "keys"),
    "a weight too few": (lambda s: s["modules"].popitem(), "other weights"),
    "a weight too many": (lambda s: s["modules"].update(x=torch.zeros(1)), "other weights"),
    "a weight of another shape": (lambda s: turn(s["modules"]), "size mismatch"),
    "no averages": (lambda s: s.pop("ema"), "ema"),
    "an average too few": (lambda s: s["ema"].popitem(), ""),
    "averages that are text": (lambda s: s.update(ema=dict.fromkeys(s["ema"], "x")), "shape"),
    "an average of another shape": (lambda s: turn(s["ema"]), "another shape"),
    "no optimizer": (lambda s: s.pop("optimizers"), "optimizers"),
    "an optimizer that is a list": (lambda s: s.update(optimizers=[]), "list"),
    "an optimizer without states": (lambda s: s["optimizers"].update(state={}), "seen no weights"),
    "an optimizer without groups": (lambda s: s["optimizers"].pop("param_groups"), ""),
    "an optimizer of other names": (lambda s: renamed(s["optimizers"]["state"]), ""),
}


def turn(tensors: dict[str, Tensor]):
    """Give the first tensor of two different sides the shape of its transpose."""
    name = next(name for name, x in tensors.items() if x.ndim == 2 and x.shape[0] != x.shape[1])
    tensors[name] = tensors[name].T.contiguous()


def renamed(tensors: dict):
    name, value = tensors.popitem()
    tensors[f"other.{name}"] = value


@pytest.mark.parametrize("change, word", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_state_that_does_not_fit_is_one_line_and_stays(trained, tmp_path, change, word):
    run = copy_of(trained, tmp_path, ("vae",))
    state = trained.load_state("base")
    state["step"] = 3
    change(state)
    write_state(run.state_file("base"), state)
    before = run.state_file("base").read_bytes()
    with pytest.raises(UserError) as error:
        train.train(run, ["base"], few(run), seed=0)
    assert word in str(error.value) and "--fresh" in str(error.value)
    assert run.state_file("base").read_bytes() == before and not run.has("base")


def test_a_state_that_cannot_be_read_is_refused_before_clips_are_encoded(trained, tmp_path):
    run = copy_of(trained, tmp_path, ("vae",))
    run.state_file("base").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clips_in_memory", lambda *_: pytest.fail("encoded"))
        with pytest.raises(UserError, match="not a training state"):
            train.train(run, ["base"], few(run), seed=0)


def test_metrics_go_on_between_two_lines(trained, tmp_path):
    run = interrupted(copy_of(trained, tmp_path, ()), "vae", stop=3)
    assert_equal(weights(run, "vae"), weights(trained, "vae"))
    assert metrics(run, "vae") == metrics(trained, "vae")


def test_a_stop_at_the_last_step_is_finished_the_next_time(trained, tmp_path):
    run = interrupted(copy_of(trained, tmp_path, ()), "vae", stop=6)
    assert run.has("vae")
    assert_equal(weights(run, "vae"), weights(trained, "vae"))


def test_metrics_after_the_last_saved_state_are_written_anew(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    run = copy_of(trained, tmp_path / "stopped", ())

    def power_cut():
        raise ConnectionError("power cut")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionError):
        stop_at(patch, 6, power_cut)
        train.train(run, ["vae"], few(run), seed=0)
    assert run.load_state("vae")["step"] == 3
    before = metrics(run, "vae")
    assert [line["step"] for line in before] == [1, 2, 3, 4, 5]
    train.train(run, ["vae"], few(run), seed=0)
    assert [line["step"] for line in metrics(run, "vae")] == [1, 2, 3, 4, 5, 6]
    assert metrics(run, "vae")[:5] == before
    assert_equal(weights(run, "vae"), weights(trained, "vae"))


def test_a_trained_stage_is_left_alone_and_fresh_weights_come_again(trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path, ())
    train.train(run, ["vae"], few(run), seed=0)
    assert_equal(weights(run, "vae"), weights(trained, "vae"))  # the same seed twice
    before = run.weights_file("vae").stat().st_mtime_ns
    capsys.readouterr()
    train.train(run, ["vae"], few(run), seed=0)
    assert "already trained for 6 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="vae was trained with --seed 0: give the same"):
        train.train(run, ["vae"], few(run), seed=1)
    assert run.weights_file("vae").stat().st_mtime_ns == before
    run.forget("vae")
    train.train(run, ["vae"], few(run), seed=1)
    for name, x in weights(run, "vae").items():
        assert not torch.equal(x, weights(trained, "vae")[name]), name  # another seed


def test_more_steps_go_on_from_the_end(trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path, ())
    train.train(run, ["vae"], few(run), seed=0)
    longer = Run.create(tmp_path, micro("stages.vae.steps=8"))
    train.train(longer, ["vae"], few(run), seed=0)
    assert "steps 6 to 8" in capsys.readouterr().out
    assert longer.load_state("vae")["step"] == 8
    assert [line["step"] for line in metrics(longer, "vae")] == [2, 4, 6, 8]


def test_steps_stages_seeds_and_rows_have_their_own_random_numbers():
    words = [(0, "vae", 0), (0, "vae", 1), (0, "base", 0), (1, "vae", 0), (10, "vae", 0)]
    draws = torch.cat([Rows(range(3), *which).normal(2) for which in words])
    assert len({tuple(x.tolist()) for x in draws}) == 15
    assert torch.equal(Rows(range(3), 0, "vae", 1).normal(2), draws[3:6])


@given(st.integers(1, 6), st.data())
def test_a_rows_numbers_do_not_depend_on_its_company(count, data):
    """Whatever the processes and micro-batches: the rows of a batch, and what they share."""
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    whole, some = Rows(range(count), "words"), Rows(range(first, last + 1), "words")
    for draw in (
        lambda rows: rows.normal(2, 3),
        lambda rows: rows.kept(0.5),
        lambda rows: torch.tensor(rows.indices(2**31)),
        lambda rows: rows.normal(),
    ):
        assert torch.equal(draw(some), draw(whole)[first : last + 1])
    a, b = (torch.rand(4, generator=rows.common) for rows in (whole, some))
    assert torch.equal(a, b)


def test_rows_draw_what_they_say():
    rows = Rows(range(4000), "many")
    normal, kept, indices = rows.normal(3), rows.kept(0.3), torch.tensor(rows.indices(5))
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert torch.corrcoef(normal.T).triu(1).abs().max() < 0.06
    assert abs(kept.float().mean() - 0.7) < 0.03
    assert indices.min() == 0 and indices.max() == 4 and indices.bincount().min() > 700


# --- what a stage leaves behind -----------------------------------------------------------------


def test_every_stage_leaves_weights_metrics_and_pictures(trained):
    for stage in ORDER:
        assert trained.has(stage)
        lines = metrics(trained, stage)
        assert lines and all(math.isfinite(v) for x in lines for v in x.values() if v != stage)
        assert "loss" in lines[-1] and "grad_norm" in lines[-1]
    pictures = {path.stem for path in (trained.path / "samples").iterdir()}
    assert pictures == {"vae", "latent", "semantic", "base"}
    assert not list(trained.path.rglob("*.tmp"))


def test_the_captioner_is_left_out_of_the_encoders_weights(trained):
    assert {name.split(".")[0] for name in weights(trained, "encoder")} == {"encoder"}
    assert any(name.startswith("captioner.") for name in trained.load_state("encoder")["modules"])


def test_loss_curves_are_drawn(trained):
    pytest.importorskip("matplotlib")
    assert (trained.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_line_of_metrics_is_seen_in_its_curve(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = Metrics(tmp_path, "vae", 0)
    metrics.write(2, [{"loss": 0.5}], {}, {})
    PLOT(metrics)
    seen = Image.open(tmp_path / "loss.png").convert("HSV").getchannel("S")
    assert seen.getextrema()[1] > 100  # all else is black, white or grey


def test_rates_are_of_the_steps_since_the_last_line(tmp_path, monkeypatch):
    """Also in the first line after going on: earlier steps' values are in it, not their time."""
    progress = SimpleNamespace(stage="vae", of=100, step=12, seconds=0.0)
    progress.pending = [{"loss": 0.5}] * 12
    clock = itertools.count(0, 0.5)
    told = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("plumbing.metrics.time", told)
    reporter = Reporter(progress, tmp_path, SimpleNamespace(first=True), {"clips_s": 10})
    for _ in range(8):
        progress.step += 1
        progress.pending.append({"loss": 0.5})
        reporter.after_step({}, 20)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 20 and line["clips_s"] == pytest.approx(20)


def test_statistics_normalise_latents_and_plans(trained):
    """After training, what the diffusion models see has zero mean and unit variance per channel."""
    clips = source_for(trained, "latent")
    latents = clips.latents(range(8))[0].transpose(0, 1).flatten(1)  # (C, N)
    assert latents.mean(1).abs().max() < 1e-3
    deviations = latents.std(1)  # less than 1 where a direction of almost no variance takes part
    assert deviations.max() < 1 + 1e-3 and deviations.min() > 0.98
    compressor, features = trained.compressor, clips.features(range(8))
    generator = torch.Generator().manual_seed(0)
    plans = []
    for _ in range(200):
        noise = torch.randn(8, compressor.config.channels, *features.shape[2:], generator=generator)
        plans.append(compressor.normalise(compressor(features, noise)[0].detach()))
    plans = torch.cat(plans).transpose(0, 1).flatten(1)
    assert plans.mean(1).abs().max() < 0.05
    assert (plans.std(1) - 1).abs().max() < 0.05
    flat = features.transpose(0, 1).flatten(1)  # (d, N): what is compressed is standardised first
    torch.testing.assert_close(compressor.feature_mean, flat.mean(1))
    torch.testing.assert_close(compressor.feature_std, flat.std(1))


def test_earlier_stages_are_trained_first_and_named(tmp_path, capsys):
    run = Run.create(tmp_path, micro(*(f"stages.{stage}.steps=1" for stage in ORDER)))
    train.train(run, ["semantic"], few(run), seed=0)
    out = capsys.readouterr().out
    said = "semantic needs vae and encoder and latent first"
    places = [out.index(said), *(out.index(f"\n{s}: ") for s in ("vae", "encoder", "latent"))]
    assert places == sorted(places) and places[-1] < out.index("\nsemantic: ")
    assert [s for s in ORDER if run.has(s)] == ["vae", "encoder", "latent", "semantic"]
    train.train(run, ["base"], few(run), seed=0)
    assert "first" not in capsys.readouterr().out


# --- EMA, learning rate, optimizers -------------------------------------------------------------


def test_the_ema_follows_its_formula(trained, tmp_path, monkeypatch):
    """Over a whole run: the weights written are the EMA, recomputed here from every step's."""
    seen = []

    def record(ema, modules, decay):
        if not seen:
            seen.append({name: x.double().clone() for name, x in ema.items()})
        seen.append({n: p.detach().double().clone() for n, p in modules.named_parameters()})
        update_ema(ema, modules, decay)

    monkeypatch.setattr(train, "update_ema", record)
    run = copy_of(trained, tmp_path, ("vae",), "stages.base.ema=0.3")
    train.train(run, ["base"], few(run), seed=0)
    expected, steps = seen[0], seen[1:]
    assert len(steps) == 6
    for step, parameters in enumerate(steps):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * x for n, x in parameters.items()}
    found = weights(run, "base")
    moved = max((steps[-1][n] - x).abs().max() for n, x in expected.items())
    assert moved > 1e-3  # the EMA is not the last weights
    for name, x in expected.items():
        assert (found[name] - x).abs().max() < 1e-6, name
    raw = run.load_state("base")["modules"]
    assert all(torch.equal(raw[name].double(), x) for name, x in steps[-1].items())


def test_ema_decay_grows_to_its_setting():
    config = micro("stages.vae.ema=0.9").stages.vae
    decays = [ema_decay(step, config) for step in range(200)]
    assert decays[0] == 0.1 and decays == sorted(decays) and decays[-1] == 0.9
    assert decays[20] == 21 / 30


def test_learning_rate_by_hand():
    config = micro("stages.vae.steps=100", "stages.vae.warmup=10", "stages.vae.final_lr=0.2")
    factors = [lr_factor(step, config.stages.vae) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == 1 == factors[10]
    assert factors[55] == pytest.approx(0.6)  # half way down
    assert factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 6, 50])
def test_learning_rate_is_never_zero_nor_above_the_peak(warmup):
    config = micro(f"stages.vae.warmup={warmup}").stages.vae
    assert all(0 < lr_factor(step, config) <= 1 for step in range(config.steps))


def test_optimizers_ran_at_the_scheduled_rate(trained):
    config = trained.config.stages.latent
    groups = trained.load_state("latent")["optimizers"]["param_groups"]
    for group, peak in zip(groups, (config.lr, config.muon_lr), strict=True):
        assert group["lr"] == peak * lr_factor(5, config)
        assert group["weight_decay"] == config.weight_decay
    assert metrics(trained, "latent")[-1]["lr"] == lr_factor(5, config)


def test_gradients_are_clipped_and_their_norm_before_is_logged(trained, tmp_path):
    run = copy_of(trained, tmp_path, ("vae",), "stages.base.grad_clip=1e-3")
    source, team, seen = source_for(run, "base"), Team(), []
    progress = begin(run, "base", source, {}, 0, None, team)
    inputs = progress.modules.draw(source, progress.rows(range(3), 0))
    progress.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(nn.utils.get_total_norm([p.grad for p in progress.parameters]))
    )
    found = train.one_step(run, progress, [inputs], team)
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3) and found["grad_norm"] > 0.01


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stage", ORDER)
def test_every_parameter_has_exactly_one_optimizer(trained, stage, optimizer):
    modules = modules_of(trained, stage)
    next(modules.parameters()).requires_grad_(False)
    config = getattr(micro(f"stages.{stage}.optimizer={optimizer}").stages, stage)
    optimizers = build_optimizers(modules, config)
    names = {id(p): name for name, p in modules.named_parameters()}
    held = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in optimizers]
    trainable = [name for name, p in modules.named_parameters() if p.requires_grad]
    assert sorted(itertools.chain(*held)) == sorted(trainable)
    matrices = {n for n, p in modules.named_parameters() if ".blocks." in n and p.ndim == 2}
    if optimizer == "adamw":
        assert [type(o) for o in optimizers] == [torch.optim.AdamW]
    else:
        assert [type(o) for o in optimizers] == [torch.optim.AdamW, Muon]
        assert matrices and set(held[1]) == matrices


# --- losses -------------------------------------------------------------------------------------


class Shown(nn.Module):
    """Stands for a DiT: keeps what it is shown and answers with `scale` times z."""

    def __init__(self, scale: float = 0.0):
        super().__init__()
        self.scale = scale

    def forward(self, z, t, text, context=None, keep_context=None, start=0.0):
        self.z, self.t, self.text = z.detach(), t, text
        self.context, self.keep_context = context, keep_context
        return self.scale * z


def computed(run: Run, stage: str, modules: nn.ModuleDict, step: int = 0):
    """Return the loss of one whole batch, and its logs as means."""
    config = getattr(run.config.stages, stage)
    rows = Rows(range(config.batch), 0, stage, step)
    loss, logs = modules(**modules.draw(source_for(run, stage, config.clips), rows))
    return loss, {name: x.float().nanmean() for name, x in logs.items()}


def shown(run: Run, stage: str, scale: float = 0.0, step: int = 0):
    """Compute one loss of a stage with a stand-in; return it, its logs and all modules."""
    modules = learner(run.config, stage, compressor=run.compressor)
    if stage == "latent":
        modules["compressor"] = run.compressor
    modules["dit"] = Shown(scale)
    return *computed(run, stage, modules, step), modules


def one_clip(path: Path, stage: str, batch: int, *settings: str) -> Run:
    """Return a run whose stage sees a single clip: its data is known."""
    field = f"stages.{stage}"
    return random_run(path, f"{field}.clips=1", f"{field}.batch={batch}", *settings)


def drawn_noise(dit: Shown, data: Tensor) -> Tensor:
    """Return the noise of z_t = (1 - t) data + t noise, (B, ...)."""
    t = dit.t.reshape(-1, 1, 1, 1, 1).double()
    return (dit.z.double() - (1 - t) * data.double()) / t


@pytest.mark.parametrize("scale", [0.0, 0.7])
@pytest.mark.parametrize("stage", ["latent", "base"])
def test_flow_loss_by_hand(tmp_path, stage, scale):
    run = one_clip(tmp_path, stage, 300, f"stages.{stage}.shift=1")  # some t in each quarter
    data = source_for(run, stage, 1).latents([0])[0]
    _, logs, modules = shown(run, stage, scale)
    dit = modules["dit"]
    noise = drawn_noise(dit, data)
    error = (scale * dit.z - (noise - data)).square().flatten(1).mean(1)  # (B,)
    assert logs["flow"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    for i in range(4):
        inside = (dit.t >= i / 4) & (dit.t < (i + 1) / 4)
        assert logs[f"flow_t{i}"].item() == pytest.approx(error[inside].mean().item(), rel=1e-4)
    sure = noise[dit.t > 0.2].flatten()  # and it is N(0, 1), another for every sample
    assert abs(sure.mean()) < 0.02 and abs(sure.std() - 1) < 0.02
    assert torch.corrcoef(noise[dit.t > 0.2][:5].flatten(1)).triu(1).abs().max() < 0.35


@pytest.mark.parametrize(
    "time, shift", [("logit_normal", 1.0), ("logit_normal", 3.0), ("uniform", 3.0)]
)
def test_times_are_those_of_the_stages_distribution_shifted(tmp_path, time, shift):
    fields = (f"stages.semantic.{x}" for x in (f"time={time}", f"shift={shift}"))
    *_, modules = shown(one_clip(tmp_path, "semantic", 4000, *fields), "semantic")
    shares = torch.linspace(0.02, 0.98, 49)
    normal = torch.distributions.Normal(0, 1)
    expected = shares if time == "uniform" else normal.icdf(shares).sigmoid()
    quantiles = modules["dit"].t.quantile(shares)
    assert (quantiles - shift_time(expected, shift)).abs().max() < 0.02


def test_the_painters_first_loss_is_that_of_a_zero_velocity(tmp_path):
    run = one_clip(tmp_path, "latent", 64)
    data = source_for(run, "latent", 1).latents([0])[0]
    modules = learner(run.config, "latent")
    asked = {}
    modules["dit"].register_forward_pre_hook(
        lambda _, inputs: asked.update(z=inputs[0], t=inputs[1])
    )
    _, logs = computed(run, "latent", modules)
    dit = Shown()
    dit.z, dit.t = asked["z"], asked["t"]
    expected = (drawn_noise(dit, data) - data).square().mean()
    assert logs["flow"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_kl_by_hand(tmp_path):
    run = one_clip(tmp_path, "latent", 5, "compressor.kl_weight=0.25")
    loss, logs, modules = shown(run, "latent")
    features = source_for(run, "latent", 1).features([0])
    mean, log_variance = modules["compressor"].posterior(features)
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0))
    by_channel = kl.mean((0, 2, 3, 4))
    assert logs["kl"].item() == pytest.approx(by_channel.sum().item(), rel=1e-4)
    assert logs["active_channels"].item() == (by_channel > 0.1).sum()
    assert loss.item() == pytest.approx((logs["flow"] + 0.25 * logs["kl"]).item(), rel=1e-5)


def surely(compressor: nn.Module):
    """Make the deviation of a compressor's plans almost zero: a plan is its mean."""
    compressor.mlp[2].weight[compressor.config.channels :].zero_()
    compressor.mlp[2].bias[compressor.config.channels :] = -20.0


def test_plans_are_shown_with_noise_of_another_size_for_each_sample(tmp_path):
    run = one_clip(tmp_path, "latent", 2000, "compressor.noise=0.5")
    compressor = run.compressor
    compressor.std.fill_(3.0)
    surely(compressor)
    *_, modules = shown(run, "latent")
    plan = compressor.encode(source_for(run, "latent", 1).features([0]))
    added = (modules["dit"].context - plan).flatten(1) / (0.5 * 3.0)  # (B, elements)
    sizes = added.square().mean(1).sqrt()  # |N(0, 1)|, of mean 0.80 and mean square 1
    assert abs(sizes.square().mean() - 1) < 0.1 and abs(sizes.mean() - 0.8) < 0.05
    assert (sizes < 0.1).float().mean() > 0.03 and (sizes > 2).float().mean() > 0.02
    assert abs((added / sizes[:, None]).mean()) < 0.02


def test_the_noise_on_plans_is_of_their_deviation_at_that_moment(tmp_path, monkeypatch):
    """Not of the one they have in the end: the compressor learns while the painter does."""
    seen = []

    class Watched(Compressor):
        def forward(self, features, noise):
            z_sem, kl = super().forward(features, noise)
            if z_sem.device.type != "meta":  # there FLOPs are counted
                seen.append((self.std.flatten().clone(), z_sem.detach().std((0, 2, 3, 4))))
            return z_sem, kl

    monkeypatch.setattr("stages.Compressor", Watched)
    monkeypatch.setattr(train, "MEASURE_EVERY", 4)
    settings = ["stages.latent.steps=12", "stages.latent.batch=64", "stages.latent.lr=0.02"]
    run = one_clip(tmp_path, "latent", 64, *settings)
    run.forget("latent")
    train.train(run, ["latent"], few(run), seed=0)
    said, true = (torch.stack(x) for x in zip(*seen[:12], strict=True))  # then comes `influence`
    assert (true[-1] / true[0]).log().abs().max() > 0.1  # it does change
    assert (said[::4] / true[::4]).log().abs().max() < 0.25  # another batch, of few clips


def test_the_planner_learns_normalised_plans(tmp_path):
    run = one_clip(tmp_path, "semantic", 50)
    compressor = run.compressor
    compressor.mean += torch.arange(compressor.config.channels).reshape(-1, 1, 1, 1)
    compressor.std *= 2.5
    _, logs, modules = shown(run, "semantic")
    x = modules.draw(source_for(run, "semantic", 1), Rows(range(50), 0, "semantic", 0))
    z_sem, _ = compressor(x["features"], x["plan_noise"])  # not its mean
    data = (z_sem - compressor.mean) / compressor.std
    noise = drawn_noise(modules["dit"], data)
    assert abs(noise[modules["dit"].t > 0.2].std() - 1) < 0.05
    assert logs["flow"].item() == pytest.approx((noise - data).square().mean().item(), rel=1e-4)
    assert modules["dit"].context is None and not any(k.startswith("kl") for k in logs)


@pytest.mark.parametrize("stage", ["latent", "semantic", "base"])
def test_conditions_are_dropped_by_sample_and_apart(tmp_path, stage):
    n = 4000
    dropouts = [f"stages.{stage}.text_dropout=0.3", f"stages.{stage}.context_dropout=0.2"]
    run = one_clip(tmp_path, stage, n, *dropouts)
    *_, modules = shown(run, stage)
    dit = modules["dit"]
    text = dit.text.flatten(1)
    kept = text.any(1)  # (B,)
    assert torch.equal(
        text[kept], run.text.encode(few(run).captions([0])).flatten(1).expand(kept.sum(), -1)
    )
    assert abs(kept.float().mean() - 0.7) < 4 * math.sqrt(0.21 / n)
    if stage != "latent":
        assert dit.context is None and dit.keep_context is None
        return
    assert dit.keep_context.dtype == torch.bool
    assert abs(dit.keep_context.float().mean() - 0.8) < 4 * math.sqrt(0.16 / n)
    both = (kept & dit.keep_context).float().mean()
    assert abs(both - 0.7 * 0.8) < 4 * math.sqrt(0.25 / n)
    assert dit.context.flatten(1).any(1).all()  # a dropped plan is the DiT's to replace


@pytest.mark.parametrize("dropout, kept", [(0.0, True), (1.0, False)])
def test_dropouts_of_none_and_of_all(tmp_path, dropout, kept):
    fields = (f"stages.latent.{name}_dropout={dropout}" for name in ("text", "context"))
    *_, modules = shown(one_clip(tmp_path, "latent", 50, *fields), "latent")
    assert (modules["dit"].text.flatten(1).any(1) == kept).all()
    assert (modules["dit"].keep_context == kept).all()


def test_the_planner_leaves_the_painters_compressor_alone(trained, tmp_path):
    run = copy_of(trained, tmp_path, NEEDS["semantic"])
    train.train(run, ["semantic"], few(run), seed=0)
    for stage in NEEDS["semantic"]:
        assert run.weights_file(stage).read_bytes() == trained.weights_file(stage).read_bytes()
    for part in (run.painter, run.compressor):
        assert not any(p.requires_grad for p in part.parameters())


def test_one_batch_can_be_learned_by_heart(trained, tmp_path):
    """The same four clips, noise and times in every step: the flow loss has to fall."""
    settings = [f"stages.latent.{k}_dropout=0" for k in ("text", "context")]
    run = copy_of(trained, tmp_path, NEEDS["latent"], "stages.latent.batch=4", *settings)
    torch.manual_seed(0)
    modules = learner(run.config, "latent").train()
    optimizers = build_optimizers(modules, run.config.stages.latent)
    inputs = modules.draw(source_for(run, "latent"), Rows(range(4), 0, "latent", 0))
    flows = []
    for _ in range(100):
        loss, logs = modules(**inputs)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        flows.append(logs["flow"].mean().item())
    assert flows[-1] < 0.1 * flows[0], f"{flows[0]:.3f} -> {flows[-1]:.3f}"


# --- warnings and errors ------------------------------------------------------------------------


def test_a_dead_plan_is_said_loudly(trained, tmp_path, capsys):
    dead = ["kl_weight=1000", "log_variance=-0.5"]
    fast = ["steps=40", "lr=0.1", "optimizer=adamw"]
    settings = [f"compressor.{x}" for x in dead] + [f"stages.latent.{x}" for x in fast]
    run = copy_of(trained, tmp_path, NEEDS["latent"], *settings)
    train.train(run, ["latent"], few(run), seed=0)
    out = capsys.readouterr().out
    assert metrics(run, "latent")[0]["active_channels"] > 0
    assert metrics(run, "latent")[-1]["active_channels"] == 0
    assert "the plan has died (KL is 0); lower kl_weight" in out
    train.train(copy_of(trained, tmp_path / "alive", NEEDS["latent"]), ["latent"], few(run), seed=0)
    assert "died" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(
    trained, tmp_path, monkeypatch
):
    """From step 3 on: the state of step 4 has those of step 2; it is said where it happened."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(progress, "PATIENCE", 3)
    spoil(monkeypatch, range(3, 99))
    run = copy_of(trained, tmp_path, NEEDS["latent"])
    with pytest.raises(UserError, match="latent: loss inf and gradient") as error:
        train.train(run, ["latent"], few(run), seed=0)
    said = str(error.value)
    assert "3 steps in a row, the last at step 5; t from 0." in said and "\n" not in said
    indices = Rows(range(8), 0, "latent", 4).indices(8)
    assert f"clips {indices} ..." in said
    assert not run.has("latent") and run.load_state("latent")["step"] == 4
    state = run.load_state("latent")
    monkeypatch.undo()
    monkeypatch.setattr(train, "preview", lambda *_: None)
    good = copy_of(trained, tmp_path / "good", NEEDS["latent"])
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        train.train(good, ["latent"], few(good), seed=0)
    assert_equal(state["modules"], good.load_state("latent")["modules"])
    assert_equal(state["ema"], good.load_state("latent")["ema"])


def spoil(monkeypatch, steps):
    """Make the painter's loss infinite at some steps (counted from 1)."""
    forward, taken = Painter.forward, []

    def spoilt(self, **inputs):
        loss, logs = forward(self, **inputs)
        if loss.device.type != "meta":  # there FLOPs are counted
            taken.append(1)
        return loss * (math.inf if len(taken) in steps else 1), logs

    monkeypatch.setattr(Painter, "forward", spoilt)


def test_a_single_bad_step_is_skipped_and_counted(trained, tmp_path, monkeypatch):
    spoil(monkeypatch, [3])
    run = copy_of(trained, tmp_path, NEEDS["latent"])
    train.train(run, ["latent"], few(run), seed=0)
    lines = metrics(run, "latent")
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(x.isfinite().all() for x in weights(run, "latent").values())


@pytest.mark.parametrize("foreign", ["another stage's", "another program's"])
def test_a_state_that_does_not_fit_is_refused(trained, tmp_path, foreign):
    run = copy_of(trained, tmp_path, NEEDS["latent"])
    state = trained.load_state("base") if foreign == "another stage's" else {"model": {}}
    write_state(run.state_file("latent"), state)
    with pytest.raises(UserError, match=r"latent\.state does not fit.*--fresh") as error:
        train.train(run, ["latent"], few(run), seed=0)
    assert "\n" not in str(error.value)


def test_signals_mean_what_they_did_before(trained, tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    interrupted(copy_of(trained, tmp_path, ()), "vae", stop=2)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_asked_to_stop_twice_it_does_not_save():
    with train.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_is_refused_changes_nothing(trained, tmp_path, capsys):
    """Of a run whose seed or data would be another, the settings stay, too."""
    run = copy_of(trained, tmp_path / "run", NEEDS["latent"])
    before = (run.path / "config.json").read_bytes()
    words = ["--stage", "vae", "--tiny", "--out", run.path, "--set", *MICRO]
    again = ["--set", "sample.latent_guidance=7", "--set", "stages.vae.steps=9"]
    assert call(train.main, *words, *again, "--seed", 5) == 2
    one_line(capsys, "vae was trained with --seed 0")
    assert (run.path / "config.json").read_bytes() == before


def test_fields_may_be_set_in_several_places(tmp_path, monkeypatch):
    words = ["--stage", "vae", "--set", "a=1", "b=2", "--set", "c=3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert train.arguments().settings == ["a=1", "b=2", "c=3"]


def test_what_torchrun_passes_on_is_the_same_signal(monkeypatch):
    """It came to all processes, and torchrun tells its own once more."""
    monkeypatch.setenv("RANK", "1")
    with train.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.wanted
        monkeypatch.setattr(processes, "RELAYED", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


# --- the command line ---------------------------------------------------------------------------


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, capsys):
    """A process of its own, stopped as a scheduler would; then the same command in this one."""
    arguments = ["--stage", "encoder", "--tiny", "--out", tmp_path, "--set", *MICRO]
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments), "--steps", "3000"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    try:
        while not re.search(r"\| [1-9]\d*/3000 ", said) and (letter := process.stdout.read(1)):
            said += letter  # until the progress bar shows a step
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said + out
    assert "the same command goes on from it" in out and "Traceback" not in out
    assert not Run.open(tmp_path).has("encoder")
    step = Run.open(tmp_path).load_state("encoder")["step"]
    assert call(train.main, *arguments, "--steps", step + 2) == 0
    assert f"steps {step} to {step + 2}" in capsys.readouterr().out
    assert Run.open(tmp_path).has("encoder")


def test_fresh_starts_over(tmp_path, capsys):
    arguments = ["--stage", "encoder", "--tiny", "--out", tmp_path, "--set", *MICRO]
    for extra in ([], ["--fresh", "--seed", 3]):
        assert call(train.main, *arguments, "--steps", 2, *extra) == 0
        assert "steps 0 to 2" in capsys.readouterr().out
    assert Run.open(tmp_path).note("encoder")["seed"] == 3
    assert call(train.main, *arguments, "--steps", 2, "--seed", 3) == 0
    assert "already trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--preset", "gigantic"], ["gigantic", "choose tiny"]),
        ([], ["--qwen", "7B", "--vae", "--text", "Wan-AI", "--tiny"]),
        (["--tiny", "--steps", "0"], ["--steps 0", "at least 1"]),
        (["--tiny", "--set", "latent.widht=64"], ["latent.widht", "latent.width"]),
        (["--tiny", "--set", "width=64"], ["width", "vae.width", "latent.width"]),
        (["--tiny", "--set", "latent.width=wide"], ["latent.width=wide", "expected int"]),
        (["--tiny", "--set", "latent.width"], ["expected field=value"]),
        (["--tiny", "--set", "data.frames=6"], ["multiples of 4 frames"]),
        (["--tiny", "--set", "latent.width=64", "latent.heads=7"], ["64 over 7 heads"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, arguments, words):
    out = tmp_path / "run"
    assert call(train.main, "--stage", "vae", "--out", out, *arguments) == 2
    one_line(capsys, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    "setting", ["optimizer=sgd", "time=normal", "steps=0", "batch=0", "clips=0", "shift=0"]
)
def test_impossible_settings_are_refused_before_a_folder_is_made(setting):
    """Else the folder has them, and the command without the mistake is refused in turn."""
    with pytest.raises(UserError, match=setting.split("=")[0]):
        micro(f"stages.latent.{setting}")


def test_other_settings_in_a_used_folder_are_one_line(tmp_path, capsys):
    Run.create(tmp_path, micro())
    arguments = ["--stage", "vae", "--tiny", "--out", tmp_path, "--set", *MICRO, "latent.width=64"]
    assert call(train.main, *arguments) == 2
    one_line(capsys, "latent.width 32 -> 64")


def test_metrics_go_to_tensorboard_too(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["--stage", "vae", "--tiny", "--out", tmp_path, "--set", *MICRO, "--tensorboard"]
    assert call(train.main, *arguments) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {(e.step, round(e.value, 5)) for e in board.Scalars("vae/loss")}
    lines = metrics(Run.open(tmp_path), "vae")
    assert shown == {(line["step"], round(line["loss"], 5)) for line in lines}


def test_vae_and_encoder_may_learn_from_pieces_of_long_clips(tmp_path, monkeypatch):
    """Of a world of stories they see single events; the generators see whole clips."""
    seen = {}

    def recorded(stage, *others):
        seen[stage] = source_of(stage, *others)
        return seen[stage]

    source_of = train.source_of
    monkeypatch.setattr(train, "source_of", recorded)
    settings = ["data.frames=16", "data.events=2", "vae.span=2", "encoder.span=1", "text.words=20"]
    settings += [f"stages.{stage}.pieces=2" for stage in ("vae", "encoder")]
    run = Run.create(tmp_path, micro(*settings, *(f"stages.{s}.steps=1" for s in ORDER)))
    train.train(run, ["semantic"], few(run), seed=0)
    for stage in ("vae", "encoder"):
        assert (seen[stage].config.frames, seen[stage].config.events) == (8, 1)
    for stage in ("latent", "semantic"):
        assert seen[stage].latents([0])[0].shape[2:] == run.config.latent_grid()
        assert seen[stage].captions([0]) == few(run).captions([0])  # of both events
    with pytest.raises(UserError, match="do not divide"):
        few(run).shorter(3)


# --- stretches of long clips --------------------------------------------------------------------

LONG = ["data.frames=32", "data.events=2", "vae.span=2", "encoder.span=1", "text.words=20"]


@pytest.mark.parametrize("stage", ["latent", "base", "semantic"])
def test_a_step_learns_from_a_stretch_where_both_streams_start_together(tmp_path, stage):
    run = random_run(tmp_path, *LONG, f"stages.{stage}.pieces=2", f"stages.{stage}.clips=4")
    clips = source_for(run, stage, 4)
    modules = learner(run.config, stage, compressor=run.compressor)
    starts = set()
    for step in range(30):
        rows = range(run.config.stages.latent.batch)
        indices = Rows(rows, 0, stage, step).indices(4)
        inputs = modules.draw(clips, Rows(rows, 0, stage, step))
        start = float(inputs["start"])  # seconds, of 4
        starts.add(start)
        found = {}
        if stage != "semantic":
            found["latents"] = clips.latents(indices)[0], run.config.latent.rate
        if stage != "base":
            found["features"] = clips.features(indices), run.config.semantic.rate
        for name, (whole, rate) in found.items():
            first = round(start * rate)
            assert first == start * rate
            expected = whole[:, :, first : first + round(2 * rate)]
            assert torch.equal(inputs[name], expected) and expected.shape[2] == 2 * rate
        noised = inputs["plan_noise" if stage == "semantic" else "latents"]
        assert inputs["noise"].shape == noised.shape
    assert starts == {0.0, 1.0, 2.0}
    assert torch.isfinite(modules(**inputs)[0])


def test_a_rows_stretch_does_not_depend_on_how_a_batch_is_cut(tmp_path):
    run = random_run(tmp_path, *LONG, "stages.latent.pieces=2", "stages.latent.clips=4")
    clips, modules = source_for(run, "latent", 4), learner(run.config, "latent")
    whole = modules.draw(clips, Rows(range(3), 0, "latent", 3))
    rows = modules.draw(clips, Rows(range(1, 2), 0, "latent", 3))
    assert all(torch.equal(rows[name], whole[name][1:2]) for name in whole if name != "start")
    assert rows["start"] == whole["start"]


def test_stretches_at_rates_that_are_no_whole_numbers():
    """4 frames of the plan at 0.8 and 12 of the latents at 2.4 a second: both five seconds."""
    rates = ["data.fps=9.6", "data.semantic_fps=1.6", "data.frames=48", "stages.base.pieces=2"]
    assert micro(*rates).stretches() == 4


@pytest.mark.parametrize(
    "settings, stretches",
    [
        ([*LONG, "stages.latent.pieces=3"], 4),
        (["data.frames=24", "data.semantic_fps=1", "stages.latent.pieces=2"], 1),  # 3 s, plan 4 s
    ],
)
def test_stretches_that_do_not_fit_are_one_line(tmp_path, settings, stretches):
    with pytest.raises(UserError, match=f"{stretches} equal stretches, which do not divide by it"):
        random_run(tmp_path, *settings)


@pytest.mark.parametrize(
    "preset, attention, window",
    [
        ("tiny_long", None, 2.0),
        ("tiny_long", "swin", 2.0),
        ("tiny_long", "full", None),
        ("tiny", None, None),
        ("tiny", "swin", 2.0),  # a quarter of its two seconds would cut through a plan's frame
    ],
)
def test_attention_by_flag(tmp_path, monkeypatch, preset, attention, window):
    seen = []
    monkeypatch.setattr(train, "train", lambda run, *_: seen.append(run.config))
    flags = ["--attention", attention] if attention else []
    arguments = ["--stage", "base", "--preset", preset, "--out", tmp_path, *flags]
    assert call(train.main, *arguments) == 0
    assert seen[0].latent.window == window


@pytest.mark.parametrize("start", ["scratch", "base"])
def test_the_start_by_flag(tmp_path, monkeypatch, start):
    """Where they start from the base, it has their number of steps."""
    words = ["--stage", "latent", "--tiny", "--start", start, "--steps", "7"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--out", str(tmp_path)])
    config = train.configured(train.arguments(), None)
    assert config.start == start and config.stages.latent.steps == 7
    assert (config.stages.base.steps == 7) == (start == "base")


# --- what belongs together ----------------------------------------------------------------------


def command_line(out: Path, stage: str, *others) -> list:
    """Return train.py's arguments for a stage of a micro run of one step of each stage."""
    steps = [f"stages.{s}.steps=1" for s in ORDER if s != stage]
    return ["--stage", stage, "--tiny", "--out", out, "--set", *MICRO, *steps, *others]


@pytest.fixture
def chain(trained, tmp_path) -> Run:
    """A run with all its stages, which knows that they belong together."""
    return Run(Path(shutil.copytree(trained.path, tmp_path / "chain")), trained.config)


@pytest.mark.parametrize("again", ["vae", "encoder", "latent"])
def test_a_stage_trained_on_older_weights_is_out_of_date(chain, capsys, again):
    """By training, sampling, evaluation and export alike: one line that says what to do."""
    longer = Run.create(chain.path, micro(f"stages.{again}.steps=8"))
    train.train(longer, [again], few(chain), seed=0)
    late = [s for s in ORDER if again in NEEDS[s]]
    for stage in late:
        with pytest.raises(
            UserError, match=rf"trained on another {again} .*--stage {stage} .*--fr"
        ):
            check_chain(longer, stage)
        with pytest.raises(UserError, match=f"{stage} was trained on another"):
            train.train(Run.open(chain.path), [stage], few(chain), seed=0)
    capsys.readouterr()
    for main, *arguments in (
        (sample.main, "--run", chain.path, "--out", chain.path / "x.png"),
        (run_module.main, "export", chain.path, chain.path / "copy"),
    ):
        assert call(main, *arguments) == 2
        one_line(capsys, f"trained on another {again}", "do not belong together", "--fresh")
    assert not (chain.path / "copy").exists() and not (chain.path / "x.png").exists()


@pytest.mark.parametrize("how", ["stages", "videos"])
def test_fresh_removes_nothing_where_it_is_refused(chain, tmp_path, capsys, how):
    """Older weights below, or a cache of other videos: known only when the stage begins."""
    stage, videos = "semantic", []
    if how == "stages":
        longer = Run.create(chain.path, micro("stages.vae.steps=8"))
        train.train(longer, ["vae"], few(chain), seed=0)
    else:
        (chain.path / "cache").mkdir()
        (chain.path / "cache" / "cache.json").write_text("{}")
        clip = {"save_all": True, "append_images": [Image.new("RGB", (32, 32))] * 15}
        (tmp_path / "videos").mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / "videos" / "one.gif", **clip)
        (tmp_path / "videos" / "one.txt").write_text("one")
        videos = ["--data", tmp_path / "videos"]
    kept = {file: file.read_bytes() for s in ORDER for file in chain.path.glob(f"{s}.*")}
    command = ["--stage", stage, "--tiny", "--fresh", "--out", chain.path, *videos]
    capsys.readouterr()
    assert call(train.main, *command, "--set", *MICRO) == 2
    one_line(capsys, "latent was trained on another vae" if how == "stages" else "cache")
    assert kept == {file: file.read_bytes() for file in kept if file.exists()}


def test_the_command_that_a_refusal_names_is_the_right_one(tmp_path, capsys):
    """Pasted as it stands it trains the stage anew: as the run was made, on its own data."""
    folder, out = tmp_path / "my videos", tmp_path / "run"
    write_clips(folder, "one", "two")
    train_on = [*command_line(out, "semantic"), "--data", folder]
    assert call(train.main, *train_on) == 0
    assert (
        call(train.main, *command_line(out, "latent", "stages.latent.steps=2"), "--data", folder)
        == 0
    )
    capsys.readouterr()
    assert call(sample.main, "--run", out, "--out", tmp_path / "x.png") == 2
    said = capsys.readouterr().err.strip()
    command = shlex.split(said[said.index("python train.py") :])
    assert command[:4] == ["python", "train.py", "--stage", "semantic"] and str(folder) in command
    assert call(train.main, *command[2:]) == 0
    assert call(sample.main, "--run", out, "--out", tmp_path / "x.png") == 0


def test_a_state_begun_on_older_weights_does_not_go_on(trained, tmp_path):
    run = copy_of(trained, tmp_path, NEEDS["base"])
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        train.train(run, ["base"], few(run), seed=0)
    shutil.copy(trained.weights_file("vae"), tmp_path)
    with pytest.raises(UserError, match="another vae"):
        run.save("vae", modules_of(run, "vae").state_dict(), {})
        train.train(Run.open(tmp_path), ["base"], few(run), seed=0)
    assert run.load_state("base")["step"] == 3


def test_what_cannot_be_finished_is_not_begun(chain, capsys):
    """More steps for all stages: the first would change what the others learned from."""
    before = {stage: chain.weights_file(stage).read_bytes() for stage in ORDER}
    longer = Run.create(chain.path, micro(*(f"stages.{stage}.steps=8" for stage in ORDER)))
    with pytest.raises(UserError, match="vae would change, and latent and semantic and base lear"):
        train.train(longer, RECIPE, few(chain), seed=0)
    assert before == {stage: chain.weights_file(stage).read_bytes() for stage in ORDER}
    train.train(longer, ["semantic", "base"], few(chain), seed=0)  # the last ones may go on
    assert "will change" not in capsys.readouterr().out
    train.train(longer, ["latent"], few(chain), seed=0)
    assert "latent will change: semantic learned from it as it is" in capsys.readouterr().out


def test_stages_trained_in_order_belong_together_and_so_do_exported_ones(chain, tmp_path):
    for stage in ORDER:
        check_chain(chain, stage)
        assert chain.note(stage)["made_of"] == {n: chain.note(n)["digest"] for n in NEEDS[stage]}
        assert chain.note(stage)["data"]["name"] == "the synthetic world"
    export(chain.path, tmp_path / "copy")
    small = Run.open(tmp_path / "copy")
    for stage in RECIPE:
        check_chain(small, stage)
        assert small.note(stage)["digest"] != chain.note(stage)["digest"]  # other numbers
    shutil.copy(chain.weights_file("latent"), small.path)
    with pytest.raises(UserError, match="semantic was trained on another latent"):
        _ = small.planner


def test_what_older_weights_do_not_say_is_not_compared(chain):
    """And what is gone is not either: text to video needs no encoder."""
    chain.weights_file("encoder").unlink()
    check_chain(chain, "semantic")
    for stage in ("vae", "latent"):
        save_file(weights(chain, stage), chain.weights_file(stage), {"steps": "6"})
    assert chain.steps_of("vae") == 6 and chain.finished("latent")
    check_chain(chain, "latent")
    with pytest.raises(UserError, match="another vae"):  # the planner does say
        check_chain(chain, "semantic")


def test_a_preview_is_not_its_stage_finished(trained, tmp_path, capsys):
    """What needs the stage has it trained to the end first."""
    run = copy_of(trained, tmp_path, ("vae", "encoder"), "stages.latent.preview_every=2")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        train.train(run, ["latent"], few(run), seed=0)
    assert run.has("latent") and run.steps_of("latent") == 2 and not run.finished("latent")
    capsys.readouterr()
    train.train(Run.open(tmp_path), ["semantic"], few(run), seed=0)
    said = capsys.readouterr().out
    assert "semantic needs latent first" in said and "steps 4 to 6" in said
    assert run.finished("latent") and run.finished("semantic")
    check_chain(run, "semantic")
    assert_equal(weights(run, "latent"), weights(trained, "latent"))


def test_the_base_on_a_folder_has_all_that_its_cache_needs_trained_first(tmp_path, capsys):
    """And what is begun anew has its clips encoded anew."""
    write_clips(tmp_path / "videos", "one", "two")
    run = Run.create(tmp_path / "run", micro())
    videos = Folder(tmp_path / "videos", run.config.data)
    train.train(run, ["base"], videos, seed=0)
    assert "base needs vae and encoder first" in capsys.readouterr().out
    run.forget("vae")
    train.train(run, ["base"], videos, seed=1)
    assert run.finished("base")


@pytest.mark.parametrize("stage", ["vae", "latent", "semantic", "base"])
def test_another_dataset_is_refused_and_the_same_goes_on(chain, tmp_path, stage):
    """Under the same name more videos may come; under another, the same list is the same."""
    folder = tmp_path / "videos"
    write_clips(folder, "one", "two")
    run = Run.create(chain.path, micro(f"stages.{stage}.steps=7"))
    before = run.weights_file(stage).read_bytes()
    with pytest.raises(UserError, match=rf"{stage} learned from the synthetic world, not from .*"):
        train.train(run, [stage], Folder(folder, run.config.data), seed=0)
    assert run.weights_file(stage).read_bytes() == before
    run.forget(stage)
    train.train(run, [stage], Folder(folder, run.config.data), seed=0)
    write_clips(tmp_path / "other", "three")
    for other in (few(run), Folder(tmp_path / "other", run.config.data)):
        with pytest.raises(UserError, match=rf"{stage} learned from {folder}"):
            train.train(run, [stage], other, seed=0)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    longer = Run.create(chain.path, micro(f"stages.{stage}.steps=8"))
    train.train(longer, [stage], Folder(moved, run.config.data), seed=0)
    assert longer.steps_of(stage) == 8


def write_clips(folder: Path, *names: str):
    """Write short animations with captions."""
    folder.mkdir()
    for k, name in enumerate(names):
        frames = [Image.new("RGB", (16, 16), (8 * i, 40 * k, 99)) for i in range(16)]
        frames[0].save(folder / f"{name}.webp", save_all=True, append_images=frames[1:])
        (folder / f"{name}.txt").write_text(f"a {name} clip")


def test_weights_without_their_state_are_not_overwritten(chain):
    before = chain.weights_file("semantic").read_bytes()
    chain.state_file("semantic").unlink()
    longer = Run.create(chain.path, micro("stages.semantic.steps=9"))
    with pytest.raises(UserError, match=r"semantic has weights of 6 steps but no .*state.*--fresh"):
        train.train(longer, ["semantic"], few(chain), seed=0)
    assert chain.weights_file("semantic").read_bytes() == before
    train.train(chain, ["semantic"], few(chain), seed=0)  # for what it has, it needs none


def test_a_new_number_of_steps_is_said_with_what_the_learning_rate_does(chain, capsys):
    longer = Run.create(chain.path, micro("stages.vae.steps=12"))
    train.train(longer, ["vae"], few(chain), seed=0)
    lines = [x for x in capsys.readouterr().out.splitlines() if "was to have 6 steps, now 12" in x]
    before = lr_factor(5, chain.config.stages.vae)
    now = lr_factor(6, longer.config.stages.vae)
    assert len(lines) == 1 and f"from {before:.0%} of its peak to {now:.0%}" in lines[0]
    assert now > 2 * before
    train.train(Run.open(chain.path), ["vae"], few(chain), seed=0)
    assert "was to have" not in capsys.readouterr().out


def test_a_state_beyond_the_steps_is_written_as_it_is(chain, capsys):
    chain.weights_file("semantic").unlink()
    shorter = Run.create(chain.path, micro("stages.semantic.steps=4"))
    train.train(shorter, ["semantic"], few(chain), seed=0)
    said = capsys.readouterr().out
    assert "steps 6 to 6" in said and "was to have" not in said
    assert chain.steps_of("semantic") == 6


def test_a_second_process_is_told_who_trains_there(tmp_path, capsys):
    """And one that was killed keeps nobody out."""
    arguments = command_line(tmp_path, "vae")
    arguments = [*map(str, arguments), "stages.vae.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert call(train.main, *arguments) == 2
        one_line(capsys, str(tmp_path), f"process {process.pid} is training there", "--out")
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / ".lock").exists()
    assert call(train.main, *command_line(tmp_path, "vae"), "stages.vae.steps=1") == 0
    assert not (tmp_path / ".lock").exists()


# --- prepared ahead -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ORDER)
def test_a_batch_prepared_ahead_is_the_one_prepared_in_turn(trained, stage, monkeypatch):
    def ahead(prepare, steps, workers):  # as on a GPU
        return prepared_ahead(prepare, steps, 2)

    monkeypatch.setattr(train, "prepared_ahead", ahead)
    source, config = source_for(trained, stage), getattr(trained.config.stages, stage)
    captions = few(trained).captions(range(8))
    modules = learner(trained.config, stage, captions, trained.compressor)
    known = {"optimizers": [], "seed": 5, "of": 6, "clips": 8, "data": {}, "made_of": {}}
    progress = Progress(stage, modules, modules, **known)
    progress.step = 2
    rows = Team().rows(config.batch, 3)
    found = list(train.batches(trained, progress, source, rows))
    assert len(found) == 4 and all(len(batch) == 3 for batch in found)
    for step, batch in enumerate(found, 2):
        for part, inputs in zip(rows, batch, strict=True):
            assert_equal(inputs, modules.draw(source, Rows(part, 5, stage, step)))


@pytest.mark.parametrize("tokens", [7, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputation_keeps_what_attention_to_many_tokens_gave(monkeypatch, tokens, compiled):
    ran = []

    @torch.library.custom_op("semanticgen_tests::attend", mutates_args=())
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ran.append(1)
        return q * k * v

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradient(ctx, g: Tensor):
        q, k, v = ctx.saved_tensors
        return g * k * v, g * q * v, None

    attend.register_fake(lambda q, k, v: torch.empty_like(q))
    attend.register_autograd(gradient, setup_context=keep)
    monkeypatch.setattr("plumbing.device.ATTENTION", [torch.ops.semanticgen_tests.attend.default])
    monkeypatch.setattr("plumbing.device.MANY", 8)
    x = torch.randn(1, 2, tokens, 4, requires_grad=True)
    run = torch.compile(recomputed, backend="aot_eager") if compiled else recomputed
    run(lambda x: attend(x.sin(), x.cos(), x.detach()).exp(), x).sum().backward()
    assert len(ran) == (1 if tokens >= 8 else 2)
    y = x.detach().requires_grad_()
    (y.sin() * y.cos() * y.detach()).exp().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_stage_that_is_compiled_needs_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert call(train.main, *command_line(tmp_path, "vae"), "stages.vae.compile=true") == 2
    one_line(capsys, "stages.vae.compile=true needs a C compiler", "stages.vae.compile=false")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_processes_prepare_the_next_batches_in_order(workers):
    def prepare(step: int) -> list[dict]:
        if step == 9:
            raise UserError("step 9 cannot be")
        return [{"step": torch.tensor([step, os.getpid()]), "text": "x"}]

    state, found = torch.get_rng_state(), []
    with pytest.raises(UserError, match=r"^step 9 cannot be$"):
        for (made,) in prepared_ahead(prepare, range(2, 12), workers):
            found.append(made["step"].tolist())
            if found[-1][1] != os.getpid():
                os.kill(found[-1][1], signal.SIGTERM)  # as if all of a job were told to stop
    assert [step for step, _ in found] == list(range(2, 9))
    assert len({process for _, process in found} - {os.getpid()}) == workers
    assert torch.get_rng_state().equal(state)  # of which nothing was used


def test_processes_prepare_batches_only_where_they_can(monkeypatch, capsys):
    room = SimpleNamespace(free=2**31)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/shm")
    assert [spare_processes(most) for most in (2, 8)] == [2, 5]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert spare_processes(8) == 1 and not capsys.readouterr().out
    assert spare_processes(8, 2**27) == 1 and not capsys.readouterr().out
    assert spare_processes(8, 2**28) == 0  # two for each process of six
    assert "less than 4 GB free in /dev/shm" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert spare_processes(8, 2**29) == 2 and not capsys.readouterr().out
    room.free = 2**26  # a container's usual share
    assert spare_processes(8) == 0 and "/dev/shm" in capsys.readouterr().out
    with monkeypatch.context() as without:
        without.setattr("os.path.exists", lambda _: False)
        assert spare_processes(8) == 0 and not capsys.readouterr().out
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.delattr("os.sched_getaffinity")
    assert spare_processes(8) == 0


def test_the_devices_speed_is_what_its_fastest_product_needs(monkeypatch):
    moments = iter([0.0, 2.0, 5.0, 6.0])  # two products, of two seconds and of one
    told = SimpleNamespace(perf_counter=lambda: next(moments))
    monkeypatch.setattr("plumbing.device.time", told)
    with FlopCounterMode(display=False) as counter:
        found = matmul_speed.__wrapped__(torch.device("cpu"), "float32")
    assert found == counter.get_total_flops() / 2


@pytest.mark.parametrize("stage", ["latent", "base", "vae", "encoder"])
def test_flops_are_those_of_a_real_step_without_one(trained, stage):
    source, config = source_for(trained, stage), getattr(trained.config.stages, stage)
    modules = learner(trained.config, stage, few(trained).captions(range(8)), trained.compressor)
    known = {"optimizers": [], "seed": 0, "of": 6, "clips": 8, "data": {}, "made_of": {}}
    progress = Progress(stage, modules, modules, **known)
    rows = [range(config.batch)]
    inputs = modules.draw(source, progress.rows(rows[0], 0))
    with FlopCounterMode(display=False) as counter, computing(trained.device, "float32"):
        modules(**inputs)[0].backward()
    share = work(trained, progress, source, rows)["mfu"]
    peak = matmul_speed(trained.device, "float32")
    assert share * peak == pytest.approx(counter.get_total_flops(), rel=1e-9) and share > 0


def test_clips_are_encoded_once_for_all_stages(tmp_path, monkeypatch):
    """The painter asks for four of them, the planner for eight."""
    asked = []

    def recorded(run, world):
        memory = clips_in_memory(run, world)
        for kind, encode in memory._encode.items():
            memory._encode[kind] = lambda x, kind=kind, encode=encode: (
                asked.extend((kind, i) for i in x) or encode(x)
            )
        return memory

    monkeypatch.setattr(train, "clips_in_memory", recorded)
    monkeypatch.setattr("plumbing.cache.CHUNK", 4)
    settings = [f"stages.{s}.steps=1" for s in ORDER] + ["stages.latent.clips=4"]
    run = Run.create(tmp_path, micro(*settings))
    train.train(run, RECIPE, few(run), seed=0)
    assert len(asked) == len(set(asked))
    assert {i for kind, i in asked if kind == "features"} == set(range(8))
    assert {i for kind, i in asked if kind == "latents"} == set(range(4))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such settings")
def test_freed_memory_stays_with_the_process():
    """Where blocks of this size come as new pages by default, they need none any more."""
    code = """
import resource, sys, torch
from plumbing.files import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def pages(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        several = [torch.ones(2**20) for _ in range(8)]
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages(3)
print(pages(10))
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # the default at the start
    found = [
        subprocess.run(
            [sys.executable, "-c", code, how], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for how in ("keep", "as it is")
    ]
    kept, usual = (int(x.stdout) for x in found)
    assert kept < usual / 10, (kept, usual)


def test_hidden_pixels_are_learned_from_pieces_of_clips_too():
    config = override(tiny_long(), ["encoder.learns=hidden"])
    hiding = learner(config, "encoder")
    inputs = hiding.draw(World(config.data).shorter(4), Rows(range(2), 0, "encoder", 0))
    assert hiding(**inputs)[0].isfinite()


def test_the_curves_of_a_run_without_a_line_are_not_drawn(tmp_path):
    """Ctrl-C in the first steps, then fewer of them: the stage is done without a line."""
    PLOT(Metrics(tmp_path, "vae", 0))
    (tmp_path / "metrics.jsonl").touch()
    PLOT(Metrics(tmp_path, "vae", 0))
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("step, then", [(20, "up to it and then down"), (300, "down from there")])
def test_a_changed_schedule_says_where_the_rate_goes(step, then):
    config = override(tiny(), ["stages.latent.warmup=100", "stages.latent.steps=1000"])
    assert changed_schedule(config.stages.latent, step, 500).endswith(then)


def test_the_planners_tokens_are_what_its_network_sees():
    config = override(tiny(), ["semantic.patch=2"])
    planner = learner(
        config, "semantic", compressor=Compressor(config.encoder.dim, config.compressor)
    )
    assert planner.tokens == math.prod(config.plan_grid()) // 4
