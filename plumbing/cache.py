"""Encoded clips: what the frozen parts make of videos, computed once and kept on disk or in memory.

Training needs none of these parts once their outputs are here. `Memory` keeps those of the
synthetic world, `Cache` reads those of a folder of videos:

    CACHE/null_text.safetensors         the empty text, as the text encoder makes it
          cache.json                    the key (what decides how clips are encoded), the parts, the
                                        shapes, and the videos: names and captions
          videos/NAME-HASH.safetensors  all clips of one video, or the reason why it was skipped

A video's file is written whole: what is there is done. Neither the number of processes nor being
killed at any moment changes a byte of what comes out. The file says what it was made of, so that a
video that has changed is encoded anew, and a new one costs no more than itself.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from plumbing.fields import differences
from plumbing.files import UserError, first_line, read_json, sweep, update_file, write_file
from plumbing.weights import digest

FORMAT = 2  # of the folder; raised when older ones can no longer be read
NULL_TEXT = "null_text.safetensors"
CHUNK = 64  # clips of the world encoded at a time
INSTALLATION = "pip install|cannot be imported"  # in a reason that is not the video's fault
AGAIN = "run prepare.py precompute again"


class Clips:
    """Encoded clips by their indices, whether they are in memory or on disk."""

    def latents(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents, (B, C, T, h, w) float32."""
        return self._rows("latents", indices).unbind(1)

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return semantic features, (B, d, S, hs, ws) float32."""
        return self._rows("features", indices)

    def text(self, indices: Sequence[int]) -> Tensor:
        """Return the captions' tokens with their padding, (B, L, dim) float32."""
        return self._rows("text", indices)


class Memory(Clips):
    """Clips of the synthetic world, encoded in chunks when first asked for, and kept."""

    def __init__(
        self,
        clips: int,
        captions: Callable[[Sequence[int]], list[str]],
        encode: Mapping[str, Callable[[Sequence[int]], Tensor]],
    ):
        """encode: indices -> "latents" (B, 2, C, T, h, w), "features", "text", "null_text"."""
        self._count = self._all = clips  # those shown (`first`), those there are
        self.captions, self._encode = captions, encode
        self._chunks: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def first(self, clips: int, kinds: Sequence[str] = ()) -> "Memory":
        """Return so many clips, or all there are; they share what is encoded.

        kinds: what is encoded now, for all of them.
        """
        other = copy.copy(self)
        other._count = min(clips, self._all)
        for kind in kinds:
            other._fill(kind, range(-(-other._count // CHUNK)))
        return other

    def null_text(self) -> Tensor:
        """Return the empty text's one token, (1, dim) float32."""
        return self._encode["null_text"](())

    def _rows(self, kind: str, indices: Sequence[int]) -> Tensor:
        places = [divmod(int(i), CHUNK) for i in indices]
        self._fill(kind, {c for c, _ in places})
        return torch.stack([self._chunks[kind, c][row] for c, row in places]).float()

    def _fill(self, kind: str, chunks: Iterable[int]):
        """Encode what is missing of some chunks, whole: alike, whoever asks for them first."""
        missing = sorted(c for c in chunks if (kind, c) not in self._chunks)
        quiet = len(missing) < 2
        for c in tqdm(missing, f"encoding {kind}", leave=False, disable=quiet, unit="chunk"):
            whole = range(c * CHUNK, min((c + 1) * CHUNK, self._all))
            self._chunks[kind, c] = self._encode[kind](whole)


# --- on disk: the file of one video -------------------------------------------------------------


def hash_of(content) -> str:
    """Return 16 hexadecimal digits that stand for what json can hold."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def video_file(cache: Path, name: str, caption: str) -> Path:
    """Return where the clips of a captioned video are kept."""
    readable = re.sub("[^a-zA-Z0-9]+", "-", name)[-60:].strip("-")
    return cache / "videos" / f"{readable}-{hash_of([name, caption])}.safetensors"


def fingerprint(video: Path, content: bool = False) -> str:
    """Return what stands for the names, sizes and times of a video's files, or for their content.

    A video is one file, or those in a folder of frames.
    """
    files = sorted(video.glob("[!.]*")) if video.is_dir() else [video]
    files = [file for file in files if file.is_file()]
    if content:
        return hash_of([[file.name for file in files], digest(files)])
    stats = [(file.name, file.stat()) for file in files]  # ctime: mtime can be copied or set
    return hash_of([[name, x.st_size, x.st_mtime_ns, x.st_ctime_ns] for name, x in stats])


def open_video(cache: Path, header: dict, name: str, caption: str) -> tuple[safe_open, dict]:
    """Open a video's file; return it and what it was made of. UserError if it is damaged."""
    file = video_file(cache, name, caption)
    try:
        content = safe_open(file, "pt")
        kinds = content.keys()
        found = {kind: content.get_slice(kind).get_shape() for kind in kinds}
        made_of = json.loads(content.metadata()["made_of"])
        fits = made_of["key"] == hash_of(header["key"]) and made_of["video"] == [name, caption]
        if clips := made_of["clips"]:
            longest, width = header["shapes"]["text"]
            expected = {kind: [clips, *shape] for kind, shape in header["shapes"].items()}
            expected["text"] = [min(longest, found["text"][0]), width]  # without its padding
            fits = fits and found == expected
    except Exception as error:  # gone, cut short, not safetensors: of many classes
        raise UserError(f"{file} is damaged ({first_line(error)}): {AGAIN}") from None
    if not fits:
        raise UserError(f"{file} holds another video, or tensors of other shapes: {AGAIN}")
    return content, made_of


def is_current(cache: Path, header: dict, folder: Path, name: str, caption: str) -> bool:
    """Return whether a video's file is there, and the video is what it was made of."""
    try:
        _, made_of = open_video(cache, header, name, caption)
        if re.search(INSTALLATION, made_of.get("skipped", "")):
            return False
        video = folder / name
        if made_of["stamp"] == fingerprint(video):
            return True
        return made_of["digest"] == fingerprint(video, content=True)
    except (UserError, OSError, LookupError, TypeError):
        return False


def write_entry(
    cache: Path, header: dict, folder: Path, name: str, caption: str, clips: Iterator, text: Tensor
):
    """Write the file of one video.

    clips: {"latents", "features"} of each; UserError, after some perhaps, if the video is of no
    use. text: tokens of its caption without padding, (l, dim).
    """
    video, tensors = folder / name, {}
    made_of = {"key": hash_of(header["key"]), "video": [name, caption], "stamp": fingerprint(video)}
    try:
        made_of["digest"] = fingerprint(video, content=True)
        encoded = list(clips)
        tensors = {kind: torch.stack([clip[kind] for clip in encoded]) for kind in encoded[0]}
        tensors["text"] = text
    except (UserError, OSError) as error:
        made_of["skipped"] = str(error).removeprefix(f"{video}: ").replace(str(video), name)
        tqdm.write(f"skipped {error}")
    made_of["clips"] = len(tensors.get("latents", ()))
    write_file(video_file(cache, name, caption), save(tensors, {"made_of": json.dumps(made_of)}))


# --- on disk: all of them -----------------------------------------------------------------------


def read_header(cache: Path) -> dict:
    """Return what cache.json holds; UserError if it is of another version, or damaged."""
    file = cache / "cache.json"
    header = read_json(file)
    if not isinstance(header, dict) or "format" not in header:
        raise UserError(f"{file} is not that of a cache: it has no format")
    if (made := header["format"]) != FORMAT:
        found = f"format {made!r}, this version reads {FORMAT}, one file a video"
        raise UserError(f"{file}: {found}: remove {cache}, to have it made anew")
    if header.pop("hash", None) != hash_of(header):
        raise UserError(f"{file} is damaged, or changed by hand: remove it, and {AGAIN}")
    return header


def refuse_other(cache: Path, made_with: dict, wanted: dict):
    """Raise UserError that names the fields in which two keys differ, if they do."""
    if different := ", ".join(differences(made_with, wanted)[:4]):
        raise UserError(f"{cache} is stale ({different}): remove it, or name another folder")


def start_cache(
    out: Path, header: dict, folder: Path, rank: int = 0, processes: int = 1
) -> list[tuple[str, str]]:
    """Start a cache, or go on with it; return the videos that this process is to encode.

    header: {"key", "parts", "shapes": of one clip's tensors, "videos": [(name, caption), ...]}.
    UserError if `out` has another key, or no video of these.
    """
    index = out / "cache.json"
    if index.exists():
        made = read_header(out)
        refuse_other(out, made["key"], header["key"])
        if {x[0] for x in made["videos"]}.isdisjoint(x[0] for x in header["videos"]):
            raise UserError(f"{out} holds other videos' clips: name another folder, or remove it")
    header = {"format": FORMAT, **header}
    sealed = json.dumps({"hash": hash_of(header), **header}, indent=1).encode()
    if rank == 0:
        sweep(out)
        sweep(out / "videos")
        update_file(index, sealed)
    mine = list(dict.fromkeys(header["videos"]))[rank::processes]  # each once
    todo = [video for video in mine if not is_current(out, header, folder, *video)]
    for video in todo:  # until they are encoded anew, the cache is not finished
        video_file(out, *video).unlink(missing_ok=True)
    return todo


def end_cache(out: Path, header: dict) -> bool:
    """Return whether all processes are done; if so, remove what is of videos no longer listed."""
    listed = {video_file(out, *video) for video in header["videos"]}
    if finished := all(file.exists() for file in listed):
        for file in set(out.glob("videos/*.safetensors")) - listed:
            if re.search("(^|-)[0-9a-f]{16}$", file.stem):  # `video_file`
                file.unlink(missing_ok=True)
    return finished


class Cache(Clips):
    """The clips of a finished cache, read from its files when asked for."""

    def __init__(self, path: Path):
        """Look at every file. UserError if the cache is not finished, or damaged."""
        self.path, self.header = Path(path), read_header(Path(path))
        videos = self.header["videos"]
        if missing := sum(not video_file(self.path, *video).exists() for video in videos):
            lacks = f"{missing} of {len(videos)} videos are missing"
            raise UserError(f"{path} is not finished ({lacks}): {AGAIN}, it goes on")
        self._open = lru_cache(maxsize=64)(partial(open_video, self.path, self.header))
        self._clips: list[tuple[str, str, int]] = []  # video, caption, which of its clips
        self.skipped: list[tuple[str, str]] = []  # video, reason
        for name, caption in videos:
            _, made_of = open_video(self.path, self.header, name, caption)
            self._clips += [(name, caption, k) for k in range(made_of["clips"])]
            if not made_of["clips"]:
                self.skipped.append((name, made_of.get("skipped")))
        if not self._clips:
            name, reason = self.skipped[0]
            raise UserError(f"{path} holds no clips, no video can be used; {name}: {reason}")

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def listing(self) -> str:
        """16 hexadecimal digits that stand for the names and captions of its videos."""
        return hash_of(self.header["videos"])

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self._clips[i][1] for i in indices]

    def null_text(self) -> Tensor:
        """Return the empty text's one token, (1, dim) float32; UserError if it is not there."""
        try:
            return load_file(self.path / NULL_TEXT)["tokens"].float()
        except (OSError, SafetensorError, KeyError):
            raise UserError(f"{self.path / NULL_TEXT} is missing or damaged: {AGAIN}") from None

    def _rows(self, kind: str, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._row(kind, *self._clips[i]) for i in indices]).float()

    def _row(self, kind: str, name: str, caption: str, clip: int) -> Tensor:
        content, _ = self._open(name, caption)
        if kind != "text":
            return content.get_slice(kind)[clip]
        tokens = content.get_tensor(kind)
        return pad(tokens, (0, 0, 0, self.header["shapes"][kind][0] - len(tokens)))
