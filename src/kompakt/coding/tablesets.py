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
MOST_CONTEXTS = 65
GRIDS = ((1, 1), (4, 1), (8, 1), (1, 4), (1, 8), (3, 4), (4, 8), (8, 8))
ESCAPE_BITS = 16.0
SIMPLER = 1.001
_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class TableSet:
    """Histograms for ``len(classes) + 1`` by ``len(bins) + 1`` contexts, and one more for first values of kernels.

    Args:
        classes: ascending thresholds on the scale class.
        bins: ascending thresholds on the prediction's magnitude in eighths.
        frequencies: [contexts, 256].
        first: the number of its first context.
        heads: whether the last context is that of the first nonzero values of kernels.
    """

    classes: tuple[int, ...]
    bins: tuple[int, ...]
    frequencies: np.ndarray
    first: int = 0
    heads: bool = False

    @property
    def head_context(self) -> int:
        """The context of the first nonzero values of kernels."""
        return self.first + len(self.frequencies) - 1

    def contexts(self, classes: np.ndarray, predicted: np.ndarray | None) -> np.ndarray:
        """The context of each value, int32, given its scale class and its prediction in eighths."""
        found = np.full(classes.shape, self.first, np.int32)
        for threshold in self.classes:
            found += np.multiply(classes >= threshold, np.int32(len(self.bins) + 1))
        if predicted is not None and self.bins:
            magnitude = np.abs(predicted)
            for threshold in self.bins:
                found += magnitude >= threshold
        return found


@dataclass(frozen=True)
class Sample:
    """What a member offers to a set, one-dimensional: its values, and their scale classes and predictions.

    Flat members have neither classes nor predictions (None). ``heads`` marks first nonzero values of kernels.
    """

    values: np.ndarray
    classes: np.ndarray | None = None
    predicted: np.ndarray | None = None
    heads: np.ndarray | None = None

    @property
    def symbols(self) -> np.ndarray:
        """The symbols 0 … 255 of the values, mirrored where the prediction is negative."""
        values = self.values if self.predicted is None else np.where(self.predicted < 0, -self.values, self.values)
        return np.where((values < -ZERO) | (values >= ESCAPE - ZERO), ESCAPE, values + ZERO)

    def histogram(self, table_set: TableSet) -> np.ndarray:
        """How often each symbol occurs in each context of a set: [contexts, 256]."""
        rows = len(table_set.frequencies)
        if self.classes is None or rows == 1:
            return np.bincount(self.symbols, minlength=rows * SYMBOLS).reshape(rows, SYMBOLS)
        contexts = table_set.contexts(self.classes, self.predicted)
        if self.heads is not None:
            contexts[self.heads] = table_set.head_context
        return np.bincount(contexts * SYMBOLS + self.symbols, minlength=rows * SYMBOLS).reshape(rows, SYMBOLS)


def build(samples: list[Sample], bits: int) -> tuple[TableSet, bytes]:
    """The set that codes these samples in the fewest bits.

    Returns:
        the set and the bytes that store it.
    """
    options = [_count(grid, samples) for grid in _grids(samples)]
    least = min(taken for _, _, taken in options)
    # The first is the simplest: contexts that save next to nothing only cost time.
    grid, counts, _ = next(option for option in options if option[2] <= SIMPLER * least)
    stored = [histogram_codes(row) for row in counts]
    heads = samples[0].heads is not None
    raw = bytes([len(grid[0]) + 1, *grid[0], len(grid[1]) + 1, *grid[1], heads])
    raw += b"".join(write_histogram(first, codes) for first, codes in stored)
    tables = np.stack([histogram_frequencies(codes, first, bits) for first, codes in stored])
    return TableSet(*grid, tables, heads=heads), raw


def cost(table_set: TableSet, sample: Sample) -> float:
    """Bits that a sample takes under a set."""
    counts, table = sample.histogram(table_set), table_set.frequencies
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
    heads = bool(cursor.u8(1, "whether kernels have heads"))
    contexts = (len(classes) + 1) * (len(bins) + 1) + heads
    if contexts > MOST_CONTEXTS:
        raise FormatError(f"{cursor.where}: a set of {contexts} tables, at most {MOST_CONTEXTS} expected")
    tables = np.stack([read_histogram(cursor, bits) for _ in range(contexts)])
    return TableSet(classes, bins, tables, heads=heads)


def _read_thresholds(cursor: Cursor, below: int) -> tuple[int, ...]:
    count = cursor.u8(MOST_CONTEXTS, "the number of contexts")
    if count == 0:
        raise FormatError(f"{cursor.where}: a set without tables; the file is corrupt")
    found = tuple(cursor.take(count - 1))
    if any(a >= b for a, b in pairwise(found)) or any(not 0 < t < below for t in found):
        raise FormatError(f"{cursor.where}: thresholds {found} are not ascending within 1…{below - 1}")
    return found


def _grids(samples: list[Sample]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Thresholds on classes and predictions to try; none where the samples are flat."""
    classes = np.concatenate([sample.classes for sample in samples if sample.classes is not None] or [_NOTHING])
    predicted = np.concatenate([sample.predicted for sample in samples if sample.predicted is not None] or [_NOTHING])
    spread = np.bincount(classes, minlength=CLASSES)
    sizes = np.bincount(np.minimum(np.abs(predicted), BINS - 1), minlength=BINS)
    return list(dict.fromkeys((_thresholds(spread, c), _thresholds(sizes, b)) for c, b in GRIDS))


def _thresholds(counts: np.ndarray, parts: int) -> tuple[int, ...]:
    """Thresholds that cut values, given how often each occurs, into about equal parts."""
    cumulated = np.cumsum(counts)
    cuts = np.searchsorted(cumulated, np.arange(1, parts) * cumulated[-1] / parts, side="right")
    # A cut that leaves nothing below it, or nothing above it, parts nothing.
    return tuple(int(cut) for cut in np.unique(cuts) if 0 < cut < counts.size and cumulated[cut - 1] > 0)


def _count(
    grid: tuple[tuple[int, ...], tuple[int, ...]], samples: list[Sample]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray, float]:
    """Histograms under a grid of thresholds, and the bits that values and tables take."""
    contexts = (len(grid[0]) + 1) * (len(grid[1]) + 1) + (samples[0].heads is not None)
    probe = TableSet(*grid, np.zeros((contexts, SYMBOLS), np.int64))
    counts = np.sum([sample.histogram(probe) for sample in samples], axis=0)
    totals = counts.sum(axis=1)
    taken = float((totals * np.log2(np.maximum(totals, 1))).sum() - (counts * np.log2(np.maximum(counts, 1))).sum())
    spans = [np.ptp(np.flatnonzero(row[:ESCAPE])) + 2 if row[:ESCAPE].any() else 2 for row in counts]
    return grid, counts, taken + 16 * contexts + 6 * float(sum(spans)) + ESCAPE_BITS * float(counts[:, ESCAPE].sum())
