"""Kill training at random moments, start it again until it is done; compare with a calm run.

    python benchmarks/kills.py --kills 50            # every stage, SIGKILL
    python benchmarks/kills.py --kills 50 --stage vae --seed 1
    python benchmarks/kills.py --preset wan_tiny --dit FOLDER --set latent.train=lora

Weights (EMA), the final training state (weights, EMA, optimizer states) and metrics.jsonl must be
the same, bit for bit, but for what a clock says. The run is the preset with fewer steps of
smaller batches, a state every three steps and a line of metrics every two.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from safetensors.torch import load_file

from config import preset
from parts import placed
from plumbing.fields import add_set_flag, command_line
from run import Run
from settings import Config, override
from stages import ORDER
from toy.world import World
from wan import describe_transformer

CLOCK = ("seconds", "clips_s", "tokens_s", "mfu")
SETTINGS = [f"stages.{s}.{f}" for s in ORDER for f in ("steps=24", "batch=4", "clips=16")]


class Few(World):
    """The first sixteen clips."""

    def __len__(self) -> int:
        return 16


def train_once(path: Path, config: Config, stage: str, delay: float | None):
    """In a process of its own: train a stage; be killed `delay` seconds after the start."""
    import train
    from plumbing.metrics import Metrics

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train.LOG_EVERY, train.SAVE_EVERY = 2, 3
    train.preview = lambda *_: None
    Metrics.plot = lambda _: None
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if delay is not None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    run = Run.create(path, config)
    train.train(run, [stage], Few(config.data), seed=0)


def content(run: Run, stage: str) -> tuple:
    """Return all that must be the same: weights, state, metrics."""
    state = run.load_state(stage)
    del state["seconds"]
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    lines = [{k: v for k, v in x.items() if k not in CLOCK} for x in lines if x["stage"] == stage]
    return load_file(run.weights_file(stage)), state, lines


def equal(one, other) -> bool:
    """Compare nests of dicts, lists and tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def undisturbed(folder: Path, config: Config, stages, start) -> tuple[Run, dict[str, float]]:
    """Train the stages without a kill; return the run and the seconds that each took."""
    seconds = {}
    for stage in stages:
        begun = time.perf_counter()
        assert start(folder, config, stage, None) == 0
        seconds[stage] = time.perf_counter() - begun
    return Run.open(folder), seconds


def main():
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each stage, at least")
    parser.add_argument("--stage", choices=ORDER, nargs="+", default=ORDER)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dit", help="the transformer that the preset wan_tiny starts from")
    add_set_flag(parser)
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(*arguments) -> int:
        process = context.Process(target=train_once, args=arguments, daemon=True)
        process.start()
        process.join()
        return process.exitcode

    config = preset(args.preset)
    parts = placed(config, {"dit": describe_transformer(args.dit)} if args.dit else {})
    config = override(config, ["dtype=float32", *SETTINGS, *args.settings], **parts)
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        needed = ORDER[: 1 + max(map(ORDER.index, args.stage))]  # not what comes after
        whole, seconds = undisturbed(Path(folder) / "whole", config, needed, start)
        for stage in args.stage:
            kills = rounds = same = 0
            expected = content(whole, stage)
            latest = 1.2 * seconds[stage]  # so that a stage can end, however slow its start
            while kills < args.kills:  # a round: killed again and again until the stage is done
                path = Path(folder) / f"{stage}-{rounds}"
                run = Run.create(path, config)
                for need in run.needs(stage):
                    shutil.copy(whole.weights_file(need), path)
                while (code := start(path, config, stage, rng.uniform(0.1, latest))) != 0:
                    if code != -signal.SIGKILL:
                        sys.exit(f"{stage}: ended with {code}")
                    kills += 1
                clean = not [*path.rglob(".*.tmp")]  # what kills leave behind is swept away
                good = equal(content(run, stage), expected) and clean
                same, rounds = same + good, rounds + 1
                failed += not good
            print(
                f"{stage}: killed {kills} times in {rounds} runs; {same} of {rounds} are the same"
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
