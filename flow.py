"""Rectified flow: the straight path from data to noise, its loss, guidance and the Euler solver.

SemanticGen Sec. 3.1, Eqs. 1 to 4. Pure functions of tensors: no network, no device, no file.

| convention           | here                                                             |
|----------------------|------------------------------------------------------------------|
| t = 0                | data                                                             |
| t = 1                | noise, N(0, I)                                                   |
| path (Eq. 1)         | z_t = (1 - t) data + t noise                                     |
| velocity             | dz_t / dt = noise - data: it points from the data to the noise   |
| sampling (Eq. 4)     | starts at t = 1 and goes down to 0, so every dt is negative      |
| guidance scale       | 0 = unconditional only, 1 = conditional only; acts on all channels |
| shift a              | t -> a t / (1 + (a - 1) t): a > 1 moves t towards the noise      |

Letters: B batch; any further axes are the data's own.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give t of shape (B,) trailing axes of length one, so that it broadcasts over `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))  # (B, 1, ..., 1)


def path(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the point z_t on the straight line from data to noise (Eq. 1).

    data, noise: (B, ...); t: (B,) in [0, 1].
    """
    t = expand_time(t, data)
    return (1 - t) * data + t * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """Return dz_t / dt of the path, which is the same at every t (u_t of Eq. 3).

    data, noise, velocity: (B, ...).
    """
    return noise - data


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times, of any shape, towards the noise (shift > 1) or the data (shift < 1).

    0, 1 and the order stay. Training and sampling use the same shift. Our choice: the paper does
    not say whether it shifts.
    """
    return shift * t / (shift * t + (1 - t))  # this form keeps 1 exactly


def sample_time(
    n: int,
    distribution: str = "logit_normal",
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw n training times in [0, 1], then shift them: (n,) float32 on the CPU.

    `logit_normal` is the sigmoid of N(0, 1): most weight in the middle, where the velocity is
    hardest to tell. `uniform` is the other choice; another name raises ValueError. The paper does
    not name its distribution; ours is that of Stable Diffusion 3.
    """
    if distribution == "logit_normal":
        t = torch.randn(n, generator=generator).sigmoid()
    elif distribution == "uniform":
        t = torch.rand(n, generator=generator)
    else:
        raise ValueError(f"time distribution {distribution!r}: choose logit_normal or uniform")
    return shift_time(t, shift)


def flow_loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss of each sample (Eq. 3), averaged over its elements.

    velocity, data, noise: (B, ...) -> (B,) float32, so that the caller can sort it by t.
    """
    error = velocity.float() - velocity_target(data.float(), noise.float())
    return error.square().reshape(len(error), -1).mean(1)


def guidance_weights(*scales: float) -> list[float]:
    """Return the weight of each velocity in classifier-free guidance, a scale for each condition.

    The guided velocity is v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) + ..., where v_0 is unconditional
    and v_k knows the first k conditions. So k scales give k + 1 weights, which sum to 1. Scales of
    1 leave only the last velocity (conditional only), scales of 0 only the first (unconditional
    only). Our choice: the paper does not say how it guides.
    """
    return [above - below for above, below in pairwise([1.0, *scales, 0.0])]


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Return the solver's times, (steps + 1,), from 1 (noise) down to 0 (data).

    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: the solver needs at least 1")
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, shift: float = 1.0
) -> Tensor:
    """Integrate dz = v(z, t) dt (Eq. 2) from noise at t = 1 to data at t = 0 (Eq. 4).

    velocity: any callable (z (B, ...), t (B,)) -> (B, ...); guidance and conditions are closures
    around the network. noise: (B, ...) -> data (B, ...). Integrates in float32 at least, whatever
    dtype the network computes in. Raises ValueError for fewer than one step.
    """
    z = noise.float() if noise.dtype in (torch.float16, torch.bfloat16) else noise
    times = time_grid(steps, shift).to(z)
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * velocity(z, t.expand(len(z))).to(z)  # t_next - t < 0
    return z
