"""Choose uniform integers for every layer and activation that the target runs in integers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from kompakt.build.quantize import quantize
from kompakt.errors import InputError
from kompakt.graph.calibrate import calibrate, pool
from kompakt.graph.graph import Graph, Left
from kompakt.graph.trace import Capture
from kompakt.plan.plan import Plan, Quantize
from kompakt.plan.rules import Rules, integer_layers, is_depthwise, placed, pooled, range_owner
from kompakt.spec import MAX_BITS, PerGroup, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a recipe may say about uniform quantization.

    Args:
        weight_bits, activation_bits: None takes the target's own.
        group_size: one scale for each run of so many weights instead of one a channel.
        bits: width by weight or op, before the two above; an op that only moves values has its source's.
        weight_range: ``minmax``, ``mse`` or ``lattice``; None takes ``mse`` below 8 bits.
        activation_range: a key of ``kompakt.numerics.ranges.ESTIMATORS``.
        power_of_two: every scale is a power of two and every zero point 0, as integer accelerators want them.
        dynamic: activations of linear layers are quantized by each input's own range; convolutions stay float.
        float_sums: only what a layer multiplies is quantized; sums and averages stay float. So do they at one bit.
        keep: names of layers (ops) that stay float.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    group_size: int | None = None
    bits: Mapping[str, int] = field(default_factory=dict)
    weight_range: str | None = None
    activation_range: str = "mse"
    power_of_two: bool = False
    dynamic: bool = False
    float_sums: bool = False
    keep: frozenset[str] = frozenset()

    @property
    def layers_only(self) -> bool:
        """Whether integers are for what a layer multiplies alone (PACT, LSQ; Bi-Real Net, ReActNet at one bit)."""
        return self.float_sums or self.activation_bits == 1


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A capture that computes in integers, the plan that it carries out, and the layers that stay float."""

    capture: Capture
    plan: Plan
    left: tuple[Left, ...]


def integers(capture: Capture, rules: Rules, batches: Iterable[Tensor], knobs: Knobs = Knobs()) -> Integers:
    """Calibrate a folded capture and quantize it as ``uniform`` plans, weights rounded to the nearest.

    Args:
        capture: a folded capture.
        rules: what the target runs in integers.
        batches: inputs for the ranges of the activations, batch first.
        knobs: what the recipe says.
    """
    sites = placed(capture.graph, rules, knobs.keep)
    stats = pool(calibrate(capture, batches, sites), pooled(capture.graph, rules, sites))
    plan, left = uniform(capture.graph, rules, knobs)
    return Integers(capture=quantize(capture, plan, stats), plan=plan, left=left)


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
    if knobs.layers_only:
        rules = replace(rules, joins=frozenset(), pools=frozenset(), needs_output=frozenset())
    weights = tuple(_weight(graph, rules, knobs, op.name) for op in integer_layers(graph, rules, knobs.keep))
    # A weight read by two layers is quantized once.
    entries = tuple(dict.fromkeys(weights)) + _activations(graph, rules, knobs)
    return Plan(entries=entries), _left(graph, rules, knobs)


def _weight(graph: Graph, rules: Rules, knobs: Knobs, name: str) -> Quantize:
    op = graph.by_name[name]
    spec = rules.weight_depthwise if is_depthwise(graph, op) else rules.weight
    weight = graph.weight(op)
    assert weight is not None
    spec = with_bits(spec, knobs.bits.get(weight.name, knobs.weight_bits))
    if knobs.group_size is not None:
        spec = replace(spec, granularity=PerGroup(size=knobs.group_size), saturation_free=False)
    spec = replace(spec, power_of_two=spec.power_of_two or knobs.power_of_two)
    estimator = knobs.weight_range or ("mse" if spec.bits < MAX_BITS else "minmax")
    return Quantize(tensor=weight.name, role="weight", spec=spec, range=estimator)


def _activations(graph: Graph, rules: Rules, knobs: Knobs) -> tuple[Quantize, ...]:
    sites = placed(graph, rules, knobs.keep)

    def spec(name: str) -> QuantSpec:
        owner = range_owner(sites, name)
        behind_relu = graph.by_name[owner].kind in ("relu", "relu6")
        wanted = rules.positive if rules.positive is not None and behind_relu else rules.activation
        found = replace(with_bits(wanted, knobs.bits.get(owner, knobs.activation_bits)), dynamic=knobs.dynamic)
        return replace(found, power_of_two=True, signed=True, symmetric=True) if knobs.power_of_two else found

    # A range that is taken from each input, or read by layers alone, belongs to one tensor that a layer reads.
    alone = knobs.dynamic or knobs.layers_only
    readers: Literal["all", "layers"] = "layers" if knobs.layers_only else "all"
    estimator = "minmax" if knobs.dynamic else knobs.activation_range
    return tuple(
        Quantize(
            tensor=name,
            role="activation",
            spec=spec(name),
            range=estimator,
            like=None if alone else like,
            readers=readers,
        )
        for name, like in sites.items()
        if not (alone and not _feeds_layer(graph, rules, name))
    )


def _feeds_layer(graph: Graph, rules: Rules, name: str) -> bool:
    return any(user.kind in rules.layers and user.ref("input") == name for user in graph.users[name])


def with_bits(spec: QuantSpec, bits: int | None) -> QuantSpec:
    """Return a spec of another width; what only holds at the target's own is left out."""
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
