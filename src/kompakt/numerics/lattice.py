"""Find the steps of weights that lie on grids already: of training, or of another quantizer."""

import torch
from torch import Tensor

MOST_PARTS = 8
TOLERANCE = 1e-3
"""Of a step: what folding a batch norm and float32 may have moved a value."""


def lattice(flat: Tensor, most: int) -> Tensor:
    """Find each row's largest step of which all its values are whole multiples, none beyond ``most`` steps.

    The smallest nonzero magnitude is one to eight steps.

    Args:
        flat: ``(rows, n)``.
        most: the largest multiple.

    Returns:
        Steps, float32 ``(rows,)``: 0 for a row of zeros, NaN for one that lies on no such grid.

    Example:
        >>> import torch
        >>> from kompakt.numerics.lattice import lattice
        >>> lattice(torch.tensor([[0.5, -0.75, 0.0], [0.0, 0.0, 0.0], [1.0, 3.14159, 2.0]]), 127)
        tensor([0.2500, 0.0000,    nan])
    """
    size = flat.detach().double().abs()
    least = torch.where(size > 0, size, torch.inf).amin(1)
    found = torch.full_like(least, torch.nan)
    for parts in range(MOST_PARTS, 0, -1):
        multiples = size / (least[:, None] / parts)
        fits = ((multiples - multiples.round()).abs() <= TOLERANCE).all(1) & (multiples.amax(1) <= most + 0.5)
        # Of the mean over all values: the smallest alone has the error of its own rounding.
        whole = multiples.round()
        mean = size.sum(1) / whole.sum(1)
        found = torch.where(fits, mean, found)
    return torch.where(least == torch.inf, torch.zeros_like(found), found).float()
