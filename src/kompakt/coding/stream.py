"""The coded members of a block, tap by tap: the same calls for the writer and the reader.

FORMAT.md §6.4 gives their order.
"""

from collections.abc import Iterator

import numpy as np

from kompakt.coding.bundle import Bundle, Member, Tables
from kompakt.coding.models import ESCAPE, SYMBOLS
from kompakt.coding.rans import Call, Reader, symbol_of
from kompakt.errors import FormatError

CHUNK = 2**14


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
        cells = np.concatenate([bundle.contexts(tap, 0, bundle.size) for bundle in live])
        symbols = np.concatenate([bundle.symbols(tap, 0, bundle.size) for bundle in live])
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
        for chunk in _chunks(live, reader.round):
            contexts = [bundle.contexts(tap, start, end) for bundle, start, end in chunk]
            joined = np.concatenate(contexts) if len(contexts) > 1 else contexts[0]
            found, first = symbol_of(reader.read(joined, decoding[stored])), 0
            for bundle, start, end in chunk:
                part = found[first : first + end - start]
                count = int(np.count_nonzero(part == ESCAPE))
                bundle.fill(tap, start, part, _next(escapes, at, count))
                first, at = first + part.size, at + count
    if at != escapes.size:
        raise FormatError("coded section: values are left over beside it; the file is corrupt")
    for bundle in bundles:
        bundle.check()


def _chunks(bundles: list[Bundle], step: int) -> Iterator[list[tuple[Bundle, int, int]]]:
    """Cut a call into whole rounds whose arrays stay in the cache: bundles, each with its first and last value."""
    most = max(1, CHUNK // step) * step
    chunk: list[tuple[Bundle, int, int]] = []
    room = most
    for bundle in bundles:
        start = 0
        while start < bundle.size:
            end = min(bundle.size, start + room)
            chunk.append((bundle, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


def _next(escapes: np.ndarray, at: int, count: int) -> np.ndarray:
    if at + count > escapes.size:
        raise FormatError("coded section: a value outside its table is missing; the file is corrupt")
    return escapes[at : at + count]
