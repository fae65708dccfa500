"""What an ONNX file stores: its constant tensors, and biases put back to float."""

import numpy as np
import onnx
from onnx import numpy_helper


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return every stored tensor, constants of nodes as well, by name."""
    found = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def float_biases(model: onnx.ModelProto) -> None:
    """Replace every dequantization of stored int32 integers by the floats that it gives."""
    stored, graph = constants(model), model.graph
    for node in [item for item in graph.node if item.op_type == "DequantizeLinear"]:
        integers = stored.get(node.input[0])
        if integers is not None and integers.dtype == np.int32:
            value = (integers * stored[node.input[1]]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)
