"""The geometry of weights: rows, columns and taps, the prediction along taps, the scale classes.

A weight tensor is an array [O, I, K]: O outputs, I inputs, K taps of a kernel. Trained kernels are
smooth, so a tap is predicted from earlier taps of its kernel; its scale is a product of one factor a
row, one a column and one a tap. FORMAT.md §6.1 is the specification.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np

from kompakt.coding.models import CLASSES, FRACTIONS

MOST_TAPS = 64
WINDOW = 9
MOST_GROUP = 16
WEIGHT_UNIT = 64
LEAST_CLASS, GREATEST_CLASS = np.array(0, np.int16), np.array(CLASSES - 1, np.int16)
EXACT = 2**24  # integers below this are exact in 32-bit floats, whatever the order of a sum


@dataclass(frozen=True)
class Layout:
    """The array [outputs, inputs, taps] as which a member is coded."""

    outputs: int
    inputs: int
    taps: int

    @property
    def kernels(self) -> int:
        """Number of kernels, which is the number of values of one tap."""
        return self.outputs * self.inputs


class Plane(NamedTuple):
    """The modelled values of a member.

    Args:
        values: [taps, kernels].
        least, most: the least and the greatest, 0 where there are none.
    """

    values: np.ndarray
    least: int = 0
    most: int = 0

    @staticmethod
    def of(values: np.ndarray) -> "Plane":
        """A plane whose values are looked at."""
        return Plane(values, int(values.min()), int(values.max())) if values.size else Plane(values)


def layout_of(shape: tuple[int, ...], *, flat: bool = False, grouped: bool = False) -> Layout:
    """The layout of a tensor's shape.

    Args:
        shape: the shape.
        flat: drop it.
        grouped: take neighbouring inputs as taps where there are no taps.
    """
    if flat or len(shape) < 2:
        return Layout(1, prod(shape), 1)
    taps = prod(shape[2:])
    found = Layout(shape[0], shape[1], taps) if 0 < taps <= MOST_TAPS else Layout(shape[0], prod(shape[1:]), 1)
    if not grouped or found.taps > 1:
        return found
    size = next((size for size in range(MOST_GROUP, 0, -1) if found.inputs % size == 0), 1)
    return Layout(found.outputs, found.inputs // size, size)


def weight_rows(taps: int) -> list[int]:
    """How many prediction weights each stored row has: one row a tap, or one for all beyond 9 taps."""
    return [min(tap, WINDOW) for tap in range(1, taps)] if taps <= WINDOW else [WINDOW]


@cache
def weight_mask(taps: int) -> np.ndarray:
    """Where ``weight_rows`` has weights, bool [rows, 9]."""
    mask = np.arange(WINDOW) < np.array(weight_rows(taps))[:, None]
    mask.flags.writeable = False
    return mask


def tap_weights(weights: np.ndarray, taps: int) -> list[np.ndarray]:
    """For each tap but the first, its weights in the order of the taps that they multiply, float32.

    Args:
        weights: [rows, 9] integers in units of 1/64, nearest earlier tap first, zeros behind the
            counts of ``weight_rows``.
    """
    rows = [weights[tap - 1] if taps <= WINDOW else weights[0] for tap in range(1, taps)]
    counts = [min(tap, WINDOW) for tap in range(1, taps)]
    # BLAS wants contiguous vectors; it may sum in any order, for all sums are exact.
    return [np.ascontiguousarray(row[:count][::-1], np.float32) for row, count in zip(rows, counts, strict=True)]


def eighths(products: np.ndarray) -> np.ndarray:
    """Predictions in eighths, int32, from sums of weights (1/64) times values, float32."""
    found = products.astype(np.int32)
    found += 4
    found >>= 3
    return found


def reach(weights: np.ndarray) -> int:
    """How far a prediction may lie from the largest value that it is made of, in units of 1/64."""
    return int(np.abs(weights.astype(np.int64)).sum(axis=1).max(initial=0))


def is_exact(values: np.ndarray, most: int) -> bool:
    """Whether predictions from these values, under weights of this reach, are exact in 32-bit floats."""
    return float(max(values.max(initial=0), -values.min(initial=0))) * most < EXACT


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The factors of the scale class, as integers: a class is a quarter octave, rows and columns count twice."""

    base: int
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    taps: np.ndarray | None = None

    def kernel_classes(self, layout: Layout) -> np.ndarray:
        """The part of the scale class that rows and columns decide, unbounded, int16 [O · I]."""
        found = np.full((layout.outputs, layout.inputs), self.base, np.int16)
        if self.rows is not None:
            found += 2 * self.rows.astype(np.int16)[:, None]
        if self.columns is not None:
            found += 2 * self.columns.astype(np.int16)[None, :]
        return found.reshape(-1)

    def unbounded(self, layout: Layout) -> np.ndarray:
        """The sum of all factors, int16 [K, O · I]; ``bounded`` makes it the scale class."""
        kernels = self.kernel_classes(layout)
        taps = self.taps if self.taps is not None else np.zeros(layout.taps)
        return kernels[None, :] + taps.astype(np.int16)[:, None]


def bounded(classes: np.ndarray) -> np.ndarray:
    """Scale classes within 0 … 36."""
    return np.minimum(np.maximum(classes, LEAST_CLASS), GREATEST_CLASS)


def to_taps(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Order values by tap: [K, O · I]."""
    return values.reshape(layout.kernels, layout.taps).T


def from_taps(values: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Undo ``to_taps``, into an array of this dtype."""
    found = np.empty((values.shape[1], len(values)), dtype)
    # Tap by tap is twice as fast as the transposed copy of a tall array.
    for tap, row in enumerate(values):
        found[:, tap] = row
    return found.reshape(shape)


def split_fraction(predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest integer and fraction 0 … 7 of a prediction in eighths."""
    nearest = (predicted + FRACTIONS // 2) >> 3
    return nearest, predicted - FRACTIONS * nearest + FRACTIONS // 2
