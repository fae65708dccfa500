"""Bytes on disk, and what an ONNX file's weights really are, by the types that it stores."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from kompakt.errors import FormatError, InputError

# Bits of one value where ONNX packs several into a byte; all other types follow from their size.
_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the initializers of an ONNX file hold.

    Args:
        values: type name (``FLOAT``, ``INT8``, ``INT4`` …) → number of weight values of that type.
        weight_bits: bits of all weight values.
        overhead_bits: bits of the scales and zero points that come with them.
    """

    values: dict[str, int] = field(default_factory=dict)
    weight_bits: int = 0
    overhead_bits: int = 0

    @property
    def params(self) -> int:
        """The number of weight values."""
        return sum(self.values.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight, scales and zero points included."""
        return (self.weight_bits + self.overhead_bits) / self.params if self.params else 0.0


def size_bytes(path: str | Path) -> int:
    """Count the bytes of an artifact: a whole folder, or a file with the files it refers to.

    An ONNX file may keep tensors in external data files beside it; these are counted, each once.

    Raises:
        InputError: there is nothing at ``path``.
        FormatError: an ONNX file cannot be read, or names external data that is not there.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    beside = _external_files(path) if path.suffix == ".onnx" else []
    if path.suffix == ".xml":  # OpenVINO keeps the weights in a file of the same name
        beside = [file for file in [path.with_suffix(".bin")] if file.is_file()]
    return path.stat().st_size + sum(file.stat().st_size for file in beside)


def weight_bits(path: str | Path) -> Stored:
    """Read off an ONNX file how many weights it stores, of which type.

    Weights are the floating-point initializers, the integers of at most 8 bits, and the wider
    integers that a ``DequantizeLinear`` reads as data (biases). Scales and zero points, which are
    known by the quantizers that read them, count as overhead; shapes and indices do not count.
    ``MatMulNBits`` packs its weights in bytes: they count with their true number and width.

    Raises:
        FormatError: the file is not ONNX.
    """
    model = _load(Path(path))
    values: Counter[str] = Counter()
    total = {"weight": 0, "overhead": 0}
    for graph in _graphs(model.graph):
        roles, packed = _roles(graph), _packed(graph)
        for name, kind, shape in _tensors(graph):
            count, width, label = packed.get(name) or (prod(shape), _width(kind), kind)
            role = roles.get(name) or ("weight" if width <= 8 or _is_float(kind) else "")
            if role:
                total[role] += count * width
            if role == "weight":
                values[label] += count
    return Stored(values=dict(values), weight_bits=total["weight"], overhead_bits=total["overhead"])


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except DecodeError:
        raise FormatError(f"{path}: this is not an ONNX file") from None
    if not model.HasField("graph"):
        raise FormatError(f"{path}: this is not an ONNX file: it holds no graph")
    return model


def _external_files(path: Path) -> list[Path]:
    """The external data files of an ONNX file, each once."""
    found: dict[Path, None] = {}
    for graph in _graphs(_load(path).graph):
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
                found[path.parent / location] = None
    for file in found:
        if not file.is_file():
            raise FormatError(f"{path}: its external data file {file.name} is missing; keep the two together")
    return list(found)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies of its ifs and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(body)


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of every initializer and constant."""
    for tensor in graph.initializer:
        yield tensor.name, onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], onnx.TensorProto.DataType.Name(attribute.t.data_type), tuple(attribute.t.dims)


def _roles(graph: onnx.GraphProto) -> dict[str, str]:
    """For tensors that quantizers read: ``weight`` for the data, ``overhead`` for scale and zero point."""
    roles: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _QUANTIZERS:
            roles |= dict.fromkeys(node.input[1:3], "overhead")
            if node.op_type == "DequantizeLinear":
                roles[node.input[0]] = "weight"
        elif node.op_type == "MatMulNBits":
            roles |= dict.fromkeys(node.input[2:4], "overhead")
    return roles


def _packed(graph: onnx.GraphProto) -> dict[str, tuple[int, int, str]]:
    """Weights of MatMulNBits: number of values, bits of each, name of the type."""
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            number = {attribute.name: attribute.i for attribute in node.attribute}
            bits = number.get("bits", 4)
            found[node.input[1]] = (number["N"] * number["K"], bits, f"UINT{bits}")
    return found


def _is_float(kind: str) -> bool:
    return "FLOAT" in kind or kind == "DOUBLE"


def _width(kind: str) -> int:
    """Bits of one value of an ONNX type."""
    if kind in _PACKED_BITS:
        return _PACKED_BITS[kind]
    if kind == "STRING":
        return 64
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind)).itemsize
