"""From nothing to videos, with the clock over everything: the seconds that a recipe takes.

    python benchmarks/speedrun.py                                # tiny, seeds 0, 1 and 2
    python benchmarks/speedrun.py --preset tiny_long --seeds 0
    python benchmarks/speedrun.py --against 1c7cdcd              # that commit's recipe, in turn

The clock starts before `python train.py --stage all`, in an empty folder, without compiled code of
earlier runs, and stops when `python sample.py` has written its videos. Then evaluate.py scores 512
prompts of clips that training has not seen (128 stories of tiny_long), off the clock. For each
seed the other commit, checked out in a temporary worktree, is timed right after ours: only times of
one machine and one hour make a ratio. The rows are for RECORDS.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.timing import machine, markdown, matmul_peak, told, write_json
from plumbing.device import default_device
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command

ROOT = Path(__file__).parents[1]
PRESETS = {"tiny": ("--tiny", 512), "tiny_long": ("--tiny-long", 128)}  # flag, prompts
TOY = [
    *("--steps", "2", "--set", "stages.latent.clips=64", "stages.semantic.clips=64"),
    *("vae.width=8", "sample.steps=2"),
]
VIDEOS = (
    "a red circle moves left",
    "a blue square grows",
    "a yellow cross moves up and a green triangle stays still",
    "a cyan circle shrinks and a magenta square moves down",
)


def call(tree: Path, folder: Path, *words: object) -> float:
    """Run one of a tree's commands and return its seconds; UserError if it fails.

    folder: where compiled code goes.
    """
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    environment = os.environ | {name: str(path) for name, path in caches.items()}
    environment["PYTHONPATH"] = str(tree)  # before what is installed
    words, start = [sys.executable, *map(str, words)], time.perf_counter()
    ended = subprocess.run(words, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise UserError(f"{' '.join(words[1:])} failed in {tree}")
    return time.perf_counter() - start


def stage_seconds(run: Path) -> dict[str, float]:
    """Return the seconds of each stage's training, as its last line of metrics tells."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["stage"]: line["seconds"] for line in lines}


def from_nothing(tree: Path, preset: str, seed: int, toy: bool, scored: bool) -> dict[str, object]:
    """Train, sample and perhaps score a recipe in a fresh folder: seconds and exact prompts."""
    flag, prompts = PRESETS[preset]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run, scores = folder / "run", folder / "scores.json"
        extra = TOY if toy else []
        training = call(
            tree, folder, "train.py", "--stage", "all", flag, "--seed", seed, "--out", run, *extra
        )
        sampling = call(
            tree, folder, "sample.py", *VIDEOS, "--run", run, "--out", folder / "x.webp"
        )
        stages = stage_seconds(run)
        rest = training - sum(stages.values())
        found = {
            "seed": seed,
            "total": training + sampling,
            "stages": {**stages, "rest": rest, "sampling": sampling},
        }
        if not scored:
            return found
        count = ["--prompts", 4 if toy else prompts, "--plans", "oracle", "--json", scores]
        long = ["--long"] if preset == "tiny_long" else []
        call(tree, folder, "evaluate.py", "--run", run, *count, *long)
        rows = json.loads(scores.read_text())["scores"]
    exact = {name: row["exact"] for name, row in rows.items()}
    found |= {
        "exact": next(value for name, value in exact.items() if "text -> plan" in name),
        "never shown": exact["never-shown combinations"],
        "oracle plan, no text": exact["oracle plan, no text"],
    }
    if long:
        found["story"] = next(r["story"] for name, r in rows.items() if "text -> plan" in name)
    return found


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check a commit out in a temporary worktree; UserError if there is none of that name."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        made = subprocess.run(
            [*git, "add", "--detach", str(tree), commit], capture_output=True, text=True
        )
        if made.returncode:
            raise UserError(f"--against {commit}: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def record(name: str, rows: list[dict], where: dict) -> dict[str, object]:
    """Return a line of RECORDS.md: seconds are medians over the seeds, scores those of each."""
    minutes, seconds = divmod(round(statistics.median(row["total"] for row in rows)), 60)
    parts = {k: statistics.median(row["stages"][k] for row in rows) for k in rows[0]["stages"]}
    listed = lambda key: ", ".join(f"{row[key]:.1f}" for row in rows)  # noqa: E731
    scores = [k for k in rows[0] if k not in ("seed", "total", "stages")]
    return {
        "date": f"{datetime.date.today()}",
        "commit": name,
        "machine": f"{where['machine']}, {where['threads']} threads",
        "GFLOP/s, float32 / bf16": " / ".join(f"{x / 1e9:,.0f}" for x in where["peaks"].values()),
        "**total**": f"**{minutes} min {seconds:02d} s**",
        **{part: f"{seconds:.0f}" for part, seconds in parts.items()},
        "seeds": ", ".join(str(row["seed"]) for row in rows),
        **{score: listed(score) for score in scores},
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which")
    parser.add_argument("--against", metavar="COMMIT", help="its recipe, on the same machine")
    parser.add_argument("--toy", action="store_true", help="two steps of each stage: does it run?")
    parser.add_argument("--json", type=Path, help="write all measurements there")
    args = parser.parse_args()
    if args.json:
        check_target(args.json)
    return args


def main():
    args, device = arguments(), default_device()
    sizes = (256,) if args.toy else ()
    peaks = {x: matmul_peak(device, x, sizes=sizes) for x in ("float32", "bfloat16")}
    here = machine(device)
    where = {**here, "peaks": peaks}
    print(told(here))
    with contextlib.ExitStack() as stack:
        trees = {where["commit"]: ROOT}
        if args.against:
            name = args.against if args.against not in trees else f"{args.against}, again"
            trees[name] = stack.enter_context(checked_out(args.against))
        found: dict[str, list[dict]] = {name: [] for name in trees}
        for seed in args.seeds:
            for name, tree in trees.items():
                row = from_nothing(tree, args.preset, seed, args.toy, scored=tree == ROOT)
                found[name].append(row)
                print(f"{name}:", json.dumps(found[name][-1]), flush=True)
                if args.json:
                    write_json(args.json, {**where, "preset": args.preset, "runs": found})
    lines = [record(name, rows, where) for name, rows in found.items()]
    print("\n" + markdown(lines))
    if args.against:
        ours, theirs = (statistics.median(r["total"] for r in rows) for rows in found.values())
        print(f"\n{args.preset}: {100 * ours / theirs:.0f} % of the time of {args.against}")


if __name__ == "__main__":
    command(main)
