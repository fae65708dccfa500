"""Files of tensors to ``.kpk`` and back, byte for byte: the tensors are cut out and coded, the rest is kept.

No schema is needed to restore a file: its skeleton and the places of the tensors suffice (FORMAT.md §7).
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kompakt.artifact.container import Reader, create
from kompakt.artifact.index import Splice
from kompakt.artifact.restore import restore_bits, restored_dtype
from kompakt.coding.bitpack import pack, unpack
from kompakt.coding.planes import KINDS
from kompakt.errors import FormatError, InputError
from kompakt.files import atomic_path

NIBBLES = ("uint4", "int4")
WRITE_BYTES = 2**24


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` … ``end`` of a file that are a tensor."""

    start: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def view(source: str | Path | bytes) -> memoryview:
    """The bytes of a file, mapped, or of memory.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    if isinstance(source, bytes):
        return memoryview(source)
    try:
        with open(source, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be read ({error})") from None


def pack_spans(
    data: memoryview, spans: list[Span], out: str | Path, kind: str, metadata: dict[str, Any] | None = None
) -> int:
    """Write a ``.kpk`` of a file's tensors and the rest of its bytes; return its size in bytes.

    Args:
        data: the file.
        spans: its tensors.
        out: the file to write, in one step.
        kind: "onnx" or "safetensors", for ``unpack``.
        metadata: what else to note.
    """
    skeleton, splices, at = [], [], 0
    with create(out) as writer:
        for number, span in enumerate(sorted(spans, key=lambda span: span.start)):
            skeleton.append(bytes(data[at : span.start]))
            splices.append(Splice(span.start - at, number))
            writer.lossless(span.name, _array(data[span.start : span.end], span), span.dtype)
            at = span.end
        skeleton.append(bytes(data[at:]))
        writer.close({**(metadata or {}), "skeleton": kind}, b"".join(skeleton), tuple(splices))
    return Path(out).stat().st_size


def unpack_file(source: str | Path | bytes, out: str | Path, *, max_bytes: int | None = None) -> None:
    """Write the file that a ``.kpk`` was packed from, in one step.

    Raises:
        FormatError: the ``.kpk`` is damaged, or holds no such file.
    """
    with Reader(source, max_bytes=max_bytes) as reader, atomic_path(out) as temporary, open(temporary, "wb") as file:
        for chunk in chunks(reader):
            for start in range(0, len(chunk), WRITE_BYTES):
                file.write(chunk[start : start + WRITE_BYTES])


def unpack_bytes(source: str | Path | bytes, *, max_bytes: int | None = None) -> bytes:
    """The file that a ``.kpk`` was packed from.

    Raises:
        FormatError: the ``.kpk`` is damaged, or holds no such file.
    """
    with Reader(source, max_bytes=max_bytes) as reader:
        return b"".join(bytes(chunk) for chunk in chunks(reader))


def kind_of(source: str | Path | bytes) -> str:
    """What ``unpack`` makes of a ``.kpk``: "onnx", "safetensors", or "" if it holds no skeleton."""
    with Reader(source) as reader:
        found = reader.metadata.get("skeleton", "")
        return found if isinstance(found, str) else ""


def chunks(reader: Reader) -> Iterator[memoryview]:
    """The restored file, piece by piece.

    Raises:
        FormatError: there is no skeleton, or a record cannot be spliced.
    """
    if not reader.index.skeleton:
        raise FormatError(f"{reader.where}: holds tensors but no file to restore; read them by name")
    skeleton, at = memoryview(reader.index.skeleton), 0
    for splice in reader.index.splices:
        yield skeleton[at : at + splice.gap]
        at += splice.gap
        yield _bytes(reader, splice.record)
    yield skeleton[at:]


def _array(data: memoryview, span: Span) -> np.ndarray:
    """The values of a span in their storage dtype."""
    storage = KINDS[span.dtype].storage
    if span.dtype in NIBBLES:
        values = unpack(data, 4, int(np.prod(span.shape, dtype=np.int64)))
        return (
            (np.where(values > 7, values.astype(np.int16) - 16, values) if span.dtype == "int4" else values)
            .astype(storage)
            .reshape(span.shape)
        )
    return np.frombuffer(data, storage).reshape(span.shape)


def _bytes(reader: Reader, number: int) -> memoryview:
    """The bytes of a record as they stood in the file."""
    record = reader.index.records[number]
    if record.kind == "uniform":
        raise FormatError(f"{reader.where}: {record.name}: a uniform record stands in no file; the file is corrupt")
    bits = restore_bits(record, reader.parts(record.name))
    if restored_dtype(record) in NIBBLES:
        return memoryview(pack(bits.reshape(-1) & 15, 4))
    return memoryview(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
