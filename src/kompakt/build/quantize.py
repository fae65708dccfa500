"""Carry out a plan's ``Quantize`` and ``Share`` entries: put quantizers and codebooks on a captured graph's edges."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from kompakt.build.layers import BiasQuantizer, Codebook, Quantizer, TwoValues
from kompakt.errors import KompaktError, PlanError
from kompakt.graph.calibrate import Stats
from kompakt.graph.graph import LAYER_KINDS
from kompakt.graph.trace import Capture, attribute, kind_of
from kompakt.numerics.codebook import LEVELS, share, share_levels, ternary_book
from kompakt.numerics.grid import affine_params, saturation_scale, scale_for_bias, snapped
from kompakt.numerics.ranges import ESTIMATORS, WEIGHT_RANGES, weight_range
from kompakt.plan.plan import Plan, Quantize, Share
from kompakt.spec import PerGroup

FOLDER = "quantizers"


def quantize(capture: Capture, plan: Plan, stats: Stats, seed: int = 0) -> Capture:
    """Return a capture that computes with the integers and codebooks of ``plan``; its tensors are copies.

    Args:
        capture: a folded capture, or one whose batch norms are modules (``kompakt.build.aware``).
        plan: its ``Quantize`` and ``Share`` entries are applied, others are not looked at.
        stats: the ranges of the activations that the plan quantizes.
        seed: of codebooks that start at random.

    Raises:
        PlanError: the plan names a tensor or op that the model has not, or that was not calibrated.
    """
    module = copy.deepcopy(capture.module)
    module.add_module(FOLDER, nn.ModuleDict())
    entries: tuple[Quantize, ...] = plan.of(Quantize)
    _check(capture, entries, stats)
    nodes = {node.name: node for node in module.graph.nodes}
    made: dict[str, Quantizer] = {}
    for entry in _sources_first(entries):
        if entry.role == "activation":
            made[entry.tensor] = made[entry.like] if entry.like else _activation_quantizer(entry, stats)
            sources, name = [_normed(module, nodes[entry.tensor])], entry.like or entry.tensor
            _insert_after(module, sources, name, made[entry.tensor], layers_only=entry.readers == "layers")
    for entry in entries:
        if entry.role == "weight":
            weight = attribute(module, entry.tensor)
            _insert_after(module, _readers(module, entry.tensor), entry.tensor, _weight_quantizer(entry, weight))
    for shared in plan.of(Share):
        _share(module, shared, seed)
    _quantize_biases(module)
    module.graph.lint()
    module.recompile()
    return Capture(module=module, graph=capture.graph, example=capture.example)


def quantizers(module: fx.GraphModule) -> dict[str, Quantizer]:
    """Return the quantizers of a quantized graph by the name of the tensor or op that each rounds."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), Quantizer):
            source = node.args[0]
            source = source.args[0] if _is_norm(module, source) else source
            found[source.target if source.op == "get_attr" else source.name] = module.get_submodule(node.target)
    return found


def _readers(module: fx.GraphModule, tensor: str) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "get_attr" and node.target == tensor]


def _share(module: fx.GraphModule, entry: Share, seed: int) -> None:
    """Put a codebook in the place of a weight."""
    readers = _readers(module, entry.tensor)
    if not readers:
        raise PlanError(f"{entry.tensor}: the model has no such tensor; was the plan made for another model?")
    if quantizer_of(module, next(iter(readers[0].users))) is not None:
        raise PlanError(f"{entry.tensor}: is quantized and shared; keep one of the two entries")
    generator = torch.Generator().manual_seed(seed)
    weight = attribute(module, entry.tensor).detach()
    try:
        made = Codebook(*_codebook(weight, entry, generator))
    except KompaktError as error:
        raise type(error)(f"{entry.tensor}: {error}") from None
    _insert_after(module, readers, entry.tensor, made)


def _codebook(weight: Tensor, entry: Share, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return indices and values."""
    if entry.grid == "free":
        return share(weight, entry.bits, entry.granularity, entry.start, generator=generator)
    if entry.grid == "ternary":
        return ternary_book(weight, entry.granularity)
    return share_levels(weight, LEVELS[entry.grid](entry.bits), entry.granularity)


def _normed(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm, as a module, that follows a layer and will be folded into it, or the node itself."""
    follower = next(iter(node.users)) if len(node.users) == 1 else node
    return follower if _is_norm(module, follower) else node


def _is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.BatchNorm2d)


def _check(capture: Capture, entries: tuple[Quantize, ...], stats: Stats) -> None:
    """Refuse a plan that does not fit the model or the statistics."""
    activations = {entry.tensor for entry in entries if entry.role == "activation"}
    for entry in entries:
        if entry.role == "weight" and entry.tensor not in capture.graph.tensor:
            raise PlanError(f"{entry.tensor}: the model has no such tensor; was the plan made for another model?")
        if entry.role == "activation":
            capture.graph.op(entry.tensor)
            if entry.like is not None and entry.like not in activations:
                raise PlanError(f"{entry.tensor}: shares the range of {entry.like}, which the plan does not quantize")
            if entry.like is None and not entry.spec.dynamic and entry.tensor not in stats.histograms:
                raise PlanError(f"{entry.tensor}: was not calibrated; calibrate with this plan")
        known = ESTIMATORS if entry.role == "activation" else WEIGHT_RANGES
        if entry.range not in known:
            raise PlanError(f"{entry.tensor}: unknown range estimator {entry.range}; use {', '.join(known)}")


def _sources_first(entries: Iterable[Quantize]) -> list[Quantize]:
    """Order entries so that an op whose range is shared comes before those that share it."""
    by_name = {entry.tensor: entry for entry in entries if entry.role == "activation"}
    ordered: dict[str, Quantize] = {}

    def visit(entry: Quantize) -> None:
        if entry.like is not None and entry.like not in ordered:
            visit(by_name[entry.like])
        ordered.setdefault(entry.tensor, entry)

    for entry in by_name.values():
        visit(entry)
    return list(ordered.values())


def _activation_quantizer(entry: Quantize, stats: Stats) -> Quantizer:
    if entry.spec.dynamic:
        return Quantizer(entry.spec)
    try:
        low, high = ESTIMATORS[entry.range](stats.histograms[entry.tensor], entry.spec)
        return Quantizer(entry.spec, *affine_params(low, high, entry.spec))
    except KompaktError as error:
        raise type(error)(f"{entry.tensor}: {error}") from None


def _weight_quantizer(entry: Quantize, weight: Tensor) -> Quantizer:
    try:
        low, high = weight_range(weight, entry.spec, entry.range)
        scale, zero_point = affine_params(low, high, entry.spec)
        if entry.spec.saturation_free:
            scale = saturation_scale(weight, entry.spec, scale)
        return Quantizer(entry.spec, scale, zero_point)
    except KompaktError as error:
        raise type(error)(f"{entry.tensor}: {error}") from None


def _insert_after(
    module: fx.GraphModule, nodes: Iterable[fx.Node], name: str, quantizer: nn.Module, *, layers_only: bool = False
) -> None:
    """Let all users of ``nodes``, or those that are layers alone, read the quantized value instead."""
    key = name.replace(".", "_")
    folder = module.get_submodule(FOLDER)
    assert isinstance(folder, nn.ModuleDict)
    if key not in folder:
        folder[key] = quantizer
    for node in nodes:
        users = [user for user in node.users if not layers_only or kind_of(user) in LAYER_KINDS]
        with module.graph.inserting_after(node):
            rounded = module.graph.call_module(f"{FOLDER}.{key}", (node,))
        rounded.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, rounded)


def _quantize_biases(module: fx.GraphModule) -> None:
    """Round the bias of every layer whose input and weight are both integers."""
    folder = module.get_submodule(FOLDER)
    assert isinstance(folder, nn.ModuleDict)
    for node in list(module.graph.nodes):
        if kind_of(node) not in LAYER_KINDS or len(node.args) < 3 or node.args[2] is None:
            continue
        source, weight = quantizer_of(module, node.args[0]), quantizer_of(module, node.args[1])
        if source is None or weight is None or source.spec.dynamic or source.spec.bits == 1:
            continue
        if isinstance(weight.spec.granularity, PerGroup):
            continue
        reader = node.args[2]
        if reader.op != "get_attr":
            continue  # computed at run time (Swin v2 masks the key's part): it stays float
        bias = attribute(module, str(reader.target))
        if weight.scale.ndim:
            weight.scale = snapped(scale_for_bias(weight.scale, bias, source.scale), weight.spec)
        key = f"{node.name}_bias"
        folder[key] = BiasQuantizer(source, weight)
        with module.graph.inserting_before(node):
            rounded = module.graph.call_module(f"{FOLDER}.{key}", (reader,))
        node.update_arg(2, rounded)


def quantizer_of(module: fx.GraphModule, node: object) -> Quantizer | None:
    """Return the quantizer whose output ``node`` is, or None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        found = module.get_submodule(str(node.target))
        return found if isinstance(found, Quantizer) else None
    return None


def codebooks(module: fx.GraphModule) -> dict[str, Codebook]:
    """Return the codebooks of a graph by the name of the weight that each replaces."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    found = {str(node.args[0].target): module.get_submodule(str(node.target)) for node in calls if _on_weight(node)}
    return {name: made for name, made in found.items() if isinstance(made, Codebook)}


def two_valued(module: fx.GraphModule) -> frozenset[str]:
    """Return the names of the ops whose output layers read as one of two learned values."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    found = [node.args[0] for node in calls if isinstance(module.get_submodule(str(node.target)), TwoValues)]
    return frozenset(node.args[0].name if _is_norm(module, node) else node.name for node in found)


def _on_weight(node: fx.Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
