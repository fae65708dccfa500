"""Choose indices and shared values for a layer's output, not for its weights.

With second moments ``H = Σ x xᵀ`` of the layer's inputs, the output error of a codebook is ``Σ_rows e H eᵀ``, with
``e = w - c[i]``. For fixed values the indices are found as integers are (``kompakt.numerics.rounding``); for fixed
indices the values are the solution of least squares, a system of k unknowns for each codebook.

Reference: van Baalen et al. 2024 (GPTVQ), arXiv 2402.15319, in one dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.codebook import gather
from kompakt.numerics.rounding import descended, inverse_factor, sweep

DAMP = 0.01


class _Books(NamedTuple):
    """The rising levels of every row, ``(groups, rows, k)``, and the bounds between them, ``(groups, rows, k - 1)``."""

    levels: Tensor
    bounds: Tensor

    def column(self, values: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Round the values of column ``i``; all columns of a row have the same levels."""
        index = torch.searchsorted(self.bounds, values[:, :, None].contiguous())
        return index[:, :, 0].to(torch.int32), self.levels.gather(2, index)[:, :, 0]


def share_for_inputs(
    w: Tensor, hessian: Tensor, indices: Tensor, values: Tensor, rounds: int = 4
) -> tuple[Tensor, Tensor]:
    """Improve a codebook for the layer's inputs: indices and values in turn; never worse than where it starts.

    Args:
        w: float weight, dimension 0 the output channels; linear or convolution.
        hessian: ``(groups, k, k)``, ``second_moment`` of the layer's inputs.
        indices: to start from, of ``kompakt.numerics.codebook.share``; the shape of ``w``.
        values: ``(G, k)``, each row rising.
        rounds: how often both are found anew.

    Returns:
        Indices, uint8, and values, as given; each row of the values rises.

    Raises:
        InputError: the second moments do not fit the weight, or are not finite.

    Example:
        >>> w, h = torch.randn(8, 4), torch.eye(4)[None]
        >>> i, c = share_for_inputs(w, h, *share(w, bits=2))
    """
    layout = (hessian.shape[0], -1, hessian.shape[2])
    if w[0].numel() != hessian.shape[2] or len(w) % hessian.shape[0]:
        raise InputError(f"second moments {tuple(hessian.shape)} do not fit a weight of shape {tuple(w.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("second moments hold NaN or infinite values; look for overflow in the layer's input")
    flat, moments = w.detach().float().reshape(layout), hessian.float()
    best, books = indices, values.float()
    least = _error(flat, gather(best, books).reshape(layout), moments)
    factor = inverse_factor(moments, DAMP)
    for turn in range(rounds):
        grid = _grid(books, len(w), layout[0])
        if turn == 0:
            start = grid.levels.gather(2, sweep(flat.clone(), factor, grid).long())
        else:
            start = gather(best, books).reshape(layout)
        chosen = descended(flat, start, moments, grid)
        found = _index(chosen.reshape(w.shape), books)
        fitted = _values(flat, moments, found, books)
        error = _error(flat, gather(found, fitted).reshape(layout), moments)
        if not error < least:
            break
        least, (best, books) = error, _sorted(found, fitted)
    return best.to(torch.uint8), books.to(values)


def _grid(books: Tensor, rows: int, groups: int) -> _Books:
    levels = books.repeat_interleave(rows // len(books), dim=0).reshape(groups, rows // groups, -1)
    return _Books(levels.contiguous(), ((levels[:, :, 1:] + levels[:, :, :-1]) / 2).contiguous())


def _index(weight: Tensor, books: Tensor) -> Tensor:
    """Find the index of values that are levels already."""
    rows = weight.reshape(len(books), -1).contiguous()
    return torch.searchsorted(((books[:, 1:] + books[:, :-1]) / 2).contiguous(), rows).reshape(weight.shape)


def _values(w: Tensor, hessian: Tensor, indices: Tensor, books: Tensor) -> Tensor:
    """Solve for the values that minimize the output error of fixed indices; a value without weights stays."""
    count, k = books.shape
    by_book = indices.reshape(count, -1)
    slope = torch.zeros_like(books).scatter_add_(1, by_book, (w @ hessian).reshape(count, -1))
    normal = torch.zeros(count, k, k)
    for level in range(k):
        moved = ((indices == level).to(w).reshape(w.shape) @ hessian).reshape(count, -1)
        normal[:, :, level].scatter_add_(1, by_book, moved)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-12) * torch.eye(k)
    pull = (ridge @ books[:, :, None])[:, :, 0]
    return torch.linalg.solve(normal.double() + ridge.double(), (slope + pull).double()).float()


def _sorted(indices: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    rising, order = books.sort(dim=1)
    rank = order.argsort(dim=1)
    return rank.gather(1, indices.reshape(len(books), -1)).reshape(indices.shape), rising


def _error(w: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    error = w - approximation
    return float(((error @ hessian) * error).sum(dtype=torch.float64))
