"""Choose the integers of a quantized capture on data, layer by layer, each seeing what those before it became.

The float and the quantized model are streamed side by side over the same inputs (``kompakt.build.stream``). Before a
layer runs, its weight is rounded anew for the inputs that the quantized model so far gives it; what comes out is
written on the grid into the capture, so that the simulator and every exporter read the very same integers.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor, fx

from kompakt.build.block_rounding import DROPPED, Blocks
from kompakt.build.layers import Codebook, Quantizer
from kompakt.build.quantize import quantizer_of
from kompakt.build.rate import BIAS_BITS, Rate, rate_distorted
from kompakt.build.stream import Stream
from kompakt.errors import InputError, KompaktError, PlanError
from kompakt.graph.fold import set_parameter
from kompakt.graph.graph import Graph, Op, Value
from kompakt.graph.trace import Capture, attribute
from kompakt.numerics.adaround import Annealing, Reconstruction, Rounded, adaround
from kompakt.numerics.bias import channel_means, corrected_bias
from kompakt.numerics.codebook import share
from kompakt.numerics.grid import affine_params, dequantize, saturation_scale, scale_for_bias, snapped
from kompakt.numerics.moments import Conv, cross_moment, second_moment
from kompakt.numerics.ranges import weight_range
from kompakt.numerics.rate_distortion import coarse
from kompakt.numerics.rounding import descend, gptq, retarget
from kompakt.numerics.shared import share_for_inputs
from kompakt.plan.plan import Plan, Quantize, Share

Rounding = Literal["nearest", "gptq", "retarget", "adaround", "brecq", "qdrop"]
REFINABLE = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
ANNEALING = Annealing(iterations=500)
LEAN = 0.5
"""Where learning a block begins: half-way between the weights and what rounding layer by layer made of them."""
PAIRED = 63  # two products of such integers with bytes stay within int16
ENOUGH_ROWS, WIDEST_STEP = 256, 3
"""Second moments are summed over at least so many positions a column, every third at the sparsest."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How a quantized capture is refined.

    Args:
        rounding: ``nearest`` leaves the weights; ``gptq`` rounds for the layer's inputs; ``retarget`` first moves the
            float weight so that it mends the errors of the layers before, takes its range, then rounds like
            ``gptq``; ``adaround`` learns for every weight whether to go up or down; ``brecq`` and ``qdrop`` begin like
            ``retarget``, then learn so for all weights of a block together (``kompakt.build.block_rounding``).
        bias_correction: mend the mean of each layer's output in its bias.
        annealing: of what is learned.
        seed: of the batches that are drawn for it.
        rate: what a bit is worth; with it, ``retarget`` chooses steps and integers by rate and distortion, and biases
            become coarse.
    """

    rounding: Rounding = "retarget"
    bias_correction: bool = False
    annealing: Annealing = ANNEALING
    seed: int = 0
    rate: Rate | None = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer of both models, about to run.

    Args:
        op: its facts.
        alone: whether no other layer reads its weight or its bias.
        node: in the quantized graph.
        entry: of its weight in the plan.
        weight: of the float model.
        made: what stands for its weight.
        floats: its inputs in the float model, a batch each.
        inputs: its inputs in the quantized model.
    """

    op: Op
    alone: bool
    node: fx.Node
    entry: Quantize | Share
    weight: Tensor
    made: Quantizer | Codebook
    floats: list[Tensor]
    inputs: list[Tensor]

    @property
    def conv(self) -> Conv | None:
        """The convolution's arguments, None for a linear layer."""
        if self.op.kind == "linear":
            return None
        kernel = tuple(self.weight.shape[2:])
        stride, padding, dilation = (
            _spread(self.op.arguments[key], len(kernel)) for key in ("stride", "padding", "dilation")
        )
        groups = self.op.arguments["groups"]
        assert isinstance(groups, int)
        return Conv(kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def refined(
    original: Capture, quantized: Capture, plan: Plan, batches: Iterable[Tensor], how: Refinement = Refinement()
) -> Capture:
    """Return a copy of a quantized capture whose weights are rounded, and biases corrected, for data.

    Nagel et al. 2020 (AdaRound), arXiv 2004.10568; Frantar et al. 2022 (GPTQ), arXiv 2210.17323; Li et al. 2025
    (GPTAQ), arXiv 2504.02692; bias correction Nagel et al. 2019 (DFQ), arXiv 1906.04721. All in all about two
    forward passes over ``batches``, which stay in memory (``kompakt.build.stream.fitting``), and the solving.

    Args:
        original: the folded float capture.
        quantized: what ``kompakt.build.quantize.quantize`` made of it.
        plan: the plan that it was made with.
        batches: calibration inputs, batch first, some hundreds of examples.
        how: rounding and bias correction.

    Returns:
        A capture with tensors of its own. A layer whose weight another layer reads too, and one whose padding is
        not given in numbers, keeps rounding to nearest.

    Raises:
        InputError: there is no batch, or a layer's inputs are not finite.
        PlanError: the captures are not of the same model.
    """
    made = copy.deepcopy(quantized.module)
    examples = list(batches)
    ours, theirs = Stream(made, examples), Stream(original.module, examples)
    entries: dict[str, Quantize | Share] = {
        entry.tensor: entry for entry in plan.of(Quantize) if entry.role == "weight"
    }
    entries |= {entry.tensor: entry for entry in plan.of(Share)}
    present = {node.name for node in made.graph.nodes}
    blocks, alone = None, how
    if how.rounding in DROPPED:
        blocks = Blocks(original, examples, DROPPED[how.rounding], how.annealing, how.seed)
        alone = replace(how, rounding="retarget")
    for op in original.graph.layers:
        entry = entries.get(str(op.ref("weight")))
        if op.name not in present:
            raise PlanError(f"{op.name}: the quantized model has no such layer; expected two captures of one model")
        if blocks is not None:
            blocks.before(op.name, ours, theirs)
        if entry is not None:
            try:
                found = _refine(_standing_before(op, entry, original.graph, ours, theirs), ours, theirs, alone)
            except KompaktError as error:
                raise type(error)(f"{op.name}: {error}") from None
            if blocks is not None and found is not None:
                blocks.add(entry.tensor, found)
        if blocks is not None:
            blocks.after(op.name, ours, theirs)
    return Capture(module=made, graph=quantized.graph, example=quantized.example)


def bias_corrected(original: Capture, quantized: Capture, plan: Plan, batches: Iterable[Tensor]) -> Capture:
    """Return a copy of a quantized capture with the mean of every layer's output mended; weights as they are."""
    return refined(original, quantized, plan, batches, Refinement(rounding="nearest", bias_correction=True))


def _standing_before(op: Op, entry: Quantize | Share, graph: Graph, ours: Stream, theirs: Stream) -> _Layer:
    """Run both streams up to a layer and tell what there is to know of it."""
    node, reference = ours.before(op.name), theirs.before(op.name)
    made = _stand_in(ours.module, _operand(node, 1))
    source, original = _operand(node, 0), _operand(reference, 0)
    assert made is not None
    assert source is not None
    assert original is not None
    reader = _bias_reader(node)
    shared = reader is not None and len(graph.users.get(str(reader.target), ())) > 1
    return _Layer(
        op=op,
        alone=len(graph.users[entry.tensor]) == 1 and not shared,
        node=node,
        entry=entry,
        weight=attribute(theirs.module, entry.tensor).detach(),
        made=made,
        floats=theirs.values(original),
        inputs=ours.values(source),
    )


def _refine(layer: _Layer, ours: Stream, theirs: Stream, how: Refinement) -> Rounded | None:
    """Round a layer's weight and correct its bias, in the module of ``ours``, both streams standing before it.

    Returns:
        What was rounded for the layer's inputs, and to which integers.
    """
    reader, found = _bias_reader(layer.node), None
    if how.rounding != "nearest" and _solvable(layer):
        made = layer.made
        if isinstance(made, Codebook):
            weight = _shared(layer, made, how)
        elif how.rounding == "adaround":
            weight = _learned(layer, made, ours.module, theirs.peek(), how)
        elif how.rate is not None:
            weight = _weighed(layer, made, ours.module, _targeted(layer, how), how.rate)
        else:
            found = _solved(layer, made, ours.module, how)
            weight = found.on_grid(found.start)
        set_parameter(ours.module, layer.entry.tensor, weight.contiguous())
    if how.bias_correction and layer.alone and reader is not None:
        _correct_bias(layer, str(reader.target), ours, theirs, how.rate)
    return found


def _solvable(layer: _Layer) -> bool:
    """Whether a layer's weight is its own, its bias a stored one, and its output a product of patches with it."""
    if _operand(layer.node, 2) is not None and _bias_reader(layer.node) is None:
        return False
    return layer.alone and layer.op.kind in REFINABLE and not isinstance(layer.op.arguments.get("padding"), str)


def _shared(layer: _Layer, made: Codebook, how: Refinement) -> Tensor:
    """Choose the codebook of a layer for its inputs, and return the weight that it stands for."""
    assert isinstance(layer.entry, Share)
    if how.rounding not in ("retarget", "gptq"):
        raise InputError(f"{how.rounding} learns to round up or down, which a codebook does not; use retarget or gptq")
    weight, hessian = _targeted(layer, how)
    importance = hessian.diagonal(dim1=1, dim2=2).repeat_interleave(len(weight) // len(hessian), dim=0)
    start = share(
        weight, made.bits, layer.entry.granularity, layer.entry.start, importance=importance.reshape(weight.shape)
    )
    made.indices, values = share_for_inputs(weight, hessian, *start)
    made.values.data = values
    return made(weight).detach()


def _learned(layer: _Layer, made: Quantizer, module: fx.GraphModule, targets: list[Tensor], how: Refinement) -> Tensor:
    """Return the layer's weight on its grid, every value rounded the way that AdaRound learned."""
    params = (made.scale, made.zero_point, made.spec)
    inputs = torch.cat(layer.inputs)
    problem = Reconstruction(layer=_function(layer, module), inputs=inputs, targets=torch.cat(targets))
    generator = torch.Generator().manual_seed(how.seed)
    return dequantize(adaround(layer.weight, *params, problem, how.annealing, generator), *params)


def _targeted(layer: _Layer, how: Refinement) -> tuple[Tensor, Tensor]:
    """Return the weight to be rounded, retargeted where asked, and the second moments of the layer's inputs."""
    weight, conv = layer.weight, _thinned(layer)
    hessian = _summed(second_moment(x, conv) for x in layer.inputs)
    if how.rounding == "retarget":
        pairs = zip(layer.floats, layer.inputs, strict=True)
        weight = retarget(weight, _summed(cross_moment(x, y, conv) for x, y in pairs), hessian)
    return weight, hessian


def _solved(layer: _Layer, made: Quantizer, module: fx.GraphModule, how: Refinement) -> Rounded:
    """Round the layer's weight for its inputs; one that moved gets a range of its own."""
    weight, hessian = _targeted(layer, how)
    if how.rounding == "retarget":
        _set_grid(layer, made, weight, module)
    params = (made.scale, made.zero_point, made.spec)
    q = descend(weight, gptq(weight, hessian, *params), hessian, params)
    return Rounded(weight=weight, start=q, scale=made.scale, zero_point=made.zero_point, spec=made.spec, lean=LEAN)


def _weighed(
    layer: _Layer, made: Quantizer, module: fx.GraphModule, found: tuple[Tensor, Tensor], rate: Rate
) -> Tensor:
    """Return the layer's weight on a grid of its own, both chosen by rate and distortion."""
    weight, hessian = found
    outputs = layer.op.shape[2:] if layer.conv else layer.op.shape[1:-1]
    thinner = _thinned(layer)
    if layer.conv is not None and thinner is not None:
        outputs = tuple(
            -(-size // (a // b)) for size, a, b in zip(outputs, thinner.stride, layer.conv.stride, strict=True)
        )
    places = sum(len(x) for x in layer.inputs) * prod(outputs)
    importance = rate.importance.get(layer.op.name, torch.zeros(len(weight)))
    most = PAIRED if made.spec.saturation_free else made.spec.qmax
    least = _bias_scale(layer, module, torch.full((len(weight),), 1e-12))
    q, scale = rate_distorted(weight, hessian / places, importance, rate.trade, most=most, least=least)
    made.scale, made.zero_point = scale, torch.zeros(len(scale), dtype=torch.int32)
    return dequantize(q, scale, made.zero_point, made.spec)


def _thinned(layer: _Layer) -> Conv | None:
    """The convolution at every n-th position only, where the moments have far more rows than columns."""
    if layer.conv is None:
        return None
    examples = sum(len(x) for x in layer.inputs)
    share = examples * prod(layer.op.shape[2:]) / (ENOUGH_ROWS * layer.weight[0].numel())
    step = max(1, min(WIDEST_STEP, int(share ** (1 / len(layer.conv.stride)))))
    return replace(layer.conv, stride=tuple(step * stride for stride in layer.conv.stride))


def _summed(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, parts)


def _set_grid(layer: _Layer, made: Quantizer, weight: Tensor, module: fx.GraphModule) -> None:
    """Give the layer's quantizer the range of ``weight``, under the same conditions as ``quantize`` sets it."""
    assert isinstance(layer.entry, Quantize)
    spec = made.spec
    scale, zero_point = affine_params(*weight_range(weight, spec, layer.entry.range), spec)
    if spec.saturation_free:
        scale = saturation_scale(weight, spec, scale)
    made.scale, made.zero_point = _bias_scale(layer, module, scale), zero_point


def _bias_scale(layer: _Layer, module: fx.GraphModule, scale: Tensor) -> Tensor:
    """Widen the scales of a weight until the layer's bias fits int32, where it is rounded to it."""
    bias, source = _operand(layer.node, 2), quantizer_of(module, _operand(layer.node, 0))
    reader = _bias_reader(layer.node)
    if bias is not reader and reader is not None and source is not None and scale.ndim:
        return snapped(scale_for_bias(scale, attribute(module, str(reader.target)), source.scale), layer.entry.spec)
    return scale


def _function(layer: _Layer, module: fx.GraphModule) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer, with its bias, as a function of inputs and weight."""
    operator, options = layer.node.target, layer.node.args[3:]
    assert callable(operator)
    bias = _operand(layer.node, 2)
    value = None if bias is None else _constant(module, bias)
    return lambda x, weight: operator(x, weight, value, *options)


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        return attribute(module, str(node.target)).detach()
    source = _operand(node, 0)
    assert source is not None
    return module.get_submodule(str(node.target))(_constant(module, source))


def _bias_reader(layer: fx.Node) -> fx.Node | None:
    """The node that reads a layer's bias, behind its rounding or not; None where it has none or computes it."""
    bias = _operand(layer, 2)
    if bias is not None and bias.op == "call_module":
        bias = _operand(bias, 0)
    return bias if bias is not None and bias.op == "get_attr" else None


def _stand_in(module: fx.GraphModule, node: fx.Node | None) -> Quantizer | Codebook | None:
    """The module whose output ``node`` is, where it stands for a weight."""
    if node is None or node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, Quantizer | Codebook) else None


def _operand(node: fx.Node, index: int) -> fx.Node | None:
    """The node that is the argument of another at ``index``, or None."""
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, fx.Node) else None


def _correct_bias(layer: _Layer, name: str, ours: Stream, theirs: Stream, rate: Rate | None) -> None:
    """Set a layer's bias so that the mean of its output is that of the float model's."""
    axis = -1 if layer.op.kind == "linear" else 1
    wanted, given = (_mean(stream.peek(), axis) for stream in (theirs, ours))
    # Of the bias as it was added, rounded: else what its rounding had moved would be kept.
    bias = _operand(layer.node, 2)
    assert bias is not None
    mended = corrected_bias(_constant(ours.module, bias), wanted, given)
    set_parameter(ours.module, name, coarse(mended, BIAS_BITS) if rate is not None else mended)


def _mean(outputs: list[Tensor], axis: int) -> Tensor:
    weights = torch.tensor([float(y.numel()) for y in outputs], dtype=torch.float64)
    means = torch.stack([channel_means(y, axis).double() for y in outputs])
    return ((weights / weights.sum())[:, None] * means).sum(0).float()


def _spread(value: Value, dims: int) -> tuple[int, ...]:
    """Give every dimension its value where one stands for all."""
    values = tuple(int(str(item)) for item in (value if isinstance(value, tuple) else (value,)))
    return values * dims if len(values) == 1 else values
