"""Average pools as depthwise convolutions: hardware that has no integer average multiplies by 1/count instead."""

import copy

import torch
from torch import fx

from kompakt.build.integer import averages_image
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, kind_of

_conv2d = torch.ops.aten.conv2d.default


def averages_as_convolutions(capture: Capture) -> Capture:
    """Return a folded capture whose average pools are depthwise convolutions with the weight 1/count.

    The weight is quantized as any other: exactly where count is a power of two and the scale is one too.
    Pools that count no padding, or round their output's size up, stay as they are.

    Args:
        capture: folded, in float; it is left as it was.
    """
    module = copy.deepcopy(capture.module)
    for node in list(module.graph.nodes):
        window = _window(node)
        if window is not None:
            _replace(module, node, *window)
    module.graph.eliminate_dead_code()
    module.recompile()
    return fold(Capture(module=module, graph=capture.graph, example=capture.example))


def _window(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """The kernel, stride and padding of an average pool, or None."""
    if averages_image(node):
        return list(node.args[0].meta["val"].shape[2:]), [1, 1], [0, 0]
    if node.op != "call_function" or kind_of(node) != "avg_pool2d":
        return None
    given = (*node.args[1:], *(None, 0, False, True, None)[len(node.args) - 2 :])
    kernel, stride, padding = (_two(item) for item in (given[0], given[1] or given[0], given[2]))
    _, _, _, ceil, count, divisor = given
    return None if ceil or divisor is not None or (any(padding) and not count) else (kernel, stride, padding)


def _two(size: int | list[int]) -> list[int]:
    return [size] * 2 if isinstance(size, int) else [*size] if len(size) == 2 else [*size] * 2


def _replace(module: fx.GraphModule, node: fx.Node, kernel: list[int], stride: list[int], padding: list[int]) -> None:
    channels = node.args[0].meta["val"].shape[1]
    name = f"{node.name}_weight"
    module.register_parameter(
        name, torch.nn.Parameter(torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1])), requires_grad=False)
    )
    value = node.meta["val"]
    with module.graph.inserting_before(node):
        weight = module.graph.get_attr(name)
        weight.meta = {"val": value.new_empty((channels, 1, *kernel))}
        made = module.graph.call_function(_conv2d, (node.args[0], weight, None, stride, padding, [1, 1], channels))
        made.meta = {**node.meta, "val": value if value.ndim == 4 else value.unsqueeze(-1).unsqueeze(-1)}
        if value.ndim == 2:
            flat = module.graph.call_function(torch.ops.aten.flatten.using_ints, (made, 1))
            flat.meta = dict(node.meta)
            node.replace_all_uses_with(flat)
        else:
            node.replace_all_uses_with(made)
    module.graph.erase_node(node)
