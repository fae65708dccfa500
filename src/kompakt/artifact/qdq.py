"""Turn a quantized capture into one of real integers, ready for export: ``kompakt::`` operators.

The simulated graph rounds floats; here the weights become int8 buffers and every rounding becomes the
pair of operators that ONNX calls QuantizeLinear and DequantizeLinear, with the very same numbers.
"""

import copy

import torch
from torch import Tensor, fx, nn

from kompakt.artifact.stored_integers import (
    buffer,
    named,
    round_activation,
    store,
    store_codebook,
    store_weight,
    two_values,
)
from kompakt.build.integer import averages_image, behind_clamps
from kompakt.build.layers import BiasQuantizer, Codebook, Quantizer, TwoValues
from kompakt.build.quantize import quantizer_of
from kompakt.errors import ModelError
from kompakt.graph.trace import Capture, attribute
from kompakt.numerics.grid import quantize
from kompakt.spec import PerGroup


@torch.library.custom_op("kompakt::quantize", mutates_args=())
def quantize_op(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``clamp(round(x / scale) + zero_point)`` in the type of ``zero_point`` (per tensor)."""
    info = torch.iinfo(zero_point.dtype)
    steps = torch.round(x / scale) + zero_point.to(torch.float32)
    return steps.clamp(info.min, info.max).to(zero_point.dtype)


@torch.library.custom_op("kompakt::dequantize", mutates_args=())
def dequantize_op(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return ``scale · (q - zero_point)``; scales of one dimension run along ``axis``."""
    if scale.ndim:
        shape = [1] * q.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return (q.to(torch.int32) - zero_point.to(torch.int32)).to(torch.float32) * scale


@torch.library.custom_op("kompakt::dequantize_blocks", mutates_args=())
def dequantize_blocks_op(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, size: int) -> Tensor:
    """Return ``scale · (q - zero_point)``, one scale for each run of ``size`` values along ``axis``."""
    wide_scale, wide_zero = (item.repeat_interleave(size, dim=axis) for item in (scale, zero_point))
    return (q.to(torch.int32) - wide_zero.to(torch.int32)).to(torch.float32) * wide_scale


@torch.library.custom_op("kompakt::lookup", mutates_args=())
def lookup_op(indices: Tensor, values: Tensor) -> Tensor:
    """Return ``values[indices]``: indices of any shape, values (k,)."""
    return values[indices.to(torch.int64)]


@torch.library.custom_op("kompakt::lookup_rows", mutates_args=())
def lookup_rows_op(indices: Tensor, values: Tensor) -> Tensor:
    """Return each row's values at its indices: (G, n) and (G, k) → (G, n)."""
    return values.gather(1, indices.to(torch.int64))


@lookup_op.register_fake
@lookup_rows_op.register_fake
def _(indices: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(indices.shape)


@torch.library.custom_op("kompakt::dynamic_linear", mutates_args=())
def dynamic_linear_op(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor) -> Tensor:
    """Multiply ``x``, quantized to u8 by its own range, by int8 ``weight`` of shape (in, out)."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    steps = (torch.round(x / scale) + zero).clamp(0, 255) - zero
    return (steps @ (weight.to(torch.float32) - weight_zero.to(torch.float32))) * (scale * weight_scale)


@quantize_op.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_op.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@dequantize_blocks_op.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, size: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@dynamic_linear_op.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-1]))


@torch.library.custom_op("kompakt::global_average_pool", mutates_args=())
def global_average_pool_op(x: Tensor) -> Tensor:
    """Average each channel's image: (N, C, H, W) → (N, C, 1, 1)."""
    return x.mean(dim=(2, 3), keepdim=True)


@global_average_pool_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 1, 1))


def to_integers(capture: Capture) -> fx.GraphModule:
    """Return a graph module that stores integers and computes with ``kompakt::`` operators."""
    module = copy.deepcopy(capture.module)
    drop_clamps(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default:
            _spell_out_linear(module, node)
        elif averages_image(node):
            _pool_globally(module, node)
    # A weight that was spelled out has no reader left; storing it again would overwrite what was stored.
    module.graph.eliminate_dead_code()
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        made = module.get_submodule(str(node.target))
        if isinstance(made, BiasQuantizer):
            bias = attribute(module, str(node.args[0].target))
            store(module, node, made.integers(bias), made.scale, torch.zeros_like(made.scale, dtype=torch.int32), 0)
        elif isinstance(made, Codebook):
            store_codebook(module, node, made)
        elif isinstance(made, TwoValues):
            two_values(module, node, made)
        elif isinstance(made, Quantizer) and _reads_attribute(node):
            store_weight(module, node, made)
        elif isinstance(made, Quantizer) and not made.spec.dynamic:
            round_activation(module, node, made)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _drop_unread_tensors(module)
    module.recompile()
    return module


def drop_clamps(module: fx.GraphModule) -> None:
    """Take out the clamps that the grid behind them makes redundant.

    ONNX Runtime does so too, but in some releases only where the ends agree to 1e-7: a layer whose grid
    ends a rounding above the clamp would then run in floats.
    """
    for node in module.graph.nodes:
        made = quantizer_of(module, node)
        if made is not None and not made.spec.dynamic and made.spec.bits == 8 and not _reads_attribute(node):
            node.update_arg(0, behind_clamps(node, made))
    module.graph.eliminate_dead_code()


def _reads_attribute(node: fx.Node) -> bool:
    return node.args[0].op == "get_attr"


def _spell_out_linear(module: fx.GraphModule, node: fx.Node) -> None:
    """Write a quantized linear layer as a product and a sum, its weight stored (in, out).

    ONNX Runtime has integer kernels for MatMul of a weight (in, out); the weight's transpose as an
    operator would stand between it and its integers.
    """
    source, weight_node = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    made = module.get_submodule(str(weight_node.target)) if weight_node.op == "call_module" else None
    if not isinstance(made, Quantizer):
        return
    dynamic, groups = _dynamic(module, source), isinstance(made.spec.granularity, PerGroup)
    if dynamic and groups:
        raise ModelError(f"{weight_node.args[0]}: groups have no kernel for dynamic ranges; use scales by channel")
    if not dynamic and not groups and not made.spec.packed and node.meta["val"].ndim == 2:
        return  # exported as Gemm, whose kernel takes the weight as it is
    weight = attribute(module, str(weight_node.args[0].target))
    integers = quantize(weight, made.scale, made.zero_point, made.spec).to(torch.int8).t().contiguous()
    name = f"{weight_node.args[0].target}_transposed"
    scale, zero_point = (item.t().contiguous() if groups else item for item in (made.scale, made.zero_point))
    with module.graph.inserting_before(node):
        parts = named(integers, scale, zero_point.to(torch.int8))
        reads = [buffer(module, name + end, value) for end, value in parts]
        if dynamic:
            operands = (source.args[0], *reads)
            value = module.graph.call_function(torch.ops.kompakt.dynamic_linear.default, operands)
        else:
            operators = torch.ops.kompakt
            size = made.spec.granularity.size if isinstance(made.spec.granularity, PerGroup) else 0
            rounded = (
                module.graph.call_function(operators.dequantize_blocks.default, (*reads, 0, size))
                if groups
                else module.graph.call_function(operators.dequantize.default, (*reads, 1))
            )
            value = module.graph.call_function(torch.ops.aten.matmul.default, (source, rounded))
        if bias is not None:
            value = module.graph.call_function(torch.ops.aten.add.Tensor, (value, bias))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def _pool_globally(module: fx.GraphModule, node: fx.Node) -> None:
    keeps = node.meta["val"].ndim == 4
    with module.graph.inserting_before(node):
        value = module.graph.call_function(torch.ops.kompakt.global_average_pool.default, (node.args[0],))
        if not keeps:
            value = module.graph.call_function(torch.ops.aten.flatten.using_ints, (value, 1))
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


def _dynamic(module: fx.GraphModule, node: fx.Node) -> bool:
    made = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(made, Quantizer) and made.spec.dynamic


def _drop_unread_tensors(module: fx.GraphModule) -> None:
    """Delete the parameters and buffers that no node reads, so that they do not ship."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder: nn.Module = module.get_submodule(owner)
        inside = any(node.op == "call_module" and name.startswith(f"{node.target}.") for node in module.graph.nodes)
        if name not in read and not inside:
            delattr(holder, leaf)
