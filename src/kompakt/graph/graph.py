"""``Graph``: facts about a model as plain data: ops, shapes, MACs, parameters. No policy.

A graph is made by ``kompakt.graph.trace`` and read by everything that decides. It holds no tensor
and no module, so it can be compared, printed and tested as data.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from kompakt.errors import PlanError


@dataclass(frozen=True)
class Ref:
    """A reference, inside ``Op.arguments``, to another op's output or to a named tensor."""

    name: str


Value = None | bool | int | float | str | Ref | tuple["Value", ...]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A parameter, buffer or constant of the model, by its qualified name in the user's class."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str  # "parameter", "buffer" or "constant"

    @property
    def numel(self) -> int:
        """The number of values."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation of the captured model.

    Args:
        name: unique name of the op in the capture, e.g. ``conv2d_3``.
        kind: the ATen operator without its overload, e.g. ``conv2d``, ``add``, ``batch_norm``.
            ``input`` and ``getitem`` are the two that are not ATen operators.
        arguments: the operator's arguments by schema name, with defaults filled in; tensors are
            ``Ref``, symbolic sizes are replaced by the size that the example had.
        shape: shape of the output for the example (of the first, where there are several).
        shapes: shapes of all outputs, for ops that return several tensors.
        module: qualified name of the innermost module of the user's class that ran the op.
        module_type: that module's class name.
        source: ``file:line`` of the user's code, where known.
        macs: multiply–accumulates for one example (batch of one).
    """

    name: str
    kind: str
    arguments: dict[str, Value] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: str = "float32"
    module: str = ""
    module_type: str = ""
    source: str = ""
    macs: int = 0

    @cached_property
    def refs(self) -> tuple[str, ...]:
        """Names of all ops and tensors that the arguments mention, in order."""
        found: list[str] = []

        def walk(value: Value) -> None:
            if isinstance(value, Ref):
                found.append(value.name)
            elif isinstance(value, tuple):
                for item in value:
                    walk(item)

        for value in self.arguments.values():
            walk(value)
        return tuple(found)

    def ref(self, argument: str) -> str | None:
        """Name of the op or tensor given for ``argument``, or None where there is none."""
        value = self.arguments.get(argument)
        return value.name if isinstance(value, Ref) else None


@dataclass(frozen=True, kw_only=True)
class Left:
    """Something that is left as it was, with the reason (law 6)."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A captured model: ops in execution order and the tensors that they read.

    Args:
        ops: every op, inputs included, in execution order.
        tensors: every parameter, buffer and constant that an op reads, by qualified name. A tensor
            shared between modules appears once, under the first name.
        outputs: names of the ops whose values the model returns.
        aliases: other names of shared tensors → the name used here.
    """

    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Op]:
        """Ops by name."""
        return {op.name: op for op in self.ops}

    @cached_property
    def tensor(self) -> dict[str, Tensor]:
        """Tensors by qualified name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def users(self) -> dict[str, tuple[Op, ...]]:
        """For every op and tensor, the ops that read it, in execution order."""
        found: dict[str, list[Op]] = {name: [] for name in (*self.by_name, *self.tensor)}
        for op in self.ops:
            for name in dict.fromkeys(op.refs):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    @cached_property
    def layers(self) -> tuple[Op, ...]:
        """The ops that hold weights to compress: convolutions and linear maps, in order."""
        return tuple(op for op in self.ops if op.kind in LAYER_KINDS and self.weight(op) is not None)

    @property
    def macs(self) -> int:
        """Multiply–accumulates of the whole model for one example."""
        return sum(op.macs for op in self.ops)

    @property
    def params(self) -> int:
        """Number of parameter values (buffers not counted)."""
        return sum(t.numel for t in self.tensors if t.kind == "parameter")

    def weight(self, op: Op) -> Tensor | None:
        """The weight tensor of a layer, or None where the weight is computed at run time."""
        name = op.ref("weight")
        return self.tensor.get(name) if name is not None else None

    def op(self, name: str) -> Op:
        """The op called ``name``.

        Raises:
            PlanError: there is none; the nearest names are offered.
        """
        if name in self.by_name:
            return self.by_name[name]
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, self.by_name, n=3, cutoff=0.0))
        raise PlanError(f"{name}: the model has no such op; the nearest are {near}")


LAYER_KINDS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"})
