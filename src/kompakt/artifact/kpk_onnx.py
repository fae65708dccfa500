"""ONNX files to ``.kpk`` and back: the graph is kept, the weights are coded, the very same integers return.

    pack_onnx("model.onnx", "model.kpk")
    unpack_onnx("model.kpk")  # the very same bytes

The protobuf is walked, not parsed: large ``raw_data`` fields are cut out of the bytes, so a file returns
byte for byte, whatever wrote it and whatever operators it has. Only large weights in typed fields, or in a file of
their own, are first rewritten as ``raw_data``; then the model returns as that rewriting.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from kompakt.artifact.splice import NIBBLES, Span, pack_spans, unpack_bytes, view
from kompakt.coding.bitpack import packed_size
from kompakt.coding.planes import KINDS
from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError, InputError

LEAST_BYTES = 64
MOST_TYPED_BYTES = 1024  # more of it is rewritten as raw_data
MOST_NESTING = 32
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
# Fields of onnx.proto that lead to tensors: message, field number → message.
PATHS = {
    ("model", 7): "graph",
    ("model", 25): "function",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("function", 7): "node",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",
    ("attribute", 6): "graph",
    ("attribute", 10): "tensor",
    ("attribute", 11): "graph",
}
DIMS, DATA_TYPE, FLOATS, INT32S, INT64S, NAME, RAW_DATA, DOUBLES, UINT64S, LOCATION = 1, 2, 4, 5, 7, 8, 9, 10, 11, 14
TYPED = frozenset({FLOATS, INT32S, INT64S, DOUBLES, UINT64S})
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8_e4m3fn",
    19: "float8_e5m2",
    21: "uint4",
    22: "int4",
}


@dataclass
class _Tensor:
    """What the walk has seen of one tensor."""

    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    name: str = ""
    raw: tuple[int, int] | None = None
    typed_bytes: int = 0
    external: bool = False


def pack_onnx(source: str | Path | bytes, out: str | Path, metadata: dict[str, Any] | None = None) -> int:
    """Write a ``.kpk`` of an ONNX model; return its size in bytes.

    Raises:
        FormatError: the source is no ONNX model.
        InputError: its weights are in a file of their own that cannot be read.
    """
    data = view(source)
    where = "the data" if isinstance(source, bytes) else str(source)
    tensors = list(_tensors(data, where))
    if any(tensor.external or tensor.typed_bytes > MOST_TYPED_BYTES for tensor in tensors):
        data = memoryview(_with_raw_data(source, where))
        tensors = list(_tensors(data, where))
    return pack_spans(data, _spans(tensors), out, "onnx", metadata)


def unpack_onnx(source: str | Path | bytes, *, max_bytes: int | None = None) -> bytes:
    """The ONNX model that a ``.kpk`` was packed from; for large ones use ``splice.unpack_file``."""
    return unpack_bytes(source, max_bytes=max_bytes)


def _spans(tensors: list[_Tensor]) -> list[Span]:
    """The tensors that are worth a record, under unique names."""
    spans: list[Span] = []
    taken: set[str] = set()
    for number, tensor in enumerate(tensors):
        dtype = DTYPES.get(tensor.data_type)
        if tensor.raw is None or dtype is None or tensor.raw[1] - tensor.raw[0] < LEAST_BYTES:
            continue
        count = prod(tensor.dims)
        size = packed_size(count, 4) if dtype in NIBBLES else count * KINDS[dtype].storage.itemsize
        if size != tensor.raw[1] - tensor.raw[0]:
            continue
        plain = "".join(letter for letter in tensor.name if ord(letter) >= 32)[:512]
        name = plain if plain and plain not in taken else f"{plain or 'constant'}#{number}"
        taken.add(name)
        spans.append(Span(*tensor.raw, name, dtype, tuple(tensor.dims)))
    return spans


def _tensors(data: memoryview, where: str) -> Iterator[_Tensor]:
    """Every tensor of a serialized model, in the order of its bytes."""
    stack = [("model", 0, len(data), 0)]
    seen_graph = False
    while stack:
        message, start, end, depth = stack.pop()
        if message == "tensor":
            yield _read_tensor(data[start:end], start, where)
            continue
        if depth > MOST_NESTING:
            raise FormatError(f"{where}: graphs nested more than {MOST_NESTING} deep; not an ONNX model")
        inner = []
        for number, kind, a, b in _fields(data[start:end], where):
            target = PATHS.get((message, number))
            if target and kind == LENGTH:
                inner.append((target, start + a, start + b, depth + 1))
                seen_graph |= target == "graph"
        stack += reversed(inner)
    if not seen_graph:
        raise FormatError(f"{where}: not an ONNX model (it has no graph)")


def _read_tensor(data: memoryview, offset: int, where: str) -> _Tensor:
    found = _Tensor()
    for number, kind, a, b in _fields(data, where):
        if number == DIMS:
            found.dims += _numbers(data[a:b], where)
        elif number == DATA_TYPE:
            found.data_type = _numbers(data[a:b], where)[0]
        elif number == NAME:
            found.name = bytes(data[a:b]).decode("utf-8", "replace")
        elif number == RAW_DATA and kind == LENGTH:
            found.raw = offset + a, offset + b
        elif number in TYPED:
            found.typed_bytes += b - a
        elif number == LOCATION:
            found.external = _numbers(data[a:b], where) == [1]
    return found


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and place of each field of a message (varints include their bytes)."""
    cursor = Cursor(data, where)
    while cursor.left:
        tag = cursor.varint(2**32, "a field")
        number, kind = tag >> 3, tag & 7
        start = cursor.at
        if kind == VARINT:
            _skip_varint(cursor)
        elif kind == LENGTH:
            size = cursor.varint(cursor.left, "the length of a field")
            start = cursor.at
            cursor.take(size)
        elif kind in (FIXED64, FIXED32):
            cursor.take(8 if kind == FIXED64 else 4)
        else:
            raise FormatError(f"{where}: wire type {kind}; not an ONNX model")
        yield number, kind, start, cursor.at


def _skip_varint(cursor: Cursor) -> None:
    """Pass a varint of up to ten bytes: protobuf writes negative numbers that long."""
    for _ in range(10):
        if cursor.take(1)[0] < 128:
            return
    raise FormatError(f"{cursor.where}: a number of more than ten bytes; not an ONNX model")


def _numbers(data: memoryview, where: str) -> list[int]:
    cursor = Cursor(data, where)
    found = []
    while cursor.left:
        found.append(cursor.varint(2**48, "a dimension or type"))
    return found or [0]


def _with_raw_data(source: str | Path | bytes, where: str) -> bytes:
    """The model with all large tensors in ``raw_data``, serialized anew."""
    import onnx

    try:
        model = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data") and tensor.data_type in DTYPES:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
        return model.SerializeToString(deterministic=True)
    except Exception as error:
        raise InputError(f"{where}: its weights cannot be gathered in one file ({error})") from None
