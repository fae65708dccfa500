"""Choose uniform integers for every layer and activation that the target runs in integers."""

from dataclasses import dataclass, replace

from kompakt.errors import InputError
from kompakt.graph.graph import Graph, Left
from kompakt.plan.plan import Plan, Quantize
from kompakt.plan.rules import Rules, integer_layers, is_depthwise, placed
from kompakt.spec import PerGroup, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a recipe may say about uniform quantization.

    Args:
        weight_bits, activation_bits: None takes the target's own.
        group_size: one scale for each run of so many weights instead of one a channel.
        weight_range: ``minmax`` or ``mse``.
        activation_range: a key of ``kompakt.numerics.ranges.ESTIMATORS``.
        dynamic: activations of linear layers are quantized by each input's own range; convolutions stay float.
        keep: names of layers (ops) that stay float.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    group_size: int | None = None
    weight_range: str = "minmax"
    activation_range: str = "mse"
    dynamic: bool = False
    keep: frozenset[str] = frozenset()


def uniform(graph: Graph, rules: Rules, knobs: Knobs = Knobs()) -> tuple[Plan, tuple[Left, ...]]:
    """Plan uniform quantization of a folded graph for a target.

    Args:
        graph: facts of the folded capture.
        rules: what the target runs in integers.
        knobs: what the recipe says.

    Returns:
        The plan, and the layers that stay float with the reason.

    Raises:
        InputError: ``keep`` names a layer that the model has not.
    """
    for name in knobs.keep:
        if name not in {op.name for op in graph.layers}:
            raise InputError(f"{name}: the model has no such layer; its layers are {_some(graph)}")
    if knobs.dynamic:
        rules = replace(rules, layers=frozenset({"linear"}), joins=frozenset(), pools=frozenset())
    weights = tuple(_weight(graph, rules, knobs, op.name) for op in integer_layers(graph, rules, knobs.keep))
    # A weight read by two layers is quantized once.
    entries = tuple(dict.fromkeys(weights)) + _activations(graph, rules, knobs)
    return Plan(entries=entries), _left(graph, rules, knobs)


def _weight(graph: Graph, rules: Rules, knobs: Knobs, name: str) -> Quantize:
    op = graph.by_name[name]
    spec = rules.weight_depthwise if is_depthwise(graph, op) else rules.weight
    spec = _with_bits(spec, knobs.weight_bits)
    if knobs.group_size is not None:
        spec = replace(spec, granularity=PerGroup(size=knobs.group_size), saturation_free=False)
    weight = graph.weight(op)
    assert weight is not None
    return Quantize(tensor=weight.name, role="weight", spec=spec, range=knobs.weight_range)


def _activations(graph: Graph, rules: Rules, knobs: Knobs) -> tuple[Quantize, ...]:
    spec = _with_bits(rules.activation, knobs.activation_bits)
    if knobs.dynamic:
        spec = replace(spec, dynamic=True)
    sites = placed(graph, rules, knobs.keep)
    estimator = "minmax" if knobs.dynamic else knobs.activation_range
    return tuple(
        Quantize(tensor=name, role="activation", spec=spec, range=estimator, like=None if knobs.dynamic else like)
        for name, like in sites.items()
        if not (knobs.dynamic and not _feeds_layer(graph, rules, name))
    )


def _feeds_layer(graph: Graph, rules: Rules, name: str) -> bool:
    return any(user.kind in rules.layers and user.ref("input") == name for user in graph.users[name])


def _with_bits(spec: QuantSpec, bits: int | None) -> QuantSpec:
    if bits is None or bits == spec.bits:
        return spec
    narrow = spec.narrow and bits > 1
    return replace(spec, bits=bits, narrow=narrow, saturation_free=spec.saturation_free and bits == spec.bits)


def _left(graph: Graph, rules: Rules, knobs: Knobs) -> tuple[Left, ...]:
    found = []
    for op in graph.layers:
        label = op.module or op.name
        if op.kind not in rules.layers:
            what = (
                "stays float under dynamic quantization" if knobs.dynamic else f"has no {rules.target} integer kernel"
            )
            found.append(Left(name=label, reason=f"{op.kind} {what}"))
        elif op.name in knobs.keep:
            found.append(Left(name=label, reason="kept in float by choice"))
    return tuple(found)


def _some(graph: Graph) -> str:
    names = [op.name for op in graph.layers]
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
