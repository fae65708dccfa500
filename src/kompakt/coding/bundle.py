"""Coded members side by side, and the context of each of their values. FORMAT.md §6 is the specification."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from kompakt.coding.header import Coded
from kompakt.coding.kernels import Layout, bounded, eighths, is_exact, split_fraction, tap_weights
from kompakt.coding.models import ESCAPE, FRACTIONS, ZERO, frequencies, parametric_table
from kompakt.coding.rans import decoding_table
from kompakt.coding.tablesets import TableSet
from kompakt.errors import FormatError


@dataclass(frozen=True)
class Member:
    """A coded member: its layout and its model, factors and weights filled in."""

    layout: Layout
    model: Coded


@dataclass(frozen=True)
class Tables:
    """The tables of a block's values: one parametric shape and the stored sets.

    Args:
        shape: index of the shape.
        sets: the stored sets.
        bits: table bits.
    """

    shape: int
    sets: tuple[TableSet, ...]
    bits: int

    def placed(self, index: int) -> TableSet:
        """A set whose contexts are numbered among those of all sets."""
        before = sum(len(found.frequencies) for found in self.sets[:index])
        return replace(self.sets[index], first=before)

    def frequencies(self, stored: bool) -> np.ndarray:
        """Frequencies [contexts · 256] of the stored or of the parametric tables."""
        if not stored:
            return frequencies(self.shape, self.bits).reshape(-1)
        return np.concatenate([found.frequencies for found in self.sets]).reshape(-1)

    def decoding(self, stored: bool) -> np.ndarray:
        """The decoding table of all stored or of all parametric contexts."""
        if not stored:
            return parametric_table(self.shape, self.bits)
        return np.concatenate([decoding_table(found.frequencies) for found in self.sets])


class Bundle:
    """Members with equal taps and tables, as arrays [K, N] over all their kernels.

    Args:
        members: the members, with their indices.
        tables: the numbering of contexts.
        unit: what a context is multiplied by: M to look up slots, 256 to look up symbols.
    """

    def __init__(self, members: list[tuple[int, Member]], tables: Tables, unit: int) -> None:
        models = [member.model for _, member in members]
        layouts = [member.layout for _, member in members]
        self.taps = layouts[0].taps
        self.stored = models[0].stored
        self._set = tables.placed(models[0].index) if self.stored else None
        self._unit = np.array(unit)
        ends = np.cumsum([0, *(layout.kernels for layout in layouts)]).tolist()
        slices = [slice(a, b) for a, b in pairwise(ends)]
        self.size = ends[-1]
        self.parts = [(index, part) for (index, _), part in zip(members, slices, strict=True)]
        self.values = np.zeros((self.taps, self.size), np.float32)
        self._weights = [(part, m.weights) for part, m in zip(slices, models, strict=True) if m.weights is not None]
        self._rows = [(part, tap_weights(weights, self.taps)) for part, weights in self._weights]
        self._factors = [(p, m.scales.taps) for p, m in zip(slices, models, strict=True) if m.scales.taps is not None]
        self._classes = np.concatenate([m.scales.kernel_classes(x) for m, x in zip(models, layouts, strict=True)])
        if not self._factors:
            self._classes = bounded(self._classes)
        self._near: np.ndarray | int = 0
        self._sign: np.ndarray | int = 1

    def contexts(self, tap: int, start: int, end: int) -> np.ndarray:
        """The context of values ``start`` … ``end`` of a tap times the unit, int64; earlier taps are filled."""
        predicted = self._predict(tap, start, end)
        classes = self._tap_classes(tap, start, end)
        if self._set is None:
            self._near, fraction = (0, FRACTIONS // 2) if predicted is None else split_fraction(predicted)
            return np.multiply(classes * np.int32(FRACTIONS) + fraction, self._unit, dtype=np.int64)
        self._sign = 1 if predicted is None else np.where(predicted < 0, -1, 1)
        return np.multiply(self._set.contexts(classes, predicted), self._unit, dtype=np.int64)

    def symbols(self, tap: int, start: int, end: int) -> np.ndarray:
        """The symbols of values whose contexts were just asked for; the escape where they are out of range."""
        values = self.values[tap, start:end].astype(np.int32)
        found = (values * self._sign if self.stored else values - self._near) + ZERO
        return np.where((found < 0) | (found > ESCAPE), ESCAPE, found)

    def fill(self, tap: int, start: int, found: np.ndarray, escapes: np.ndarray) -> None:
        """Store values of a tap from ``start`` on, given their symbols and the values of the escapes."""
        values = found.astype(np.int32) - ZERO
        values = values * self._sign if self.stored else values + self._near
        if escapes.size:
            values[found == ESCAPE] = escapes
        self.values[tap, start : start + found.size] = values

    def check(self) -> None:
        """Check that predictions were exact.

        Raises:
            FormatError: they were not, so another machine would read something else.
        """
        for part, weights in self._weights:
            if not is_exact(self.values[:, part], weights):
                raise FormatError("coded section: values too large for an exact prediction; the file is corrupt")

    def _tap_classes(self, tap: int, start: int, end: int) -> np.ndarray:
        classes = self._classes[start:end]
        if not self._factors:
            return classes
        classes = classes.copy()
        for part, factors in self._factors:
            classes[max(0, part.start - start) : max(0, part.stop - start)] += factors[tap]
        return bounded(classes)

    def _predict(self, tap: int, start: int, end: int) -> np.ndarray | None:
        if tap == 0 or not self._rows:
            return None
        products = np.zeros(end - start, np.float32)
        for part, weights in self._rows:
            a, b, row = max(part.start, start), min(part.stop, end), weights[tap - 1]
            if a < b:
                np.matmul(row, self.values[tap - row.size : tap, a:b], out=products[a - start : b - start])
        return eighths(products)
