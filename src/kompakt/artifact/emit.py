"""Write the graph of an ordinary network as ONNX node by node, in milliseconds.

The exporter of torch captures and decomposes the model anew, which takes seconds and, for the operators of
convolutional networks, changes nothing. ``emit`` writes those as they stand; where it meets another it gives up and the
caller takes torch's exporter.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from kompakt.artifact import qdq
from kompakt.graph.trace import attribute

aten = torch.ops.aten
OPSET, IR_VERSION = 21, 10
LAST = 2**63 - 1


class _Unknown(Exception):
    """A node that is not written here."""


def emit(
    module: fx.GraphModule, forms: Mapping[Any, "Form"] | None = None, domains: Mapping[str, int] = MappingProxyType({})
) -> onnx.ModelProto | None:
    """Write a graph module of ATen and ``kompakt::`` operators as an ONNX model.

    Args:
        module: what ``to_integers`` returns; its inputs and outputs carry fake values (``meta["val"]``).
        forms: operator, or class of a module that is called → what writes it; ``FORMS`` by default.
        domains: other domains than ONNX's own whose operators are written → their versions.

    Returns:
        The model, with a symbolic batch where the module has one; None where it holds an operator, or a use of one,
        that is not written here.
    """
    writer = Writer(module, FORMS if forms is None else forms)
    try:
        for node in module.graph.nodes:
            writer.write(node)
    except _Unknown:
        return None
    graph = helper.make_graph(writer.nodes, "main", writer.inputs, writer.outputs, list(writer.stored.values()))
    opsets = [helper.make_operatorsetid(name, version) for name, version in {"": OPSET, **domains}.items()]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="kompakt")


class Writer:
    """Collects the parts of an ONNX graph; the name of a node's value is the node's own."""

    def __init__(self, module: fx.GraphModule, forms: Mapping[Any, "Form"]) -> None:
        self.module, self.forms = module, forms
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.stored: dict[str, TensorProto] = {}

    def write(self, node: fx.Node) -> None:
        """Write one node of the graph."""
        if node.op == "placeholder":
            self.inputs.append(_declared(node.name, node))
        elif node.op == "get_attr":
            self.store(str(node.name), attribute(self.module, str(node.target)).detach().cpu().contiguous().numpy())
        elif node.op == "output":
            self._finish(node)
        elif node.target is not aten.sym_size.int:  # read where a shape asks for the batch
            called = node.op == "call_module"
            form = self.forms.get(type(self.module.get_submodule(str(node.target))) if called else node.target)
            if form is None or node.kwargs:
                raise _Unknown
            form(self, node, {} if called else _bound(node))

    def _finish(self, node: fx.Node) -> None:
        returned = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
        for value in returned:
            if (
                not isinstance(value, fx.Node)
                or not value.op.startswith("call_")
                or len(set(returned)) != len(returned)
            ):
                raise _Unknown
            self.outputs.append(_declared(value.name, value))

    def store(self, name: str, value: np.ndarray) -> str:
        """Add an initializer."""
        self.stored[name] = numpy_helper.from_array(value, name)
        return name

    def constant(self, node: fx.Node, name: str, value: Sequence[int] | float) -> str:
        """Add an initializer that belongs to one node: integers of a shape, or a float."""
        kind = np.float32 if isinstance(value, float) else np.int64
        return self.store(f"{node.name}_{name}", np.array(value, dtype=kind))

    def add(self, kind: str, inputs: Sequence[Any], output: str, **attributes: Any) -> str:
        """Add a node; inputs are nodes, names, or None for one that is left out."""
        names = [item.name if isinstance(item, fx.Node) else item or "" for item in inputs]
        while names and not names[-1]:
            names.pop()
        self.nodes.append(helper.make_node(kind, names, [output], name=f"node_{output}", **attributes))
        return output


Arguments = dict[str, Any]
Form = Callable[[Writer, fx.Node, Arguments], object]


def _bound(node: fx.Node) -> Arguments:
    """Return a node's arguments by the names of the operator's schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {
        item.name: node.args[place] if place < len(node.args) else item.default_value
        for place, item in enumerate(schema)
    }


def _value(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise _Unknown
    return value


def _declared(name: str, node: fx.Node) -> onnx.ValueInfoProto:
    """Declare an input or output; a symbolic batch is called ``batch``."""
    value = _value(node)
    if value.dtype != torch.float32 or any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
        raise _Unknown
    shape = [size if isinstance(size, int) else "batch" for size in value.shape]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _plain(kind: str, *operands: str) -> Form:
    """An operator whose ONNX form takes the same tensors and nothing else."""

    def form(writer: Writer, node: fx.Node, given: Arguments) -> None:
        tensors = [given[name] for name in operands]
        if not all(isinstance(item, fx.Node) for item in tensors) or given.get("alpha", 1) != 1:
            raise _Unknown
        writer.add(kind, tensors, node.name)

    return form


def _conv(writer: Writer, node: fx.Node, given: Arguments) -> None:
    pads = [*given["padding"]] * 2
    if len(pads) != 4:
        raise _Unknown
    writer.add(
        "Conv", [given["input"], given["weight"], given["bias"]], node.name,
        strides=given["stride"], pads=pads, dilations=given["dilation"], group=given["groups"],
    )  # fmt: skip


def _linear(writer: Writer, node: fx.Node, given: Arguments) -> None:
    if _value(node).ndim != 2:
        raise _Unknown
    writer.add("Gemm", [given["input"], given["weight"], given["bias"]], node.name, transB=1)


def _clip(writer: Writer, node: fx.Node, given: Arguments) -> None:
    low, high = (given.get(f"{name}_val", given.get(name)) for name in ("min", "max"))
    ends = [
        None if end is None else writer.constant(node, name, float(end))
        for name, end in (("min", low), ("max", high))
        if not isinstance(end, fx.Node)
    ]
    if len(ends) != 2:
        raise _Unknown
    writer.add("Clip", [given["self"], *ends], node.name)


def _clip6(writer: Writer, node: fx.Node, given: Arguments) -> None:
    _clip(writer, node, {**given, "min": 0.0, "max": 6.0})


def _silu(writer: Writer, node: fx.Node, given: Arguments) -> None:
    gate = writer.add("Sigmoid", [given["self"]], f"{node.name}_gate")
    writer.add("Mul", [given["self"], gate], node.name)


def _cat(writer: Writer, node: fx.Node, given: Arguments) -> None:
    writer.add("Concat", given["tensors"], node.name, axis=given["dim"])


def _max_pool(writer: Writer, node: fx.Node, given: Arguments) -> None:
    shape = {"kernel_shape": _two(given["kernel_size"]), "strides": _two(given["stride"] or given["kernel_size"])}
    shape |= {"pads": _two(given["padding"]) * 2, "dilations": _two(given["dilation"])}
    writer.add("MaxPool", [given["self"]], node.name, ceil_mode=int(given["ceil_mode"]), **shape)


def _avg_pool(writer: Writer, node: fx.Node, given: Arguments) -> None:
    if given["divisor_override"] is not None or given["ceil_mode"]:
        raise _Unknown
    shape = {"kernel_shape": _two(given["kernel_size"]), "strides": _two(given["stride"] or given["kernel_size"])}
    counts = int(given["count_include_pad"])
    writer.add(
        "AveragePool", [given["self"]], node.name, pads=_two(given["padding"]) * 2, count_include_pad=counts, **shape
    )


def _two(size: Sequence[int]) -> list[int]:
    return [*size] if len(size) == 2 else [*size] * 2


def _batch_norm(writer: Writer, node: fx.Node, given: Arguments) -> None:
    read = [given[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    if given["training"] or not all(isinstance(item, fx.Node) for item in read):
        raise _Unknown
    writer.add("BatchNormalization", read, node.name, epsilon=given["eps"])


def _flatten(writer: Writer, node: fx.Node, given: Arguments) -> None:
    if given["start_dim"] != 1 or given["end_dim"] not in (-1, _rank(given["self"]) - 1):
        raise _Unknown
    writer.add("Reshape", [given["self"], writer.constant(node, "shape", [0, -1])], node.name)


def _rank(node: fx.Node) -> int:
    return _value(node).ndim if "val" in node.meta else 0


def _reshape(writer: Writer, node: fx.Node, given: Arguments) -> None:
    first, *others = given["size"] if "size" in given else given["shape"]
    if isinstance(first, fx.Node):
        if first.target is not aten.sym_size.int or str(first.meta.get("val")) != str(_value(node).shape[0]):
            raise _Unknown
        first = -1  # what the other sizes leave
        if -1 in others:
            if str(_value(given["self"]).shape[0]) != str(_value(node).shape[0]):
                raise _Unknown
            first = 0  # ONNX: the input's own
    if any(isinstance(size, fx.Node) for size in others) or 0 in others:
        raise _Unknown
    writer.add("Reshape", [given["self"], writer.constant(node, "shape", [first, *others])], node.name)


def _pad(writer: Writer, node: fx.Node, given: Arguments) -> None:
    pads, value, rank = given["pad"], given["value"] or 0.0, _value(node).ndim
    if given.get("mode", "constant") != "constant" or not isfinite(value) or any(isinstance(n, fx.Node) for n in pads):
        raise _Unknown
    whole = [*pads, *[0] * (2 * rank - len(pads))]
    amounts = writer.constant(node, "pads", [*whole[-2::-2], *whole[::-2]])
    writer.add("Pad", [given["self"], amounts, writer.constant(node, "value", float(value))], node.name)


def _slice(writer: Writer, node: fx.Node, given: Arguments) -> None:
    bounds = {"start": given["start"] or 0, "end": LAST if given["end"] is None else given["end"]}
    bounds |= {"dim": given["dim"], "step": given["step"]}
    if any(isinstance(bound, fx.Node) for bound in bounds.values()):
        raise _Unknown
    read = [writer.constant(node, name, [bounds[name]]) for name in ("start", "end", "dim", "step")]
    writer.add("Slice", [given["self"], *read], node.name)


def _permute(writer: Writer, node: fx.Node, given: Arguments) -> None:
    rank = _value(node).ndim
    if "dims" in given:
        order = [dim % rank for dim in given["dims"]]
    else:
        order = list(range(rank))
        a, b = given["dim0"] % rank, given["dim1"] % rank
        order[a], order[b] = b, a
    writer.add("Transpose", [given["self"]], node.name, perm=order)


def _dequantize(writer: Writer, node: fx.Node, given: Arguments) -> None:
    per_axis = given["scale"].op == "get_attr" and attribute(writer.module, str(given["scale"].target)).ndim == 1
    more = {"axis": given["axis"]} if per_axis else {}
    writer.add("DequantizeLinear", [given["q"], given["scale"], given["zero_point"]], node.name, **more)


def _dequantize_blocks(writer: Writer, node: fx.Node, given: Arguments) -> None:
    read = [given["q"], given["scale"], given["zero_point"]]
    writer.add("DequantizeLinear", read, node.name, axis=given["axis"], block_size=given["size"])


def _lookup(writer: Writer, node: fx.Node, given: Arguments) -> None:
    index = writer.add("Cast", [given["indices"]], f"{node.name}_index", to=TensorProto.INT32)
    writer.add("Gather", [given["values"], index], node.name)


def _lookup_rows(writer: Writer, node: fx.Node, given: Arguments) -> None:
    index = writer.add("Cast", [given["indices"]], f"{node.name}_index", to=TensorProto.INT32)
    writer.add("GatherElements", [given["values"], index], node.name, axis=1)


FORMS: dict[Any, Form] = {
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.matmul.default: _plain("MatMul", "self", "other"),
    aten.add.Tensor: _plain("Add", "self", "other"),
    aten.mul.Tensor: _plain("Mul", "self", "other"),
    aten.relu.default: _plain("Relu", "self"),
    aten.sigmoid.default: _plain("Sigmoid", "self"),
    aten.contiguous.default: _plain("Identity", "self"),
    aten.silu.default: _silu,
    aten.hardtanh.default: _clip,
    aten.relu6.default: _clip6,
    aten.clamp.default: _clip,
    aten.cat.default: _cat,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.batch_norm.default: _batch_norm,
    aten.flatten.using_ints: _flatten,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    qdq.global_average_pool_op._opoverload: _plain("GlobalAveragePool", "x"),
    qdq.quantize_op._opoverload: _plain("QuantizeLinear", "x", "scale", "zero_point"),
    qdq.dequantize_op._opoverload: _dequantize,
    qdq.dequantize_blocks_op._opoverload: _dequantize_blocks,
    qdq.lookup_op._opoverload: _lookup,
    qdq.lookup_rows_op._opoverload: _lookup_rows,
}
"""Operator → what writes it."""
