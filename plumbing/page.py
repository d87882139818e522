"""Results to look at: plots of scores, small animations, and one page that holds all of it."""

import base64
import html
import io
from collections.abc import Sequence

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


def plot(rows: Sequence[dict], shows: Sequence[str], cost: str) -> bytes:
    """Return a PNG: the scores of each row; or, of rows with a line, curves of the first score.

    rows: "label" and "scores" {name: "mean", "low", "high", "seeds"}; for curves also "line", "way"
    and what is called `cost`.
    """
    matplotlib = require("matplotlib", "plot")
    matplotlib.use("agg")
    from matplotlib import pyplot

    curved = any(row["line"] for row in rows)
    columns, size = len(shows), (2.5 + 2 * len(shows), 1 + 0.3 * len(rows))
    if curved:
        columns, size = 1, (6, 4)
    figure, panels = pyplot.subplots(
        1, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    if curved:
        draw_curves(panels[0, 0], rows, shows[0], cost)
    else:
        for panel, name in zip(panels[0], shows, strict=True):
            draw_dots(panel, rows, name)
        panels[0, 0].set_yticks(range(len(rows)), [row["label"] for row in rows])
        panels[0, 0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    pyplot.close(figure)
    return buffer.getvalue()


def draw_dots(panel, rows: Sequence[dict], name: str):
    """Draw one score of each row: mean, interval, and a dot for each seed."""
    for place, row in enumerate(rows):
        if score := row["scores"].get(name):
            ends = [score["low"], score["high"]]
            panel.plot(ends, [place, place], color="tab:blue", alpha=0.4, lw=5)
            panel.plot(score["seeds"], [place] * len(score["seeds"]), "k.", ms=4)
            panel.plot(score["mean"], place, "|", color="tab:blue", ms=12, mew=2)
    panel.set(title=name)
    panel.grid(axis="x", alpha=0.3)


def draw_curves(panel, rows: Sequence[dict], name: str, cost: str):
    """Draw a score against its cost, a curve for each line and way."""
    curves: dict[str, list] = {}
    for row in rows:
        if score := row["scores"].get(name):
            curves.setdefault(f"{row['line']}: {row['way']}", []).append((row[cost], score))
    for label, points in curves.items():
        x, scores = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        low, high = ([score[end] for score in scores] for end in ("low", "high"))
        (drawn,) = panel.plot(x, [score["mean"] for score in scores], "o-", label=label)
        panel.fill_between(x, low, high, alpha=0.15, color=drawn.get_color(), lw=0)
    panel.set(xlabel=f"{cost} of training", ylabel=name)
    panel.grid(alpha=0.3)
    panel.legend()


def inline(content: bytes, kind: str) -> str:
    """Return an image as a data address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def marked(said: str) -> str:
    """Return an item of a list that begins with a verdict, marked by it."""
    return f'<li class="{said.split()[0].strip(":")}">{html.escape(said)}'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, ready-made HTML, as a table."""
    return "\n".join(["<table>", *("<tr><td>" + "<td>".join(row) for row in rows), "</table>"])


def shown(section: dict) -> str:
    """Return a section of the page (`page`)."""
    name, escape = section["name"], html.escape
    parts = [f'<h2 id="{name}">{name}</h2><p>{escape(section["paper"])}</p>']
    parts += ["<ul>", *map(marked, section["claims"]), "</ul>"]
    if section["asks"]:
        parts += ["<p>Beside it:</p><ul>", *map(marked, section["asks"]), "</ul>"]
    parts += [f"<p>{escape(section['notes'])}</p>"] if section["notes"] else []
    parts.append(table([[escape(cell) for cell in row] for row in section["table"]]))
    parts.append(f'<img src="{inline(section["plot"], "png")}" alt="scores of {name}">')
    if section["videos"]:
        told = "".join(f"<li>{escape(caption)}" for caption in section["captions"])
        parts.append(f"<p>Videos, from left to right:</p><ol>{told}</ol>")
        address = {label: inline(video, "webp") for label, video in section["videos"].items()}
        picture = '<img class="videos" src="{}" alt="">'
        parts.append(table([[escape(k), picture.format(v)] for k, v in address.items()]))
    return "\n".join([*parts, f"<p><small>{escape(section['where'])}</small></p>"])


def page(title: str, intro: str, sections: Sequence[dict]) -> str:
    """Return one HTML page that needs no other file.

    sections: name, paper, verdict, claims and asks (text that begins with a verdict), table, plot
    (PNG), videos {label: WebP} under their captions, where it was run, and notes.
    """
    rows = [["experiment", "the paper says", "ours"]]
    for section in sections:
        link = f'<a href="#{section["name"]}">{section["name"]}</a>'
        kind, paper = section["verdict"].split()[0], html.escape(section["paper"])
        rows.append([link, paper, f'<span class="{kind}">{section["verdict"]}</span>'])
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(intro)}</p>",
        *(table(rows), *map(shown, sections)),
    ]
    return "\n".join([*parts, "</html>", ""])
