"""safetensors files to ``.kpk`` and back, byte for byte, one tensor in memory at a time.

pack_safetensors("model.safetensors", "model.kpk")
unpack_safetensors("model.kpk")  # the very same bytes
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from kompakt.artifact.splice import Span, pack_spans, unpack_bytes, view
from kompakt.coding.planes import KINDS
from kompakt.errors import FormatError

LENGTH_BYTES = 8
MOST_HEADER = 100_000_000
LEAST_BYTES = 16
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def pack_safetensors(source: str | Path | bytes, out: str | Path, metadata: dict[str, Any] | None = None) -> int:
    """Write a ``.kpk`` of a safetensors file; return its size in bytes.

    Raises:
        FormatError: the source is no safetensors file.
    """
    data = view(source)
    where = "the data" if isinstance(source, bytes) else str(source)
    return pack_spans(data, find_spans(data, where), out, "safetensors", metadata)


def unpack_safetensors(source: str | Path | bytes, *, max_bytes: int | None = None) -> bytes:
    """The safetensors file that a ``.kpk`` was packed from; for large ones use ``splice.unpack_file``."""
    return unpack_bytes(source, max_bytes=max_bytes)


def find_spans(data: memoryview, where: str) -> list[Span]:
    """The tensors of a safetensors file; small ones and unknown dtypes stay in the skeleton.

    Raises:
        FormatError: the header does not describe the file.
    """
    size = int.from_bytes(data[:LENGTH_BYTES], "little")
    first = LENGTH_BYTES + size
    if len(data) < LENGTH_BYTES or not 2 <= size <= min(MOST_HEADER, len(data) - LENGTH_BYTES):
        raise FormatError(f"{where}: not a safetensors file (its header does not fit)")
    try:
        header = json.loads(bytes(data[LENGTH_BYTES:first]))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        spans = [_span(name, entry, first) for name, entry in entries if entry["dtype"] in DTYPES]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{where}: not a safetensors file (its header cannot be read)") from None
    spans.sort(key=lambda span: span.start)
    at = first
    for span in spans:
        if not at <= span.start <= span.end <= len(data) or span.end - span.start != _size_bytes(span):
            raise FormatError(f"{where}: {span.name}: its offsets do not fit the file; the file is corrupt")
        at = span.end
    return [span for span in spans if span.end - span.start >= LEAST_BYTES and 0 < len(span.name) <= 1024]


def _span(name: str, entry: dict[str, Any], first: int) -> Span:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(name)
    return Span(first + start, first + end, name, DTYPES[entry["dtype"]], shape)


def _size_bytes(span: Span) -> int:
    return prod(span.shape) * KINDS[span.dtype].storage.itemsize
