"""Results to look at: plots of scores, small animations, and one page that holds all of it."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from plumbing.files import replacing, require

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; text-align: left }
td, th { border-bottom: 1px solid #ddd; font-weight: normal; vertical-align: middle }
.supported { color: #17692f } .not { color: #a4161a } .undecided { color: #8a6d00 }
img[height] { image-rendering: pixelated } small { color: #666 }
img { max-width: 100% }
"""


def animation(path: Path, videos: Tensor, fps: float):
    """Write videos (B, 3, F, H, W) uint8 side by side as one animated .webp."""
    frames = rearrange(videos, "b c f h w -> f h b w c").numpy()
    gap = np.full((*frames.shape[:3], 2, 3), 255, np.uint8)
    pictures = [
        Image.fromarray(picture)
        for picture in rearrange(np.concatenate([frames, gap], 3), "f h b w c -> f h (b w) c")
    ]
    options = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / fps)}
    options |= {"quality": 90, "method": 6}  # lossless ones are seven times as large
    with replacing(path) as file:
        pictures[0].save(file, "webp", loop=0, **options)


def plot(path: Path, rows: Sequence[dict], shows: Sequence[str], cost: str):
    """Write a PNG: the scores of each row; or, of rows with a line, curves of the first score.

    rows: "label" and "scores" {name: "mean", "low", "high", "seeds"}; for curves also "line", "way"
    and what is called `cost`.
    """
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    curved = any(row["line"] for row in rows)
    columns, size = len(shows), (2.5 + 2 * len(shows), 1 + 0.3 * len(rows))
    if curved:
        columns, size = 1, (6, 4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharey=True)
    if curved:
        draw_curves(panels[0, 0], rows, shows[0], cost)
    else:
        for panel, name in zip(panels[0], shows, strict=True):
            draw_dots(panel, rows, name)
        panels[0, 0].set_yticks(range(len(rows)), [row["label"] for row in rows])
        panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=80)


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


def inline(file: Path) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/{file.suffix[1:]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def marked(said: str) -> str:
    """Return text that begins with a verdict, coloured by it."""
    return f'<span class="{said.split()[0].strip(".:")}">{html.escape(said)}</span>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, ready-made HTML, as a table."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def listed(items: Sequence[str], kind: str = "ul") -> str:
    """Return items, ready-made HTML, as a list."""
    return f"<{kind}>" + "\n".join(f"<li>{item}</li>" for item in items) + f"</{kind}>"


def shown(section: dict, address: Callable[[Path], str]) -> str:
    """Return a section (`body`)."""
    escape, image = html.escape, '<img src="{}" alt="{}"{}>'
    name, videos = section["name"], section["videos"].items()
    parts = [f'<h2 id="{name}">{name}</h2>', f"<p>{escape(section['paper'])}</p>"]
    parts.append(listed(map(marked, section["claims"])))
    if section["asks"]:
        parts += ["<p>Beside it:</p>", listed(map(marked, section["asks"]))]
    parts += [f"<p>{escape(section['notes'])}</p>"] if section["notes"] else []
    parts.append(table([[escape(cell) for cell in row] for row in section["table"]]))
    parts.append(image.format(address(section["plot"]), f"scores of {name}", ""))
    if videos:
        parts.append("<p>Videos, from left to right:</p>")
        parts.append(listed(map(escape, section["captions"]), "ol"))
        rows = [[escape(k), image.format(address(v), "videos", ' height="96"')] for k, v in videos]
        parts.append(table(rows))
    return "\n".join([*parts, f"<p><small>{escape(section['where'])}</small></p>"])


def body(title: str, intro: str, sections: Sequence[dict], address: Callable[[Path], str]) -> str:
    """Return sections as HTML, which is Markdown, too.

    sections: name, paper, line, claims and asks (text that begins with a verdict), table,
    plot and videos {label: file} under their captions, where it was run, and notes. address: of an
    image in the page.
    """
    rows = [["experiment", "the paper says", "ours"]]
    for section in sections:
        link = f'<a href="#{section["name"]}">{section["name"]}</a>'
        rows.append([link, html.escape(section["paper"]), marked(section["line"])])
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(intro)}</p>", table(rows)]
    return "\n".join([*parts, *(shown(section, address) for section in sections), ""])


def page(title: str, content: str) -> str:
    """Return a `body` as a page of its own."""
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{content}</body></html>\n'
