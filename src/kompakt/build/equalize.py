"""Rewrite a folded capture so that it quantizes better, its function unchanged: equalized scales, biases everywhere."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from kompakt.graph.fold import set_parameter
from kompakt.graph.graph import Graph, Op
from kompakt.graph.trace import Capture, attribute, read
from kompakt.numerics.equalize import Layer, equalize_chain, lift, scale_inputs, scale_outputs
from kompakt.plan.rules import is_depthwise, moves

LINKED = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"})
"""Ops with ``f(s x) = s f(x)`` for each channel's ``s > 0``; ReLU6, GELU and SiLU are not."""


CLAMPS = frozenset({"relu", "relu6", "hardtanh"})


def equalized(capture: Capture) -> Capture:
    """Return a capture that computes the same with weights whose channels reach equally far (cross-layer equalization).

    Every chain layer → (ReLU, pooling) → layer whose values nobody else reads is equalized with
    ``kompakt.numerics.equalize.equalize_chain``; statistics of the activations must be taken anew.

    Args:
        capture: a folded capture; left as it was.

    Returns:
        A capture with tensors of its own.
    """
    module = copy.deepcopy(capture.module)
    for chain in chains(capture.graph):
        layers = tuple(_layer(module, capture.graph, op) for op in chain)
        for op, made in zip(chain, equalize_chain(layers), strict=True):
            set_parameter(module, str(op.ref("weight")), made.weight.contiguous())
            if made.bias is not None:
                set_parameter(module, str(op.ref("bias")), made.bias)
    return Capture(module=module, graph=capture.graph, example=capture.example)


def evened(capture: Capture, inputs: Iterable[Tensor]) -> Capture:
    """Return a capture whose depthwise convolutions read channels that reach equally high (``numerics.equalize.lift``).

    Unlike ``equalized`` this goes through ReLU6: no channel is lifted to where the clamp would cut it. It computes the
    same on ``inputs``, and on all inputs where no channel exceeds what it reached there by a tenth.

    Args:
        capture: a folded capture; left as it was.
        inputs: batches of calibration examples; not looked at where there is nothing to even.
    """
    found = lifted(capture.graph)
    if not found:
        return capture
    module = copy.deepcopy(capture.module)
    peaks = _Peaks(module, frozenset(layer.name for layer, _, _ in found)).of(inputs)
    for layer, ceiling, after in found:
        made, following = _layer(module, capture.graph, layer), _layer(module, capture.graph, after)
        factor = lift(peaks[layer.name], ceiling)
        weight, bias = scale_outputs(made.weight, made.bias, factor)
        set_parameter(module, str(layer.ref("weight")), weight.contiguous())
        if bias is not None:
            set_parameter(module, str(layer.ref("bias")), bias)
        set_parameter(module, str(after.ref("weight")), scale_inputs(following.weight, 1 / factor, _groups(after)))
    return Capture(module=module, graph=capture.graph, example=capture.example)


def lifted(graph: Graph) -> tuple[tuple[Op, float, Op], ...]:
    """Return every layer, the upper end of the clamp behind it, and the depthwise convolution that alone reads it."""
    found = []
    for op in graph.layers:
        here, ceiling = op, None
        while _movable(graph, op) and here.name not in graph.outputs and len(graph.users[here.name]) == 1:
            here = graph.users[here.name][0]
            if here.kind in CLAMPS and ceiling is None:
                ceiling = _ceiling(here)
            elif ceiling is not None and is_depthwise(graph, here) and _movable(graph, here):
                if here.kind == op.kind and _channels(op) == _inputs(graph, here):
                    found.append((op, ceiling, here))
                break
            elif here.kind != "pad" or not moves(here):
                break
    return tuple(found)


def _ceiling(op: Op) -> float | None:
    """The upper end of a clamp whose lower end is 0, or None."""
    if op.kind in ("relu", "relu6"):
        return float("inf") if op.kind == "relu" else 6.0
    low, high = op.arguments.get("min_val", -1.0), op.arguments.get("max_val", 1.0)
    return float(high) if low == 0 and isinstance(high, int | float) else None


class _Peaks(fx.Interpreter):
    """An interpreter that keeps the largest value of every channel of some convolutions."""

    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(module)
        self.names = names
        self.peaks: dict[str, Tensor] = {}

    def of(self, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
        """Run batches, and return the peaks, (channels,) each."""
        with torch.no_grad():
            for batch in inputs:
                self.run(batch)
        return self.peaks

    def run_node(self, n: fx.Node) -> object:
        """Run one node and keep its output's peaks."""
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            peaks = value.amax((0, 2, 3))
            self.peaks[n.name] = torch.maximum(self.peaks[n.name], peaks) if n.name in self.peaks else peaks
        return value


def chains(graph: Graph) -> tuple[tuple[Op, ...], ...]:
    """Return every longest run of layers, each feeding only the next through homogeneous ops."""
    following = {op.name: found for op in graph.layers if (found := _next_layer(graph, op)) is not None}
    fed = {op.name for op in following.values()}
    runs = []
    for op in graph.layers:
        if op.name in following and op.name not in fed:
            chain = [op]
            while chain[-1].name in following:
                chain.append(following[chain[-1].name])
            runs.append(tuple(chain))
    return tuple(runs)


def _next_layer(graph: Graph, op: Op) -> Op | None:
    """The layer that alone reads the output of a layer, with scales of channels free to move, or None."""
    if not _movable(graph, op):
        return None
    here = op
    while here.name not in graph.outputs and len(graph.users[here.name]) == 1:
        after = graph.users[here.name][0]
        if _movable(graph, after) and after.ref("input") == here.name and _channels(op) == _inputs(graph, after):
            return after
        if not _passes(graph, op, after):
            return None
        here = after
    return None


def _movable(graph: Graph, op: Op) -> bool:
    """Whether a layer's tensors are its own and float."""
    weight = graph.weight(op)
    if op.kind not in LINKED or weight is None or len(graph.users[weight.name]) != 1:
        return False
    bias = op.ref("bias")
    return bias is None or (bias in graph.tensor and len(graph.users[bias]) == 1)


def _channels(op: Op) -> int:
    return op.shape[-1] if op.kind == "linear" else op.shape[1]


def _inputs(graph: Graph, op: Op) -> int:
    weight = graph.weight(op)
    assert weight is not None
    return weight.shape[1] * _groups(op)


def _groups(op: Op) -> int:
    groups = op.arguments.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _passes(graph: Graph, layer: Op, op: Op) -> bool:
    """Whether an op between two layers keeps the channels of ``layer`` where they are and is homogeneous."""
    if op.kind in HOMOGENEOUS:
        return True
    image = len(op.refs) == 1 and layer.kind != "linear" and len(layer.shape) == 4
    if op.kind == "mean":
        dims = op.arguments.get("dim")
        return image and isinstance(dims, tuple) and sorted(int(str(dim)) % 4 for dim in dims) == [2, 3]
    if op.kind in ("flatten", "view", "reshape"):
        before = graph.by_name[op.refs[0]].shape if op.refs and op.refs[0] in graph.by_name else ()
        return image and before[2:] in ((1, 1), ()) and op.shape == before[:2]
    return False


def _layer(module: fx.GraphModule, graph: Graph, op: Op) -> Layer:
    bias = op.ref("bias")
    return Layer(
        weight=attribute(module, str(op.ref("weight"))).detach(),
        bias=None if bias is None else attribute(module, bias).detach(),
        groups=_groups(op),
    )


def with_biases(capture: Capture) -> Capture:
    """Return a capture in which every layer with a weight of its own has a bias, zero where it had none.

    Bias correction needs a place for what it corrects.

    Args:
        capture: a folded capture; left as it was.
    """
    module = copy.deepcopy(capture.module)
    nodes = {node.name: node for node in module.graph.nodes}
    for op in capture.graph.layers:
        if op.kind in LINKED and op.arguments.get("bias") is None and _movable(capture.graph, op):
            _add_bias(module, nodes[op.name], str(op.ref("weight")))
    module.graph.lint()
    module.recompile()
    batch = capture.example[0].shape[0] if capture.example[0].ndim else 1
    return Capture(module=module, graph=read(module, batch), example=capture.example)


def _add_bias(module: fx.GraphModule, layer: fx.Node, weight_name: str) -> None:
    owner, _, leaf = weight_name.rpartition(".")
    name = (owner + "." if owner else "") + (leaf.removesuffix("weight") + "bias")
    weight = attribute(module, weight_name)
    set_parameter(module, name, torch.zeros(weight.shape[0], dtype=weight.dtype))
    with module.graph.inserting_before(layer):
        reader = module.graph.get_attr(name)
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    fake = weight_node.meta["val"]
    reader.meta = {"val": fake.new_empty((weight.shape[0],)), "nn_module_stack": layer.meta.get("nn_module_stack")}
    layer.args = (*layer.args[:2], reader, *layer.args[3:])
