"""Writing ``.kpk`` files block by block; ``kompakt.artifact.container`` is the public face."""

import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kompakt.artifact.index import HEADER_BYTES, Block, Index, Splice, compress, write_header, write_index
from kompakt.artifact.records import Part, Record, few_values, ordered, to_bits
from kompakt.coding.pieces import encode_pieces
from kompakt.coding.planes import KINDS, pieces
from kompakt.errors import InputError
from kompakt.files import atomic_path
from kompakt.spec import QuantSpec

BLOCK_VALUES = 2**21
MOST_THREADS, WAITING = 4, 2
SPARSE_SHARE = 0.5


class Writer:
    """Adds records to a file, one after the other; ``close`` writes the index.

    Args:
        file: opened for writing at its start; must be seekable.
        pool: codes blocks side by side, where there is one; the bytes are the same.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor | None = None) -> None:
        self._file = file
        self._pool = pool
        self._waiting: deque[tuple[Future[bytes], int]] = deque()
        self._records: dict[str, Record] = {}
        self._blocks: list[Block] = []
        self._pieces: list[tuple[np.ndarray, str]] = []
        self._values = 0
        self.closed = False
        file.write(bytes(HEADER_BYTES))
        self._end = HEADER_BYTES

    def raw(self, name: str, data: bytes) -> int:
        """Add bytes; like all that add, return the record's number."""
        return self._add(name, "raw", {"data": (np.frombuffer(data, np.uint8), "uint8")})

    def dense(self, name: str, array: np.ndarray, dtype: str | None = None) -> int:
        """Add an array that returns bit for bit; ``dtype`` names what numpy cannot, such as bfloat16."""
        return self._add(name, "dense", {"data": to_bits(array, dtype)})

    def uniform(
        self, name: str, codes: np.ndarray, scale: np.ndarray, spec: QuantSpec, zero_point: np.ndarray | None = None
    ) -> int:
        """Add uniform integers and what makes them real: ``scale · (codes − zero_point)``.

        Raises:
            InputError: a code is not within the spec's range.
        """
        if codes.size and not spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax:
            raise InputError(f"{name}: codes {codes.min()}…{codes.max()} are not within {spec.qmin}…{spec.qmax}")
        parts = {"codes": to_bits(codes), "scale": to_bits(scale)}
        if zero_point is not None:
            parts["zero_point"] = to_bits(zero_point)
        return self._add(name, "uniform", parts, spec)

    def codebook(self, name: str, indices: np.ndarray, codebook: np.ndarray, dtype: str | None = None) -> int:
        """Add indices into a codebook (or one row of it a channel); near indices should mean near values."""
        return self._add(name, "codebook", {"indices": to_bits(indices), "codebook": to_bits(codebook, dtype)})

    def sparse(self, name: str, array: np.ndarray, dtype: str | None = None) -> int:
        """Add an array most of which is zero (in all its bits)."""
        bits, found = to_bits(array, dtype)
        mask = bits != 0
        return self._add(name, "sparse", {"mask": (mask.astype(np.uint8), "uint8"), "values": (bits[mask], found)})

    def lossless(self, name: str, array: np.ndarray, dtype: str | None = None) -> int:
        """Add an array bit for bit, as dense, codebook or sparse, whichever its values suggest."""
        bits, found = to_bits(array, dtype)
        if KINDS[found].fields:
            values = few_values(bits)
            if values is not None:
                indices = np.searchsorted(ordered(values), ordered(bits)).astype(np.uint8)
                return self._add(name, "codebook", {"indices": (indices, "uint8"), "codebook": (values, found)})
            if np.count_nonzero(bits) <= SPARSE_SHARE * bits.size:
                return self.sparse(name, bits, found)
        return self._add(name, "dense", {"data": (bits, found)})

    def close(
        self, metadata: dict[str, Any] | None = None, skeleton: bytes = b"", splices: tuple[Splice, ...] = ()
    ) -> None:
        """Write the last block, the index and the header."""
        self._flush()
        while self._waiting:
            self._write_next()
        index = Index(
            records=tuple(self._records.values()),
            blocks=tuple(self._blocks),
            metadata=metadata or {},
            skeleton=skeleton,
            splices=splices,
        )
        raw = write_index(index)
        stored = compress(raw)
        self._file.write(stored)
        self._file.seek(0)
        self._file.write(write_header(self._end, stored, len(raw)))
        self.closed = True

    def _add(
        self, name: str, kind: str, arrays: dict[str, tuple[np.ndarray, str]], spec: QuantSpec | None = None
    ) -> int:
        if name in self._records:
            raise InputError(f"{name}: the file has a record of this name; names are unique")
        parts = {role: Part(dtype, array.shape) for role, (array, dtype) in arrays.items()}
        self._records[name] = Record(name=name, kind=kind, parts=parts, spec=spec)
        for array, dtype in arrays.values():
            flat, start = array.reshape(-1), 0
            for shape in pieces(array.shape):
                end = start + prod(shape)
                self._piece(flat[start:end].reshape(shape), dtype)
                start = end
        return len(self._records) - 1

    def _piece(self, piece: np.ndarray, dtype: str) -> None:
        # A copy: the block is coded later, and the caller may reuse the array.
        self._pieces.append((piece.copy(), dtype))
        self._values += piece.size * max(1, len(KINDS[dtype].fields))
        if self._values >= BLOCK_VALUES:
            self._flush()

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces, self._values = self._pieces, [], 0
            if self._pool is None:
                self._write(encode_pieces(pieces), len(pieces))
            else:
                self._waiting.append((self._pool.submit(encode_pieces, pieces), len(pieces)))
                if len(self._waiting) > WAITING:
                    self._write_next()

    def _write_next(self) -> None:
        future, count = self._waiting.popleft()
        self._write(future.result(), count)

    def _write(self, data: bytes, pieces: int) -> None:
        self._file.write(data)
        self._blocks.append(Block(len(data), pieces, zlib.crc32(data)))
        self._end += len(data)


@contextmanager
def create(path: str | Path, *, threads: int | None = None, **closing: Any) -> Iterator[Writer]:
    """Yield a writer of a new file that takes the place of ``path`` when the block ends well.

    Args:
        path: the file.
        threads: how many blocks are coded side by side; by default one a core, at most 4.
        closing: what ``Writer.close`` takes; leave it out if the block closes the writer itself.
    """
    count = min(MOST_THREADS, os.cpu_count() or 1) if threads is None else threads
    with atomic_path(path) as temporary, open(temporary, "w+b") as file, ThreadPoolExecutor(max(1, count)) as pool:
        writer = Writer(file, pool if count > 1 else None)
        yield writer
        if not writer.closed:
            writer.close(**closing)
