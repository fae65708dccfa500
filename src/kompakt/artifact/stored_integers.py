"""Put stored integers and ``kompakt::`` operators in the place of what rounds a tensor in a graph."""

import torch
from torch import Tensor, fx

from kompakt.build.layers import Codebook, Quantizer, TwoValues
from kompakt.graph.trace import attribute
from kompakt.numerics.grid import SMALLEST_SCALE, quantize
from kompakt.spec import PerChannel, PerGroup

INDICES = "_indices"
"""Ends the names of stored indices into codebooks."""


def store_weight(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> None:
    """Replace a rounded weight by its integers."""
    weight = attribute(module, str(node.args[0].target))
    granularity = made.spec.granularity
    kind = torch.int8 if made.spec.signed else torch.uint8
    integers = quantize(weight, made.scale, made.zero_point, made.spec).to(kind)
    if isinstance(granularity, PerGroup):
        _store_groups(module, node, integers, made, granularity.size)
        return
    axis = granularity.axis if isinstance(granularity, PerChannel) else 0
    store(module, node, integers, made.scale, made.zero_point.to(kind), axis)


def _store_groups(module: fx.GraphModule, node: fx.Node, integers: Tensor, made: Quantizer, size: int) -> None:
    """Replace a weight by integers in rows, dequantized by blocks: the runtime multiplies floats, the file is small."""
    name, shape = str(node.args[0].target), list(integers.shape)
    parts = named(integers.flatten(1), made.scale, made.zero_point.to(integers.dtype))
    with module.graph.inserting_before(node):
        reads = [buffer(module, name + end, value) for end, value in parts]
        value = module.graph.call_function(torch.ops.kompakt.dequantize_blocks.default, (*reads, 1, size))
        if len(shape) > 2:
            value = module.graph.call_function(torch.ops.aten.reshape.default, (value, shape))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def store_codebook(module: fx.GraphModule, node: fx.Node, made: Codebook) -> None:
    """Replace a shared weight by its indices and a lookup in its values."""
    name = str(node.args[0].target)
    books = len(made.values)
    with module.graph.inserting_before(node):
        if books == 1:
            reads = [buffer(module, name + INDICES, made.indices), buffer(module, name + "_values", made.values[0])]
            value = module.graph.call_function(torch.ops.kompakt.lookup.default, tuple(reads))
        else:
            rows = made.indices.reshape(books, -1)
            reads = [buffer(module, name + INDICES, rows), buffer(module, name + "_values", made.values)]
            found = module.graph.call_function(torch.ops.kompakt.lookup_rows.default, tuple(reads))
            shape = list(made.indices.shape)
            value = module.graph.call_function(torch.ops.aten.reshape.default, (found, shape))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def store(
    module: fx.GraphModule, node: fx.Node, integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int
) -> None:
    """Replace ``node`` by a dequantization of stored integers."""
    name = str(node.args[0].target)
    with module.graph.inserting_before(node):
        reads = [buffer(module, name + end, v) for end, v in named(integers, scale, zero_point)]
        value = module.graph.call_function(torch.ops.kompakt.dequantize.default, (*reads, axis))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def named(integers: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[tuple[str, Tensor], ...]:
    """Name what a dequantization reads."""
    return ("_integers", integers), ("_scale", scale), ("_zero_point", zero_point)


def round_activation(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> None:
    """Replace a rounded activation by a quantization and a dequantization."""
    kind = torch.int8 if made.spec.signed else torch.uint8
    name = str(node.target).replace(".", "_")
    with module.graph.inserting_before(node):
        scale = buffer(module, name + "_scale", made.scale)
        zero_point = buffer(module, name + "_zero_point", made.zero_point.to(kind))
        source = node.args[0] if made.spec.bits == 8 else _clamped(module, node.args[0], made)
        integers = module.graph.call_function(torch.ops.kompakt.quantize.default, (source, scale, zero_point))
        value = module.graph.call_function(torch.ops.kompakt.dequantize.default, (integers, scale, zero_point, 0))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def two_values(module: fx.GraphModule, node: fx.Node, made: TwoValues) -> None:
    """Round to 0 or 1 steps of 2α above β − α: integers between a difference and a sum."""
    name, scale = str(node.target).replace(".", "_"), made.scale.detach().clamp_min(SMALLEST_SCALE)
    low = (made.shift.detach() - scale).reshape(1, -1, *[1] * (node.meta["val"].ndim - 2))
    add, zero = torch.ops.aten.add.Tensor, torch.zeros((), dtype=torch.uint8)
    with module.graph.inserting_before(node):
        ends = [buffer(module, name + end, value) for end, value in (("_down", -low), ("_up", low))]
        step = [buffer(module, name + end, value) for end, value in (("_scale", 2 * scale), ("_zero_point", zero))]
        moved = module.graph.call_function(add, (node.args[0], ends[0]))
        bounded = module.graph.call_function(torch.ops.aten.clamp.default, (moved, 0.0, float(2 * scale)))
        integers = module.graph.call_function(torch.ops.kompakt.quantize.default, (bounded, *step))
        value = module.graph.call_function(torch.ops.kompakt.dequantize.default, (integers, *step, 0))
        value = module.graph.call_function(add, (value, ends[1]))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def _clamped(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> fx.Node:
    """Clamp to a grid that is narrower than the 8 bits to which QuantizeLinear clamps."""
    ends = [float((end - made.zero_point) * made.scale) for end in (made.spec.qmin, made.spec.qmax)]
    return module.graph.call_function(torch.ops.aten.clamp.default, (node, *ends))


def buffer(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Register a buffer and insert a read of it."""
    key = name.replace(".", "_")
    module.register_buffer(key, value.detach().clone())
    return module.graph.get_attr(key)
