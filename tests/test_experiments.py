"""experiments.py, claims.py, conclusions.py: the rule against closed forms, shared stages, reuse.

Conclusions that are committed are computed again from the scores they came from.
"""

import html
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_run import MICRO, call, one_line

import conclusions
import experiments
from benchmarks import length
from claims import EXPERIMENTS, Arm, latents_as_plan
from conclusions import bootstrap, conclude, judge, line_of, read_results, slug, terms_of
from config import tiny
from data import DataConfig
from evaluate import PLANS
from experiments import configured, stage_flops, stage_key, stages_of
from plumbing.files import read_json
from plumbing.folder import Busy, locked
from settings import override
from toy.scores import LONG_SCORES, SCORES
from toy.world import World

RESULTS = Path(__file__).parent.parent / "results"
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
ARMS = [(e, arm) for e in EXPERIMENTS for arm in e.arms]
pytestmark = pytest.mark.usefixtures("no_curves")


# --- the rule -----------------------------------------------------------------------------------


def test_the_interval_is_that_of_all_resamples():
    """Of three seeds and three prompts two each are drawn: all 9 x 9 resamples can be listed."""
    values = np.array([[0.0, 100.0, 50.0], [100.0, 100.0, 0.0], [20.0, 70.0, 10.0]])
    draws = list(itertools.product(range(3), repeat=2))
    every = [values[np.ix_(s, p)].mean() for s, p in itertools.product(draws, draws)]
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    for found, share in ((low, 0.025), (high, 0.975)):
        near = np.quantile(every, [share - 0.01, share + 0.01], method="closest_observation")
        assert near[0] - 1e-9 <= found <= near[1] + 1e-9


def test_the_spread_is_the_closed_form():
    """Seeds and prompts drawn apart: of the means of each, and of the rest, the unbiased ones."""
    values = np.random.default_rng(1).normal(size=(5, 40)) + np.arange(5)[:, None]
    seeds, prompts = values.mean(1), values.mean(0)
    rest = values - seeds[:, None] - prompts + values.mean()
    spread = (seeds.var() / 4 + prompts.var() / 39 + rest.var() / (4 * 39)) ** 0.5
    _, low, high = bootstrap(values)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)


def test_one_seed_and_equal_scores_have_an_interval():
    assert bootstrap(np.array([[7.0]])) == (7, 7, 7)
    _, low, high = bootstrap(np.array([[0.0, 100.0] * 50]))
    assert (low, high) == pytest.approx((50 - 9.8, 50 + 9.8), abs=1.5)  # of a share of 100 prompts


def results_of(**arms: list[list[float | None]]) -> dict:
    """Return results with these scores of each seed's prompts, all by the way "text"."""
    return {
        name: {seed: {"scores": {"text": {"exact": row}}} for seed, row in enumerate(rows)}
        for name, rows in arms.items()
    }


@pytest.mark.parametrize(
    ("rule", "sides", "limit"),
    [
        ("8 - 64 > -5", [(1, "8"), (-1, "64")], -5),
        ("a, b | vae | x < 2.2", [(1, "a, b | vae | x")], 2.2),
        (
            "KL 3e-05 - Base-CT | base + c > 0",
            [(1, "KL 3e-05"), (-1, "Base-CT | base"), (1, "c")],
            0,
        ),
    ],
)
def test_rules_are_taken_apart(rule, sides, limit):
    assert terms_of(rule) == (sides, "<" if "<" in rule else ">", limit)


@pytest.mark.parametrize(
    ("other", "rule", "verdict"),
    [
        (0, "> 0", "supported"),
        (100, "> 0", "undecided"),
        (100, "> -5", "supported"),
        (100, "> 5", "not supported"),
        (100, "< 5", "supported"),
        (0, "> 100.5", "not supported"),
        (0, "< 99", "not supported"),
    ],
)
def test_a_verdict_follows_its_limit(other, rule, verdict):
    found = results_of(ours=[[100] * 8] * 3, other=[[other] * 8] * 2)
    judged = judge("", f"ours - other {rule}", found)
    assert (judged["verdict"], judged["seeds"]) == (verdict, 2)
    assert judged["mean"] == judged["low"] == judged["high"] == 100 - other


def test_one_seed_decides_nothing():
    one = results_of(ours=[[100] * 8], other=[[0] * 8] * 2)
    assert judge("", "ours - other > 0", one)["verdict"] == "undecided"
    assert judge("", "ours - other > 0", one, least=1)["verdict"] == "supported"
    assert "100.0 to 100.0, one seed)" in conclusions.told(judge("x", "ours - other > 0", one))


def test_who_starts_from_the_base_has_its_compute_too():
    scores = {"scores": {"text": {"exact": [100.0] * 4}, "base": {"exact": [50.0] * 4}}}
    own = {"encoder": 1e12, "latent": 2e12, "semantic": 4e12}
    flops = {"base, quarter": own | {"base": 8e12}, "scratch, quarter": own}
    flops |= {"the base": {"base": 8e12}}
    found = {arm: {0: {**scores, "flops": each}} for arm, each in flops.items()}
    rows = {row["arm"]: row["TFLOP"] for row in conclusions.rows_of(BY_NAME["start"], found)}
    assert rows == {"base, quarter": 15, "scratch, quarter": 7, "the base": 8}


def test_sides_are_added_and_prompts_without_a_score_left_out():
    found = results_of(a=[[100, None, 50]], b=[[0, None, 50]], c=[[25, None, 25]])
    judged = judge("", "a + b | text - c | text | exact > 0", found)
    assert judged["mean"] == 75
    assert judge("", "a - gone > 0", found)["verdict"] == "not run"


def test_one_claim_that_fails_is_enough_and_a_method_that_fails_shows_nothing():
    def verdict(able: float, *verdicts: str) -> str:
        return conclusions.verdict_of([{"verdict": v} for v in verdicts], {"mean": able})

    assert verdict(90, "supported", "supported") == "supported"
    assert verdict(90, "supported", "undecided", "not supported") == "not supported"
    assert verdict(90, "supported", "undecided") == "undecided"
    assert verdict(79.9, "supported", "not supported") == "undecided"
    assert verdict(90, "not supported", "not run") == "not run"


# --- what is claimed ----------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=BY_NAME)
def test_claims_are_about_scores_that_its_arms_have(experiment):
    ways = {arm.name: arm.ways for arm in experiment.arms}
    assert len(ways) == len(experiment.arms) == len({slug(name) for name in ways})
    own = {*SCORES, *LONG_SCORES, "layout", "texture", "flash", "calm", "drift", "growth"}
    assert {*experiment.shows} <= own | {"per plan token"}
    rules = (*experiment.claims.values(), *experiment.asks.values())
    sides = [side for rule in rules for _, side in terms_of(rule)[0]]
    for side in [*sides, *([experiment.able] if experiment.able else ())]:
        arm, way, score = [*side.split(" | "), *("text", "exact")[side.count(" | ") :]]
        assert way in ways[arm], side
        assert score in experiment.shows, side


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize(("experiment", "arm"), ARMS, ids=[f"{e.name} {a.name}" for e, a in ARMS])
def test_every_arm_has_a_configuration(experiment, arm, preset, monkeypatch):
    """Its fields exist, its parts fit; ways are those that evaluate.py knows."""
    monkeypatch.setattr(experiments, "stage_flops", lambda config, stage: 1)
    config = configured(arm, "tiny_long" if experiment.name == "long" else preset, [])
    assert stages_of(config, arm)
    plans = {way.partition(",")[0] for way in arm.ways}
    assert plans <= {"real", "vae", "text", "base", *PLANS, "full", "windows", "tokens"}


def test_bases_of_equal_compute_have_equal_compute():
    config = configured(Arm("", compute=0.5), "tiny", [])
    ours = sum(stage_flops(tiny(), stage) for stage in ("encoder", "latent", "semantic"))
    assert stage_flops(config, "base") == pytest.approx(ours / 2, rel=1e-3)


def test_a_world_of_two_aspects_is_one_line(tmp_path, capsys):
    command = ["plan", "--set", "data.semantic_width=64", "dtype=float32", "--out", tmp_path / "a"]
    assert call(experiments.main, *command, "--runs", tmp_path / "runs") == 2
    one_line(capsys, "drawn in one aspect", "32 x 32 and 32 x 64 differ")


def test_the_compute_of_a_stage_whose_texts_come_slowly():
    """What is dropped depends on the step, of which FLOPs know nothing."""
    slow = override(tiny(), ["stages.latent.text_dropout_start=0.9"])
    assert stage_flops(slow, "latent") == stage_flops(tiny(), "latent")


def test_what_the_user_sets_is_what_arms_are_relative_to():
    fields = ["encoder.dim=32", "stages.latent.steps=10", "stages.semantic.shift=4"]
    arms = {arm.name: configured(arm, "tiny", fields) for arm in BY_NAME["dims"].arms}
    assert arms["none"].compressor.channels == 32 and arms["8"].stages.latent.steps == 10
    assert (
        arms["none, shifted"].stages.semantic.shift == 8
        and arms["2, shifted"].stages.semantic.shift == 2
    )


def test_compute_grows_with_steps_and_batch():
    one = stage_flops(
        override(tiny(), ["stages.latent.batch=2", "stages.latent.steps=5"]), "latent"
    )
    more = stage_flops(
        override(tiny(), ["stages.latent.batch=4", "stages.latent.steps=15"]), "latent"
    )
    assert more == pytest.approx(6 * one, rel=0.01) and one > 0  # places are of all clips


def test_the_cost_is_what_the_benchmark_writes(monkeypatch):
    """Its command line is the benchmark's; the measuring is left out."""

    def here(words, check):
        monkeypatch.setattr(sys, "argv", words[1:])
        length.main()

    fixed = lambda names, tokens, *_: {n: [(t, t / 1000, t) for t in tokens] for n in names}  # noqa: E731
    monkeypatch.setattr(length, "measured", fixed)
    monkeypatch.setattr(length, "DECODED", ())
    monkeypatch.setattr(length, "machine", lambda _: {})
    monkeypatch.setattr(experiments.subprocess, "run", here)
    scores = experiments.measured_cost()
    assert scores["full"]["growth"] == scores["windows"]["growth"] == pytest.approx([2, 2, 2])
    assert scores["tokens"]["per plan token"][0] > 1


# --- ways of making videos, and what is seen of them --------------------------------------------

OWN = tiny().sample
WAYS = {  # name -> who is asked, with what
    "real": "the clips",
    "vae": "the VAE, the clips",
    "text": ("sampled", OWN, {}),
    "base": ("sampled", OWN, {"base": True}),
    "base, guidance 3": ("sampled", replace(OWN, base_guidance=3.0), {"base": True}),
    **{p: ("from_plans", OWN, {"plans": p, "told": True}) for p in PLANS},
    **{f"{p}, no text": ("from_plans", OWN, {"plans": p, "told": False}) for p in PLANS},
}


class Asked:
    """Stands for an Evaluation: its ways return what they are asked for."""

    run, real = SimpleNamespace(config=tiny()), {"rows": "the clips"}

    def sampled(self, rows, options, **how):
        return "sampled", options, how

    def from_plans(self, rows, options, **how):
        return "from_plans", options, how


@pytest.mark.parametrize("name", WAYS)
def test_a_way_is_what_its_name_says(monkeypatch, name):
    monkeypatch.setattr(experiments, "through_vae", lambda run, video: f"the VAE, {video}")
    assert experiments.way_of(Asked(), name)("rows") == WAYS[name]


@pytest.mark.parametrize("flashes", [False, True])
def test_what_is_seen_of_real_clips(flashes):
    """Full marks; what is made from a clip is compared with it, too."""
    world, rows = World(DataConfig(flashes=flashes), "test"), range(2)
    videos, scenes = world.batch(rows).video, [world.scene(i) for i in rows]
    test = SimpleNamespace(scenes=scenes, world=world, long=False, real=videos, indices=rows)
    own = {"colour", "exact", "motion", "number", "shape"}
    own |= {"flash", "calm"} if flashes else set()
    alike = {"layout", "texture"}
    for name, more in {"text": (), "vae": alike, "oracle, no text": alike}.items():
        found = experiments.seen(test, videos, name)
        assert found.keys() == own.union(more)
        assert {x for scores in found.values() for x in scores} <= {100, None}


# --- what is shared -----------------------------------------------------------------------------


def test_arms_share_the_stages_that_their_fields_do_not_change():
    usual, arms = tiny(), {arm.name: arm for arm in BY_NAME["dims"].arms}
    eight, shifted, wide = (
        configured(arms[name], "tiny", []) for name in ("8", "64, shifted", "64")
    )

    def same(one, other, stage: str) -> bool:
        return stage_key(one, stage, 0) == stage_key(other, stage, 0)

    assert same(wide, shifted, "latent") and not same(wide, shifted, "semantic")
    assert same(eight, wide, "encoder") and not same(eight, wide, "latent")
    assert stage_key(usual, "vae", 0) != stage_key(usual, "vae", 1)
    other_vae = override(usual, ["stages.vae.steps=9"])
    assert not same(usual, other_vae, "semantic") and same(usual, other_vae, "encoder")
    assert same(usual, override(usual, ["stages.base.steps=9", "sample.steps=9"]), "semantic")
    assert same(usual, override(usual, (), **latents_as_plan(usual)), "vae")


def run_stub(out: Path, runs: Path, name: str, *words: str) -> int:
    """Run the command with the smallest of everything; return its exit code."""
    small = ("--set", *MICRO, "--prompts", 4, "--seeds", 1)
    return call(experiments.main, name, "--out", out, "--runs", runs, *small, *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with `results` of two experiments, and the `runs` they were made in."""
    folder = tmp_path_factory.mktemp("made")
    assert run_stub(folder / "results", folder / "runs", "plan") == 0
    assert run_stub(folder / "results", folder / "runs", "base", "--arms", "full") == 0
    return folder


def test_a_second_call_runs_what_is_missing_and_nothing_else(made, tmp_path, monkeypatch, capsys):
    stages = []

    def counted(run, todo, *others, train=experiments.train):
        stages.extend(todo)
        train(run, todo, *others)

    def files() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("noise/*.json")}

    monkeypatch.setattr(experiments, "train", counted)
    words = tmp_path, made / "runs", "noise", "--arms"
    assert run_stub(*words, "tau 0") == 0
    assert stages == ["latent", "semantic"]  # VAE and encoder are those of `plan`
    before = files()
    (tmp_path / "noise" / "tau-0.0.json").unlink()
    assert run_stub(*words, "tau 0", "tau 0.2") == 0
    assert stages == ["latent", "semantic"]  # tau 0.2 has those of `plan`; tau 0 was only scored
    assert len(files()) == 3
    before = files()
    assert run_stub(*words, "tau 0") == 0
    assert all(files()[name] == before[name] for name in ("tau-0.0.json", "tau-0.2.0.json"))
    capsys.readouterr()
    assert run_stub(*words, "tau 0", "--prompts", "2") == 2
    error = capsys.readouterr().err
    assert re.search("tau-0.0.json is of other settings .prompts 4 -> 2.*remove it", error)
    assert run_stub(*words, "tau 0", "--set", *MICRO, "dtype=bfloat16") == 2
    assert "other settings (dtype float32 -> bfloat16)" in capsys.readouterr().err
    assert run_stub(*words, "tau 1", "--prompts", "2") == 2  # what it would be compared with
    assert "is of other settings (prompts 4 -> 2)" in capsys.readouterr().err
    (tmp_path / "noise" / "tau-0.0.json").write_text("{}")
    assert run_stub(*words, "tau 0") == 2
    assert "tau-0.0.json is not a result: remove it" in capsys.readouterr().err


def test_what_another_process_runs_is_left_to_it(tmp_path, monkeypatch):
    """The job is put back, and found done when the other one is."""
    (arm,) = (arm for arm in BY_NAME["noise"].arms if arm.name == "tau 0")
    folders = {"out": tmp_path / "results", "runs": tmp_path / "runs"}
    options = SimpleNamespace(seeds=1, prompts=4, preset=None, settings=MICRO, arms=(), **folders)
    job = experiments.Job(BY_NAME["noise"], arm, 0, options)
    stage = tmp_path / "runs" / "stages" / f"vae-{stage_key(job.config, 'vae', 0)}"
    with locked(stage), pytest.raises(Busy):
        experiments.run_job(job)
    assert not job.done

    def finish(seconds):  # what the other process does meanwhile
        job.file.parent.mkdir(parents=True)
        found = {"prompts": 4, "config": experiments.flat_fields(job.config)}
        job.file.write_text(json.dumps(found))

    monkeypatch.setattr(experiments.time, "sleep", finish)
    options = options.__class__(**{**vars(options), "arms": ["tau 0"]})
    with locked(stage):
        experiments.run_all([BY_NAME["noise"]], options)
    assert job.done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost", "--preset", "small"], "cost times tiny's painter"),
        (["all", "--set", "data.count=9"], "cost times tiny's painter"),
        (["speed"], "speed: choose list, all, report, or some of plan"),
        (["list", "plan"], "list: choose"),
        (["plan", "--arms", "tau 0"], "--arms tau 0: choose from full"),
        (["plan", "--seeds", "0"], "--seeds: at least 1"),
        (["report"], "has no results: python experiments.py plan"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, words, message):
    assert call(experiments.main, *words, "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- the page -----------------------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def numbers_of(content) -> set[str]:
    """Return all numbers in what json holds, as text and rounded as the page does."""
    if isinstance(content, dict):
        return set().union(*map(numbers_of, content.keys()), *map(numbers_of, content.values()))
    if isinstance(content, list):
        return set().union(*map(numbers_of, content))
    if isinstance(content, str):
        return set(NUMBER.findall(content))
    return {f"{abs(content):g}", f"{abs(content):.1f}"} if content is not None else set()


def text_of(page: str) -> str:
    """Return what a reader of a page sees of it."""
    page = re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", " ", page))


@pytest.mark.parametrize("folder", ["made here", "committed"])
def test_the_page_has_no_number_of_its_own(made, folder):
    out = RESULTS if folder == "committed" else made / "results"
    if folder == "made here":
        conclusions.report(out)
    elif not (out / "index.html").exists():
        pytest.skip("no results yet")
    known = numbers_of([read_json(file) for file in out.glob("*/conclusion.json")])
    known |= set(NUMBER.findall(conclusions.RULE + conclusions.LEGEND)) | {"1"}
    page, readme = ((out / name).read_text() for name in ("index.html", "README.md"))
    shown = set(NUMBER.findall(text_of(page)))
    assert len(shown) > 10 and shown <= known, shown - known
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # it needs no other file
    assert text_of(readme).split() == text_of(page).split()[len(conclusions.TITLE.split()) :]
    assert all((out / name).exists() for name in re.findall(r'src="([^"]*)"', readme))


def committed() -> list[str]:
    return sorted(file.parent.name for file in RESULTS.glob("*/conclusion.json"))


@pytest.mark.parametrize("name", committed())
def test_a_committed_conclusion_is_that_of_its_scores(name):
    kept = read_json(RESULTS / name / "conclusion.json")
    again = json.loads(json.dumps(conclude(BY_NAME[name], read_results(RESULTS, BY_NAME[name]))))

    def compare(one, other):
        if isinstance(one, float | int) and not isinstance(one, bool):
            assert one == pytest.approx(other, abs=0.5)  # numpy's random numbers may change
        elif isinstance(one, dict):
            assert one.keys() == other.keys()
            [compare(one[key], other[key]) for key in one]
        elif isinstance(one, list):
            assert len(one) == len(other)
            [compare(*both) for both in zip(one, other, strict=True)]
        else:
            assert one == other

    compare(kept, again)
    assert html.escape(line_of(kept)) in (RESULTS / "README.md").read_text()
