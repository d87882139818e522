"""What training logs: metrics.jsonl and the curves drawn from it."""

import io
import json
import math
from pathlib import Path

from config import STAGES
from plumbing.files import UserError, write_file
from run import Run


class Metrics:
    """Averages of what each step logs, one JSON line at a time, and the loss curve."""

    def __init__(self, run: Run, stage: str, step: int, pending: list[dict]):
        """step: what training goes on from; pending: logs since the last line, added by others."""
        self.path, self.stage, self.pending = run.path / "metrics.jsonl", stage, pending
        self.board = run.board
        text = self.path.read_text("utf-8", "replace") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
        lines = read_metrics(self.path, whole)
        # Lines after the state that training goes on from will be written again.
        kept = [x for x in lines if x["stage"] != stage or x["step"] <= step]
        if kept != lines or whole != text:
            write_file(self.path, "".join(json.dumps(x) + "\n" for x in kept).encode())

    def write(self, step: int, now: dict, clock: dict) -> dict:
        """Append the means of what is pending; now, clock: values of the moment, and timings."""
        line = {"stage": self.stage, "step": step, **now}
        line |= {name: float(f"{value:.4g}") for name, value in clock.items()}
        for name in dict.fromkeys(name for x in self.pending for name in x):
            values = [x[name] for x in self.pending if not math.isnan(x.get(name, math.nan))]
            if values:  # empty bins of t are left out
                mean = sum(values) / len(values)
                line[name] = round(sum(values) if name == "skipped" else mean, 6)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name not in ("stage", "step"):
                    self.board.add_scalar(f"{self.stage}/{name}", value, step)
        return line

    def plot(self):
        """Draw loss.png, a panel for each stage, if matplotlib is there."""
        try:
            import matplotlib
        except ImportError:
            print('no loss.png: pip install "semanticgen[plot]" for the curves')
            return
        matplotlib.use("agg")
        from matplotlib import pyplot

        lines = read_metrics(self.path, self.path.read_text("utf-8", "replace"))
        stages = [s for s in STAGES if any(x["stage"] == s for x in lines)]
        figure, panels = pyplot.subplots(
            1, len(stages), figsize=(4 * len(stages), 3), squeeze=False, layout="constrained"
        )
        for panel, stage in zip(panels[0], stages, strict=True):
            mine = [x for x in lines if x["stage"] == stage]
            panel.plot([x["step"] for x in mine], [x.get("loss", math.nan) for x in mine])
            panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        pyplot.close(figure)
        write_file(self.path.with_name("loss.png"), buffer.getvalue())


def read_metrics(path: Path, text: str) -> list[dict]:
    """Return the lines of a metrics.jsonl; UserError if one is not of ours."""
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            lines.append(json.loads(line))
            _ = lines[-1]["stage"] + "", lines[-1]["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}, line {number}: not a line of metrics: remove it") from None
    return lines
