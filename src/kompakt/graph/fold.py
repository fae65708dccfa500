"""Fold what inference does not need: batch norm into the layer before it, dropout into nothing."""

import copy

import torch
from torch import Tensor, fx, nn

from kompakt.graph.trace import Capture, attribute, kind_of, read

_IDENTITIES = frozenset({"dropout", "dropout_", "feature_dropout", "alpha_dropout", "lift_fresh_copy"})
_FOLDS_INTO = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


def fold(capture: Capture) -> Capture:
    """Return a capture with tensors of its own, batch norms folded and dropouts removed.

    ``y = γ (Wx + b - μ)/√(σ² + ε) + β`` becomes ``y = W'x + b'`` with ``W' = γ/√(σ² + ε) · W`` and
    ``b' = γ (b - μ)/√(σ² + ε) + β``. A batch norm that follows anything else stays.
    """
    module = copy.deepcopy(capture.module)
    module.requires_grad_(False)
    remove_identities(module)
    for node in foldable_norms(module):
        _fold_batch_norm(module, node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    batch = capture.example[0].shape[0] if capture.example[0].ndim else 1
    return Capture(module=module, graph=read(module, batch), example=capture.example)


def folded_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the weight and bias of the layer before it.

    Args:
        weight: shape (C_out, …).
        bias: shape (C_out,), or None for zero.
        norm: γ, β, running mean and running variance, each of shape (C_out,); γ and β may be None.
        epsilon: the batch norm's ε.

    Returns:
        The new weight and bias, computed in float64 and rounded once.
    """
    gamma, beta, mean, variance = (None if value is None else value.double() for value in norm)
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + epsilon) * (1.0 if gamma is None else gamma)
    shift = (0.0 if bias is None else bias.double()) - mean
    new_bias = shift * factor + (0.0 if beta is None else beta)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return (weight.double() * factor.reshape(shape)).to(weight.dtype), new_bias.to(weight.dtype)


def remove_identities(module: fx.GraphModule) -> None:
    """Take out the ops that do nothing at inference."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and kind_of(node) in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _uses(module: fx.GraphModule) -> dict[int, int]:
    """Count the nodes that read each tensor, however many names it has."""
    found: dict[int, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            key = id(attribute(module, str(node.target)))
            found[key] = found.get(key, 0) + len(node.users)
    return found


def foldable_norms(module: fx.GraphModule) -> list[fx.Node]:
    """List the batch norms whose input is a layer that nothing else reads, with a weight of its own."""
    uses = _uses(module)
    return [node for node in module.graph.nodes if kind_of(node) == "batch_norm" and _folds(module, node, uses)]


def _folds(module: fx.GraphModule, norm: fx.Node, uses: dict[int, int]) -> bool:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or kind_of(layer) not in _FOLDS_INTO or len(layer.users) != 1:
        return False
    weight_node = layer.args[1]
    if weight_node.op != "get_attr" or norm.args[3] is None or norm.args[5]:
        return False
    return uses[id(attribute(module, str(weight_node.target)))] == 1


def _fold_batch_norm(module: fx.GraphModule, norm: fx.Node) -> None:
    """Fold one batch norm into the layer before it."""
    layer, weight_node = norm.all_input_nodes[0], norm.all_input_nodes[0].all_input_nodes[1]
    weight = attribute(module, str(weight_node.target))
    bias_node = layer.args[2] if len(layer.args) > 2 else None
    bias = attribute(module, str(bias_node.target)) if bias_node is not None else None
    values = tuple(None if item is None else attribute(module, str(item.target)) for item in norm.args[1:5])
    new_weight, new_bias = folded_batch_norm(weight, bias, values, norm.args[7])
    bias_name = str(weight_node.target).rpartition(".")[0] + ".bias" if bias_node is None else str(bias_node.target)
    set_parameter(module, str(weight_node.target), new_weight)
    set_parameter(module, bias_name.removeprefix("."), new_bias)
    if bias_node is None:
        bias_node = _read_before(module, layer, bias_name.removeprefix("."), weight_node, new_bias)
    layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)


def _read_before(module: fx.GraphModule, layer: fx.Node, name: str, weight: fx.Node, value: Tensor) -> fx.Node:
    """Insert a read of the attribute ``name`` before ``layer``."""
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(name)
    fake = weight.meta["val"]
    node.meta = {"val": fake.new_empty(tuple(value.shape)), "nn_module_stack": layer.meta.get("nn_module_stack")}
    return node


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` at a qualified name, as a parameter without gradient."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
