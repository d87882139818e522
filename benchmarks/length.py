"""Cost against length: the painter's forward pass and training step, full attention and windows.

    python benchmarks/length.py                       # a table and benchmarks/length.png
    python benchmarks/length.py --tokens 4096 8192 --rounds 1
    python benchmarks/length.py --only "windows forward" --rounds 9 --out other.png

SemanticGen Sec. 3.4: with shifted windows over time the cost grows linearly with length. The
painter of the tiny preset (latents and plan in one sequence) is run on ever longer clips. Lengths
are taken in turn, round by round, so that a moment in which the machine is slow does not decide;
times are medians of the rounds. Peak memory is that of one pass in a process of its own: the growth
of resident memory on a CPU, what the allocator has handed out on a GPU.

Then sampling's last step, from latents to a file that is written as they are decoded: its memory
does not depend on the length. Last, the arithmetic for the paper's minute: 60 s, 480p, 24 fps.
"""

import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.timing import in_turn, machine, target, told, write_json
from config import clip_frames, paper, shapes, tiny, tiny_long
from data import to_uint8
from flow import flow_loss
from model import DiT
from plumbing.device import default_device
from plumbing.fields import command_line
from plumbing.files import UserError, check_target, command, keep_freed_memory, replacing
from plumbing.video import write_video
from swin import Stream, fitting_window, windows
from toy.vae import TinyVAE

WINDOW = 4.0  # seconds, of the tiny painter
DECODED = 15, 60, 240  # seconds of video
MOST = {  # tokens beyond which a measurement takes too long or too much memory on a small machine
    "full forward": 2**15,
    "full training": 2**14,
    "windows forward": 2**17,
    "windows training": 2**16,
}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def prepare(kind: str, work: str, tokens: int, device: torch.device) -> tuple[Callable, int]:
    """Return a pass over a clip of about so many tokens, and how many they are."""
    config = tiny().latent
    config = replace(config, window=WINDOW if kind == "windows" else None)
    per_second = 16 * config.rate + 16 * config.context_rate  # tokens: 4 x 4 in each frame
    seconds = round(tokens / per_second / WINDOW) * WINDOW  # whole windows
    torch.manual_seed(0)
    dit, side = DiT(config).to(device), 4 * config.patch
    z = torch.randn(1, config.channels, int(seconds * config.rate), side, side, device=device)
    plan = torch.randn(
        1, config.context_channels, int(seconds * config.context_rate), 4, 4, device=device
    )
    text, t = torch.randn(1, 16, config.text_dim, device=device), torch.full((1,), 0.5).to(device)

    def forward():
        with torch.no_grad():
            return dit(z, t, text, plan)

    def training():
        flow_loss(dit(z, t, text, plan), z, torch.zeros_like(z)).mean().backward()
        dit.zero_grad(set_to_none=True)

    count = 16 * (z.shape[2] + plan.shape[2])
    return {"forward": forward, "training": training}[work], count


def clock(kind: str, work: str, lengths: list[int], rounds: int, device, connection):
    """In a process of its own: send {tokens: seconds of each round} of passes taken in turn."""
    keep_freed_memory(2**30)  # new pages of large blocks would take as long as the work
    passes = (prepare(kind, work, tokens, device) for tokens in lengths)
    connection.send(in_turn({tokens: one_pass for one_pass, tokens in passes}, rounds, device))


def weigh(kind: str, work: str, tokens: int, device: torch.device, connection):
    """In a process of its own: send the most bytes that one pass takes."""
    keep_freed_memory(2**30)  # as there
    one_pass, _ = prepare(kind, work, tokens, device)
    before = peak_memory(device)
    one_pass()
    connection.send(peak_memory(device) - before)


def decode(seconds: float, connection):
    """In a process of its own: send (seconds it takes, bytes) of a video's way from its latents."""
    config = tiny_long()
    frames = clip_frames(config, seconds)
    vae = TinyVAE(config.vae).eval()

    def write(frames: int, folder: str):
        grid = config.vae.grid(frames, config.data.height, config.data.width)
        latents = torch.randn(1, config.vae.channels, *grid)
        pieces = (to_uint8(piece)[0] for piece in vae.decode_pieces(latents))
        write_video(Path(folder) / "x.mp4", pieces, config.data.fps)

    with tempfile.TemporaryDirectory() as folder:
        write(2 * config.vae.time_patch * config.vae.span, folder)  # warms up
        before, start = peak_memory(torch.device("cpu")), time.perf_counter()
        write(frames, folder)
        connection.send((time.perf_counter() - start, peak_memory(torch.device("cpu")) - before))


def in_a_process(function: Callable, *arguments) -> tuple:
    """Return what a function sends from a process of its own; UserError if it fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise UserError(f"{function.__name__}{arguments} failed; give less") from None
    process.join()
    return found


def measured(
    names: list[str], tokens: list[int], rounds: int, device: torch.device
) -> dict[str, list]:
    """Return {"full forward": [(tokens, seconds, bytes), ...], ...} for the names given."""
    found = {}
    for name in names:
        kind, work = name.split()
        lengths = [count for count in tokens if count <= MOST[name]]
        times = in_a_process(clock, kind, work, lengths, rounds, device)
        rows = found[name] = []
        for exact, seconds in times.items():
            memory = in_a_process(weigh, kind, work, exact, device)
            rows.append((exact, statistics.median(seconds), memory))
            print(
                f"{kind:>7} {work:<8} {exact:7d} tokens: {rows[-1][1]:8.3f} s, "
                f"{memory / 1e6:8.0f} MB"
            )
    return found


def growth(rows: list[tuple], column: int = 1) -> list[float]:
    """Return by how much each doubling of the tokens multiplies a column: row over row before."""
    each = []
    for before, after in pairwise(rows):
        doublings = math.log2(after[0] / before[0])
        each.append((after[column] / max(1e-9, before[column])) ** (1 / doublings))
    return each


def table(found: dict[str, list]) -> str:
    """Return the measurements, and by how much each doubling of the length multiplies them."""
    lines = ["| | tokens | seconds | per doubling | MB | per doubling |", "|---" * 6 + "|"]
    for name, rows in found.items():
        slower, larger = (["", *(f"{x:.2f}" for x in growth(rows, column))] for column in (1, 2))
        for (tokens, seconds, memory), time_, memory_ in zip(rows, slower, larger, strict=False):
            cells = [name, tokens, f"{seconds:.3f}", time_, f"{memory / 1e6:.0f}", memory_]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    most = {name: max(growth(rows)) for name, rows in found.items() if len(rows) > 1}
    lines += ["", *(f"{name}: at most {x:.2f} times per doubling" for name, x in most.items())]
    full, windowed = (
        dict(x[:2] for x in found.get(f"{kind} forward", ())) for kind in ("full", "windows")
    )
    if both := sorted(full.keys() & windowed.keys()):
        ratio = full[both[-1]] / windowed[both[-1]]
        lines.append(f"At {both[-1]} tokens windows are {ratio:.1f} times faster (forward).")
    return "\n".join(lines)


def plot(found: dict[str, list], path: Path):
    """Draw time and memory against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, column, label in zip(panels, (1, 2), ("seconds", "peak bytes"), strict=True):
        for name, rows in found.items():
            panel.plot([r[0] for r in rows], [r[column] for r in rows], "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def minute(window: float = 5.0) -> str:
    """Return the arithmetic of the paper's minute: products in one layer's 3D attention."""
    config = paper()
    width, rates = config.latent.width, (config.latent.rate, config.latent.context_rate)
    window = fitting_window(rates, window)
    lines = [
        f"| {float(window):g} s windows | tokens | of the plan | full, TFLOP | windows | ratio |",
        "|---" * 6 + "|",
    ]
    for seconds in (5, 15, 30, 60):
        sizes = shapes(config, seconds)
        T, height, breadth = sizes["VAE latents"][1:]
        per_frame = height * breadth // config.latent.patch**2
        S, *plan = sizes["z_sem"][1:]
        streams = [Stream(T, per_frame, rates[0]), Stream(S, math.prod(plan), rates[1])]
        total = sum(stream.frames * stream.tokens for stream in streams)

        def products(groups, width=width) -> float:  # q k^T and the weighted sum of v
            return sum(4 * width * len(g) * g.shape[1] ** 2 for g in groups) / 1e12

        full = products(windows(streams, None, False))
        parts = products(windows(streams, window, False))
        cells = [f"{seconds} s", f"{total:,}", f"{sizes['plan tokens']:,}"]
        cells += [f"{x:,.1f}" for x in (full, parts, full / parts)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**k for k in range(12, 18)])
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up")
    parser.add_argument(
        "--only", nargs="+", choices=MOST, default=list(MOST), metavar="WHAT", help=", ".join(MOST)
    )
    parser.add_argument("--toy", action="store_true", help="short clips, once: does it run?")
    parser.add_argument("--out", type=Path, help="the plot; beside this file if not given")
    parser.add_argument("--json", type=Path, help="write the measurements there as well")
    args = parser.parse_args()
    if args.toy:
        args.tokens, args.rounds = [1024, 2048], 1
    args.out = args.out or target("length.png", args.toy)
    for path in filter(None, (args.out, args.json)):
        check_target(path)
    if min(args.tokens) < 1024 or args.rounds < 1:
        raise UserError("--tokens: at least 1024 each; --rounds: at least 1")
    device = default_device()
    print(told(machine(device)))
    found = measured(args.only, sorted(args.tokens), args.rounds, device)
    print("\n" + table(found))
    print("\n| decoded and written, .mp4 | seconds | MB |\n|---|---|---|")
    decoded = {
        f"{length} s": in_a_process(decode, length)
        for length in (DECODED[:1] if args.toy else DECODED)
    }
    for length, (seconds, memory) in decoded.items():
        print(f"| {length} of video | {seconds:.1f} | {memory / 1e6:.1f} |")
    print("\n" + minute())
    plot(found, args.out)
    if args.json:
        growths = {name: growth(rows) for name, rows in found.items()}
        write_json(args.json, found | {"growth": growths, "decoded": decoded})


if __name__ == "__main__":
    command(main)
