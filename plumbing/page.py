"""Results to look at: plots of scores, small animations, and one page that holds all of it."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from plumbing.files import require

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; text-align: left }
td, th { border-bottom: 1px solid #ddd; font-weight: normal; vertical-align: middle }
.supported { color: #17692f } .not { color: #a4161a } .undecided { color: #8a6d00 }
.videos { image-rendering: pixelated; height: 96px } figcaption, small { color: #666 }
img { max-width: 100% }
"""


def animation(videos: Tensor, fps: float) -> bytes:
    """Return videos (B, 3, F, H, W) uint8 side by side as one animated .webp, lossless."""
    frames = rearrange(videos, "b c f h w -> f h b w c").numpy()
    gap = np.full((*frames.shape[:3], 2, 3), 255, np.uint8)
    pictures = [
        Image.fromarray(picture)
        for picture in rearrange(np.concatenate([frames, gap], 3), "f h b w c -> f h (b w) c")
    ]
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / fps)}
    pictures[0].save(buffer, "webp", loop=0, lossless=True, method=6, **options)
    return buffer.getvalue()


def plot(rows: Sequence[dict], shows: Sequence[str]) -> bytes:
    """Return a PNG: scores of each row with intervals and seeds; or curves of the first score.

    rows: "label", "scores" {name: "mean", "low", "high", "seeds"}; for curves of score against
    compute also "line", "way" and "PFLOP".
    """
    matplotlib = require("matplotlib", "plot")
    matplotlib.use("agg")
    from matplotlib import pyplot

    curved = any(row["line"] for row in rows)
    size = (6, 4) if curved else (2.5 + 2 * len(shows), 1 + 0.3 * len(rows))
    figure, panels = pyplot.subplots(
        1,
        1 if curved else len(shows),
        figsize=size,
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    if curved:
        draw_curves(panels[0, 0], rows, shows[0])
    else:
        for panel, name in zip(panels[0], shows, strict=True):
            draw_dots(panel, rows, name)
        panels[0, 0].set_yticks(range(len(rows)), [row["label"] for row in rows])
        panels[0, 0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    return buffer.getvalue()


def draw_dots(panel, rows: Sequence[dict], name: str):
    """Draw one score of each row: mean, interval, and a dot for each seed."""
    for place, row in enumerate(rows):
        if score := row["scores"].get(name):
            panel.plot(
                [score["low"], score["high"]], [place, place], color="tab:blue", alpha=0.4, lw=5
            )
            panel.plot(score["seeds"], [place] * len(score["seeds"]), "k.", ms=4)
            panel.plot(score["mean"], place, "|", color="tab:blue", ms=12, mew=2)
    panel.set(title=name)
    panel.grid(axis="x", alpha=0.3)


def draw_curves(panel, rows: Sequence[dict], name: str):
    """Draw a score against compute, a curve for each line and way."""
    curves: dict[str, list] = {}
    for row in rows:
        if score := row["scores"].get(name):
            curves.setdefault(f"{row['line']}: {row['way']}", []).append((row["PFLOP"], score))
    for label, points in curves.items():
        x, scores = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        low, high = ([score[end] for score in scores] for end in ("low", "high"))
        (drawn,) = panel.plot(x, [score["mean"] for score in scores], "o-", label=label)
        panel.fill_between(x, low, high, alpha=0.15, color=drawn.get_color(), lw=0)
    panel.set(xlabel="PFLOP of training, without the VAE's", ylabel=name, xscale="log")
    panel.grid(alpha=0.3)
    panel.legend()


def inline(file: Path, kind: str) -> str:
    """Return a file as a data address."""
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def scores_table(rows: Sequence[dict], shows: Sequence[str]) -> str:
    """Return the rows with their scores as a table."""
    cells = "".join(f"<th>{html.escape(name)}" for name in shows)
    lines = [f"<table><tr><th>{cells}<th>PFLOP"]
    for row in rows:
        line = f"<tr><td>{html.escape(row['label'])}"
        for name in shows:
            score = row["scores"].get(name)
            text = f"{score['mean']:.1f} <small>{score['low']:.1f} to {score['high']:.1f}</small>"
            line += f"<td>{text if score else ''}" if score else "<td>"
        lines.append(f"{line}<td>{row['PFLOP']:g}")
    return "\n".join([*lines, "</table>"])


def videos_table(rows: Sequence[dict], captions: Sequence[str]) -> str:
    """Return the moving samples, a row for each arm and way, under their captions."""
    shown = [row for row in rows if row["videos"]]
    if not shown:
        return ""
    told = "".join(f"<li>{html.escape(caption)}" for caption in captions)
    lines = [f"<p>Videos, left to right:</p><ol>{told}</ol><table>"]
    for row in shown:
        picture = f'<img class="videos" src="{inline(row["videos"], "webp")}" alt="">'
        lines.append(f"<tr><td>{html.escape(row['label'])}<td>{picture}")
    return "\n".join([*lines, "</table>"])


def page(rule: str, sections: Sequence[tuple], line_of: Callable, told: Callable, out: Path) -> str:
    """Return one HTML page that needs no other file.

    sections: (conclusion, its rows, the scores to show); line_of(conclusion), told(claim): text.
    """
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        "<title>The paper's claims in miniature</title>",
        f"<style>{STYLE}</style><h1>The paper's claims in miniature</h1><p>{html.escape(rule)}</p>",
    ]
    parts.append("<table><tr><th>experiment<th>the paper says<th>ours")
    for c, *_ in sections:
        kind = c["verdict"].split()[0]
        name = f'<a href="#{c["experiment"]}">{c["experiment"]}</a>'
        parts.append(
            f'<tr><td>{name}<td>{html.escape(c["paper"])}<td class="{kind}">{c["verdict"]}'
        )
    parts.append("</table>")
    for c, rows, shows in sections:
        parts.append(f'<h2 id="{c["experiment"]}">{c["experiment"]}</h2>')
        parts.append(f"<p>{html.escape(c['paper'])}</p><ul>")
        for claim in (*c["claims"], *c["asks"]):
            kind = claim["verdict"].split()[0]
            beside = "" if claim in c["claims"] else "<small>beside it</small> "
            parts.append(f'<li class="{kind}">{beside}{html.escape(told(claim))}')
        parts.append(f"</ul>{scores_table(rows, shows)}")
        parts.append(f'<img src="{inline(out / c["experiment"] / "plot.png", "png")}" alt="plot">')
        parts.append(videos_table(rows, c["captions"]))
        size = f"{c['seeds']} seeds, {c['prompts']} prompts, preset {c['preset']}"
        where = f"{size}; {'; '.join(c['hardware'])}; commit {', '.join(c['commits'])}"
        parts.append(f"<p><small>{html.escape(where)}</small></p>")
    return "\n".join([*parts, "</html>", ""])
