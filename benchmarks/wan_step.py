"""One training step of the painter on Wan2.1-T2V-1.3B's transformer, random weights: time, memory.

    python benchmarks/wan_step.py            # lora, attention and all: 81 x 480 x 832 on a GPU
    python benchmarks/wan_step.py --toy      # two narrow blocks, a few tokens: on any machine

Forward, backward with recomputed blocks, AdamW and EMA, one clip, bfloat16 products; --compile
compiles the blocks. The share of the peak is that of this device's matrix products, measured by the
same command; FLOPs are those of forward and backward, recomputation not counted. A table, and with
--json its numbers.
"""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import nn

from config import preset
from optim import build_optimizers, update_ema
from plumbing.device import computing, count_flops, default_device, matmul_speed
from plumbing.fields import command_line
from plumbing.files import command, write_file
from plumbing.folder import versions
from settings import Config, StageConfig
from stages import set_up
from wan import TRAINED, WanConfig, build_dit

DTYPE = "bfloat16"


class Loss(nn.ModuleDict):
    """The painter's loss on a velocity of zeros: only its cost is wanted."""

    def forward(self, **inputs):
        return (self["dit"](**inputs).float().square().mean(),)


def sizes(config: Config, toy: bool):
    """Return the painter's configuration and the shapes of its inputs."""
    latents, plan = config.latent_grid(), config.plan_grid()
    dit = config.latent
    if toy:
        latents, plan = (3, 4, 4), (2, 2, 2)
        small = WanConfig(heads=2, head_width=16, depth=2, ffn=64, text_dim=64)
        dit = replace(dit, wan=small, text_dim=64, rank=4)
    shapes = {"z": (1, dit.channels, *latents), "t": (1,), "text": (1, 512, dit.text_dim)}
    return dit, {**shapes, "context": (1, dit.context_channels, *plan)}


def measure(dit, shapes: dict, stage: StageConfig, device: torch.device, steps: int) -> dict:
    """Return seconds of a step (the best), GB at most in use, share of the peak."""
    gc.collect()  # the last one's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with torch.device("meta"):
        flops = count_flops(Loss({"dit": build_dit(dit)}), draw(shapes, "meta"))
    with device:
        modules = Loss({"dit": build_dit(dit)})
    set_up(modules, stage)
    optimizers = build_optimizers(modules, stage)
    ema = {n: p.detach().clone() for n, p in modules.named_parameters() if p.requires_grad}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        inputs, start = draw(shapes, device), time.perf_counter()
        with computing(device, DTYPE):
            (loss,) = modules(**inputs)
        with computing(device, "float32"):
            loss.backward()
        for optimizer in optimizers:
            with computing(device, DTYPE):
                optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, modules, 0.99)
        loss.item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    share = flops / min(times) / matmul_speed(device, DTYPE)
    return {"seconds": min(times), "memory_gb": peak, "tflop": flops / 1e12, "share": share}


def draw(shapes: dict, device) -> dict[str, torch.Tensor]:
    return {name: torch.rand(shape, device=device) for name, shape in shapes.items()}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--toy", action="store_true", help="sizes for any machine")
    parser.add_argument("--train", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config, device = preset("wan"), default_device()
    dit, shapes = sizes(config, args.toy)
    stage = replace(config.stages.latent, compile=args.compile)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {DTYPE}{', compiled' * args.compile}")
    print("| trained | seconds a step | memory, GB | TFLOP | share of the peak |")
    print("|---" * 5 + "|")
    found = {}
    for train in args.train:
        found[train] = x = measure(replace(dit, train=train), shapes, stage, device, args.steps)
        cells = f"{x['seconds']:.3f} | {x['memory_gb']:.1f} | {x['tflop']:.3g} | {x['share']:.1%}"
        print(f"| {train} | {cells} |", flush=True)
    if args.json:
        content = {"device": name, **versions(), "compiled": args.compile, "steps": found}
        write_file(args.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    command(main)
