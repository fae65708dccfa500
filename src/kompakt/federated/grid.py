"""Cells of all weights in rows and columns, and how densely they are filled: what places are coded by.

A trained update is zero in most cells, but rows and columns differ: inputs that are never active, outputs that
learn much. Rows and columns get classes by how many of their cells are filled; the cells of one tensor, row class and
column class are a *group*; groups of like density are one *stratum*, within which places are as good as drawn alike.
FORMAT.md §10.1 is the specification.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CLASSES = 5
GROUPS = CLASSES * CLASSES
STRATA = 15
ROWS, COLUMNS = 1, 2
MODE_STARTS = (0, 1, 1 + CLASSES, 1 + 2 * CLASSES)  # of the groups of no classes, of rows', columns' and both
GROUP_BITS = 3.0
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grid:
    """Numbers of the row, the column and the tensor of every cell; rows and columns are numbered over all tensors."""

    row: np.ndarray
    column: np.ndarray
    row_tensor: np.ndarray
    column_tensor: np.ndarray
    sizes: np.ndarray

    @property
    def tensors(self) -> int:
        """How many weights there are."""
        return self.sizes.size


@lru_cache(maxsize=4)
def grid_of(shapes: Shapes) -> Grid:
    """The grid of weights of some shapes, one after another: O rows of all else; of one dimension or none, one row."""
    sides = [(shape[0], int(np.prod(shape[1:], dtype=np.int64))) if len(shape) > 1 else (1, _size(shape))
             for shape in shapes]  # fmt: skip
    rows, columns, first_row, first_column = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0, 0
    for height, width in sides:
        rows.append(np.repeat(np.arange(first_row, first_row + height, dtype=np.int32), width))
        columns.append(np.tile(np.arange(first_column, first_column + width, dtype=np.int32), height))
        first_row, first_column = first_row + height, first_column + width
    numbers, heights, widths = np.arange(len(sides)), [side[0] for side in sides], [side[1] for side in sides]
    return Grid(
        row=np.concatenate(rows),
        column=np.concatenate(columns),
        row_tensor=np.repeat(numbers, np.array(heights, np.int64)),
        column_tensor=np.repeat(numbers, np.array(widths, np.int64)),
        sizes=np.array([height * width for height, width in sides], np.int64),
    )


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


@dataclass(frozen=True)
class Classes:
    """Classes of rows and columns; 0 says that none of its cells is filled.

    Args:
        modes: by tensor, whether its rows (1) and its columns (2) have classes; where not, all are of class 1.
        row, column: classes.
    """

    modes: np.ndarray
    row: np.ndarray
    column: np.ndarray

    def groups(self, grid: Grid, cells: np.ndarray) -> np.ndarray:
        """The group of each cell: ``(tensor · 5 + class of the row) · 5 + class of the column``."""
        of_row = (grid.row_tensor * CLASSES + self.row) * CLASSES
        return of_row.take(grid.row[cells]) + self.column.take(grid.column[cells])

    def spread(self, grid: Grid, values: np.ndarray) -> np.ndarray:
        """What groups have, laid out on all cells."""
        rows, columns = (np.cumsum(np.bincount(side, minlength=grid.tensors))[:-1]
                         for side in (grid.row_tensor, grid.column_tensor))  # fmt: skip
        parts = zip(values.reshape(-1, CLASSES, CLASSES), np.split(self.row, rows), np.split(self.column, columns),
                    strict=True)  # fmt: skip
        return np.concatenate([table[row][:, column].reshape(-1) for table, row, column in parts])

    def bits(self, grid: Grid) -> float:
        """About what the classes take."""
        rows, columns = ((self.modes & flag > 0) for flag in (ROWS, COLUMNS))
        return float(_entropy(_histogram(grid.row_tensor, self.row, grid.tensors))[rows].sum()) + float(
            _entropy(_histogram(grid.column_tensor, self.column, grid.tensors))[columns].sum()
        )

    def group_sizes(self, grid: Grid) -> np.ndarray:
        """Cells of each group, [tensors · 25]."""
        by_row = _histogram(grid.row_tensor, self.row, grid.tensors)
        by_column = _histogram(grid.column_tensor, self.column, grid.tensors)
        return (by_row[:, :, None] * by_column[:, None, :]).reshape(-1)


def live(sizes: np.ndarray) -> np.ndarray:
    """The groups that have a density: those with cells, and neither class 0."""
    number = np.arange(sizes.size)
    return np.flatnonzero((sizes > 0) & (number % GROUPS >= CLASSES) & (number % CLASSES > 0))


def classify(grid: Grid, places: np.ndarray) -> Classes:
    """The classes that code these filled cells in the fewest bits, about."""
    rows, columns = grid.row[places], grid.column[places]
    full = Classes(
        modes=np.full(grid.tensors, ROWS | COLUMNS),
        row=_levels(rows, grid.row_tensor, grid.tensors),
        column=_levels(columns, grid.column_tensor, grid.tensors),
    )
    sizes = full.group_sizes(grid).reshape(-1, CLASSES, CLASSES)
    filled = np.bincount(full.groups(grid, places), minlength=sizes.size).reshape(sizes.shape)
    sides = [_entropy(_histogram(grid.row_tensor, full.row, grid.tensors)),
             _entropy(_histogram(grid.column_tensor, full.column, grid.tensors))]  # fmt: skip
    prices = np.add.reduceat(place_bits(_by_mode(filled), _by_mode(sizes)), MODE_STARTS, axis=1)
    for mode, flag in ((mode, flag) for mode in range(4) for flag in (ROWS, COLUMNS) if mode & flag):
        prices[:, mode] += sides[flag - 1]
    modes = np.argmin(prices, axis=1)
    return Classes(
        modes=modes,
        row=np.where(modes[grid.row_tensor] & ROWS, full.row, 1),
        column=np.where(modes[grid.column_tensor] & COLUMNS, full.column, 1),
    )


def _by_mode(counts: np.ndarray) -> np.ndarray:
    """Counts [tensors, row classes, column classes] of the groups that each mode has, side by side."""
    ways = (counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1), counts)
    return np.concatenate([way.reshape(len(counts), -1) for way in ways], axis=1)


def place_bits(filled: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Bits of which cells of each group are filled, ``N·H(k/N)``, and of its density."""
    k, n = filled.astype(np.float64), np.maximum(sizes, 1).astype(np.float64)
    rest = np.maximum(n - k, 0)
    bits = n * np.log2(n) - k * np.log2(np.maximum(k, 1)) - rest * np.log2(np.maximum(rest, 1))
    return np.where(k > 0, bits + GROUP_BITS, 0.0)


def _levels(lines: np.ndarray, tensor: np.ndarray, tensors: int) -> np.ndarray:
    """Classes of lines by powers of two about the mean of those of their tensor that are not empty."""
    counts = np.bincount(lines, minlength=tensor.size).astype(np.float64)
    used = counts > 0
    mean = np.bincount(tensor, counts, tensors) / np.maximum(np.bincount(tensor[used], minlength=tensors), 1)
    level = np.floor(np.log2(np.maximum(counts, 0.5) / np.maximum(mean, 0.5)[tensor]) + (CLASSES - 1) / 2)
    return np.where(used, np.clip(level, 0, CLASSES - 2).astype(np.int64) + 1, 0)


def _histogram(tensor: np.ndarray, classes: np.ndarray, tensors: int) -> np.ndarray:
    return np.bincount(tensor * CLASSES + classes, minlength=tensors * CLASSES).reshape(tensors, CLASSES)


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Bits of the classes of each tensor's lines."""
    total = counts.sum(axis=1)
    return total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(axis=1)
