"""Choose a layer's step and integers by rate and distortion, with the prices of the coder that will write them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kompakt.coding.rate import ColumnPrices, rate_model
from kompakt.numerics.rate_distortion import coarse, steps, trade_off
from kompakt.numerics.rounding import inverse_factor

FACTORS = (0.8, 1.0, 1.25)
TRIAL_ROWS = 64
PASSES = 2
DAMPING = 0.01
SCALE_BITS, BIAS_BITS, MOST = 2, 6, 127


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a bit is worth.

    Args:
        trade: λ, nats of divergence from the float model's predictions for a bit.
        importance: see ``kompakt.build.importance.output_importance``.
    """

    trade: float
    importance: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Prices:
    """``ColumnPrices`` for tensors: one for each of so many equal parts of the rows."""

    parts: tuple[ColumnPrices, ...]

    def column(self, index: int, q: Tensor, candidates: Tensor) -> Tensor:
        """Return the bits of candidates, (n, rows)."""
        count = len(self.parts)
        rows, moves = q.numpy().reshape(count, -1, q.shape[1]), candidates.numpy().reshape(len(candidates), count, -1)
        found = [part.bits(index, rows[n], moves[:, n]) for n, part in enumerate(self.parts)]
        return torch.from_numpy(found[0] if count == 1 else np.concatenate(found, axis=1))


def rate_distorted(
    w: Tensor, hessian: Tensor, importance: Tensor, trade: float, *, most: int = MOST, least: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Choose steps and integers of a weight.

    Steps follow from λ and the importance of each channel, times a factor for the layer that is tried on some of
    its rows. Prices are fitted to the integers, which are chosen by them, and so on (``PASSES`` times).

    Args:
        w: float weight, dimension 0 the output channels.
        hessian: ``(groups, k, k)``, the mean of ``x xᵀ`` over the places where the layer applies its weight.
        importance: ``(rows,)``.
        trade: λ.
        most: the largest magnitude of an integer; 63 keeps every pair of products with bytes within int16.
        least: smallest scale of a channel, ``(rows,)`` or one for all.

    Returns:
        Integers, int32, of the shape of ``w``; scale ``(rows,)``.
    """
    factor = inverse_factor(hessian, DAMPING)
    base = torch.maximum(steps(factor, importance, trade), w.detach().abs().flatten(1).amax(1) / most)
    base = base.clamp(min=torch.as_tensor(least, dtype=base.dtype).clamp(min=1e-12))
    tried = _spread_rows(w.shape[0], factor.shape[0])
    scales = torch.stack([coarse(base * wider, SCALE_BITS) for wider in FACTORS])
    scale = scales[_trial(w, factor, scales, (importance, trade), tried, most).argmin()]
    q = _nearest(w, scale, most)
    for _ in range(PASSES):
        q, _ = trade_off(w, factor, scale, _prices(q), (importance, trade), most)
    return q, scale


def _trial(w: Tensor, factor: Tensor, scales: Tensor, weights: tuple[Tensor, float], rows: Tensor, most: int) -> Tensor:
    """The costs of some rows under several scales (n, all rows), side by side, at the prices of these rows alone."""
    count, (importance, trade) = len(scales), weights
    part = w[rows].repeat(count, *(1,) * (w.ndim - 1))
    factors = factor.repeat(count, 1, 1) if len(factor) > 1 else factor.expand(count, -1, -1)
    scale, worth = scales[:, rows].reshape(-1), (importance[rows].repeat(count), trade)
    q = _nearest(part, scale, most)
    for _ in range(PASSES):
        q, cost = trade_off(part, factors, scale, _prices(*q.chunk(count)), worth, most)
    return cost.reshape(count, -1).sum(1)


def _spread_rows(count: int, groups: int) -> Tensor:
    """All rows, or some of them evenly spread where one group has many."""
    if groups > 1 or count <= TRIAL_ROWS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, TRIAL_ROWS).round().long()


def _nearest(w: Tensor, scale: Tensor, most: int) -> Tensor:
    wide = scale.reshape(-1, *(1,) * (w.ndim - 1))
    return (w.detach() / wide).round().clamp(-most, most).to(torch.int32)


def _prices(*parts: Tensor) -> _Prices:
    return _Prices(parts=tuple(rate_model(q.numpy().astype(np.int8)).columns() for q in parts))
