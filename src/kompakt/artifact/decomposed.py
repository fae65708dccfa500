"""Integers as PyTorch's own ``quantized_decomposed`` operators, which ExecuTorch, LiteRT and Inductor fuse."""

import copy
from typing import Any

import torch
from torch import fx

from kompakt.artifact.qdq import drop_clamps
from kompakt.build.layers import BiasQuantizer, Quantizer
from kompakt.errors import ModelError
from kompakt.graph.trace import Capture, attribute
from kompakt.numerics.grid import quantize
from kompakt.spec import PerChannel, PerGroup


def to_decomposed(capture: Capture, *, stored: bool = True) -> fx.GraphModule:
    """Return a module whose weights and activations are rounded by ``quantized_decomposed`` operators.

    Biases stay float, on the grid of the integers that a kernel makes of them. Every reader of a rounded value
    dequantizes it by itself: a shared one would tie kernels together that have nothing to do with each other.

    Args:
        capture: quantized.
        stored: whether weights are stored as integers (ExecuTorch), or as floats on their grid that an operator
            makes integers of (LiteRT and Inductor fold it).

    Raises:
        ModelError: weights share a scale by groups, or activations are quantized dynamically.
    """
    import torch.ao.quantization.fx._decomposed

    module = copy.deepcopy(capture.module)
    drop_clamps(module)
    for node in list(module.graph.nodes):
        made = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(made, BiasQuantizer):
            with torch.no_grad():
                _replace_by_constant(module, node, made(attribute(module, str(node.args[0].target))))
        elif isinstance(made, Quantizer):
            if made.spec.dynamic or isinstance(made.spec.granularity, PerGroup):
                raise ModelError(f"{node.args[0]}: dynamic ranges and groups have no form here; quantize it statically")
            if node.args[0].op == "get_attr":
                _weight(module, node, made, stored)
            else:
                _activation(module, node, made)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval()


def _read(module: fx.GraphModule, node: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    key = name.replace(".", "_")
    module.register_buffer(key, value.detach().clone())
    with module.graph.inserting_before(node):
        return module.graph.get_attr(key)


def _replace_by_constant(module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    node.replace_all_uses_with(_read(module, node, f"{node.name}_rounded", value))
    module.graph.erase_node(node)


def _weight(module: fx.GraphModule, node: fx.Node, made: Quantizer, stored: bool) -> None:
    weight, spec, name = attribute(module, str(node.args[0].target)), made.spec, node.name
    kind, ends = kind_of_integers(made), (spec.qmin, spec.qmax)
    operators = torch.ops.quantized_decomposed
    arguments: tuple[Any, ...]
    if isinstance(spec.granularity, PerChannel):
        scale = _read(module, node, f"{name}_scale", made.scale)
        zero = _read(module, node, f"{name}_zero_point", made.zero_point.to(torch.int64))
        into, out = operators.quantize_per_channel.default, operators.dequantize_per_channel.default
        arguments = (scale, zero, spec.granularity.axis, *ends, kind)
    else:
        into, out = operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default
        arguments = (float(made.scale), int(made.zero_point), *ends, kind)
    if stored:
        kept = quantize(weight, made.scale, made.zero_point, spec).to(kind)
        integers = _read(module, node, f"{name}_integers", kept)
    else:
        with torch.no_grad():
            rounded = _read(module, node, f"{name}_rounded", made(weight))
        with module.graph.inserting_before(node):
            integers = module.graph.call_function(into, (rounded, *arguments))
    _dequantize(module, node, integers, (out, arguments))


def _activation(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> None:
    arguments = (float(made.scale), int(made.zero_point), made.spec.qmin, made.spec.qmax, kind_of_integers(made))
    operators = torch.ops.quantized_decomposed
    with module.graph.inserting_before(node):
        integers = module.graph.call_function(operators.quantize_per_tensor.default, (node.args[0], *arguments))
    _dequantize(module, node, integers, (operators.dequantize_per_tensor.default, arguments))


def _dequantize(module: fx.GraphModule, node: fx.Node, integers: fx.Node, out: tuple[Any, tuple[Any, ...]]) -> None:
    """Let each user of ``node`` read a dequantization of its own."""
    for user in list(node.users):
        with module.graph.inserting_before(user):
            value = module.graph.call_function(out[0], (integers, *out[1]))
        user.replace_input_with(node, value)
    module.graph.erase_node(node)


def kind_of_integers(made: Quantizer) -> torch.dtype:
    """Return the type that holds a quantizer's integers."""
    return torch.int8 if made.spec.signed else torch.uint8
