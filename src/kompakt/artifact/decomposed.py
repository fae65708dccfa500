"""Integers as PyTorch's own ``quantized_decomposed`` operators, which ExecuTorch, LiteRT and Inductor fuse."""

import copy

import torch
from torch import fx, nn

from kompakt.artifact.qdq import drop_clamps
from kompakt.build.layers import BiasQuantizer, Quantizer
from kompakt.errors import ModelError
from kompakt.graph.trace import Capture, attribute
from kompakt.numerics.grid import quantize
from kompakt.spec import PerChannel, PerGroup


def to_decomposed(capture: Capture) -> nn.Module:
    """Return a module that stores int8 weights and rounds activations by ``quantized_decomposed`` operators.

    Biases stay float, on the grid of the integers that a kernel makes of them.

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
                _weight(module, node, made)
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


def _weight(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> None:
    weight, spec, name = attribute(module, str(node.args[0].target)), made.spec, node.name
    kind, ends = _kind(made), (spec.qmin, spec.qmax)
    integers = _read(module, node, f"{name}_integers", quantize(weight, made.scale, made.zero_point, spec).to(kind))
    operators = torch.ops.quantized_decomposed
    if isinstance(spec.granularity, PerChannel):
        scale = _read(module, node, f"{name}_scale", made.scale)
        zero = _read(module, node, f"{name}_zero_point", made.zero_point.to(torch.int64))
        operator, arguments = operators.dequantize_per_channel.default, (scale, zero, spec.granularity.axis)
    else:
        operator, arguments = operators.dequantize_per_tensor.default, (float(made.scale), int(made.zero_point))
    with module.graph.inserting_before(node):
        value = module.graph.call_function(operator, (integers, *arguments, *ends, kind))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def _activation(module: fx.GraphModule, node: fx.Node, made: Quantizer) -> None:
    arguments = (float(made.scale), int(made.zero_point), made.spec.qmin, made.spec.qmax, _kind(made))
    operators = torch.ops.quantized_decomposed
    with module.graph.inserting_before(node):
        integers = module.graph.call_function(operators.quantize_per_tensor.default, (node.args[0], *arguments))
        value = module.graph.call_function(operators.dequantize_per_tensor.default, (integers, *arguments))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def _kind(made: Quantizer) -> torch.dtype:
    return torch.int8 if made.spec.signed else torch.uint8
