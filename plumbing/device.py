"""The device: which one, how fast it is, and in which precision it computes."""

import contextlib
import time
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def matmul_speed(device: torch.device, dtype: str) -> float:
    """Return this device's floating-point operations per second in matrix products, measured."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a = a @ a / size**0.5
        float(a[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def faster_dtype(device: torch.device) -> str:
    """Return "bfloat16" where its matrix products are clearly faster than float32's, measured."""
    speeds = (matmul_speed(device, dtype) for dtype in ("float32", "bfloat16"))
    slow, fast = speeds
    return "bfloat16" if fast > 1.3 * slow else "float32"


@contextlib.contextmanager
def computing(device: torch.device, dtype: str):
    """Run matrix products in dtype ("bfloat16" or "float32") and pick the kernels that suit."""
    with contextlib.ExitStack() as stack:
        if dtype == "bfloat16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":  # torch's fused attention is slow here on short sequences
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
