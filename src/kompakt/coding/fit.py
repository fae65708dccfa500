"""Fitting the model of a weight tensor: prediction, scale factors, shape, by the bits that they cost."""

from dataclasses import dataclass, replace

import numpy as np

from kompakt.coding.kernels import (
    WEIGHT_UNIT,
    WINDOW,
    Layout,
    Scales,
    bounded,
    eighths,
    is_exact,
    reach,
    split_fraction,
    tap_weights,
    weight_rows,
)
from kompakt.coding.models import CLASSES, ESCAPE, FRACTIONS, SHAPES, SYMBOLS, UNIT_CLASS, ZERO, costs

SAMPLE = 2**14
MOST_REFINED = 2**18
ROUNDS = 2
LIMIT = 127
RIDGE = 1e-3
LEAST = 0.02
WEIGHT_BITS = 5.0
MOVE_BITS = 1.2
MOVES = (-4, -2, -1, 0, 1, 2)
UNIT_AND_AXES = {"rows": (2, (0, 2)), "columns": (2, (0, 1)), "taps": (1, (1, 2))}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted model of one member.

    Args:
        layout: the geometry.
        weights: prediction weights [rows, 9] in 1/64, or None.
        scales: factors of the scale class.
        classes: int16 [K, N], the scale class of each value.
        predicted: int32 [K, N], predictions in eighths.
        bits: what the values cost under the parametric model.
        side_bits: what factors and weights cost.
    """

    layout: Layout
    weights: np.ndarray | None
    scales: Scales
    classes: np.ndarray
    predicted: np.ndarray
    bits: float
    side_bits: float

    @property
    def total_bits(self) -> float:
        """Values, factors and weights together."""
        return self.bits + self.side_bits


@dataclass(frozen=True, kw_only=True)
class Start:
    """A first model of one member, before the shape is settled.

    Args:
        layout: the geometry.
        weights: prediction weights [rows, 9] in 1/64, or None.
        predicted: int32 [K, N], predictions in eighths.
        cells: int32 [K, N], fraction · 256 + symbol of each value.
        scales: factors from the mean errors.
        moves: for each shape, the move of the base that suits it.
        prices: for each shape, about the bits that the values cost.
    """

    layout: Layout
    weights: np.ndarray | None
    predicted: np.ndarray
    cells: np.ndarray
    scales: Scales
    moves: tuple[int, ...]
    prices: tuple[float, ...]


def start(values: np.ndarray, layout: Layout) -> tuple[Start, ...]:
    """First models without prediction and, where there are taps, with it.

    Args:
        values: float32 [K, N], integers.
        layout: their geometry.
    """
    plain = _start(values, layout, None)
    if layout.taps == 1:
        return (plain,)
    weights = _prediction(values, layout)
    if not weights.any() or not is_exact(values, reach(weights)):
        return (plain,)
    return plain, _start(values, layout, weights)


def finish(first: Start, shape: int) -> Fit:
    """Settle the factors of a model under a shape."""
    layout, cells, table = first.layout, first.cells, costs(shape).reshape(-1)
    scales = replace(first.scales, base=int(np.clip(first.scales.base + first.moves[shape], 0, CLASSES - 1)))
    if cells.size <= MOST_REFINED:
        for _ in range(ROUNDS):
            for name in ("rows", "columns", "taps"):
                scales = _refine(cells, scales, layout, table, name)
        scales = _prune(cells, scales, layout, table)
    classes = bounded(scales.unbounded(layout))
    side = sum(_side(factor) for factor in (scales.rows, scales.columns, scales.taps))
    return Fit(
        layout=layout,
        weights=first.weights,
        scales=scales,
        classes=classes,
        predicted=first.predicted,
        bits=_bits(cells, classes, table),
        side_bits=side + (WEIGHT_BITS * np.count_nonzero(first.weights) if first.weights is not None else 0),
    )


def entropy(values: np.ndarray) -> float:
    """Bits of integers under their own histogram."""
    counts = np.unique(values, return_counts=True)[1]
    return float(counts.sum() * np.log2(counts.sum()) - (counts * np.log2(counts)).sum()) if counts.size else 0.0


def _start(values: np.ndarray, layout: Layout, weights: np.ndarray | None) -> Start:
    predicted = np.zeros(values.shape, np.int32)
    if weights is not None:
        for tap, row in enumerate(tap_weights(weights, layout.taps), start=1):
            predicted[tap] = eighths(row @ values[tap - row.size : tap])
    nearest, fractions = split_fraction(predicted)
    symbols = np.clip(values.astype(np.int32) - nearest + ZERO, -1, ESCAPE)
    cells = fractions * SYMBOLS + np.where(symbols < 0, ESCAPE, symbols)
    scales = _moments(np.abs(values - predicted / np.float32(FRACTIONS)), layout)
    moves, prices = _search(cells, scales, layout)
    return Start(
        layout=layout, weights=weights, predicted=predicted, cells=cells, scales=scales, moves=moves, prices=prices
    )


def _prediction(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Least squares of each tap on the earlier ones, kernels weighed by the inverse scale of their row."""
    step = max(1, layout.kernels // SAMPLE)
    sample = values[:, ::step].astype(np.float64)
    row = np.arange(layout.kernels)[::step] // layout.inputs
    size = np.bincount(row, np.abs(sample).mean(axis=0), minlength=layout.outputs)
    count = np.maximum(np.bincount(row, minlength=layout.outputs), 1)
    sample = sample / (size / count + 0.1)[row]
    moments = sample @ sample.T
    if layout.taps <= WINDOW:
        rows = [_solve(moments, [(tap, tap)], min(tap, WINDOW)) for tap in range(1, layout.taps)]
    else:
        rows = [_solve(moments, [(tap, WINDOW) for tap in range(WINDOW, layout.taps)], WINDOW)]
    weights = np.zeros((len(weight_rows(layout.taps)), WINDOW), np.int64)
    for index, found in enumerate(rows):
        weights[index, : found.size] = np.clip(np.rint(found * WEIGHT_UNIT), -LIMIT, LIMIT)
    return weights


def _solve(moments: np.ndarray, taps: list[tuple[int, int]], width: int) -> np.ndarray:
    """Ridge regression of taps on their ``width`` predecessors, nearest first, pooled over taps."""
    left, right = np.zeros((width, width)), np.zeros(width)
    for tap, _ in taps:
        earlier = np.arange(tap - 1, tap - 1 - width, -1)
        left += moments[np.ix_(earlier, earlier)]
        right += moments[earlier, tap]
    ridge = RIDGE * np.trace(left) / width + 1e-12
    return np.linalg.solve(left + ridge * np.eye(width), right)


def _moments(errors: np.ndarray, layout: Layout) -> Scales:
    """Factors of the mean error of rows, columns and taps, fitted in turn."""
    cube = errors.reshape(layout.taps, layout.outputs, layout.inputs) + np.float32(LEAST)
    taps, rows, columns = (np.ones(size, np.float32) for size in cube.shape)
    for _ in range(3):
        by_tap = np.einsum("koi,o,i->k", cube, 1 / rows, 1 / columns) / max(1, rows.size * columns.size)
        taps = by_tap / by_tap.mean()
        by_column = np.einsum("koi,k,o->i", cube, 1 / taps, 1 / rows) / max(1, taps.size * rows.size)
        columns = by_column / by_column.mean()
        rows = np.einsum("koi,k,i->o", cube, 1 / taps, 1 / columns) / max(1, taps.size * columns.size)
    base = float(np.exp(np.log(rows).mean()))
    return Scales(
        base=int(np.clip(UNIT_CLASS + np.rint(4 * np.log2(_visible(base))), 0, CLASSES - 1)),
        rows=_steps(rows / base, 2) if rows.size > 1 else None,
        columns=_steps(columns, 2) if columns.size > 1 and layout.outputs * layout.taps > 1 else None,
        taps=_steps(taps, 4) if taps.size > 1 else None,
    )


def _visible(error: float) -> float:
    """The scale behind a mean absolute error: rounding hides what is below one half."""
    return error if error > 0.35 else 0.5 / -np.log(max(error, 1e-4))


def _steps(factors: np.ndarray, resolution: int) -> np.ndarray:
    return np.clip(np.rint(resolution * np.log2(factors)), -LIMIT, LIMIT).astype(np.int64)


def _search(cells: np.ndarray, scales: Scales, layout: Layout) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """For each shape, the move of the base that costs the fewest bits, and these bits, from a sample."""
    step = max(1, cells.size // SAMPLE)
    some, cells = scales.unbounded(layout).reshape(-1)[::step], cells.reshape(-1)[::step]
    moves, prices = [], []
    for shape in range(SHAPES):
        table = costs(shape).reshape(-1)
        price, move = min((_bits(cells, some + move, table), move) for move in MOVES)
        moves.append(move)
        prices.append(price * step)
    return tuple(moves), tuple(prices)


def _refine(cells: np.ndarray, scales: Scales, layout: Layout, table: np.ndarray, name: str) -> Scales:
    """Move each factor of one kind by at most one step, where that saves bits."""
    factor = getattr(scales, name)
    if factor is None:
        return scales
    unit, axes = UNIT_AND_AXES[name]
    classes = scales.unbounded(layout)
    found = []
    for move in (-1, 0, 1):
        price = _cell_bits(cells, classes + unit * move, table)
        price = price.reshape(layout.taps, layout.outputs, layout.inputs)
        found.append(price.sum(axis=axes, dtype=np.float64) + abs(move) * MOVE_BITS)
    return _with(scales, name, np.clip(factor + np.argmin(found, axis=0) - 1, -LIMIT, LIMIT))


def _prune(cells: np.ndarray, scales: Scales, layout: Layout, table: np.ndarray) -> Scales:
    """Drop the factors that cost more than they save."""
    for name in ("rows", "columns", "taps"):
        factor = getattr(scales, name)
        if factor is not None:
            without = _with(scales, name, None)
            price = _bits(cells, without.unbounded(layout), table)
            if price <= _bits(cells, scales.unbounded(layout), table) + _side(factor):
                scales = without
    return scales


def _with(scales: Scales, name: str, factor: np.ndarray | None) -> Scales:
    parts = {"rows": scales.rows, "columns": scales.columns, "taps": scales.taps, name: factor}
    return Scales(base=scales.base, **parts)


def _side(factor: np.ndarray | None) -> float:
    """Bits that storing a factor takes, about."""
    return entropy(factor) + MOVE_BITS * len(factor) ** 0.5 if factor is not None else 0.0


def _bits(cells: np.ndarray, classes: np.ndarray, table: np.ndarray) -> float:
    return float(_cell_bits(cells, classes, table).sum(dtype=np.float64))


def _cell_bits(cells: np.ndarray, classes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The cost of each value, given its fraction and symbol (``cells``) and its class."""
    return table.take(bounded(classes).astype(np.int32) * (FRACTIONS * SYMBOLS) + cells)
