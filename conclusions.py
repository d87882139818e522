"""What the results of experiments say: a rule for each claim, and a page for those who look.

Results are those that experiments.py keeps: for each arm and seed every score of every prompt.
`conclude` returns all numbers that are shown, `keep` writes them; `report` shows them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from claims import ABLE, EXPERIMENTS, Experiment
from plumbing.files import UserError, read_json, write_file
from plumbing.page import body, inline, page, plot
from stages import RECIPE

RULE = (
    "A claim is supported where the 95 % interval of its difference lies on the side of the limit "
    "that its rule names, not supported where it lies on the other, else undecided. An experiment "
    "is not supported if one of its claims is not, supported if all are, else undecided; undecided "
    f"too where the whole method itself gets less than {ABLE:g} % right. Intervals are bootstraps "
    "over prompts and seeds; one seed decides nothing, except where the cost of one machine is "
    "timed."
)
LEGEND = (
    "Rows are arm: way. What the painter paints is the planner's plan (text), the real clip's "
    "(oracle), another clip's (shuffled), all zeros (zeroed) or guidance's null context (dropped); "
    "vae: a real clip, decoded. Scores are in percent, with their intervals. exact: prompts all of "
    "whose objects are right. layout: a reference's objects near which there is one. texture: "
    "correlation of the background's brightness. flash: flashes found within a frame of their "
    "time. calm: clips without one that stay so. TFLOP: of training, without the VAE. KL: nats per "
    "plan token. channels in use: those whose KL is above 0.1. Files: EXPERIMENT/ARM.SEED.json."
)
RESAMPLES = 10_000  # of the bootstrap
TITLE = "The paper's claims in miniature"

Results = dict[str, dict[int, dict]]  # arm -> seed -> result


def slug(*names: str) -> str:
    """Return names without spaces and commas, joined, for a file."""
    return ".".join(name.replace(",", "").replace(" ", "-") for name in names)


def read_result(file: Path) -> dict:
    """Return a file of results; UserError if it is something else."""
    found = read_json(file)
    if not isinstance(found, dict) or not found.keys() >= {"prompts", "config"}:
        raise UserError(f"{file} is not a result: remove it")
    return found


def read_results(out: Path, experiment: Experiment) -> Results:
    """Return what was run so far."""
    results: Results = {}
    for arm in experiment.arms:
        start = f"{slug(arm.name)}."
        for file in sorted((out / experiment.name).glob(f"{start}*.json")):
            if (seed := file.stem.removeprefix(start)).isdigit():
                results.setdefault(arm.name, {})[int(seed)] = read_result(file)
    return results


# --- the rule -----------------------------------------------------------------------------------


@lru_cache
def resamples(*sizes: int) -> list[np.ndarray]:
    """Return (RESAMPLES, n) for each size n: how often each of n is drawn, over all draws."""
    rng = np.random.default_rng(0)
    return [
        rng.multinomial(max(1, n - 1), np.full(n, 1 / n), RESAMPLES) / max(1, n - 1) for n in sizes
    ]


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values (seeds, prompts) and its 95 % interval.

    Seeds and prompts are drawn anew with replacement, apart: the same prompts serve all seeds. Of n
    one less is drawn, so that the spread of so few seeds is not taken too small.
    """
    draws = resamples(*values.shape)
    means = (draws[0] @ values * draws[1]).sum(1)  # (RESAMPLES,)
    return float(values.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the interval of values (seeds, prompts); NaNs are those of a prompt."""
    found = bootstrap(values[:, ~np.isnan(values).any(0)])
    return dict(zip(("mean", "low", "high"), (round(x, 2) for x in found), strict=True))


def terms_of(rule: str) -> tuple[list[tuple[int, str]], str, float]:
    """Return a rule's sides with their signs, its comparison and its limit (claims.py)."""
    left, comparison, limit = re.fullmatch(r"(.+) ([<>]) (\S+)", rule).groups()
    first, *others = re.split(r" ([+-]) ", left)
    signed = zip(others[::2], others[1::2], strict=True)
    return [(1, first), *((1 if s == "+" else -1, x) for s, x in signed)], comparison, float(limit)


def scores_of(results: Results, side: str) -> dict[int, np.ndarray]:
    """Return {seed: the score of each prompt} of a rule's side; NaN where a clip has none."""
    arm, way, score = [*side.split(" | "), *("text", "exact")[side.count(" | ") :]]
    return {
        seed: np.array(found["scores"][way][score], float)
        for seed, found in results.get(arm, {}).items()
        if score in found["scores"].get(way, {})
    }


def judge(says: str, rule: str, results: Results, least: int = 2) -> dict:
    """Return a claim's difference with its interval and the verdict, by the rule; or "not run".

    least: fewer seeds decide nothing, since nobody knows how far they are from each other.
    """
    sides, comparison, limit = terms_of(rule)
    terms = [(sign, scores_of(results, side)) for sign, side in sides]
    seeds = sorted(set.intersection(*(set(found) for _, found in terms)))
    said = {"says": says, "rule": rule, "seeds": len(seeds)}
    if not seeds:
        return {**said, "verdict": "not run"}
    found = interval(sum(sign * np.stack([x[seed] for seed in seeds]) for sign, x in terms))
    above, below = ("supported", "not supported")[:: 1 if comparison == ">" else -1]
    verdict = above if found["low"] > limit else below if found["high"] < limit else "undecided"
    return {**said, **found, "verdict": verdict if len(seeds) >= least else "undecided"}


def verdict_of(claims: Sequence[dict], able: dict) -> str:
    """Return an experiment's verdict from those of its claims."""
    verdicts = [claim["verdict"] for claim in claims]
    if able and able["mean"] < ABLE:
        return "undecided"
    order = ("not run", "not supported", "undecided", "supported")
    return next(verdict for verdict in order if verdict in verdicts)


def rows_of(experiment: Experiment, results: Results) -> Iterator[dict]:
    """Yield what was found of each arm and way: its scores, compute and facts."""
    for arm, way in [(each, way) for each in experiment.arms for way in each.ways]:
        if not (found := results.get(arm.name)):
            continue
        scores = {}
        for name in experiment.shows:
            if each := scores_of(results, f"{arm.name} | {way} | {name}"):
                values = np.stack([each[seed] for seed in sorted(each)])
                seeds = [round(float(x), 2) for x in np.nanmean(values, 1)]
                scores[name] = {**interval(values), "seeds": seeds}
        plans = (*RECIPE[1:], "base")  # the VAE is everybody's; the base is there where they start
        side = ("base",) if way.startswith("base") else plans
        flops = sum(found[min(found)].get("flops", {}).get(stage, 0) for stage in side)
        facts = [x.get("facts", {}) for x in found.values()]
        means = {k: round(float(np.mean([fact[k] for fact in facts])), 2) for k in facts[0]}
        row = {"arm": arm.name, "way": way, "line": arm.line, "TFLOP": round(flops / 1e12, 1)}
        yield {**row, "facts": means, "scores": scores}


def conclude(experiment: Experiment, results: Results) -> dict:
    """Return the verdict on an experiment, and all numbers that are shown of it."""
    every = [found for seeds in results.values() for found in seeds.values()]
    claims, asks = (
        [judge(*claim, results, experiment.seeds) for claim in kind.items()]
        for kind in (experiment.claims, experiment.asks)
    )
    able = {}
    if experiment.able and (whole := scores_of(results, experiment.able)):
        able = {"side": experiment.able, "mean": round(float(np.nanmean([*whole.values()])), 2)}
    return {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "verdict": verdict_of(claims, able),
        "able": able,
        "claims": claims,
        "asks": asks,
        "seeds": [min(map(len, results.values())), max(map(len, results.values()))],
        "prompts": every[0]["prompts"],
        "preset": every[0]["preset"],
        "captions": next((x["captions"] for x in every if "captions" in x), []),
        "rows": list(rows_of(experiment, results)),
        "commits": sorted({found["versions"]["commit"] for found in every}),
        "hardware": sorted({found["hardware"] for found in every}),
    }


def keep(out: Path, conclusion: dict):
    """Write conclusion.json."""
    file = out / conclusion["experiment"] / "conclusion.json"
    write_file(file, json.dumps(conclusion, indent=1).encode())


# --- in words -----------------------------------------------------------------------------------


def told(claim: dict) -> str:
    """Return a judged claim in words."""
    if claim["verdict"] == "not run":
        return f"not run: {claim['says']}"
    few = ", one seed" if claim["seeds"] == 1 else ""
    return "{verdict}: {says} ({mean:+.1f}, {low:.1f} to {high:.1f}{0})".format(few, **claim)


def line_of(c: dict) -> str:
    """Return an experiment's line of conclusion."""
    unable = c["able"] and c["able"]["mean"] < ABLE
    why = f" ({c['able']['side']} is right in only {c['able']['mean']:.1f} %)" if unable else ""
    return f"{c['verdict']}{why}. " + "; ".join(map(told, c["claims"]))


def table_of(c: dict, shows: Sequence[str]) -> list[list[str]]:
    """Return an experiment's scores as a table of text, its head first."""
    facts = list(dict.fromkeys(name for row in c["rows"] for name in row["facts"]))
    table = [["", *shows, "TFLOP", *facts]]
    for row in c["rows"]:
        scores = [row["scores"].get(name) for name in shows]
        cells = ["{mean:.1f} ({low:.1f} to {high:.1f})".format(**x) if x else "" for x in scores]
        known = [f"{row['facts'][name]:g}" if name in row["facts"] else "" for name in facts]
        table.append([f"{row['arm']}: {row['way']}", *cells, f"{row['TFLOP']:g}", *known])
    return table


def section(experiment: Experiment, c: dict, out: Path) -> dict:
    """Return what is shown of an experiment (plumbing/page.py); draw its plot."""
    rows = [{**row, "label": f"{row['arm']}: {row['way']}"} for row in c["rows"]]
    folder, notes = out / experiment.name, out / experiment.name / "notes.md"
    files = {x["label"]: folder / "samples" / f"{slug(x['arm'], x['way'])}.webp" for x in rows}
    plot(folder / "plot.png", rows, experiment.shows, "TFLOP")
    least, most = c["seeds"]
    seeds = f"{most}" if least == most else f"{least} to {most}"
    where = f"seeds: {seeds}; prompts: {c['prompts']}; preset {c['preset']}"
    return {
        **{name: c[name] for name in ("paper", "captions")},
        "name": experiment.name,
        "line": line_of(c),
        **{kind: [f"{told(x)}; {x['rule']}" for x in c[kind]] for kind in ("claims", "asks")},
        "table": table_of(c, experiment.shows),
        "plot": folder / "plot.png",
        "videos": {label: file for label, file in files.items() if file.exists()},
        "where": f"{where}; {'; '.join(c['hardware'])}; commit {', '.join(c['commits'])}.",
        "notes": notes.read_text().strip() if notes.exists() else "",
    }


def report(out: Path):
    """Write a plot for each experiment, README.md and index.html, from the results in a folder."""
    sections = []
    for experiment in EXPERIMENTS:
        if results := read_results(out, experiment):
            conclusion = conclude(experiment, results)
            keep(out, conclusion)
            sections.append(section(experiment, conclusion, out))
    if not sections:
        raise UserError(f"{out} has no results: python experiments.py plan --out {out}")
    intro = f"python experiments.py NAME --out FOLDER runs one of them. {RULE} {LEGEND}"
    readme = body(TITLE, intro, sections, lambda file: file.relative_to(out).as_posix())
    write_file(out / "README.md", readme.encode())
    write_file(out / "index.html", page(TITLE, body(TITLE, intro, sections, inline)).encode())
    print(f"{out / 'README.md'}\n{out / 'index.html'}")
