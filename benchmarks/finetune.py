"""Painter and planner fine-tuned from a text-to-video model, against that model trained on.

    python benchmarks/finetune.py --seeds 0 1 2              # the preset wan_tiny
    python benchmarks/finetune.py --seeds 0 --steps 2500 900 600 --prompts 512

For each seed: the transformer learns text to video from nothing (stage `base`) and is written as a
released one. From it start, by --dit, painter and planner, and Base-CT (Table 1): the same model
trained on without a plan, for as many steps as take as long as painter and planner together. A
command that was stopped goes on. VAE and encoder are not counted: a real run takes them released.
Scores are those of evaluate.py, beside it the seconds of each stage, in OUT/SEED/scores.json; a
table of all seeds is printed.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate
import train
from config import preset
from plumbing.fields import add_set_flag, command_line, flat_fields
from plumbing.files import UserError, command, read_json, write_file
from plumbing.metrics import read_metrics
from run import Run, export
from settings import Config, override
from toy.world import World
from wan import describe_transformer

STAGES = ("base", "latent", "semantic")


def seconds(run: Run, stage: str) -> float:
    """Return how long a stage took, of metrics.jsonl."""
    lines = read_metrics(run.path / "metrics.jsonl")
    return max(line["seconds"] for line in lines if line["stage"] == stage)


def trained(path: Path, config: Config, stages: list[str], seed: int) -> Run:
    """Train stages of a run, or go on with them."""
    run = Run.create(path, config)
    train.train(run, stages, World(config.data, "train"), seed)
    return run


def scored(run: Run, file: Path, prompts: int, *flags: str) -> dict:
    """Return what evaluate.py finds."""
    if not file.exists():
        before, sys.argv = sys.argv, ["evaluate.py", "--run", str(run.path)]
        sys.argv += ["--prompts", str(prompts), "--json", str(file), *flags]
        evaluate.main()
        sys.argv = before
    return json.loads(file.read_text())


def one_seed(out: Path, config: Config, seed: int, steps: list[int], prompts: int) -> dict:
    """Train all arms with one seed and return their scores, and the seconds of each stage.

    UserError if what is in the folder was made with other steps, prompts or fields.
    """
    asked = {"steps": steps, "prompts": prompts, "config": flat_fields(config)}
    if (file := out / "asked.json").exists() and read_json(file) != asked:
        raise UserError(f"{out} was made with other steps, prompts or fields: give another --out")
    write_file(file, json.dumps(asked).encode())
    first = override(config, [f"stages.base.steps={steps[0]}"])
    start = trained(out / "start", first, ["encoder", "base"], seed)
    export(start.path, out / "released")
    wan = describe_transformer(str(out / "released"))
    parts = {x: replace(getattr(config, x), wan=wan) for x in ("latent", "semantic")}
    after = [f"stages.latent.steps={steps[1]}", f"stages.semantic.steps={steps[2]}"]
    tuned = override(config, after, **parts)
    run = Run.create(out / "tuned", tuned)
    for stage in ("vae", "encoder"):  # the transformer's latents are those of this VAE
        shutil.copy(start.weights_file(stage), run.path)
    run = trained(run.path, tuned, ["latent", "semantic"], seed)
    took = {"start": seconds(start, "base")}
    took |= {stage: seconds(run, stage) for stage in ("latent", "semantic")}
    further = round((took["latent"] + took["semantic"]) * steps[0] / took["start"])
    control = override(tuned, [f"stages.base.steps={max(1, further)}"])
    run = trained(run.path, control, ["base"], seed)
    scores = {
        "the start": scored(start, out / "start.json", prompts, "--base"),
        "SemanticGen": scored(run, out / "plans.json", prompts, "--plans", "oracle", "shuffled"),
        "Base-CT": scored(run, out / "base.json", prompts, "--base", "--sweep"),
    }
    found = {"steps": [*steps, further], "seconds": {**took, "Base-CT": seconds(run, "base")}}
    found["scores"] = {name: content["scores"] for name, content in scores.items()}
    write_file(out / "scores.json", json.dumps(found, indent=1).encode())
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="wan_tiny")
    how = "of text to video, then of painter and planner"
    parser.add_argument("--steps", type=int, nargs=3, default=[2500, 900, 600], help=how)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    add_set_flag(parser)
    args = parser.parse_args()
    config = override(preset(args.preset), args.settings)
    each = [one_seed(args.out / str(x), config, x, args.steps, args.prompts) for x in args.seeds]
    print("\n| exact, % | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " |")
    print("|---" * (len(each) + 1) + "|")
    for name, ways in each[0]["scores"].items():
        for way in ways:
            cells = [f"{found['scores'][name][way]['exact']:.1f}" for found in each]
            print(f"| {name}: {way} | " + " | ".join(cells) + " |")
    for name in each[0]["seconds"]:
        cells = [f"{found['seconds'][name]:.0f}" for found in each]
        print(f"| seconds: {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    command(main)
