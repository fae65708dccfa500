"""Store what fits into 4 bits in 4 bits: indices of codebooks, and integers that are asked for so."""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def pack_nibbles(model: onnx.ModelProto) -> None:
    """Store two to a byte the indices of codebooks of up to 16 values, in place.

    ONNX Runtime looks the values up once, when a session opens; what is multiplied is float.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if tensor is not None and tensor.data_type == TensorProto.UINT8:
            _narrow(tensor, TensorProto.UINT4, 0, 15)


def pack_weights(model: onnx.ModelProto) -> None:
    """Store two to a byte, as INT4, the weights and zero points whose integers lie in −8 … 7, in place.

    ONNX Runtime has no kernel that multiplies 4-bit integers in a convolution: such a layer runs in float, behind
    its DequantizeLinear. What shrinks is the file.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        names = [name for name in (node.input[0], *node.input[2:3]) if name in stored]
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored or len(names) < len(node.input) - 1:
            continue
        tensors = [stored[name] for name in names]
        if all(tensor.data_type == TensorProto.INT8 and _fits(tensor, -8, 7) for tensor in tensors):
            for tensor in tensors:
                _narrow(tensor, TensorProto.INT4, -8, 7)


def _fits(tensor: TensorProto, low: int, high: int) -> bool:
    values = numpy_helper.to_array(tensor)
    return not values.size or (int(values.min()) >= low and int(values.max()) <= high)


def _narrow(tensor: TensorProto, kind: int, low: int, high: int) -> None:
    """Rewrite an initializer with two values to a byte, the first in the low half, where all of them fit."""
    if not _fits(tensor, low, high):
        return
    halves = numpy_helper.to_array(tensor).astype(np.int16).reshape(-1) & 15
    halves = np.append(halves, [0] * (len(halves) % 2)).astype(np.uint8)
    packed = (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)
    made = TensorProto(name=tensor.name, data_type=kind, dims=tensor.dims, raw_data=packed.tobytes())
    tensor.CopyFrom(made)
