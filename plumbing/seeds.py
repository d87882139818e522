"""Random numbers that are a function of words alone: the same on every machine, for every sharing.

Every draw of a training step belongs to one row of its batch and comes from that row's own
generator. So a process draws its own rows only, and results do not depend on how many there are.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def text_seed(text: str) -> int:
    """Return a seed, 0 to 2^64, that is a function of the text alone."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def generator(*words: object) -> torch.Generator:
    """Return a source of random numbers on the CPU, seeded by these words."""
    return torch.Generator().manual_seed(text_seed(" ".join(map(str, words))) % 2**63)


def draw_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return N(0, 1) noise (B, *shape), each sample's from its own seed."""
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise).to(device)


class Rows:
    """The random numbers of some rows of a batch, drawn in turn by what needs them."""

    def __init__(self, rows: range, *words: object):
        """rows: which rows of the batch. words: what the batch belongs to (seed, stage, step)."""
        self.step = words[-1]
        self.generators = [generator(*words, row) for row in rows]
        self.common = generator(*words)  # of what all rows of the batch share

    def draw(self, one: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Stack what each row draws from its generator."""
        return torch.stack([one(rng) for rng in self.generators])

    def normal(self, *shape: int) -> Tensor:
        """Draw N(0, 1), (rows, *shape)."""
        return self.draw(lambda rng: torch.randn(shape, generator=rng))

    def indices(self, below: int) -> list[int]:
        """Draw a whole number from 0 up to `below` for each row."""
        return self.draw(lambda rng: torch.randint(below, (), generator=rng)).tolist()

    def kept(self, dropout: float) -> Tensor:
        """Draw what survives a dropout: (rows,) bool, False with that probability."""
        return self.draw(lambda rng: torch.rand((), generator=rng)) >= dropout
