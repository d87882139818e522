"""Where time goes: in a training step of each stage, in encoding clips, in a sample.

    python benchmarks/pipeline.py                    # tables and benchmarks/pipeline.json
    python benchmarks/pipeline.py --preset tiny_long --steps 400

The program's own functions are put on a clock (clock.py) while it does what it always does: the
loop of train.py over 200 steps after the first 10 (so with one saved state and ten lines of
metrics), the clips that are encoded before the painter learns, a folder of videos that becomes a
cache, and `sample.py` from the shell to the finished file. That command is compared with
`python -c "import torch"`, in turn: nothing that uses torch can be faster. Torch's own profiler
tells the painter's operators by kind; it slows small ones down.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import encode
import train
from benchmarks.clock import Clock
from benchmarks.timing import in_turn, machine, markdown, seconds_of, target, told, write_json
from config import PRESETS, preset
from encode import clips_in_memory, encode_folder
from plumbing.device import computing, default_device, moved
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command
from plumbing.metrics import Reporter
from plumbing.processes import Team
from plumbing.progress import Progress
from plumbing.video import write_video
from run import Run
from settings import override
from stages import RECIPE, Painter, Planner
from toy.encoder import EncoderLearner, TinyEncoder
from toy.text import HashText
from toy.vae import TinyVAE, VAELearner
from toy.world import World

ROOT = Path(__file__).parents[1]
WARM = 10  # steps of a stage before the clock starts
OTHERS = "other operators: norms, activations, rotations"
KINDS = {  # of operators -> their names in torch
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "mkldnn_linear"),
    "softmax": ("softmax", "softmax_backward_data"),
    "copies and casts": ("copy", "cat", "clone", "to_copy", "index_select", "index_copy"),
}
PROMPT = "a red circle moves left and a blue square grows"


def watch_training(clock: Clock):
    """Put what a step of train.py consists of on a clock."""
    for kind in (VAELearner, EncoderLearner, Painter, Planner):
        clock.watch(kind, "forward", "forward")
        clock.watch(kind, "draw", "drawing the next batch")  # with a GPU other processes do
    clock.watch(train, "batches", "waiting for the next batch")
    clock.watch(train, "measure_plans", "statistics of z_sem")
    clock.watch(torch.Tensor, "backward", "backward")
    clock.watch(torch.nn.utils, "clip_grad_norm_", "norm of the gradient")
    clock.watch(train, "update_ema", "EMA")
    clock.watch(Reporter, "after_step", "logging")
    clock.watch(Progress, "save", "saving states")
    register_optimizer_step_pre_hook(lambda *_: clock.begin("optimizers"))  # whosever they are
    register_optimizer_step_post_hook(lambda *_: clock.end())


def watch_encoding(clock: Clock):
    """Put what encodes clips, from memory or from a folder, on a clock."""
    clock.watch(World, "batch", "drawing clips")
    clock.watch(World, "semantic_video", "drawing clips")
    clock.watch(TinyVAE, "posterior", "VAE")
    clock.watch(TinyEncoder, "encode", "semantic encoder")
    clock.watch(HashText, "encode", "text encoder")
    clock.watch(encode, "clips_of", "reading videos")
    clock.watch(encode, "start_cache", "comparing with the cache")
    clock.watch(encode, "write_entry", "writing the cache")


class Counted(Team):
    """A team of one that counts steps: the clock starts after the first ones.

    `any` is what the loop asks once a step.
    """

    def __init__(self, clock: Clock, steps: int):
        super().__init__()
        self.clock, self.steps, self.step = clock, steps, 0

    def any(self, flag: bool) -> bool:
        self.step += 1
        if self.step == WARM:
            self.clock.start()
        if self.step == WARM + self.steps:
            self.clock.book()
            self.found = Counter(self.clock.seconds)
        return super().any(flag)


def steps_of_stages(run: Run, steps: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Train each stage for some steps; return {stage: {what: seconds of a step}}."""
    found = {}
    for stage in RECIPE:
        team = Counted(clock, steps)
        train.train(run, [stage], World(run.config.data, "train"), 0, team)
        found[stage] = {what: seconds / steps for what, seconds in team.found.items()}
    return found


def on_the_clock(clock: Clock, work: Callable, pieces: int) -> dict[str, float]:
    """Return the seconds of a work by label, for each of so many pieces."""
    clock.start()
    work()
    clock.book()
    return {what: seconds / pieces for what, seconds in clock.seconds.items()}


def encoded(run: Run, clips: int, clock: Clock) -> dict[str, float]:
    """Return where the time of a clip goes that is drawn and encoded before the painter learns."""
    memory = clips_in_memory(run, World(run.config.data, "train"))
    kinds = "latents", "features", "text"
    return on_the_clock(clock, lambda: memory.first(clips, kinds), clips)


def precomputed(run: Run, videos: int, folder: Path, clock: Clock) -> dict[str, float]:
    """Return where the time of a video goes that `prepare.py precompute` encodes into a cache."""
    made = World(run.config.data, "train").batch(range(videos))
    (folder / "videos").mkdir()
    for k, (video, caption) in enumerate(zip(made.video, made.captions, strict=True)):
        file = folder / "videos" / f"{k}.webp"
        write_video(file, [video], run.config.data.fps)
        file.with_suffix(".txt").write_text(caption)
    _ = run.vae, run.encoder  # loaded before the clock starts
    cache = folder / "cache"
    return on_the_clock(clock, lambda: encode_folder(run, folder / "videos", cache), videos)


def operators(run: Run, steps: int) -> dict[str, float]:
    """Return where the time of the painter's forward and backward goes, by kind of operator."""
    source = clips_in_memory(run, World(run.config.data, "train")).first(64)
    team, config = Team(), run.config.stages.latent
    progress = train.begin(run, "latent", source, {}, 0, None, team)
    inputs = progress.modules.draw(source, progress.rows(range(config.batch), 0))
    inputs = moved(inputs, run.device)

    def step():
        with computing(run.device, run.config.dtype):
            loss, _ = progress.wrapped(**inputs)
        loss.backward()
        progress.modules.zero_grad()

    for _ in range(WARM):
        step()
    with torch.profiler.profile() as profiler:
        whole = sum(seconds_of(step, run.device) for _ in range(steps))
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").removesuffix("_backward")
        kind = next((k for k, names in KINDS.items() if name.strip("_") in names), OTHERS)
        device = event.self_device_time_total if run.device.type == "cuda" else 0
        found[kind] += (device or event.self_cpu_time_total) / 1e6 / steps
    found["between operators"] = max(0.0, whole / steps - found.total())
    return dict(found)


def python(*words: str | Path) -> str:
    """Run Python in a process of its own; return what it prints. UserError if it fails."""
    ended = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if ended.returncode:
        raise UserError(f"python {' '.join(map(str, words))}: {ended.stderr.strip()[-300:]}")
    return ended.stdout


def sampled(rounds: int, warm: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return where the time of sample.py goes, and the seconds of whole commands, medians.

    The shipped weights; from the shell to the finished file.
    """
    words = [PROMPT, "--out", folder / "x.webp"]
    parts: list[dict[str, float]] = []

    def on_clock():
        start = time.perf_counter()
        found = json.loads(python("benchmarks/clock.py", *words).splitlines()[-1])
        whole = time.perf_counter() - start
        parts.append({"start and end of Python": whole - sum(found.values()), **found})

    works = {
        'python -c "import torch"': lambda: python("-c", "import torch"),
        "python sample.py": lambda: python("sample.py", *words),
        "on the clock": on_clock,
    }
    times = in_turn(works, rounds, torch.device("cpu"), warm)
    inside = {name: statistics.median(x[name] for x in parts[warm:]) for name in parts[-1]}
    return inside, {name: statistics.median(x) for name, x in times.items()}


# --- what comes out -----------------------------------------------------------------------------


def shares(found: dict[str, dict[str, float]], unit: str) -> str:
    """Return {column: {what: seconds}} as a table of percent, under the milliseconds of all."""
    names = dict.fromkeys(name for column in found.values() for name in column)
    names = sorted(names, key="rest".__eq__)
    whole = {column: sum(parts.values()) for column, parts in found.items()}
    rows = [{"": unit, **{column: 1000 * seconds for column, seconds in whole.items()}}]
    for name in names:
        cells = {c: f"{100 * x.get(name, 0) / whole[c]:.1f} %" for c, x in found.items()}
        rows.append({"": name, **cells})
    return markdown(rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="tiny", choices=[x for x in PRESETS if x != "paper"])
    parser.add_argument("--steps", type=int, default=200, help="of each stage on the clock")
    parser.add_argument("--clips", type=int, default=512, help="encoded; as videos, an eighth")
    parser.add_argument("--rounds", type=int, default=7, help="of the commands in turn")
    parser.add_argument("--toy", action="store_true", help="few of everything: does it run?")
    parser.add_argument("--out", type=Path, help="beside this file if not given")
    args = parser.parse_args()
    args.out = args.out or target("pipeline.json", args.toy)
    if args.toy:
        args.steps, args.clips, args.rounds = 2, 64, 1
    if min(args.steps, args.rounds) < 1 or args.clips < 64:
        raise UserError("--steps and --rounds: at least 1; --clips: at least 64")
    check_target(args.out)
    return args


def main():
    args, device, clock = arguments(), default_device(), Clock()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = machine(device)
    print(told(words))
    settings = [f"stages.{stage}.steps={WARM + args.steps}" for stage in RECIPE]
    settings += [f"stages.{stage}.clips={args.clips}" for stage in RECIPE]
    if args.toy:
        settings += ["sample.steps=1", *(f"stages.{stage}.batch=4" for stage in RECIPE)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inside, commands = sampled(args.rounds, 0 if args.toy else 1, folder)
        run = Run.create(folder / "run", override(preset(args.preset), settings))
        watch_training(clock)
        steps = steps_of_stages(run, args.steps, clock)
        kinds = operators(run, 2 if args.toy else 10)
        watch_encoding(clock)
        clips = {
            "a clip of the world": encoded(run, args.clips, clock),
            "a video of a folder": precomputed(run, max(8, args.clips // 8), folder, clock),
        }
    print(f"\n{args.preset}, {run.config.dtype}\n\n{shares(steps, 'a step, ms')}")
    print(f"\n{shares({'latent, forward and backward': kinds}, 'ms')}")
    print(f"\n{shares(clips, 'ms')}\n\n{shares({'sample.py': inside}, 'whole, ms')}\n")
    bare, ours = (commands[name] for name in ('python -c "import torch"', "python sample.py"))
    print(f'python -c "import torch": {bare:.2f} s; python sample.py: {ours - bare:.2f} s more')
    found = {
        "steps": steps,
        "operators": kinds,
        "clips": clips,
        "sample": inside,
        "commands": commands,
    }
    write_json(args.out, {**words, "preset": args.preset, "dtype": run.config.dtype, **found})


if __name__ == "__main__":
    command(main)
