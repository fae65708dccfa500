"""The index flow of layers, products and element-wise operators (see ``kompakt.graph.flow``)."""

import numpy as np

from kompakt.graph.flow import Flow, Rule, broadcast, fixed, fixed_like
from kompakt.graph.graph import Op
from kompakt.graph.labels import Array, Dims
from kompakt.graph.shaping import SHAPING

KERNEL = "the extent of a kernel"
SINGLE = "groups of channels are cut as a whole"


def elementwise(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Combine operands index by index, with broadcasting."""
    return tuple(broadcast(found, found.inputs(op), shape) for shape in op.shapes)


def _source(found: Flow, op: Op) -> tuple[Dims, ...]:
    return fixed_like(op)


def _conv(found: Flow, op: Op) -> tuple[Dims, ...]:
    image, weight = found.of(op.arguments["input"]), found.of(op.arguments["weight"])
    spatial = len(weight) - 2
    channel = len(image) - spatial - 1
    groups = op.arguments["groups"]
    for dim in weight[2:]:
        found.labels.freeze(dim, KERNEL)
    if groups == 1:
        found.labels.unite(image[channel], weight[1])
    else:
        _grouped(found, int(str(groups)), image[channel], weight)
    for bias in found.given(op, "bias"):
        found.labels.unite(bias[0], weight[0])
    found.made.append(weight[0])
    return ((*image[:channel], weight[0], *(fixed(size) for size in op.shape[channel + 1 :])),)


def _grouped(found: Flow, groups: int, channels: Array, weight: Dims) -> None:
    """Tie channels of a grouped convolution: whole groups go, or the same places in every group."""
    inside, outside = channels.reshape(groups, -1), weight[0].reshape(groups, -1)
    if groups >= min(inside.shape[1], outside.shape[1]):
        found.labels.unite(inside, inside[:, :1])
        found.labels.unite(outside, outside[:, :1])
        found.labels.unite(inside[:, 0], outside[:, 0])
        found.labels.freeze(weight[1], SINGLE)
    else:
        found.labels.unite(inside, weight[1][None, :])
        found.labels.unite(outside, outside[:1])


def _conv_transpose(found: Flow, op: Op) -> tuple[Dims, ...]:
    image, weight = found.of(op.arguments["input"]), found.of(op.arguments["weight"])
    channel = len(image) - len(weight) + 1
    groups = int(str(op.arguments["groups"]))
    for dim in weight[2:]:
        found.labels.freeze(dim, KERNEL)
    found.labels.unite(image[channel], weight[0])
    out = weight[1]
    if groups > 1:
        inside = weight[0].reshape(groups, -1)
        found.labels.unite(inside, inside[:, :1])
        found.labels.freeze(weight[1], SINGLE)
        out = np.repeat(inside[:, 0], len(weight[1]))
    for bias in found.given(op, "bias"):
        found.labels.unite(bias[0], out)
    found.made.append(out)
    return ((*image[:channel], out, *(fixed(size) for size in op.shape[channel + 1 :])),)


def _linear(found: Flow, op: Op) -> tuple[Dims, ...]:
    rows, weight = found.of(op.arguments["input"]), found.of(op.arguments["weight"])
    found.labels.unite(rows[-1], weight[1])
    for bias in found.given(op, "bias"):
        found.labels.unite(bias[0], weight[0])
    found.made.append(weight[0])
    return ((*rows[:-1], weight[0]),)


def _embedding(found: Flow, op: Op) -> tuple[Dims, ...]:
    weight = found.of(op.arguments["weight"])
    found.labels.freeze(weight[0], "rows are looked up by number")
    found.made.append(weight[1])
    return ((*(fixed(size) for size in op.shape[:-1]), weight[1]),)


def _channel_norm(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Batch and instance norm: one scale for each channel; PReLU likewise."""
    image = found.first(op)
    for dims in found.given(op, "weight", "bias", "running_mean", "running_var"):
        if len(dims[0]) > 1:
            found.labels.unite(image[1], dims[0])
    return (image, *fixed_like(op)[1:])


def _layer_norm(found: Flow, op: Op) -> tuple[Dims, ...]:
    rows = found.of(op.arguments["input"])
    for dims in found.given(op, "weight", "bias"):
        for left, right in zip(rows[-len(dims) :], dims, strict=True):
            found.labels.unite(left, right)
    return (rows, *fixed_like(op)[1:])


def _group_norm(found: Flow, op: Op) -> tuple[Dims, ...]:
    image, groups = found.of(op.arguments["input"]), int(str(op.arguments["num_groups"]))
    for dims in found.given(op, "weight", "bias"):
        found.labels.unite(image[1], dims[0])
    grid = image[1].reshape(groups, -1)
    if groups >= grid.shape[1]:
        found.labels.unite(grid, grid[:, :1])
    elif groups > 1:
        found.labels.unite(grid, grid[:1])
    return (image,)


def _matmul(found: Flow, op: Op) -> tuple[Dims, ...]:
    left, right = found.inputs(op)[:2]
    found.labels.unite(left[-1], right[-2] if len(right) > 1 else right[0])
    batch = broadcast(found, [left[:-2], right[:-2]], op.shape[: max(len(left), len(right)) - 2])
    for dim in batch:
        found.labels.heads(dim)
    return ((*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ())),)


def _addmm(found: Flow, op: Op) -> tuple[Dims, ...]:
    bias, left, right = found.inputs(op)[:3]
    found.labels.unite(left[-1], right[-2])
    return (broadcast(found, [(*left[:-1], right[-1]), bias], op.shape),)


def _attention(found: Flow, op: Op) -> tuple[Dims, ...]:
    query, key, value = (found.of(op.arguments[name]) for name in ("query", "key", "value"))
    found.labels.unite(query[-1], key[-1])
    if op.arguments.get("scale") is None:
        found.labels.freeze(query[-1], "the scale of an attention follows it")
    masks = [mask[:-2] for mask in found.given(op, "attn_mask")]
    batch = broadcast(found, [query[:-2], key[:-2], value[:-2], *masks], op.shape[:-2])
    for dim in batch:
        found.labels.heads(dim)
    for dims in (query[-2], key[-2], value[-2], *(dim for mask in found.given(op, "attn_mask") for dim in mask[-2:])):
        found.labels.freeze(dims, "positions of an attention")
    return ((*batch, query[-2], value[-1]),)


def _einsum(found: Flow, op: Op) -> tuple[Dims, ...]:
    equation = str(op.arguments["equation"]).replace(" ", "")
    left, _, right = equation.partition("->")
    inputs = found.inputs(op)
    if "." in equation or not right:
        return ()
    known: dict[str, Array] = {}
    count: dict[str, int] = {}
    for letters, dims in zip(left.split(","), inputs, strict=True):
        for letter, dim in zip(letters, dims, strict=True):
            count[letter] = count.get(letter, 0) + 1
            if letter in known and len(known[letter]) == len(dim):
                found.labels.unite(known[letter], dim)
                known[letter] = np.where(dim == 0, 0, known[letter])
            elif len(dim) > len(known.get(letter, ())):
                known[letter] = dim
    for letter in right:
        if count[letter] == len(inputs) > 1:
            found.labels.heads(known[letter])
    return (tuple(known[letter] for letter in right),)


def _reduce(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Sums and statistics over some dimensions; over channels they are those of the channels that stay."""
    dims = found.first(op)
    axes = op.arguments.get("dim")
    over = range(len(dims)) if axes is None or axes == () else (axes if isinstance(axes, tuple) else (axes,))
    gone = {int(str(axis)) % max(len(dims), 1) for axis in over}
    if len(op.shape) == len(dims):
        return (tuple(fixed(1) if axis in gone else dim for axis, dim in enumerate(dims)),)
    return (tuple(dim for axis, dim in enumerate(dims) if axis not in gone),)


def _along(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Operators that mix all indices of one dimension in a way that removal would change."""
    dims = list(found.first(op))
    axes = op.arguments.get("dim", op.arguments.get("dims", -1))
    for axis in axes if isinstance(axes, tuple) else (axes,):
        place = int(str(axis)) % max(len(dims), 1) if axis is not None else 0
        found.labels.freeze(dims[place], f"{op.kind} over it")
        dims[place] = fixed(len(dims[place]))
    reduced = [dim for axis, dim in enumerate(dims) if len(op.shape) == len(dims) or axis != place]
    return tuple(
        tuple(dim if len(dim) == size else fixed(size) for dim, size in zip(reduced, shape, strict=True))
        for shape in op.shapes
    )


def _spatial(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Pooling and interpolation: channels pass, the extents behind them are new."""
    dims = found.first(op)
    extents = 1 if "1d" in op.kind else 3 if "3d" in op.kind else 2
    for dim in dims[len(dims) - extents :]:
        found.labels.freeze(dim, f"{op.kind} over it")
    return tuple(
        (*dims[: len(dims) - extents], *(fixed(size) for size in shape[len(dims) - extents :])) for shape in op.shapes
    )


def _many(rule: Rule, kinds: str) -> dict[str, Rule]:
    return dict.fromkeys(kinds.split(), rule)


RULES: dict[str, Rule] = {
    **_many(
        elementwise,
        "relu relu6 elu selu celu gelu silu mish sigmoid tanh hardtanh hardsigmoid hardswish leaky_relu "
        "softplus softsign log_sigmoid abs neg exp exp2 log log2 log1p sqrt rsqrt reciprocal square sin cos "
        "erf sign floor ceil round clamp clamp_min clamp_max dropout feature_dropout alpha_dropout dropout2d "
        "clone contiguous detach alias to _to_copy type_as lift_fresh_copy add sub rsub mul div pow "
        "true_divide floor_divide remainder maximum minimum where lerp addcmul addcdiv masked_fill eq ne lt "
        "le gt ge logical_and logical_or logical_not bitwise_and zeros_like ones_like full_like copy fill "
        "zero nan_to_num atan2 detach_copy hardshrink softshrink",
    ),
    **_many(_source, "input zeros ones full arange linspace scalar_tensor empty new_zeros new_ones new_full eye"),
    **_many(_conv, "conv1d conv2d conv3d"),
    **_many(_conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_many(_channel_norm, "batch_norm instance_norm prelu"),
    **_many(_layer_norm, "layer_norm native_layer_norm rms_norm"),
    **_many(_matmul, "matmul mm bmm"),
    **_many(_addmm, "addmm baddbmm"),
    **_many(_reduce, "sum mean var std linalg_vector_norm norm"),
    **_many(
        _along,
        "softmax log_softmax _softmax amax amin max min argmax argmin cumsum topk sort logsumexp roll flip any all",
    ),
    **_many(
        _spatial,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "upsample_nearest1d upsample_nearest3d max_pool2d_with_indices",
    ),
    "linear": _linear,
    "embedding": _embedding,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **SHAPING,
}
"""Operator → rule. An operator that is not here is left whole, and said."""
