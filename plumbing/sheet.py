"""Contact sheets: a row of frames for each clip, under its label."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from plumbing.files import replacing


def shown_frames(frames: int) -> list[int]:
    """Return which frames of a video a sheet shows: up to 8, the first and the last with them."""
    return np.linspace(0, frames - 1, min(frames, 8)).round().astype(int).tolist()


def picked(pieces: Iterable[Tensor], numbers: Sequence[int], kept: list) -> Iterator[Tensor]:
    """Pass a video's pieces (3, f, H, W) on, and append its frames of these numbers to a list."""
    start = 0
    for piece in pieces:
        inside = [n - start for n in numbers if start <= n < start + piece.shape[1]]
        kept += piece[:, inside].unbind(1)  # each (3, H, W)
        start += piece.shape[1]
        yield piece


def contact_sheet(videos: Tensor, labels: Sequence[str], path: Path | None = None) -> Image.Image:
    """Draw one row for each clip, up to 8 of its frames under its label; write it as PNG to path.

    videos: (B, 3, F, H, W) uint8
    """
    B, _, F, H, W = videos.shape
    scale, gap, line = max(1, round(128 / max(H, W))), 4, 18  # pixels
    H, W = H * scale, W * scale
    numbers = shown_frames(F)
    width = max(480, len(numbers) * (W + gap) + gap)
    font = ImageFont.load_default(14)
    columns = int((width - 2 * gap) / font.getlength("W"))
    texts = [textwrap.wrap(x[:5000], columns, max_lines=20, placeholder=" ...") for x in labels]
    height = sum(len(text) * line + H + 2 * gap for text in texts)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for video, text in zip(videos, texts, strict=True):
        for row in text:
            draw.text((gap, y), row, "black", font)
            y += line
        for column, frame in enumerate(rearrange(video[:, numbers], "c f h w -> f h w c")):
            picture = Image.fromarray(frame.numpy()).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (W + gap), y))
        y += H + 2 * gap
    if path is not None:
        with replacing(path) as file:
            sheet.save(file, "png")
    return sheet
