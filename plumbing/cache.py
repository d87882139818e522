"""Encoded clips: what the frozen parts make of videos, computed once and kept on disk or in memory.

In both stages VAE, semantic encoder and text encoder are frozen (Sec. 3.2, 3.3), so that training
needs none of them once their outputs are here. `Memory` keeps those of the synthetic world, `Cache`
reads those of a folder of videos, which `precompute` writes:

    CACHE/cache.json                     what made it: fields and digests, and their hash
          groups/00012.json              a finished group of videos: its clips and what was skipped
          shards/00012-0003.safetensors  clips 96 to 127 of that group
          parts/                         clips of unfinished groups, one each; gone in the end

A group is GROUP videos that follow one another in the folder's list. Groups are shared out among
processes. Neither their number nor being killed at any moment changes a byte of what comes out: a
clip is written whole or not at all, encoded alone, and never encoded again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from config import Config, check_values
from data import clips_of, list_videos, to_float
from plumbing.device import computing
from plumbing.fields import build_field, flat_fields
from plumbing.files import UserError, read_json, write_file
from plumbing.weights import tensor_names
from run import FLAGS, Run
from toy.world import World

FORMAT = 1  # of the folder; raised when older ones can no longer be read
GROUP = 16  # videos
CLIPS = 32  # in a shard
CHUNK = 128  # clips encoded at a time in memory


# --- in memory ----------------------------------------------------------------------------------


class Memory:
    """The first clips of the synthetic world, encoded by a run's parts when first asked for."""

    def __init__(self, run: Run, world: World, clips: int):
        self._encoded = lambda what: encode_world(run, world, clips, what)
        self._clips, self._captions = clips, world.captions

    def __len__(self) -> int:
        return self._clips

    def captions(self, indices: Sequence[int]) -> list[str]:
        return self._captions(indices)

    def latents(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents, (B, C, T, h, w) float32."""
        return tuple(x.float() for x in self._encoded("latents")[indices].unbind(1))

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return semantic features, (B, d, S, hs, ws) float32."""
        return self._encoded("features")[indices].float()

    def text(self, indices: Sequence[int]) -> Tensor:
        """Return the captions' tokens, (B, L, dim) float32."""
        return self._encoded("text")[indices]


@lru_cache(maxsize=4)
def encode_world(run: Run, world: World, clips: int, what: str) -> Tensor:
    """Return "latents" (N, 2, C, T, h, w), "features" (N, d, S, hs, ws) or "text" (N, L, dim)."""
    out = []
    part = {"latents": "vae", "features": "encoder", "text": "text"}[what]
    dtype = "float32" if run.released(part) else run.config.dtype  # released ones have their own
    for start in tqdm(range(0, clips, CHUNK), f"encoding {what}", unit="chunk", leave=False):
        indices = range(start, min(start + CHUNK, clips))
        with computing(run.device, dtype):
            if what == "text":
                out.append(run.text.encode(world.captions(indices)).cpu())
            elif what == "latents":
                video = to_float(world.batch(indices).video).to(run.device)
                out.append(torch.stack(run.vae.posterior(video), 1).cpu())
            else:
                video = to_float(world.semantic_video(indices)).to(run.device)
                out.append(run.encoder.encode(video).bfloat16().cpu())
    return torch.cat(out)


# --- on disk: writing ---------------------------------------------------------------------------


def precompute(
    folder: Path,
    out: Path,
    run: Run,
    dtype: str = "bfloat16",
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] = print,
):
    """Encode a folder of videos with a run's parts into a cache; goes on where it was stopped.

    dtype: of what is stored. rank, processes: this process's share. UserError if `out` was made
    from other videos, or with other parts, rates or sizes.
    """
    for stage in ("vae", "encoder"):
        if not run.released(stage) and not run.has(stage):
            raise UserError(f"{run.path} has no {stage} yet: train --stage {stage} first")
    videos = list_videos(folder)
    listing = [(str(file.relative_to(folder)), text) for file, text in videos]
    key = {**run.identity(), "stored": dtype, "videos": hash_of(listing)}
    parts = {n: v for n, v in flat_fields(run.config).items() if n.split(".")[0] in PARTS}
    groups = math.ceil(len(videos) / GROUP)
    header = {"format": FORMAT, "hash": hash_of(key), "groups": groups, "key": key, "parts": parts}
    if (out / "cache.json").exists():
        refuse_other(out, read_header(out)["key"], key)
    else:
        write_file(out / "cache.json", json.dumps(header, indent=1).encode())

    mine = range(rank, groups, processes)
    for file in (out / "groups" / f"{g:05d}.json" for g in mine):
        if file.exists():
            read_group(file)  # or say now that it is damaged
    total = sum(len(videos[g * GROUP : (g + 1) * GROUP]) for g in mine)
    with tqdm(total=total, desc="encoding", unit="video", disable=not total) as bar:
        for g in mine:
            if not (out / "groups" / f"{g:05d}.json").exists():
                encode_group(out, g, listing[g * GROUP : (g + 1) * GROUP], folder, run, dtype, bar)
            else:
                bar.update(len(listing[g * GROUP : (g + 1) * GROUP]))
    finished = [out / "groups" / f"{g:05d}.json" for g in range(groups)]
    if all(file.exists() for file in finished):  # by the process that comes last
        for left in out.glob(".*.tmp"):  # of a killed one
            left.unlink(missing_ok=True)
        if (out / "parts").is_dir() and not any((out / "parts").iterdir()):
            (out / "parts").rmdir()
        summarise(out, [read_group(file) for file in finished], len(videos), say)


def encode_group(
    out: Path,
    g: int,
    videos: Sequence[tuple[str, str]],
    folder: Path,
    run: Run,
    dtype: str,
    bar: tqdm,
):
    """Encode what is missing of a group of (file, caption), then write its index."""
    name = f"{g:05d}"
    for left in out.glob(f"*/.{name}*.tmp"):  # of a killed process
        left.unlink()
    packed = 0  # clips in shards; the others, from here on, are parts or not there yet
    for shard in sorted((out / "shards").glob(f"{name}-*.safetensors")):
        packed += len({tensor.split(".")[0] for tensor in tensor_names(shard)})

    clips, skipped, waiting = [], [], []  # waiting: parts that will be packed next
    for v, (file, caption) in enumerate(videos):
        found, parts, text = [], [], None
        try:
            for k, clip in enumerate(clips_of(folder / file, caption, run.config.data)):
                found.append({"video": file, "clip": k, "caption": caption})
                if len(clips) + k < packed:
                    continue
                parts.append(out / "parts" / f"{name}-{v:02d}-{k:05d}.safetensors")
                if not parts[-1].exists():
                    if text is None:
                        text = run.text.encode([caption])[0]
                        text = text[: int(text.any(1).sum())]  # without padding, whose rows are 0
                    encoded = encode_clip(run, *clip, text, getattr(torch, dtype))
                    write_file(parts[-1], save(encoded))
        except UserError as error:
            skipped.append([file, str(error).removeprefix(f"{folder / file}: ")])
            bar.write(f"skipped {error}")
            found, parts = [], []
        clips, waiting = clips + found, waiting + parts
        last = v == len(videos) - 1
        while len(waiting) >= CLIPS or (waiting and last):
            pack(out / "shards" / f"{name}-{packed // CLIPS:04d}.safetensors", waiting[:CLIPS])
            packed, waiting = packed + len(waiting[:CLIPS]), waiting[CLIPS:]
        bar.update()
    for file in (out / "parts").glob(f"{name}-*.safetensors"):  # in shards now, or of no use
        file.unlink()
    index = {"clips": clips, "skipped": skipped}  # last: it says that the group is finished
    write_file(out / "groups" / f"{name}.json", json.dumps(index, indent=1).encode())


def pack(shard: Path, parts: Sequence[Path]):
    """Put clips that are files of their own into one file."""
    tensors = {}
    for row, part in enumerate(parts):
        try:
            tensors |= {f"{row}.{kind}": x for kind, x in load_file(part).items()}
        except SafetensorError as error:
            raise UserError(f"{part} is damaged ({error}): remove it") from None
    write_file(shard, save(tensors))


@torch.no_grad()
def encode_clip(
    run: Run, video: Tensor, semantic_video: Tensor, text: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Encode one clip, (3, F, H, W) and (3, Fs, Hs, Ws) uint8, beside its caption's tokens."""
    mean, log_variance = run.vae.posterior(to_float(video[None]).to(run.device))
    features = run.encoder.encode(to_float(semantic_video[None]).to(run.device))
    found = {
        "latents": mean[0],  # (C, T, h, w)
        "log_variance": log_variance[0],
        "features": features[0],  # (d, S, hs, ws)
        "text": text,  # (l, dim)
    }
    return {name: x.to(dtype).cpu().contiguous() for name, x in found.items()}


def summarise(out: Path, groups: Sequence[dict], videos: int, say: Callable[[str], None]):
    """Tell how many clips a finished cache holds, and what was skipped and why."""
    clips = sum(len(group["clips"]) for group in groups)
    skipped = [entry for group in groups for entry in group["skipped"]]
    say(f"{out}: {clips} clips of {videos} videos" + (", skipped:" if skipped else ""))
    for file, reason in skipped:
        say(f"  {file}: {reason}")


# --- on disk: reading ---------------------------------------------------------------------------

PARTS = ("data", *FLAGS)  # the components that decide what is in a cache


def hash_of(content) -> str:
    """Return 16 hexadecimal digits that stand for what json can hold."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_header(path: Path) -> dict:
    """Return cache.json; UserError if it is not one of this version, or was changed by hand."""
    file = path / "cache.json"
    header = read_json(file)
    kinds = {"hash": str, "groups": int, "key": dict, "parts": dict}
    if not isinstance(header, dict) or "format" not in header:
        raise UserError(f"{file} is not a cache's header: no format in it")
    if header["format"] != FORMAT:
        raise UserError(f"{file}: format {header['format']!r}, this version reads {FORMAT}")
    if odd := [name for name, kind in kinds.items() if type(header.get(name)) is not kind]:
        raise UserError(f"{file}: its {odd[0]} is damaged; make the cache anew")
    if header["hash"] != hash_of(header["key"]):
        raise UserError(f"{file}: its hash is not that of its key; make the cache anew")
    return header


def read_group(file: Path) -> dict:
    """Return a finished group's {"clips", "skipped"}; UserError if it is damaged."""
    group = read_json(file)
    try:
        whole = all(isinstance(clip["caption"], str) for clip in group["clips"])
        whole = whole and all(len(entry) == 2 for entry in group["skipped"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged: remove it, and run prepare.py precompute again")
    return group


def refuse_other(path: Path, made_with: dict, wanted: dict):
    """Raise UserError that names the fields in which two keys differ, if they do."""
    different = [
        f"{name} {made_with.get(name)} -> {wanted.get(name)}"
        for name in {**made_with, **wanted}
        if made_with.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"{path} is stale ({', '.join(different[:4])}): remove it, or name another folder"
        )


class Cache:
    """The clips of a finished cache, read from its shards when asked for."""

    def __init__(self, path: Path):
        """Read the index. UserError if the cache is not finished or not readable."""
        self.path, self.header = Path(path), read_header(Path(path))
        self.clips: list[tuple[Path, int, str]] = []  # shard, row, caption
        groups, there = self.header["groups"], len(list((self.path / "groups").glob("*.json")))
        if there < groups:
            raise UserError(
                f"{path} is not finished ({groups - there} of {groups} groups are missing): "
                "run prepare.py precompute again, it goes on"
            )
        for name in (f"{g:05d}" for g in range(groups)):
            group = read_group(self.path / "groups" / f"{name}.json")
            texts = [clip["caption"] for clip in group["clips"]]
            self.clips += [
                (self.path / "shards" / f"{name}-{n // CLIPS:04d}.safetensors", n % CLIPS, text)
                for n, text in enumerate(texts)
            ]
        if not self.clips:
            raise UserError(f"{path} holds no clips: none of its videos could be read")

    def __len__(self) -> int:
        return len(self.clips)

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.clips[i][2] for i in indices]

    def parts(self) -> dict[str, object]:
        """Return the configurations {"data", "vae", "encoder", "text"} that it was made with."""
        try:
            check_values(self.header["parts"])
            return {part: build_field(Config, part, self.header["parts"]) for part in PARTS}
        except (KeyError, ValueError) as error:
            file = self.path / "cache.json"
            raise UserError(f"{file}: its parts are damaged ({error}); make it anew") from None

    def check(self, run: Run):
        """Raise UserError that names what differs if it is stale: not made by this run's parts."""
        made_with = {n: v for n, v in self.header["key"].items() if n not in ("stored", "videos")}
        refuse_other(self.path, made_with, run.identity())

    def latents(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents, (B, C, T, h, w) float32."""
        return self._stack(indices, "latents"), self._stack(indices, "log_variance")

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return semantic features, (B, d, S, hs, ws) float32."""
        return self._stack(indices, "features")

    def text(self, indices: Sequence[int]) -> Tensor:
        """Return the captions' tokens with their padding, (B, L, dim) float32."""
        tokens = [self._read(i, "text").float() for i in indices]
        out = torch.zeros(len(tokens), *self._shapes["text"])
        for row, x in zip(out, tokens, strict=True):
            row[: len(x)] = x
        return out

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each kind of tensor; of text, with its padding."""
        parts = self.parts()
        data, vae, encoder, text = (parts[name] for name in ("data", "vae", "encoder", "text"))
        low_rate = (data.semantic_frames, data.semantic_height, data.semantic_width)
        latents = (vae.channels, *vae.grid(data.frames, data.height, data.width))
        features = (encoder.dim, *encoder.grid(*low_rate))
        tokens = (text.words, text.dim)
        return {"latents": latents, "log_variance": latents, "features": features, "text": tokens}

    def _stack(self, indices: Sequence[int], kind: str) -> Tensor:
        return torch.stack([self._read(i, kind) for i in indices]).float()

    def _read(self, index: int, kind: str) -> Tensor:
        (shard, row, _), expected = self.clips[index], self._shapes[kind]
        try:
            found = open_shard(shard).get_tensor(f"{row}.{kind}")
        except Exception as error:  # missing, cut short, not safetensors: of many classes
            raise UserError(f"{shard} cannot be read ({error}): make the cache anew") from None
        shape = tuple(found.shape)
        short = kind == "text" and len(shape) == 2 and shape[0] <= expected[0]  # without padding
        if ((expected[0], *shape[1:]) if short else shape) != expected:
            raise UserError(f"{shard}: a {kind} of {shape}, not {expected}: make the cache anew")
        return found


@lru_cache(maxsize=64)
def open_shard(path: Path):
    """Return a handle on a shard; its tensors are read from the file when asked for."""
    return safe_open(path, "pt")
