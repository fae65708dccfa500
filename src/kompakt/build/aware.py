"""Quantization-aware training: the form of a model that is trained, and the way from it to the form that ships.

The trained form is the captured graph with its quantizers, their steps learned (LSQ, LSQ+), its batch norms kept as
modules that go on estimating; ``kompakt.build.train`` trains it like any module. What ships is what was trained:
weights are put on their grids, batch norms folded into the scales of the channels, and the plan applied again.
"""

import copy
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from kompakt.build.layers import Codebook, Levels, Quantizer, Signs, Ternary, TwoValues
from kompakt.build.quantize import codebooks, quantize, quantizers
from kompakt.errors import InputError
from kompakt.graph.calibrate import Stats
from kompakt.graph.fold import fold, foldable_norms, remove_identities, set_parameter
from kompakt.graph.graph import Graph
from kompakt.graph.trace import Capture, attribute, kind_of
from kompakt.numerics.binary import binarize, expand, ternarize
from kompakt.numerics.codebook import LEVELS
from kompakt.numerics.grid import SMALLEST_SCALE, dequantize, param_shape, rows, saturation_scale
from kompakt.numerics.grid import quantize as to_integers
from kompakt.plan.plan import Plan, Quantize, Share
from kompakt.spec import PerChannel, QuantSpec

Form = Literal["steps", "binary", "ternary"]
NORMS, STAGES = "norms", "stages"
ENDS = frozenset({"add", "cat", "relu", "relu6", "hardtanh", "silu", "hardswish", "gelu"})
"""What the last tensor of a resolution stage comes from."""
TERNARY_LIMIT = 0.7
"""Of TWN: weights beyond so many times the mean magnitude are not 0."""
SIGNS = QuantSpec(bits=2, narrow=True, granularity=PerChannel())
"""How signs ship: −1, 0 and 1 with a scale for each channel."""


@dataclass(frozen=True, kw_only=True)
class Aware:
    """A model in training.

    Args:
        module: what is trained, called with a batch.
        source: the capture, batch norms unfolded where they are trained.
        plan: what the quantizers carry out.
    """

    module: fx.GraphModule
    source: Capture
    plan: Plan


def with_signs(plan: Plan, form: Form) -> Plan:
    """Return the plan with every weight of one or two bits as signs, which ``form`` trains."""
    if form == "steps":
        one = next((e.tensor for e in plan.of(Quantize) if e.role == "weight" and e.spec.bits == 1), None)
        if one is not None:
            raise InputError(f"{one}: one bit has no step to learn; train weights as binary")
        return plan
    signs = {e: replace(e, spec=SIGNS) for e in plan.of(Quantize) if _few(e)}
    return Plan(entries=tuple(signs.get(entry, entry) for entry in plan.entries))


def without_tensors(plan: Plan, names: frozenset[str]) -> Plan:
    """Return the plan less its integers and codebooks of the tensors and ops called ``names``."""
    gone = [entry for entry in (*plan.of(Quantize), *plan.of(Share)) if entry.tensor in names]
    return plan.without(*gone)


def _few(entry: Quantize) -> bool:
    return entry.role == "weight" and entry.spec.bits <= SIGNS.bits


def aware(capture: Capture, plan: Plan, stats: Stats, form: Form = "steps", seed: int = 0) -> Aware:
    """Return the form of a model that is trained under a plan.

    Esser et al. 2020 (LSQ), arXiv 1902.08153; Bhalgat et al. 2020 (LSQ+), arXiv 2004.09576; signs: Rastegari et
    al. 2016 (XNOR-Net), arXiv 1603.05279, Li et al. 2016 (TWN), arXiv 1605.04711; values of codebooks move by
    the mean of their weights' gradients: Han et al. 2016 (Deep Compression), arXiv 1510.00149.

    Args:
        capture: of the float model, batch norms not folded; it is left as it was.
        plan: made for the folded capture.
        stats: of the folded capture.
        form: ``steps`` learns the step of every grid; ``binary`` and ``ternary`` train weights of one or two bits
            as signs (see ``with_signs``).
        seed: of codebooks that start at random.
    """
    folded = fold(capture)
    source = folded if _folded_first(plan) else capture
    facing = Capture(module=_with_norms(source), graph=folded.graph, example=capture.example)
    made = quantize(facing, plan, stats, seed).module
    made.requires_grad_(True)
    _learn(made, folded.graph, plan, form, stats)
    _with_stages(made)
    return Aware(module=made, source=source, plan=plan)


def _folded_first(plan: Plan) -> bool:
    """Whether a norm folded after training would spoil it: a codebook for all channels, or scales that are 2ⁿ."""
    shared = any(entry.granularity == "tensor" for entry in plan.of(Share))
    return shared or any(entry.spec.power_of_two for entry in plan.of(Quantize))


def _with_norms(capture: Capture) -> fx.GraphModule:
    """Copy a graph, its foldable batch norms as modules that train and estimate."""
    module = copy.deepcopy(capture.module)
    remove_identities(module)
    module.add_module(NORMS, nn.ModuleDict())
    folder = module.get_submodule(NORMS)
    assert isinstance(folder, nn.ModuleDict)
    for node in foldable_norms(module):
        folder[node.name] = _norm(module, node)
        with module.graph.inserting_before(node):
            called = module.graph.call_module(f"{NORMS}.{node.name}", (node.args[0],))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _with_stages(module: fx.GraphModule) -> None:
    """Let the last sum or activation of every resolution be a module, so that a teacher's features can be met there."""
    module.add_module(STAGES, nn.ModuleDict())
    folder = module.get_submodule(STAGES)
    assert isinstance(folder, nn.ModuleDict)
    maps = [node for node in module.graph.nodes if kind_of(node) in ENDS and node.meta["val"].ndim == 4]
    for node in {tuple(node.meta["val"].shape[2:]): node for node in maps}.values():
        if any(user.op == "call_module" for user in node.users):
            continue  # a quantizer or a norm stands there
        folder[node.name] = nn.Identity()
        with module.graph.inserting_after(node):
            called = module.graph.call_module(f"{STAGES}.{node.name}", (node,))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called, delete_user_cb=lambda user, called=called: user is not called)
    module.recompile()


def _norm(module: fx.GraphModule, node: fx.Node) -> nn.Module:
    gamma, beta, mean, variance = (attribute(module, name) for name in _names(node))
    made = nn.BatchNorm2d(len(mean), eps=_epsilon(node))
    made.weight, made.bias = nn.Parameter(gamma.detach().clone()), nn.Parameter(beta.detach().clone())
    made.running_mean, made.running_var = mean.detach().clone(), variance.detach().clone()
    return made.eval()


def _names(norm: fx.Node) -> list[str]:
    """Names of γ, β, mean and variance."""
    return [str(node.target) for node in norm.all_input_nodes[1:5]]


def _epsilon(norm: fx.Node) -> float:
    return float(str(norm.args[7]))


def _learn(module: fx.GraphModule, graph: Graph, plan: Plan, form: Form, stats: Stats) -> None:
    """Make parameters of the steps, and put signs in the place of grids of few bits where they are trained."""
    found = quantizers(module)
    for entry in plan.of(Quantize):
        made = found[entry.tensor]
        if entry.role == "weight" and form != "steps" and _few(entry):
            _swap(module, made, Signs(form))
        elif entry.role == "activation" and entry.spec.bits == 1 and not entry.spec.dynamic:
            _swap(module, made, _two_values(stats, entry.tensor))
        elif made.grad_scale is None and not entry.spec.dynamic:
            made.learn(_sharing(graph, entry))
    for entry in plan.of(Share):
        book = codebooks(module)[entry.tensor]
        if entry.grid == "free":
            book.values.requires_grad_(True)
        else:
            _swap(module, book, _trained_book(book, attribute(module, entry.tensor).detach(), entry))


def _two_values(stats: Stats, name: str) -> TwoValues:
    """Start at the mean of each channel and the deviation of the whole."""
    seen, means = stats.histograms[name], stats.means[name].float()
    middles = (seen.edges[:-1] + seen.edges[1:]) / 2
    mean = (seen.counts * middles).sum() / seen.total
    deviation = ((seen.counts * (middles - mean).square()).sum() / seen.total).sqrt().float()
    return TwoValues(deviation.clamp_min(SMALLEST_SCALE), means.clone())


def _trained_book(book: Codebook, weight: Tensor, entry: Share) -> nn.Module:
    """Return what trains the weight on the grid of its entry."""
    flat = weight.reshape(len(book.values), -1)
    if entry.grid == "ternary":
        magnitude = flat.abs()
        limit = TERNARY_LIMIT * magnitude.mean(1, keepdim=True)
        return Ternary(book.values.detach(), limit / magnitude.amax(1, keepdim=True).clamp_min(SMALLEST_SCALE))
    levels = LEVELS[entry.grid](entry.bits).to(weight)
    return Levels(levels, book.values.detach()[:, -1:].clone(), flat.shape[1])


def _sharing(graph: Graph, entry: Quantize) -> int:
    """How many numbers of one example share a step."""
    if entry.role == "activation":
        return max(1, torch.Size(graph.by_name[entry.tensor].shape[1:]).numel())
    tensor = graph.tensor[entry.tensor]
    return tensor.numel // max(1, prod(param_shape(tensor.shape, entry.spec.granularity)))


def _swap(module: fx.GraphModule, before: nn.Module, after: nn.Module) -> None:
    """Put ``after`` in every place of ``before``, which several names may share."""
    for name in [name for name, each in module.named_modules(remove_duplicate=False) if each is before]:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_module(leaf, after)


def shipped(trained: Aware, stats: Stats, left: frozenset[str] = frozenset()) -> tuple[Capture, Capture]:
    """Return what was trained as ``quantize`` makes it, ready for export, and the float capture below it.

    Weights lie on the very grids that were trained; a batch norm's ``γ/√(σ² + ε)`` joins the scale of its channel.

    Args:
        trained: after training.
        stats: those of ``aware``.
        left: names of weights and ops that are not quantized after all; such weights are as trained, unrounded.
    """
    trained = replace(trained, plan=without_tensors(trained.plan, left))
    module, learned = copy.deepcopy(trained.source.module), quantizers(trained.module)
    _copy_back(trained.module, module)
    factors = _factors(module)
    scales: dict[str, Tensor] = {}
    for entry in trained.plan.of(Quantize):
        if entry.role == "weight":
            weight = attribute(module, entry.tensor).detach()
            value, scale = _on_grid(weight, entry.spec, learned.get(entry.tensor), _form_of(trained.module, entry))
            set_parameter(module, entry.tensor, value)
            factor = factors.get(entry.tensor, torch.ones(())).abs()
            scales[entry.tensor] = scale * (factor.unsqueeze(-1) if scale.ndim == 2 and factor.ndim else factor)
    module.recompile()
    source = trained.source
    capture = fold(Capture(module=module, graph=source.graph, example=source.example))
    made = quantize(capture, trained.plan, stats)
    _settle(made.module, learned, scales, factors, trained)
    return made, capture


def _form_of(module: fx.GraphModule, entry: Quantize) -> Form:
    found = _reader(module, entry.tensor)
    return found.form if isinstance(found, Signs) else "steps"


def _on_grid(weight: Tensor, spec: QuantSpec, made: Quantizer | None, form: Form) -> tuple[Tensor, Tensor]:
    """Return a trained weight as it computes, and the scales of its integers."""
    if form != "steps" or made is None:
        signs, scale = binarize(weight) if form == "binary" else ternarize(weight)
        return expand(signs, scale), scale
    scale, zero_point = made.settled()
    if spec.saturation_free:
        scale = saturation_scale(weight, spec, scale)
    return dequantize(to_integers(weight, scale, zero_point, spec), scale, zero_point, spec), scale


def _copy_back(trained: fx.GraphModule, module: fx.GraphModule) -> None:
    """Copy the trained tensors into the captured graph, those of norms from their modules."""
    for name, value in trained.named_parameters():
        if not name.startswith(("quantizers.", f"{NORMS}.")):
            set_parameter(module, name, value.detach().clone())
    for node in foldable_norms(module):
        norm = trained.get_submodule(f"{NORMS}.{node.name}")
        for name, leaf in zip(_names(node), ("weight", "bias", "running_mean", "running_var"), strict=True):
            attribute(module, name).data.copy_(getattr(norm, leaf).detach())


def _factors(module: fx.GraphModule) -> dict[str, Tensor]:
    """What folding multiplies each channel of a weight by: ``γ/√(σ² + ε)``, by the weight's name."""
    found = {}
    for node in foldable_norms(module):
        gamma, _, _, variance = (attribute(module, name).detach().double() for name in _names(node))
        layer = node.all_input_nodes[0]
        found[str(layer.all_input_nodes[1].target)] = (gamma * torch.rsqrt(variance + _epsilon(node))).float()
    return found


def _reader(module: fx.GraphModule, tensor: str) -> Any:
    """The module that stands behind a tensor or the output of an op."""
    for node in module.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(source, fx.Node) and tensor in (source.name, source.target):
            found = module.get_submodule(str(node.target))
            if not isinstance(found, nn.BatchNorm2d):
                return found
            return _reader(module, node.name)
    raise KeyError(tensor)


def _settle(
    module: fx.GraphModule,
    learned: dict[str, Quantizer],
    scales: dict[str, Tensor],
    factors: dict[str, Tensor],
    trained: Aware,
) -> None:
    """Give the quantizers that ship the trained steps, and the codebooks the trained values."""
    for name, made in quantizers(module).items():
        if name in scales:
            # A channel without weights had its scale raised, so that its bias fits an int32.
            weight = rows(attribute(module, name).detach(), made.spec.granularity)
            empty = weight.abs().amax(1).reshape(made.scale.shape) == 0
            made.scale = torch.where(empty, made.scale, scales[name].clamp_min(torch.finfo(torch.float32).tiny))
        elif name not in learned:
            _swap(module, made, copy.deepcopy(_reader(trained.module, name)).requires_grad_(False))
        elif not made.spec.dynamic:
            made.scale, made.zero_point = learned[name].settled()
    for name, book in codebooks(module).items():
        book.indices, values = _reader(trained.module, name).settled(attribute(trained.module, name))
        factor = factors.get(name)
        values = values if factor is None else values * factor.unsqueeze(1)
        book.values = nn.Parameter(values, requires_grad=False)
