"""What training says and writes as it goes: a progress bar, metrics.jsonl, the curves of it."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from plumbing.files import UserError, naming, replacing, update_file
from plumbing.processes import Team
from plumbing.progress import Progress


class Metrics:
    """Averages of what each step logs, one JSON line at a time, and the loss curve."""

    def __init__(self, folder: Path, stage: str, step: int, board=None):
        """step: what training goes on from. board: a SummaryWriter of TensorBoard, if asked for."""
        self.path, self.stage, self.board = folder / "metrics.jsonl", stage, board
        # Lines after the state that training goes on from will be written again.
        kept = [x for x in read_metrics(self.path) if x["stage"] != stage or x["step"] <= step]
        if self.path.exists():
            update_file(self.path, "".join(json.dumps(x) + "\n" for x in kept).encode())

    def write(self, step: int, logs: Sequence[dict], now: dict, clock: dict) -> dict:
        """Append a line: means of what several steps logged, values of this moment, and timings."""
        line = {"stage": self.stage, "step": step, **now}
        line |= {name: float(f"{value:.4g}") for name, value in clock.items()}
        for name in dict.fromkeys(name for x in logs for name in x):
            values = [x[name] for x in logs if not math.isnan(x.get(name, math.nan))]
            if values:  # empty bins of t are left out
                mean = sum(values) / len(values)
                line[name] = round(sum(values) if name == "skipped" else mean, 6)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name not in ("stage", "step"):
                    self.board.add_scalar(f"{self.stage}/{name}", value, step)
        return line

    def plot(self):
        """Draw loss.png, a panel for each stage, if matplotlib is there."""
        if not (lines := read_metrics(self.path)):
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print('no loss.png: pip install "semanticgen[plot]" for the curves')
            return
        stages = list(dict.fromkeys(line["stage"] for line in lines))  # in the order of training
        figure = Figure(figsize=(4 * len(stages), 3), layout="constrained")
        panels = figure.subplots(1, len(stages), squeeze=False)
        for panel, stage in zip(panels[0], stages, strict=True):
            mine = [x for x in lines if x["stage"] == stage]
            dots = "." if len(mine) == 1 else ""  # one point makes no line
            losses = [x.get("loss", math.nan) for x in mine]
            panel.plot([x["step"] for x in mine], losses, marker=dots)
            panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        with replacing(self.path.with_name("loss.png")) as file:
            figure.savefig(file, format="png", dpi=100)


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics.jsonl, if it is there; UserError if one is not of ours."""
    lines, text = [], path.read_text("utf-8", "replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):  # a killed run may leave half a line
        if not line:
            continue
        try:
            lines.append(json.loads(line))
            _ = lines[-1]["stage"] + "", lines[-1]["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}, line {number}: not a line of metrics: remove it") from None
    return lines


class Reporter:
    """Reports on a stage: the bar after every step, a line of metrics after some, then curves."""

    def __init__(self, progress: Progress, folder: Path, team: Team, a_step: dict, board=None):
        """a_step: how much of each rate (`clips_s`, ...) one step does (`stages.work`)."""
        self.progress, self.team, self.a_step = progress, team, a_step
        if team.first:
            self.metrics = Metrics(folder, progress.stage, progress.step, board)
        self.bar = tqdm(
            total=progress.of,
            initial=progress.step,
            desc=progress.stage,
            unit="step",
            dynamic_ncols=True,
            disable=not team.first,
        )
        self.clock = self.lap = time.perf_counter()
        self.counted = progress.step  # at the last lap

    def after_step(self, now: dict[str, float], every: int):
        """Count a step; write a line after `every` steps and the last. now: values of now."""
        progress, clock = self.progress, time.perf_counter()
        progress.seconds, self.clock = progress.seconds + clock - self.clock, clock
        self.bar.update()
        if progress.step % every and progress.step < progress.of:
            return
        if self.team.first:
            each = (clock - self.lap) / (progress.step - self.counted)
            rates = {name: amount / each for name, amount in self.a_step.items()}
            timings = {"seconds": progress.seconds, **rates}
            line = self.metrics.write(progress.step, progress.pending, now, timings)
            loss = f"{line.get('loss', math.nan):.4f}"
            self.bar.set_postfix(loss=loss, clips_s=f"{line['clips_s']:.0f}")
            if line.get("active_channels") == 0:
                self.bar.write(
                    f"warning: step {progress.step}: the plan has died (KL is 0); lower kl_weight"
                )
        progress.pending.clear()
        self.lap, self.counted = clock, progress.step

    def finish(self):
        """Draw the curves."""
        if self.team.first:
            self.metrics.plot()
        self.team.wait()
