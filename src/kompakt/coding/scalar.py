"""The rounds of ``rans`` for few lanes, in plain integers: numpy's calls cost more than the arithmetic there.

The bytes are those of the wide rounds; FORMAT.md §5 is the specification of both.
"""

from collections.abc import Iterator

import numpy as np

WORD_BITS = 32
WORD = (1 << WORD_BITS) - 1


def push_calls(states: list[int], calls: list[tuple[np.ndarray, np.ndarray]], bits: int) -> np.ndarray:
    """Push the symbols of calls, one lane after another; return the words in the order in which they are read.

    Args:
        states: one for each lane, changed in place.
        calls: in the order in which they are read: int64 [N] each, frequencies and cumulated frequencies.
        bits: table bits.
    """
    lanes = len(states)
    sizes = _rounds([size for size, _ in calls], 1 << bits, lanes)
    starts = _rounds([start for _, start in calls], 0, lanes)
    limits, rests = sizes[:, 0] * sizes[:, 1] << WORD_BITS, (1 << bits) - sizes
    words: list[int] = []
    places: list[int] = []
    for lane, x in enumerate(states):
        parts = [limits[:, lane], *(part[:, index, lane] for index in (1, 0) for part in (sizes, rests, starts))]
        numbers = range((len(limits) - 1) * lanes + lane, -1, -lanes)
        columns = (part[::-1].tolist() for part in parts)
        for place, limit, second, second_rest, second_start, first, first_rest, first_start in zip(
            numbers, *columns, strict=True
        ):
            if x >= limit:
                words.append(x & WORD)
                places.append(place)
                x >>= WORD_BITS
            # x // f · M + x mod f + c
            x += x // second * second_rest + second_start
            x += x // first * first_rest + first_start
        states[lane] = x
    return np.array(words, np.int64)[np.argsort(np.array(places, np.int64))]


def _rounds(calls: list[np.ndarray], missing: int, lanes: int) -> np.ndarray:
    """Values in rounds of two a lane, [rounds, 2, lanes]; each call begins a round and is filled up."""
    filled = [np.zeros(0, np.int64)]
    filled += [part for call in calls for part in (call, np.full(-call.size % (2 * lanes), missing, np.int64))]
    return np.concatenate(filled).reshape(-1, 2, lanes)


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
