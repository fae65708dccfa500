"""``Rules``: what a target runs in integers, as data; and where its quantizers stand in a graph."""

from collections.abc import Mapping
from dataclasses import dataclass

from kompakt.graph.graph import Graph, Op
from kompakt.spec import PerChannel, QuantSpec

MOVES = frozenset(
    {"max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"}
    | {"getitem", "chunk", "split", "slice", "clone", "unflatten"}
)
"""Ops that only move or choose values: their output lies on the grid of their input."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a target can run in integers, and in which.

    Args:
        target: the target's name.
        weight: integers of a layer's weight.
        weight_depthwise: integers of a depthwise convolution's weight, whose kernels sum in int32.
        activation: integers of activations.
        positive: integers of activations that come from a ReLU; None takes those of all others.
        layers: layer kinds with an integer kernel.
        needs_output: the layer kinds whose integer kernel needs a quantized output too.
        joins: ops of several inputs with an integer kernel.
        pools: ops that average, with an integer kernel.
        clamps: ops that follow a layer and become part of its output's clamp.
        one_grid: joins and pools whose kernel wants inputs and output on the same grid.
        sums_in_layer: whether a sum is made inside the convolution before it, which is not rounded on its own.
    """

    target: str
    weight: QuantSpec
    weight_depthwise: QuantSpec
    activation: QuantSpec
    positive: QuantSpec | None = None
    layers: frozenset[str] = frozenset({"conv2d", "linear"})
    needs_output: frozenset[str] = frozenset({"conv2d"})
    joins: frozenset[str] = frozenset({"add", "cat", "mul"})
    pools: frozenset[str] = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "mean"})
    clamps: frozenset[str] = frozenset({"relu", "relu6", "hardtanh"})
    one_grid: frozenset[str] = frozenset()
    sums_in_layer: bool = False


ONNXRUNTIME = Rules(
    target="onnxruntime",
    weight=QuantSpec(bits=8, granularity=PerChannel(), narrow=True, saturation_free=True),
    weight_depthwise=QuantSpec(bits=8, granularity=PerChannel(), narrow=True),
    activation=QuantSpec(bits=8, signed=False, symmetric=False),
)
"""ONNX Runtime on any x86 or ARM CPU: u8 activations, s8 weights that cannot saturate anywhere."""


def is_depthwise(graph: Graph, op: Op) -> bool:
    """Whether a convolution has one input channel for each output channel."""
    weight = graph.weight(op)
    return op.kind == "conv2d" and weight is not None and weight.shape[1] == 1 and op.arguments["groups"] != 1


def moves(op: Op) -> bool:
    """Whether an op only moves values, or adds zeros, which every grid holds."""
    if op.kind == "pad":
        return op.arguments.get("mode") == "constant" and not op.arguments.get("value")
    return op.kind in MOVES


def data_inputs(graph: Graph, op: Op) -> tuple[str, ...]:
    """Names of the ops (not tensors) that an op reads."""
    return tuple(name for name in op.refs if name in graph.by_name)


def integer_layers(graph: Graph, rules: Rules, keep: frozenset[str]) -> tuple[Op, ...]:
    """The layers that run in integers under ``rules``, less those named in ``keep``."""
    return tuple(op for op in graph.layers if op.kind in rules.layers and op.name not in keep)


def placed(graph: Graph, rules: Rules, keep: frozenset[str] = frozenset()) -> dict[str, str | None]:
    """Decide which ops' outputs are quantized.

    A layer's input is quantized at its producer; a convolution's output behind the clamps that follow
    it; a join or pool is made an integer op where all that it reads can be quantized and what it makes
    is wanted quantized. An op that only moves values shares the grid of what it moves.

    Args:
        graph: a folded graph.
        rules: the target's.
        keep: names of layers that stay float.

    Returns:
        Name of op → None, or the name of the op whose range it shares, in execution order.
    """
    layers = {op.name for op in integer_layers(graph, rules, keep)}
    wanted = _wanted(graph, rules, layers)
    marked: set[str] = set()
    for op in graph.ops:
        if op.name in layers:
            marked.add(op.arguments["input"].name)  # type: ignore[union-attr]
            if op.kind in rules.needs_output:
                marked.add(clamped(graph, rules, op).name)
        elif op.name in wanted and (op.kind in rules.joins or _pools(graph, rules, op)):
            marked.update((*data_inputs(graph, op), clamped(graph, rules, op).name))
            marked -= _summed(graph, rules, op, layers)
    sites = _with_sources(graph, marked)
    for one, other in _ties(graph, rules, sites):
        owner, goal = range_owner(sites, one), range_owner(sites, other)
        if owner != goal:
            sites[owner] = goal
    return sites


def _summed(graph: Graph, rules: Rules, op: Op, layers: set[str]) -> set[str]:
    """The convolution in whose kernel a sum is made: the last that it reads, where nothing else reads it."""
    inputs = data_inputs(graph, op)
    if not rules.sums_in_layer or op.kind != "add" or len(set(inputs)) < 2:
        return set()
    last = next(each.name for each in reversed(graph.ops) if each.name in inputs)
    alone = len(graph.users[last]) == 1 and last not in graph.outputs
    return {last} if last in layers and graph.by_name[last].kind == "conv2d" and alone else set()


def pooled(graph: Graph, rules: Rules, sites: Mapping[str, str | None]) -> dict[str, str]:
    """Tell whose values a shared range must hold besides its owner's.

    Args:
        graph: a folded graph.
        rules: the target's.
        sites: as ``placed`` returns them.

    Returns:
        Name of op → the op whose range it shares, for those that an op of ``one_grid`` reads or makes.
    """
    tied = dict.fromkeys(name for pair in _ties(graph, rules, sites) for name in pair)
    return {name: owner for name in tied if (owner := range_owner(sites, name)) != name}


def _ties(graph: Graph, rules: Rules, sites: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Pair each input of an op of ``one_grid`` with the op."""
    ops = [op for op in graph.ops if op.kind in rules.one_grid and op.name in sites]
    return [(name, op.name) for op in ops for name in data_inputs(graph, op) if name in sites]


def range_owner(sites: Mapping[str, str | None], name: str) -> str:
    """Return the op whose range ``name`` shares in the end, itself if none; ``sites`` as ``placed`` returns them."""
    while (source := sites.get(name)) is not None:
        name = source
    return name


def clamped(graph: Graph, rules: Rules, op: Op) -> Op:
    """The last of the clamps that follow ``op`` and that nothing else sees; ``op`` itself if there is none."""
    users = graph.users[op.name]
    while len(users) == 1 and users[0].kind in rules.clamps and op.name not in graph.outputs:
        op = users[0]
        users = graph.users[op.name]
    return op


def _wanted(graph: Graph, rules: Rules, layers: set[str]) -> set[str]:
    """The ops whose output some integer op reads, and whose own inputs can be quantized."""
    wanted: set[str] = set()
    for op in reversed(graph.ops):
        if any(_wants(graph, rules, user, op, layers, wanted) for user in graph.users[op.name]):
            wanted.add(op.name)
    able = _able(graph, rules, layers, wanted)
    return wanted & able


def _wants(graph: Graph, rules: Rules, user: Op, op: Op, layers: set[str], wanted: set[str]) -> bool:
    """Whether ``user`` wants the output of ``op`` in integers."""
    if user.name in layers:
        return user.ref("input") == op.name
    passes = user.kind in rules.joins | rules.clamps or moves(user) or _pools(graph, rules, user)
    return user.name in wanted and passes


def _pools(graph: Graph, rules: Rules, op: Op) -> bool:
    """Whether an op averages over the image, as the integer kernels do, and over nothing else."""
    if op.kind not in rules.pools:
        return False
    shape = graph.by_name[data_inputs(graph, op)[0]].shape
    dims = op.arguments.get("dim")
    return len(shape) == 4 and (op.kind != "mean" or sorted(int(dim) % 4 for dim in dims or ()) == [2, 3])  # type: ignore


def _able(graph: Graph, rules: Rules, layers: set[str], wanted: set[str]) -> set[str]:
    """The ops whose output can be quantized without a float op having to be cut off for it."""
    able: set[str] = set()
    passing = rules.joins | rules.clamps
    for op in graph.ops:
        inputs = data_inputs(graph, op)
        if op.name in layers or not (op.kind in passing or moves(op) or _pools(graph, rules, op)):
            fits = op.name in layers or op.kind == "input" or op.name in wanted
        else:
            several = op.kind not in rules.joins or op.kind == "cat" or len(inputs) > 1
            fits = bool(inputs) and several and able.issuperset(inputs)
        if fits:
            able.add(op.name)
    return able


def _with_sources(graph: Graph, marked: set[str]) -> dict[str, str | None]:
    """Add the source of every marked op that only moves values, and tie their ranges."""
    like: dict[str, str | None] = {}
    for op in reversed(graph.ops):
        if op.name not in marked:
            continue
        like[op.name] = _source(graph, op)
        marked.update(filter(None, [like[op.name]]))
    return {op.name: like[op.name] for op in graph.ops if op.name in like and op.dtype == "float32"}


def _source(graph: Graph, op: Op) -> str | None:
    """The op whose values ``op`` only moves, or None; never a list of tensors, which has no grid."""
    inputs = data_inputs(graph, op)
    if not moves(op) or len(inputs) != 1:
        return None
    return _source(graph, graph.by_name[inputs[0]]) if op.kind == "getitem" else inputs[0]
