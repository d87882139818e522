"""Which videos a folder holds, and their captions.

Either captions.jsonl, one {"video": "relative/path.mp4", "caption": "..."} a line, or NAME.txt
beside each video.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from plumbing.files import UserError
from plumbing.video import VIDEOS

NO_TEXT = re.compile("[\0-\x08\x0e-\x1f\udc80-\udcff]")  # what is left where bytes are no text


def read_text(file: Path) -> str:
    """Read UTF-8 or UTF-16, with its mark or without; of other bytes `NO_TEXT` is left."""
    content = file.read_bytes()
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        return content.decode("utf-8", "surrogateescape")


def list_videos(folder: Path) -> list[tuple[Path, str]]:
    """Return (file, caption) of a dataset folder; the caption is "" where none can be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    listing = folder / "captions.jsonl"
    if listing.exists():
        return read_listing(listing)
    files = sorted(all_in(folder))
    texts = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt" and p.is_file()}
    videos = [p for p in files if p.suffix.lower() in VIDEOS]
    missing = texts.keys() - {p.with_suffix("") for p in videos}  # what has them is read, or named
    videos += [p for p in files if p.with_suffix("") in missing and p.suffix.lower() != ".txt"]
    folders = {p for p in videos if p.is_dir()}  # of images: each is one video
    videos = [p for p in videos if not folders.intersection(p.parents)]
    if not videos:
        raise UserError(f"{folder}: neither captions.jsonl nor any video is in it")
    beside = {name: read_text(file) for name, file in texts.items()}
    captions = [(p, beside.get(p.with_suffix(""), "")) for p in sorted(videos)]
    return [(p, "" if NO_TEXT.search(text) else cleaned(text)) for p, text in captions]


def all_in(folder: Path) -> Iterator[Path]:
    """Yield the files and folders in a folder, but not what systems and editors hide there.

    Links are followed, but no folder is read twice: one may lie in itself.
    """

    def named(error: OSError):
        print(f"skipped {error.filename}: {error.strerror}")

    read = set()
    for place, folders, files in os.walk(folder, onerror=named, followlinks=True):
        if (real := os.path.realpath(place)) in read:
            folders.clear()
            continue
        read.add(real)
        seen = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(seen, key=lambda name: (os.path.islink(Path(place, name)), name))
        yield from (Path(place, name) for name in [*folders, *files] if not name.startswith("."))


def cleaned(text: str) -> str:
    """Return a caption in one line, without marks of the byte order."""
    return " ".join(text.replace("\ufeff", "").split())


def read_listing(listing: Path) -> list[tuple[Path, str]]:
    """Likewise for the lines of captions.jsonl."""
    if not listing.is_file():
        raise UserError(f"{listing} is not a file")
    entries = []
    for number, line in enumerate(re.split("\r\n|\r|\n", read_text(listing)), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = Path(entry["video"]), cleaned(entry["caption"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            form = '{"video": "relative/path.mp4", "caption": "..."}'
            raise UserError(f"{listing}, line {number}: expected {form}") from None
        if name.is_absolute() or ".." in name.parts or not name.parts:
            raise UserError(f"{listing}, line {number}: {name} must lie in the folder")
        entries.append((listing.parent / name, "" if NO_TEXT.search(line) else text))
    if not entries:
        raise UserError(f"{listing}: empty, expected one line for each video")
    return entries
