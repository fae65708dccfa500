"""Stored tables: a set of histograms, chosen by scale class and by the size of the prediction.

They cover what no parametric shape does: pruned weights, codebook indices, masks, exponents. FORMAT.md §6.3.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kompakt.coding.models import (
    CLASSES,
    ESCAPE,
    SYMBOLS,
    ZERO,
    histogram_codes,
    histogram_frequencies,
    read_histogram,
    write_histogram,
)
from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError

BINS = 64
MOST_CONTEXTS = 64
GRIDS = ((1, 1), (4, 1), (8, 1), (1, 4), (1, 8), (3, 4), (4, 8), (8, 8))
ESCAPE_BITS = 16.0


@dataclass(frozen=True)
class TableSet:
    """Histograms for ``len(classes) + 1`` by ``len(bins) + 1`` contexts.

    Args:
        classes: ascending thresholds on the scale class.
        bins: ascending thresholds on the prediction's magnitude in eighths.
        frequencies: [contexts, 256].
        first: the number of its first context.
    """

    classes: tuple[int, ...]
    bins: tuple[int, ...]
    frequencies: np.ndarray
    first: int = 0

    def contexts(self, classes: np.ndarray, predicted: np.ndarray | None) -> np.ndarray:
        """The context of each value, int32, given its scale class and its prediction in eighths."""
        rows = np.searchsorted(self.classes, np.arange(CLASSES), side="right").astype(np.int32)
        found = (rows * (len(self.bins) + 1) + self.first)[classes]
        if predicted is None or not self.bins:
            return found
        bins = np.searchsorted(self.bins, np.arange(BINS), side="right").astype(np.int32)
        return found + bins[np.minimum(np.abs(predicted), BINS - 1)]


@dataclass(frozen=True)
class Sample:
    """What a member offers to a set: its scale classes, predictions and values, one-dimensional."""

    classes: np.ndarray
    predicted: np.ndarray
    values: np.ndarray

    @property
    def symbols(self) -> np.ndarray:
        """The symbols 0 … 255 of the values, mirrored where the prediction is negative."""
        return symbols(self.values, self.predicted)


def symbols(values: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Symbols of integers, mirrored where the prediction is negative; the escape beyond −128 … 126."""
    found = np.where(predicted < 0, -values, values).astype(np.int32) + ZERO
    return np.where((found < 0) | (found >= ESCAPE), ESCAPE, found)


def build(samples: list[Sample], bits: int) -> tuple[TableSet, bytes]:
    """The set that codes these samples in the fewest bits.

    Returns:
        the set and the bytes that store it.
    """
    classes, predicted, values = (
        np.concatenate([getattr(sample, name) for sample in samples]) for name in ("classes", "predicted", "values")
    )
    found = symbols(values, predicted)
    magnitude = np.minimum(np.abs(predicted), BINS - 1)
    grids = dict.fromkeys((_thresholds(classes, c, CLASSES), _thresholds(magnitude, b, BINS)) for c, b in GRIDS)
    options = [_count(grid, classes, magnitude, found) for grid in grids]
    grid, counts, _ = min(options, key=lambda option: option[2])
    stored = [histogram_codes(row) for row in counts]
    raw = bytes([len(grid[0]) + 1, *grid[0], len(grid[1]) + 1, *grid[1]])
    raw += b"".join(write_histogram(first, codes) for first, codes in stored)
    tables = np.stack([histogram_frequencies(codes, first, bits) for first, codes in stored])
    return TableSet(*grid, tables), raw


def cost(table_set: TableSet, sample: Sample) -> float:
    """Bits that a sample takes under a set."""
    counts = _histogram(
        table_set.contexts(sample.classes, sample.predicted), sample.symbols, len(table_set.frequencies)
    )
    table = table_set.frequencies
    total = np.log2(table[0].sum())
    price = np.where(table > 0, total - np.log2(np.maximum(table, 1)), 0.0)
    escape = np.broadcast_to(price[:, ESCAPE:] + ESCAPE_BITS, price.shape)
    price = np.where(table > 0, price, escape)
    price[:, ESCAPE] += ESCAPE_BITS
    return float((counts * price).sum())


def read_set(cursor: Cursor, bits: int) -> TableSet:
    """Read a set.

    Raises:
        FormatError: thresholds are not ascending, or there are too many contexts.
    """
    classes = _read_thresholds(cursor, CLASSES)
    bins = _read_thresholds(cursor, BINS)
    contexts = (len(classes) + 1) * (len(bins) + 1)
    if contexts > MOST_CONTEXTS:
        raise FormatError(f"{cursor.where}: a set of {contexts} tables, at most {MOST_CONTEXTS} expected")
    return TableSet(classes, bins, np.stack([read_histogram(cursor, bits) for _ in range(contexts)]))


def _read_thresholds(cursor: Cursor, below: int) -> tuple[int, ...]:
    count = cursor.u8(MOST_CONTEXTS, "the number of contexts")
    if count == 0:
        raise FormatError(f"{cursor.where}: a set without tables; the file is corrupt")
    found = tuple(cursor.take(count - 1))
    if any(a >= b for a, b in pairwise(found)) or any(not 0 < t < below for t in found):
        raise FormatError(f"{cursor.where}: thresholds {found} are not ascending within 1…{below - 1}")
    return found


def _thresholds(values: np.ndarray, parts: int, below: int) -> tuple[int, ...]:
    """Thresholds that cut values into about equal parts."""
    cumulated = np.cumsum(np.bincount(values, minlength=below))
    cuts = np.searchsorted(cumulated, np.arange(1, parts) * values.size / parts, side="right")
    return tuple(int(cut) for cut in np.unique(cuts) if 0 < cut < below)


def _count(
    grid: tuple[tuple[int, ...], tuple[int, ...]], classes: np.ndarray, magnitude: np.ndarray, found: np.ndarray
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray, float]:
    """Histograms under a grid of thresholds, and the bits that values and tables take."""
    contexts = (len(grid[0]) + 1) * (len(grid[1]) + 1)
    probe = TableSet(*grid, np.zeros((contexts, SYMBOLS), np.int64))
    counts = _histogram(probe.contexts(classes, magnitude), found, contexts)
    totals = counts.sum(axis=1)
    taken = float((totals * np.log2(np.maximum(totals, 1))).sum() - (counts * np.log2(np.maximum(counts, 1))).sum())
    spans = [np.ptp(np.flatnonzero(row[:ESCAPE])) + 2 if row[:ESCAPE].any() else 2 for row in counts]
    return grid, counts, taken + 16 * contexts + 6 * float(sum(spans)) + ESCAPE_BITS * float(counts[:, ESCAPE].sum())


def _histogram(contexts: np.ndarray, found: np.ndarray, rows: int) -> np.ndarray:
    return np.bincount(contexts * SYMBOLS + found, minlength=rows * SYMBOLS).reshape(rows, SYMBOLS)
