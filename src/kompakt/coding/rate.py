"""What each weight costs in the coded file, for rate–distortion and rate-aware choices.

The prices are those of the parametric model (FORMAT.md §6.2): scale factors a row, a column and a tap,
prediction from earlier taps. A choice made by them is coded at that price.
"""

from dataclasses import dataclass

import numpy as np

from kompakt.coding.fit import Fit, finish, start
from kompakt.coding.kernels import bounded, eighths, from_taps, layout_of, split_fraction, tap_weights, to_taps
from kompakt.coding.models import ESCAPE, FRACTIONS, SHAPES, SYMBOLS, ZERO, costs


@dataclass(frozen=True, kw_only=True)
class RateModel:
    """Prices of integers at every place of a weight tensor.

    Args:
        shape: the tensor's shape.
        fit: the fitted model.
        distribution: index of its parametric shape.
    """

    shape: tuple[int, ...]
    fit: Fit
    distribution: int

    def bits(self, values: np.ndarray, moves: tuple[int, ...] = (0,)) -> np.ndarray:
        """What each value would cost if it moved, the others staying as they are.

        Args:
            values: the current integers.
            moves: what is added to the value whose price is asked.

        Returns:
            float32 [len(moves), *shape]; the price of the value itself, not its effect on others.
        """
        layout = self.fit.layout
        tapped = np.ascontiguousarray(to_taps(values, layout)).astype(np.float32)
        predicted = np.zeros(tapped.shape, np.int32)
        if self.fit.weights is not None:
            for tap, row in enumerate(tap_weights(self.fit.weights, layout.taps), start=1):
                predicted[tap] = eighths(row @ tapped[tap - row.size : tap])
        nearest, fractions = split_fraction(predicted)
        table = costs(self.distribution).reshape(-1)
        cells = bounded(self.fit.scales.unbounded(layout)).astype(np.int32) * FRACTIONS + fractions
        residual = tapped.astype(np.int32) - nearest + ZERO
        prices = [
            table.take(cells * SYMBOLS + np.where((r < 0) | (r > ESCAPE), ESCAPE, r))
            for r in (residual + move for move in moves)
        ]
        return np.stack([from_taps(price, self.shape, price.dtype) for price in prices])

    def columns(self) -> "ColumnPrices":
        """The same prices for choosing values one column of ``[O, I · K]`` after the other."""
        layout = self.fit.layout
        classes = bounded(self.fit.scales.unbounded(layout)).astype(np.int32).T
        weights = [] if self.fit.weights is None else tap_weights(self.fit.weights, layout.taps)
        return ColumnPrices(
            cells=np.ascontiguousarray(classes.reshape(layout.outputs, -1).T) * FRACTIONS,
            table=costs(self.distribution).reshape(-1),
            taps=layout.taps,
            weights=tuple(weights),
        )


@dataclass(frozen=True, kw_only=True)
class ColumnPrices:
    """Prices of integers given the earlier columns, which hold the earlier taps of the same kernels.

    Args:
        cells: int32 [I · K, O], the first table of each place's scale class.
        table: prices, flat.
        taps: K.
        weights: of the prediction, for each tap but the first; empty where there is none.
    """

    cells: np.ndarray
    table: np.ndarray
    taps: int
    weights: tuple[np.ndarray, ...]

    def bits(self, index: int, q: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """What each candidate costs, float32 [n, O].

        Args:
            index: the column.
            q: [O, I · K], integers as float32, of which the columns before are final.
            candidates: [n, O], integers.
        """
        cells, tap = self.cells[index], index % self.taps
        symbols = candidates.astype(np.int32) + ZERO
        if self.weights and tap:
            row = self.weights[tap - 1]
            nearest, fractions = split_fraction(eighths(q[:, index - row.size : index] @ row))
            cells, symbols = cells + fractions, symbols - nearest
        else:
            cells = cells + FRACTIONS // 2
        symbols = np.where((symbols < 0) | (symbols > ESCAPE), ESCAPE, symbols)
        return self.table.take(cells * SYMBOLS + symbols)


def rate_model(values: np.ndarray) -> RateModel:
    """Fit the prices to the integers of a weight tensor (at least one value)."""
    layout = layout_of(values.shape)
    starts = start(np.ascontiguousarray(to_taps(values, layout)).astype(np.float32), layout)
    distribution = int(np.argmin(np.min([first.prices for first in starts], axis=0))) % SHAPES
    best = min((finish(first, distribution) for first in starts), key=lambda found: found.total_bits)
    return RateModel(shape=values.shape, fit=best, distribution=distribution)
