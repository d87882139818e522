"""One GPU in eight minutes: how close to its matmul peak everything runs.

    python benchmarks/gpu.py                     # a table and benchmarks/gpu.json
    python benchmarks/gpu.py --parts peak step   # these parts alone
    python benchmarks/gpu.py --toy               # toy sizes, also on a CPU: does it run?

Needs torch 2.11 or newer and the core packages; no weights, which are random here, no data and no
network. Each part is a process of its own with a limit of time: what it has found until then is
kept, and the others do not suffer. bfloat16; the painter of `step` is compiled.

    same     a gradient of `tiny`: on this device, recomputed, against the CPU's
    peak     matrix products, the yardstick of all shares
    step     a training step of the `paper` painter, real shapes, with recomputation and without
    windows  3D attention of one layer, forward and backward: windows of 5 s against full attention
    loop     the share of time in which the device has nothing to do, in the loop of `small`
    small    `small` for a fiftieth of its steps, on a sixteenth of its clips, and its score
    sample   5 s of `paper`: seconds of an Euler step of planner and painter, times their number
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import Tensor, nn

import swin
from benchmarks.timing import (
    in_turn,
    machine,
    markdown,
    matmul_peak,
    seconds_of,
    told,
    wait,
    write_json,
)
from config import paper, small, tiny
from evaluate import Evaluation
from model import DiT, attention
from plumbing.cache import Memory
from plumbing.device import computing, default_device, matmul_speed, moved, recomputed
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command
from plumbing.processes import Team
from plumbing.progress import Progress
from plumbing.seeds import Rows
from run import Run
from sample import paint_latents, sample_plans
from semantic import Compressor
from settings import Config, override
from stages import ORDER, RECIPE, Painter, work
from swin import Stream, fitting_window
from toy.world import World
from train import batches, begin, one_step, train

LIMITS = {  # seconds
    "same": 20,
    "peak": 20,
    "step": 140,
    "windows": 30,
    "loop": 80,
    "small": 140,
    "sample": 50,
}
TOY = [  # of a second of 16 x 16 pixels
    *("data.frames=8", "vae.width=8", "encoder.dim=32", "encoder.blocks=1", "sample.steps=2"),
    *(f"data.{side}=16" for side in ("height", "width", "semantic_height", "semantic_width")),
    *(f"{dit}.{size}" for dit in ("latent", "semantic") for size in ("width=32", "heads=2")),
    *(f"stages.{s}.{f}" for s in ORDER for f in ("steps=100", "batch=2", "clips=128")),
]
Found = Iterator[dict[str, object]]  # "what", "value", "unit"


def row(what: str, value: float | str, unit: str = "") -> dict[str, object]:
    return {"what": what, "value": value, "unit": unit}


# --- runs without weights -----------------------------------------------------------------------


def sizes(toy: bool, of: Config, *settings: str) -> Config:
    """Return a preset with a part's own settings, or a toy with these."""
    return override(tiny() if toy else of, [*(TOY if toy else ()), "dtype=bfloat16", *settings])


def random_clips(config: Config, clips: int = 16) -> Memory:
    """Return encoded clips of a configuration's shapes, of random numbers."""
    shapes = config.encoded.items()
    draw = {k: lambda at, shape=shape: torch.randn(len(at), *shape) for k, shape in shapes}
    return Memory(clips, lambda at: [""] * len(at), draw)


def started(run: Run, stage: str, source) -> tuple[Progress, Iterator, list[range]]:
    """Return a stage at its first step, its batches, and the rows of a batch."""
    team, config = Team(), getattr(run.config.stages, stage)
    progress = begin(run, stage, source, {}, 0, None, team)
    rows = team.rows(config.batch, config.accumulate)
    return progress, batches(run, progress, source, rows), rows


# --- the parts ----------------------------------------------------------------------------------


def same(device: torch.device, toy: bool) -> Found:
    """The gradient of tiny's painter in float32: this device's, also recomputed, and a CPU's."""
    config, cpu = override(sizes(toy, tiny()), dtype="float32"), torch.device("cpu")
    torch.manual_seed(0)
    painter = Painter(config)
    for parameter in painter.parameters():
        nn.init.normal_(parameter, std=0.05)  # those that begin at zero would hide much
    inputs = painter.draw(random_clips(config), Rows(range(4), 0))

    def gradient(where: torch.device, run_block: Callable) -> Tensor:
        painter.to(where).zero_grad()
        painter["dit"].run_block = run_block
        with computing(where, "float32"):
            painter(**moved(inputs, where))[0].backward()
        return torch.cat([p.grad.double().flatten().cpu() for p in painter.parameters()])

    plain = gradient(cpu, nn.Module.__call__)
    for name, found in (
        ("as it is", gradient(device, nn.Module.__call__)),
        ("recomputed", gradient(device, recomputed)),
    ):
        difference = float((found - plain).norm() / plain.norm())
        yield row(f"tiny's gradient, {name}: relative difference", 1e6 * difference, "millionths")


def peak(device: torch.device, toy: bool) -> Found:
    """Matrix products."""
    for dtype in ("float32", "bfloat16"):
        best = matmul_peak(device, dtype, sizes=(256,) if toy else ())
        yield row(f"{dtype} matrix products", best / 1e12, "TFLOP/s")


def step(device: torch.device, toy: bool) -> Found:
    """A training step of the painter; where memory does not suffice, with fewer blocks."""
    best = matmul_peak(device, "bfloat16", sizes=(256,) if toy else ())
    for recompute, depths in ("true", (30, 15, 8, 4)), ("false", (8, 4)):
        for depth in (1,) if toy else depths:
            settings = [
                *(f"latent.depth={depth}", "stages.latent.batch=1", "stages.latent.accumulate=1"),
                *(f"stages.latent.compile={not toy}", f"stages.latent.checkpoint={recompute}"),
            ]
            config = sizes(toy, paper(), *settings)
            name = f"{depth} blocks, {'with' if recompute == 'true' else 'no'} recomputation"
            gc.collect()  # the last one's
            torch.cuda.empty_cache()
            try:
                yield from one_size(Run(Path("none"), config, device), name, best)
                break
            except torch.OutOfMemoryError:
                yield row(f"painter, {name}", "out of memory")


def one_size(run: Run, name: str, best: float) -> Found:
    """Time the steps of a painter of one size; best: the peak, FLOP/s."""
    source, cuda = random_clips(run.config), run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    progress, steps, rows = started(run, "latent", source)
    speed = matmul_speed(run.device, run.config.dtype)
    flops = work(run, progress, source, rows)["mfu"] * speed
    times = []
    for batch in islice(steps, 5):
        times.append(seconds_of(lambda: one_step(run, progress, batch, Team()), run.device))  # noqa: B023
        progress.step += 1
    middle = statistics.median(times[2:])
    tokens = progress.modules.tokens
    yield row(f"painter, {name}: first step, with compiling", times[0], "s")
    yield row(f"painter, {name}: a step of {tokens:,} tokens", middle, "s")
    yield row(f"painter, {name}: share of the peak", 100 * flops / middle / best, "%")
    if cuda:
        yield row(f"painter, {name}: memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def windows(device: torch.device, toy: bool) -> Found:
    """3D attention of one layer at 240 x 416 pixels: 390 tokens a frame, 120 of the plan."""
    config, (frame, plan) = paper().latent, (4, 4) if toy else (390, 120)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # for toys
    rates = config.rate, config.context_rate
    window = float(fitting_window(rates, 5.0))
    for tokens in (256, 512) if toy else [2**k for k in range(13, 20)]:
        seconds = round(tokens / (rates[0] * frame + rates[1] * plan) * rates[1]) / rates[1]
        streams = [
            Stream(round(seconds * rate), each, rate)
            for rate, each in zip(rates, (frame, plan), strict=True)
        ]
        total = sum(stream.frames * stream.tokens for stream in streams)
        shape = 3, 1, config.heads, total, config.width // config.heads
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        works = {}
        for kind in (window, None) if tokens < 2**18 else (window,):
            groups = swin.windows(streams, kind, True, device)
            attend = partial(swin.windowed_attention, groups=groups, attend=attention)
            name = f"windows of {kind:g} s" if kind else "full"
            works[name] = partial(there_and_back, attend, qkv)
        for name, times in in_turn(works, 3, device).items():
            yield row(f"attention, {total:,} tokens, {name}", 1000 * statistics.median(times), "ms")


def there_and_back(attend: Callable, qkv: Tensor):
    """Do an attention forward and backward. qkv: (3, B, heads, N, d)."""
    attend(*qkv.unbind()).sum().backward()


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """Return how long at least one of these (start, end) lasts."""
    total, until = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def loop(device: torch.device, toy: bool) -> Found:
    """The device in the loop of train.py: is there always something for it to do?"""
    kind = getattr(torch.autograd.DeviceType, device.type.upper())
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    config, count = sizes(toy, small()), 2 if toy else 10  # steps that are watched
    for stage in ("vae", "encoder", "latent"):
        run = Run(Path("none"), config, device)
        source = random_clips(config, 256) if stage == "latent" else World(config.data, "train")
        progress, steps, _ = started(run, stage, source)
        for number, batch in enumerate(islice(steps, 5 * count)):
            if number == 4 * count:  # those that were drawn before the first step are used up
                profiler = torch.profiler.profile(activities=[activity])
                profiler.start()
                wait(device)
                start = time.perf_counter()
            one_step(run, progress, batch, Team())
            progress.step += 1
        wait(device)
        whole = time.perf_counter() - start
        profiler.stop()
        spans = [
            (event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in profiler.events()
            if event.device_type == kind
        ]
        yield row(f"small, {stage}: a step", 1000 * whole / count, "ms")
        yield row(f"small, {stage}: idle", 100 * (1 - busy_seconds(spans) / whole), "%")


def small_score(device: torch.device, toy: bool) -> Found:
    """Train `small` in short, and score it: a fixed amount of work."""
    config = sizes(toy, small())
    settings = [f"stages.{s}.steps={getattr(config.stages, s).steps // 50}" for s in RECIPE]
    settings += [f"stages.{s}.clips={config.stages.latent.clips // 16}" for s in RECIPE]
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", override(config, settings))
        run.device = device
        for stage in RECIPE:
            start = time.perf_counter()
            train(run, [stage], World(run.config.data, "train"), 0)
            seconds = time.perf_counter() - start
            steps = getattr(run.config.stages, stage).steps
            yield row(f"small, {stage}: {steps} steps and what they need", seconds, "s")
        test = Evaluation(run, "test", 4 if toy else 128, 0)
        way = partial(test.sampled, options=run.config.sample)
        scores = test.scores(test.videos(way, "text -> plan -> video"))
        for name in ("exact", "number", "colour", "shape", "motion"):
            yield row(f"small, after a fiftieth of its steps: {name}", scores[name], "%")


def sample(device: torch.device, toy: bool) -> Found:
    """Seconds of 5 s of video: a few Euler steps, with guidance, times their number."""
    config = sizes(toy, paper())
    run, frames = Run(Path("none"), config, device), config.data.frames
    text = torch.randn(1, config.text.words, config.text.dim, device=device)
    run.compressor = Compressor(config.encoder.dim, config.compressor).to(device)
    with device:  # a CPU takes long for so many random weights
        run.planner = DiT(config.semantic).eval()
    plan = torch.randn(1, config.compressor.channels, *config.plan_grid(frames), device=device)
    works = {"planner": lambda n: sample_plans(run, text, [0], frames, n)}
    works["painter"] = lambda n: paint_latents(run, text, [0], plan, frames, n)
    whole = 0.0
    for name, euler in works.items():
        if name == "painter":
            del run.planner
            with device:
                run.painter = DiT(config.latent).eval()
        euler(replace(config.sample, steps=1))  # warms up
        seconds = seconds_of(lambda: euler(replace(config.sample, steps=2)), device) / 2  # noqa: B023
        whole += seconds * config.sample.steps
        yield row(f"sample, {name}: an Euler step", seconds, "s")
    what = f"sample: {config.data.seconds:g} s, planner and painter of {config.sample.steps} steps"
    yield row(what, whole, "s")
    run.let_go()
    try:
        seconds = decoding(config, device, toy)
    except ImportError:
        yield row("sample, Wan's VAE", "diffusers is not installed")
    else:
        yield row("sample, Wan's VAE: decoding", seconds, "s")


def decoding(config: Config, device: torch.device, toy: bool) -> float:
    """Return the seconds that Wan's VAE takes for a video's latents; ImportError without it."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**({"base_dim": 16} if toy else {})).to(device).eval()
    latents = torch.randn(1, 16, *config.latent_grid(), device=device)

    def decode() -> Tensor:
        with torch.no_grad(), computing(device, "bfloat16"):
            return vae.decode(latents).sample

    decode()
    return seconds_of(decode, device)


PARTS = {
    "same": same,
    "peak": peak,
    "step": step,
    "windows": windows,
    "loop": loop,
    "small": small_score,
    "sample": sample,
}


# --- the command --------------------------------------------------------------------------------


def part_alone(args: argparse.Namespace):
    """In a process of its own: do one part, and write each row as soon as it is known."""
    found = []
    for each in PARTS[args.inside](default_device(), args.toy):
        found.append(each)
        write_json(args.out, found)


def within(limit: float, name: str, toy: bool) -> list[dict[str, object]]:
    """Return what a part finds within its limit of seconds, and how it ended, if not well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, __file__, "--inside", name, "--out", str(out)]
        with open(Path(folder) / "said", "w+") as said:
            process = subprocess.Popen(
                words + ["--toy"] * toy, stdout=said, stderr=said, start_new_session=True
            )
            end = []
            try:
                if code := process.wait(limit):
                    said.seek(0)
                    reason = (said.read().strip() or f"exit code {code}").splitlines()[-1]
                    end = [row(name, f"failed: {reason[:200]}")]
            except subprocess.TimeoutExpired:
                end = [row(name, f"stopped after {limit:g} s")]
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
        return [*(json.loads(out.read_text()) if out.exists() else []), *end]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--toy", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.toy and default_device().type != "cuda":
        raise UserError("this needs a CUDA device; --toy runs without")
    check_target(args.out)
    return args


def main():
    args = arguments()
    if args.inside:
        return part_alone(args)
    where, found = machine(default_device()), {}
    print(told(where))
    for name in args.parts:
        start = time.perf_counter()
        found[name] = within(600 if args.toy else LIMITS[name], name, args.toy)
        print(
            f"\n{name}, {time.perf_counter() - start:.0f} s\n\n{markdown(found[name])}", flush=True
        )
        write_json(args.out, {**where, "toy": args.toy, "parts": found})


if __name__ == "__main__":
    command(main)
