"""Reading ``.kpk`` files at random; ``kompakt.artifact.container`` is the public face."""

import mmap
import zlib
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from kompakt.artifact.index import HEADER_BYTES, read_header, read_index
from kompakt.artifact.records import Part
from kompakt.artifact.restore import restore, restored_dtype, restored_shape
from kompakt.coding.pieces import decode_pieces
from kompakt.coding.planes import KINDS, pieces
from kompakt.errors import FormatError, InputError

BASE_BYTES, RATIO = 2**28, 4096


class Reader:
    """A ``.kpk`` file, open: its index is read and checked, its tensors are decoded when asked for.

    ``records`` has the records by name, in the order of the file.

    Args:
        source: a path, or the bytes of a file.
        max_bytes: the most that the tensors may take in memory, all together; by default 256 MiB and
            4096 times the file's size.

    Raises:
        FormatError: it is no ``.kpk`` file, or damaged, or claims too much.
    """

    def __init__(self, source: str | Path | bytes, *, max_bytes: int | None = None) -> None:
        self.where = "the data" if isinstance(source, bytes) else str(source)
        self._map = None if isinstance(source, bytes) else _map(Path(source))
        self._data = memoryview(source if isinstance(source, bytes) else self._map or b"")
        try:
            offset, raw = read_header(self._data, self.where)
            self.index = read_index(raw, offset - HEADER_BYTES, self.where)
            self._limit = BASE_BYTES + RATIO * len(self._data) if max_bytes is None else max_bytes
            self._check_size()
            self.records = {record.name: record for record in self.index.records}
            self._places = self._locate()
        except FormatError:
            self.close()
            raise
        self._cached: tuple[int, list[np.ndarray]] | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        # An error on its way up still refers to slices of the file; it is then closed with the last of them.
        with suppress(BufferError):
            self._data.release()
            if self._map is not None:
                self._map.close()

    @property
    def metadata(self) -> dict[str, Any]:
        """What the writer noted about the model."""
        return self.index.metadata

    def parts(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a record by role, in their storage dtypes.

        Raises:
            InputError: there is no such record.
            FormatError: its blocks are damaged.
        """
        if name not in self.records:
            raise InputError(f"{self.where}: there is no tensor {name}; it has {', '.join(self.records) or 'none'}")
        return {role: self._part(part, (name, role)) for role, part in self.records[name].parts.items()}

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of a record: integers as they are, uniform ones made real in float32."""
        return restore(self.records[name], self.parts(name)) if name in self.records else self.parts(name)["data"]

    def _part(self, part: Part, key: tuple[str, str]) -> np.ndarray:
        places = self._places[key]
        if len(places) == 1:
            block, place = places[0]
            return self._block(block)[place].astype(KINDS[part.dtype].storage).reshape(part.shape)
        found = np.empty(part.size, KINDS[part.dtype].storage)
        start = 0
        for block, place in places:
            piece = self._block(block)[place]
            found[start : start + piece.size] = piece
            start += piece.size
        return found.reshape(part.shape)

    def _block(self, number: int) -> list[np.ndarray]:
        """The pieces of a block, flat; the last block asked for is kept."""
        if self._cached is None or self._cached[0] != number:
            self._cached = None
            self._cached = number, self._decode(number)
        return self._cached[1]

    def _decode(self, number: int) -> list[np.ndarray]:
        block, where = self.index.blocks[number], f"{self.where}: block {number}"
        data = self._data[self._starts[number] :][: block.size_bytes]
        if zlib.crc32(data) != block.checksum:
            raise FormatError(f"{where} is damaged (its checksum differs); fetch the file again")
        return decode_pieces(data, self._contents[number], where)

    def _check_size(self) -> None:
        """Compare what the tensors take, stored and restored, with the limit."""
        total = 0
        for record in self.index.records:
            total += record.size_bytes
            if record.kind in ("uniform", "codebook", "sparse"):
                total += prod(restored_shape(record)) * KINDS[restored_dtype(record)].storage.itemsize
        if total > self._limit:
            raise FormatError(
                f"{self.where}: its tensors take {total} bytes, more than {self._limit}; pass max_bytes if you trust it"
            )

    def _locate(self) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """Block and place of each piece of each part."""
        self._starts = [HEADER_BYTES]
        for block in self.index.blocks:
            self._starts.append(self._starts[-1] + block.size_bytes)
        slots = ((b, i) for b, block in enumerate(self.index.blocks) for i in range(block.pieces))
        self._contents: list[list[tuple[tuple[int, ...], str]]] = [[] for _ in self.index.blocks]
        places: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for record in self.index.records:
            for role, part in record.parts.items():
                found = places[record.name, role] = []
                for shape in pieces(part.shape):
                    slot = next(slots, None)
                    if slot is None:
                        raise FormatError(f"{self.where}: {record.name}: its blocks are missing; the file is corrupt")
                    self._contents[slot[0]].append((shape, part.dtype))
                    found.append(slot)
        if next(slots, None) is not None:
            raise FormatError(f"{self.where}: there are more blocks than tensors; the file is corrupt")
        return places


def _map(path: Path) -> mmap.mmap | None:
    """The file in memory, read as it is needed."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
