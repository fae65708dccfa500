"""The header of a block: how each member is coded. FORMAT.md §4 is the specification."""

from dataclasses import dataclass

import numpy as np

from kompakt.coding.bitpack import pack, packed_size, unpack
from kompakt.coding.huffman import MOST_SYMBOLS, check_lengths
from kompakt.coding.kernels import Scales
from kompakt.coding.models import CLASSES
from kompakt.coding.wire import Cursor, varint, zigzag
from kompakt.errors import FormatError

CONSTANT, PACKED, HUFFMAN, PARAMETRIC, TABLE = range(5)
PREDICTED, ROWS, COLUMNS, TAPS, FLAT, GROUPED, SPARSE = 1, 2, 4, 8, 16, 32, 64
MOST_SHIFT = 24
MOST_VALUE = 2**33
LENGTH_BITS = 4


@dataclass(frozen=True)
class Constant:
    """Every value is ``value``."""

    value: int


@dataclass(frozen=True)
class Packed:
    """``bits`` bits a value, above ``least``."""

    least: int
    bits: int


@dataclass(frozen=True)
class Huffman:
    """A canonical code over ``least`` … ``least + len(lengths) − 1``; ``size_bytes`` of stream."""

    least: int
    lengths: np.ndarray
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A member of the coded section.

    Args:
        stored: whether its tables are stored (mode 4) or parametric (mode 3).
        center: subtracted first.
        shift: low bits that are stored raw.
        flat: whether the geometry is dropped.
        grouped: whether neighbouring inputs are taken as taps.
        scales: factors; while a header is read, empty arrays stand for factors that follow.
        weights: prediction weights [rows, 9]; an empty array while a header is read.
        index: the table set, 0 for a parametric member.
        heads: the table set of the first nonzero taps of kernels, for sparse members.
    """

    stored: bool
    center: int
    shift: int
    flat: bool
    scales: Scales
    weights: np.ndarray | None
    index: int
    grouped: bool = False
    heads: int | None = None


Entry = Constant | Packed | Huffman | Coded


def write_entry(entry: Entry) -> bytes:
    """The mode byte and parameters of a member."""
    if isinstance(entry, Constant):
        return bytes([CONSTANT]) + zigzag(entry.value)
    if isinstance(entry, Packed):
        return bytes([PACKED]) + zigzag(entry.least) + bytes([entry.bits])
    if isinstance(entry, Huffman):
        head = zigzag(entry.least) + varint(len(entry.lengths))
        return bytes([HUFFMAN]) + head + pack(entry.lengths, LENGTH_BITS) + varint(entry.size_bytes)
    present = (entry.weights, entry.scales.rows, entry.scales.columns, entry.scales.taps)
    flags = sum(1 << place for place, part in enumerate(present) if part is not None)
    flags += FLAT * entry.flat + GROUPED * entry.grouped + SPARSE * (entry.heads is not None)
    heads = [] if entry.heads is None else [entry.heads]
    mode = TABLE if entry.stored else PARAMETRIC
    sets = ([entry.index] if entry.stored else []) + heads
    return bytes([mode]) + zigzag(entry.center) + bytes([flags, entry.scales.base, entry.shift, *sets])


def read_entry(cursor: Cursor) -> Entry:
    """Read a member's mode and parameters.

    Raises:
        FormatError: an unknown mode, or a parameter out of its range.
    """
    mode = cursor.u8(TABLE, "the mode of a member")
    value = cursor.zigzag(MOST_VALUE, "a value")
    if mode == CONSTANT:
        return Constant(value)
    if mode == PACKED:
        return Packed(value, cursor.u8(32, "the width of packed values"))
    if mode == HUFFMAN:
        return _read_huffman(cursor, value)
    flags = cursor.u8(2 * SPARSE - 1, "the flags of a member")
    if (flags & FLAT and flags != FLAT) or (flags & SPARSE and mode == PARAMETRIC):
        raise FormatError(f"{cursor.where}: flags {flags} of a member contradict each other; the file is corrupt")
    base = cursor.u8(CLASSES - 1, "the base class")
    shift = cursor.u8(MOST_SHIFT, "the shift")
    empty = np.zeros(0, np.int64)
    return Coded(
        stored=mode == TABLE,
        center=value,
        shift=shift,
        flat=bool(flags & FLAT),
        scales=Scales(
            base=base,
            rows=empty if flags & ROWS else None,
            columns=empty if flags & COLUMNS else None,
            taps=empty if flags & TAPS else None,
        ),
        weights=empty if flags & PREDICTED else None,
        index=cursor.u8() if mode == TABLE else 0,
        grouped=bool(flags & GROUPED),
        heads=cursor.u8() if flags & SPARSE else None,
    )


def _read_huffman(cursor: Cursor, least: int) -> Huffman:
    count = cursor.varint(MOST_SYMBOLS, "the number of symbols")
    lengths = unpack(cursor.take(packed_size(count, LENGTH_BITS)), LENGTH_BITS, count)
    check_lengths(lengths)
    return Huffman(least, lengths, cursor.varint(cursor.data.nbytes * 2**16, "the length of a stream"))
