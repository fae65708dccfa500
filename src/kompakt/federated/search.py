"""Which differences to send and how coarsely, for a number of bytes: rate and distortion on the sparse form.

Only differences that could be sent are looked at, and the cost of one depends on how many are sent beside it: it
is dear in a row or column of which nothing else is sent. References as in ``numerics.updates.round_rate_distortion``.
"""

from dataclasses import dataclass

import numpy as np

from kompakt.federated.grid import CLASSES, Grid, classify, place_bits
from kompakt.federated.spec import UpdateSpec
from kompakt.numerics.updates import LEAST_STEP, MOST_STEP, step_code, step_size

LAGRANGE = 0.14
FIRST, ALWAYS = 0.85, 0.5
MOST_PRICED, MOST_CODE = 255, 2**15 - 1
TRIALS = 8
MANTISSA_BITS = 19  # of a float32, those below the step's
REVIVAL_BITS = 1.5


@dataclass(frozen=True)
class Sparse:
    """Rounded differences: those that are not zero.

    Args:
        step: code of the step, the same for all.
        places: ascending numbers of cells.
        codes: int64, none zero.
        bits: about what they take.
    """

    step: int
    places: np.ndarray
    codes: np.ndarray
    bits: float


class Search:
    """Looks for the step whose codes take some bits.

    Args:
        grid: of the weights.
        changes: float32, the differences of all weights, flat.
        spec: by which rounding.
    """

    def __init__(self, grid: Grid, changes: np.ndarray, spec: UpdateSpec) -> None:
        self._grid, self._spec = grid, spec
        self._changes, self._sizes = changes, np.abs(changes)

    def fitted(self, bits: float) -> Sparse:
        """The codes of the finest step that takes so many bits and not more, or of one beside it.

        What a step takes is guessed from the magnitudes, measured, and guessed anew by what was measured.
        """
        peak = float(self._sizes.max(initial=0.0))
        if not step_size(LEAST_STEP) <= peak < np.inf:
            return self.at(LEAST_STEP)
        curve = _Curve(self._sizes, self._spec)
        fine, coarse = step_code(peak / MOST_CODE), min(step_code(peak * 2) + 1, MOST_STEP)
        step, best = curve.step(bits), None
        for _ in range(TRIALS):
            step = min(max(step, fine), coarse - 1)
            found = self.at(step)
            if found.bits <= bits:
                best, coarse = found, step
            else:
                fine = step + 1
            step = curve.step(bits * curve.bits(step) / max(found.bits, 1.0))
            if fine >= coarse or (best is not None and step >= coarse):
                break
        return best if best is not None else self.at(coarse)

    def at(self, step: int) -> Sparse:
        """The codes of a step."""
        size = np.float32(step_size(step))
        cells = np.flatnonzero(self._sizes > ALWAYS * size)
        ratio = self._sizes[cells] / size
        codes = np.rint(ratio if self._spec.rounding != "rate-distortion" else np.where(ratio > FIRST, ratio, 0.0))
        classes = classify(self._grid, cells[codes > 0])
        sizes, of_cell = classes.group_sizes(self._grid), classes.groups(self._grid, cells)
        if self._spec.rounding == "rate-distortion":
            codes = _priced(codes, ratio, sizes, of_cell)
        sent = np.flatnonzero(codes)
        places, codes = cells[sent], np.minimum(codes[sent], MOST_CODE).astype(np.int64)
        bits = float(place_bits(np.bincount(of_cell[sent], minlength=sizes.size), sizes).sum())
        bits += classes.bits(self._grid) + _entropy(codes) + codes.size
        return Sparse(step, places, np.where(self._changes[places] < 0, -codes, codes), bits)


class _Curve:
    """About the bits that every step takes: as if cells were filled at random, at the price of their density.

    Args:
        sizes: float32, magnitudes of all differences.
        spec: by which rounding.
    """

    def __init__(self, sizes: np.ndarray, spec: UpdateSpec) -> None:
        # The upper bits of a float32 are its place on the grid of steps.
        counts = np.bincount(sizes.view(np.int32) >> MANTISSA_BITS)
        counts[0] = 0
        codes = np.flatnonzero(counts)[::-1]
        sent = np.cumsum(counts[codes])
        price = np.log2((sizes.size - sent + 0.5) / (sent + 0.5)) + 1
        least = np.maximum((1 + LAGRANGE * price * (spec.rounding == "rate-distortion")) / 2, ALWAYS)
        starts = np.log2((codes << MANTISSA_BITS).astype(np.int32).view(np.float32))
        # Beyond the least magnitude every cell takes a bit more with each octave.
        steps = np.append(starts - np.log2(least), -126.0)
        sent, logs = np.append(sent, sent[-1]), np.append(starts * counts[codes], 0.0)
        bits = place_bits(sent, np.full(sent.size, sizes.size)) + sent + np.maximum(np.cumsum(logs) - sent * steps, 0)
        self._bits, self._steps = np.log2(np.maximum.accumulate(bits)), np.minimum.accumulate(steps)

    def step(self, bits: float) -> int:
        """The code of the finest step that takes so many bits."""
        return step_code(float(2.0 ** np.interp(np.log2(max(bits, 1.0)), self._bits, self._steps)))

    def bits(self, step: int) -> float:
        """What a step takes."""
        return float(2.0 ** np.interp(np.log2(step_size(step)), self._steps[::-1], self._bits[::-1]))


def _priced(codes: np.ndarray, ratio: np.ndarray, sizes: np.ndarray, of_cell: np.ndarray) -> np.ndarray:
    """Choose zero or a neighbour of each ratio at the prices of codes chosen before.

    Args:
        codes, ratio: of each cell, the codes chosen before and the size of the difference in steps.
        sizes: cells of each group.
        of_cell: the group of each cell.
    """
    sent = np.flatnonzero(codes)
    filled = np.bincount(of_cell[sent], minlength=sizes.size)
    # Bits of being sent over not being sent; a row or column of which nothing else is sent costs more.
    price = np.log2((np.maximum(sizes - filled, 0) + 0.5) / (filled + 0.5)) + 1
    number = np.arange(sizes.size)
    price += REVIVAL_BITS * ((number % CLASSES == 0) | (number // CLASSES % CLASSES == 0))
    counts = np.bincount(np.minimum(codes[sent], MOST_PRICED).astype(np.int64), minlength=MOST_PRICED + 1) + 0.5
    of_size = np.log2(counts[1:].sum()) - np.log2(counts)
    low = np.floor(ratio)
    number = np.minimum(low, MOST_PRICED - 1).astype(np.int64)
    fall = np.where(low > 0, (ratio - low) ** 2 + LAGRANGE * of_size[number], np.inf)
    rise = (low + 1 - ratio) ** 2 + LAGRANGE * of_size[number + 1]
    best = np.minimum(fall, rise) + LAGRANGE * price[of_cell]
    return np.where(ratio**2 <= best, 0.0, low + (rise < fall))


def _entropy(codes: np.ndarray) -> float:
    """Bits of magnitudes under their own histogram."""
    counts = np.bincount(np.minimum(codes, MOST_PRICED))
    counts = counts[counts > 0]
    return float(codes.size * np.log2(max(codes.size, 1)) - (counts * np.log2(counts)).sum())
