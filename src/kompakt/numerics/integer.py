"""The arithmetic of integer kernels, on tensors that hold ``scale · (q - zero_point)`` as floats.

A simulated graph multiplies rounded floats; a kernel sums integers and multiplies once by a float32
factor. Both differ by ties in rounding, a few values in a million, which the next layers multiply. These
functions follow the kernels of ONNX Runtime on x86 to the bit: the same float32 factors in the same
order, the same roundings, fused multiply-adds where its AVX2 kernels have them.

Reference for the scheme: Jacob et al. 2018, arXiv 1712.05877, section 2.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT_FLOAT32 = 2**24
"""Every integer below it is a float32."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One scale and zero point for a whole tensor: float32 ``()`` and integer ``()``, and the ends of the grid."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def steps(self, x: Tensor) -> Tensor:
        """Return ``q - zero_point`` of values on the grid, as floats."""
        return (x / self.scale).round_()

    def nearest(self, steps: Tensor) -> Tensor:
        """Round ``(q - zero_point)`` half to even, clamp and scale."""
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        return steps.round().clamp_(low, high).mul_(self.scale)

    def nearest_shifted(self, q: Tensor) -> Tensor:
        """Round ``q`` half to even, clamp and scale: of ties, the one that is even with the zero point added."""
        return q.round().clamp_(self.qmin, self.qmax).sub_(self.zero_point).mul_(self.scale)


def exact_dtype(weight: Tensor, bias: Tensor | None, largest: int = 255) -> torch.dtype:
    """Return the float type that holds every sum of a layer exactly: float32 where ``Σ|w|·largest + |b| < 2^24``.

    Args:
        weight: integers, output channels first.
        bias: integers, ``(channels,)``.
        largest: bound on ``|q - zero_point|`` of the input.
    """
    bound = weight.double().abs().flatten(1).sum(1) * largest
    if bias is not None:
        bound = bound + bias.double().abs()
    return torch.float32 if bool((bound < EXACT_FLOAT32).all()) else torch.float64


def requantize(total: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Return ``clamp(round(float32(total) · factor))`` on ``grid``.

    Args:
        total: integers, as floats of any type.
        factor: float32 ``input scale · weight scale / output scale``, in that order; broadcasts against ``total``.
        grid: of the output.
    """
    return grid.nearest(total.float() * factor)


def add(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, grid: Grid) -> Tensor:
    """Add two tensors on their grids: ``a·r_a + (b·r_b + (z - (z_a·r_a + z_b·r_b)))``, three products fused.

    ``r = scale / output scale``. A fused multiply-add rounds once: float64 holds the 32-bit product and,
    but for terms 2^20 apart, the sum.
    """
    if a.shape[-1:] == (1,) and b.shape[-1:] != (1,):
        # The kernel takes a scalar as its second operand.
        a, b, grid_a, grid_b = b, a, grid_b, grid_a
    ratio_a, ratio_b = grid_a.scale / grid.scale, grid_b.scale / grid.scale
    zero_a, zero_b = grid_a.zero_point.float(), grid_b.zero_point.float()
    fixed = grid.zero_point.float() - _fused(zero_a, ratio_a, zero_b * ratio_b)
    inner = _fused(grid_b.steps(b) + zero_b, ratio_b, fixed)
    return grid.nearest_shifted(_fused(grid_a.steps(a) + zero_a, ratio_a, inner))


def _fused(x: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    return (x.double() * factor.double() + term.double()).float()


def multiply(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, grid: Grid) -> Tensor:
    """Multiply two tensors on their grids: ``(q_a - z_a)(q_b - z_b) · (scale_a·scale_b/scale) + z``, rounded."""
    ratio = grid_a.scale * grid_b.scale / grid.scale
    return grid.nearest_shifted(grid_a.steps(a) * grid_b.steps(b) * ratio + grid.zero_point)


def average_image(x: Tensor, source: Grid, grid: Grid) -> Tensor:
    """Average each channel's image, (N, C, H, W) → (N, C, 1, 1): the integer sum times ``s_x/(s_y·H·W)``."""
    pixels = torch.tensor(float(x.shape[2] * x.shape[3]), device=x.device)
    total = source.steps(x).sum(dim=(2, 3), keepdim=True, dtype=torch.float64)
    return requantize(total, source.scale / (grid.scale * pixels), grid)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The window of an average pool: kernel, stride and padding as (height, width); whether padding counts."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    count_padding: bool


def average_windows(x: Tensor, window: Window, grid: Grid) -> Tensor:
    """Average windows of (N, C, H, W): float32 sums row by row, then ``y/s_y + z`` rounded."""
    high, wide = window.padding
    height = (x.shape[2] + 2 * high - window.kernel[0]) // window.stride[0] + 1
    width = (x.shape[3] + 2 * wide - window.kernel[1]) // window.stride[1] + 1
    padded = F.pad(x, (wide, wide, high, high))
    inside = F.pad(torch.ones_like(x[:1, :1]), (wide, wide, high, high), value=float(window.count_padding))
    total, count = torch.zeros_like(x[:, :, :1, :1]), torch.zeros_like(inside[:, :, :1, :1])
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            rows = slice(row, row + (height - 1) * window.stride[0] + 1, window.stride[0])
            columns = slice(column, column + (width - 1) * window.stride[1] + 1, window.stride[1])
            total = total + padded[:, :, rows, columns]
            count = count + inside[:, :, rows, columns]
    return grid.nearest_shifted(total / count / grid.scale + grid.zero_point)
