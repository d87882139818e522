"""The benchmarks still fit the code, and what turns seconds into judgements is right.

What is measured here means nothing. `.ci/run` runs each script as a whole at toy size.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import micro

from benchmarks import gpu, length, pipeline, speedrun, step, timing
from benchmarks.clock import Clock
from plumbing.files import UserError
from run import Run
from stages import RECIPE

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def called(script: str, *words: object) -> str:
    """Run a benchmark in a process of its own; return what it prints."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr[-2000:]
    return ended.stdout


# --- what they share ----------------------------------------------------------------------------


def test_works_are_done_in_turn_and_the_first_round_is_not_counted():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    times = timing.in_turn(works, 2, CPU)
    assert done == [*"abcabcabc"]
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 2)


def test_the_peak_is_that_of_a_product():
    size, best = 256, timing.matmul_peak(CPU, "float32", rounds=3, sizes=(256,))
    a = torch.randn(size, size)
    assert best > 0.02 * 2 * size**3 / timing.seconds_of(lambda: a @ a, CPU)
    assert best < 1e14


def test_a_clock_counts_what_is_inside_a_label_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Work:
        def inner(self):
            now[0] += 1

        def outer(self):
            now[0] += 2
            self.inner()
            now[0] += 4

        def items(self):
            for k in range(2):
                now[0] += 8
                yield k

    clock = Clock()
    for name in ("inner", "outer", "items"):
        clock.watch(Work, name, name)
    work = Work()
    work.outer()
    for _ in work.items():
        now[0] += 32
        work.inner()
    now[0] += 128
    clock.book()
    assert clock.seconds == {"inner": 3, "outer": 6, "items": 16, "rest": 64 + 128}
    with pytest.raises(AttributeError):
        clock.watch(Work, "gone", "gone")


# --- each script --------------------------------------------------------------------------------


def test_the_networks_of_a_step_have_the_same_tokens():
    pytest.importorskip("diffusers")
    case = step.Case(32, 1, 2, 2, 4, "float32")
    blocks = {}
    for name, make in step.NETWORKS.items():
        network, inputs = make(case)
        seen = []
        blocks_of = next(m for m in network.modules() if isinstance(m, torch.nn.ModuleList))
        blocks_of[0].register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape))
        step.Task(network)(**inputs)[0].backward()
        blocks[name] = tuple(seen[0])
    assert set(blocks.values()) == {(2, case.tokens, 32)}, blocks


def test_flops_of_torchs_encoder_are_those_of_the_formula():
    case = step.Case(32, 1, 2, 2, 4, "float32")
    network, inputs = step.torch_encoder(case)
    counted = step.count_flops(step.Task(network).to("meta"), inputs)
    rows, D, N = case.batch * case.tokens, case.width, case.tokens
    products = 2 * rows * 12 * D**2 + 2 * 2 * rows * N * D  # projections and FFN; attention
    assert counted == 3 * products  # forward, and backward to inputs and to weights


def test_a_step_at_toy_size(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["step.py", "--toy", "--out", str(tmp_path / "step.json")])
    monkeypatch.setattr(step, "default_device", lambda: CPU)
    step.main()
    assert "times the FLOP/s of" in capsys.readouterr().out
    found = json.loads((tmp_path / "step.json").read_text())
    names = {*step.NETWORKS, "ours, own optimizer"}
    assert {row["network"] for row in found["rows"]} == names
    assert (tmp_path / "step.png").stat().st_size
    for row in found["rows"]:
        assert row["share"] == pytest.approx(
            row["flops"] / row["step"] / found["peaks"][row["dtype"]]
        )


def test_the_parts_of_steps_and_of_encoding(tmp_path, monkeypatch):
    """What is put on the clock is there, and is called where we say so."""

    def watch(clock, owner, name, label):  # undone in the end
        monkeypatch.setattr(owner, name, clock.watched(getattr(owner, name), label))

    handles, clock = [], Clock()
    monkeypatch.setattr(Clock, "watch", watch)
    for name in ("register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"):
        register = getattr(pipeline, name)
        register = lambda hook, register=register: handles.append(register(hook))  # noqa: E731
        monkeypatch.setattr(pipeline, name, register)
    steps = [f"stages.{stage}.steps={pipeline.WARM + 2}" for stage in RECIPE]
    run = Run.create(tmp_path / "run", micro(*steps))
    pipeline.watch_training(clock)
    try:
        found = pipeline.steps_of_stages(run, 2, clock)
    finally:
        for handle in handles:
            handle.remove()
    parts = {"forward", "backward", "norm of the gradient", "optimizers", "EMA", "logging"}
    parts |= {"waiting for the next batch", "drawing the next batch"}  # in turn, on a CPU
    for stage in RECIPE:
        assert all(found[stage][name] > 0 for name in parts), (stage, found[stage])
    kinds = pipeline.operators(run, 1)
    assert kinds.keys() == {*pipeline.KINDS, pipeline.OTHERS, "between operators"}
    assert all(kinds[name] > 0 for name in (*pipeline.KINDS, pipeline.OTHERS))
    pipeline.watch_encoding(clock)
    clips = pipeline.encoded(run, 64, clock), pipeline.precomputed(run, 8, tmp_path, clock)
    for clip in clips:
        assert all(clip[name] > 0 for name in ("VAE", "semantic encoder", "text encoder")), clip
    assert clips[0]["drawing clips"] > 0
    assert all(clips[1][name] > 0 for name in ("reading videos", "writing the cache"))


def test_the_parts_of_a_sample(tmp_path):
    said = called("clock", "a red circle grows", "--out", tmp_path / "x.webp", "--steps", 1)
    found = json.loads(said.splitlines()[-1])
    parts = ("import of torch", "other imports", "opening the run", "loading weights", "planner")
    parts += ("text encoder", "painter", "VAE decoder", "writing the video", "drawing the sheet")
    assert all(found[name] > 0 for name in parts), found
    assert (tmp_path / "x.webp").exists()


def test_shares_add_up_to_the_whole():
    text = pipeline.shares({"x": {"rest": 0.25, "a": 0.5, "b": 0.25}}, "ms")
    assert text.splitlines()[2:] == [
        "| ms | 1,000 |",
        "| a | 50.0 % |",
        "| b | 25.0 % |",
        "| rest | 25.0 % |",
    ]


def test_growth_is_per_doubling():
    rows = [(1000, 1.0, 5), (2000, 2.0, 5), (8000, 32.0, 5)]
    assert length.growth(rows) == pytest.approx([2, 4])
    assert length.growth(rows, 2) == pytest.approx([1, 1]) and length.growth(rows[:1]) == []


def test_lengths_at_toy_size():
    found = length.measured(["windows forward"], [1024, 2048], 1, CPU)
    assert [row[0] for row in found["windows forward"]] == [960, 2112]
    assert all(seconds > 0 and memory >= 0 for _, seconds, memory in found["windows forward"])


def test_the_dearest_doubling_is_told():
    rows = [(1000, 1.0, 1), (2000, 2.0, 2), (8000, 12.5, 8)]
    assert "windows forward: at most 2.50 times per doubling" in length.table(
        {"windows forward": rows}
    )


def test_a_record_is_made_of_seconds_and_scores():
    row = {"seed": 0, "total": 100.0, "stages": {"vae": 60.0, "rest": 40.0}, "exact": 99.0}
    other = {"seed": 1, "total": 140.0, "stages": {"vae": 80.0, "rest": 60.0}, "exact": 97.5}
    where = {"machine": "m", "threads": 2, "peaks": {"float32": 3e11, "bfloat16": 2e12}}
    found = speedrun.record("abc", [row, other, row | {"seed": 2}], where)
    assert found["**total**"] == "**1 min 40 s**" and found["vae"] == "60"
    assert found["exact"] == "99.0, 97.5, 99.0" and found["seeds"] == "0, 1, 2"


@pytest.mark.parametrize("part", ["peak", "step", "windows", "sample"])  # the others take longer
def test_each_part_of_the_gpu_at_toy_size(part):
    rows = list(gpu.PARTS[part](CPU, True))
    assert rows and all(row["value"] or row["unit"] == "%" for row in rows), rows


def test_a_part_that_fails_or_takes_too_long_is_told():
    (row,) = gpu.within(60, "none", True)
    assert row["value"].startswith("failed: ") and "invalid choice" in row["value"]
    (row,) = gpu.within(0.1, "peak", True)
    assert row["value"] == "stopped after 0.1 s"


def test_idle_is_what_no_span_covers():
    assert gpu.busy_seconds([(0, 2), (1, 3), (5, 6), (5.2, 5.5)]) == 4


def test_a_gpu_is_needed_but_for_toys(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "default_device", lambda: CPU)
    with pytest.raises(UserError, match="--toy"):
        gpu.main()
