"""Choose bits layer by layer: the least measured error under budgets, solved exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from kompakt.errors import InputError
from kompakt.graph.graph import Graph, Op
from kompakt.plan.allocate import NamedCost, assign
from kompakt.plan.rules import Rules, integer_layers, placed, range_owner

Errors = Mapping[str, Mapping[int, float]]
ENDS, FLOAT = 8, 32
"""Bits of the first and the last layer where they are kept; of a weight that stays float, where that may be chosen."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What bits may cost; None does not limit.

    Args:
        average_bits: of the weights, each weight counting once.
        average_activation_bits: of the activations, each value of one example counting once.
        max_bytes: of the weights' integers.
        fewer_bops: how many times fewer bit operations, Σ MACs · bits · bits, than at 8 and 8 bits.
    """

    average_bits: float | None = None
    average_activation_bits: float | None = None
    max_bytes: int | None = None
    fewer_bops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Times of whole files in the target's runtime, measured in turn.

    Args:
        original_ms: of the float file.
        integers_ms: of the file with all layers in integers.
        slower: weight → milliseconds that the file takes more when this layer alone stays float; below 0 it is faster.
    """

    original_ms: float
    integers_ms: float
    slower: Mapping[str, float]


def mixed(
    graph: Graph,
    rules: Rules,
    errors: Errors,
    budgets: Budgets,
    activation_bits: int,
    keep: frozenset[str],
    *,
    pace: Pace | None = None,
    max_ms: float | None = None,
) -> dict[str, int]:
    """Assign bits to weights, and to activations where ``errors`` has any.

    The sum of the errors of all tensors, each measured alone, is minimised under every budget (HAWQ-V3, Yao et al.
    2021, arXiv:2011.10680, with HiGHS; bit operations of a layer as the product of both widths).

    Args:
        graph: facts of the folded capture.
        rules: what the target runs in integers.
        errors: weight, or op → bits → error; a tensor of one width has that one.
        budgets: what the bits may cost.
        activation_bits: of the activations that have no errors.
        keep: layers that stay float.
        pace: what layers in float (``FLOAT`` bits) cost in time, as measured.
        max_ms: of one call, with ``pace``.

    Returns:
        Weight, or op → bits.

    Raises:
        BudgetError: no assignment keeps the budgets; the smallest reachable cost is named.
        InputError: nothing is to be assigned, or errors of activations are missing.
    """
    layers = integer_layers(graph, rules, keep)
    sites = placed(graph, rules, keep)
    weights = {str(op.ref("weight")): prod(graph.tensor[str(op.ref("weight"))].shape) for op in layers}
    values = {name: prod(graph.by_name[name].shape[1:]) for name, like in sites.items() if like is None}
    costs: dict[str, NamedCost[str, int]] = {}
    if budgets.average_bits is not None:
        costs["average bits of weights"] = _stored(errors, weights, 1 / sum(weights.values()), budgets.average_bits)
    if budgets.max_bytes is not None:
        costs["bytes"] = _stored(errors, weights, 1 / 8, float(budgets.max_bytes))
    if budgets.average_activation_bits is not None:
        known = {name: count for name, count in values.items() if name in errors}
        if not known:
            raise InputError("average activation bits: no activation's error was measured")
        share = 1 / sum(known.values())
        costs["average bits of activations"] = _stored(errors, known, share, budgets.average_activation_bits)
    if budgets.fewer_bops is not None:
        owners = {op.name: range_owner(sites, str(op.ref("input"))) for op in layers}
        found = _bops(errors, layers, owners, activation_bits, budgets.fewer_bops)
        costs["bit operations as a share of those at 8 bits"] = found
    if pace is not None and max_ms is not None:
        slower = {name: {bits: ms * (bits == FLOAT) for bits in errors[name]} for name, ms in pace.slower.items()}
        costs["milliseconds"] = NamedCost(options=slower, budget=max_ms, fixed=pace.integers_ms)
    return assign(errors, costs, maximise=False).choice


def _stored(errors: Errors, counts: Mapping[str, int], unit: float, budget: float) -> NamedCost[str, int]:
    """The cost of holding each tensor: bits times values."""
    options = {name: {bits: bits * counts[name] * unit for bits in errors[name]} for name in counts if name in errors}
    return NamedCost(options=options, budget=budget)


def _bops(
    errors: Errors, layers: tuple[Op, ...], owners: Mapping[str, str], activation_bits: int, fewer: float
) -> NamedCost[str, int]:
    """The bit operations of all layers, as a share of those at 8 and 8 bits."""
    single: dict[str, dict[int, float]] = {}
    pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    total = max(sum(op.macs for op in layers), 1) * 64
    for op in layers:
        weight, source, macs = str(op.ref("weight")), owners[op.name], op.macs / total
        if source in errors:
            table = pairs.setdefault((weight, source), {})
            for a in errors[weight]:
                for b in errors[source]:
                    table[a, b] = table.get((a, b), 0.0) + macs * a * b
        else:
            row = single.setdefault(weight, {})
            for a in errors[weight]:
                row[a] = row.get(a, 0.0) + macs * a * activation_bits
    return NamedCost(options=single, pairs=pairs, budget=1 / fewer)


def ends(graph: Graph, rules: Rules, keep: frozenset[str]) -> dict[str, int]:
    """Return 8 bits for the weights and inputs of the first and the last layer."""
    layers, sites = integer_layers(graph, rules, keep), placed(graph, rules, keep)
    if not layers:
        return {}
    found: dict[str, int] = {}
    for op in (layers[0], layers[-1]):
        found |= {str(op.ref("weight")): ENDS, range_owner(sites, str(op.ref("input"))): ENDS}
    return found
