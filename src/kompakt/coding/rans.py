"""Interleaved range ANS: many states step together, so that numpy decodes at memory speed.

Duda 2013 (1311.2540) gives the coder, Giesen 2014 (1402.3392) the interleaving. A state ``x`` of
``[2^2b, 2^(2b+32))`` pops a symbol of frequency f and cumulated frequency c out of M = 2^b by
``x ← f·(x >> b) + x mod M − c``; two symbols at most need one 32-bit word. The initial states carry
bytes of the caller, so that a lane costs about six bits. FORMAT.md §5 is the specification.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kompakt.coding.bitpack import pack, packed_size, unpack
from kompakt.coding.scalar import pop_call, push_calls
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError

MOST_LANES_LOG = 13
WORD_BITS = 32
FEW_TO_WRITE, FEW_TO_READ = 32, 8
STATE_BYTES = 5  # about what a lane's state takes, whatever it carries


@dataclass(frozen=True)
class Call:
    """Symbols that are coded together: their frequencies and cumulated frequencies, int64 arrays."""

    frequencies: np.ndarray
    starts: np.ndarray


def decoding_table(frequencies: np.ndarray) -> np.ndarray:
    """For every slot of every context: frequency (16 bits), symbol (8), slot − start (12), one int64.

    Args:
        frequencies: [contexts, 256]; each row sums to M, none equals M.

    Returns:
        int64 [contexts · M].
    """
    counts = frequencies.reshape(-1).astype(np.int64)
    total = int(frequencies[0].sum())
    symbols = np.repeat(np.tile(np.arange(256), len(frequencies)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = np.arange(len(frequencies) * total) - starts
    return np.repeat(counts, counts) | symbols << 16 | offsets << 24


def symbol_of(entries: np.ndarray) -> np.ndarray:
    """The symbols, uint8, of table entries as ``Reader.read`` returns them."""
    return (entries >> 16).astype(np.uint8)


def coded_size(payload_bits: float, lanes_log: int) -> float:
    """About the bytes of a coded section whose symbols take ``payload_bits``, without writing it."""
    return payload_bits / 8 + STATE_BYTES * (1 << lanes_log)


def capacity(lanes: int, bits: int) -> int:
    """Bytes that the initial states of ``lanes`` lanes can carry."""
    return (lanes - 1) * 2 * bits // 8


def encode(calls: list[Call], lanes_log: int, bits: int, payload: bytes) -> bytes:
    """Code calls, in the order in which they will be read; ``payload`` fits ``capacity``."""
    lanes = 1 << lanes_log
    states = _initial(lanes, bits, payload)
    if lanes <= FEW_TO_WRITE:
        plain = states.tolist()
        words = push_calls(plain, [(call.frequencies, call.starts) for call in calls], bits)
        states[:] = plain
    else:
        words = _push_wide(states, calls, bits)
    words = words.astype("<u4")
    return bytes([lanes_log]) + varint(words.size) + _write_states(states, bits) + words.tobytes()


class Reader:
    """Reads calls back; ``close`` checks the end and gives the payload.

    Args:
        cursor: stands at the coded section; is left behind it.
        bits: table bits b.

    Raises:
        FormatError: the section is cut or its states are out of range.
    """

    def __init__(self, cursor: Cursor, bits: int) -> None:
        self.bits = bits
        lanes = 1 << cursor.u8(MOST_LANES_LOG, "the number of lanes")
        self._count = cursor.varint(cursor.left // 4, "the number of words")
        self.states = _read_states(cursor, lanes, bits)
        # Zeros behind the words: compiled code may read one word for each lane before it looks where it is.
        self.words = np.zeros(self._count + lanes, np.uint32)
        self.words[: self._count] = np.frombuffer(cursor.take(4 * self._count), "<u4")
        self.at = 0
        self._scratch = np.empty(lanes, np.int64)
        self._hungry = np.empty(lanes, bool)
        # A Python number costs a microsecond in each operation, an array of no dimensions does not.
        constants = (bits, (1 << bits) - 1, 0xFFFF, 24, WORD_BITS)
        self._shift, self._mask, self._low, self._high, self._word = (np.array(value) for value in constants)
        self._floor = np.array(1 << 2 * bits)

    @property
    def round(self) -> int:
        """Symbols of a whole round; a call may be read in parts of whole rounds."""
        return 2 * self.states.size

    def refill(self, lanes: int) -> None:
        """Give the first ``lanes`` states their words; ends a round.

        Raises:
            FormatError: the words are used up.
        """
        self._refill(self.states[:lanes], self._hungry[:lanes])

    def read(self, contexts: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Pop one symbol for each context.

        Args:
            contexts: int64 [N], rows of the table, already shifted left by b.
            table: as ``decoding_table`` makes it.

        Returns:
            int64 [N], entries of the table.

        Raises:
            FormatError: the words are used up.
        """
        lanes = self.states.size
        if lanes <= FEW_TO_READ:
            return self._read_few(contexts, table)
        entries = np.empty(contexts.size, np.int64)
        whole = contexts.size // (2 * lanes) * 2 * lanes
        rounds = (-1, 2, lanes)
        pops = (self.states, self._scratch, table.take)
        for wanted, found in zip(contexts[:whole].reshape(rounds), entries[:whole].reshape(rounds), strict=True):
            self._pop(*pops, wanted[0], found[0])
            self._pop(*pops, wanted[1], found[1])
            self.refill(lanes)
        for start in range(whole, contexts.size, lanes):
            end = min(start + lanes, contexts.size)
            pops = (self.states[: end - start], self._scratch[: end - start], table.take)
            self._pop(*pops, contexts[start:end], entries[start:end])
        if whole < contexts.size:
            self.refill(min(contexts.size - whole, lanes))
        return entries

    def close(self) -> bytes:
        """Return the payload, ``capacity`` bytes.

        Raises:
            FormatError: words are left or a state is not where an encoder begins.
        """
        low = 1 << 2 * self.bits
        carried = self.states - low
        if self.at != self._count or carried[0] != 0 or bool((carried >> 2 * self.bits).any()):
            raise FormatError("coded section: the decoder does not end where an encoder begins; the file is corrupt")
        return pack(carried[1:], 2 * self.bits)[: capacity(carried.size, self.bits)]

    def _read_few(self, contexts: np.ndarray, table: np.ndarray) -> np.ndarray:
        # At most one word a lane and round is used.
        most = -(-contexts.size // self.round) * self.states.size
        left = self.words[self.at : min(self.at + most, self._count)].tolist()
        states, words = self.states.tolist(), iter(left)
        try:
            entries = pop_call(states, words, contexts, table, self.bits)
        except StopIteration:
            raise used_up() from None
        self.states[:] = states
        self.at += len(left) - len(list(words))
        return entries

    def _pop(
        self, states: np.ndarray, scratch: np.ndarray, take: Callable, wanted: np.ndarray, found: np.ndarray
    ) -> None:
        np.bitwise_and(states, self._mask, scratch)
        np.bitwise_or(scratch, wanted, scratch)
        take(scratch, None, found, "clip")
        np.right_shift(states, self._shift, states)
        np.bitwise_and(found, self._low, scratch)
        np.multiply(states, scratch, states)
        np.right_shift(found, self._high, scratch)
        np.add(states, scratch, states)

    def _refill(self, states: np.ndarray, hungry: np.ndarray) -> None:
        np.less(states, self._floor, hungry)
        places = hungry.nonzero()[0]
        end = self.at + places.size
        if end > self._count:
            raise used_up()
        states[places] = np.left_shift(states[places], self._word) | self.words[self.at : end]
        self.at = end


def used_up() -> FormatError:
    """The error of a stream that has fewer words than its symbols take."""
    return FormatError("coded section: its words are used up; the file is cut or corrupt")


def _initial(lanes: int, bits: int, payload: bytes) -> np.ndarray:
    """Initial states: lane 0 at the bottom, the others above it by what they carry."""
    padded = payload.ljust(packed_size(lanes - 1, 2 * bits), b"\0")
    carried = unpack(padded, 2 * bits, lanes - 1).astype(np.int64)
    return (1 << 2 * bits) + np.concatenate([np.zeros(1, np.int64), carried])


def _push_wide(states: np.ndarray, calls: list[Call], bits: int) -> np.ndarray:
    """Push calls, the last first; return the words in the order in which they are read."""
    blocks: list[np.ndarray] = []
    for call in reversed(calls):
        total, width = call.frequencies.size, 2 * states.size
        for start in reversed(range(0, total, width)):
            blocks.append(_push_round(states, call, start, min(start + width, total), bits))
    return np.concatenate([np.zeros(0, np.int64), *reversed(blocks)])


def _push_round(states: np.ndarray, call: Call, start: int, end: int, bits: int) -> np.ndarray:
    """Push the symbols start … end of a call (at most two a lane); return the words that leave."""
    lanes = states.size
    first = slice(start, min(start + lanes, end))
    used = first.stop - first.start
    frequencies = np.full(used, 1 << bits, np.int64)
    starts = np.zeros(used, np.int64)
    second = end - first.stop
    frequencies[:second], starts[:second] = call.frequencies[first.stop : end], call.starts[first.stop : end]
    x = states[:used]
    full = np.flatnonzero(x >= frequencies * call.frequencies[first] << WORD_BITS)
    words = x[full] & 0xFFFFFFFF
    x[full] >>= WORD_BITS
    for frequency, offset in ((frequencies, starts), (call.frequencies[first], call.starts[first])):
        # A division of floats is several times faster than one of integers; it errs by one at most.
        quotient = (x / frequency).astype(np.int64)
        rest = x - quotient * frequency
        quotient += (rest >= frequency).view(np.int8)
        quotient -= (rest < 0).view(np.int8)
        x += quotient * ((1 << bits) - frequency) + offset
    return words


def _write_states(states: np.ndarray, bits: int) -> bytes:
    low, high = states & (1 << 2 * bits) - 1, states >> 2 * bits
    sizes = 1 + (high > 0xFF).astype(np.int64) + (high > 0xFFFF) + (high > 0xFFFFFF)
    parts = [pack(low, 2 * bits), pack(sizes - 1, 2)]
    parts += [(high[sizes > position] >> 8 * position & 255).astype(np.uint8).tobytes() for position in range(4)]
    return b"".join(parts)


def _read_states(cursor: Cursor, lanes: int, bits: int) -> np.ndarray:
    low = unpack(cursor.take(packed_size(lanes, 2 * bits)), 2 * bits, lanes).astype(np.int64)
    sizes = unpack(cursor.take(packed_size(lanes, 2)), 2, lanes).astype(np.int64) + 1
    high = np.zeros(lanes, np.int64)
    for position in range(4):
        long = np.flatnonzero(sizes > position)
        high[long] |= np.frombuffer(cursor.take(long.size), np.uint8).astype(np.int64) << 8 * position
    if not high.all():
        raise FormatError("coded section: a state is below its range; the file is corrupt")
    return high << 2 * bits | low
