"""Convolutions of the miniature, whose weights are matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MatrixConv(nn.Module):
    """A convolution of 3 each way over 2 or 3 axes; its weight is a matrix (after, before 3^axes).

    Muon orthogonalises matrices: with it the VAE needs less than half the steps, and the encoder
    reads shapes that it hardly learned to read without (our choice; benchmarks/RECORDS.md).
    """

    def __init__(self, axes: int, before: int, after: int, stride: int = 1):
        super().__init__()
        self.axes, self.stride = axes, stride
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(after, before * 3**axes)))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.unflatten(1, (-1, *(3,) * self.axes))  # (after, before, 3, ...)
        convolve = F.conv3d if self.axes == 3 else F.conv2d
        return convolve(x, kernel, self.bias, stride=self.stride, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), (B, width, ...)."""

    def __init__(self, axes: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = MatrixConv(axes, width, width)
        self.second = MatrixConv(axes, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
