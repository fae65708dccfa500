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
    first, second, rest = slopes
    return first * size.clamp(max=1) + second * (size - 1).clamp(0, 1) + rest * (size - 2).clamp(min=0)


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
        size, shift = z.abs(), (SHIFT * slopes).clamp(0, MOST_SHIFT)
        first, second, rest = (size + 0.5 - each for each in shift)
        q = (first >= 1).float() + ((first >= 1) & (second >= 2)).float()
        q = torch.where((q == 2) & (rest >= 3), rest.floor(), q).clamp(max=most) * z.sign()
        moved = q - z
    return z + moved
