"""The loops of decoding, compiled by numba: contexts, symbols and values of a tap in one pass.

``kompakt.coding.stream`` has ``read_symbols`` and ``read_call`` in numpy, which are the reference; it takes
these where numba is installed. Importing this module compiles, or loads what an earlier process compiled.
Compiled code checks no bounds: every index below is clamped, or ends with an array of its own size.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from kompakt.coding.bundle import Bundle, Flat, Tables
from kompakt.coding.kernels import WINDOW
from kompakt.coding.models import CLASSES, ESCAPE, FRACTIONS, ZERO
from kompakt.coding.rans import WORD_BITS, Reader, used_up
from kompakt.coding.tablesets import BINS

CHUNK = 2048  # values whose predictions, contexts and symbols stay in the first cache
FEW = 64  # symbols that are searched for an escape together
LAST_CLASS = CLASSES - 1
EIGHTH, HALF = np.float32(0.125), np.float32(0.5)
# Innermost loops have unsigned numbers alone: numba looks for negative indices and makes mixed signs floats.
BYTE, HALF_WORD, WORD, LOW = np.uint64(8), np.uint64(16), np.uint64(WORD_BITS), np.uint64(0xFFFF)


class Stream(NamedTuple):
    """A stream and its tables as arrays alone.

    Args:
        symbols, steps: as in ``rans.SplitTable``.
        bits: table bits.
        states: of the lanes, uint64.
        words: those of the stream and one more for each lane, uint64.
        places: words used, and symbols read of a round, int64.
    """

    symbols: np.ndarray
    steps: np.ndarray
    bits: int
    states: np.ndarray
    words: np.ndarray
    places: np.ndarray


INTS, BYTES, WIDE = types.int64[::1], types.uint8[::1], types.uint64[::1]
CONTEXTS = types.uint32[::1]
FLOATS = types.float32
FLAT = types.NamedTuple(
    (FLOATS[:, ::1], BYTES, types.int16[::1], INTS, types.int64[:, ::1], FLOATS[:, :, ::1], INTS, INTS, types.int64),
    Flat,
)
STREAM = types.NamedTuple((BYTES, WIDE, types.int64, WIDE, WIDE, INTS), Stream)


def _stream(tables: Tables, stored: bool, reader: Reader) -> Stream:
    table, places = tables.split(stored), np.array([reader.at, 0])
    states, words = reader.states.view(np.uint64), reader.words.view(np.uint64)
    return Stream(table.symbols, table.steps, reader.bits, states, words, places)


def _finish(stream: Stream, reader: Reader) -> None:
    """End a call: the last round may be a part of one."""
    reader.at = int(stream.places[0])
    reader.refill(min(int(stream.places[1]), stream.states.size))


def read_symbols(contexts: np.ndarray, tables: Tables, reader: Reader) -> np.ndarray:
    """As ``stream.read_symbols``."""
    stream, found = _stream(tables, True, reader), np.empty(contexts.size, np.uint8)
    if not _pop(stream, contexts.astype(np.uint32), found):
        raise used_up()
    _finish(stream, reader)
    return found


def read_call(tap: int, live: list[Bundle], tables: Tables, reader: Reader, escapes: np.ndarray, at: int) -> int:
    """As ``stream.read_call``."""
    stream = _stream(tables, live[0].stored, reader)
    for bundle in live:
        at = _read_tap(bundle.flat, tap, stream, escapes, at)
        if at < 0:
            raise used_up()
    _finish(stream, reader)
    return at


@njit
def _predict(flat: Flat, tap: int, part: int, first: int, found: np.ndarray) -> None:
    """Predictions in eighths; all sums are exact, for ``Bundle.check`` has seen the taps before."""
    found[:] = 0
    row = flat.weights[part, min(max(tap - 1, 0), flat.weights.shape[1] - 1)]
    for back in range(min(tap, WINDOW)):
        weight, values = row[back], flat.values[tap - 1 - back, first : first + found.size]
        for i in range(found.size):
            found[i] += weight * values[i]
    for i in range(found.size):
        found[i] = np.floor(found[i] * EIGHTH + HALF)


@njit
def _parametric(
    classes: np.ndarray, factor: int, predicted: np.ndarray, total: int, contexts: np.ndarray, sides: np.ndarray
) -> None:
    """Contexts shifted by the table bits, and the nearest integers of predictions."""
    for i in range(contexts.size):
        cls = min(max(np.int32(classes[i] + factor), np.int32(0)), np.int32(LAST_CLASS))
        nearest = np.floor(predicted[i] * EIGHTH + HALF)
        fraction = np.int32(predicted[i] - FRACTIONS * nearest)
        contexts[i] = (FRACTIONS * cls + fraction + FRACTIONS // 2) * total
        sides[i] = nearest


@njit
def _stored(
    flat: Flat,
    classes: np.ndarray,
    factor: int,
    predicted: np.ndarray,
    total: int,
    contexts: np.ndarray,
    sides: np.ndarray,
) -> None:
    """Contexts shifted by the table bits, and the signs of predictions."""
    for i in range(contexts.size):
        cls = min(max(classes[i] + factor, 0), LAST_CLASS)
        size = np.int64(min(abs(predicted[i]), np.float32(BINS)))
        contexts[i] = (flat.by_class[cls] + flat.by_bin[size]) * total
        sides[i] = np.float32(-1) if predicted[i] < 0 else np.float32(1)


@njit
def _keep(flat: Flat, tap: int, first: int, total: int, contexts: np.ndarray, kept: np.ndarray) -> int:
    """Move the contexts of values that have a symbol to the front; note where those values stand."""
    count = 0
    for i in range(contexts.size):
        head = flat.heads[first + i]
        if head <= tap:
            contexts[count] = flat.head_context * total if head == tap else contexts[i]
            kept[count] = i
            count += 1
    return count


@njit
def _refill(states: np.ndarray, words: np.ndarray, at: int, bits: np.uint64) -> int:
    """Give each lane below its range a word; return how many are used, at most one a lane too many."""
    floor, place = np.uint64(1) << bits + bits, np.uint64(at)
    for lane in range(states.size):
        x = states[lane]
        filled = x << WORD | words[place]
        states[lane] = filled if x < floor else x
        place += np.uint64(x < floor)
    return int(place)


@njit(types.boolean(STREAM, CONTEXTS, BYTES), cache=True, nogil=True)
def _pop(stream: Stream, contexts: np.ndarray, found: np.ndarray) -> bool:
    """Pop a symbol for each context, from where in a round the last one stood; False without words."""
    states, places, lanes, done = stream.states, stream.places, stream.states.size, 0
    bits = np.uint64(stream.bits)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    while done < contexts.size:
        lane = places[1] & (lanes - 1)
        size = min(lanes - lane, contexts.size - done)
        x, wanted, symbols = states[lane : lane + size], contexts[done : done + size], found[done : done + size]
        for i in range(size):
            slot = x[i] & mask
            context = np.uint64(wanted[i])
            symbol = stream.symbols[context | slot]
            step = stream.steps[context >> bits << BYTE | symbol]
            x[i] = (x[i] >> bits) * (step & LOW) + slot - (step >> HALF_WORD)
            symbols[i] = symbol
        done += size
        places[1] += size
        if places[1] == 2 * lanes:
            places[0], places[1] = _refill(states, stream.words, places[0], bits), 0
            if places[0] + lanes > stream.words.size:
                return False
    return True


@njit
def _store(flat: Flat, found: np.ndarray, sides: np.ndarray, kept: np.ndarray, row: np.ndarray) -> None:
    """Values of symbols; what stands where one escaped is replaced."""
    if flat.heads.size:
        for i in range(found.size):
            row[kept[i]] = (np.float32(found[i]) - ZERO) * sides[kept[i]]
    elif flat.by_bin.size:
        for i in range(found.size):
            row[i] = (np.float32(found[i]) - ZERO) * sides[i]
    else:
        for i in range(found.size):
            row[i] = np.float32(found[i]) - ZERO + sides[i]


@njit
def _escape(row: np.ndarray, kept: np.ndarray, found: np.ndarray, escapes: np.ndarray, at: int) -> int:
    """Put the escaped values in their places; return how many are used, those that are missing among them."""
    for first in range(0, found.size, FEW):
        few = found[first : first + FEW]
        last = np.uint8(0)
        for i in range(few.size):
            last = max(last, few[i])
        for i in range(few.size if last == ESCAPE else 0):
            if few[i] == ESCAPE:
                row[kept[first + i]] = escapes[at] if at < escapes.size else 0
                at += 1
    return at


@njit(types.int64(FLAT, types.int64, STREAM, types.int32[::1], types.int64), cache=True, nogil=True)
def _read_tap(flat: Flat, tap: int, stream: Stream, escapes: np.ndarray, at: int) -> int:
    """Fill a tap; return how many escapes are used, −1 without words."""
    predicted, sides = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    contexts, found, kept = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint8), np.arange(CHUNK)
    total, begin = 1 << stream.bits, 0
    for part in range(flat.ends.size):
        for first in range(begin, flat.ends[part], CHUNK):
            count = min(CHUNK, flat.ends[part] - first)
            classes, row = flat.classes[first : first + count], flat.values[tap, first : first + count]
            factor, used = flat.factors[part, tap], count
            _predict(flat, tap, part, first, predicted[:count])
            if flat.by_bin.size:
                _stored(flat, classes, factor, predicted, total, contexts[:count], sides)
            else:
                _parametric(classes, factor, predicted, total, contexts[:count], sides)
            if flat.heads.size:
                used = _keep(flat, tap, first, total, contexts[:count], kept)
            if not _pop(stream, contexts[:used], found[:used]):
                return -1
            _store(flat, found[:used], sides, kept, row)
            at = _escape(row, kept, found[:used], escapes, at)
        begin = flat.ends[part]
    return at
