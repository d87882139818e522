"""The device: which one, how fast it is, and in which precision it computes."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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


def count_flops(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the floating-point operations of forward and backward of a model on the meta device.

    Of matrix products, attention and convolutions; recomputation is not counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**moved(inputs, torch.device("meta")))[0].backward()
    return counter.get_total_flops()


# --- what the device works on next --------------------------------------------------------------


def prepared_ahead(prepare: Callable, items: Iterable) -> Iterator:
    """Yield prepare(item) of each item in order; a thread prepares the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            started = thread.submit(prepare, item)
            if waiting is not None:
                yield waiting.result()
            waiting = started
        if waiting is not None:
            yield waiting.result()


def pinned(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors in memory from which they can be copied while the device computes."""
    return {k: x.pin_memory() for k, x in tensors.items()} if device.type == "cuda" else tensors


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on a device."""
    return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
