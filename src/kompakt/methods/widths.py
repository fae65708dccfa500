"""Exact widths: the most saliency kept within budgets of MACs, parameters, latency or bytes.

A layer costs (Σ_a out_a)·(Σ_b in_b) times a constant, where a and b run over the groups that its
outputs and inputs belong to: a sum over pairs of groups, which ``kompakt.plan.allocate`` takes as it is.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from torch import Tensor

from kompakt.graph.coupling import Coupling, Group
from kompakt.graph.graph import Op
from kompakt.graph.labels import Array
from kompakt.plan.allocate import NamedCost, allocate_widths, assign

Factors = dict[str | None, float]


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """A cost as a polynomial of degree two: fixed, per unit of a group, and per pair of units of two groups."""

    single: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    square: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    pair: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    fixed: list[float] = field(default_factory=list)


def knapsack(
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    widths: Mapping[str, Sequence[int]],
    budgets: Mapping[str, float],
    costs: Mapping[str, NamedCost[str, int]] | None = None,
) -> dict[str, int]:
    """Choose a width for every group so that the most score is kept and every budget holds.

    Args:
        coupling: the groups.
        scores: group name → (size,) scores.
        widths: group name → the widths on offer, in units.
        budgets: ``macs``, ``params`` and ``channels`` → what may not be exceeded.
        costs: further costs by kind, for instance measured latency.

    Raises:
        BudgetError: the budgets cannot be met.
    """
    named = {kind: _named(coupling, widths, kind, budget) for kind, budget in budgets.items()}
    values = {name: scores[name].detach().cpu().double().numpy() for name in widths}
    return dict(allocate_widths(values, widths, {**named, **(costs or {})}).choice)


def least_drop(
    coupling: Coupling,
    drops: Mapping[str, Mapping[int, float]],
    budgets: Mapping[str, float],
    costs: Mapping[str, NamedCost[str, int]] | None = None,
) -> dict[str, int]:
    """Choose a width for every group so that the measured drops add up to the least and every budget holds.

    Args:
        coupling: the groups.
        drops: group name → width in units → drop of the model's score with this group alone at that width.
        budgets: ``macs``, ``params`` and ``channels`` → what may not be exceeded.
        costs: further costs by kind, for instance measured latency.

    Raises:
        BudgetError: the budgets cannot be met.
    """
    widths = {name: sorted(offered) for name, offered in drops.items()}
    named = {kind: _named(coupling, widths, kind, budget) for kind, budget in budgets.items()}
    return dict(assign(drops, {**named, **(costs or {})}, maximise=False).choice)


def _named(coupling: Coupling, widths: Mapping[str, Sequence[int]], kind: str, budget: float) -> NamedCost[str, int]:
    terms = {"macs": _macs, "params": _params, "channels": _channels}[kind](coupling, widths)
    options = {
        name: {w: terms.single[name] * w + terms.square[name] * w * w for w in offered}
        for name, offered in widths.items()
    }
    pairs = {
        (a, b): {(p, q): weight * p * q for p in widths[a] for q in widths[b]} for (a, b), weight in terms.pair.items()
    }
    return NamedCost(options=options, budget=budget, pairs=pairs or None, fixed=sum(terms.fixed))


def channels_each(group: Group) -> float:
    """Count the channels that one unit of a group makes, in all layers together, on average."""
    return sum(len(indices) for member in group.makers for indices in member.indices) / group.size


def _channels(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> _Terms:
    terms = _Terms()
    for name in widths:
        terms.single[name] += channels_each(coupling.group(name))
    return terms


def _macs(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> _Terms:
    terms, owner = _Terms(), _owners(coupling, widths)
    for op in coupling.graph.ops:
        if op.macs:
            dims = [*coupling.ops[op.name][0], *_inner(coupling, op)]
            _add(terms, [_factor(dim, owner) for dim in dims], op.macs / max(1, prod(len(dim) for dim in dims)))
    return terms


def _inner(coupling: Coupling, op: Op) -> list[Array]:
    """Return the dimension that a product sums over, apart from those that cancel with the output's."""
    name = op.ref("weight")
    if name is None or name not in coupling.tensors:
        return []
    if op.kind.startswith("conv_transpose"):
        return [coupling.tensors[name][0]] if op.arguments.get("groups") == 1 else []
    return [coupling.tensors[name][1]]


def _params(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> _Terms:
    terms, owner = _Terms(), _owners(coupling, widths)
    for tensor in coupling.graph.tensors:
        if tensor.kind == "parameter":
            dims = coupling.tensors.get(tensor.name, ())
            constant = 1.0 if dims else float(tensor.numel)
            _add(terms, [_factor(dim, owner) for dim in dims], constant)
    return terms


def _owners(coupling: Coupling, widths: Mapping[str, Sequence[int]]) -> dict[int, tuple[str, int]]:
    """Say for each unit of the groups that may shrink: its group, and the group's size."""
    return {unit: (g.name, g.size) for g in coupling.groups if g.name in widths for unit in g.units}


def _factor(dim: Array, owner: Mapping[int, tuple[str, int]]) -> Factors:
    """Write a dimension's size as a sum: group → indices for each of its units (on average), None → the rest."""
    found: Factors = defaultdict(float)
    for unit, count in zip(*np.unique(dim, return_counts=True), strict=True):
        name, size = owner.get(int(unit), (None, 1))
        found[name] += float(count) / size
    return found


def _add(terms: _Terms, factors: Sequence[Factors], weight: float) -> None:
    """Add a product of sums to a polynomial; beyond two variable factors the rest counts as it is."""
    varying = [factor for factor in factors if set(factor) != {None}]
    weight *= prod(factor[None] for factor in factors if set(factor) == {None})
    first = varying[0] if varying else {None: 1.0}
    second = varying[1] if len(varying) > 1 else {None: 1.0}
    for a, left in first.items():
        for b, right in second.items():
            value = weight * left * right
            if a is None and b is None:
                terms.fixed.append(value)
            elif a is None or b is None:
                terms.single[str(a if b is None else b)] += value
            elif a == b:
                terms.square[a] += value
            else:
                terms.pair[(a, b) if a < b else (b, a)] += value
