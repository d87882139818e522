"""Before training: look at what a model will see, and encode clips once, on disk or in memory.

python prepare.py preview --data FOLDER --out preview.png
python prepare.py precompute FOLDER --out CACHE --qwen WEIGHTS --vae WEIGHTS --text WEIGHTS
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, override, preset
from data import DataConfig, Folder, clips_of, to_float
from parts import FLAGS, add_part_flags, check_weights_named, parts_from_flags
from plumbing.cache import Cache, Memory, end_cache, refuse_other, start_cache, write_entry
from plumbing.captions import list_videos
from plumbing.device import computing
from plumbing.fields import build_field, flat_fields
from plumbing.files import UserError, check_target, command
from plumbing.processes import Team
from plumbing.sheet import contact_sheet
from plumbing.video import READER
from run import Run
from toy.world import World

PARTS = ("data", *FLAGS)  # the components that decide how clips are encoded


def clips_in_memory(run: Run, world: World) -> Memory:
    """Return the world's clips, encoded by a run's parts when they are first asked for."""

    def computes(part: str):
        return computing(run.device, "float32" if run.released(part) else run.config.dtype)

    def latents(indices: Sequence[int]) -> Tensor:
        with computes("vae"):
            video = to_float(world.batch(indices).video).to(run.device)
            return torch.stack(run.vae.posterior(video), 1).cpu()

    def features(indices: Sequence[int]) -> Tensor:
        with computes("encoder"):
            video = to_float(world.semantic_video(indices)).to(run.device)
            return run.encoder.encode(video).bfloat16().cpu()

    def text(indices: Sequence[int]) -> Tensor:
        with computes("text"):
            return run.text.encode(world.captions(indices)).cpu()

    encode = {"latents": latents, "features": features, "text": text}
    return Memory(len(world), world.captions, encode)


def header_of(run: Run, folder: Path, dtype: str) -> dict:
    """Return the header of the cache that a run's parts make of a folder (`start_cache`)."""
    if untrained := [x for x in ("vae", "encoder") if not run.released(x) and not run.has(x)]:
        raise UserError(f"{run.path} has no {untrained[0]} yet: train --stage {untrained[0]} first")
    config = run.config
    return {
        "key": {**run.identity(), "reader": READER, "stored": dtype},
        "parts": {k: v for k, v in flat_fields(config).items() if k.split(".")[0] in PARTS},
        "shapes": {
            "latents": (2, config.vae.channels, *config.latent_grid()),
            "features": (config.encoder.dim, *config.plan_grid()),
            "text": (config.text.words, config.text.dim),
        },
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
    todo = start_cache(out, header, folder, rank, processes)
    run.let_go()
    texts = []
    for _, caption in tqdm(todo, "encoding captions", leave=False, disable=not todo):
        tokens = run.text.encode([caption])[0]
        tokens = tokens[: int(tokens.any(1).sum())]  # without padding, whose rows are zero
        texts.append(tokens.to("cpu", stored, copy=True))
    run.let_go()
    for (name, caption), text in zip(tqdm(todo, "encoding", disable=not todo), texts, strict=True):
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
    refuse_other(cache.path, key, {**run.identity(), "reader": READER, "stored": key["stored"]})


def cache_parts(cache: Cache) -> dict[str, object]:
    """Return the configurations {"data", "vae", "encoder", "text"} that a cache was made with."""
    return {part: build_field(Config, part, cache.header["parts"]) for part in PARTS}


def preview(args: argparse.Namespace):
    """Draw a sheet of the first clips of a folder, or of the synthetic world."""
    for name, value, most in (("--count", args.count, 1000), ("--size", args.size, 1024)):
        if not 1 <= value <= most:
            raise UserError(f"{name} {value}: at least 1, at most {most}")
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: a sheet is a .png")
    check_target(args.out)
    config = DataConfig(height=args.size, width=args.size)
    dataset = Folder(args.data, config) if args.data else World(config, "train")
    clips = dataset.batch(range(min(args.count, len(dataset))))
    contact_sheet(clips.video, clips.captions, args.out)
    print(f"{args.out}: {len(clips.captions)} of {len(dataset)} clips")


def precompute(args: argparse.Namespace):
    """Encode a folder of videos into a cache; under torchrun, each process takes its share."""
    check_target(args.out, folder=True)
    base = Run.open(args.parts).config if args.parts else preset(args.preset)
    config = override(base, args.settings, **parts_from_flags(args))
    check_weights_named(config)
    run = Run(args.parts or args.out, config)
    if not args.parts and not (run.released("vae") and run.released("encoder")):
        raise UserError(f"preset {args.preset} trains parts of its own: name a run that has them")
    if run.device.type == "cuda":
        run.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    rank, processes = (int(os.environ.get(x, d)) for x, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if encode_folder(run, args.folder, args.out, args.dtype, rank, processes):
        made = Cache(args.out)
        videos, skipped = len(made.header["videos"]), made.skipped
        print(f"{args.out}: {len(made)} clips of {videos} videos, {len(skipped)} skipped")
        for name, reason in skipped:
            print(f"  {name}: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("preview", help="draw a sheet of clips with captions")
    one.add_argument("--data", type=Path, help="folder of videos; without: the synthetic world")
    one.add_argument("--out", type=Path, default=Path("preview.png"))
    one.add_argument("--count", type=int, default=8, help="clips")
    one.add_argument("--size", type=int, default=32, help="height and width of a clip, pixels")
    one.set_defaults(run_command=preview)
    two = commands.add_parser("precompute", help="encode a folder of videos into a feature cache")
    two.add_argument("folder", type=Path, help="folder of videos with captions")
    two.add_argument("--out", type=Path, required=True, help="folder of the cache")
    # Not --run, which torchrun would take for one of its own.
    two.add_argument("--parts", type=Path, help="a run, whose parts and sizes are taken")
    two.add_argument("--preset", default="paper", help="where no run is named")
    two.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="stored")
    two.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    add_part_flags(two)
    two.set_defaults(run_command=precompute)
    args = parser.parse_args()
    command(lambda: args.run_command(args))


if __name__ == "__main__":
    main()
