"""Rounding and a penalty by what integers cost in the coded file, for training.

The price of an integer is taken as a function of its magnitude, given by its slopes: the bits by which 1 is dearer
than 0, 2 than 1, and each further one than the one before. Between integers it runs straight.
"""

import math

import torch
from torch import Tensor

SLOPES = 3
SHIFT = math.log(2) / 12
"""A step at which rounding noise and entropy balance (``rate_distortion.steps``) makes a bit worth so much of it."""
MOST_SHIFT = 0.45
"""A value that lies on an integer stays there, whatever it costs."""


def price_share(done: float, rise: float, first: float) -> float:
    """Return what a bit costs of its full price after a share of the training: ``first ** (1 - done / rise)``.

    From ``first`` it rises evenly in its logarithm, and is full from ``rise`` on, so that the network mends what one
    price breaks before the next, as gradual pruning has it (Zhu and Gupta 2017, arXiv 1710.01878).

    Args:
        done: of the training, 0 to 1.
        rise: the share of the training over which the price rises; 0 begins at the full price.
        first: where it begins, above 0, at most 1.

    Example:
        >>> [round(price_share(done, rise=0.5, first=0.01), 3) for done in (0, 0.25, 0.5, 1)]
        [0.01, 0.1, 1.0, 1.0]
    """
    return 1.0 if done >= rise else float(first ** (1 - done / rise))


def priced(z: Tensor, slopes: Tensor) -> Tensor:
    """Return the bits of values between integers, less those of zero: piecewise linear in ``|z|``.

    The entropy term of rate-aware training (Oktay et al. 2020, arXiv 1906.06624; Wiedemann et al. 2018, arXiv
    1812.07520), with the coder's own prices.

    Args:
        z: weights in steps, any shape.
        slopes: ``(3, *shape)``, none negative.

    Returns:
        The shape of ``z``; differentiable by ``z``.
    """
    size = z.abs()
    with torch.no_grad():
        first, second, rest = slopes
        slope = _of_piece(size, first, second, rest)
        start = _of_piece(size, torch.zeros_like(first), first - second, first + second - 2 * rest)
    return torch.addcmul(start, slope, size)


def priced_round(z: Tensor, slopes: Tensor, most: int) -> Tensor:
    """Round values to integers by rate and distortion: ``argmin ½ (z - q)² + ln 2 / 12 · bits(q)``.

    The integer above is taken where it is nearer by ``SHIFT`` times its slope; so zero has the widest reach.

    Args:
        z: weights in steps, any shape.
        slopes: ``(3, *shape)``, see ``priced``.
        most: the largest magnitude.

    Returns:
        Integers as floats, the shape of ``z``; gradients go straight through.
    """
    with torch.no_grad():
        size = z.abs()
        shift = _of_piece(size, *slopes).mul(SHIFT).clamp_(0, MOST_SHIFT)
        q = (size + 0.5).sub_(shift).floor_().clamp_(max=most).copysign_(z)
        moved = q.sub_(z)
    return z + moved


def _of_piece(size: Tensor, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    """Choose by the piece that a magnitude lies in: below 1, below 2, beyond."""
    return torch.where(size < 1, first, torch.where(size < 2, second, rest))
