"""How weights learn: which optimizer for what, the learning rate, and the EMA that samples.

The paper names no optimizer, no schedule and no EMA; all of this is our choice (docs/choices.md).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from plumbing.processes import local, shared_like, whole
from settings import StageConfig

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Newton-Schulz in Muon, the same as torch's


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Return about U V^T of each matrix U S V^T: (n, rows, columns), no more rows than columns.

    Newton-Schulz: an odd polynomial, applied again and again, drives all singular values near 1.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalised(updates: list[Tensor], steps: int) -> list[Tensor]:
    """Return Muon's updates of matrices, equal ones computed in one batch.

    In the precision of the caller's autocast: torch's Muon takes bfloat16 always, whose products
    are a hundred times slower than float32's on a CPU that has no instructions for them.
    What is stacked is taken apart: n D rows of D columns are n square matrices (q, k and v, say;
    by its shape the first matrix of an FFN, too).
    """
    cut = [x.split(x.shape[1] if x.shape[0] % x.shape[1] == 0 else x.shape[0]) for x in updates]
    parts = [part for parts in cut for part in parts]
    batches: dict[torch.Size, list[int]] = {}
    for i, part in enumerate(parts):
        batches.setdefault(part.shape, []).append(i)
    for (rows, columns), places in batches.items():
        x = torch.stack([parts[i] for i in places])
        x = orthogonalise(x.mT, steps).mT if rows > columns else orthogonalise(x, steps)
        x = (x * max(1, rows / columns) ** 0.5).to(parts[places[0]])  # as torch's "original"
        for i, part in zip(places, x, strict=True):
            parts[i] = part
    found = iter(parts)
    return [torch.cat([next(found) for _ in parts]) for parts in cut]


class Muon(torch.optim.Muon):
    """torch's Muon with fewer and larger matrix products, and q, k and v apart (our choice)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            for p in held:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if not held:
                continue
            grads = [p.grad for p in held]
            buffers = [self.state[p]["momentum_buffer"] for p in held]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
            updates = orthogonalised([whole(x) for x in updates], group["ns_steps"])
            updates = [shared_like(x, p) for x, p in zip(updates, held, strict=True)]
            torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(held, updates, alpha=-group["lr"])


def build_optimizers(modules: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """Return the stage's optimizers, each group with its peak learning rate.

    AdamW, and Muon for the matrices inside blocks, unless the stage wants AdamW for all.
    """
    muon, rest, decay = [], [], config.weight_decay
    for name, p in modules.named_parameters():
        # LoRA's two matrices count as a product: neither is a matrix of the block.
        inside = ".blocks." in name and ".lora_" not in name and p.ndim == 2
        if p.requires_grad:
            (muon if inside and config.optimizer == "muon" else rest).append(p)
    optimizers = [torch.optim.AdamW(rest, config.lr, (0.9, 0.99), weight_decay=decay, fused=True)]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, weight_decay=decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, config: StageConfig) -> float:
    """Return the learning rate at a step over its peak: linear warm-up, then cosine down."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def changed_schedule(config: StageConfig, step: int, of: int) -> str:
    """Say what becomes of the learning rate where a stage was to have another number of steps."""
    before, now = lr_factor(step - 1, replace(config, steps=of)), lr_factor(step, config)
    then = "up to it and then down" if step < config.warmup else "down from there"
    return (
        f"it was to have {of} steps, now {config.steps}: the learning rate goes from {before:.0%} "
        f"of its peak to {now:.0%}, and {then}"
    )


def ema_decay(step: int, config: StageConfig) -> float:
    """Return the EMA's decay after a step: lower at first, so that the start is forgotten."""
    return min(config.ema, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], modules: nn.Module, decay: float):
    """ema <- decay ema + (1 - decay) weights, in place."""
    parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    torch._foreach_lerp_(
        [local(ema[name]) for name in parameters],
        [local(p) for p in parameters.values()],
        1 - decay,
    )
