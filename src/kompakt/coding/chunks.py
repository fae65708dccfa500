"""What ``kompakt.coding.loops`` works out for a chunk of values at a time, for numba: contexts and values.

Who changes this file clears numba's cache: it looks at ``loops.py`` alone.
"""

import numpy as np
from numba import njit

from kompakt.coding.models import CLASSES, ESCAPE, FRACTIONS, ZERO
from kompakt.coding.tablesets import BINS

FEW = 64  # symbols that are searched for an escape together
# Columns of ``cuts``: the number of a set's first context, how many thresholds of each kind, the thresholds.
FIRST, OF_CLASS, OF_SIZE, THRESHOLDS = range(4)
CUTS = THRESHOLDS + CLASSES + BINS


@njit
def parametric(
    classes: np.ndarray, factor: int, predicted: np.ndarray, bits: int, contexts: np.ndarray, sides: np.ndarray
) -> None:
    """Contexts shifted by the table bits, and what is added to symbols."""
    shift, add, last = np.uint32(bits), np.int32(factor), np.int32(CLASSES - 1)
    for i in range(contexts.size):
        cls = min(max(np.int32(np.int32(classes[i]) + add), np.int32(0)), last)
        nearest = np.int32(np.int32(predicted[i] + np.int32(4)) >> np.int32(3))
        fraction = np.int32(predicted[i] - np.int32(nearest << np.int32(3)) + np.int32(4))
        contexts[i] = np.uint32(np.int32(np.int32(cls << np.int32(3)) + fraction)) << shift
        sides[i] = np.int32(nearest - np.int32(ZERO))


@njit
def unpredicted(classes: np.ndarray, factor: int, bits: int, contexts: np.ndarray, sides: np.ndarray) -> None:
    """As ``parametric``, where the prediction is 0."""
    shift, add, last = np.uint32(bits), np.int32(factor), np.int32(CLASSES - 1)
    for i in range(contexts.size):
        cls = min(max(np.int32(np.int32(classes[i]) + add), np.int32(0)), last)
        contexts[i] = np.uint32(np.int32(np.int32(cls << np.int32(3)) + np.int32(FRACTIONS // 2))) << shift
        sides[i] = np.int32(-ZERO)


@njit
def count(values: np.ndarray, threshold: int, step: int, sums: np.ndarray) -> None:
    """Add a step where a value reaches a threshold."""
    least, add = np.int16(threshold), np.int16(step)
    for i in range(sums.size):
        sums[i] = np.int16(sums[i] + (add if values[i] >= least else np.int16(0)))


@njit
def by_class(cuts: np.ndarray, classes: np.ndarray, factor: int, sums: np.ndarray) -> None:
    """The contexts of stored tables where nothing is predicted.

    A pass for each threshold takes a tenth of the time of looking classes up: it is one instruction for 16 values.
    """
    sums[:] = cuts[FIRST]
    for place in range(cuts[OF_CLASS]):
        count(classes, cuts[THRESHOLDS + place] - factor, cuts[OF_SIZE] + 1, sums)


@njit
def by_size(cuts: np.ndarray, predicted: np.ndarray, sizes: np.ndarray, sides: np.ndarray, sums: np.ndarray) -> None:
    """Add what predictions tell to contexts; the signs that symbols are multiplied by."""
    for i in range(sizes.size):
        sizes[i] = np.int16(min(np.int32(abs(predicted[i])), np.int32(BINS)))
        sides[i] = np.int32(np.int32(predicted[i] >> np.int32(31)) | np.int32(1))
    for place in range(cuts[OF_SIZE]):
        count(sizes, cuts[THRESHOLDS + cuts[OF_CLASS] + place], 1, sums)


@njit
def shift(sums: np.ndarray, bits: int, contexts: np.ndarray) -> None:
    """Contexts shifted by the table bits."""
    shift = np.uint32(bits)
    for i in range(sums.size):
        contexts[i] = np.uint32(sums[i]) << shift


@njit
def keep(heads: np.ndarray, head: int, tap: int, contexts: np.ndarray, kept: np.ndarray) -> int:
    """Move the contexts of values that have a symbol to the front; note where those values stand."""
    count, here, context = np.uint64(0), np.uint8(tap), np.uint32(head)
    for i in range(contexts.size):
        # Written for every value, kept or not: a branch would be guessed wrong too often.
        contexts[count] = context if heads[i] == here else contexts[i]
        kept[count] = i
        count += np.uint64(heads[i] <= here)
    return int(count)


@njit
def add(found: np.ndarray, sides: np.ndarray, row: np.ndarray) -> bool:
    """Values of parametric symbols; whether all fit."""
    lost = np.int32(0)
    for i in range(found.size):
        value = np.int32(np.int32(found[i]) + sides[i])
        row[i] = np.int16(value)
        lost |= np.int32(value ^ np.int32(np.int16(value)))
    return lost == 0


@njit
def sign(found: np.ndarray, sides: np.ndarray, row: np.ndarray) -> None:
    """Values of symbols of stored tables."""
    for i in range(found.size):
        row[i] = np.int16((np.int32(found[i]) - np.int32(ZERO)) * sides[i])


@njit
def scatter(found: np.ndarray, sides: np.ndarray, kept: np.ndarray, row: np.ndarray) -> None:
    """As ``sign``, for some of the values."""
    for i in range(found.size):
        row[kept[i]] = np.int16((np.int32(found[i]) - np.int32(ZERO)) * sides[kept[i]])


@njit
def escape(row: np.ndarray, kept: np.ndarray, found: np.ndarray, escapes: np.ndarray, at: int) -> int:
    """Put the escaped values in their places, those that fit; return how many are used, the missing among them."""
    for first in range(0, found.size, FEW):
        few = found[first : first + FEW]
        last = np.uint8(0)
        for i in range(few.size):
            last = max(last, few[i])
        for i in range(few.size if last == ESCAPE else 0):
            if few[i] == ESCAPE:
                row[kept[first + i] if kept.size else first + i] = escapes[at] if at < escapes.size else 0
                at += 1
    return at


@njit
def bound(row: np.ndarray, ends: np.ndarray) -> int:
    """Widen the ends of a member's values; return the largest magnitude of these."""
    least = most = row[0]
    for i in range(row.size):
        least, most = min(least, row[i]), max(most, row[i])
    ends[0], ends[1] = min(ends[0], least), max(ends[1], most)
    return int(max(-np.int64(least), np.int64(most)))
