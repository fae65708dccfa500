"""The loops of decoding, compiled by numba: contexts, symbols and values of a tap in one pass.

``kompakt.coding.stream`` does the same in numpy and is the reference; it takes this module where numba
is installed. Importing it compiles, or loads what an earlier process compiled. Compiled code checks no
bounds: every index below is clamped, or ends with an array of its own size.
"""

import numpy as np
from numba import njit, types

from kompakt.coding.bundle import Bundle, Flat
from kompakt.coding.kernels import WINDOW
from kompakt.coding.models import CLASSES, ESCAPE, FRACTIONS, ZERO
from kompakt.coding.rans import WORD_BITS, Reader, used_up
from kompakt.coding.tablesets import BINS

CHUNK = 2048  # values whose predictions, contexts and symbols stay in the first cache
LAST_CLASS = CLASSES - 1
EIGHTH, HALF = np.float32(0.125), np.float32(0.5)

_INTS = types.int64[::1]
_FLAT = types.NamedTuple(
    (
        types.float32[:, ::1],
        types.uint8[::1],
        types.int16[::1],
        _INTS,
        types.int64[:, ::1],
        types.float32[:, :, ::1],
        _INTS,
        _INTS,
        types.int64,
    ),
    Flat,
)
_TABLE = types.Array(types.int64, 1, "C", readonly=True)


def read_call(tap: int, live: list[Bundle], table: np.ndarray, reader: Reader, escapes: np.ndarray, at: int) -> int:
    """Fill a tap of bundles; return how many escapes are used, those that are missing among them.

    Args:
        tap: the tap.
        live: the bundles that have it.
        table: as ``rans.decoding_table`` makes it.
        reader: the stream.
        escapes: values outside of tables, int32.
        at: how many of them are used.

    Raises:
        FormatError: the words are used up.
    """
    places = np.array([reader.at, 0, at])
    for bundle in live:
        if not _read_tap(bundle.flat, tap, table, reader.bits, reader.states, reader.words, escapes, places):
            raise used_up()
    reader.at = int(places[0])
    reader.refill(min(int(places[1]), reader.states.size))
    return int(places[2])


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
def _parametric(classes: np.ndarray, factor: int, predicted: np.ndarray, contexts: np.ndarray, sides: np.ndarray) -> None:
    """Contexts, and the nearest integers of predictions."""
    for i in range(contexts.size):
        cls = min(max(np.int32(classes[i] + factor), np.int32(0)), np.int32(LAST_CLASS))
        nearest = np.floor(predicted[i] * EIGHTH + HALF)
        fraction = np.int32(predicted[i] - FRACTIONS * nearest)
        contexts[i] = np.int32(FRACTIONS * cls + fraction + FRACTIONS // 2)
        sides[i] = nearest


@njit
def _stored(flat: Flat, classes: np.ndarray, factor: int, predicted: np.ndarray, contexts: np.ndarray, sides: np.ndarray) -> None:
    """Contexts, and the signs of predictions."""
    for i in range(contexts.size):
        cls = min(max(classes[i] + factor, 0), LAST_CLASS)
        size = np.int64(min(abs(predicted[i]), np.float32(BINS)))
        contexts[i] = flat.by_class[cls] + flat.by_bin[size]
        sides[i] = np.float32(-1) if predicted[i] < 0 else np.float32(1)


@njit
def _keep(flat: Flat, tap: int, first: int, contexts: np.ndarray, kept: np.ndarray) -> int:
    """Move the contexts of values that have a symbol to the front; note where those values stand."""
    count = 0
    for i in range(contexts.size):
        head = flat.heads[first + i]
        if head <= tap:
            contexts[count] = flat.head_context if head == tap else contexts[i]
            kept[count] = i
            count += 1
    return count


@njit
def _refill(states: np.ndarray, words: np.ndarray, at: int, bits: int) -> int:
    """Behind the words there is one more for each lane, so that it need not look where it is."""
    floor = 1 << 2 * bits
    for lane in range(states.size):
        x = states[lane]
        states[lane] = x << WORD_BITS | words[at] if x < floor else x
        at += x < floor
    return at


@njit
def _pop(
    states: np.ndarray, words: np.ndarray, places: np.ndarray, contexts: np.ndarray, found: np.ndarray, table: np.ndarray, bits: int
) -> bool:
    """Pop a symbol for each context, from where in a round the last call stopped; False without words."""
    lanes, mask, done = states.size, (1 << bits) - 1, 0
    while done < contexts.size:
        lane = places[1] & (lanes - 1)
        size = min(lanes - lane, contexts.size - done)
        x, wanted, symbols = states[lane : lane + size], contexts[done : done + size], found[done : done + size]
        for i in range(size):
            entry = table[np.uint64(np.int64(wanted[i]) << bits | (x[i] & mask))]
            x[i] = (x[i] >> bits) * (entry & 0xFFFF) + (entry >> 24)
            symbols[i] = entry >> 16
        done += size
        places[1] += size
        if places[1] == 2 * lanes:
            places[0], places[1] = _refill(states, words, places[0], bits), 0
            if places[0] + lanes > words.size:
                return False
    return True


@njit
def _store(
    row: np.ndarray, kept: np.ndarray, found: np.ndarray, sides: np.ndarray, stored: bool, escapes: np.ndarray, places: np.ndarray
) -> None:
    """Values of symbols; those of escapes come from beside the stream."""
    escaped = 0
    for i in range(found.size):
        escaped += found[i] == ESCAPE
    if stored:
        for i in range(found.size):
            row[kept[i]] = (np.float32(found[i]) - ZERO) * sides[kept[i]]
    else:
        for i in range(found.size):
            row[i] = np.float32(found[i]) - ZERO + sides[i]
    if escaped:
        for i in range(found.size):
            if found[i] == ESCAPE:
                row[kept[i]] = escapes[places[2]] if places[2] < escapes.size else 0
                places[2] += 1


@njit(
    types.boolean(_FLAT, types.int64, _TABLE, types.int64, _INTS, _INTS, types.int32[::1], _INTS),
    cache=True,
    nogil=True,
)
def _read_tap(
    flat: Flat, tap: int, table: np.ndarray, bits: int, states: np.ndarray, words: np.ndarray, escapes: np.ndarray, places: np.ndarray
) -> bool:
    """Fill a tap; ``places`` are those in the words, in the round and in the escapes. False without words."""
    predicted, sides = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    contexts, found, kept = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.uint8), np.arange(CHUNK)
    stored, begin = flat.by_bin.size > 0, 0
    for part in range(flat.ends.size):
        for first in range(begin, flat.ends[part], CHUNK):
            count = min(CHUNK, flat.ends[part] - first)
            classes, factor, used = flat.classes[first : first + count], flat.factors[part, tap], count
            _predict(flat, tap, part, first, predicted[:count])
            if stored:
                _stored(flat, classes, factor, predicted, contexts[:count], sides)
            else:
                _parametric(classes, factor, predicted, contexts[:count], sides)
            if flat.heads.size:
                used = _keep(flat, tap, first, contexts[:count], kept)
            if not _pop(states, words, places, contexts[:used], found, table, bits):
                return False
            _store(flat.values[tap, first : first + count], kept, found[:used], sides, stored, escapes, places)
        begin = flat.ends[part]
    return True
