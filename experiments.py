"""The paper's claims in miniature, each one command: arms trained, scored, compared by a rule.

    python experiments.py list                      # what there is, and what was found
    python experiments.py plan                      # one of them: trains what is missing
    python experiments.py all --out runs/claims     # all of them, anew
    python experiments.py report                    # results/README.md and results/index.html

claims.py says what is run and what would show a claim, conclusions.py what it shows. Every score of
every prompt is kept, one file for each arm and seed, and what is there is not run again. Two
processes share the work: give the same command twice. A stage that arms have in common is trained
once: remove `--runs` after changes of the code.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch

from claims import EXPERIMENTS, STEPS, Arm, Experiment
from conclusions import conclude, keep, line_of, read_result, read_results, report, slug
from config import PRESETS, paper, preset, shapes
from data import to_float
from evaluate import PLANS, Evaluation
from plumbing.cache import Memory, hash_of
from plumbing.device import default_device, faster_dtype
from plumbing.fields import add_set_flag, command_line, differences, flat_fields
from plumbing.files import UserError, check_target, command, read_json, to_path, write_file
from plumbing.folder import Busy, locked, versions
from plumbing.page import animation
from plumbing.seeds import Rows
from run import FREE, Run
from sample import through_vae
from settings import Config, from_fields, override
from stages import RECIPE, USES, needs_of, step_flops
from toy.scores import drifts, flash_scores, likeness, of_each
from toy.world import World
from train import train

PAUSE = 10  # seconds, where all that is left is being run by others
SHOWN = 4  # prompts whose videos are kept, of the first seed
USED = {  # stage -> the components whose fields decide what it becomes, besides what it needs
    "vae": ("data", "vae"),
    "encoder": ("data", "encoder"),
    "latent": ("data", "encoder", "text", "compressor", "latent"),
    "semantic": ("data", "text", "semantic"),
    "base": ("data", "text", "latent"),
}
TOKENS = [2**k for k in range(12, 16)]  # of `cost`
ROUNDS = 7


# --- training an arm ----------------------------------------------------------------------------


@lru_cache
def stage_flops(config: Config, stage: str) -> int:
    """Return the floating-point operations of all steps of a stage (`count_flops`)."""
    chosen = getattr(config.stages, stage)
    source = World(config.data).shorter(chosen.pieces)
    if stage in USES:
        shapes = config.encoded.items()
        encode = {k: lambda i, shape=v: torch.zeros(len(i), *shape) for k, v in shapes}
        source = Memory(1, lambda indices: [""] * len(indices), encode)
    return step_flops(config, stage, source, Rows(range(chosen.batch), stage, 0)) * chosen.steps


def configured(arm: Arm, name: str, settings: Sequence[str]) -> Config:
    """Return an arm's configuration: the preset's, with its parts, its fields and its steps.

    settings: fields that the user sets, for all arms: the preset that arms are relative to.
    """
    usual = override(preset(name), settings)
    config = override(usual, arm.settings, **(arm.parts(usual) if arm.parts else {}))
    steps = {s: share * getattr(usual.stages, s).steps for s, share in STEPS[arm.steps].items()}
    if arm.compute:
        one = stage_flops(config, "base") / config.stages.base.steps
        recipe = sum(stage_flops(usual, stage) for stage in RECIPE[1:])  # the VAE is everybody's
        steps["base"] = arm.compute * recipe / one
    fewer = [f"stages.{stage}.steps={max(1, round(n))}" for stage, n in steps.items()]
    return override(config, fewer)


def stages_of(config: Config, arm: Arm) -> list[str]:
    """Return the stages that an arm's ways of making videos need, in the order of training."""
    own = {"text": "semantic", "base": "base", "vae": "vae", "real": "vae"}
    wanted = [own.get(way.partition(",")[0], "latent") for way in arm.ways]
    return list(dict.fromkeys(x for stage in wanted for x in (*needs_of(config, stage), stage)))


def stage_key(config: Config, stage: str, seed: int) -> str:
    """Return what stands for all that decides what a stage becomes, besides the code."""
    fields = {
        name: value
        for name, value in flat_fields(config).items()
        if (name.split(".")[0] in USED[stage] or name.startswith((f"stages.{stage}.", "dtype")))
        and (name.endswith(".steps") or not name.endswith(FREE))
        and not (stage in ("vae", "base") and name.startswith("data.semantic"))
    }
    below = [stage_key(config, need, seed) for need in needs_of(config, stage)]
    return hash_of([stage, seed, fields, below])


def trained(folder: Path, config: Config, stages: Sequence[str], seed: int, runs: Path) -> Run:
    """Return a run in a folder with these stages: those of the store of all runs, or trained now.

    Busy if another process is training a stage that it needs.
    """
    run = Run.create(folder, config)
    for stage in stages:
        if run.released(stage) or run.finished(stage):
            continue
        store = runs / "stages" / f"{stage}-{stage_key(config, stage, seed)}"
        kept, mine = store / "weights.safetensors", run.weights_file(stage)
        with locked(store):
            if not kept.exists():
                train(run, [stage], World(run.config.data), seed)
                write_file(kept, mine.read_bytes())
                run.state_file(stage).unlink(missing_ok=True)
            write_file(mine, kept.read_bytes())
    return run


# --- scoring it ---------------------------------------------------------------------------------


def way_of(test: Evaluation, name: str) -> Callable:
    """Return a way of making videos: real, vae, text, base, or a plan of evaluate.py's PLANS.

    After a comma: "no text", or the base's guidance.
    """
    options, (plans, _, how) = test.run.config.sample, name.partition(", ")
    if plans == "real":
        return lambda rows: test.real[rows]
    if plans == "vae":
        return lambda rows: through_vae(test.run, test.real[rows])
    if plans == "text":
        return partial(test.sampled, options=options)
    if plans == "base":
        scale = float(how.removeprefix("guidance ") or options.base_guidance)
        return partial(test.sampled, options=replace(options, base_guidance=scale), base=True)
    return partial(test.from_plans, options=options, plans=plans, told=how != "no text")


def seen(test: Evaluation, videos: torch.Tensor, way: str) -> dict[str, list[float | None]]:
    """Return every score of each video; None where a score does not apply to its clip."""
    scores = of_each(videos, test.scenes, test.world.config.events, test.long)
    if way.startswith(("vae", *PLANS)):  # made from a clip; shuffled ones: from another
        alike = [likeness(*both) for both in zip(videos, test.real, strict=True)]
        scores |= {name: [x[name] for x in alike] for name in alike[0]}
    if test.world.config.flashes:
        true = map(test.world.flash, test.indices)
        found = [flash_scores(*both) for both in zip(videos, true, strict=True)]
        scores |= {name: [x[name] for x in found] for name in found[0]}
    if test.long:  # consistency is not asked for
        found = drifts(videos, test.scenes, lambda clips: torch.zeros(len(clips)))
        scores["drift"] = ((found["colour"] + found["shape"]) / 2).tolist()
    return {k: [x if x is None else round(x, 2) for x in found] for k, found in scores.items()}


def plan_facts(test: Evaluation) -> dict[str, float]:
    """Return how many channels of z_sem are in use, and its KL in nats per token.

    Nothing where the compressor is fixed: then z_sem has no variance.
    """
    run = test.run
    if run.config.compressor.kind != "mlp":
        return {}
    with torch.no_grad():
        features = run.encoder.encode(to_float(test.low_rate).to(run.device))
        _, kl = run.compressor(features, torch.zeros((), device=run.device))
    return {"channels in use": int((kl > 0.1).sum()), "KL": round(float(kl.sum()), 2)}


def hardware() -> str:
    """Return the names of processor and device, and the threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{device}, {torch.get_num_threads()} threads"


def measured_cost() -> dict[str, dict[str, list[float]]]:
    """Run benchmarks/length.py: by how much each doubling multiplies the seconds."""
    script = Path(__file__).parent / "benchmarks" / "length.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "length.json"
        words = ["--json", file, "--out", file.with_suffix(".png"), "--rounds", ROUNDS]
        words += ["--tokens", *TOKENS, "--only", "full forward", "windows forward"]
        subprocess.run([sys.executable, script, *map(str, words)], check=True)
        found = read_json(file)["growth"]
    few = shapes(paper(), 60)["latent tokens per plan token"]
    scores = {name: {"growth": found[f"{name} forward"]} for name in ("full", "windows")}
    return scores | {"tokens": {"per plan token": [few]}}


# --- results ------------------------------------------------------------------------------------


def json_lines(content: dict) -> bytes:
    """Return JSON with a line for each entry."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


@lru_cache
def dtype_of(runs: Path) -> str:
    """Return the precision of all runs in a folder: the faster one, measured when it is new."""
    file = runs / "dtype"
    if not file.exists():
        write_file(file, faster_dtype(default_device()).encode())
    return file.read_text()


class Job:
    """An arm of an experiment with a seed: its configuration, and the file of its result."""

    def __init__(self, experiment: Experiment, arm: Arm, seed: int, options: argparse.Namespace):
        self.experiment, self.arm, self.seed, self.options = experiment, arm, seed, options
        self.file = options.out / experiment.name / f"{slug(arm.name)}.{seed}.json"
        self.preset = options.preset or experiment.preset
        self.config = configured(arm, self.preset, options.settings)
        self.chosen = self.config.dtype == "auto"  # the faster one of this machine
        if self.chosen:
            self.config = replace(self.config, dtype=dtype_of(options.runs))

    @property
    def done(self) -> bool:
        """Whether the result is there; UserError if it is of other settings."""
        if not self.file.exists():
            return False
        found = read_result(self.file)
        old = {"prompts": found["prompts"], **flat_fields(from_fields(found["config"]))}
        new = {"prompts": self.options.prompts, **flat_fields(self.config)}
        new |= {"dtype": old["dtype"]} if self.chosen else {}
        if changed := [x for x in differences(old, new) if ".compile " not in x]:
            raise UserError(
                f"{self.file} is of other settings ({', '.join(changed[:3])}): give another --out, "
                "or remove it"
            )
        return True


def run_job(job: Job):
    """Train and score an arm, and write the result; Busy if another process does."""
    timed, arm, seed, runs = job.experiment.name == "cost", job.arm, job.seed, job.options.runs
    folder = runs / ("cost" if timed else hash_of([flat_fields(job.config), seed]))
    with locked(folder):
        if job.done:
            return
        print(f"\n{job.experiment.name}: {arm.name}, seed {seed}")
        content = {"experiment": job.experiment.name, "arm": arm.name, "seed": seed}
        content |= {"prompts": job.options.prompts, "preset": job.preset}
        if timed:
            content["scores"] = measured_cost()
        else:
            run = trained(folder, job.config, stages_of(job.config, arm), seed, runs)
            content |= scored(run, arm, job.options.prompts, seed, job.file)
        content |= {"hardware": hardware(), "versions": versions()}
        write_file(job.file, json_lines({**content, "config": flat_fields(job.config)}))


def scored(run: Run, arm: Arm, prompts: int, seed: int, file: Path) -> dict:
    """Return all scores of an arm, and what training took; for seed 0 keep some of its videos."""
    test = Evaluation(run, "test", prompts, seed, run.config.data.events > 1)
    stages = [stage for stage in stages_of(run.config, arm) if not run.released(stage)]
    content: dict = {
        "captions": test.captions[:SHOWN],
        "steps": {stage: run.steps_of(stage) for stage in stages},
        "seconds": {stage: run.note(stage).get("seconds") for stage in stages},
        "flops": {stage: stage_flops(run.config, stage) for stage in stages},
        "facts": plan_facts(test) if "latent" in stages else {},
        "scores": {},
    }
    for way in arm.ways:
        videos = test.videos(way_of(test, way), way)
        content["scores"][way] = seen(test, videos, way)
        if seed == 0:
            samples = file.parent / "samples" / f"{slug(arm.name, way)}.webp"
            animation(samples, videos[:SHOWN], run.config.data.fps)
    run.let_go()
    return content


# --- the command --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    names = [experiment.name for experiment in EXPERIMENTS]
    told = f"list, all, report, or some of {', '.join(names)}"
    parser.add_argument("what", nargs="+", metavar="WHAT", help=told)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...: so many")
    parser.add_argument("--prompts", type=int, default=128, help="half with one object, half two")
    parser.add_argument("--preset", choices=PRESETS, help="instead of each experiment's own")
    add_set_flag(parser)
    more = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--arms", metavar="ARM", help="only these", **more)
    out = "where results go; results/ (ours, where nothing is run again) if not given"
    parser.add_argument("--out", type=to_path, default=Path("results"), help=out)
    runs = Path("runs/experiments")
    parser.add_argument("--runs", type=to_path, default=runs, help="where runs and stages go")
    options = parser.parse_args()
    what = options.what
    single = len(what) == 1 and what[0] in ("list", "all", "report")
    if not single and (unknown := [name for name in what if name not in names]):
        raise UserError(f"{unknown[0]}: choose list, all, report, or some of {', '.join(names)}")
    if (options.preset or options.settings) and {"all", "cost"} & set(what):
        raise UserError("cost times tiny's painter: with --preset or --set name the others")
    if options.seeds < 1 or options.prompts < 2:
        raise UserError("--seeds: at least 1; --prompts: at least 2, one object and two")
    known = {arm.name for e in EXPERIMENTS if e.name in what or what == ["all"] for arm in e.arms}
    if missing := sorted(set(options.arms) - known):
        raise UserError(f"--arms {missing[0]}: choose from {', '.join(sorted(known)) or 'none'}")
    for folder in (options.out, options.runs):
        check_target(folder, folder=True)
    return options


def run_all(experiments: Sequence[Experiment], options: argparse.Namespace):
    """Run what is missing, all arms of one seed before the next; what others run is waited for."""
    jobs = []
    for experiment in experiments:
        for seed, arm in product(range(options.seeds), experiment.arms):
            jobs += [Job(experiment, arm, seed, options)]
    todo = [job for job in jobs if not options.arms or job.arm.name in options.arms]
    for job in (*todo, *jobs):
        _ = job.done  # refuses what was run otherwise, also what this would be compared with
    while todo := [job for job in todo if not job.done]:
        before, busy = len(todo), []
        for job in todo:
            try:
                run_job(job)
            except Busy:
                busy.append(job)
        if len(busy) == before:
            time.sleep(PAUSE)
        todo = busy


def main():
    versions()  # the commit that runs, not one of later
    options = arguments()
    what = options.what
    if what == ["report"]:
        report(options.out)
        return
    chosen = [e for e in EXPERIMENTS if e.name in what or what in (["all"], ["list"])]
    if what != ["list"]:
        run_all(chosen, options)
    for experiment in chosen:
        found = "not run yet"
        if results := read_results(options.out, experiment):
            conclusion = conclude(experiment, results)
            found = line_of(conclusion)
            if what != ["list"]:
                keep(options.out, conclusion)
        print(f"{experiment.name:<10} {experiment.paper}\n{'':<10} {found}")


if __name__ == "__main__":
    command(main)
