"""Let integers be moved as integers: a slice or a pad between quantizers of one grid changes no value."""

import numpy as np
import onnx
from onnx import numpy_helper

from kompakt.artifact.pads import same_grid

PARTS, WITH_VALUE = 4, 3
"""Inputs of a Slice behind the data: starts, ends, axes, steps; inputs of a Pad of all axes."""


def move_integers(model: onnx.ModelProto) -> None:
    """Turn DequantizeLinear → Slice or Pad → QuantizeLinear into the Slice or Pad of the integers; join slices.

    Done where both quantizers have the same scale and zero point, the pad adds zeros, and nothing else reads what is
    between: what comes out is the same to the bit. ONNX Runtime would pad in float, and slice one axis after another.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type in ("Slice", "Pad")]:
        before, after = _maker(graph, node.input[0]), _reader(graph, node.output[0], outputs)
        if before is None or after is None or after.op_type != "QuantizeLinear" or not same_grid(before, after, stored):
            continue
        if node.op_type == "Pad" and not _zero_pad(node, stored):
            continue
        if node.op_type == "Pad":
            del node.input[2:]
            node.input.extend(before.input[2:])
        node.input[0], node.output[0] = before.input[0], after.output[0]
        graph.node.remove(after)
        if not any(before.output[0] in each.input for each in graph.node):
            graph.node.remove(before)
    _join_slices(graph, stored, outputs)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _maker(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if name in node.output), None)


def _reader(graph: onnx.GraphProto, name: str, outputs: set[str]) -> onnx.NodeProto | None:
    """Return the only reader of a value that is no output."""
    readers = [node for node in graph.node if name in node.input]
    return readers[0] if len(readers) == 1 and name not in outputs else None


def _zero_pad(pad: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    mode = next((item.s for item in pad.attribute if item.name == "mode"), b"constant")
    values = [stored.get(name) for name in pad.input[2:] if name]
    zero = all(value is not None and not numpy_helper.to_array(value).any() for value in values)
    return mode == b"constant" and len(pad.input) <= WITH_VALUE and zero


def _join_slices(graph: onnx.GraphProto, stored: dict[str, onnx.TensorProto], outputs: set[str]) -> None:
    """Make one of two slices of different axes that follow one another."""
    for first in [node for node in graph.node if node.op_type == "Slice"]:
        second = _reader(graph, first.output[0], outputs)
        if second is None or second.op_type != "Slice" or second.input[0] != first.output[0]:
            continue
        read = [[stored.get(name) for name in node.input[1:]] for node in (first, second)]
        if any(len(parts) != PARTS or None in parts for parts in read):
            continue
        (one, two) = [[numpy_helper.to_array(part) for part in parts if part is not None] for parts in read]
        if set(one[2].tolist()) & set(two[2].tolist()) or min(*one[2], *two[2]) < 0:
            continue
        for place, name in enumerate(("starts", "ends", "axes", "steps")):
            both = numpy_helper.from_array(np.concatenate([one[place], two[place]]), f"{second.name}_{name}")
            graph.initializer.append(both)
            stored[both.name] = both
            second.input[1 + place] = both.name
        second.input[0] = first.input[0]
        graph.node.remove(first)
