"""Coded members side by side, and the context of each of their values. FORMAT.md §6 is the specification."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from kompakt.coding.header import Coded
from kompakt.coding.kernels import (
    Layout,
    bounded,
    eighths,
    is_exact,
    layout_of,
    reach,
    split_fraction,
    tap_weights,
    weight_rows,
)
from kompakt.coding.models import ESCAPE, FRACTIONS, ZERO, frequencies, parametric_table
from kompakt.coding.rans import decoding_table
from kompakt.coding.tablesets import TableSet
from kompakt.errors import FormatError


@dataclass(frozen=True)
class Member:
    """A coded member: its layout and its model, factors and weights filled in."""

    layout: Layout
    model: Coded

    @staticmethod
    def of(model: Coded, shape: tuple[int, ...]) -> "Member":
        """A member of this shape under a model."""
        return Member(layout_of(shape, flat=model.flat, grouped=model.grouped), model)

    @property
    def factor_counts(self) -> tuple[int, int, int]:
        """How many factors of rows, columns and taps it has."""
        scales, layout = self.model.scales, self.layout
        return (
            layout.outputs if scales.rows is not None else 0,
            layout.inputs if scales.columns is not None else 0,
            layout.taps if scales.taps is not None else 0,
        )

    @property
    def weight_count(self) -> int:
        """How many prediction weights it has."""
        return sum(weight_rows(self.layout.taps)) if self.model.weights is not None else 0


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

    @property
    def rows(self) -> np.ndarray:
        """Frequencies [contexts, 256] of the stored tables."""
        return np.concatenate([found.frequencies for found in self.sets])

    def frequencies(self, stored: bool) -> np.ndarray:
        """Frequencies [contexts · 256] of the stored or of the parametric tables."""
        if not stored:
            return frequencies(self.shape, self.bits).reshape(-1)
        return self.rows.reshape(-1)

    def decoding(self, stored: bool) -> np.ndarray:
        """The decoding table of all stored or of all parametric contexts."""
        return self._stored if stored else parametric_table(self.shape, self.bits)

    @cached_property
    def _stored(self) -> np.ndarray:
        return np.concatenate([decoding_table(found.frequencies) for found in self.sets])


class Bundle:
    """Members with equal taps and tables, as arrays [K, N] over all their kernels.

    In a sparse bundle the first nonzero tap of each kernel, its *head*, is known before its values: taps
    before the head are zero and have no symbol.

    Args:
        members: the members, with their indices.
        tables: the numbering of contexts.
        unit: what a context is multiplied by: M to look up slots, 256 to look up symbols.
    """

    def __init__(self, members: list[tuple[int, Member]], tables: Tables, unit: int) -> None:
        self._models = models = [member.model for _, member in members]
        layouts = [member.layout for _, member in members]
        self.taps = layouts[0].taps
        self.stored = models[0].stored
        self.sparse = models[0].heads is not None
        self._set = tables.placed(models[0].index) if self.stored else None
        self._head_set = tables.placed(models[0].heads) if models[0].heads is not None else None
        self._unit = np.array(unit)
        ends = np.cumsum([0, *(layout.kernels for layout in layouts)]).tolist()
        slices = [slice(a, b) for a, b in pairwise(ends)]
        self.size = ends[-1]
        self.parts = [(index, part) for (index, _), part in zip(members, slices, strict=True)]
        self.values = np.zeros((self.taps, self.size), np.float32)
        self.heads = np.full(self.size, self.taps if self.sparse else 0, np.uint8)
        self._weights = [(part, m.weights) for part, m in zip(slices, models, strict=True) if m.weights is not None]
        self._reach = reach(np.concatenate([weights for _, weights in self._weights])) if self._weights else 0
        self._factors = [(p, m.scales.taps) for p, m in zip(slices, models, strict=True) if m.scales.taps is not None]
        self._classes = np.concatenate([m.scales.kernel_classes(x) for m, x in zip(models, layouts, strict=True)])
        self._active: np.ndarray | None = None
        self._near: np.ndarray | int = 0
        self._sign: np.ndarray | int = 1

    def begin(self, tap: int) -> int:
        """Turn to a tap; return how many of its values have a symbol."""
        self._active = np.flatnonzero(self.heads <= tap) if self.sparse else None
        return self.size if self._active is None else self._active.size

    def head_contexts(self) -> np.ndarray:
        """The context of each kernel's head times the unit, int64 [N]."""
        assert self._head_set is not None
        return np.multiply(self._head_set.contexts(bounded(self._classes), None), self._unit, dtype=np.int64)

    def contexts(self, tap: int, start: int, end: int) -> np.ndarray:
        """The context of the ``start``-th … ``end``-th value of a tap times the unit, int64."""
        places = slice(start, end) if self._active is None else self._active[start:end]
        predicted = self._predict(tap, places)
        classes = self._tap_classes(tap, places)
        if self._set is None:
            self._near, fraction = (0, FRACTIONS // 2) if predicted is None else split_fraction(predicted)
            return np.multiply(classes * np.int32(FRACTIONS) + fraction, self._unit, dtype=np.int64)
        self._sign = 1 if predicted is None else np.where(predicted < 0, -1, 1)
        found = self._set.contexts(classes, predicted)
        if self.sparse:
            found[self.heads[places] == tap] = self._set.head_context
        return np.multiply(found, self._unit, dtype=np.int64)

    def symbols(self, tap: int) -> np.ndarray:
        """The symbols of a tap whose contexts were just asked for; the escape where they are out of range."""
        values = self.values[tap] if self._active is None else self.values[tap, self._active]
        whole = values.astype(np.int32)
        found = (whole * self._sign if self.stored else whole - self._near) + ZERO
        return np.where((found < 0) | (found > ESCAPE), ESCAPE, found)

    def fill(self, tap: int, start: int, found: np.ndarray, escapes: np.ndarray) -> None:
        """Store values of a tap from the ``start``-th on, given their symbols and the values of the escapes."""
        values = found.astype(np.int32) - ZERO
        values = values * self._sign if self.stored else values + self._near
        if escapes.size:
            values[found == ESCAPE] = escapes
        places = slice(start, start + found.size)
        self.values[tap, places if self._active is None else self._active[places]] = values

    def check(self, tap: int) -> None:
        """Check that predictions from the values of a tap are exact.

        Raises:
            FormatError: they are not, so another machine would read something else.
        """
        row = self.values[tap]
        if not self._weights or is_exact(row, self._reach):
            return
        for part, weights in self._weights:
            if not is_exact(row[part], reach(weights)):
                raise inexact()

    @cached_property
    def _rows(self) -> list[tuple[slice, list[np.ndarray]]]:
        return [(part, tap_weights(weights, self.taps)) for part, weights in self._weights]

    def _tap_classes(self, tap: int, places: slice | np.ndarray) -> np.ndarray:
        classes = self._classes[places]
        if self._factors:
            classes = classes.copy()
            for part, factors in self._factors:
                classes[_inside(part, places)] += factors[tap]
        return bounded(classes)

    def _predict(self, tap: int, places: slice | np.ndarray) -> np.ndarray | None:
        if tap == 0 or not self._weights:
            return None
        count = places.stop - places.start if isinstance(places, slice) else places.size
        products = np.zeros(count, np.float32)
        for part, weights in self._rows:
            row, inside = weights[tap - 1], _inside(part, places)
            if inside.start < inside.stop:
                where = _narrowed(places, inside)
                np.matmul(row, self.values[tap - row.size : tap, where], out=products[inside])
        return eighths(products)


def inexact() -> FormatError:
    """The error of values so large that another machine would predict something else."""
    return FormatError("coded section: values too large for an exact prediction; the file is corrupt")


def _inside(part: slice, places: slice | np.ndarray) -> slice:
    """Which of the ascending ``places`` lie in ``part``."""
    if isinstance(places, slice):
        count = places.stop - places.start
        return slice(min(max(part.start - places.start, 0), count), min(max(part.stop - places.start, 0), count))
    start, stop = np.searchsorted(places, (part.start, part.stop)).tolist()
    return slice(start, stop)


def _narrowed(places: slice | np.ndarray, inside: slice) -> slice | np.ndarray:
    """``places[inside]``, for slices too."""
    if isinstance(places, slice):
        return slice(places.start + inside.start, places.start + inside.stop)
    return places[inside]
