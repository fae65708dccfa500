"""Which channels of which tensors stand or fall together, as plain data: ``Group`` and ``Coupling``.

Found from the ``Graph`` alone, with no rule for any architecture (compare DepGraph, Fang et al. 2023,
arXiv:2301.12900, which needs the module classes): indices are labelled, labels flow through the ops
(``kompakt.graph.flow``), and what an op ties becomes one unit.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kompakt.errors import PlanError
from kompakt.graph.cost import op_macs
from kompakt.graph.flow import Flow, flow
from kompakt.graph.graph import Graph, Left, Op
from kompakt.graph.labels import Array, Dims
from kompakt.graph.rules import RULES

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dimension of one tensor, and for each unit of the group the indices that go with it."""

    tensor: str
    dim: int
    size: int
    indices: tuple[tuple[int, ...], ...]
    makes: bool  # whether this dimension makes channels (a layer's outputs), not only reads them


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can be removed independently of one another, each with all that goes with it.

    Args:
        name: the module whose outputs the units are (the first in execution order).
        size: number of units: channels, blocks of channels, or attention heads.
        members: every dimension of every tensor that units of this group own indices of.
        units: the number of each unit in the ``Coupling``.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    units: tuple[int, ...]

    @cached_property
    def makers(self) -> tuple[Member, ...]:
        """The members that make channels."""
        return tuple(member for member in self.members if member.makes)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs: multiply–accumulates for one example, and parameter values."""

    macs: int
    params: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Coupling:
    """What can be removed from a model, and what is left whole.

    Args:
        graph: the model.
        groups: the removable units, in execution order.
        left: layers whose outputs stay whole, and why.
        tensors: for each tensor the unit (0: none) of every index of every dimension.
        ops: the same for every output of every op.
        ties: names of groups that must keep the same share, because the model's code computes one width
            from another (``kompakt.build.follow`` finds them by running it).
    """

    graph: Graph
    groups: tuple[Group, ...]
    left: tuple[Left, ...]
    tensors: Mapping[str, Dims] = field(repr=False)
    ops: Mapping[str, tuple[Dims, ...]] = field(repr=False)
    ties: tuple[tuple[str, ...], ...] = ()

    def group(self, name: str) -> Group:
        """The group called ``name``, or the one that holds the tensor or the module ``name``.

        Raises:
            PlanError: there is none; the nearest names are offered.
        """
        for group in self.groups:
            if name == group.name:
                return group
        for group in self.groups:
            if any(name in (member.tensor, member.tensor.rpartition(".")[0]) for member in group.makers):
                return group
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, [group.name for group in self.groups], n=3, cutoff=0.0))
        raise PlanError(f"{name}: no channels of that name can be removed; the nearest are {near}")

    def shapes_after(self, units: Iterable[int]) -> dict[str, Shapes]:
        """Return the shapes that tensors and op outputs have without the given units, by name."""
        gone = np.zeros(1 + max((unit for group in self.groups for unit in group.units), default=0), dtype=np.int64)
        gone[list(units)] = 1
        gone[0] = 0

        def size(dim: Array) -> int:
            return len(dim) - int(gone[dim].sum())

        after: dict[str, Shapes] = {name: (tuple(size(dim) for dim in dims),) for name, dims in self.tensors.items()}
        for name, outputs in self.ops.items():
            after[name] = tuple(tuple(size(dim) for dim in dims) for dims in outputs)
        return after

    def cost_after(self, units: Iterable[int]) -> Cost:
        """Count what the model costs without the given units, exactly, from shapes alone."""
        shapes = self.shapes_after(units)
        batch = next((op.shape[0] for op in self.graph.ops if op.kind == "input" and op.shape), 1)
        macs = sum(_macs(op, shapes) // max(batch, 1) for op in self.graph.ops if op.macs)
        params = sum(
            int(np.prod(shapes[t.name][0], dtype=np.int64)) if t.name in shapes else t.numel
            for t in self.graph.tensors
            if t.kind == "parameter"
        )
        return Cost(macs=macs, params=params)


def _macs(op: Op, shapes: Mapping[str, Shapes]) -> int:
    return op_macs(op.kind, shapes[op.name][0], [shapes[name][0] for name in op.refs])


def couple(graph: Graph) -> Coupling:
    """Find what can be removed from a model: groups of units, and the layers that are left whole.

    Example:
        >>> import torch
        >>> from kompakt.graph.trace import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> (group,) = couple(trace(net, torch.zeros(2, 4)).graph).groups
        >>> group.name, group.size, [(member.tensor, member.dim) for member in group.members]
        ('0', 3, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """
    found = flow(graph, RULES)
    found.labels.settle()
    root = found.labels.roots()
    slots = {(name, dim): root[labels] for name, dims in found.tensors.items() for dim, labels in enumerate(dims)}
    producers = found.producers()
    sets = _sets(slots, producers, _paths(found, root))
    unit = np.zeros(int(root.max()) + 1, dtype=np.int64)
    groups = []
    count = 0
    for roots, _ in sets.values():
        unit[roots] = np.arange(count + 1, count + len(roots) + 1)
        count += len(roots)
    for name, (roots, members) in sets.items():
        groups.append(_group(name, unit[roots], {slot: unit[slots[slot]] for slot in members}, producers))
    return Coupling(
        graph=graph,
        groups=tuple(groups),
        left=_left(found, root, unit),
        tensors={name: tuple(unit[root[dim]] for dim in dims) for name, dims in found.tensors.items()},
        ops={name: tuple(tuple(unit[root[d]] for d in dims) for dims in outs) for name, outs in found.ops.items()},
    )


def groups(graph: Graph) -> tuple[tuple[Group, ...], tuple[Left, ...]]:
    """Find the groups of a model and what is left whole (see ``couple``)."""
    found = couple(graph)
    return found.groups, found.left


Slot = tuple[str, int]


def _paths(found: Flow, root: Array) -> Array:
    """Hash, for every root, the op outputs that it runs through.

    Units that run through the same ones form a group, so that a group that keeps one unit leaves
    nothing empty: the two unequal pieces of a split are two groups.
    """
    hashes = np.zeros(int(root.max()) + 1, dtype=np.int64)
    generator, seen = np.random.default_rng(0), set()
    for outputs in found.ops.values():
        for dim in (dim for dims in outputs for dim in dims):
            if id(dim) not in seen and dim.any():
                seen.add(id(dim))
                hashes[np.unique(root[dim])] ^= generator.integers(1, 2**62)
    return hashes


def _sets(
    slots: Mapping[Slot, Array], producers: Mapping[Slot, Array], paths: Array
) -> dict[str, tuple[Array, list[Slot]]]:
    """Gather units that are made by the same layers and run the same way: name → (their roots, all their slots)."""
    order = {name: number for number, name in enumerate(slots)}
    where: dict[int, list[Slot]] = defaultdict(list)
    for slot, labels in slots.items():
        for value in np.unique(labels):
            if value:
                where[int(value)].append(slot)
    alike: dict[tuple[tuple[Slot, ...], int], list[int]] = defaultdict(list)
    for value, touched in where.items():
        makers = tuple(slot for slot in touched if slot in producers)
        if makers:  # what no layer makes is an input of a kind: coordinates, a table that is looked up
            alike[makers, int(paths[value])].append(value)
    result: dict[str, tuple[Array, list[Slot]]] = {}
    for (makers, _), values in sorted(alike.items(), key=lambda item: order[item[0][0][0]]):
        if len(values) < 2:  # a group of one unit cannot lose it
            continue
        name = base = makers[0][0].rpartition(".")[0] or makers[0][0]
        number = 1
        while name in result:
            number += 1
            name = f"{base}#{number}"
        positions = slots[makers[0]]
        first = {int(value): index for index, value in reversed(list(enumerate(positions)))}
        values.sort(key=lambda value: first[value])
        touched = sorted({slot for value in values for slot in where[value]}, key=lambda slot: order[slot])
        result[name] = (np.array(values, dtype=np.int64), touched)
    return result


def _group(name: str, units: Array, slots: Mapping[Slot, Array], producers: Mapping[Slot, Array]) -> Group:
    """Write a group, whose units have consecutive numbers, as plain data."""
    members, first = [], int(units[0])
    for (tensor, dim), labels in slots.items():
        inside = np.flatnonzero((labels >= first) & (labels < first + len(units)))
        owned: list[list[int]] = [[] for _ in units]
        for index, place in zip(inside.tolist(), (labels[inside] - first).tolist(), strict=True):
            owned[place].append(index)
        members.append(
            Member(
                tensor=tensor,
                dim=dim,
                size=len(labels),
                indices=tuple(tuple(indices) for indices in owned),
                makes=(tensor, dim) in producers,
            )
        )
    return Group(name=name, size=len(units), members=tuple(members), units=tuple(int(unit) for unit in units))


def _left(found: Flow, root: Array, unit: Array) -> tuple[Left, ...]:
    """Name every layer none of whose outputs can be removed, with the reason."""
    component, why = found.labels.reasons()
    left = []
    for (tensor, _), labels in found.producers().items():
        if unit[root[labels]].any():
            continue
        known = (why[number] for number in component[labels].tolist() if number in why)
        reason = next(known, "its channels are one single unit")
        left.append(Left(name=tensor.rpartition(".")[0] or tensor, reason=reason))
    left += [
        Left(name=op, reason=f"{kind}: an operator whose index flow is not known") for kind, op in found.unknown.items()
    ]
    return tuple(left)
