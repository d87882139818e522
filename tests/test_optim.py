"""Muon beside torch's own."""

import pytest
import torch
from torch import nn

from optim import Muon
from plumbing.device import computing

SHAPES = {"square": (16, 16), "wide": (16, 48), "tall, no multiple": (24, 16)}


def trained(make, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Return parameters after three steps on gradients that both optimizers see alike."""
    optimizer = make(parameters, lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    return parameters


def some(*shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_it_is_torchs_where_nothing_is_stacked():
    """Several of each shape, mixed: to bfloat16's rounding, in which both orthogonalise."""
    shapes = [*SHAPES.values(), *reversed(SHAPES.values()), *SHAPES.values()]
    ours, theirs = trained(Muon, some(*shapes)), trained(torch.optim.Muon, some(*shapes))
    for a, b, start in zip(ours, theirs, some(*shapes), strict=True):
        moved = (b - start).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.02 * moved


@pytest.mark.parametrize("count", [2, 3, 4])
def test_stacked_matrices_are_taken_apart(count):
    """q, k and v as one matrix learn as three matrices do in torch's."""
    together, apart = some((count * 16, 16)), some(*[(16, 16)] * count)
    ours = trained(Muon, together)[0]
    theirs = torch.cat(trained(torch.optim.Muon, apart))
    start = torch.cat(some(*[(16, 16)] * count))
    torch.testing.assert_close(start, some((count * 16, 16))[0])
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


@pytest.mark.parametrize("dtype, near", [("float32", 1e-4), ("bfloat16", 0.02)])
def test_it_multiplies_in_the_precision_of_the_run(dtype, near):
    """Beside the same in float64; bfloat16 rounds, and would be slow where a CPU lacks it."""
    start = [p.detach().double() for p in some(*SHAPES.values())]
    exact = trained(Muon, [nn.Parameter(p.clone()) for p in start])
    with computing(torch.device("cpu"), dtype):
        found = trained(Muon, some(*SHAPES.values()))
    for a, b, before in zip(found, exact, start, strict=True):
        error = (a - b).norm() / (b - before).norm()
        assert near / 100 < error < near, error  # the ranges are apart


def test_what_has_no_gradient_stays():
    one, two = some((8, 8), (8, 8))
    before = two.detach().clone()
    optimizer = Muon([one, two], lr=0.1)
    one.grad = torch.ones_like(one)
    optimizer.step()
    assert torch.equal(two, before)
