"""README's moving picture: videos made from text, moving, each beside its plan.

    python benchmarks/picture.py            # assets/samples.webp, with the shipped weights

A plan is z_sem (Sec. 3.2), as stage 1 sampled it: at each of its places the first three principal
components of its channels, over all plans shown, are the colours red, green and blue.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from plumbing.fields import command_line
from plumbing.files import check_target, command
from plumbing.video import write_video
from run import ASSETS, Run
from sample import paint, prompt_seed, sample_plans
from toy.scores import choose
from toy.world import World

SIDE, GAP, LINE, COLUMNS = 128, 6, 30, 2  # pixels of a video, between them, of a caption; pairs


def colours(plans: Tensor) -> Tensor:
    """Return plans as colours: (B, K, S, hs, ws) -> (B, 3, S, hs, ws) uint8."""
    tokens = rearrange(plans, "b k s h w -> (b s h w) k")
    directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][:3]  # (3, K)
    found = torch.einsum(
        "bkshw,ck->bcshw", plans - plans.mean((0, 2, 3, 4), keepdim=True), directions
    )
    found = found / found.std((0, 2, 3, 4), keepdim=True)
    return (127.5 + 50 * found).clamp(0, 255).to(torch.uint8)


def moving(prompts: list[str], videos: Tensor, plans: Tensor) -> Tensor:
    """Return one video of all: (B, 3, F, H, W) and (B, 3, S, hs, ws) uint8 -> (3, F, H, W)."""
    frames, font = videos.shape[2], ImageFont.load_default(11)
    plans = F.interpolate(plans.float(), (frames, SIDE, SIDE)).to(torch.uint8)
    videos = F.interpolate(videos.float(), (frames, SIDE, SIDE)).to(torch.uint8)
    pairs = rearrange(torch.cat([videos, plans], 4), "b c f h w -> f b h w c").numpy()
    wide, high = 2 * SIDE + GAP, SIDE + LINE + GAP
    rows, pictures = -(-len(prompts) // COLUMNS), []
    for frame in pairs:
        picture = Image.new("RGB", (COLUMNS * wide + GAP, rows * high + GAP), "white")
        draw = ImageDraw.Draw(picture)
        for i, (prompt, pair) in enumerate(zip(prompts, frame, strict=True)):
            x, y = GAP + i % COLUMNS * wide, GAP + i // COLUMNS * high
            draw.text((x, y), prompt.replace(" and ", "\nand "), "black", font, spacing=1)
            picture.paste(Image.fromarray(pair), (x, y + LINE))
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    width, height = picture.size
    return rearrange(torch.stack(pictures), "f (h w c) -> c f h w", h=height, w=width)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--run", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, default=ASSETS.parent / "samples.webp")
    args = parser.parse_args()
    check_target(args.out)
    run = Run.open(args.run)
    world = World(run.config.data, "test")
    prompts = world.captions(choose(world, 8))
    seeds = [prompt_seed(0, prompt) for prompt in prompts]
    text = run.text.encode(prompts)
    plans = sample_plans(run, text, seeds)
    videos = paint(run, text, seeds, plans)
    picture = moving(prompts, videos.cpu(), colours(plans.float().cpu()))
    write_video(args.out, [picture], run.config.data.fps)
    print(args.out)


if __name__ == "__main__":
    command(main)
