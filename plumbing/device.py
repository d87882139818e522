"""The device: which one, how fast it is, and in which precision it computes."""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from plumbing.files import UserError

ATTENTION = [  # its kernels on a GPU, in torch's words
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention")
]
MANY = 4096  # tokens, from which on attention to them takes longer than the memory is worth


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def matmul_speed(device: torch.device, dtype: str) -> float:
    """Return this device's floating-point operations per second in matrix products, measured."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    times = []
    while len(times) < 8 and (sum(times) < 1 or len(times) < 2):  # bfloat16 may be very slow
        start = time.perf_counter()
        a = a @ a / size**0.5
        float(a[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def faster_dtype(device: torch.device) -> str:
    """Return "bfloat16" where its matrix products are clearly faster than float32's, measured."""
    single, half = (matmul_speed(device, dtype) for dtype in ("float32", "bfloat16"))
    return "bfloat16" if half > 1.3 * single else "float32"


@contextlib.contextmanager
def computing(device: torch.device, dtype: str):
    """Run matrix products in dtype ("bfloat16" or "float32") and pick the kernels that suit."""
    with contextlib.ExitStack() as stack:
        # Switched off, too: a part may compute in float32 inside of another that does not.
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"))
        if device.type == "cpu":  # torch's fused attention is slow here on short sequences
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def count_flops(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the floating-point operations of forward and backward of a model.

    Of matrix products, attention and convolutions; recomputation is not counted. Nothing is
    computed: the model, or a copy, is moved to the meta device and stays there.
    """
    model.to("meta")  # what was built there, too: buffers that are in no file have values
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**moved(inputs, torch.device("meta")))[0].backward()
    return counter.get_total_flops()


def check_compiler(stage: str):
    """UserError where there is no C compiler, which torch.compile calls."""
    names = (os.environ.get("CC") or "cc", "gcc", "clang", "cl")
    if not any(map(shutil.which, names)):
        raise UserError(
            f"stages.{stage}.compile=true needs a C compiler, and there is none: install gcc, or "
            f"--set stages.{stage}.compile=false"
        )


def recomputed(block: nn.Module, *inputs):
    """Run a block that keeps little for its backward pass, and does there again what it needs.

    What attention to many tokens gives is kept: in a long clip it is most of the work.
    """

    def policy(context, op, *inputs, **options) -> CheckpointPolicy:
        if op in ATTENTION and inputs[1].shape[-2] >= MANY:  # q, k, v (B, A, N, d)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    kept = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=kept)


# --- what the device works on next --------------------------------------------------------------


def spare_processes(most: int, size: int = 0) -> int:
    """Return how many processes beside this one may prepare batches; 0 where that cannot be.

    They are copies of this one and hand over what they have made in shared memory, two batches of
    `size` bytes each at a time; where it is small, as a container's is, a line says so.
    """
    if sys.platform != "linux" or not os.path.exists("/dev/shm"):
        return 0
    share = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine, under torchrun
    free, needed = shutil.disk_usage("/dev/shm").free, max(2**30, 2 * share * size)
    if free < needed:
        gigabytes = math.ceil(needed / 1e9)
        print(
            f"less than {gigabytes} GB free in /dev/shm: the GPU waits for batches "
            f"(docker: --shm-size={2 * gigabytes}g)"
        )
        return 0
    room = free // (2 * share * size) if size else most
    return min(most, room, max(1, len(os.sched_getaffinity(0)) // share - 1))


def heed_no_signal(worker: int):
    """Let the process that asked decide: what stops a job is often sent to all of its processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def prepared_ahead(prepare: Callable, steps: range, workers: int) -> Iterator:
    """Yield prepare(step) of each step in order; so many processes prepare the next ones.

    With 0 workers each is prepared when it is asked for.
    """

    def caught(step: int):
        try:
            return prepare(step)
        except UserError as error:  # a process would add where it was raised
            return error

    options = {"num_workers": workers, "generator": torch.Generator()}
    if workers:
        options |= {"multiprocessing_context": "fork", "worker_init_fn": heed_no_signal}
        options |= {"pin_memory": torch.cuda.is_available()}
    for found in DataLoader(steps, batch_size=None, collate_fn=caught, **options):
        if isinstance(found, UserError):
            raise found
        yield found


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on a device."""
    return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
