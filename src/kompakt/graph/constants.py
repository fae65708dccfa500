"""Numbers in the code of a model that follow a width: sizes of views and splits, paddings, group counts.

A class may keep them as attributes (``num_heads``, ``split_sizes``); what they become when units go is
read off the graph, so that the attributes can be mended.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from kompakt.graph.coupling import Coupling
from kompakt.graph.graph import Op, Ref
from kompakt.graph.labels import Array

Number = int | tuple[int, ...]
SIZED = frozenset({"view", "reshape", "unflatten", "expand", "repeat", "flatten", "_unsafe_view"})
PIECES = frozenset({"split", "split_with_sizes", "chunk"})


def constants_after(coupling: Coupling, units: Iterable[int]) -> tuple[tuple[str, Number, Number], ...]:
    """Say, for each module, which numbers of its code change when units go: (module, before, after).

    A number that would have to become two different ones is left out.
    """
    gone = np.zeros(2 + max((unit for group in coupling.groups for unit in group.units), default=0), dtype=bool)
    gone[list(units)] = True
    gone[0] = False
    found: dict[tuple[str, Number], set[Number]] = defaultdict(set)
    for op in coupling.graph.ops:
        for before, after in _pairs(coupling, op, gone):
            if before != after:
                found[op.module, before].add(after)
    return tuple((module, before, next(iter(after))) for (module, before), after in found.items() if len(after) == 1)


def _pairs(coupling: Coupling, op: Op, gone: Array) -> Iterator[tuple[Number, Number]]:
    """Yield the numbers of one op before and after."""
    outputs = [[(len(dim), int((~gone[dim]).sum())) for dim in dims] for dims in coupling.ops[op.name]]
    if op.kind in SIZED:
        yield from outputs[0]
        yield tuple(size for size, _ in outputs[0]), tuple(size for _, size in outputs[0])
    elif op.kind in PIECES:
        axis = int(str(op.arguments.get("dim", 0)))
        yield tuple(dims[axis][0] for dims in outputs), tuple(dims[axis][1] for dims in outputs)
        yield from (dims[axis] for dims in outputs)
    elif op.kind in ("slice", "narrow"):
        yield from _bounds(coupling, op, gone)
    elif op.kind == "pad":
        yield from _paddings(coupling, op, gone)
    elif op.kind in ("layer_norm", "rms_norm"):
        shape = op.arguments["normalized_shape"]
        last = outputs[0][-len(shape) :] if isinstance(shape, tuple) else []
        yield tuple(size for size, _ in last), tuple(size for _, size in last)
    elif op.kind in ("group_norm", "conv1d", "conv2d", "conv3d"):
        groups = int(str(op.arguments.get("num_groups", op.arguments.get("groups"))))
        yield groups, _groups(_input(coupling, op), groups, gone)


def _input(coupling: Coupling, op: Op, axis: int = 1) -> Array:
    """Return the units along one dimension of an op's first tensor."""
    name = next(value.name for value in op.arguments.values() if isinstance(value, Ref))
    dims = coupling.ops[name][0] if name in coupling.ops else coupling.tensors[name]
    return dims[min(axis, len(dims) - 1)]


def _groups(units: Array, groups: int, gone: Array) -> int:
    """Count the groups of channels of which something stays."""
    if groups < 2 or len(units) % groups:
        return groups
    return int((~gone[units]).reshape(groups, -1).any(1).sum())


def _bounds(coupling: Coupling, op: Op, gone: Array) -> Iterator[tuple[Number, Number]]:
    """Yield the bounds of a slice before and after."""
    source = next(value.name for value in op.arguments.values() if isinstance(value, Ref))
    rank = len(coupling.ops[source][0] if source in coupling.ops else coupling.tensors[source])
    units = _input(coupling, op, int(str(op.arguments.get("dim", 0))) % rank)
    for name in ("start", "end"):
        bound = op.arguments.get(name)
        if isinstance(bound, int) and 0 < bound <= len(units):
            yield bound, int((~gone[units[:bound]]).sum())


def _paddings(coupling: Coupling, op: Op, gone: Array) -> Iterator[tuple[Number, Number]]:
    """Yield what is added in front of and behind each dimension, before and after."""
    pads, dims = op.arguments["pad"], coupling.ops[op.name][0]
    for number in range(len(pads) // 2 if isinstance(pads, tuple) else 0):
        before = tuple(int(str(value)) for value in pads[2 * number : 2 * number + 2])  # type: ignore[index]
        stays = ~gone[dims[len(dims) - 1 - number]]
        front, behind = stays[: before[0]].sum(), stays[len(stays) - before[1] :].sum()
        yield before, (int(front), int(behind))
