"""Let convolutions pad for themselves: a Pad between integers would run in float."""

import onnx
from onnx import numpy_helper

Nodes = dict[str, onnx.NodeProto]


def absorb_pads(model: onnx.ModelProto) -> None:
    """Turn DequantizeLinear → Pad → QuantizeLinear → DequantizeLinear → Conv into one Conv with ``pads``.

    Done where the pad adds zeros to the image, both quantizers have the same scale and zero point, so
    that padding changes no value, and nothing else reads what is between.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made: Nodes = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        chain = _chain(graph, pad, outputs)
        before = made.get(pad.input[0])
        amounts = _amounts(pad, stored)
        if chain is None or before is None or amounts is None or not same_grid(before, chain[0], stored):
            continue
        rounding, back, conv = chain
        _widen(conv, amounts)
        conv.input[0] = pad.input[0]
        for node in (pad, rounding, back):
            graph.node.remove(node)


def _chain(graph: onnx.GraphProto, pad: onnx.NodeProto, outputs: set[str]) -> list[onnx.NodeProto] | None:
    """Return the nodes behind a pad if each is the only reader of the one before."""
    found, name = [], pad.output[0]
    for kind in ("QuantizeLinear", "DequantizeLinear", "Conv"):
        readers = [node for node in graph.node if name in node.input]
        if name in outputs or len(readers) != 1 or readers[0].op_type != kind or readers[0].input[0] != name:
            return None
        found.append(readers[0])
        name = readers[0].output[0]
    return found


def _amounts(pad: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> list[int] | None:
    """Return (top, left, bottom, right) of a pad that adds zeros to the image alone."""
    mode = next((item.s for item in pad.attribute if item.name == "mode"), b"constant")
    given = [stored.get(name) for name in pad.input[1:] if name]
    if mode != b"constant" or None in given or len(given) > 2 or not given:
        return None
    values = [numpy_helper.to_array(tensor) for tensor in given if tensor is not None]
    if len(values) == 2 and values[1].any():
        return None
    amounts = [int(value) for value in values[0].reshape(-1)]
    around = (*amounts[:2], *amounts[4:6])
    return [*amounts[2:4], *amounts[6:]] if len(amounts) == 8 and not any(around) and min(amounts) >= 0 else None


def same_grid(a: onnx.NodeProto, b: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Whether two quantizers have the same scale and zero point."""
    if a.op_type != "DequantizeLinear" or len(a.input) != len(b.input):
        return False
    pairs = [(stored.get(x), stored.get(y)) for x, y in zip(a.input[1:], b.input[1:], strict=True)]
    return all(x is not None and y is not None and _equal(x, y) for x, y in pairs)


def _equal(x: onnx.TensorProto, y: onnx.TensorProto) -> bool:
    return numpy_helper.to_array(x).tobytes() == numpy_helper.to_array(y).tobytes()


def _widen(conv: onnx.NodeProto, amounts: list[int]) -> None:
    """Add to a convolution's own padding."""
    own = next((item for item in conv.attribute if item.name == "pads"), None)
    pads = [a + b for a, b in zip(amounts, own.ints if own is not None else (0, 0, 0, 0), strict=True)]
    if own is not None:
        conv.attribute.remove(own)
    conv.attribute.append(onnx.helper.make_attribute("pads", pads))
