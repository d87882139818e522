"""What the results of experiments say: a rule for each claim, and a page for those who look.

Results are those that experiments.py keeps: for each arm and seed every score of every prompt.
`conclude` writes all numbers that are shown to conclusion.json; `report` shows them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from claims import ABLE, EXPERIMENTS, Claim, Experiment
from plumbing.files import UserError, read_json, write_file
from plumbing.page import page, plot
from stages import RECIPE

RULE = (
    "A claim is supported where the 95 % interval of its difference lies above its limit (0 where "
    "none is named), not supported where it lies below, else undecided. An experiment is supported "
    "if all its claims are, not supported if one is not, and undecided where the whole method "
    f"itself gets less than {ABLE:g} % right. Intervals are bootstraps over prompts and seeds."
)
RESAMPLES = 10_000  # of the bootstrap

Results = dict[str, dict[int, dict]]  # arm -> seed -> result


def slug(*names: str) -> str:
    """Return names without spaces and commas, joined, for a file."""
    return ".".join(name.replace(",", "").replace(" ", "-") for name in names)


def read_results(out: Path, experiment: Experiment) -> Results:
    """Return what was run so far."""
    results: Results = {}
    for arm in experiment.arms:
        start = f"{slug(arm.name)}."
        for file in sorted((out / experiment.name).glob(f"{start}*.json")):
            if file.stem.removeprefix(start).isdigit():
                results.setdefault(arm.name, {})[int(file.stem.removeprefix(start))] = read_json(
                    file
                )
    return results


# --- the rule -----------------------------------------------------------------------------------


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


def scores_of(results: Results, arm: str, way: str, score: str) -> dict[int, np.ndarray]:
    """Return {seed: the score of each prompt}; NaN where it does not apply to a prompt's clip."""
    return {
        seed: np.array(found["scores"][way][score], float)
        for seed, found in results.get(arm, {}).items()
        if score in found["scores"].get(way, {})
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the interval of values (seeds, prompts); NaNs are those of a prompt."""
    found = bootstrap(values[:, ~np.isnan(values).any(0)])
    return dict(zip(("mean", "low", "high"), (round(x, 2) for x in found), strict=True))


def side_of(results: Results, side: str, score: str = "exact") -> dict[int, np.ndarray]:
    """Return the scores of a claim's side, "arm | way" or "arm | way | score" (`scores_of`)."""
    arm, way, *own = side.split(" | ")
    return scores_of(results, arm, way, *(own or [score]))


def judge(claim: Claim, results: Results) -> dict:
    """Return a claim's difference with its interval and the verdict, by the rule; or "not run"."""
    terms = []
    for sign, sides in ((1, claim.more), (-1, claim.less)):
        terms += [(sign, side_of(results, side, claim.score)) for side in sides]
    seeds = sorted(set.intersection(*(set(found) for _, found in terms)))
    said = {"says": claim.says, "limit": claim.limit, "seeds": len(seeds)}
    if not seeds:
        return {**said, "verdict": "not run"}
    found = interval(sum(sign * np.stack([x[seed] for seed in seeds]) for sign, x in terms))
    below = "not supported" if found["high"] < claim.limit else "undecided"
    verdict = "supported" if found["low"] > claim.limit else below
    return {**said, **found, "verdict": verdict}


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
            if each := scores_of(results, arm.name, way, name):
                values = np.stack([each[seed] for seed in sorted(each)])
                seeds = [round(float(x), 2) for x in np.nanmean(values, 1)]
                scores[name] = {**interval(values), "seeds": seeds}
        side = ("base",) if way.startswith("base") else RECIPE[1:]  # the VAE is everybody's
        flops = sum(found[min(found)].get("flops", {}).get(stage, 0) for stage in side)
        facts = [x.get("facts", {}) for x in found.values()]
        means = {k: round(float(np.mean([fact[k] for fact in facts])), 2) for k in facts[0]}
        row = {"arm": arm.name, "way": way, "line": arm.line, "TFLOP": round(flops / 1e12, 1)}
        yield {**row, "facts": means, "scores": scores}


def concluded(experiment: Experiment, results: Results) -> dict:
    """Return the verdict on an experiment, and all numbers that are shown of it."""
    every = [found for seeds in results.values() for found in seeds.values()]
    claims = [judge(claim, results) for claim in experiment.claims]
    able = {}
    if experiment.able and (whole := side_of(results, experiment.able)):
        able = {"side": experiment.able, "mean": round(float(np.nanmean([*whole.values()])), 2)}
    return {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "verdict": verdict_of(claims, able),
        "able": able,
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


def conclude(experiment: Experiment, out: Path) -> dict | None:
    """Write conclusion.json from an experiment's results and return it; None without any."""
    results = read_results(out, experiment)
    if not results:
        return None
    content = concluded(experiment, results)
    write_file(out / experiment.name / "conclusion.json", json.dumps(content, indent=1).encode())
    return content


# --- in words -----------------------------------------------------------------------------------


def told(claim: dict) -> str:
    """Return a judged claim in words."""
    if claim["verdict"] == "not run":
        return f"not run: {claim['says']}"
    limit = f", limit {claim['limit']:g}" if claim["limit"] else ""
    return (
        f"{claim['verdict']}: {claim['says']} ({claim['mean']:+.1f}, "
        f"{claim['low']:.1f} to {claim['high']:.1f}{limit})"
    )


def line_of(conclusion: dict) -> str:
    """Return an experiment's line of conclusion."""
    able = conclusion["able"]
    unable = able and able["mean"] < ABLE
    why = f" ({able['side']} is right in only {able['mean']:.1f} %)" if unable else ""
    return f"{conclusion['verdict']}{why}. " + "; ".join(map(told, conclusion["claims"]))


def table_of(c: dict, shows: Sequence[str]) -> list[list[str]]:
    """Return an experiment's scores as a table of text, its head first."""
    facts = list(dict.fromkeys(name for row in c["rows"] for name in row["facts"]))
    table = [["", *shows, "TFLOP", *facts]]
    for row in c["rows"]:
        scores = [row["scores"].get(name) for name in shows]
        cells = [
            f"{x['mean']:.1f} ({x['low']:.1f} to {x['high']:.1f})" if x else "" for x in scores
        ]
        known = [f"{row['facts'][name]:g}" if name in row["facts"] else "" for name in facts]
        table.append([f"{row['arm']}: {row['way']}", *cells, f"{row['TFLOP']:g}", *known])
    return table


def section(experiment: Experiment, c: dict, out: Path) -> dict:
    """Return what is shown of an experiment: text, a plot and the videos that were kept."""
    rows = [{**row, "label": f"{row['arm']}: {row['way']}"} for row in c["rows"]]
    folder, notes = out / experiment.name, out / experiment.name / "notes.md"
    files = {x["label"]: folder / "samples" / f"{slug(x['arm'], x['way'])}.webp" for x in rows}
    size = f"{c['seeds']} seeds, {c['prompts']} prompts, preset {c['preset']}"
    return {
        "name": experiment.name,
        "paper": experiment.paper,
        "verdict": c["verdict"],
        "claims": [told(claim) for claim in c["claims"]],
        "asks": [told(claim) for claim in c["asks"]],
        "table": table_of(c, experiment.shows),
        "plot": plot(rows, experiment.shows, "TFLOP"),
        "captions": c["captions"],
        "videos": {label: file.read_bytes() for label, file in files.items() if file.exists()},
        "where": f"{size}; {'; '.join(c['hardware'])}; commit {', '.join(c['commits'])}.",
        "notes": notes.read_text().strip() if notes.exists() else "",
    }


def markdown(sections: Sequence[dict], lines: Sequence[str]) -> str:
    """Return results/README.md; lines: of conclusion."""
    text = [
        "# The paper's claims in miniature",
        f"`python experiments.py NAME` runs one of them. {RULE}",
        "[index.html](index.html) shows the videos, too.",
        "| name | the paper says | ours |\n|---|---|---|",
    ]
    for s, line in zip(sections, lines, strict=True):
        text[-1] += f"\n| [{s['name']}](#{s['name']}) | {s['paper']} | {line} |"
    for s in sections:
        text += [f"## {s['name']}", s["paper"], f"**{s['verdict']}**"]
        text.append("\n".join(f"- {claim}" for claim in s["claims"]))
        if s["asks"]:
            text += ["Beside it:", "\n".join(f"- {claim}" for claim in s["asks"])]
        head, *rows = ("| " + " | ".join(row) + " |" for row in s["table"])
        text.append("\n".join([head, "|---" * len(s["table"][0]) + "|", *rows]))
        text += [f"![scores of {s['name']}]({s['name']}/plot.png)", s["where"], s["notes"]]
    return "\n\n".join(filter(None, text)) + "\n"


def report(out: Path):
    """Write README.md, index.html and a plot for each experiment, from the results in a folder."""
    sections, lines = [], []
    for experiment in EXPERIMENTS:
        if content := conclude(experiment, out):
            sections.append(section(experiment, content, out))
            lines.append(line_of(content))
            write_file(out / experiment.name / "plot.png", sections[-1]["plot"])
    if not sections:
        raise UserError(f"{out} has no results: python experiments.py plan --out {out}")
    write_file(out / "README.md", markdown(sections, lines).encode())
    write_file(out / "index.html", page("The paper's claims in miniature", RULE, sections).encode())
    print(f"{out / 'README.md'}\n{out / 'index.html'}")
