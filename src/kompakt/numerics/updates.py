"""Mathematics of small model updates: steps on a grid, which values to send, and rounding.

All functions take and return tensors; a difference is measured in steps when it is rounded.
"""

import math

import torch
from torch import Tensor

STEPS_AN_OCTAVE = 16
LEAST_STEP, MOST_STEP = -126 * STEPS_AN_OCTAVE, 96 * STEPS_AN_OCTAVE
LAGRANGE = 0.14
SMOOTHING = 0.5
ROUNDS = 3
_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def step_size(code: int) -> float:
    """Return the step ``(1 + (code mod 16)/16) · 2^⌊code/16⌋``, which a float32 holds exactly."""
    octave, part = divmod(code, STEPS_AN_OCTAVE)
    return math.ldexp(1 + part / STEPS_AN_OCTAVE, octave)


def step_code(step: float) -> int:
    """Return the code of the smallest step on the grid that is at least ``step``."""
    if step <= 0:
        return LEAST_STEP
    mantissa, exponent = math.frexp(step)
    code = (exponent - 1) * STEPS_AN_OCTAVE + math.ceil((2 * mantissa - 1) * STEPS_AN_OCTAVE)
    return min(max(code, LEAST_STEP), MOST_STEP)


def round_stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with the probability of the fraction, so that the mean is ``x``: ``⌊x + u⌋``, u uniform in [0, 1).

    Reference: Alistarh et al. 2017 (QSGD), arXiv 1610.02132.
    """
    return torch.floor(x + torch.rand(x.shape, generator=generator, dtype=x.dtype))


def round_rate_distortion(x: Tensor, lagrange: float = LAGRANGE) -> Tensor:
    """Choose among zero and both neighbours the integer of least ``(x − q)² + λ·bits(q)``.

    ``bits`` is the cost of q under the histogram of the integers chosen so far, from rounding to nearest on. At high
    rates entropy-coded uniform quantization has ``−dD/dR = ln 2 / 6 ≈ 0.116`` squared steps a bit; at rates
    below one bit a little more gives a wider dead zone and a finer step.
    Reference: Sullivan 1996, IEEE Trans. Inf. Theory 42(5); Wiedemann et al. 2019 (DeepCABAC), arXiv 1907.11900.

    Args:
        x: differences in steps, any shape, float32.
        lagrange: λ, squared steps a bit.
    """
    size = x.abs().reshape(-1)
    low, best = size.floor(), size.round()
    lower, upper = low.clamp(max=256).int(), (low + 1).clamp(max=256).int()
    for _ in range(ROUNDS):
        price = lagrange * _prices(best)
        fall = (size - low).square_().add_(price.index_select(0, lower))
        rise = (low + 1 - size).square_().add_(price.index_select(0, upper))
        best = torch.where(rise < fall, low + 1, low)
        best = torch.where(size.square().add_(price[0]) <= torch.minimum(fall, rise), 0.0, best)
    return best.reshape(x.shape) * x.sign()


def _prices(sizes: Tensor) -> Tensor:
    """Bits of each magnitude, sign included, under the histogram of ``sizes``; the last is for all from 256 on."""
    counts = torch.bincount(sizes.clamp(max=256).int(), minlength=257).float() + SMOOTHING
    bits = counts.sum().log2() - counts.log2()
    bits[1:] += 1
    return bits


def entropy_bits(codes: Tensor) -> float:
    """Return the bits of integers under their own histogram."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    return float((counts * (counts.sum().log2() - counts.log2())).sum())


def keep_largest(x: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest magnitudes of a flat tensor; of equals, the first.

    Reference: Aji, Heafield 2017, arXiv 1704.05021; Lin et al. 2018 (DGC), arXiv 1712.01887.
    """
    order = torch.sort(x.abs(), descending=True, stable=True).indices[:count]
    return torch.zeros(x.shape, dtype=torch.bool).index_fill_(0, order, True)


def keep_random(size: int, count: int, seed: int) -> Tensor:
    """Mark ``count`` of ``size`` places that a seed alone decides, the same on every machine.

    Place i gets the number ``splitmix64(seed + (i + 1)·0x9E3779B97F4A7C15)``; the smallest are marked.
    Reference: Konečný et al. 2016, arXiv 1610.05492 (random masks); Steele et al. 2014 (splitmix).
    """
    state = torch.arange(1, size + 1, dtype=torch.int64) * _signed(_GOLDEN) + _signed(seed % 2**64)
    state = (state ^ _shift(state, 30)) * _signed(_MIX_A)
    state = (state ^ _shift(state, 27)) * _signed(_MIX_B)
    state = state ^ _shift(state, 31)
    order = torch.sort(state, stable=True).indices[:count]
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, order, True)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
