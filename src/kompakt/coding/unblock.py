"""Reading a block back into integer arrays; every length is checked before it allocates.

FORMAT.md §4 is the specification; ``kompakt.coding.block`` writes blocks.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from kompakt.coding import huffman
from kompakt.coding.bitpack import packed_size, unpack
from kompakt.coding.bundle import Member, Tables
from kompakt.coding.header import Coded, Constant, Entry, Huffman, Packed, read_entry
from kompakt.coding.kernels import Plane, from_taps
from kompakt.coding.models import SHAPES, read_histogram
from kompakt.coding.section import compiled_loops, decode_section
from kompakt.coding.tablesets import TableSet, read_set
from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError

MOST_MEMBER = 2**21
MOST_BLOCK = 9 * 2**21
MOST_MEMBERS = 2**16
TABLE_BITS = (10, 12)
MOST_MAGNITUDE = 2**20


@dataclass(frozen=True)
class Spec:
    """What a block does not say about a member: its shape and dtype, and whether it is flat."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class _Tables:
    bits: int
    shape: int
    factors: np.ndarray | None
    weights: np.ndarray | None
    sets: tuple[TableSet, ...]
    escapes: np.ndarray


def decode_block(data: bytes | memoryview, specs: list[Spec], where: str = "a block") -> list[np.ndarray]:
    """Decode the members of a block.

    Args:
        data: the block.
        specs: shape and dtype of each member, in order.
        where: what the block is, for messages.

    Raises:
        FormatError: the block is not one, or does not fit the specs.
    """
    if max((spec.size for spec in specs), default=0) > MOST_MEMBER or sum(spec.size for spec in specs) > MOST_BLOCK:
        raise FormatError(f"{where}: more values than a block may hold; the file is corrupt")
    cursor = Cursor(data, where)
    head = Cursor(cursor.take(cursor.varint(cursor.left, "the length of the header")), where)
    count = head.varint(MOST_MEMBERS, "the number of members")
    if count != len(specs):
        raise FormatError(f"{where}: {count} members, {len(specs)} expected; the file is corrupt")
    entries = [read_entry(head) for _ in range(count)]
    coded = [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, Coded)]
    high: dict[int, Plane] = {}
    carried = b""
    if coded:
        tables = _read_tables(head, [entry for _, entry in coded])
        high, carried = _decode_coded(cursor, coded, specs, tables)
    head.end()
    streams = {i: cursor.take(e.size_bytes) for i, e in enumerate(entries) if isinstance(e, Huffman)}
    raw = _raw_section(cursor, entries, specs, carried)
    return [_restore(i, entry, specs[i], high.get(i), streams.get(i), raw) for i, entry in enumerate(entries)]


def _read_tables(head: Cursor, coded: list[Coded]) -> _Tables:
    bits = head.u8(TABLE_BITS[-1], "the table bits")
    if bits not in TABLE_BITS:
        raise FormatError(f"{head.where}: tables of {bits} bits, 10 or 12 expected; the file is corrupt")
    shape = head.u8(SHAPES - 1, "the shape")
    scales = [entry.scales for entry in coded]
    has_factors = any(part is not None for s in scales for part in (s.rows, s.columns, s.taps))
    factors = read_histogram(head, bits) if has_factors else None
    weights = read_histogram(head, bits) if any(entry.weights is not None for entry in coded) else None
    sets = tuple(read_set(head, bits) for _ in range(head.u8()))
    for entry in coded:
        _check_sets(entry, sets, head.where)
    return _Tables(bits, shape, factors, weights, sets, _read_escapes(head))


def _check_sets(entry: Coded, sets: tuple[TableSet, ...], where: str) -> None:
    """Check that a member's sets exist, and that a sparse one's has a table for heads."""
    used = max(entry.index if entry.stored else -1, -1 if entry.heads is None else entry.heads)
    if used >= len(sets):
        raise FormatError(f"{where}: table set {used} of {len(sets)}; the file is corrupt")
    if entry.heads is not None and not sets[entry.index].heads:
        raise FormatError(f"{where}: a sparse member without a table for heads; the file is corrupt")


def _read_escapes(head: Cursor) -> np.ndarray:
    width = head.u8(4, "the width of escapes")
    count = head.varint(head.left // width, "the number of escapes") if width else 0
    raw = np.zeros((count, 4), np.uint8)
    raw[:, 4 - width :] = np.frombuffer(head.take(count * width), np.uint8).reshape(count, width)
    escapes = raw.view("<i4").reshape(-1) >> 8 * (4 - width) if width else np.zeros(0, np.int32)
    if escapes.size and int(np.abs(escapes.astype(np.int64)).max()) >= MOST_MAGNITUDE:
        raise FormatError(f"{head.where}: an escaped value is out of range; the file is corrupt")
    return escapes


def _decode_coded(
    cursor: Cursor, coded: list[tuple[int, Coded]], specs: list[Spec], tables: _Tables
) -> tuple[dict[int, Plane], bytes]:
    """The modelled values of each coded member, and the bytes that the stream carries."""
    members = [Member.of(entry, specs[index].shape) for index, entry in coded]
    space = Tables(tables.shape, tables.sets, tables.bits)
    found, carried = decode_section(cursor, members, space, (tables.factors, tables.weights), tables.escapes)
    return {index: plane for (index, _), plane in zip(coded, found, strict=True)}, carried


def _raw_section(cursor: Cursor, entries: list[Entry], specs: list[Spec], carried: bytes) -> Cursor:
    """The raw section, its hidden beginning put back."""
    total = sum(_raw_size(entry, spec) for entry, spec in zip(entries, specs, strict=True))
    hidden = min(total, len(carried))
    if cursor.left != total - hidden or any(carried[hidden:]):
        raise FormatError(f"{cursor.where}: raw bytes do not fill their place; the file is cut or corrupt")
    return Cursor(carried[:hidden] + bytes(cursor.take(cursor.left)), cursor.where)


def _raw_size(entry: Entry, spec: Spec) -> int:
    if isinstance(entry, Packed):
        return packed_size(spec.size, entry.bits)
    return packed_size(spec.size, entry.shift) if isinstance(entry, Coded) else 0


def _restore(
    index: int, entry: Entry, spec: Spec, high: Plane | None, stream: memoryview | None, raw: Cursor
) -> np.ndarray:
    """The array of one member; takes its part of the raw section."""
    if isinstance(entry, Constant):
        _check_range(entry.value, entry.value, spec, raw.where)
        return np.full(spec.shape, entry.value, spec.dtype)
    if isinstance(entry, Packed):
        values = unpack(raw.take(_raw_size(entry, spec)), entry.bits, spec.size)
        return _shifted(values, entry.least, spec, raw.where)
    if isinstance(entry, Huffman):
        assert stream is not None
        loops = compiled_loops()
        symbols = huffman.decode(stream, entry.lengths, spec.size, None if loops is None else loops.walk)
        return _shifted(symbols, entry.least, spec, raw.where)
    assert high is not None
    low = unpack(raw.take(_raw_size(entry, spec)), entry.shift, spec.size) if entry.shift else None
    return _unmodel(high, low, entry, spec, raw.where)


def _unmodel(high: Plane, low: np.ndarray | None, entry: Coded, spec: Spec, where: str) -> np.ndarray:
    """A coded member from its modelled values and its low bits."""
    loops = compiled_loops()
    if low is None:
        _check_range(high.least + entry.center, high.most + entry.center, spec, where)
        if loops is not None and high.values.dtype == np.int16 and spec.dtype.itemsize == 1:
            return loops.to_rows(high, entry.center, spec.dtype).reshape(spec.shape)
        if entry.center == 0:
            return from_taps(high.values, spec.shape, spec.dtype)
    wide = np.int64 if entry.shift > 8 or abs(entry.center) > 2**24 else np.int32
    values = from_taps(high.values, spec.shape, np.dtype(wide))
    if low is not None:
        values <<= entry.shift
        values += low.reshape(spec.shape)
    return _shifted(values, entry.center - (1 << entry.shift >> 1), spec, where)


def _shifted(values: np.ndarray, offset: int, spec: Spec, where: str) -> np.ndarray:
    """``values + offset`` in the member's dtype, checked against it."""
    if values.size:
        _check_range(int(values.min()) + offset, int(values.max()) + offset, spec, where)
    if offset == 0:
        return values.astype(spec.dtype, copy=False).reshape(spec.shape)
    narrow = spec.dtype.itemsize < 4 and abs(offset) < 2**30 and values.dtype.itemsize <= 4
    wide = values.astype(np.int32 if narrow else np.int64)
    wide = wide + offset
    return wide.astype(spec.dtype).reshape(spec.shape)


def _check_range(least: int, most: int, spec: Spec, where: str) -> None:
    limits = np.iinfo(spec.dtype)
    if spec.size and not limits.min <= least <= most <= limits.max:
        raise FormatError(f"{where}: values {least}…{most} do not fit {spec.dtype}; the file is corrupt")
