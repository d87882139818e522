"""What several test files share: random tensors and modules, comparisons, memory while loading."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.video import fit, frames_at


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(build, *args, seed: int = 0, shake: float = 0.1) -> nn.Module:
    """Build a module from a seed and shake its parameters, so that nothing is left at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(*args)
    for i, parameter in enumerate(module.parameters()):
        parameter.data += shake * randn(*parameter.shape, seed=seed + i)
    return module


def read_video(path: Path, times: list[float], height: int, width: int, fps=8.0) -> Tensor:
    """Return the frames on screen at ascending times, (3, len(times), H, W) uint8 (`frames_at`)."""
    return torch.stack([fit(x, height, width) for x, _ in frames_at(path, times, fps)], 1)


def assert_close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-5):
    """Compare with a tensor of the same shape and type, or all values with one number."""
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, f"max difference {difference:.3g} > {tolerance:.3g}"


def tree(folder: Path) -> dict[str, object]:
    """Return what lies in a folder, with the content of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if plain else path.is_dir()
    return found


MEASURE = """
import sys

def status(field):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith(field)) * 1024

load(sys.argv[1])  # imports and first-time costs, which are not of the module
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
before = status("VmRSS")
module = load(sys.argv[2])
print(status("VmHWM") - before, sum(x.nbytes for x in module.state_dict().values()))
"""


def memory_of(load: str, small: Path, large: Path) -> list[int]:
    """Return by how much a process grows at most that loads `large`, and the size of its tensors.

    load: the code of load(folder), which returns a module. small: a folder to load before.
    """
    command = [sys.executable, "-c", load + MEASURE, str(small), str(large)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        command, env=environment, cwd=large, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return list(map(int, out.stdout.split()))
