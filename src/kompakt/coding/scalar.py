"""The rounds of ``rans`` for few lanes, in plain integers: numpy's calls cost more than the arithmetic there.

The bytes are those of the wide rounds; FORMAT.md §5 is the specification of both.
"""

from collections.abc import Iterator

import numpy as np

WORD_BITS = 32
WORD = (1 << WORD_BITS) - 1


def push_call(states: list[int], frequencies: np.ndarray, starts: np.ndarray, bits: int) -> list[list[int]]:
    """Push the symbols of one call; return the words of its rounds, the last round first.

    Args:
        states: one for each lane, changed in place.
        frequencies: int64 [N].
        starts: int64 [N], cumulated frequencies.
        bits: table bits.
    """
    lanes, total = len(states), frequencies.size
    sizes, offsets = frequencies.tolist(), starts.tolist()
    rounds = []
    for start in reversed(range(0, total, 2 * lanes)):
        words = []
        for lane in range(min(lanes, total - start)):
            first, second = start + lane, start + lanes + lane
            x, f = states[lane], sizes[first]
            g = sizes[second] if second < total else 1 << bits
            if x >= f * g << WORD_BITS:
                words.append(x & WORD)
                x >>= WORD_BITS
            if second < total:
                quotient, rest = divmod(x, g)
                x = (quotient << bits) + rest + offsets[second]
            quotient, rest = divmod(x, f)
            states[lane] = (quotient << bits) + rest + offsets[first]
        rounds.append(words)
    return rounds


def pop_call(states: list[int], words: Iterator[int], contexts: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """Pop one symbol for each context, as ``rans.Reader.read``; a word too many raises StopIteration.

    Args:
        states: one for each lane, changed in place.
        words: those not yet used.
        contexts: int64 [N], rows of the table, shifted left by the table bits.
        table: as ``rans.decoding_table`` makes it.
        bits: table bits.
    """
    lanes, rows, look = len(states), contexts.tolist(), table.item
    total, mask, floor = len(rows), (1 << bits) - 1, 1 << 2 * bits
    found = [0] * total
    for start in range(0, total, 2 * lanes):
        for lane in range(min(lanes, total - start)):
            x = states[lane]
            for place in (start + lane, start + lanes + lane):
                if place < total:
                    entry = look(rows[place] | x & mask)
                    x = (x >> bits) * (entry & 0xFFFF) + (entry >> 24)
                    found[place] = entry
            states[lane] = x << WORD_BITS | next(words) if x < floor else x
    return np.array(found, np.int64)
