"""What is frozen is computed once: a run's parts encode clips, kept in memory or in a cache.

In both stages VAE, semantic encoder and text encoder are frozen (Sec. 3.2, 3.3). Training reads
what they make of clips. `clips_in_memory` encodes the synthetic world in the run's precision;
`clips_on_disk` encodes a folder of videos in the precision of each part, one clip at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from data import clips_of, to_float
from parts import FLAGS, computes
from plumbing.cache import (
    NULL_TEXT,
    Cache,
    Memory,
    end_cache,
    refuse_other,
    start_cache,
    write_entry,
)
from plumbing.captions import list_videos
from plumbing.fields import build_field, flat_fields
from plumbing.files import UserError, update_file
from plumbing.processes import Team
from plumbing.video import READER
from run import Run
from settings import Config
from toy.world import World

NOT_HOW = ("weights", "chunk", "objects", "flashes", "learns")  # fields: not how clips are encoded
PARTS = ("data", *FLAGS)  # the components that decide how clips are encoded
PORTION = 2000  # videos whose captions are encoded, and kept, before them: some 2 GB of umT5's


def clips_in_memory(run: Run, world: World) -> Memory:
    """Return the world's clips, encoded by a run's parts when they are first asked for."""

    def latents(indices: Sequence[int]) -> Tensor:
        with computes(run, "vae"):
            video = to_float(world.batch(indices).video).to(run.device)
            return torch.stack(run.vae.posterior(video), 1).cpu()

    def features(indices: Sequence[int]) -> Tensor:
        with computes(run, "encoder"):
            video = to_float(world.semantic_video(indices)).to(run.device)
            return run.encoder.encode(video).bfloat16().cpu()

    def text(indices: Sequence[int]) -> Tensor:
        with computes(run, "text"):
            return run.text.encode(world.captions(indices)).cpu()

    encode = {"latents": latents, "features": features, "text": text}
    encode["null_text"] = lambda _: run.text.null().cpu()
    return Memory(len(world), world.captions, encode)


def identity(run: Run) -> dict[str, object]:
    """Return all that decides how a clip is encoded: fields of data and parts, and digests."""
    found = {}
    for name, value in flat_fields(run.config).items():
        part, field = name.split(".")[0], name.split(".")[-1]
        if part in PARTS and field not in NOT_HOW:
            found[name] = value
    for stage in ("vae", "encoder"):
        if not run.released(stage):
            found[f"{stage}.digest"] = run.note(stage).get("digest", "not trained yet")
    return found


def header_of(run: Run, folder: Path, dtype: str) -> dict:
    """Return the header of the cache that a run's parts make of a folder (`start_cache`)."""
    if untrained := [x for x in ("vae", "encoder") if not run.released(x) and not run.finished(x)]:
        raise UserError(f"{run.path} has no {untrained[0]} yet: train --stage {untrained[0]} first")
    return {
        "key": {**identity(run), "reader": READER, "stored": dtype},
        "parts": {k: v for k, v in flat_fields(run.config).items() if k.split(".")[0] in PARTS},
        "shapes": run.config.encoded,
        "videos": [(f.relative_to(folder).as_posix(), text) for f, text in list_videos(folder)],
    }


@torch.no_grad()
def encode_folder(
    run: Run, folder: Path, out: Path, dtype: str = "bfloat16", rank: int = 0, processes: int = 1
) -> bool:
    """Encode this process's share of what the cache of a folder lacks; return whether it is whole.

    dtype: of what is stored. The text encoder is let go before VAE and semantic encoder are loaded.
    UserError if `out` was made with other parts, rates or sizes.
    """
    header, stored = header_of(run, folder, dtype), getattr(torch, dtype)
    missing = start_cache(out, header, folder, rank, processes)
    run.let_go()
    if rank == 0 and (missing or not (out / NULL_TEXT).exists()):
        null = run.text.null().to("cpu", stored, copy=True)
        update_file(out / NULL_TEXT, save({"tokens": null}))  # it may be of other weights
    words = run.config.text.words
    if cut := sum(run.text.count(caption) > words for _, caption in missing):
        print(f"{cut} of {len(missing)} captions are longer than the {words} words that are read")
    for start in range(0, len(missing), PORTION):
        todo, texts = missing[start : start + PORTION], []
        run.let_go("vae", "encoder")  # of the portion before
        for _, caption in tqdm(todo, "encoding captions", leave=False):
            tokens = run.text.encode([caption])[0]
            tokens = tokens[: int(tokens.any(1).sum())]  # without padding, whose rows are zero
            texts.append(tokens.to("cpu", stored, copy=True))
        run.let_go()
        bar = tqdm(todo, "encoding", len(missing), initial=start)
        for (name, caption), text in zip(bar, texts, strict=True):
            clips = clips_of(folder / name, caption, run.config.data)
            clips = encode_clips(run.vae, run.encoder, clips, run.device, stored)
            write_entry(out, header, folder, name, caption, clips, text)
    run.let_go()
    return end_cache(out, header)


def encode_clips(vae, encoder, clips, device, stored: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Encode clips, (3, F, H, W) and (3, Fs, Hs, Ws) uint8, each alone."""
    for video, low_rate in clips:
        latents = torch.stack(vae.posterior(to_float(video[None]).to(device)), 1)[0]
        features = encoder.encode(to_float(low_rate[None]).to(device))[0]
        yield {"latents": latents.to("cpu", stored), "features": features.to("cpu", stored)}


def clips_on_disk(run: Run, folder: Path, out: Path, team: Team) -> Cache:
    """Return the cache of a folder, once every process has encoded its share of what it lacks."""
    encode_folder(run, folder, out, rank=team.rank, processes=team.size)
    team.wait()
    return Cache(out)


def check_cache(cache: Cache, run: Run):
    """Raise UserError that names what differs if a cache was not made by a run's parts."""
    key = cache.header["key"]
    refuse_other(cache.path, key, {**identity(run), "reader": READER, "stored": key["stored"]})


def cache_parts(cache: Cache) -> dict[str, object]:
    """Return the configurations {"data", "vae", "encoder", "text"} that a cache was made with."""
    return {part: build_field(Config, part, cache.header["parts"]) for part in PARTS}
