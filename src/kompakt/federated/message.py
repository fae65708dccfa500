"""The bytes of an update: header, blocks, checksum. FORMAT.md §10 is the specification."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kompakt.coding.pieces import decode_pieces, encode_pieces, size_pieces
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError
from kompakt.federated.layout import HASH_BYTES, Piece, blocks_of

MAGIC, VERSION, RANDOM = b"\x89KPU", 1, 1
CHECK_BYTES = 4
WHERE = "update"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the blocks.

    Args:
        base: hash of the base.
        shift: the step of statistics is 2 to the minus this.
        seed, places: what decides random places, and how many; None where all are sent.
    """

    base: bytes
    shift: int
    seed: int = 0
    places: int | None = None


def write_message(header: Header, held: list[Piece], arrays: Iterator[np.ndarray]) -> bytes:
    """Code a message; arrays are taken one block at a time.

    Args:
        header: what stands before the blocks.
        held: shape and dtype of each piece.
        arrays: the pieces.
    """
    out = [_head(header)]
    for block in _filled(held, arrays):
        data = encode_pieces(block)
        out += [varint(len(data)), data]
    whole = b"".join(out)
    return whole + zlib.crc32(whole).to_bytes(CHECK_BYTES, "little")


def message_size(header: Header, held: list[Piece], arrays: Iterator[np.ndarray]) -> float:
    """About the bytes of ``write_message``, in a part of its time."""
    return len(_head(header)) + CHECK_BYTES + sum(size_pieces(block) + 2 for block in _filled(held, arrays))


def _head(header: Header) -> bytes:
    out = [MAGIC, bytes([VERSION, RANDOM if header.places is not None else 0]), header.base]
    if header.places is not None:
        out += [header.seed.to_bytes(8, "little"), varint(header.places)]
    return b"".join([*out, bytes([header.shift])])


def _filled(held: list[Piece], arrays: Iterator[np.ndarray]) -> Iterator[list[tuple[np.ndarray, str]]]:
    for block in blocks_of(held):
        yield [(array, dtype) for array, (_, dtype) in zip(islice(arrays, len(block)), block, strict=True)]


def read_header(data: bytes, weights: int) -> tuple[Header, Cursor]:
    """Check the frame of a message; return its header and the place of its blocks.

    Args:
        data: the message.
        weights: how many weights the base has, one by one.

    Raises:
        FormatError: it is no update, of another version, cut or damaged.
    """
    if len(data) < len(MAGIC) + 2 + HASH_BYTES + 1 + CHECK_BYTES or data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{WHERE}: not an update (it does not begin as one, or is cut)")
    body = memoryview(data)[:-CHECK_BYTES]
    if zlib.crc32(body) != int.from_bytes(data[-CHECK_BYTES:], "little"):
        raise FormatError(f"{WHERE}: damaged or cut (its checksum differs); ask for it again")
    cursor = Cursor(body, WHERE)
    cursor.take(len(MAGIC))
    version = cursor.u8()
    if version != VERSION:
        raise FormatError(f"{WHERE}: version {version}; this kompakt reads version {VERSION}")
    random = cursor.u8(RANDOM, "the flags")
    base = bytes(cursor.take(HASH_BYTES))
    seed, places = (cursor.fixed(8), cursor.varint(weights, "the number of places")) if random else (0, None)
    return Header(base=base, shift=cursor.u8(15, "the step of statistics"), seed=seed, places=places), cursor


def read_blocks(cursor: Cursor, held: list[Piece]) -> Iterator[np.ndarray]:
    """Yield the pieces of a message, flat, one block in memory at a time.

    Raises:
        FormatError: a block is cut, does not fit the base, or is followed by more.
    """
    for number, block in enumerate(blocks_of(held)):
        where = f"{WHERE}: block {number}"
        yield from decode_pieces(cursor.take(cursor.varint(cursor.left, "the length of a block")), block, where)
    cursor.end()
