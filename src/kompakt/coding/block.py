"""Writing a block: several integer arrays, each coded the way that is smallest for it, in one stream.

FORMAT.md §4 is the specification; ``kompakt.coding.unblock`` reads blocks.
"""

from dataclasses import dataclass

import numpy as np

from kompakt.coding import huffman
from kompakt.coding.bitpack import pack
from kompakt.coding.bundle import Member, Tables
from kompakt.coding.choose import Choice, choose
from kompakt.coding.header import Coded, Entry, Huffman, Packed, write_entry
from kompakt.coding.kernels import to_taps
from kompakt.coding.models import SYMBOLS, histogram_codes, histogram_frequencies, write_histogram
from kompakt.coding.options import Integers, plain_entry
from kompakt.coding.rans import Call, capacity, coded_size, encode
from kompakt.coding.sides import side_call, side_symbols
from kompakt.coding.stream import encode_values, make_bundles
from kompakt.coding.tablesets import read_set
from kompakt.coding.wire import Cursor, varint

FINE_BITS, COARSE_BITS = 12, 10
FINE_RATE = 1.0
LANE_SHARE = 0.005
ENOUGH_LANES, MANY_LANES_LOG = 1024, 12  # more lanes than that gain little speed
LANE_BYTES = 0.8
SMALL_BLOCK = 2**14


@dataclass(frozen=True)
class _Coded:
    """What the coded section needs: its calls, the tables' bytes and the escapes."""

    calls: list[Call]
    tables: bytes
    bits: int


@dataclass(frozen=True)
class Block:
    """A block of which all but the coded section is written."""

    head: bytes
    rest: bytes
    section: _Coded | None = None
    lanes_log: int = 0
    hidden: bytes = b""

    @property
    def size(self) -> float:
        """About its bytes."""
        coded = coded_size(_payload_bits(self.section), self.lanes_log) if self.section else 0.0
        return len(self.head) + coded + len(self.rest)

    def write(self) -> bytes:
        """Its bytes."""
        section = self.section
        coded = encode(section.calls, self.lanes_log, section.bits, self.hidden) if section else b""
        return b"".join((self.head, coded, self.rest))


def encode_block(members: list[Integers]) -> bytes:
    """Code integer arrays together.

    Args:
        members: arrays of at most 2²⁰ values, each with a range below 2³².

    Returns:
        the block; it has the number of members and all parameters, but not their shapes and dtypes.
    """
    return min((block.write() for block in prepare_block(members)), key=len)


def prepare_block(members: list[Integers]) -> tuple[Block, ...]:
    """The ways to write a block of which the smallest is taken, before their coded sections are written."""
    choice = choose(members)
    found = _assemble(members, choice)
    if found.size > SMALL_BLOCK or not any(isinstance(entry, Coded) for entry in choice.entries):
        return (found,)
    # The tables and lanes of a coded section may cost a small block more than they save.
    plain = Choice(tuple(plain_entry(member.values)[0] for member in members))
    return found, _assemble(members, plain)


def _assemble(members: list[Integers], choice: Choice) -> Block:
    streams, raw = _plain_sections(members, choice)
    entries = b"".join(_entry_bytes(entry, streams.get(index)) for index, entry in enumerate(choice.entries))
    head = varint(len(members)) + entries
    if not any(isinstance(entry, Coded) for entry in choice.entries):
        return Block(varint(len(head)) + head, b"".join((*streams.values(), raw)))
    section = _code(members, choice)
    lanes_log = _lanes(section, len(raw))
    hidden = min(len(raw), capacity(1 << lanes_log, section.bits))
    head += section.tables
    rest = b"".join((*streams.values(), raw[hidden:]))
    return Block(varint(len(head)) + head, rest, section, lanes_log, raw[:hidden])


def _entry_bytes(entry: Entry, stream: bytes | None) -> bytes:
    if isinstance(entry, Huffman) and stream is not None:
        return write_entry(Huffman(entry.least, entry.lengths, len(stream)))
    return write_entry(entry)


def _plain_sections(members: list[Integers], choice: Choice) -> tuple[dict[int, bytes], bytes]:
    """Huffman streams by member, and the raw section."""
    streams: dict[int, bytes] = {}
    raw: list[bytes] = []
    for index, (member, entry) in enumerate(zip(members, choice.entries, strict=True)):
        if isinstance(entry, Packed):
            values = member.values.astype(np.int64) - entry.least if entry.least else member.values
            raw.append(pack(values, entry.bits))
        elif isinstance(entry, Huffman):
            symbols = member.values.reshape(-1).astype(np.int64) - entry.least
            streams[index] = huffman.encode(symbols, entry.lengths)
        elif isinstance(entry, Coded) and entry.shift:
            _, low = _split(member.values, entry)
            raw.append(pack(low, entry.shift))
    return streams, b"".join(raw)


def _split(values: np.ndarray, entry: Coded) -> tuple[np.ndarray, np.ndarray]:
    """The modelled part of values and their low bits."""
    centered = values.astype(np.int64) - entry.center
    half = 1 << entry.shift >> 1
    high = (centered + half) >> entry.shift
    return high, centered - (high << entry.shift) + half


def _code(members: list[Integers], choice: Choice) -> _Coded:
    coded = [(member, entry) for member, entry in zip(members, choice.entries, strict=True) if isinstance(entry, Coded)]
    models = [Member.of(entry, member.values.shape) for member, entry in coded]
    arrays = [_split(member.values, entry)[0] for member, entry in coded]
    # Many parametric tables of 2¹² slots do not fit the cache; few tables do, and low rates need them.
    parametric = any(not model.model.stored for model in models)
    return _calls(models, arrays, choice, COARSE_BITS if parametric and choice.rate >= FINE_RATE else FINE_BITS)


def _payload_bits(section: _Coded) -> float:
    return sum(section.bits * call.frequencies.size - float(np.log2(call.frequencies).sum()) for call in section.calls)


def _calls(models: list[Member], arrays: list[np.ndarray], choice: Choice, bits: int) -> _Coded:
    """All calls of the coded section under tables of 2^bits."""
    sets = tuple(read_set(Cursor(raw, "a set"), bits) for raw in choice.sets)
    tables = Tables(choice.shape, sets, bits)
    bundles = make_bundles(models, tables, SYMBOLS)
    for bundle in bundles:
        for index, part in bundle.parts:
            bundle.values[:, part] = to_taps(arrays[index], models[index].layout)
    calls, escapes = encode_values(bundles, tables)
    sides, side_bytes = [], b""
    for symbols in side_symbols(models):
        if symbols.size:
            first, codes = histogram_codes(np.bincount(symbols, minlength=256))
            side_bytes += write_histogram(first, codes)
            sides.append(side_call(symbols, histogram_frequencies(codes, first, bits)))
    stored = bytes([len(sets)]) + b"".join(choice.sets) + _write_escapes(escapes)
    return _Coded([*sides, *calls], bytes([bits, choice.shape]) + side_bytes + stored, bits)


def _write_escapes(escapes: np.ndarray) -> bytes:
    if not escapes.size:
        return b"\0"
    width = (int(np.abs(escapes).max()).bit_length() + 8) // 8
    raw = escapes.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    return bytes([width]) + varint(escapes.size) + raw


def _lanes(section: _Coded, raw_bytes: int) -> int:
    """How many lanes (their logarithm): what half a percent of the block buys; beyond 1024, an eighth."""
    size_bytes = _payload_bits(section) / 8 + raw_bytes
    most = max((call.frequencies.size for call in section.calls), default=1)
    found = 0
    while found < MANY_LANES_LOG and 1 << found < most:
        lanes = 2 << found
        unfilled = max(0, capacity(lanes, section.bits) - raw_bytes)
        share = LANE_SHARE if lanes <= ENOUGH_LANES else LANE_SHARE / 4
        if LANE_BYTES * lanes + unfilled > share * size_bytes:
            break
        found += 1
    return found
