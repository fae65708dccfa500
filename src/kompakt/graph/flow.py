"""How channels flow through a model: the labels of every dimension of every op's outputs.

``flow`` walks the graph once; the rule of each operator (here and in ``kompakt.graph.rules``) says how
the labels of its outputs follow from those of its inputs, and which labels it ties.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kompakt.graph.graph import Graph, Op, Ref, Value
from kompakt.graph.labels import Array, Dims, Labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """The labels met so far: of tensors by name, and of ops by name (one ``Dims`` for each output).

    ``made`` holds the labels of channels that layers make; ``unknown`` the operators without a rule.
    """

    graph: Graph
    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, Dims] = field(default_factory=dict)
    ops: dict[str, tuple[Dims, ...]] = field(default_factory=dict)
    made: list[Array] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    def of(self, value: Value) -> Dims:
        """Return the labels of what an argument refers to."""
        if not isinstance(value, Ref):
            raise TypeError(f"{value!r} is no tensor")
        if value.name in self.ops:
            return self.ops[value.name][0] if self.ops[value.name] else ()
        if value.name not in self.tensors:
            tensor = self.graph.tensor[value.name]
            free = tensor.kind != "constant"
            self.tensors[value.name] = tuple(self.labels.fresh(n) if n > 1 and free else fixed(n) for n in tensor.shape)
        return self.tensors[value.name]

    def first(self, op: Op) -> Dims:
        """Return the labels of an op's first tensor."""
        return self.of(next(value for value in op.arguments.values() if isinstance(value, Ref)))

    def inputs(self, op: Op) -> list[Dims]:
        """Return the labels of all tensors that an op reads."""
        return [self.of(Ref(name)) for name in op.refs]

    def producers(self) -> dict[tuple[str, int], Array]:
        """Find the dimensions of tensors that make channels, with their labels."""
        made = np.unique(np.concatenate([fixed(1), *self.made]))[1:]
        return {
            (name, dim): labels
            for name, dims in self.tensors.items()
            for dim, labels in enumerate(dims)
            if np.isin(labels, made).any()
        }

    def given(self, op: Op, *names: str) -> list[Dims]:
        """Return the labels of those of the named arguments that are given."""
        return [self.of(op.arguments[name]) for name in names if isinstance(op.arguments.get(name), Ref)]


Rule = Callable[[Flow, Op], tuple[Dims, ...]]


def fixed(size: int) -> Array:
    """Label a dimension that stays whole."""
    return np.zeros(size, dtype=np.int64)


def fixed_like(op: Op) -> tuple[Dims, ...]:
    """Label all outputs of an op as staying whole."""
    return tuple(tuple(fixed(size) for size in shape) for shape in op.shapes)


def flow(graph: Graph, rules: Mapping[str, Rule]) -> Flow:
    """Walk a graph and label every dimension; what has no rule is left whole and noted in ``unknown``."""
    found = Flow(graph=graph)
    for op in graph.ops:
        rule = rules.get(op.kind) or rules.get(op.kind.rstrip("_"), _unknown)
        outputs = rule(found, op)
        if tuple(tuple(len(dim) for dim in dims) for dims in outputs) != op.shapes:
            outputs = _unknown(found, op)
        found.ops[op.name] = outputs
    for name in graph.outputs:
        for dims in found.ops.get(name, ()):
            for dim in dims:
                found.labels.freeze(dim, "the model's output")
    return found


def broadcast(found: Flow, many: list[Dims], shape: tuple[int, ...]) -> Dims:
    """Tie the dimensions of operands that are combined element by element."""
    result = []
    for axis, size in enumerate(shape):
        place = axis - len(shape)
        here = [dims[place] for dims in many if len(dims) >= -place and len(dims[place]) == size]
        label = here[0] if here else fixed(size)
        for other in here[1:]:
            found.labels.unite(label, other)
            label = np.where(other == 0, 0, label)
        result.append(label)
    return tuple(result)


def _unknown(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Leave whole all that an operator without a rule reads and writes."""
    for dims in found.inputs(op):
        for dim in dims:
            if dim.any():
                found.unknown[op.kind] = op.name
                found.labels.freeze(dim, f"read by {op.kind}, an operator whose index flow is not known")
    return fixed_like(op)
