"""Decoding a coded section by the loops of ``kompakt.coding.loops``, compiled by numba.

``kompakt.coding.section`` has the same in numpy, which is the reference; it takes this where numba is installed.
Importing this module compiles, or loads what an earlier process compiled.
"""

from functools import lru_cache

import numpy as np

from kompakt.coding import chunks, loops, pops
from kompakt.coding.bundle import Member, Tables, inexact
from kompakt.coding.kernels import Plane
from kompakt.coding.loops import FIELDS, Planes
from kompakt.coding.models import SHAPES, frequencies
from kompakt.coding.pops import Stream, walk
from kompakt.coding.rans import Reader, used_up
from kompakt.coding.sides import check_side, side_values
from kompakt.coding.stream import check_escapes, late_head

__all__ = ["decode", "to_rows", "walk"]
NONE = -1


def decode(
    members: list[Member],
    tables: Tables,
    histograms: tuple[np.ndarray | None, np.ndarray | None],
    reader: Reader,
    escapes: np.ndarray,
) -> list[Plane] | None:
    """As ``section.decode_plainly``; None where values are too large for these loops.

    What the loops find to be damaged is an error; ``reader`` is of no use after None or an error.
    """
    if escapes.size and int(np.abs(escapes).max()) >= loops.NARROW:
        return None
    stream = Stream(reader.bits, reader.states.view(np.uint64), reader.words, np.zeros(3, np.int64))
    plan = _Plan(members, tables)
    sides = [_read_side(stream, *side) for side in zip(plan.counts, histograms, strict=True)]
    planes = plan.planes(np.concatenate(sides), tables, escapes)
    status = loops.read_planes(stream, planes)
    if status == loops.WIDE:
        return None
    _check(status, int(stream.places[2]), escapes.size)
    reader.at = int(stream.places[0])
    return plan.results(planes)


def to_rows(plane: Plane, offset: int, dtype: np.dtype) -> np.ndarray:
    """A plane [taps, kernels] and an offset as bytes [kernels · taps]."""
    found = np.empty(plane.values.size, dtype)
    loops.to_bytes(plane.values.reshape(-1), len(plane.values), offset, found.view(np.int8))
    return found


class _Plan:
    """Where everything of the members stands, and in which order they are read."""

    def __init__(self, members: list[Member], tables: Tables) -> None:
        self.counts = _side_counts(members)
        factors, weights = 0, self.counts[0]
        self._values = self._classes = self._heads = 0
        rows = []
        for member in members:
            row = self._row(member, tables, factors, weights)
            rows.append(row)
            counts = member.factor_counts
            factors, weights = factors + sum(counts), weights + member.weight_count
        self._order = sorted(range(len(members)), key=lambda place: _order(members[place]))
        self._parts = np.array([rows[place] for place in self._order], np.int64).reshape(-1, FIELDS)
        self._stored = any(member.model.stored for member in members)
        self._parametric = not all(member.model.stored for member in members)

    def planes(self, sides: np.ndarray, tables: Tables, escapes: np.ndarray) -> Planes:
        """The arrays of the loops, nothing read yet."""
        ends = np.empty((len(self._parts), 2), np.int64)
        ends[:, 0], ends[:, 1] = loops.NARROW, -loops.NARROW
        none = np.zeros(0, np.uint32)
        return Planes(
            parts=self._parts,
            sides=sides,
            cuts=_cuts(tables),
            parametric=_parametric(tables.shape, tables.bits) if self._parametric else none,
            stored=pops.make_table(tables.rows, tables.bits) if self._stored else none,
            escapes=np.ascontiguousarray(escapes, np.int32),
            values=np.empty(self._values, np.int16),
            classes=np.empty(self._classes, np.int16),
            heads=np.empty(self._heads, np.uint8),
            ends=ends,
        )

    def results(self, planes: Planes) -> list[Plane]:
        """What was read, in the order of the members."""
        found: list[Plane] = [Plane(np.zeros((1, 0), np.int16))] * len(self._order)
        for place, row, (least, most) in zip(self._order, self._parts.tolist(), planes.ends.tolist(), strict=True):
            begin, kernels, taps = row[loops.VALUES], row[loops.KERNELS], row[loops.TAPS]
            values = planes.values[begin : begin + kernels * taps].reshape(taps, kernels)
            found[place] = Plane(values, least, most) if kernels else Plane(values)
        return found

    def _row(self, member: Member, tables: Tables, factors: int, weights: int) -> list[int]:
        """A row of ``Planes.parts``."""
        layout, model = member.layout, member.model
        places, at = [], factors
        for count in member.factor_counts:
            places.append(at if count else NONE)
            at += count
        begin, classes, heads = self._values, self._classes, self._heads
        sparse = model.heads is not None
        self._values += layout.kernels * layout.taps
        self._classes += layout.kernels
        self._heads += layout.kernels * sparse
        row = [layout.kernels, layout.inputs, layout.taps, model.stored, model.scales.base, *places]
        row += [weights if model.weights is not None else NONE, model.index]
        row += [
            tables.placed(model.index).head_context if sparse else NONE,
            NONE if model.heads is None else model.heads,
        ]
        return [*row, begin, classes, heads if sparse else NONE, 0, 0]


def _order(member: Member) -> tuple[bool, int, int, int]:
    """What members are sorted by within a call; tables are in calls of their own."""
    model = member.model
    return (model.stored, member.layout.taps, model.index, NONE if model.heads is None else model.heads)


def _side_counts(members: list[Member]) -> tuple[int, int]:
    """The number of all factors and of all weights."""
    return sum(sum(member.factor_counts) for member in members), sum(member.weight_count for member in members)


def _read_side(stream: Stream, count: int, histogram: np.ndarray | None) -> np.ndarray:
    """The call of all factors or of all weights."""
    if count == 0:
        return np.zeros(0, np.int32)
    check_side(count, histogram)
    assert histogram is not None
    found = np.empty(count, np.uint8)
    if not pops.read_row(stream, pops.make_table(histogram[None], stream.bits), found):
        raise used_up()
    return side_values(found)


def _check(status: int, used: int, escapes: int) -> None:
    if status == loops.USED_UP:
        raise used_up()
    if status == loops.LATE_HEAD:
        raise late_head()
    if status == loops.INEXACT:
        raise inexact()
    check_escapes(used, escapes)


def _cuts(tables: Tables) -> np.ndarray:
    """For each set the number of its first context, how many thresholds of each kind it has, and these."""
    found, first = np.zeros((len(tables.sets), chunks.CUTS), np.int64), 0
    for row, one in zip(found, tables.sets, strict=True):
        thresholds = (*one.classes, *one.bins)
        row[: chunks.THRESHOLDS] = first, len(one.classes), len(one.bins)
        row[chunks.THRESHOLDS : chunks.THRESHOLDS + len(thresholds)] = thresholds
        first += len(one.frequencies)
    return found


@lru_cache(maxsize=SHAPES)
def _parametric(shape: int, bits: int) -> np.ndarray:
    """The table of a shape."""
    return pops.make_table(frequencies(shape, bits), bits)
