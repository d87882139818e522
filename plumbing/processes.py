"""Many processes train one model: PyTorch's own engines around a stage's loss, and who does what.

    torchrun --nproc-per-node 4 train.py ...          # DDP: every process holds all weights
    torchrun --nproc-per-node 4 train.py ... --shard  # FSDP2: each holds a share of them

A batch is the whole batch: each process takes its rows, and the random numbers of a row are its own
(seeds.py). States hold whole tensors, gathered by torch.distributed.checkpoint, so a run may stop
with N processes and go on with M, sharded or not. Without torchrun one process takes all rows.
"""

import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from plumbing.files import UserError

# Not what is frozen: it is where it was loaded from.
LEARNED = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}
WHOLE, SOME = StateDictOptions(**LEARNED), StateDictOptions(**LEARNED, strict=False)
RELAYED = 10  # seconds within which torchrun passes a signal on that came to all processes


class Team:
    """The processes of this training, as torchrun started them, or one alone."""

    def __init__(self, shard: bool = False):
        """Join the others. shard: weights, gradients and optimizer states are held in shares."""
        self.shard = shard
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if (shard or self.size > 1) and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            # A day: one process may encode a folder for long while the others wait for it.
            options = {"timeout": timedelta(days=1), **({} if "RANK" in os.environ else alone)}
            dist.init_process_group(backend, **options)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of a kind, and make it the usual one."""
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return device

    def say(self, message: str):
        """Print a line, once for all processes."""
        if self.first:
            print(message)

    def rows(self, batch: int, accumulate: int) -> list[range]:
        """Return this process's rows of a batch, in micro-batches; UserError if uneven.

        accumulate: how many micro-batches.
        """
        each, left = divmod(batch, self.size * accumulate)
        if left or not each:
            raise UserError(
                f"batch {batch} cannot be shared evenly by {self.size} processes in "
                f"{accumulate} micro-batches each: choose a multiple of {self.size * accumulate}"
            )
        start = self.rank * accumulate * each
        return [range(start + k * each, start + (k + 1) * each) for k in range(accumulate)]

    def wrap(self, losses: nn.Module, device: torch.device) -> nn.Module:
        """Return what computes a loss and, in backward, the whole batch's gradient."""
        if self.shard:
            mesh = init_device_mesh(device.type, (self.size,))
            for name, module in losses.named_modules():
                if name.endswith("blocks"):
                    for block in module:
                        fully_shard(block, mesh=mesh)
            fully_shard(losses, mesh=mesh)
        elif self.size > 1:
            return DistributedDataParallel(losses, gradient_as_bucket_view=True)  # held once
        return losses

    def sync(self, wrapped: nn.Module, now: bool):
        """Say whether the next backward pass averages gradients over the processes."""
        if self.shard:
            wrapped.set_requires_gradient_sync(now)
        elif self.size > 1:
            wrapped.require_backward_grad_sync = now

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return the mean of each value over its elements and the processes; NaN is not counted.

        values: name -> any shape.
        """
        sums = torch.stack([x.double().nansum() for x in values.values()])
        counts = torch.stack([(~x.isnan()).sum() for x in values.values()])
        both = torch.stack([sums, counts]).cpu()  # the one place where a step waits for its device
        if self.size > 1:
            dist.all_reduce(both)
        sums, counts = both
        return dict(zip(values, (sums / counts).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Return whether any process says yes."""
        if self.size == 1:
            return flag
        asked = torch.tensor(float(flag))
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def wait(self):
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self):
        """End the work together."""
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor that may be held in shares; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """Return this process's share of a tensor that may be held in shares."""
    return x.to_local() if isinstance(x, DTensor) else x


def shared_like(x: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor on the model's device, in shares if the model is."""
    x = x.to(model.device)
    if isinstance(model, DTensor):
        return distribute_tensor(x, model.device_mesh, model.placements)
    return x


def get_state(losses: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict:
    """Return weights and optimizer states as whole tensors on the CPU, by parameter names."""
    return {
        "modules": get_model_state_dict(losses, options=WHOLE),
        "optimizers": get_optimizer_state_dict(losses, list(optimizers), options=WHOLE),
    }


def set_state(losses: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict):
    """Put back what `get_state` returned, whatever the number of processes was."""
    set_model_state_dict(losses, state["modules"], options=SOME)
    set_optimizer_state_dict(losses, list(optimizers), state["optimizers"], options=WHOLE)


class Interrupt:
    """While open, Ctrl-C and SIGTERM set `wanted`, so that training saves; a second one stops.

    Under torchrun the second one may be the first, which it passes on to its processes.
    """

    def __enter__(self):
        self.wanted, self.since = False, 0.0
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        now = time.monotonic()
        if not self.wanted:
            self.wanted, self.since = True, now
        elif "RANK" not in os.environ or now > self.since + RELAYED:
            raise KeyboardInterrupt  # asked twice

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
