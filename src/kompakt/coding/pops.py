"""Popping symbols of a coded section's stream, for numba. Compiled code checks no bounds.

``kompakt.coding.rans`` has the same in numpy.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from kompakt.coding.rans import WORD_BITS

SPAN = 2048  # symbols of one context that are read together
# Innermost loops have unsigned numbers alone: numba looks for negative indices and makes mixed signs floats.
WORD = np.uint64(WORD_BITS)
SYMBOL_BITS, FREQUENCY_AT, OFFSET_MASK = np.uint32(8), np.uint32(20), np.uint32(0xFFF)


class Stream(NamedTuple):
    """A stream as arrays alone.

    Args:
        bits: table bits.
        states: of the lanes, uint64.
        words: those of the stream and one more for each lane, uint32.
        places: words used, symbols read of a round, and escapes used, those that are missing among them, int64.
    """

    bits: int
    states: np.ndarray
    words: np.ndarray
    places: np.ndarray


BYTES, WORDS, STATES = types.uint8[::1], types.uint32[::1], types.uint64[::1]
STREAM = types.NamedTuple((types.int64, STATES, WORDS, types.int64[::1]), Stream)


@njit(WORDS(types.Array(types.int64, 2, "C", readonly=True), types.int64), cache=True, nogil=True)
def make_table(frequencies: np.ndarray, bits: int) -> np.ndarray:
    """For every slot of every context: frequency (12 bits), slot − start (12), symbol (8).

    Args:
        frequencies: [contexts, 256]; each row sums to M, none equals M.
        bits: table bits.
    """
    table = np.empty(len(frequencies) << bits, np.uint32)
    for context in range(len(frequencies)):
        row, slot = table[context << bits : (context + 1) << bits], 0
        for symbol in range(256):
            frequency = min(frequencies[context, symbol], row.size - slot)
            for offset in range(frequency):
                row[slot + offset] = frequency << 20 | offset << 8 | symbol
            slot += frequency
    return table


@njit
def pop(stream: Stream, table: np.ndarray, contexts: np.ndarray, found: np.ndarray) -> bool:
    """Pop a symbol for each context, from where in a round the last one stood; False without words."""
    places, states, words, lanes = stream.places, stream.states, stream.words, np.uint64(stream.states.size)
    bits, one = np.uint64(stream.bits), np.uint64(1)
    mask, floor = (one << bits) - one, one << bits + bits
    done, count, turn, place = np.uint64(0), np.uint64(contexts.size), np.uint64(places[1]), np.uint64(places[0])
    # No slices: a round of a few lanes takes less time than making one.
    while done < count:
        lane = turn & lanes - one
        size = min(lanes - lane, count - done)
        if turn < lanes:
            for i in range(size):
                x = states[lane + i]
                entry = table[np.uint64(contexts[done + i]) | x & mask]
                frequency, offset = np.uint64(entry >> FREQUENCY_AT), np.uint64(entry >> SYMBOL_BITS & OFFSET_MASK)
                states[lane + i] = (x >> bits) * frequency + offset
                found[done + i] = np.uint8(entry)
        else:
            for i in range(size):
                x = states[lane + i]
                entry = table[np.uint64(contexts[done + i]) | x & mask]
                frequency, offset = np.uint64(entry >> FREQUENCY_AT), np.uint64(entry >> SYMBOL_BITS & OFFSET_MASK)
                x = (x >> bits) * frequency + offset
                found[done + i] = np.uint8(entry)
                # A word for every lane, taken or not: a branch would be guessed wrong half of the time.
                filled = x << WORD | np.uint64(words[place])
                states[lane + i] = filled if x < floor else x
                place += np.uint64(x < floor)
            if place + lanes > np.uint64(words.size):
                return False
        done += size
        turn = turn + size if turn + size < lanes + lanes else np.uint64(0)
    places[0], places[1] = place, turn
    return True


@njit
def end_call(stream: Stream) -> bool:
    """Give words to the lanes that took part in a round that is not whole; False without words."""
    turn, lanes, states = stream.places[1], stream.states.size, stream.states
    floor = np.uint64(1) << np.uint64(2 * stream.bits)
    for lane in range(max(0, turn - lanes), min(turn, lanes)):
        if states[lane] < floor:
            states[lane] = states[lane] << WORD | np.uint64(stream.words[min(stream.places[0], stream.words.size - 1)])
            stream.places[0] += 1
    stream.places[1] = 0
    return stream.places[0] + lanes <= stream.words.size


@njit(types.boolean(STREAM, WORDS, BYTES), cache=True, nogil=True)
def read_row(stream: Stream, table: np.ndarray, found: np.ndarray) -> bool:
    """A call of one context; False without words."""
    contexts = np.zeros(min(SPAN, found.size), np.uint32)
    for first in range(0, found.size, SPAN):
        part = found[first : first + SPAN]
        if not pop(stream, table, contexts[: part.size], part):
            return False
    return end_call(stream)


@njit(types.int64(BYTES, types.int64[::1], types.int64[::1], types.uint16[::1]), cache=True, nogil=True)
def walk(bits: np.ndarray, symbols: np.ndarray, lengths: np.ndarray, found: np.ndarray) -> int:
    """Read symbols of a prefix code; return the bits that are used, more than there are where the stream is cut.

    Args:
        bits: 0 or 1 each, and behind the stream as many zeros as the longest code has.
        symbols, lengths: for every possible run of so many bits, the first the most significant.
        found: what is filled.
    """
    width, place = 0, 0
    while 1 << width < symbols.size:
        width += 1
    for i in range(found.size):
        if place + width > bits.size:
            break
        slot = 0
        for bit in bits[place : place + width]:
            slot = slot << 1 | bit
        found[i] = symbols[slot]
        place += lengths[slot]
    return place
