"""The paper's claims in miniature, each one command: arms trained, scored, compared by a rule.

    python experiments.py list                      # what there is, and what was found
    python experiments.py plan                      # one of them: trains what is missing
    python experiments.py all --seeds 3             # all of them
    python experiments.py report                    # results/README.md and results/index.html

claims.py says what is run and what would show a claim. Every score of every prompt is kept, one
file for each arm and seed, and what is there is not run again. Two processes share the work: give
the same command twice. A stage that arms have in common is trained once (`--runs`, remove it after
changes of the code).
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from claims import EXPERIMENTS, STEPS, Arm, Claim, Experiment
from config import PRESETS, paper, preset, shapes
from data import to_float
from evaluate import Evaluation
from plumbing.cache import Memory, hash_of
from plumbing.device import count_flops, default_device, faster_dtype
from plumbing.fields import differences, flat_fields
from plumbing.files import UserError, check_target, command, read_json, write_file
from plumbing.folder import locked, versions
from plumbing.page import animation, page, plot
from plumbing.seeds import Rows
from run import FREE, Run
from sample import through_vae
from semantic import Compressor, gaussian_kl
from settings import Config, from_fields, override
from stages import NEEDS, RECIPE, USES, learner, some_captions
from toy.scores import drift, flash_of, likeness, of_each
from toy.world import World
from train import train

RULE = (
    "A claim is supported where the 95 % interval of its difference lies above its limit, not "
    "supported where it lies below, else undecided; an experiment is supported if all its claims "
    "are, and not supported if one is not. The interval is a bootstrap over prompts and seeds."
)
RESAMPLES = 10_000  # of the bootstrap
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


class Busy(Exception):
    """Another process is at work on this."""


@contextmanager
def alone(folder: Path):
    """Keep other processes away from a folder; Busy if one is there."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except UserError:
            raise Busy from None
        yield


# --- training an arm ----------------------------------------------------------------------------


def stage_flops(config: Config, stage: str) -> int:
    """Return the floating-point operations of all steps of a stage (`count_flops`)."""
    chosen = getattr(config.stages, stage)
    source = World(config.data).shorter(chosen.pieces)
    captions = some_captions(stage, source)
    if stage in USES:
        empty = {
            "latents": (2, config.vae.channels, *config.latent_grid()),
            "features": (config.encoder.dim, *config.plan_grid()),
            "text": (config.text.words, config.text.dim),
        }
        encode = {k: lambda i, shape=v: torch.zeros(len(i), *shape) for k, v in empty.items()}
        source = Memory(1, lambda indices: [""] * len(indices), encode)
    with torch.device("meta"):
        compressor = Compressor(config.encoder.dim, config.compressor)
        twin = learner(config, stage, captions, compressor)
    return count_flops(twin, twin.draw(source, Rows(range(chosen.batch), stage))) * chosen.steps


def recipe_flops(config: Config) -> int:
    """Return those of the plan's side: encoder, painter, planner. The VAE is everybody's."""
    return sum(stage_flops(config, stage) for stage in RECIPE[1:])


def configured(arm: Arm, name: str, settings: Sequence[str]) -> Config:
    """Return an arm's configuration: the preset's, with its parts, its fields and its steps.

    settings: fields that the user sets, for all arms.
    """
    usual = preset(name)
    config = override(usual, arm.settings, **(arm.parts(usual) if arm.parts else {}))
    steps = {s: share * getattr(usual.stages, s).steps for s, share in STEPS[arm.steps].items()}
    if arm.compute:
        one = stage_flops(config, "base") / config.stages.base.steps
        steps["base"] = arm.compute * recipe_flops(usual) / one
    fewer = [f"stages.{stage}.steps={max(1, round(n))}" for stage, n in steps.items()]
    return override(config, [*fewer, *settings])


def needs(config: Config, stage: str) -> tuple[str, ...]:
    """Return what a stage is trained on, or starts from."""
    started = stage in ("latent", "semantic") and getattr(config, "start", "") == "base"
    return (*NEEDS[stage], *(("base",) if started else ()))


def stages_of(config: Config, arm: Arm) -> list[str]:
    """Return the stages that an arm's ways of making videos need, in the order of training."""
    ends, found = [], []
    for way in arm.ways:
        plans = way.partition(",")[0]
        own = {"text": "semantic", "base": "base", "vae": "vae", "real": "vae"}
        ends.append(own.get(plans, "latent"))

    def add(stage: str):
        for need in needs(config, stage):
            add(need)
        found.extend([stage] if stage not in found else [])

    for end in ends:
        add(end)
    return found


def stage_key(config: Config, stage: str, seed: int) -> str:
    """Return what stands for all that decides what a stage becomes, besides the code."""
    fields = {
        name: value
        for name, value in flat_fields(config).items()
        if (name.split(".")[0] in USED[stage] or name.startswith((f"stages.{stage}.", "dtype")))
        and not (name.endswith(FREE) and not name.endswith((".steps", ".compile")))
        and not (stage in ("vae", "base") and name.startswith("data.semantic"))
    }
    below = [stage_key(config, need, seed) for need in needs(config, stage)]
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
        with alone(store):
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
    if way.startswith(("vae", "oracle")):
        pairs = zip(videos, test.real, strict=True)
        alike = [likeness(video, real) for video, real in pairs]
        scores |= {name: [x[name] for x in alike] for name in alike[0]}
    if test.world.config.flashes:
        told = [
            (test.world.flash(i), flash_of(v)) for i, v in zip(test.indices, videos, strict=True)
        ]
        near = [
            found is not None and abs(found - true) <= 1 for true, found in told if true is not None
        ]
        rest = iter(near)
        scores["flash"] = [None if true is None else 100.0 * next(rest) for true, _ in told]
        scores["calm"] = [100.0 * (found is None) if true is None else None for true, found in told]
    if test.long:
        pairs = zip(videos, test.scenes, strict=True)
        each = [drift(video[None], [scene], unseen) for video, scene in pairs]
        scores["drift"] = [(x["colour"] + x["shape"]) / 2 for x in each]
    return scores


def unseen(clips: torch.Tensor) -> torch.Tensor:
    """Stand for the consistency of clips, of which nothing is asked here."""
    return torch.zeros(len(clips))


def plan_facts(test: Evaluation) -> dict[str, float]:
    """Return how many channels of z_sem are in use, and its KL in nats per token."""
    run = test.run
    with torch.no_grad():
        features = run.encoder.encode(to_float(test.low_rate).to(run.device))
        kl = gaussian_kl(*run.compressor.posterior(features)).transpose(0, 1).flatten(1).mean(1)
    return {"channels in use": int((kl > 0.1).sum()), "KL": round(float(kl.sum()), 2)}


def hardware() -> str:
    """Return the names of processor and device, and the threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{device}, {torch.get_num_threads()} threads"


def growths(found: dict[str, list]) -> dict[str, dict[str, list[float]]]:
    """Return by how much each doubling multiplies the seconds that benchmarks/length.py found."""
    scores = {}
    for name in ("full", "windows"):
        rows = found[f"{name} forward"]
        doublings = pairwise(rows)
        each = [(b[1] / a[1]) ** (1 / math.log2(b[0] / a[0])) for a, b in doublings]
        scores[name] = {"growth": each}
    few = shapes(paper(), 60)["latent tokens per plan token"]
    return scores | {"tokens": {"per plan token": [few]}}


def measured_cost() -> dict[str, dict[str, list[float]]]:
    """Run benchmarks/length.py, and return its `growths`."""
    script = Path(__file__).parent / "benchmarks" / "length.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "length.json"
        words = [
            "--only",
            "full forward",
            "windows forward",
            "--repeat",
            ROUNDS,
            "--tokens",
            *TOKENS,
        ]
        words += ["--json", file, "--out", file.with_suffix(".png")]
        subprocess.run([sys.executable, script, *map(str, words)], check=True)
        return growths(read_json(file))


# --- results ------------------------------------------------------------------------------------


@dataclass
class Options:
    """What the command line says."""

    seeds: int
    prompts: int
    preset: str | None
    settings: Sequence[str]
    arms: Sequence[str]
    out: Path
    runs: Path


def result_file(out: Path, experiment: Experiment, arm: Arm, seed: int) -> Path:
    return out / experiment.name / f"{slug(arm.name)}.{seed}.json"


def slug(name: str) -> str:
    """Return a name without spaces and commas, for a file."""
    return name.replace(",", "").replace(" ", "-")


def compact(content: dict) -> bytes:
    """Return JSON with a line for each entry, and whole numbers short."""

    def short(x):
        if isinstance(x, dict):
            return {key: short(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [short(value) for value in x]
        if isinstance(x, float):
            return int(x) if x == int(x) else float(f"{x:.6g}")
        return x

    lines = [f'"{key}": {json.dumps(short(value))}' for key, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


@lru_cache
def dtype_of(runs: Path) -> str:
    """Return the precision of all runs in a folder: the faster one, measured when it is new."""
    file = runs / "dtype"
    if not file.exists():
        write_file(file, faster_dtype(default_device()).encode())
    return file.read_text()


def is_done(file: Path, config: Config, prompts: int) -> bool:
    """Return whether a result is there; UserError if it is of other settings."""
    if not file.exists():
        return False
    found = read_json(file)
    old, new = (flat_fields(x) for x in (from_fields(found["config"]), config))
    changed = differences({"prompts": found["prompts"], **old}, {"prompts": prompts, **new})
    changed = [x for x in changed if not x.startswith("dtype ")]
    if changed:
        raise UserError(
            f"{file} is of other settings ({', '.join(changed[:3])}): give another --out, or "
            "remove it"
        )
    return True


def run_arm(experiment: Experiment, arm: Arm, seed: int, options: Options):
    """Train and score an arm with a seed, and write the result; Busy if another process does."""
    file = result_file(options.out, experiment, arm, seed)
    name = options.preset or experiment.preset
    config = configured(arm, name, options.settings)
    if is_done(file, config, options.prompts):
        return
    if config.dtype == "auto":
        config = replace(config, dtype=dtype_of(options.runs))
    timed = experiment.name == "cost"
    folder = options.runs / ("cost" if timed else hash_of([flat_fields(config), seed]))
    with alone(folder):
        if is_done(file, config, options.prompts):
            return
        print(f"\n{experiment.name}: {arm.name}, seed {seed}")
        content = {"experiment": experiment.name, "arm": arm.name, "seed": seed}
        content |= {"prompts": options.prompts, "preset": name, "config": flat_fields(config)}
        if timed:
            content["scores"] = measured_cost()
        else:
            run = trained(folder, config, stages_of(config, arm), seed, options.runs)
            content |= scored(run, arm, options.prompts, seed, file)
        write_file(file, compact({**content, "hardware": hardware(), "versions": versions()}))


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
            write_file(
                samples_file(file.parent, arm.name, way),
                animation(videos[:SHOWN], run.config.data.fps),
            )
    run.let_go()
    return content


def samples_file(folder: Path, arm: str, way: str) -> Path:
    return folder / "samples" / f"{slug(arm)}.{slug(way)}.webp"


# --- conclusions --------------------------------------------------------------------------------


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values (seeds, prompts) and its 95 % interval.

    Seeds and prompts are drawn anew with replacement, apart: the same prompts serve all seeds.
    """
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape
    of_seeds, of_prompts = (
        rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (seeds, prompts)
    )
    means = (of_seeds @ values * of_prompts).sum(1)  # (RESAMPLES,)
    return float(values.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def table_of(results: dict[int, dict], way: str, score: str) -> dict[int, np.ndarray]:
    """Return {seed: scores of all prompts (prompts,)} of an arm; NaN where one does not apply."""
    return {
        seed: np.array(found["scores"][way][score], float)
        for seed, found in results.items()
        if score in found["scores"].get(way, {})
    }


def judge(claim: Claim, results: dict[str, dict[int, dict]]) -> dict:
    """Return a claim's difference with its interval and the verdict, by the rule; or "not run"."""
    terms = []
    for sign, sides in ((1, claim.more), (-1, claim.less)):
        for arm, way, *score in sides:
            terms.append((sign, table_of(results.get(arm, {}), way, *(score or [claim.score]))))
    seeds = sorted(set.intersection(*(set(found) for _, found in terms)))
    said = {"says": claim.says, "limit": claim.least, "seeds": len(seeds)}
    if not seeds:
        return {**said, "verdict": "not run"}
    difference = sum(sign * np.stack([found[s] for s in seeds]) for sign, found in terms)
    mean, low, high = bootstrap(difference[:, ~np.isnan(difference).any(0)])
    verdict = (
        "supported" if low > claim.least else "not supported" if high < claim.least else "undecided"
    )
    interval = {"difference": mean, "low": low, "high": high}
    return {**said, **{k: round(x, 2) for k, x in interval.items()}, "verdict": verdict}


def verdict_of(claims: Sequence[dict]) -> str:
    """Return an experiment's verdict from those of its claims."""
    found = [claim["verdict"] for claim in claims]
    for verdict in ("not run", "not supported", "undecided"):
        if verdict in found:
            return verdict
    return "supported"


def read_results(out: Path, experiment: Experiment) -> dict[str, dict[int, dict]]:
    """Return {arm: {seed: result}} of what was run so far."""
    results: dict[str, dict[int, dict]] = {}
    for arm in experiment.arms:
        for file in sorted((out / experiment.name).glob(f"{slug(arm.name)}.*.json")):
            if file.name.removeprefix(f"{slug(arm.name)}.").removesuffix(".json").isdigit():
                found = read_json(file)
                results.setdefault(arm.name, {})[found["seed"]] = found
    return results


def rows_of(experiment: Experiment, results: dict) -> Iterator[dict]:
    """Yield what was found of each arm and way: scores with their intervals, and its compute."""
    for arm in experiment.arms:
        found = results.get(arm.name, {})
        for way in arm.ways if found else ():
            scores = {}
            for name in experiment.shows:
                if not (each := table_of(found, way, name)):
                    continue
                values = np.stack([each[seed] for seed in sorted(each)])
                values = values[:, ~np.isnan(values).any(0)]
                mean, low, high = (round(x, 2) for x in bootstrap(values))
                seeds = [round(float(x), 2) for x in values.mean(1)]
                scores[name] = {"mean": mean, "low": low, "high": high, "seeds": seeds}
            first = found[min(found)]
            side = ("base",) if way.startswith("base") else RECIPE[1:]  # the VAE is everybody's
            used = {k: v for k, v in first.get("flops", {}).items() if k in side}
            compute = round(sum(used.values()) / 1e15, 3)
            facts = {
                k: round(np.mean([f["facts"][k] for f in found.values()]).item(), 2)
                for k in first.get("facts", {})
            }
            yield {
                "arm": arm.name,
                "way": way,
                "line": arm.line,
                "PFLOP": compute,
                "facts": facts,
                "scores": scores,
            }


def conclude(experiment: Experiment, out: Path) -> dict | None:
    """Write conclusion.json from an experiment's results and return it; None without any."""
    results = read_results(out, experiment)
    if not results:
        return None
    every = [found for seeds in results.values() for found in seeds.values()]
    claims = [judge(claim, results) for claim in experiment.claims]
    content = {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "verdict": verdict_of(claims),
        "claims": claims,
        "asks": [judge(claim, results) for claim in experiment.asks],
        "seeds": max(len(found) for found in results.values()),
        "prompts": every[0]["prompts"],
        "preset": every[0]["preset"],
        "captions": next((x["captions"] for x in every if "captions" in x), []),
        "rows": list(rows_of(experiment, results)),
        "commits": sorted({found["versions"]["commit"] for found in every}),
        "hardware": sorted({found["hardware"] for found in every}),
    }
    write_file(out / experiment.name / "conclusion.json", json.dumps(content, indent=1).encode())
    return content


def told(claim: dict) -> str:
    """Return a judged claim in words."""
    if claim["verdict"] == "not run":
        return f"not run: {claim['says']}"
    limit = f", limit {claim['limit']:g}" if claim["limit"] else ""
    return (
        f"{claim['verdict']}: {claim['says']} ({claim['difference']:+.1f}, "
        f"{claim['low']:.1f} to {claim['high']:.1f}{limit})"
    )


def line_of(conclusion: dict) -> str:
    """Return an experiment's line of conclusion."""
    return f"{conclusion['verdict']} - " + "; ".join(map(told, conclusion["claims"]))


# --- the command --------------------------------------------------------------------------------


def labelled(conclusion: dict, out: Path) -> list[dict]:
    """Return the rows of a conclusion with their labels and, where they were kept, their videos."""
    rows = []
    for row in conclusion["rows"]:
        file = samples_file(out / conclusion["experiment"], row["arm"], row["way"])
        label = f"{row['arm']}: {row['way']}"
        rows.append({**row, "label": label, "videos": file if file.exists() else None})
    return rows


def report(out: Path):
    """Write results/README.md, a plot for each experiment, and index.html, from the results."""
    found = [(e, c) for e in EXPERIMENTS if (c := conclude(e, out))]
    if not found:
        raise UserError(f"{out} has no results: python experiments.py plan --out {out}")
    lines = [
        "# The paper's claims in miniature",
        "",
        f"`python experiments.py NAME` runs one of them. {RULE}",
        "",
        "| name | the paper says | ours | seeds, prompts, preset |",
        "|---|---|---|---|",
    ]
    sections = []
    for experiment, c in found:
        size = f"{c['seeds']}, {c['prompts']}, {c['preset']}"
        anchor = f"[{c['experiment']}](#{c['experiment']})"
        lines.append(f"| {anchor} | {c['paper']} | {line_of(c)} | {size} |")
        rows = labelled(c, out)
        write_file(out / c["experiment"] / "plot.png", plot(rows, experiment.shows))
        sections.append((c, rows, experiment.shows))
    for c, rows, shows in sections:
        lines += ["", f"## {c['experiment']}", "", c["paper"], "", *section(c, rows, shows)]
        notes = out / c["experiment"] / "notes.md"
        lines += ["", notes.read_text().strip()] if notes.exists() else []
    write_file(out / "README.md", ("\n".join(lines) + "\n").encode())
    write_file(out / "index.html", page(RULE, sections, line_of, told, out).encode())
    print(f"{out / 'README.md'}\n{out / 'index.html'}")


def section(c: dict, rows: list[dict], shows: Sequence[str]) -> list[str]:
    """Return an experiment's claims, scores and plot in Markdown."""
    lines = [f"**{c['verdict']}**", ""]
    lines += [f"- {told(claim)}" for claim in c["claims"]]
    if c["asks"]:
        lines += ["", "Beside it:", "", *(f"- {told(claim)}" for claim in c["asks"])]
    facts = list(dict.fromkeys(name for row in rows for name in row["facts"]))
    lines += ["", "| " + " | ".join(["", *shows, "PFLOP", *facts]) + " |"]
    lines += ["|---" * (len(shows) + len(facts) + 2) + "|"]
    for row in rows:
        cells = [row["label"]]
        for name in shows:
            score = row["scores"].get(name)
            cells.append(
                f"{score['mean']:.1f} ({score['low']:.1f} to {score['high']:.1f})" if score else ""
            )
        cells += [f"{row['PFLOP']:g}", *(f"{row['facts'].get(name, ''):g}" for name in facts)]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{'; '.join(c['hardware'])}; commit {', '.join(c['commits'])}"
    return [*lines, "", f"![{c['experiment']}]({c['experiment']}/plot.png)", "", where]


def arguments() -> tuple[str, Options]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument(
        "what",
        choices=["list", "all", "report", *names],
        metavar="WHAT",
        help=f"list, all, report, or one of {', '.join(names)}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...: so many")
    parser.add_argument("--prompts", type=int, default=128, help="half with one object, half two")
    parser.add_argument("--preset", choices=PRESETS, help="instead of each experiment's own")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results go")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), help="what is trained"
    )
    args = vars(parser.parse_args())
    what, options = args.pop("what"), Options(**args)
    if options.seeds < 1 or options.prompts < 2:
        raise UserError("--seeds: at least 1; --prompts: at least 2, one object and two")
    known = {arm.name for e in EXPERIMENTS if what in (e.name, "all") for arm in e.arms}
    if unknown := sorted(set(options.arms) - known):
        raise UserError(f"--arms {unknown[0]}: {what} has {', '.join(sorted(known)) or 'none'}")
    for folder in (options.out, options.runs):
        check_target(folder, folder=True)
    return what, options


def run_all(experiments: Sequence[Experiment], options: Options):
    """Run what is missing, all arms of one seed before the next; what others run is waited for."""
    todo = [
        (experiment, arm, seed)
        for experiment in experiments
        for seed in range(options.seeds)
        for arm in experiment.arms
        if not options.arms or arm.name in options.arms
    ]
    while todo:
        busy = []
        for job in todo:
            try:
                run_arm(*job, options)
            except Busy:
                busy.append(job)
        if len(busy) == len(todo):
            time.sleep(10)
        todo = busy


def main():
    what, options = arguments()
    chosen = [e for e in EXPERIMENTS if what in (e.name, "all", "list")]
    if what == "report":
        report(options.out)
        return
    if what != "list":
        run_all(chosen, options)
    for experiment in chosen:
        conclusion = conclude(experiment, options.out)
        found = line_of(conclusion) if conclusion else "not run yet"
        print(f"{experiment.name:<10} {experiment.paper}\n{'':<10} {found}")


if __name__ == "__main__":
    command(main)
