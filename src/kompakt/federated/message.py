"""The bytes of an update: header, blocks, checksum. FORMAT.md §10 is the specification."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kompakt.coding.block import Block
from kompakt.coding.pieces import decode_pieces, encode_pieces, prepare_pieces
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError
from kompakt.federated.layout import HASH_BYTES, Piece, blocks_of

MAGIC, VERSION, RANDOM, SPARSE = b"\x89KPU", 1, 1, 2
CHECK_BYTES = 4
WHERE = "update"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the blocks.

    Args:
        base: hash of the base.
        shift: the step of statistics is 2 to the minus this.
        seed, places: what decides random places, and how many; None where all are sent.
        sparse: whether the weights are a section of their own, of those that are not zero.
    """

    base: bytes
    shift: int
    seed: int = 0
    places: int | None = None
    sparse: bool = False


def write_message(header: Header, held: list[Piece], arrays: Iterator[np.ndarray]) -> bytes:
    """Code a message; arrays are taken one block at a time.

    Args:
        header: what stands before the blocks.
        held: shape and dtype of each piece.
        arrays: the pieces.
    """
    return seal(header, write_pieces(held, arrays))


def write_pieces(held: list[Piece], arrays: Iterator[np.ndarray]) -> Iterator[bytes]:
    """The blocks of pieces, one in memory at a time."""
    return (encode_pieces(block) for block in _filled(held, arrays))


def seal(header: Header, blocks: Iterable[bytes]) -> bytes:
    """The message of some blocks."""
    return _sealed(_head(header), blocks)


@dataclass(frozen=True)
class Draft:
    """A message of which all but the coded sections is written.

    Args:
        head: what stands before the blocks.
        blocks: of each block the ways to write it.
    """

    head: bytes
    blocks: tuple[tuple[Block, ...], ...]

    @property
    def size(self) -> float:
        """About the bytes of the message."""
        sizes = [min(block.size for block in ways) for ways in self.blocks]
        return len(self.head) + CHECK_BYTES + sum(size + len(varint(int(size))) for size in sizes)

    def write(self) -> bytes:
        """The message."""
        return _sealed(self.head, (min(ways, key=lambda block: block.size).write() for ways in self.blocks))


def draft_message(header: Header, held: list[Piece], arrays: Iterator[np.ndarray]) -> Draft:
    """What ``write_message`` writes, with its size known before it is written; all of it is held in memory."""
    return Draft(_head(header), tuple(prepare_pieces(block) for block in _filled(held, arrays)))


def _sealed(head: bytes, blocks: Iterable[bytes]) -> bytes:
    whole = b"".join([head, *(part for data in blocks for part in (varint(len(data)), data))])
    return whole + zlib.crc32(whole).to_bytes(CHECK_BYTES, "little")


def _head(header: Header) -> bytes:
    out = [MAGIC, bytes([VERSION, RANDOM * (header.places is not None) + SPARSE * header.sparse]), header.base]
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
    flags = cursor.u8(SPARSE, "the flags")
    base = bytes(cursor.take(HASH_BYTES))
    seed, places = (cursor.fixed(8), cursor.varint(weights, "the number of places")) if flags == RANDOM else (0, None)
    shift = cursor.u8(15, "the step of statistics")
    return Header(base=base, shift=shift, seed=seed, places=places, sparse=flags == SPARSE), cursor


def read_blocks(cursor: Cursor, held: list[Piece]) -> Iterator[np.ndarray]:
    """Yield the pieces of a message, flat, one block in memory at a time.

    Raises:
        FormatError: a block is cut, does not fit the base, or is followed by more.
    """
    for number, block in enumerate(blocks_of(held)):
        where = f"{WHERE}: block {number}"
        yield from decode_pieces(cursor.take(cursor.varint(cursor.left, "the length of a block")), block, where)
    cursor.end()
