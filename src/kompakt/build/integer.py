"""``exact``: let a quantized capture compute what the runtime's integer kernels compute."""

import copy
from math import inf

import torch
from torch import Tensor, fx, nn

from kompakt.build.layers import BiasQuantizer, Quantizer
from kompakt.build.quantize import quantizer_of
from kompakt.graph.trace import Capture, attribute, kind_of
from kompakt.numerics.grid import quantize
from kompakt.numerics.integer import (
    Grid,
    Window,
    add,
    average_image,
    average_windows,
    exact_dtype,
    multiply,
    requantize,
)
from kompakt.spec import PerGroup, PerTensor

FOLDER = "integers"
_BOUNDS = {"relu": (0.0, inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}


def exact(capture: Capture) -> Capture:
    """Return a capture in which every op with an integer kernel computes as ONNX Runtime's kernel does on x86.

    A convolution or linear map of integers sums integers and multiplies once; sums, products and average
    pools of integers likewise (see ``kompakt.numerics.integer``). Concatenations, max pools and moves of
    quantized values are exact already; ops without an integer kernel stay as they are. The result is for
    judging, not for training or export.

    Args:
        capture: as ``kompakt.build.quantize.quantize`` returns it; it is left as it was.
    """
    module = copy.deepcopy(capture.module)
    module.add_module(FOLDER, nn.ModuleDict())
    # All kernels are made before the first replaces a quantizer that another one reads.
    for node, core, kernel in _kernels(module):
        _replace(module, node, core, kernel)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return Capture(module=module, graph=capture.graph, example=capture.example)


def behind_clamps(node: fx.Node, made: Quantizer) -> fx.Node:
    """Return the op whose output ``node`` (``made``'s) rounds, behind the clamps that its grid makes redundant.

    A clamp changes nothing where its ends round to the ends of the grid or beyond.
    """
    core = node.args[0]
    while kind_of(core) in _BOUNDS and len(core.users) == 1:
        low, high = (*core.args[1:3], *_BOUNDS[kind_of(core)][len(core.args) - 1 :])
        first, last = torch.round(torch.tensor([low, high]) / made.scale.cpu()) + made.zero_point.cpu()
        if first > made.spec.qmin or last < made.spec.qmax:
            break
        core = core.args[0]
    return core


def _kernels(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, nn.Module]]:
    """List what has an integer form: the node whose value it makes, the op and the module to run instead."""
    found: list[tuple[fx.Node, fx.Node, nn.Module]] = []
    for node in module.graph.nodes:
        made = quantizer_of(module, node)
        if made is not None and node.args[0].op != "get_attr" and _whole_bytes(made):
            core = behind_clamps(node, made)
            kernel = _kernel(module, core, grid_of(made)) if len(core.users) == 1 else None
            if kernel is not None:
                found.append((node, core, kernel))
    taken = {core for _, core, _ in found}
    for node in module.graph.nodes:
        if kind_of(node) == "linear" and node not in taken:
            kernel = _layer(module, node, None)
            if kernel is not None:
                found.append((node, node, kernel))
    return found


def grid_of(made: Quantizer) -> Grid:
    """Return the grid of a static quantizer with one scale."""
    return Grid(scale=made.scale, zero_point=made.zero_point, qmin=made.spec.qmin, qmax=made.spec.qmax)


class IntegerLayer(nn.Module):
    """A convolution or linear map of integers: ``scale_x·scale_w · (Σ (q_x - z_x)·q_w + q_b)``, or that on ``grid``.

    Args:
        node: the layer.
        source: of its input.
        weight: integers, output channels first, and their scale.
        bias: int32 integers, or None.
        grid: of the output; None gives floats.
    """

    def __init__(
        self, node: fx.Node, source: Grid, weight: tuple[Tensor, Tensor], bias: Tensor | None, grid: Grid | None
    ) -> None:
        super().__init__()
        self.operator, self.options = node.target, node.args[3:]
        self.source, self.grid = source, grid
        integers, scale = weight
        dtype = exact_dtype(integers, bias)
        factor = source.scale * scale if grid is None else source.scale * scale / grid.scale
        shape = (-1,) + (1,) * (integers.ndim - 2)
        self.weight = nn.Parameter(integers.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype).reshape(shape), requires_grad=False)
        self.factor = nn.Parameter(factor.reshape(shape) if factor.ndim else factor, requires_grad=False)
        # Gemm adds the bias in integers, MatMul has it added in floats.
        self.late_bias = integers.ndim == 2 and node.meta["val"].ndim != 2

    def forward(self, x: Tensor) -> Tensor:
        """Map values on the input's grid to values on the output's, or to floats."""
        steps = self.source.steps(x).to(self.weight.dtype)
        # Rounding costs nothing where the sums are exact, and mends algorithms that are only nearly so.
        total = self.operator(steps, self.weight, None, *self.options).round_()
        if self.bias is not None and not self.late_bias:
            total = total + self.bias
        if self.grid is not None:
            return requantize(total, self.factor, self.grid)
        product = total.float() * self.factor
        return product + self.bias.float() * self.factor if self.bias is not None and self.late_bias else product


class IntegerJoin(nn.Module):
    """The sum or product of two tensors of integers."""

    def __init__(self, kind: str, grid_a: Grid, grid_b: Grid, grid: Grid) -> None:
        super().__init__()
        self.join = {"add": add, "mul": multiply}[kind]
        self.grids = (grid_a, grid_b, grid)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Join two tensors on their grids."""
        return self.join(a, b, *self.grids)


class IntegerPool(nn.Module):
    """The average of whole images or, with a window, of windows; ``keep`` keeps the two dimensions of an image."""

    def __init__(self, source: Grid, grid: Grid, window: Window | None, keep: bool) -> None:
        super().__init__()
        self.source, self.grid, self.window, self.keep = source, grid, window, keep

    def forward(self, x: Tensor) -> Tensor:
        """Average (N, C, H, W)."""
        if self.window is not None:
            return average_windows(x, self.window, self.grid)
        mean = average_image(x, self.source, self.grid)
        return mean if self.keep else mean.flatten(1)


def averages_image(node: fx.Node) -> bool:
    """Whether a node averages whole images of (N, C, H, W)."""
    kind = kind_of(node) if node.op == "call_function" else ""
    if kind == "adaptive_avg_pool2d":
        return tuple(node.args[1]) in ((1, 1), (1,)) and node.args[0].meta["val"].ndim == 4
    if kind == "mean" and len(node.args) > 1 and isinstance(node.args[1], list | tuple):
        return node.args[0].meta["val"].ndim == 4 and sorted(dim % 4 for dim in node.args[1]) == [2, 3]
    return False


def _kernel(module: fx.GraphModule, core: fx.Node, grid: Grid) -> nn.Module | None:
    """Make the integer form of an op whose output lies on ``grid``, or return None where it has none."""
    kind = kind_of(core) if core.op == "call_function" else ""
    if kind == "conv2d" or (kind == "linear" and core.meta["val"].ndim == 2):
        return _layer(module, core, grid)
    sources = [_grid_at(module, item) for item in core.args[:2]]
    if kind in ("add", "mul") and len(core.args) == 2 and not core.kwargs and None not in sources:
        return IntegerJoin(kind, sources[0], sources[1], grid)
    if averages_image(core) and sources[0] is not None:
        return IntegerPool(sources[0], grid, None, core.meta["val"].ndim == 4)
    window = _window(core) if kind == "avg_pool2d" else None
    return IntegerPool(sources[0], grid, window, True) if window is not None and sources[0] is not None else None


def _layer(module: fx.GraphModule, node: fx.Node, grid: Grid | None) -> IntegerLayer | None:
    """Make the integer form of a layer whose input and weight are integers, or return None."""
    source, made = _grid_at(module, node.args[0]), quantizer_of(module, node.args[1])
    if source is None or made is None or isinstance(made.spec.granularity, PerGroup) or node.kwargs:
        return None
    weight = attribute(module, str(node.args[1].args[0].target))
    integers = quantize(weight, made.scale, made.zero_point, made.spec)
    reader = node.args[2] if len(node.args) > 2 else None
    bias = None
    if reader is not None:
        rounding = module.get_submodule(str(reader.target)) if reader.op == "call_module" else None
        if not isinstance(rounding, BiasQuantizer):
            return None
        bias = rounding.integers(attribute(module, str(reader.args[0].target)))
    return IntegerLayer(node, source, (integers, made.scale), bias, grid)


def _grid_at(module: fx.GraphModule, node: object) -> Grid | None:
    """Return the grid of a node's value where a static quantizer of 8 bits made it."""
    made = quantizer_of(module, node)
    return grid_of(made) if made is not None and _whole_bytes(made) else None


def _whole_bytes(made: Quantizer) -> bool:
    """Whether a kernel's own clamp, to 8 bits, is the quantizer's."""
    return not made.spec.dynamic and made.spec.bits == 8 and isinstance(made.spec.granularity, PerTensor)


def _window(node: fx.Node) -> Window | None:
    kernel, stride, padding, ceil, count, divisor = (
        *node.args[1:],
        *(None, 0, False, True, None)[len(node.args) - 2 :],
    )
    if ceil or divisor is not None:
        return None
    pairs = [_pair(item) for item in (kernel, stride or kernel, padding)]
    return Window(kernel=pairs[0], stride=pairs[1], padding=pairs[2], count_padding=bool(count))


def _pair(value: int | list[int]) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return values[0], values[-1]


def _replace(module: fx.GraphModule, node: fx.Node, core: fx.Node, kernel: nn.Module) -> None:
    """Let the users of ``node`` read the kernel's output of ``core``'s data inputs instead."""
    folder = module.get_submodule(FOLDER)
    assert isinstance(folder, nn.ModuleDict)
    folder[core.name] = kernel
    operands = core.args[:2] if isinstance(kernel, IntegerJoin) else core.args[:1]
    with module.graph.inserting_before(node):
        value = module.graph.call_module(f"{FOLDER}.{core.name}", tuple(operands))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)
