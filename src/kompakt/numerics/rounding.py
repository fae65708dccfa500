"""Rounding that looks at the layer's output, not at the weight: GPTQ, and descent from any start.

Rounding to nearest is the best for each weight and not for the layer: with second moments ``H = Σ x xᵀ`` of
the layer's inputs (``kompakt.numerics.moments``), the output error of integers ``q`` is ``Σ_rows e H eᵀ`` with
``e = w - ŵ(q)``. Where the spec asks for integers without int16 saturation, all keep to ``saturation_bounds``.

Reference: Frantar, Ashkboos, Hoefler, Alistarh 2022 (GPTQ), arXiv 2210.17323. Rounding that is learned:
``kompakt.numerics.adaround``.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.grid import dequantize, expand, quantize, saturation_bounds
from kompakt.spec import QuantSpec

MOST_DAMPING = 10.0


def retarget(w: Tensor, cross: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Find the float weight that does on the quantized model's inputs what ``w`` did on the float model's.

    Minimizes ``‖w x - v x̂‖² + λ ‖v - w‖²``: ``v = w + w (C - H) (H + λ)⁻¹`` with ``C = Σ x x̂ᵀ`` and
    ``H = Σ x̂ x̂ᵀ``. Rounding ``v`` instead of ``w`` lets each layer mend the errors of those before it. (Nagel et
    al. 2020, §3.3, reconstruct asymmetrically too; Li et al. 2025 (GPTAQ), arXiv 2504.02692.)

    Args:
        w: float weight, dimension 0 the output channels.
        cross: ``(groups, k, k)``, ``cross_moment`` of float and quantized inputs.
        hessian: ``(groups, k, k)``, ``second_moment`` of the quantized inputs.
        damp: λ as a share of the mean diagonal of ``hessian``.

    Returns:
        float32 of the shape of ``w``.
    """
    _check(w, hessian)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = hessian + torch.where(mean > 0, damp * mean, 1.0) * torch.eye(hessian.shape[1], device=hessian.device)
    flat = w.detach().float().reshape(hessian.shape[0], -1, hessian.shape[1])
    return w.detach().float() + torch.linalg.solve(damped, (flat @ (cross - hessian)).mT).mT.reshape(w.shape)


def gptq(
    w: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, damp: float = 0.01, block: int = 128
) -> Tensor:
    """Round column by column, each time moving the error onto the columns still to come.

    Columns go in falling order of ``H_ii``. With ``U`` the upper Cholesky factor of ``H⁻¹``, the error of
    column ``i`` divided by ``U_ii`` is taken from the later columns in proportion to ``U_ij``; within a block at
    once, beyond it in one product. Columns that never saw an input are rounded to nearest.

    Args:
        w: weight, dimension 0 the output channels; linear or convolution.
        hessian: ``(groups, k, k)``, see ``second_moment``.
        scale: of the shape that the spec's granularity asks for.
        zero_point: same.
        spec: the integers.
        damp: share of the mean diagonal added to the diagonal; raised tenfold while the factorization fails.
        block: columns in a block.

    Returns:
        Integers, int32, of the shape of ``w``.

    Raises:
        InputError: the second moments do not fit the weight, or are not finite.
    """
    _check(w, hessian)
    groups, width, _ = hessian.shape
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    factor = inverse_factor(_permuted(hessian, order), damp)
    layout = (groups, w.shape[0] // groups, width)
    columns = order[:, None].expand(layout)
    known = (each.reshape(layout).gather(2, columns) for each in facts(w, scale, zero_point, spec))
    q = sweep(w.detach().float().reshape(layout).gather(2, columns), factor, Grid(*known), block)
    return torch.empty_like(q).scatter_(2, columns, q).reshape(w.shape)


class Levels(Protocol):
    """What the weights of a layer may be: ``(groups, rows, columns)`` of them."""

    def column(self, values: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Round the values of column ``i``, ``(groups, rows)``; return integers and what they stand for."""


def _check(w: Tensor, hessian: Tensor) -> None:
    groups, width, _ = hessian.shape
    if w.shape[0] % groups or w[0].numel() != width:
        raise InputError(f"second moments {tuple(hessian.shape)} do not fit a weight of shape {tuple(w.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("second moments hold NaN or infinite values; look for overflow in the layer's input")


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    by_row = hessian.float().gather(1, order[:, :, None].expand_as(hessian))
    return by_row.gather(2, order[:, None, :].expand_as(hessian))


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Factor ``H⁻¹ = Uᵀ U``, with dead columns cut off and damping on the diagonal."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    dead = torch.where(diagonal > 0, 0.0, mean)
    while damp <= MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(hessian + torch.diag_embed(dead + damp * mean))
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        damp *= 10
    raise InputError(f"second moments cannot be factored even with damping {MOST_DAMPING:g}; use more inputs")


class Grid(NamedTuple):
    """Scale, zero point, lowest and highest integer of every weight, ``(groups, rows, columns)``."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def column(self, values: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Round the values of column ``i``; return integers and what they stand for."""
        scale, zero_point = self.scale[:, :, i], self.zero_point[:, :, i]
        q = (torch.round(values / scale) + zero_point).clamp(self.low[:, :, i], self.high[:, :, i])
        return q.to(torch.int32), (q - zero_point) * scale


def facts(w: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Return scale, zero point, lowest and highest integer of every weight, as floats of its shape."""
    shape = tuple(w.shape)
    params = tuple(expand(each, shape, spec.granularity).float() for each in (scale, zero_point))
    if not spec.saturation_free:
        return *params, torch.full_like(params[0], spec.qmin), torch.full_like(params[0], spec.qmax)
    return *params, *(bound.float() for bound in saturation_bounds(quantize(w, scale, zero_point, spec)))


def sweep(w: Tensor, upper: Tensor, grid: Levels, block: int = 128) -> Tensor:
    """Round the columns of ``w``, which is overwritten, in order, as ``gptq`` does; ``upper``: ``inverse_factor``."""
    q = torch.empty_like(w, dtype=torch.int32)
    for start in range(0, w.shape[2], block):
        end = min(start + block, w.shape[2])
        errors = torch.zeros_like(w[:, :, start:end])
        for i in range(start, end):
            value = w[:, :, i]
            q[:, :, i], rounded = grid.column(value, i)
            error = (value - rounded) / upper[:, i, i, None]
            w[:, :, i:end] -= error[:, :, None] * upper[:, i, None, i:end]
            errors[:, :, i - start] = error
        w[:, :, end:] -= errors @ upper[:, start:end, end:]
    return q


def descend(
    w: Tensor, q: Tensor, hessian: Tensor, params: tuple[Tensor, Tensor, QuantSpec], sweeps: int = 4, block: int = 128
) -> Tensor:
    """Improve integers by coordinate descent on the output error; never worse than where it starts.

    Column after column is set to the best integer given all others, ``round((ŵ_i + (e H)_i / H_ii) / s)``
    with ``e = w - ŵ``, as in Behdin et al. 2023 (QuantEase), arXiv 2309.01885; stops when a sweep changes nothing.

    Args:
        w: weight, dimension 0 the output channels.
        q: integers to start from, of ``gptq`` or ``quantize``.
        hessian: ``(groups, k, k)``, see ``second_moment``.
        params: scale, zero point and spec.
        sweeps: the most passes over all columns.
        block: columns whose errors are updated at once.

    Returns:
        Integers, int32, of the shape of ``w``.
    """
    scale, zero_point, spec = params
    layout = (hessian.shape[0], -1, hessian.shape[-1])
    grid = Grid(*(each.reshape(layout) for each in facts(w, scale, zero_point, spec)))
    approximation = dequantize(q, scale, zero_point, spec).reshape(layout)
    best = descended(w.detach().float().reshape(layout), approximation, hessian, grid, sweeps, block)
    return quantize(best.reshape(w.shape), scale, zero_point, spec)


def descended(
    w: Tensor, approximation: Tensor, hessian: Tensor, grid: Levels, sweeps: int = 4, block: int = 128
) -> Tensor:
    """Set every column of ``approximation`` to its best level given all others, as ``descend`` does.

    Args:
        w: ``(groups, rows, columns)``, as ``approximation``, which holds levels of ``grid``.
        approximation: to start from.
        hessian: ``(groups, columns, columns)``.
        grid: the levels.
        sweeps: the most passes.
        block: columns whose errors are updated at once.
    """
    approximation = approximation.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # Columns that never saw an input have no error to mend; an infinite curvature leaves them alone.
    curvature = torch.where(diagonal > 0, diagonal, torch.inf)
    slope = (w - approximation) @ hessian
    for _ in range(sweeps):
        before = approximation.clone()
        for start in range(0, w.shape[2], block):
            part = slice(start, min(start + block, w.shape[2]))
            inside = hessian[:, part, part]
            moved = _best_columns(approximation, slope[:, :, part].clone(), inside, curvature, grid, start)
            slope -= moved @ hessian[:, part]
        if torch.equal(before, approximation):
            break
    return approximation


def _best_columns(
    approximation: Tensor, slope: Tensor, inside: Tensor, curvature: Tensor, grid: Levels, start: int
) -> Tensor:
    """Set the columns of one block in ``approximation``, each to its best; return by how much they moved."""
    moved = torch.zeros_like(slope)
    for at in range(slope.shape[2]):
        value = approximation[:, :, start + at].clone()
        _, best = grid.column(value + slope[:, :, at] / curvature[:, start + at, None], start + at)
        moved[:, :, at] = best - value
        slope -= moved[:, :, at, None] * inside[:, at, None]
        approximation[:, :, start + at] = best
    return moved
