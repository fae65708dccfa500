"""The header and the index of a ``.kpk`` file: where everything is, read before anything is allocated.

FORMAT.md §1 is the specification.
"""

import json
import lzma
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kompakt.artifact.records import Record, read_record, write_record
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError

MAGIC = b"\x89KPK\r\n\x1a\n"
VERSION = 1
HEADER_BYTES = 32
STORED, DEFLATE, LZMA = range(3)
MOST_INDEX = 2**28
RATIO, SLACK = 1024, 1024
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}]


@dataclass(frozen=True)
class Block:
    """A block's place: its length, the number of its pieces and its CRC-32."""

    size_bytes: int
    pieces: int
    checksum: int


class Splice(NamedTuple):
    """Copy ``gap`` bytes of the skeleton, then the bytes of a record."""

    gap: int
    record: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """Everything about a file but its blocks' contents."""

    records: tuple[Record, ...] = ()
    blocks: tuple[Block, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    skeleton: bytes = b""
    splices: tuple[Splice, ...] = ()


def write_index(index: Index) -> bytes:
    """The index before compression."""
    metadata = json.dumps(index.metadata, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    raw = metadata.encode()
    out = [varint(len(raw)), raw, varint(len(index.records))]
    out += [write_record(record) for record in index.records]
    out.append(varint(len(index.blocks)))
    for block in index.blocks:
        out.append(varint(block.size_bytes) + varint(block.pieces) + block.checksum.to_bytes(4, "little"))
    out.append(varint(len(index.splices)))
    out += [varint(splice.gap) + varint(splice.record) for splice in index.splices]
    return b"".join((*out, varint(len(index.skeleton)), index.skeleton))


def read_index(raw: bytes, room: int, where: str) -> Index:
    """Read an index.

    Args:
        raw: its bytes, inflated.
        room: bytes between the header and the index, which the blocks fill.
        where: the file, for messages.

    Raises:
        FormatError: a field is out of range, or the blocks do not fill their room.
    """
    cursor = Cursor(raw, where)
    metadata = _read_metadata(cursor.take(cursor.varint(cursor.left, "the length of the metadata")), where)
    records = tuple(read_record(cursor) for _ in range(cursor.varint(cursor.left, "the number of records")))
    if len({record.name for record in records}) != len(records):
        raise FormatError(f"{where}: two records have one name; the file is corrupt")
    blocks = tuple(
        Block(cursor.varint(room, "the length of a block"), cursor.varint(2**20, "its pieces"), cursor.fixed(4))
        for _ in range(cursor.varint(cursor.left // 6, "the number of blocks"))
    )
    if sum(block.size_bytes for block in blocks) != room:
        raise FormatError(f"{where}: the blocks do not fill the room between header and index; the file is corrupt")
    splices = tuple(
        Splice(cursor.varint(len(raw), "a gap"), cursor.varint(max(0, len(records) - 1), "the record of a splice"))
        for _ in range(cursor.varint(cursor.left // 2, "the number of splices"))
    )
    skeleton = bytes(cursor.take(cursor.varint(cursor.left, "the length of the skeleton")))
    cursor.end()
    if sum(splice.gap for splice in splices) > len(skeleton) or (splices and not records):
        raise FormatError(f"{where}: splices reach beyond the skeleton; the file is corrupt")
    return Index(records=records, blocks=blocks, metadata=metadata, skeleton=skeleton, splices=splices)


def _read_metadata(raw: memoryview, where: str) -> dict[str, Any]:
    try:
        found = json.loads(bytes(raw), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: the metadata is not JSON; the file is corrupt") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: the metadata is no JSON object; the file is corrupt")
    return found


def _refuse(name: str) -> None:
    raise ValueError(name)


def compress(raw: bytes) -> bytes:
    """The method byte and the index in the smallest of the methods."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    options = [
        bytes([STORED]) + raw,
        bytes([DEFLATE]) + deflate.compress(raw) + deflate.flush(),
        bytes([LZMA]) + lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTERS),
    ]
    return min((found for found in options if len(raw) <= RATIO * len(found) + SLACK), key=len)


def inflate(stored: memoryview, size: int, where: str) -> bytes:
    """Undo ``compress``, to exactly ``size`` bytes.

    Raises:
        FormatError: it is not that long, or larger than a file of this length may claim.
    """
    if size > min(MOST_INDEX, RATIO * len(stored) + SLACK) or not stored:
        raise FormatError(f"{where}: an index of {size} bytes in {len(stored)} stored ones; the file is corrupt")
    method, data = stored[0], stored[1:]
    try:
        if method == STORED:
            raw, done = bytes(data), True
        elif method == DEFLATE:
            inflater = zlib.decompressobj(-15)
            raw = inflater.decompress(data, size + 1)
            done = inflater.eof and not inflater.unused_data
        elif method == LZMA:
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
            raw = unpacker.decompress(data, size + 1)
            done = unpacker.eof and not unpacker.unused_data
        else:
            raise FormatError(f"{where}: index method {method} is unknown; the file is corrupt or of another version")
    except (zlib.error, lzma.LZMAError, EOFError):
        raise FormatError(f"{where}: the index does not inflate; the file is corrupt") from None
    if len(raw) != size or not done:
        raise FormatError(f"{where}: the index is not {size} bytes long; the file is corrupt")
    return raw


def write_header(offset: int, stored: bytes, size: int) -> bytes:
    """The 32 bytes at the start of the file."""
    head = MAGIC + VERSION.to_bytes(2, "little") + bytes(2)
    head += len(stored).to_bytes(4, "little") + offset.to_bytes(8, "little") + size.to_bytes(4, "little")
    return head + zlib.crc32(stored, zlib.crc32(head)).to_bytes(4, "little")


def read_header(data: memoryview, where: str) -> tuple[int, bytes]:
    """Check the header of a whole file; return the offset of the index and the index, inflated.

    Raises:
        FormatError: it is no ``.kpk`` file, of another version, cut or damaged.
    """
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{where}: not a .kpk file (it does not begin as one)")
    head = Cursor(data[:HEADER_BYTES], where)
    head.take(len(MAGIC))
    version, flags = head.fixed(2), head.fixed(2)
    if version != VERSION or flags:
        raise FormatError(f"{where}: version {version}, flags {flags}; this kompakt reads version {VERSION}, flags 0")
    length, offset, size, checksum = head.fixed(4), head.fixed(8), head.fixed(4), head.fixed(4)
    if offset < HEADER_BYTES or offset + length != len(data):
        raise FormatError(f"{where}: {len(data)} bytes, {offset + length} expected; the file is cut or was appended to")
    stored = data[offset:]
    if zlib.crc32(stored, zlib.crc32(data[: HEADER_BYTES - 4])) != checksum:
        raise FormatError(f"{where}: the index is damaged (its checksum differs); fetch the file again")
    return offset, inflate(stored, size, where)
