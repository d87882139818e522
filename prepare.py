"""Two commands before training: look at what a model will see, and encode videos once.

python prepare.py preview --data FOLDER --out preview.png
python prepare.py precompute FOLDER --out CACHE --qwen WEIGHTS --vae WEIGHTS --text WEIGHTS
"""

import argparse
import os
from pathlib import Path

import torch

from config import preset
from data import DataConfig, Folder
from encode import encode_folder
from parts import add_part_flags, check_weights_named, parts_from_flags, placed
from plumbing.cache import Cache
from plumbing.fields import add_set_flag, command_line
from plumbing.files import UserError, check_target, command, to_path
from plumbing.sheet import contact_sheet
from run import Run
from settings import override
from toy.world import World


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
    if args.out.resolve() == args.folder.resolve():
        raise UserError(f"--out {args.out} is the folder of videos itself: name another")
    if args.parts and args.preset:
        raise UserError("--parts --preset: the parts' run has its sizes; give one of the two")
    args.preset = args.preset or "paper"
    base = Run.open(args.parts).config if args.parts else preset(args.preset)
    config = override(base, args.settings, **placed(base, parts_from_flags(args)))
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
    parser = command_line(__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("preview", help="draw a sheet of clips with captions")
    one.add_argument("--data", type=to_path, help="folder of videos; without: the synthetic world")
    one.add_argument("--out", type=to_path, default=Path("preview.png"))
    one.add_argument("--count", type=int, default=8, help="clips")
    one.add_argument("--size", type=int, default=32, help="height and width of a clip, pixels")
    one.set_defaults(run_command=preview)
    two = commands.add_parser("precompute", help="encode a folder of videos into a feature cache")
    two.add_argument("folder", type=to_path, help="folder of videos with captions")
    two.add_argument("--out", type=to_path, required=True, help="folder of the cache")
    # Not --run, which torchrun would take for one of its own.
    two.add_argument("--parts", type=to_path, help="a run, whose parts and sizes are taken")
    two.add_argument("--preset", help="where no run is named; paper if not given")
    two.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="stored")
    add_set_flag(two)
    add_part_flags(two)
    two.set_defaults(run_command=precompute)
    args = parser.parse_args()
    command(lambda: args.run_command(args))


if __name__ == "__main__":
    main()
