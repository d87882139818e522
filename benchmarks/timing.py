"""What the benchmarks share: works timed in turn, the matmul peak, the machine, tables.

Speed is judged as ratios within one run on one machine: two works are compared only if they were
timed in turn, and FLOP/s only with the peak that the same run has measured.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from plumbing.files import write_file
from plumbing.folder import versions

SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # of the matrices of the peak


def wait(device: torch.device):
    """Return when a GPU has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable, device: torch.device) -> float:
    """Return the seconds that one call of a work takes."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def in_turn(works: dict, rounds: int, device: torch.device, warm: int = 1) -> dict:
    """Return {name: seconds in each round} of works that are done in turn, once a round.

    So a moment in which the machine is slow meets all of them alike. The first `warm` rounds warm
    up and are not counted.
    """
    times = {name: [] for name in works}
    for _ in range(warm + rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work, device))
    return {name: found[warm:] for name, found in times.items()}


def matmul_peak(device: torch.device, dtype: str, rounds: int = 5, sizes: Sequence[int] = ()):
    """Return the most FLOP/s that matrix products of this dtype reach here: best size and round.

    On a GPU float32 is what torch makes of it by default, without TF32. Products that take longer
    than a second are not made larger: without instructions for bfloat16 that would take minutes.
    """
    best = 0.0
    for size in sizes or SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        product = lambda: torch.mm(a, b, out=out)  # noqa: E731, B023
        found = in_turn({"product": product}, rounds, device)["product"]
        best = max(best, 2 * size**3 / min(found))
        if min(found) > 1:
            break
    return best


def machine(device: torch.device) -> dict[str, object]:
    """Return what computes here, and with which versions and commit of ours."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (file := Path("/proc/cpuinfo")).exists():
        told = [line.partition(":") for line in file.read_text().splitlines()]
        told = {name.strip(): value.strip() for name, _, value in told}
        name = told.get("model name", name)
        for kind in ("amx_bf16", "avx512_bf16"):  # the fastest units for bfloat16, if any
            if kind in told.get("flags", "").split():
                name += f", {kind}"
                break
    return {"machine": name, "threads": torch.get_num_threads(), **versions()}


def target(name: str, toy: bool) -> Path:
    """Return where a benchmark writes if nothing is said: beside it; what is none, elsewhere."""
    return (Path(tempfile.gettempdir()) if toy else Path(__file__).parent) / name


def told(found: dict[str, object]) -> str:
    """Return `machine`'s words as one line."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """Return rows as a Markdown table; columns are those of the first, floats have 3 digits."""
    if not rows:
        return ""
    shown = lambda x: f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:,.0f}"  # noqa: E731
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [shown(x) if isinstance(x, int | float) else str(x) for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: Path, found: object):
    """Write measurements where a plot, or the next reader, finds them."""
    write_file(path, (json.dumps(found, indent=1) + "\n").encode())
