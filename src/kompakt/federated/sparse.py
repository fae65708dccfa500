"""Codes of weights that are mostly zero, as bytes: places by strata of density, then magnitudes and signs.

FORMAT.md §10.1 is the specification.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kompakt.coding.bitpack import pack, packed_size, unpack
from kompakt.coding.models import ESCAPE, SYMBOLS, histogram_codes, histogram_frequencies, read_histogram
from kompakt.coding.models import write_histogram as write_table
from kompakt.coding.rans import Call, Reader, capacity, decoding_table, encode, symbol_of
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError
from kompakt.federated.grid import CLASSES, COLUMNS, ROWS, STRATA, Classes, Grid, classify, live

BITS = 12
MODES, LINES, DENSITIES, GAPS, SIZES = 0, 1, 2, 3, 6
STREAMS = 9
RATIOS = 64
ESCAPE_BITS = 12.0
PRICES = np.append(ESCAPE_BITS + BITS, BITS - np.log2(np.arange(1, (1 << BITS) + 1)))  # by frequency
LANE_SHARE, LANE_BYTES = 0.005, 0.8
MOST_LANES_LOG = 10
MOST_CODE = 2**15 - 1


@dataclass(frozen=True)
class _Stratum:
    """One stratum's filled cells, in order: gaps before each, sizes less one, signs."""

    number: int
    gaps: np.ndarray
    sizes: np.ndarray
    signs: np.ndarray


def write_sparse(grid: Grid, places: np.ndarray, codes: np.ndarray) -> bytes:
    """Code the nonzero codes of all weights.

    Args:
        grid: of the weights.
        places: ascending numbers of the cells.
        codes: none of them zero.
    """
    classes = classify(grid, places)
    sizes = classes.group_sizes(grid)
    numbers = live(sizes)
    of_place = classes.groups(grid, places)
    filled = np.bincount(of_place, minlength=sizes.size)
    stratum = np.full(sizes.size, -1, np.int64)
    used = filled > 0
    stratum[used] = np.minimum(np.log2(sizes[used] // filled[used]).astype(np.int64), STRATA - 1)
    strata = _strata(grid, classes, stratum, places, codes, stratum[of_place])
    streams: list[list[np.ndarray]] = [[] for _ in range(STREAMS)]
    streams[MODES] = [classes.modes]
    streams[LINES] = [
        classes.row[(classes.modes & ROWS).astype(bool)[grid.row_tensor]],
        classes.column[(classes.modes & COLUMNS).astype(bool)[grid.column_tensor]],
    ]
    streams[DENSITIES] = [stratum[numbers] + 1]
    for found in strata:
        streams[GAPS + min(found.number, 2)].append(found.gaps >> shift_of(found.number))
        streams[SIZES + min(found.number, 2)].append(found.sizes)
    raw = b"".join(part for found in strata for part in _raw(found))
    counts = dict.fromkeys(range(STRATA), 0) | {found.number: found.gaps.size for found in strata}
    return _written([np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in streams], counts, raw)


def _strata(
    grid: Grid, classes: Classes, stratum: np.ndarray, places: np.ndarray, codes: np.ndarray, of_place: np.ndarray
) -> list[_Stratum]:
    cells = classes.spread(grid, stratum.astype(np.int8))
    filled = np.zeros(cells.size, bool)
    filled[places] = True
    # Cells and codes, one stratum after another.
    found = np.flatnonzero(filled[np.argsort(cells, kind="stable")])
    sizes = codes[np.argsort(of_place, kind="stable")].astype(np.int64)
    ends = np.cumsum(np.bincount(of_place, minlength=STRATA))
    first = np.cumsum(np.bincount(stratum + 1, classes.group_sizes(grid), STRATA + 1)).astype(np.int64)
    parts = zip(first[:-1].tolist(), np.split(found, ends[:-1]), np.split(sizes, ends[:-1]), strict=True)
    return [
        _Stratum(number, np.diff(ranks, prepend=start - 1) - 1, np.abs(mine) - 1, mine < 0)
        for number, (start, ranks, mine) in enumerate(parts)
        if mine.size
    ]


def shift_of(stratum: int) -> int:
    """How many low bits of a gap are stored as they are: what is left is two to four on average."""
    return max(0, stratum - 1)


def _raw(found: _Stratum) -> tuple[bytes, bytes]:
    shift = shift_of(found.number)
    low = pack(found.gaps & ((1 << shift) - 1), shift) if shift else b""
    return low, pack(found.signs.astype(np.int64), 1)


def _written(streams: list[np.ndarray], counts: dict[int, int], raw: bytes) -> bytes:
    used = sum(1 << number for number, stream in enumerate(streams) if stream.size)
    head = [*(varint(count) for count in counts.values()), used.to_bytes(2, "little")]
    calls, escapes, bits = [], [], 0.0
    for stream in streams:
        if stream.size:
            table, stored = _table(stream)
            head.append(stored)
            symbols = np.minimum(stream, ESCAPE)
            symbols = np.where(table[symbols] == 0, ESCAPE, symbols)
            escapes += stream[symbols == ESCAPE].tolist()
            calls.append(Call(table[symbols], (np.cumsum(table) - table)[symbols]))
            bits += BITS * symbols.size - float(np.log2(calls[-1].frequencies).sum())
    head += [varint(len(escapes)), *(varint(int(value)) for value in escapes)]
    lanes_log = _lanes(bits / 8 + len(raw), len(raw))
    hidden = min(len(raw), capacity(1 << lanes_log, BITS))
    return b"".join([*head, encode(calls, lanes_log, BITS, raw[:hidden]), raw[hidden:]])


def _table(stream: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The table that codes a stream in the fewest bits, and the bytes that store it: geometric, or a histogram."""
    counts = np.bincount(np.minimum(stream, ESCAPE), minlength=SYMBOLS)
    mean = float(counts @ np.arange(SYMBOLS)) / stream.size
    ratio = min(max(round(RATIOS * mean / (1 + mean)), 1), RATIOS - 1)
    first, codes = histogram_codes(counts)
    plain, fitted = geometric(ratio), histogram_frequencies(codes, first, BITS)
    stored = 2 + packed_size(codes.size, 6)
    if _cost(counts, plain) <= _cost(counts, fitted) + 8 * stored:
        return plain, bytes([ratio])
    return fitted, b"\0" + write_table(first, codes)


def _cost(counts: np.ndarray, table: np.ndarray) -> float:
    return float(counts @ PRICES[table]) + int(counts[ESCAPE]) * (ESCAPE_BITS + BITS)


@lru_cache(maxsize=RATIOS)
def geometric(ratio: int) -> np.ndarray:
    """Frequencies of ``(1 − r)·rⁱ`` with r = ratio/64, in integers: the alphabet ends where they fall below one."""
    found, part = np.zeros(SYMBOLS, np.int64), (1 << BITS) * (RATIOS - ratio)
    below = RATIOS
    for symbol in range(ESCAPE):
        if part < below:
            break
        found[symbol] = part // below
        part, below = part * ratio, below * RATIOS
    found[ESCAPE] = 1
    found[0] += (1 << BITS) - int(found.sum())
    return found


def _lanes(size: float, raw: int) -> int:
    found = 0
    while found < MOST_LANES_LOG:
        lanes = 2 << found
        if LANE_BYTES * lanes + max(0, capacity(lanes, BITS) - raw) > LANE_SHARE * size:
            break
        found += 1
    return found


def read_sparse(cursor: Cursor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Read places and codes of what ``write_sparse`` wrote, stratum by stratum; the cursor ends behind it.

    Raises:
        FormatError: it is cut, or does not fit the grid.
    """
    reading = _Reading(cursor, grid)
    modes = reading.stream(MODES, grid.tensors, 3)
    row, column = (np.ones(tensor.size, np.int64) for tensor in (grid.row_tensor, grid.column_tensor))
    classed = [(modes & flag).astype(bool)[tensor]
               for flag, tensor in ((ROWS, grid.row_tensor), (COLUMNS, grid.column_tensor))]  # fmt: skip
    lines = reading.stream(LINES, int(classed[0].sum() + classed[1].sum()), CLASSES - 1)
    row[classed[0]], column[classed[1]] = np.split(lines, [int(classed[0].sum())])
    classes = Classes(modes, row, column)
    sizes = classes.group_sizes(grid)
    stratum = np.full(sizes.size, -1, np.int64)
    numbers = live(sizes)
    stratum[numbers] = reading.stream(DENSITIES, numbers.size, STRATA) - 1
    room = np.bincount(stratum[numbers] + 1, sizes[numbers], STRATA + 1)[1:]
    if any(count > most for count, most in zip(reading.counts, room.tolist(), strict=True)):
        raise FormatError(f"{cursor.where}: more values than cells of their density; the update is refused")
    return reading.values(classes.spread(grid, stratum.astype(np.int8)))


def _read_table(cursor: Cursor) -> np.ndarray:
    ratio = cursor.u8(RATIOS - 1, "the ratio of a table")
    return geometric(ratio) if ratio else read_histogram(cursor, BITS)


class _Reading:
    """The streams of one section, in order."""

    def __init__(self, cursor: Cursor, grid: Grid) -> None:
        self._cursor, self._most = cursor, int(grid.sizes.sum())
        self.counts = [cursor.varint(self._most, "the number of values") for _ in range(STRATA)]
        if sum(self.counts) > self._most:
            raise FormatError(f"{cursor.where}: more values than the base has; the update is refused")
        used = cursor.fixed(2)
        self._tables = {n: decoding_table(_read_table(cursor)[None]) for n in range(STREAMS) if used >> n & 1}
        many = cursor.varint(cursor.left, "the number of escapes")
        self._escapes = np.array([cursor.varint(2**21, "an escape") for _ in range(many)], np.int64)
        self._reader = Reader(cursor, BITS)

    def _of(self, kind: int) -> list[int]:
        """How many values each stratum has of those that share tables."""
        return self.counts[kind : kind + 1] if kind < 2 else self.counts[2:]

    def stream(self, number: int, size: int, most: int) -> np.ndarray:
        """The next stream, of this many values of 0 to ``most``."""
        if bool(size) != (number in self._tables):
            raise FormatError(f"{self._cursor.where}: a table too many or too few; the update is refused")
        if not size:
            return np.zeros(0, np.int64)
        found = symbol_of(self._reader.read(np.zeros(size, np.int64), self._tables[number])).astype(np.int64)
        escaped = np.flatnonzero(found == ESCAPE)
        if escaped.size > self._escapes.size:
            raise FormatError(f"{self._cursor.where}: too few escapes; the update is refused")
        found[escaped], self._escapes = np.split(self._escapes, [escaped.size])
        if int(found.max()) > most:
            raise FormatError(f"{self._cursor.where}: {int(found.max())} where at most {most} may stand; it is refused")
        return found

    def values(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places and codes, given the stratum of each cell (−1: none)."""
        streams = [self.stream(GAPS + kind, sum(self._of(kind)), self._most) for kind in range(3)]
        streams += [self.stream(SIZES + kind, sum(self._of(kind)), MOST_CODE - 1) for kind in range(3)]
        if self._escapes.size:
            raise FormatError(f"{self._cursor.where}: escapes without a place; the update is refused")
        shifts = [shift_of(number) for number in range(STRATA)]
        sizes = [packed_size(count, width) for n, count in enumerate(self.counts) for width in (shifts[n], 1)]
        hidden = self._reader.close()
        total = sum(sizes)
        raw = Cursor(bytes(hidden[:total]) + bytes(self._cursor.take(max(0, total - len(hidden)))), self._cursor.where)
        places, codes, at = [], [], [0, 0, 0]
        for number, count in enumerate(self.counts):
            kind, shift = min(number, 2), shifts[number]
            low = unpack(raw.take(packed_size(count, shift)), shift, count) if shift else np.zeros(count, np.int64)
            signs = unpack(raw.take(packed_size(count, 1)), 1, count).astype(bool)
            part = slice(at[kind], at[kind] + count)
            at[kind] += count
            rank = np.cumsum((streams[kind][part] << shift) + low.astype(np.int64) + 1) - 1
            mine = np.flatnonzero(cells == number)
            if count and int(rank[-1]) >= mine.size:
                raise FormatError(f"{self._cursor.where}: a value lies behind the last cell; the update is refused")
            places.append(mine[rank])
            sizes_of = streams[3 + kind][part] + 1
            codes.append(np.where(signs, -sizes_of, sizes_of))
        return np.concatenate(places), np.concatenate(codes)
