"""The loops of ``kompakt.coding.compiled``, for numba: symbols, contexts and values of a coded section.

Compiled code checks no bounds: every index below is clamped, or ends with an array of its own size. Numba's cache
looks at this file alone: who changes only a file that it imports clears the cache.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from kompakt.coding.kernels import EXACT, WINDOW
from kompakt.coding.models import CLASSES, ESCAPE, FRACTIONS, ZERO
from kompakt.coding.pops import BYTES, STREAM, WORDS, Stream, end_call, pop
from kompakt.coding.tablesets import BINS

CHUNK = 2048  # values whose predictions, contexts and symbols stay in the first cache
FEW = 64  # symbols that are searched for an escape together
NARROW = 2**15  # planes are int16; what does not fit is left to numpy
DONE, USED_UP, LATE_HEAD, INEXACT, WIDE = range(5)
FIELDS = 18
# Columns of ``parts``; a place is −1 where a member has none of a thing.
(KERNELS, INPUTS, TAPS, STORED, BASE, ROWS, COLUMNS, FACTORS, WEIGHTS, BY_CLASS, CONTEXTS, HEAD, HEAD_BY_CLASS,
 VALUES, CLASS, HEADS, REACH, FAULT) = range(FIELDS)  # fmt: skip


class Planes(NamedTuple):
    """What is read, tap by tap, and what it takes to know the contexts.

    Args:
        parts: a row of places and sizes for each member, in the order of calls, int64 [members, FIELDS].
        sides: factors and weights, int32.
        lookups: by scale class and then by the prediction's magnitude, contexts of sets, int64 [sets, 37 + 65].
        parametric, stored: decoding tables, uint32.
        escapes: values outside of tables, int32.
        values: int16, [taps, kernels] of each member.
        classes: scale classes of kernels without tap factors, int16.
        heads: first nonzero taps of kernels, uint8.
        ends: least and most value of each member, int64 [members, 2].
    """

    parts: np.ndarray
    sides: np.ndarray
    lookups: np.ndarray
    parametric: np.ndarray
    stored: np.ndarray
    escapes: np.ndarray
    values: np.ndarray
    classes: np.ndarray
    heads: np.ndarray
    ends: np.ndarray


class Scratch(NamedTuple):
    """Arrays for a chunk: predictions, what symbols are added to or multiplied by, contexts, symbols, places."""

    predicted: np.ndarray
    sides: np.ndarray
    contexts: np.ndarray
    found: np.ndarray
    kept: np.ndarray


SHORT, INTS, ROWS_OF_INTS = types.int16[::1], types.int32[::1], types.int64[:, ::1]
PLANES = types.NamedTuple(
    (ROWS_OF_INTS, INTS, ROWS_OF_INTS, WORDS, WORDS, INTS, SHORT, SHORT, BYTES, ROWS_OF_INTS), Planes
)  # fmt: skip


@njit
def _spread(part: np.ndarray, planes: Planes) -> None:
    """The part of the scale class that rows and columns decide, for each kernel."""
    inputs = part[INPUTS]
    for output in range(part[KERNELS] // max(inputs, 1)):
        first = part[CLASS] + output * inputs
        base, row = part[BASE], planes.classes[first : first + inputs]
        if part[ROWS] >= 0:
            base += 2 * planes.sides[part[ROWS] + output]
        row[:] = base
        if part[COLUMNS] >= 0:
            columns = planes.sides[part[COLUMNS] : part[COLUMNS] + inputs]
            for i in range(inputs):
                row[i] += np.int16(2 * columns[i])


@njit
def _measure(part: np.ndarray, sides: np.ndarray) -> None:
    """How far a prediction may lie from the largest value that it is made of, in units of 1/64."""
    taps, most = part[TAPS], 0
    for tap in range(1, min(taps, WINDOW + 1) if taps <= WINDOW else 2):
        count = tap if taps <= WINDOW else WINDOW
        first = part[WEIGHTS] + (tap * (tap - 1) // 2 if taps <= WINDOW else 0)
        most = max(most, np.abs(sides[first : first + count]).sum())
    part[REACH] = most


@njit
def _predict(part: np.ndarray, planes: Planes, tap: int, first: int, found: np.ndarray) -> None:
    """Predictions in eighths."""
    found[:] = 4
    taps, kernels = part[TAPS], part[KERNELS]
    weights = planes.sides[part[WEIGHTS] + (tap * (tap - 1) // 2 if taps <= WINDOW else 0) :]
    for back in range(min(tap, WINDOW)):
        begin = part[VALUES] + (tap - 1 - back) * kernels + first
        weight, values = np.int32(weights[back]), planes.values[begin : begin + found.size]
        for i in range(found.size):
            found[i] += np.int32(weight * np.int32(values[i]))
    for i in range(found.size):
        found[i] = np.int32(found[i] >> np.int32(3))


@njit
def _parametric(
    classes: np.ndarray, factor: int, predicted: np.ndarray, bits: int, contexts: np.ndarray, sides: np.ndarray
) -> None:
    """Contexts shifted by the table bits, and what is added to symbols."""
    shift, add, last = np.uint32(bits), np.int32(factor), np.int32(CLASSES - 1)
    for i in range(contexts.size):
        cls = min(max(np.int32(np.int32(classes[i]) + add), np.int32(0)), last)
        nearest = np.int32(np.int32(predicted[i] + np.int32(4)) >> np.int32(3))
        fraction = np.int32(predicted[i] - np.int32(nearest << np.int32(3)) + np.int32(4))
        contexts[i] = np.uint32(np.int32(np.int32(cls << np.int32(3)) + fraction)) << shift
        sides[i] = np.int32(nearest - np.int32(ZERO))


@njit
def _unpredicted(classes: np.ndarray, factor: int, bits: int, contexts: np.ndarray, sides: np.ndarray) -> None:
    """As ``_parametric``, where the prediction is 0."""
    shift, add, last = np.uint32(bits), np.int32(factor), np.int32(CLASSES - 1)
    for i in range(contexts.size):
        cls = min(max(np.int32(np.int32(classes[i]) + add), np.int32(0)), last)
        contexts[i] = np.uint32(np.int32(np.int32(cls << np.int32(3)) + np.int32(FRACTIONS // 2))) << shift
        sides[i] = np.int32(-ZERO)


@njit
def _by_class(lookup: np.ndarray, classes: np.ndarray, factor: int, bits: int, contexts: np.ndarray) -> None:
    """The contexts of stored tables where nothing is predicted, shifted by the table bits."""
    for i in range(contexts.size):
        cls = min(max(classes[i] + factor, 0), CLASSES - 1)
        contexts[i] = lookup[cls] << bits


@njit
def _by_size(lookup: np.ndarray, predicted: np.ndarray, bits: int, contexts: np.ndarray, sides: np.ndarray) -> None:
    """Add what predictions tell to contexts; the signs that symbols are multiplied by."""
    for i in range(contexts.size):
        contexts[i] += np.uint32(lookup[CLASSES + min(abs(predicted[i]), BINS)] << bits)
        sides[i] = -1 if predicted[i] < 0 else 1


@njit
def _keep(heads: np.ndarray, head: int, tap: int, contexts: np.ndarray, kept: np.ndarray) -> int:
    """Move the contexts of values that have a symbol to the front; note where those values stand."""
    count = 0
    for i in range(contexts.size):
        if heads[i] <= tap:
            contexts[count] = head if heads[i] == tap else contexts[i]
            kept[count] = i
            count += 1
    return count


@njit
def _add(found: np.ndarray, sides: np.ndarray, row: np.ndarray) -> bool:
    """Values of parametric symbols; whether all fit."""
    lost = np.int32(0)
    for i in range(found.size):
        value = np.int32(np.int32(found[i]) + sides[i])
        row[i] = np.int16(value)
        lost |= np.int32(value ^ np.int32(np.int16(value)))
    return lost == 0


@njit
def _sign(found: np.ndarray, sides: np.ndarray, row: np.ndarray) -> None:
    """Values of symbols of stored tables."""
    for i in range(found.size):
        row[i] = np.int16((np.int32(found[i]) - np.int32(ZERO)) * sides[i])


@njit
def _scatter(found: np.ndarray, sides: np.ndarray, kept: np.ndarray, row: np.ndarray) -> None:
    """As ``_sign``, for some of the values."""
    for i in range(found.size):
        row[kept[i]] = np.int16((np.int32(found[i]) - np.int32(ZERO)) * sides[kept[i]])


@njit
def _escape(row: np.ndarray, kept: np.ndarray, found: np.ndarray, escapes: np.ndarray, at: int) -> int:
    """Put the escaped values in their places, those that fit; return how many are used, the missing among them."""
    for first in range(0, found.size, FEW):
        few = found[first : first + FEW]
        last = np.uint8(0)
        for i in range(few.size):
            last = max(last, few[i])
        for i in range(few.size if last == ESCAPE else 0):
            if few[i] == ESCAPE:
                row[kept[first + i] if kept.size else first + i] = escapes[at] if at < escapes.size else 0
                at += 1
    return at


@njit
def _bound(row: np.ndarray, ends: np.ndarray) -> int:
    """Widen the ends of a member's values; return the largest magnitude of these."""
    least = most = row[0]
    for i in range(row.size):
        least, most = min(least, row[i]), max(most, row[i])
    ends[0], ends[1] = min(ends[0], least), max(ends[1], most)
    return int(max(-np.int64(least), np.int64(most)))


@njit
def _head_context(part: np.ndarray, planes: Planes, bits: int, first: int, contexts: np.ndarray) -> None:
    """The contexts of the heads of kernels."""
    begin = part[CLASS] + first
    _by_class(planes.lookups[part[HEAD_BY_CLASS]], planes.classes[begin : begin + contexts.size], 0, bits, contexts)


@njit
def _read_heads(stream: Stream, planes: Planes, scratch: Scratch) -> int:
    """The call of all heads."""
    status, sparse = DONE, False
    for part in planes.parts:
        if part[HEADS] < 0:
            continue
        sparse = True
        for first in range(0, part[KERNELS], CHUNK):
            count = min(CHUNK, part[KERNELS] - first)
            contexts, found = scratch.contexts[:count], scratch.found[:count]
            _head_context(part, planes, stream.bits, first, contexts)
            if not pop(stream, planes.stored, contexts, found):
                return USED_UP
            heads = planes.heads[part[HEADS] + first : part[HEADS] + first + count]
            for i in range(count):
                heads[i] = found[i] - np.uint8(ZERO)
                if heads[i] > part[TAPS]:
                    status = LATE_HEAD
    if sparse and not end_call(stream):
        return USED_UP
    return status


@njit
def _contexts(part: np.ndarray, planes: Planes, tap: int, first: int, bits: int, scratch: Scratch, count: int) -> None:
    """Contexts of a chunk, and its ``sides``."""
    contexts, sides, predicted = scratch.contexts[:count], scratch.sides[:count], scratch.predicted[:count]
    classes = planes.classes[part[CLASS] + first : part[CLASS] + first + count]
    factor = planes.sides[part[FACTORS] + tap] if part[FACTORS] >= 0 else 0
    guessed = tap > 0 and part[WEIGHTS] >= 0
    if guessed:
        _predict(part, planes, tap, first, predicted)
    if not part[STORED]:
        if guessed:
            _parametric(classes, factor, predicted, bits, contexts, sides)
        else:
            _unpredicted(classes, factor, bits, contexts, sides)
        return
    lookup = planes.lookups[part[BY_CLASS]]
    if part[CONTEXTS] == 1:
        contexts[:] = lookup[0] << bits
    else:
        _by_class(lookup, classes, factor, bits, contexts)
    if guessed:
        _by_size(lookup, predicted, bits, contexts, sides)
    else:
        sides[:] = 1


@njit
def _read_chunk(part: np.ndarray, tap: int, first: int, stream: Stream, planes: Planes, scratch: Scratch) -> int:
    """Read the values of a chunk; return a status."""
    count = min(CHUNK, part[KERNELS] - first)
    begin, used = part[VALUES] + tap * part[KERNELS] + first, count
    row, kept = planes.values[begin : begin + count], scratch.kept[:0]
    _contexts(part, planes, tap, first, stream.bits, scratch, count)
    if part[HEADS] >= 0:
        heads = planes.heads[part[HEADS] + first : part[HEADS] + first + count]
        used = _keep(heads, part[HEAD] << stream.bits, tap, scratch.contexts[:count], scratch.kept)
        kept = scratch.kept[:used]
    found = scratch.found[:used]
    if not pop(stream, planes.stored if part[STORED] else planes.parametric, scratch.contexts[:used], found):
        return USED_UP
    if not part[STORED]:
        if not _add(found, scratch.sides, row):
            return WIDE
    elif part[HEADS] >= 0:
        _scatter(found, scratch.sides, kept, row)
    else:
        _sign(found, scratch.sides, row)
    stream.places[2] = _escape(row, kept, found, planes.escapes, stream.places[2])
    return DONE


@njit
def _read_tap(part: np.ndarray, ends: np.ndarray, tap: int, stream: Stream, planes: Planes, scratch: Scratch) -> int:
    """Read a tap of a member; return a status. Whether predictions from it are exact is noted in ``part``."""
    largest, kernels = 0, part[KERNELS]
    for first in range(0, kernels, CHUNK):
        status = _read_chunk(part, tap, first, stream, planes, scratch)
        if status != DONE:
            return status
        begin = part[VALUES] + tap * kernels + first
        largest = max(largest, _bound(planes.values[begin : begin + min(CHUNK, kernels - first)], ends))
    part[FAULT] = part[WEIGHTS] >= 0 and largest * part[REACH] >= EXACT
    return DONE


@njit
def _read_call(tap: int, stored: int, stream: Stream, planes: Planes, scratch: Scratch) -> int:
    """Read a tap of all members with stored or with parametric tables; return a status."""
    fault = 0
    for place in range(len(planes.parts)):
        part = planes.parts[place]
        if part[STORED] == stored and part[TAPS] > tap:
            status = _read_tap(part, planes.ends[place], tap, stream, planes, scratch)
            if status != DONE:
                return status
            fault |= part[FAULT]
    if not end_call(stream):
        return USED_UP
    return INEXACT if fault else DONE


@njit(types.int64(STREAM, PLANES), cache=True, nogil=True)
def read_planes(stream: Stream, planes: Planes) -> int:
    """Read all values; return a status."""
    scratch = Scratch(
        np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32), np.empty(CHUNK, np.uint32),
        np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.int64),
    )  # fmt: skip
    taps = 0
    for part in planes.parts:
        _spread(part, planes)
        if part[WEIGHTS] >= 0:
            _measure(part, planes.sides)
        if part[HEADS] >= 0:
            planes.values[part[VALUES] : part[VALUES] + part[TAPS] * part[KERNELS]] = 0
        taps = max(taps, part[TAPS])
    status = _read_heads(stream, planes, scratch)
    for call in range(2 * taps if status == DONE else 0):
        status = _read_call(call // 2, call % 2, stream, planes, scratch)
        if status != DONE:
            break
    return status


@njit(types.void(SHORT, types.int64, types.int64, types.int8[::1]), cache=True, nogil=True)
def to_bytes(values: np.ndarray, taps: int, offset: int, found: np.ndarray) -> None:
    """Values [taps, kernels] and an offset to bytes [kernels, taps], modulo 256."""
    across, add, step, zero = np.uint64(max(taps, 1)), np.int16(offset), np.uint64(CHUNK), np.uint64(0)
    kernels = np.uint64(found.size) // across
    for first in range(zero, kernels, step):
        last = min(kernels, first + step)
        for tap in range(zero, across):
            begin = tap * kernels
            for kernel in range(first, last):
                found[kernel * across + tap] = np.int8(values[begin + kernel] + add)
