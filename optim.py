"""How weights learn: which optimizer for what, the learning rate, and the EMA that samples.

The paper names no optimizer, no schedule and no EMA; all of this is our choice (docs/choices.md).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from plumbing.processes import local
from settings import StageConfig


def build_optimizers(modules: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """Return the stage's optimizers, each group with its peak learning rate.

    AdamW, and Muon for the matrices inside blocks, unless the stage wants AdamW for all.
    """
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    use_muon = config.optimizer == "muon"
    muon = [p for name, p in named if use_muon and ".blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = config.weight_decay
    optimizers = [torch.optim.AdamW(rest, config.lr, (0.9, 0.99), weight_decay=decay, fused=True)]
    if muon:
        optimizers.append(
            torch.optim.Muon(muon, config.muon_lr, weight_decay=decay, adjust_lr_fn="original")
        )
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
    return (
        f"it was to have {of} steps, now {config.steps}: the learning rate goes from {before:.0%} "
        f"of its peak to {now:.0%}, and down from there"
    )


def ema_decay(step: int, config: StageConfig) -> float:
    """Return the EMA's decay after a step: lower at first, so that the start is forgotten."""
    return min(config.ema, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], modules: nn.Module, decay: float):
    """ema <- decay ema + (1 - decay) weights, in place."""
    parameters = dict(modules.named_parameters())
    torch._foreach_lerp_(
        [local(ema[name]) for name in parameters],
        [local(p) for p in parameters.values()],
        1 - decay,
    )
