"""Canonical Huffman codes with limited lengths, as Deep Compression's third stage has them.

Han et al. 2016 (1510.00149) §4 codes quantized weights with Huffman's code; a canonical code
(Schwartz and Kallick 1964) needs only its lengths in the file. Decoding follows no bit loop: the code
length is looked up at every bit position, and the chain of positions is found by doubling jumps.
"""

import heapq
from collections.abc import Callable

import numpy as np

from kompakt.errors import FormatError

MOST_LENGTH = 15
MOST_SYMBOLS = 4096
CHUNK_BITS = 2**18
Walk = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths of Huffman's code for ``counts`` (at least two of them positive), at most 15 bits each.

    Where the optimal code is longer, the shortest codes give way until Kraft's sum holds with equality.

    Returns:
        uint8 array of the shape of ``counts``; 0 for symbols that do not occur.
    """
    used = np.flatnonzero(counts)
    heap: list[tuple[int, int, tuple[int, ...]]]
    heap = [(int(counts[symbol]), int(symbol), (int(symbol),)) for symbol in used]
    heapq.heapify(heap)
    lengths = np.zeros(len(counts), np.int64)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        joined = first[2] + second[2]
        lengths[list(joined)] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), joined))
    return _limit(lengths, counts).astype(np.uint8)


def encode(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """Write symbols with the canonical code of ``lengths``, bits from byte bit 0 on."""
    codes = _codes(lengths)
    widths = lengths[symbols].astype(np.int64)
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for position in range(int(lengths.max(initial=0))):
        live = widths > position
        chosen = symbols[live]
        bits[ends[live] - widths[live] + position] = codes[chosen] >> (widths[live] - 1 - position) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def decode(data: bytes | memoryview, lengths: np.ndarray, count: int, walk: Walk | None = None) -> np.ndarray:
    """Read ``count`` symbols.

    Args:
        data: the stream.
        lengths: the length of each symbol's code.
        count: how many symbols.
        walk: ``kompakt.coding.pops.walk``, where it is compiled: a loop over symbols.

    Raises:
        FormatError: the lengths are no complete code, or the stream does not hold exactly ``count`` symbols.
    """
    table_symbols, table_lengths, width = _lookup(lengths)
    if not count <= 8 * len(data) <= count * width + 7:
        raise FormatError(f"Huffman stream: {len(data)} bytes cannot hold {count} symbols of this code")
    out = np.empty(count, np.uint16)
    total = 8 * len(data)
    if walk is None:
        start = _walk_plainly(data, table_symbols, table_lengths, width, out)
    else:
        bits = _window(data, 0, total + width)
        start = walk(bits, table_symbols, table_lengths, out)
    if start > total:
        raise FormatError("Huffman stream: it ends in the middle of a code; the file is cut or corrupt")
    if total - start >= 8:
        raise FormatError("Huffman stream: bytes are left after the last symbol; the file is corrupt")
    return out


def _walk_plainly(
    data: bytes | memoryview, symbols: np.ndarray, lengths: np.ndarray, width: int, out: np.ndarray
) -> int:
    """Fill ``out``; return the bits that are used, more than there are where the stream is cut."""
    done = start = 0
    total, count = 8 * len(data), out.size
    while done < count and start <= total:
        bits = _window(data, start, min(CHUNK_BITS, total - start) + width)
        slots = _slots(bits, width)
        jumps = np.minimum(np.arange(slots.size) + lengths[slots], slots.size)
        steps = _chain(jumps, min(count - done, CHUNK_BITS // width))
        out[done : done + steps.size] = symbols[slots[steps]]
        done += steps.size
        start += int(steps[-1]) + int(lengths[slots[steps[-1]]])
    return start


def check_lengths(lengths: np.ndarray) -> None:
    """Check that lengths make a complete prefix code of at least two symbols.

    Raises:
        FormatError: Kraft's sum is not 1.
    """
    used = lengths[lengths > 0].astype(np.int64)
    if used.size < 2 or int((1 << (MOST_LENGTH - used)).sum()) != 1 << MOST_LENGTH:
        raise FormatError("Huffman code: the lengths make no complete prefix code; the file is corrupt")


def _limit(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Cut lengths to 15 bits and restore Kraft's equality, rare symbols first."""
    used = np.flatnonzero(lengths)
    limited = np.minimum(lengths, MOST_LENGTH)
    order = used[np.lexsort((used, counts[used]))]
    excess = int((1 << (MOST_LENGTH - limited[used])).sum()) - (1 << MOST_LENGTH)
    while excess > 0:
        # The rarest symbol that can still grow frees the least cost for half of its share.
        growing = order[limited[order] < MOST_LENGTH]
        chosen = growing[np.argmax(limited[growing])]
        excess -= 1 << (MOST_LENGTH - 1 - int(limited[chosen]))
        limited[chosen] += 1
    for symbol in order[::-1]:
        while limited[symbol] > 1 and (1 << (MOST_LENGTH - int(limited[symbol]))) <= -excess:
            excess += 1 << (MOST_LENGTH - int(limited[symbol]))
            limited[symbol] -= 1
    return limited


def _codes(lengths: np.ndarray) -> np.ndarray:
    """The canonical code of each symbol, from its length."""
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            code = code << (length - previous)
            codes[symbol], previous = code, length
            code += 1
    return codes


def _lookup(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Symbol and length for every possible run of ``width`` bits, the first bit most significant."""
    check_lengths(lengths)
    width = int(lengths.max())
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    repeats = 1 << (width - lengths[order].astype(np.int64))
    return np.repeat(order, repeats), np.repeat(lengths[order], repeats).astype(np.int64), width


def _window(data: bytes | memoryview, start: int, count: int) -> np.ndarray:
    """``count`` bits from bit ``start`` on, zeros after the end."""
    first = start // 8
    raw = np.frombuffer(data, np.uint8)[first : first + count // 8 + 2]
    bits = np.unpackbits(raw, bitorder="little")[start - 8 * first :]
    return np.concatenate([bits, np.zeros(max(0, count - bits.size), np.uint8)])[:count]


def _slots(bits: np.ndarray, width: int) -> np.ndarray:
    """The number that ``width`` bits make from every position on."""
    slots = np.zeros(bits.size - width + 1, np.int32)
    for position in range(width):
        slots = slots << 1 | bits[position : position + slots.size]
    return slots


def _chain(jumps: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions (fewer if the window ends) of 0, jumps[0], jumps[jumps[0]], …"""
    jumps = np.append(jumps, jumps.size)
    chain = np.zeros(1, np.int64)
    while chain.size < count:
        chain = np.concatenate([chain, jumps[chain]])
        if chain.size < count:
            jumps = jumps[jumps]
    chain = chain[:count]
    return chain[chain < jumps.size - 1]
