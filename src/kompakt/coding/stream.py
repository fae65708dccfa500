"""The coded members of a block, tap by tap: the same calls for the writer and the reader.

FORMAT.md §6.4 gives their order.
"""

from collections.abc import Iterator

import numpy as np

from kompakt.coding.bundle import Bundle, Member, Tables
from kompakt.coding.models import ESCAPE, SYMBOLS, ZERO
from kompakt.coding.rans import Call, Reader, symbol_of
from kompakt.errors import FormatError

CHUNK = 2**14


def make_bundles(members: list[Member], tables: Tables, unit: int) -> list[Bundle]:
    """Group members by kind of tables, taps and sets, in the order of the format."""
    groups: dict[tuple[bool, int, int, int], list[tuple[int, Member]]] = {}
    for index, member in enumerate(members):
        model = member.model
        key = (model.stored, member.layout.taps, model.index, -1 if model.heads is None else model.heads)
        groups.setdefault(key, []).append((index, member))
    return [Bundle(groups[key], tables, unit) for key in sorted(groups)]


def calls_of(bundles: list[Bundle]) -> list[tuple[int, bool, list[Bundle]]]:
    """The calls for values: tap, whether its tables are stored, the bundles that take part."""
    taps = range(max((bundle.taps for bundle in bundles), default=0))
    found = [
        (tap, stored, [bundle for bundle in bundles if bundle.stored == stored and bundle.taps > tap])
        for tap in taps
        for stored in (False, True)
    ]
    return [call for call in found if call[2]]


def find_heads(values: np.ndarray) -> np.ndarray:
    """The first nonzero tap of each kernel of [K, N], K where there is none, uint8."""
    nonzero = values != 0
    return np.where(nonzero.any(axis=0), nonzero.argmax(axis=0), len(values)).astype(np.uint8)


def encode_values(bundles: list[Bundle], tables: Tables) -> tuple[list[Call], np.ndarray]:
    """The calls that code filled bundles, and the escaped values."""
    price = {stored: _frequencies_and_starts(tables, stored) for stored in {bundle.stored for bundle in bundles}}
    calls, escapes = [], [np.zeros(0, np.int32)]
    sparse = [bundle for bundle in bundles if bundle.sparse]
    if sparse:
        for bundle in sparse:
            bundle.heads = find_heads(bundle.values)
        cells = np.concatenate([bundle.head_contexts() + bundle.heads + ZERO for bundle in sparse])
        calls.append(Call(price[True][0][cells], price[True][1][cells]))
    for tap, stored, live in calls_of(bundles):
        frequency, start = price[stored]
        cells = np.concatenate([bundle.contexts(tap, 0, bundle.begin(tap)) for bundle in live])
        symbols = np.concatenate([bundle.symbols(tap) for bundle in live])
        symbols = np.where(frequency[cells + symbols] == 0, ESCAPE, symbols)
        values = np.concatenate([bundle.values[tap, bundle.heads <= tap] for bundle in live])
        escapes.append(values[symbols == ESCAPE].astype(np.int32))
        calls.append(Call(frequency[cells + symbols], start[cells + symbols]))
    return calls, np.concatenate(escapes)


def _frequencies_and_starts(tables: Tables, stored: bool) -> tuple[np.ndarray, np.ndarray]:
    rows = tables.frequencies(stored).reshape(-1, SYMBOLS)
    return rows.reshape(-1), (np.cumsum(rows, axis=1) - rows).reshape(-1)


def decode_values(bundles: list[Bundle], tables: Tables, reader: Reader, escapes: np.ndarray) -> None:
    """Fill the bundles.

    Raises:
        FormatError: the stream or the escapes do not fit.
    """
    sparse = [bundle for bundle in bundles if bundle.sparse]
    if sparse:
        found = read_symbols(np.concatenate([bundle.head_contexts() for bundle in sparse]), tables, reader)
        _set_heads(sparse, found - np.uint8(ZERO))
    at = 0
    for tap, _, live in calls_of(bundles):
        at = read_call(tap, live, tables, reader, escapes, at)
        for bundle in live:
            bundle.check(tap)
    check_escapes(at, escapes.size)


def check_escapes(used: int, given: int) -> None:
    """Check that all escapes were used, and no more.

    Raises:
        FormatError: they were not.
    """
    if used > given:
        raise FormatError("coded section: a value outside its table is missing; the file is corrupt")
    if used < given:
        raise FormatError("coded section: values are left over beside it; the file is corrupt")


def late_head() -> FormatError:
    """The error of a head that is more than the taps."""
    return FormatError("coded section: a kernel begins after its last tap; the file is corrupt")


def read_symbols(contexts: np.ndarray, tables: Tables, reader: Reader) -> np.ndarray:
    """One symbol, uint8, for each context of the stored tables; contexts are shifted left by the table bits."""
    return symbol_of(reader.read(contexts, tables.decoding(True)))


def read_call(tap: int, live: list[Bundle], tables: Tables, reader: Reader, escapes: np.ndarray, at: int) -> int:
    """Fill a tap of bundles.

    Args:
        tap: the tap.
        live: the bundles that have it, all with stored or all with parametric tables.
        tables: the tables.
        reader: the stream.
        escapes: values outside of tables, int32.
        at: how many of them are used.

    Returns:
        how many of them are used then, those that are missing among them.

    Raises:
        FormatError: the stream is used up.
    """
    table = tables.decoding(live[0].stored)
    for chunk in _chunks([(bundle, bundle.begin(tap)) for bundle in live], reader.round):
        contexts = [bundle.contexts(tap, start, end) for bundle, start, end in chunk]
        joined = np.concatenate(contexts) if len(contexts) > 1 else contexts[0]
        found, first = symbol_of(reader.read(joined, table)), 0
        for bundle, start, end in chunk:
            part = found[first : first + end - start]
            count = int(np.count_nonzero(part == ESCAPE))
            bundle.fill(tap, start, part, _next(escapes, at, count))
            first, at = first + part.size, at + count
    return at


def _set_heads(bundles: list[Bundle], heads: np.ndarray) -> None:
    """Hand the sparse bundles the first nonzero taps of their kernels."""
    start = 0
    for bundle in bundles:
        bundle.heads = heads[start : start + bundle.size]
        if bundle.size and int(bundle.heads.max()) > bundle.taps:
            raise late_head()
        start += bundle.size


def _chunks(bundles: list[tuple[Bundle, int]], step: int) -> Iterator[list[tuple[Bundle, int, int]]]:
    """Cut a call into whole rounds whose arrays stay in the cache.

    Args:
        bundles: those that take part, each with the number of its values.
        step: symbols of a round.

    Yields:
        bundles, each with its first and last value.
    """
    most = max(1, CHUNK // step) * step
    chunk: list[tuple[Bundle, int, int]] = []
    room = most
    for bundle, size in bundles:
        start = 0
        while start < size:
            end = min(size, start + room)
            chunk.append((bundle, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


def _next(escapes: np.ndarray, at: int, count: int) -> np.ndarray:
    """The next escapes; zeros where they are used up, so that a call ends before that is an error."""
    found = escapes[at : at + count]
    return found if found.size == count else np.append(found, np.zeros(count - found.size, np.int32))
