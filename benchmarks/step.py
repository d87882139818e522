"""Our DiT against networks of others at the same width, depth, heads, tokens and dtype.

    python benchmarks/step.py                         # a table, benchmarks/step.json, step.png
    python benchmarks/step.py --compile               # each of them compiled, too
    python benchmarks/step.py --widths 128 --dtypes bfloat16 --rounds 9

Works are done in turn: forward (no gradients), training (forward and backward), and a fused AdamW
over all weights. A step is training and AdamW. Blocks differ (ours has two self-attentions), so
what counts is achieved FLOP/s: matrix products and attention of forward and backward over the
seconds of a step; its share is of the matmul peak of the same dtype, measured in the same run. The
peers (diffusers' Wan transformer and DiT blocks, torch's encoder layers; extra `bench`) attend in
full; on long clips our 3D attention has windows. On a CPU a peer attends with torch's fused kernels
or without, by whatever it trains faster with. `own optimizer`: with what trains our networks.
"""

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import in_turn, machine, markdown, matmul_peak, target, told, write_json
from config import tiny
from model import DiT
from optim import build_optimizers
from plumbing.device import computing, count_flops, default_device, moved
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command, replacing, require
from stages import set_up

WINDOW = 2.0  # seconds, on long clips
SIDE = 4  # tokens of a frame, each way


@dataclass(frozen=True)
class Case:
    """Sizes that all networks share."""

    width: int
    depth: int
    heads: int
    batch: int
    length: int  # seconds of a clip, each of two latent frames and one of the plan
    dtype: str

    @property
    def frames(self) -> int:
        """Frames of both streams together."""
        return 3 * self.length

    @property
    def tokens(self) -> int:
        return SIDE**2 * self.frames

    def __str__(self) -> str:
        return f"{self.width}, {self.dtype}, {self.batch} x {self.tokens:,}"


SHAPES = {128: (4, 2), 512: (4, 8), 1024: (2, 16), 32: (1, 2)}  # width -> depth, heads
DTYPES = ("float32", "bfloat16")
CLIPS = {"short": (32, 2), "long": (2, 32)}  # batch, seconds: as many tokens, 3,072


# --- the networks -------------------------------------------------------------------------------


class Blocks(nn.ModuleList):
    """diffusers' DiT blocks (adaLN-Zero), one after another."""

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        for block in self:
            x = block(x, timestep=timestep, class_labels=class_labels)
        return x


class Task(nn.Module):
    """A network with a loss: the squared distance of its output from 1."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> tuple[Tensor]:
        out = self.network(**inputs)
        return ((out if torch.is_tensor(out) else out[0]).float().sub(1).square().mean(),)


def ours(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the painter's DiT and its inputs; windows in clips that are longer than one."""
    config, tokens = tiny().latent, tiny().text.words
    sizes = {"width": case.width, "depth": case.depth, "heads": case.heads}
    window = WINDOW if case.length > WINDOW else None
    config = replace(config, rate=2.0, context_rate=1.0, window=window, **sizes)
    side = SIDE * config.patch
    return DiT(config), {
        "z": torch.randn(case.batch, config.channels, 2 * case.length, side, side),
        "t": torch.rand(case.batch),
        "text": torch.randn(case.batch, tokens, config.text_dim),
        "context": torch.randn(case.batch, config.context_channels, case.length, SIDE, SIDE),
    }


def wan(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return diffusers' Wan transformer and its inputs: the tokens of both streams as frames."""
    config, head = tiny(), case.width // case.heads
    channels, side = config.latent.channels, 2 * SIDE  # its patches are 2 x 2
    network = require("diffusers", "bench").WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=head,
        in_channels=channels,
        out_channels=channels,
        text_dim=config.text.dim,
        ffn_dim=config.latent.ffn * case.width,
        num_layers=case.depth,
    )
    return network, {
        "hidden_states": torch.randn(case.batch, channels, case.frames, side, side),
        "timestep": 1000 * torch.rand(case.batch),
        "encoder_hidden_states": torch.randn(case.batch, config.text.words, config.text.dim),
    }


def dit_blocks(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return diffusers' DiT blocks, which know a time and a class, and their inputs."""
    block = partial(
        require("diffusers", "bench").models.attention.BasicTransformerBlock,
        dim=case.width,
        num_attention_heads=case.heads,
        attention_head_dim=case.width // case.heads,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        attention_bias=True,
    )
    return Blocks(block() for _ in range(case.depth)), {
        "x": torch.randn(case.batch, case.tokens, case.width),
        "timestep": 1000 * torch.rand(case.batch),
        "class_labels": torch.randint(1000, (case.batch,)),
    }


def torch_encoder(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return torch's own encoder layers, which know neither time nor text, and their input."""
    layer = nn.TransformerEncoderLayer(
        case.width,
        case.heads,
        4 * case.width,
        dropout=0.0,
        activation=partial(nn.functional.gelu, approximate="tanh"),
        batch_first=True,
        norm_first=True,
    )
    network = nn.TransformerEncoder(layer, case.depth, enable_nested_tensor=False)
    return network, {"src": torch.randn(case.batch, case.tokens, case.width)}


NETWORKS = {
    "ours": ours,
    "Wan (diffusers)": wan,
    "DiT blocks (diffusers)": dit_blocks,
    "torch encoder": torch_encoder,
}


def compiled(name: str, task: Task) -> Task:
    """Return a network's twin, compiled: ours as training does it, a peer's as a whole."""
    twin = copy.deepcopy(task)
    if name == "ours":
        set_up(nn.ModuleDict({"dit": twin.network}), replace(tiny().stages.latent, compile=True))
    else:
        twin.network.compile()
    return twin


# --- one case -----------------------------------------------------------------------------------


@contextmanager
def attending(device: torch.device, dtype: str, fused: bool):
    """Compute in a dtype as our training does; fused: attention by whatever torch chooses."""
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with computing(device, dtype), sdpa_kernel(every) if fused else nullcontext():
        yield


def train(task: Task, inputs: dict[str, Tensor], device: torch.device, dtype: str, fused: bool):
    """Do a forward and a backward pass."""
    with attending(device, dtype, fused):
        loss = task(**inputs)[0]
    loss.backward()


def faster_kernels(task: Task, inputs, device: torch.device, dtype: str) -> bool:
    """Return whether a peer trains faster with torch's fused attention, here and at this size."""
    if device.type == "cuda":
        return False  # there `computing` leaves the choice to torch
    works = {fused: partial(train, task, inputs, device, dtype, fused) for fused in (False, True)}
    seconds = in_turn(works, 2, device)
    task.zero_grad()
    return min(seconds[True]) < min(seconds[False])


def works_of(
    name: str, task: Task, inputs, device: torch.device, dtype: str, fused: bool
) -> dict[tuple[str, str], Callable]:
    """Return {(name, "forward"): a call, ...}: what is timed, in the order of a step."""

    def forward():
        task.eval()
        with torch.no_grad(), attending(device, dtype, fused):
            task(**inputs)
        task.train()

    works = {(name, "forward"): forward}
    works[name, "training"] = partial(train, task, inputs, device, dtype, fused)
    if name.startswith("ours"):
        own = build_optimizers(nn.ModuleDict({"dit": task.network}), tiny().stages.latent)

        def step():
            with computing(device, dtype):
                for optimizer in own:
                    optimizer.step()

        works[name, "own optimizer"] = step
    adamw = torch.optim.AdamW(task.parameters(), 1e-4, fused=True)
    works[name, "AdamW"] = lambda: (adamw.step(), adamw.zero_grad())
    return works


def measured(case: Case, compile: bool, rounds: int, device: torch.device) -> list[dict]:
    """Return a row for each network: median seconds of its works, FLOPs of forward and backward."""
    if compile:
        torch.compiler.reset()  # a new size: forget the code of the last one
    works, flops, kernels = {}, {}, {}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network, inputs = make(case)
        task = Task(network)
        flops[name] = count_flops(copy.deepcopy(task), inputs)
        task, inputs = task.to(device), moved(inputs, device)
        fused = name != "ours" and faster_kernels(task, inputs, device, case.dtype)
        kernels[name] = "as in training" if name == "ours" else "fused" if fused else "plain"
        if device.type == "cuda":
            kernels[name] = "torch's choice"
        works |= works_of(name, task, inputs, device, case.dtype, fused)
        if compile:
            twin, label = compiled(name, task), f"{name}, compiled"
            works |= works_of(label, twin, inputs, device, case.dtype, fused)
            flops[label], kernels[label] = flops[name], kernels[name]
    times = in_turn(works, rounds, device)
    rows = []
    for name in flops:
        seconds = {what: statistics.median(x) for (who, what), x in times.items() if who == name}
        sizes = {**asdict(case), "tokens": case.batch * case.tokens}
        rows.append({**sizes, "network": name, "kernels": kernels[name], "flops": flops[name]})
        rows[-1]["seconds"] = seconds
    return rows


# --- what comes out -----------------------------------------------------------------------------


def judged(rows: list[dict], peaks: dict[str, float]) -> list[dict]:
    """Return rows with a step's FLOP/s and its share of the peak; ours also as it trains."""
    found = []
    for row in rows:
        for optimizer in ("AdamW", "own optimizer"):
            if optimizer not in row["seconds"]:
                continue
            step = row["seconds"]["training"] + row["seconds"][optimizer]
            speed, name = row["flops"] / step, row["network"]
            name += "" if optimizer == "AdamW" else ", own optimizer"
            share = speed / peaks[row["dtype"]]
            found.append({**row, "network": name, "step": step, "flop_s": speed, "share": share})
            found[-1]["training_share"] = share * step / row["seconds"]["training"]
    return found


def table(case: Case, rows: list[dict]) -> str:
    """Return the rows of a case as a table, and ours over the fastest peer."""
    lines = []
    for row in rows:
        seconds, step = row["seconds"], row["step"]
        lines.append(
            {
                str(case): row["network"],
                "attention": row["kernels"],
                "forward, ms": 1000 * seconds["forward"],
                "training, ms": 1000 * seconds["training"],
                "optimizer, ms": 1000 * (step - seconds["training"]),
                "tokens/s": row["tokens"] / step,
                "GFLOP/s": row["flop_s"] / 1e9,
                "of the peak, %": 100 * row["share"],
                "without optimizer, %": 100 * row["training_share"],
            }
        )
    text = markdown(lines) + "\n"
    for kind in ("", ", compiled"):
        speeds = {row["network"]: row["flop_s"] for row in rows}
        peers = [name + kind for name in NETWORKS if name != "ours" and name + kind in speeds]
        if peers:
            best = max(peers, key=speeds.get)
            text += f"\nours{kind}: {speeds[f'ours{kind}'] / speeds[best]:.2f} times the FLOP/s of "
            text += best
    return text + "\n"


def plot(rows: list[dict], path: Path):
    """Draw the shares of the peak, a panel for each length of clips."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["network"] for row in rows))
    clips = list(dict.fromkeys(row["length"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * len(clips)), layout="constrained")
    panels = figure.subplots(len(clips), 1, squeeze=False)
    for panel, clip in zip(panels[:, 0], clips, strict=True):
        mine = [row for row in rows if row["length"] == clip]
        cases = list(dict.fromkeys((row["width"], row["dtype"]) for row in mine))
        for k, name in enumerate(names):
            at = {(r["width"], r["dtype"]): 100 * r["share"] for r in mine if r["network"] == name}
            places = [cases.index(case) + 0.8 * (k + 0.5) / len(names) - 0.4 for case in at]
            panel.bar(places, list(at.values()), 0.8 / len(names), label=name)
        panel.set_xticks(range(len(cases)), [f"{width}, {dtype}" for width, dtype in cases])
        panel.set(ylabel="step, % of the matmul peak", title=f"clips of {clip} s")
        panel.grid(axis="y", alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--clips", nargs="+", default=[*CLIPS], choices=[*CLIPS])
    parser.add_argument("--compile", action="store_true", help="each network compiled, too")
    parser.add_argument("--rounds", type=int, default=7, help="medians are of so many")
    parser.add_argument("--toy", action="store_true", help="one round of width 32: does it run?")
    parser.add_argument("--out", type=Path, help="beside this file if not given")
    args = parser.parse_args()
    args.out = args.out or target("step.json", args.toy)
    if unknown := set(args.widths) - SHAPES.keys():
        raise UserError(f"--widths {min(unknown)}: choose of {', '.join(map(str, SHAPES))}")
    if args.rounds < 1 or args.out.suffix != ".json":
        raise UserError("--rounds: at least 1; --out: a .json, beside which the plot goes")
    if args.toy:
        args.widths, args.rounds = [32], 1
    check_target(args.out)
    return args


def main():
    args, device = arguments(), default_device()
    warnings.filterwarnings("ignore", message="Mismatch dtype")  # of Wan's norms under autocast
    found = {**machine(device), "peaks": {}, "rows": []}
    print(told(machine(device)))
    for dtype in args.dtypes:
        found["peaks"][dtype] = matmul_peak(device, dtype, sizes=(256,) if args.toy else ())
        print(f"matmul peak, {dtype}: {found['peaks'][dtype] / 1e9:,.0f} GFLOP/s")
    for width, clip, dtype in product(args.widths, args.clips, args.dtypes):
        batch, length = (2, min(4, CLIPS[clip][1])) if args.toy else CLIPS[clip]
        case = Case(width, *SHAPES[width], batch, length, dtype)
        rows = judged(measured(case, args.compile, args.rounds, device), found["peaks"])
        print("\n" + table(case, rows), flush=True)
        found["rows"] += rows
        write_json(args.out, found)
    plot(found["rows"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
