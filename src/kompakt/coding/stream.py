"""The coded members of a block, tap by tap: the same contexts for the writer and the reader.

FORMAT.md §6.4 gives the order of the calls. A *bundle* holds the members of one block that have the
same number of taps and the same kind of tables, side by side, so that each tap is one array operation.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from kompakt.coding.header import Coded
from kompakt.coding.kernels import Layout, bounded, eighths, is_exact, split_fraction, tap_weights
from kompakt.coding.models import ESCAPE, FRACTIONS, SYMBOLS, ZERO, frequencies, parametric_table
from kompakt.coding.rans import Call, Reader, decoding_table, symbol_of
from kompakt.coding.tablesets import TableSet
from kompakt.errors import FormatError


@dataclass(frozen=True)
class Member:
    """A coded member: its layout and its model, factors and weights filled in."""

    layout: Layout
    model: Coded


class Bundle:
    """Members with equal taps and tables, as arrays [K, N] over all their kernels.

    Args:
        members: the members, with their indices.
        tables: the numbering of contexts.
        unit: what a context is multiplied by: M to look up slots, 256 to look up symbols.
    """

    def __init__(self, members: list[tuple[int, Member]], tables: "Tables", unit: int) -> None:
        models = [member.model for _, member in members]
        layouts = [member.layout for _, member in members]
        self.taps = layouts[0].taps
        self.stored = models[0].stored
        self._set = tables.placed(models[0].index) if self.stored else None
        self._unit = np.array(unit)
        ends = np.cumsum([0, *(layout.kernels for layout in layouts)]).tolist()
        slices = [slice(a, b) for a, b in pairwise(ends)]
        self.parts = [(index, part) for (index, _), part in zip(members, slices, strict=True)]
        self.values = np.zeros((self.taps, ends[-1]), np.float32)
        self._products = np.zeros(ends[-1], np.float32)
        self._weights = [(part, m.weights) for part, m in zip(slices, models, strict=True) if m.weights is not None]
        self._rows = [(part, tap_weights(weights, self.taps)) for part, weights in self._weights]
        self._factors = [(p, m.scales.taps) for p, m in zip(slices, models, strict=True) if m.scales.taps is not None]
        self._classes = np.concatenate([m.scales.kernel_classes(x) for m, x in zip(models, layouts, strict=True)])
        self._near: np.ndarray | int = 0
        self._sign: np.ndarray | int = 1

    def contexts(self, tap: int) -> np.ndarray:
        """The context of each value of a tap times the unit, int64 [N]; earlier taps are filled."""
        predicted = self._predict(tap)
        classes = self._classes
        if self._factors:
            classes = classes.copy()
            for part, factors in self._factors:
                classes[part] += factors[tap]
        classes = bounded(classes)
        if self._set is None:
            self._near, fraction = (0, FRACTIONS // 2) if predicted is None else split_fraction(predicted)
            return np.multiply(classes * np.int32(FRACTIONS) + fraction, self._unit, dtype=np.int64)
        self._sign = 1 if predicted is None else np.where(predicted < 0, -1, 1)
        return np.multiply(self._set.contexts(classes, predicted), self._unit, dtype=np.int64)

    def symbols(self, tap: int) -> np.ndarray:
        """The symbols of a tap whose contexts were just asked for; the escape where they are out of range."""
        values = self.values[tap].astype(np.int32)
        found = (values * self._sign if self.stored else values - self._near) + ZERO
        return np.where((found < 0) | (found > ESCAPE), ESCAPE, found)

    def fill(self, tap: int, found: np.ndarray, escapes: np.ndarray) -> None:
        """Store the values of a tap, given its symbols and the values of its escapes."""
        values = found.astype(np.int32) - ZERO
        values = values * self._sign if self.stored else values + self._near
        if escapes.size:
            values[found == ESCAPE] = escapes
        self.values[tap] = values

    def check(self) -> None:
        """Check that predictions were exact.

        Raises:
            FormatError: they were not, so another machine would read something else.
        """
        for part, weights in self._weights:
            if not is_exact(self.values[:, part], weights):
                raise FormatError("coded section: values too large for an exact prediction; the file is corrupt")

    def _predict(self, tap: int) -> np.ndarray | None:
        if tap == 0 or not self._rows:
            return None
        products = self._products
        for part, weights in self._rows:
            row = weights[tap - 1]
            np.matmul(row, self.values[tap - row.size : tap, part], out=products[part])
        return eighths(products)


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


def make_bundles(members: list[Member], tables: Tables, unit: int) -> list[Bundle]:
    """Group members by kind of tables, taps and set, in the order of the format."""
    groups: dict[tuple[bool, int, int], list[tuple[int, Member]]] = {}
    for index, member in enumerate(members):
        model = member.model
        groups.setdefault((model.stored, member.layout.taps, model.index), []).append((index, member))
    return [Bundle(groups[key], tables, unit) for key in sorted(groups)]


def calls_of(bundles: list[Bundle]) -> list[tuple[int, bool, list[Bundle]]]:
    """The calls of a block: tap, whether its tables are stored, the bundles that take part."""
    taps = range(max((bundle.taps for bundle in bundles), default=0))
    found = [
        (tap, stored, [bundle for bundle in bundles if bundle.stored == stored and bundle.taps > tap])
        for tap in taps
        for stored in (False, True)
    ]
    return [call for call in found if call[2]]


def encode_values(bundles: list[Bundle], tables: Tables) -> tuple[list[Call], np.ndarray]:
    """The calls that code filled bundles, and the escaped values."""
    frequency, start = {}, {}
    for stored in {bundle.stored for bundle in bundles}:
        frequency[stored] = tables.frequencies(stored)
        rows = frequency[stored].reshape(-1, SYMBOLS)
        start[stored] = (np.cumsum(rows, axis=1) - rows).reshape(-1)
    calls, escapes = [], [np.zeros(0, np.int32)]
    for tap, stored, live in calls_of(bundles):
        cells = np.concatenate([bundle.contexts(tap) for bundle in live])
        symbols = np.concatenate([bundle.symbols(tap) for bundle in live])
        symbols = np.where(frequency[stored][cells + symbols] == 0, ESCAPE, symbols)
        values = np.concatenate([bundle.values[tap] for bundle in live])
        escapes.append(values[symbols == ESCAPE].astype(np.int32))
        calls.append(Call(frequency[stored][cells + symbols], start[stored][cells + symbols]))
    return calls, np.concatenate(escapes)


def decode_values(bundles: list[Bundle], tables: Tables, reader: Reader, escapes: np.ndarray) -> None:
    """Fill the bundles.

    Raises:
        FormatError: the stream or the escapes do not fit.
    """
    decoding = {stored: tables.decoding(stored) for stored in {bundle.stored for bundle in bundles}}
    at = 0
    for tap, stored, live in calls_of(bundles):
        contexts = [bundle.contexts(tap) for bundle in live]
        found = symbol_of(reader.read(np.concatenate(contexts) if len(live) > 1 else contexts[0], decoding[stored]))
        start = 0
        for bundle in live:
            part = found[start : start + bundle.values.shape[1]]
            count = int(np.count_nonzero(part == ESCAPE))
            bundle.fill(tap, part, _next(escapes, at, count))
            start, at = start + part.size, at + count
    if at != escapes.size:
        raise FormatError("coded section: values are left over beside it; the file is corrupt")
    for bundle in bundles:
        bundle.check()


def _next(escapes: np.ndarray, at: int, count: int) -> np.ndarray:
    if at + count > escapes.size:
        raise FormatError("coded section: a value outside its table is missing; the file is corrupt")
    return escapes[at : at + count]
