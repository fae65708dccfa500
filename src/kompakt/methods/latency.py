"""Measured time as a cost of widths: which layers to time at which widths, and the table as a budget.

The times come from the target runtime (whoever measures them runs each ``Case`` there); here they
become a cost for the exact allocation in ``kompakt.methods.channels``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling
from kompakt.graph.graph import Op
from kompakt.plan.allocate import NamedCost

SETTINGS = ("stride", "padding", "dilation")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer at one width: all that its time depends on.

    Args:
        kind: ``conv2d`` or ``linear``, as in the graph.
        input: shape of its input for a batch of one.
        weight: shape of its weight.
        groups: groups of a convolution.
        settings: stride, padding and dilation, where there are any.
    """

    kind: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    groups: int = 1
    settings: tuple[tuple[int, ...], ...] = ()


def cases(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> tuple[Case, ...]:
    """List what has to be timed so that every combination of widths has a time.

    Args:
        coupling: what can be removed.
        widths: group name → the widths on offer, in units.
    """
    found = (case for op, names in _layers(coupling, widths) for case in _at(coupling, op, names, widths).values())
    return tuple(dict.fromkeys(found))


def latency_cost(
    coupling: Coupling, widths: Mapping[str, Sequence[int]], times_ms: Mapping[Case, float], budget_ms: float
) -> NamedCost[str, int]:
    """Turn measured times into a cost for the knapsack: a layer's time by the widths of its two sides.

    Args:
        coupling: what can be removed.
        widths: group name → the widths on offer, in units.
        times_ms: the time of every case that ``cases`` lists.
        budget_ms: what all layers together may take.

    Raises:
        InputError: a case has no time.
    """
    options = {name: dict.fromkeys(offered, 0.0) for name, offered in widths.items()}
    pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    fixed = 0.0
    for op, names in _layers(coupling, widths):
        for chosen, case in _at(coupling, op, names, widths).items():
            if case not in times_ms:
                raise InputError(f"{op.module or op.name}: no time was measured for {case}")
            if not names:
                fixed += times_ms[case]
            elif len(names) == 1:
                options[names[0]][chosen[0]] += times_ms[case]
            else:
                table = pairs.setdefault((names[0], names[1]), {})
                table[chosen[0], chosen[1]] = table.get((chosen[0], chosen[1]), 0.0) + times_ms[case]
    return NamedCost(options=options, budget=budget_ms, pairs=pairs or None, fixed=fixed)


def whole_ms(coupling: Coupling, widths: Mapping[str, Sequence[int]], times_ms: Mapping[Case, float]) -> float:
    """Add up the times of all layers at their full widths."""
    full = {name: (max(offered),) for name, offered in widths.items()}
    return sum(
        times_ms[case] for op, names in _layers(coupling, full) for case in _at(coupling, op, names, full).values()
    )


def _layers(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> list[tuple[Op, tuple[str, ...]]]:
    """Return the layers with the names of the (at most two) groups that decide most of their size."""
    owner = {unit: group.name for group in coupling.groups if group.name in widths for unit in group.units}
    found = []
    for op in coupling.graph.layers:
        weight = coupling.graph.weight(op)
        sides = [] if weight is None else coupling.tensors[weight.name][:2]
        names: list[str] = []
        for side in sides:
            counts: dict[str, int] = {}
            for unit in side.tolist():
                if unit in owner:
                    counts[owner[unit]] = counts.get(owner[unit], 0) + 1
            names += [max(counts.items(), key=itemgetter(1))[0]] if counts else []
        found.append((op, tuple(sorted(set(names)))))
    return found


def _at(
    coupling: Coupling, op: Op, names: tuple[str, ...], widths: Mapping[str, Sequence[int]]
) -> dict[tuple[int, ...], Case]:
    """Return a layer's case for every combination of the widths that decide its size."""
    weight, source = str(op.ref("weight")), str(op.ref("input"))
    whole = op.arguments.get("groups", 1)
    settings = tuple(tuple(value) for name in SETTINGS if isinstance(value := op.arguments.get(name), tuple))
    found = {}
    for chosen in product(*(widths[name] for name in names)):
        gone: set[int] = set()
        for name, width in zip(names, chosen, strict=True):
            gone.update(coupling.group(name).units[width:])
        shape = [sum(unit not in gone for unit in dim.tolist()) for dim in coupling.tensors[weight]]
        dims = coupling.ops[source][0] if source in coupling.ops else coupling.tensors[source]
        inside = [1, *(sum(unit not in gone for unit in dim.tolist()) for dim in dims[1:])]
        groups = inside[1] // shape[1] if isinstance(whole, int) and whole > 1 else 1
        found[chosen] = Case(
            kind=op.kind,
            input=tuple(inside),
            weight=tuple(shape),
            groups=groups,
            settings=settings,  # type: ignore[arg-type]
        )
    return found
