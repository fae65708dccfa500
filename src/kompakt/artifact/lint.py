"""What would go wrong with an ONNX file in a runtime, read off the file itself: where, what, and how to mend it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError

from kompakt.artifact.onnx import HEAVY_FLOAT_OPS, runtime_graph
from kompakt.artifact.stored import constants
from kompakt.errors import FormatError
from kompakt.numerics.grid import saturation_free

LAYERS = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
# ONNX Runtime: "all opsets from the latest released version of the ONNX spec", from 7 on; 1.32 knows ONNX 1.23's 26:
# https://onnxruntime.ai/docs/reference/compatibility.html#onnx-opset-support
# OpenVINO: its list of operators goes from version 1 to those of opset 23:
# https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/docs/supported_ops.md
# TensorRT 10: "operators from opset 9 to opset 22": https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md
OPSETS = {"onnxruntime": (7, 26), "openvino": (1, 23), "tensorrt": (9, 22)}
_REFUSED = {
    "onnxruntime": {"FLOAT4E2M1", "COMPLEX64", "COMPLEX128"},
    "openvino": {"FLOAT4E2M1", "COMPLEX64", "COMPLEX128", "STRING"},
    "tensorrt": {"UINT8", "UINT4", "INT16", "UINT16", "UINT32", "DOUBLE", "COMPLEX64", "COMPLEX128", "STRING"},
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that would differ or fail.

    Args:
        where: the node or tensor.
        what: what is wrong there.
        mend: what to do about it.
        rule: its kind: ``saturation``, ``float``, ``island``, ``opset``, ``type`` or ``tensorrt``.
    """

    where: str
    what: str
    mend: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class Read:
    """An ONNX file and what its names stand for."""

    model: onnx.ModelProto
    stored: dict[str, np.ndarray]
    makers: dict[str, onnx.NodeProto]


def read(path: Path) -> Read:
    """Load an ONNX file.

    Raises:
        FormatError: it is missing, truncated or something else.
    """
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise FormatError(f"{path}: not a sound ONNX file: {str(error).splitlines()[0][:200]}") from None
    makers = {name: node for node in model.graph.node for name in node.output}
    return Read(model=model, stored=constants(model), makers=makers)


def check_onnxruntime(path: Path) -> tuple[Finding, ...]:
    """Check for ONNX Runtime on any CPU."""
    file = read(path)
    return (*_general(file, "onnxruntime"), *saturation(file, depthwise=False), *fallbacks(path))


def check_openvino(path: Path) -> tuple[Finding, ...]:
    """Check an ONNX file for OpenVINO."""
    file = read(path)
    return (*_general(file, "openvino"), *saturation(file, depthwise=True), *islands(file))


def check_tensorrt(path: Path) -> tuple[Finding, ...]:
    """Check against TensorRT's rules of explicit quantization."""
    file = read(path)
    return (*_general(file, "tensorrt"), *explicit_int8(file), *islands(file))


def _general(file: Read, target: str) -> tuple[Finding, ...]:
    return (*opset(file, *OPSETS[target]), *types(file, _REFUSED[target], target))


def opset(file: Read, low: int, high: int) -> tuple[Finding, ...]:
    """Find an opset outside of what the runtime reads."""
    version = next((item.version for item in file.model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if low <= version <= high:
        return ()
    mend = f"export it again with opset 21, or convert it by onnx.version_converter to {high}"
    return (Finding(where="the file", what=f"opset {version}; it reads {low} to {high}", mend=mend, rule="opset"),)


def types(file: Read, refused: set[str], target: str) -> tuple[Finding, ...]:
    """Find stored tensors of a type that the runtime lacks."""
    name_of = onnx.TensorProto.DataType.Name
    return tuple(
        Finding(
            where=item.name,
            what=f"{name_of(item.data_type)}, which {target} does not run",
            mend=f"export the model by kompakt export --to {target}",
            rule="type",
        )
        for item in file.model.graph.initializer
        if name_of(item.data_type) in refused
    )


def saturation(file: Read, *, depthwise: bool) -> tuple[Finding, ...]:
    """Find s8 weights that, in pairs, times u8 activations, leave int16 (x86 without VNNI).

    Args:
        file: the file.
        depthwise: whether depthwise kernels sum in int16 too.
    """
    found = []
    for node, weight in integer_weights(file):
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        if (
            weight.dtype != np.int8
            or not _reads_uint8(file, node)
            or (weight.ndim == 4 and groups > 1 and not depthwise)
        ):
            continue
        rows = torch.from_numpy(weight.astype(np.int32))
        rows = rows.t() if node.op_type == "MatMul" else rows
        bad = int((~saturation_free(rows)).sum())
        if bad:
            what = f"{bad} of {len(rows)} channels can overflow int16 where u8 x s8 pairs are summed without VNNI"
            mend = (
                "quantize it by kompakt, or with 7-bit weights; in ONNX Runtime: session.x64quantprecision=1 (slower)"
            )
            found.append(Finding(where=node.name or node.output[0], what=what, mend=mend, rule="saturation"))
    return tuple(found)


def integer_weights(file: Read) -> list[tuple[onnx.NodeProto, np.ndarray]]:
    """List the layers whose weight is stored in integers, with the weight."""
    found = []
    for node in file.model.graph.node:
        maker = file.makers.get(node.input[1]) if node.op_type in LAYERS else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in file.stored:
            found.append((node, file.stored[maker.input[0]]))
        elif node.op_type in ("QLinearConv", "QLinearMatMul") and node.input[3] in file.stored:
            found.append((node, file.stored[node.input[3]]))
    return found


def _reads_uint8(file: Read, node: onnx.NodeProto) -> bool:
    zero = 2
    if node.op_type in LAYERS:
        maker = file.makers.get(node.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
        node = maker
    name = node.input[zero] if len(node.input) > zero else ""
    return name not in file.stored or file.stored[name].dtype == np.uint8


def islands(file: Read) -> tuple[Finding, ...]:
    """Find layers whose weight is stored in integers and whose input is float: they run in float."""
    return tuple(
        Finding(
            where=node.name or node.output[0],
            what=f"{node.op_type}: integer weight, float input: it is dequantized and multiplied in float",
            mend="quantize its input too: calibrate with data, and do not keep the layer before it in float",
            rule="island",
        )
        for node, _ in integer_weights(file)
        if node.op_type in LAYERS and not _dequantized(file, node.input[0])
    )


def _dequantized(file: Read, name: str) -> bool:
    moves = ("Reshape", "Flatten", "Transpose", "MaxPool", "Squeeze", "Unsqueeze", "Identity")
    maker = file.makers.get(name)
    while maker is not None and maker.op_type in moves:
        maker = file.makers.get(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"


def fallbacks(path: Path) -> tuple[Finding, ...]:
    """Find the heavy operators that ONNX Runtime left in float although the file has quantizers."""
    graph = runtime_graph(path).graph
    stored = {item.name: tuple(item.dims) for item in graph.initializer}
    if not any("QLinear" in node.op_type or node.op_type in ("QGemm", "DequantizeLinear") for node in graph.node):
        return ()
    return tuple(
        Finding(
            where=node.name or node.output[0],
            what=f"{node.op_type} runs in float ({prod(stored.get(node.input[1], (0,)))} weights)",
            mend="quantize its input and, for a convolution, its output; or leave it, if it was kept for accuracy",
            rule="float",
        )
        for node in graph.node
        if node.op_type in HEAVY_FLOAT_OPS
    )


def explicit_int8(file: Read) -> tuple[Finding, ...]:
    """Find what TensorRT's importer refuses: zero points, types, computed scales, integer biases."""
    found = []
    for node in file.model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        where, zero = node.name or node.output[0], file.stored.get(node.input[2]) if len(node.input) > 2 else None
        mend = "export it by kompakt export --to tensorrt: int8, symmetric, float biases"
        data = file.stored.get(node.input[0])
        if node.input[1] not in file.stored:
            found.append(Finding(where=where, what="its scale is computed at run time", mend=mend, rule="tensorrt"))
        elif not (file.stored[node.input[1]] > 0).all():
            found.append(Finding(where=where, what="its scale is not positive", mend=mend, rule="tensorrt"))
        if data is not None and data.dtype == np.int32:
            found.append(Finding(where=where, what="an int32 bias is dequantized", mend=mend, rule="tensorrt"))
        elif zero is None or zero.dtype != np.int8:
            kind = "uint8" if zero is None else str(zero.dtype)
            found.append(Finding(where=where, what=f"{kind} integers; TensorRT has int8", mend=mend, rule="tensorrt"))
        elif zero.any():
            found.append(Finding(where=where, what="its zero point is not 0", mend=mend, rule="tensorrt"))
    return tuple(found)
