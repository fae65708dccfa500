"""The loops of ``kompakt.coding.compiled``, for numba: symbols, contexts and values of a coded section.

Compiled code checks no bounds: every index below is clamped, or ends with an array of its own size. Numba's cache
looks at this file alone: who changes only a file that it imports clears the cache.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from kompakt.coding import chunks
from kompakt.coding.kernels import EXACT, WINDOW
from kompakt.coding.models import ZERO
from kompakt.coding.pops import BYTES, STREAM, WORDS, Stream, end_call, pop

CHUNK = 2048  # values whose predictions, contexts and symbols stay in the first cache
NARROW = 2**15  # planes are int16; what does not fit is left to numpy
DONE, USED_UP, LATE_HEAD, INEXACT, WIDE = range(5)
FIELDS = 17
# Columns of ``parts``; a place is −1 where a member has none of a thing.
(KERNELS, INPUTS, TAPS, STORED, BASE, ROWS, COLUMNS, FACTORS, WEIGHTS, SET, HEAD, HEAD_SET,
 VALUES, CLASS, HEADS, REACH, FAULT) = range(FIELDS)  # fmt: skip


class Planes(NamedTuple):
    """What is read, tap by tap, and what it takes to know the contexts.

    Args:
        parts: a row of places and sizes for each member, in the order of calls, int64 [members, FIELDS].
        sides: factors and weights, int32.
        cuts: which context of a set a scale class and a prediction's magnitude give, int64 [sets, CUTS].
        parametric, stored: decoding tables, uint32.
        escapes: values outside of tables, int32.
        values: int16, [taps, kernels] of each member.
        classes: scale classes of kernels without tap factors, int16.
        heads: first nonzero taps of kernels, uint8.
        ends: least and most value of each member, int64 [members, 2].
    """

    parts: np.ndarray
    sides: np.ndarray
    cuts: np.ndarray
    parametric: np.ndarray
    stored: np.ndarray
    escapes: np.ndarray
    values: np.ndarray
    classes: np.ndarray
    heads: np.ndarray
    ends: np.ndarray


class Scratch(NamedTuple):
    """Arrays for a chunk: predictions, their sizes, what symbols meet, contexts twice, symbols, places."""

    predicted: np.ndarray
    sizes: np.ndarray
    sides: np.ndarray
    sums: np.ndarray
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
def _head_context(part: np.ndarray, planes: Planes, bits: int, first: int, scratch: Scratch, count: int) -> None:
    """The contexts of the heads of kernels."""
    begin, sums = part[CLASS] + first, scratch.sums[:count]
    chunks.by_class(planes.cuts[part[HEAD_SET]], planes.classes[begin : begin + count], 0, sums)
    chunks.shift(sums, bits, scratch.contexts[:count])


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
            _head_context(part, planes, stream.bits, first, scratch, count)
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
            chunks.parametric(classes, factor, predicted, bits, contexts, sides)
        else:
            chunks.unpredicted(classes, factor, bits, contexts, sides)
        return
    cuts, sums = planes.cuts[part[SET]], scratch.sums[:count]
    chunks.by_class(cuts, classes, factor, sums)
    if guessed:
        chunks.by_size(cuts, predicted, scratch.sizes[:count], sides, sums)
    else:
        sides[:] = 1
    chunks.shift(sums, bits, contexts)


@njit
def _read_chunk(part: np.ndarray, tap: int, first: int, stream: Stream, planes: Planes, scratch: Scratch) -> int:
    """Read the values of a chunk; return a status."""
    count = min(CHUNK, part[KERNELS] - first)
    begin, used = part[VALUES] + tap * part[KERNELS] + first, count
    row, kept = planes.values[begin : begin + count], scratch.kept[:0]
    _contexts(part, planes, tap, first, stream.bits, scratch, count)
    if part[HEADS] >= 0:
        heads = planes.heads[part[HEADS] + first : part[HEADS] + first + count]
        used = chunks.keep(heads, part[HEAD] << stream.bits, tap, scratch.contexts[:count], scratch.kept)
        kept = scratch.kept[:used]
    found = scratch.found[:used]
    if not pop(stream, planes.stored if part[STORED] else planes.parametric, scratch.contexts[:used], found):
        return USED_UP
    if not part[STORED]:
        if not chunks.add(found, scratch.sides, row):
            return WIDE
    elif part[HEADS] >= 0:
        chunks.scatter(found, scratch.sides, kept, row)
    else:
        chunks.sign(found, scratch.sides, row)
    stream.places[2] = chunks.escape(row, kept, found, planes.escapes, stream.places[2])
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
        largest = max(largest, chunks.bound(planes.values[begin : begin + min(CHUNK, kernels - first)], ends))
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


@njit
def _leave_out(part: np.ndarray, planes: Planes, live: np.ndarray) -> None:
    """Move what belongs to kernels that are not empty to the front; note which these are.

    Most kernels of a sparse member are empty, and nothing has to be worked out for them.
    """
    heads = planes.heads[part[HEADS] : part[HEADS] + part[KERNELS]]
    classes = planes.classes[part[CLASS] : part[CLASS] + part[KERNELS]]
    count, empty = np.uint64(0), np.uint8(part[TAPS])
    for i in range(heads.size):
        live[count], heads[count], classes[count] = i, heads[i], classes[i]
        count += np.uint64(heads[i] < empty)
    part[KERNELS] = np.int64(count)
    planes.values[part[VALUES] : part[VALUES] + part[TAPS] * part[KERNELS]] = 0


@njit
def _put_back(part: np.ndarray, kernels: int, ends: np.ndarray, planes: Planes, live: np.ndarray) -> None:
    """Undo ``_leave_out`` once values are read: zeros for all kernels that are empty."""
    count, end = part[KERNELS], part[VALUES] + part[TAPS] * kernels
    # From the last value on: none is overwritten before it is moved, for none moves to the front.
    for tap in range(part[TAPS] - 1, -1, -1):
        begin = part[VALUES] + tap * kernels
        for i in range(count - 1, -1, -1):
            place = begin + live[i]
            value = planes.values[part[VALUES] + tap * count + i]
            planes.values[place + 1 : end] = 0
            planes.values[place], end = value, place
        planes.values[begin:end] = 0
        end = begin
    if count < kernels:
        ends[0], ends[1] = min(ends[0], 0), max(ends[1], 0)
    part[KERNELS] = kernels


@njit(types.int64(STREAM, PLANES), cache=True, nogil=True)
def read_planes(stream: Stream, planes: Planes) -> int:
    """Read all values; return a status."""
    scratch = Scratch(
        np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int16), np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int16),
        np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.int64),
    )  # fmt: skip
    taps = 0
    for part in planes.parts:
        _spread(part, planes)
        if part[WEIGHTS] >= 0:
            _measure(part, planes.sides)
        taps = max(taps, part[TAPS])
    status = _read_heads(stream, planes, scratch)
    if status != DONE:
        return status
    live, kernels = np.empty(planes.heads.size + 1, np.int32), planes.parts[:, KERNELS].copy()
    for part in planes.parts:
        if part[HEADS] >= 0:
            _leave_out(part, planes, live[part[HEADS] :])
    for call in range(2 * taps):
        status = _read_call(call // 2, call % 2, stream, planes, scratch)
        if status != DONE:
            return status
    for place in range(len(kernels)):
        part = planes.parts[place]
        if part[HEADS] >= 0:
            _put_back(part, kernels[place], planes.ends[place], planes, live[part[HEADS] :])
    return DONE


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
