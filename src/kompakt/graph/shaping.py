"""The index flow of operators that only rearrange: views, slices, concatenation, padding."""

from itertools import pairwise

import numpy as np

from kompakt.graph.flow import Flow, Rule, broadcast, fixed
from kompakt.graph.graph import Op, Ref, Value
from kompakt.graph.labels import Array, Dims

BY_NUMBER = "its indices are addressed by number"


def place(value: Value, rank: int) -> int:
    """Read a dimension argument that may be negative."""
    return int(str(value)) % max(rank, 1)


def whole(value: Value) -> int:
    """Read an integer argument."""
    return int(str(value))


def _view(found: Flow, op: Op) -> tuple[Dims, ...]:
    return (reread(found, found.first(op), op.shape),)


def reread(found: Flow, dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Label a tensor that is read with another shape, row-major."""
    result: list[Array] = [fixed(size) for size in shape]
    old = [axis for axis, dim in enumerate(dims) if len(dim) != 1]
    new = [axis for axis, size in enumerate(shape) if size != 1]
    for ins, outs in _segments([len(dims[axis]) for axis in old], [shape[axis] for axis in new]):
        sources, targets = [dims[old[axis]] for axis in ins], [new[axis] for axis in outs]
        merged = found.labels.merge(sources) if len(sources) > 1 else sources[0]
        parts = found.labels.split(merged, [shape[axis] for axis in targets]) if len(targets) > 1 else (merged,)
        for axis, part in zip(targets, parts, strict=True):
            result[axis] = part
    return tuple(result)


def _segments(old: list[int], new: list[int]) -> list[tuple[range, range]]:
    """Cut two lists of sizes into the shortest runs of equal product."""
    found, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        start, begin, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((range(start, i), range(begin, j)))
    return found


def _permute(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = found.first(op)
    order = op.arguments["dims"]
    return (tuple(dims[place(axis, len(dims))] for axis in order),) if isinstance(order, tuple) else ()


def _transpose(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = list(found.first(op))
    ends = (op.arguments.get("dim0", op.arguments.get("axis0")), op.arguments.get("dim1", op.arguments.get("axis1")))
    first, second = (place(axis, len(dims)) for axis in ends)
    dims[first], dims[second] = dims[second], dims[first]
    return (tuple(dims),)


def _reverse(found: Flow, op: Op) -> tuple[Dims, ...]:
    return (tuple(reversed(found.first(op))),)


def _cat(found: Flow, op: Op) -> tuple[Dims, ...]:
    many = [dims for dims in found.inputs(op) if not (len(dims) == 1 and len(dims[0]) == 0)]
    axis = place(op.arguments.get("dim", 0), len(op.shape))
    others = broadcast(found, [(*dims[:axis], fixed(1), *dims[axis + 1 :]) for dims in many], _with(op.shape, axis, 1))
    joined = np.concatenate([dims[axis] for dims in many])
    return ((*others[:axis], joined, *others[axis + 1 :]),)


def _stack(found: Flow, op: Op) -> tuple[Dims, ...]:
    axis = place(op.arguments.get("dim", 0), len(op.shape))
    rest = broadcast(found, found.inputs(op), op.shape[:axis] + op.shape[axis + 1 :])
    return ((*rest[:axis], fixed(op.shape[axis]), *rest[axis:]),)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _pieces(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Chunk and split: the same places go in all pieces, so that equal pieces stay equal.

    Of a split by size the last piece may be shorter, and stays no longer than the others. The sizes of a
    split by a list are free, unless they are all equal.
    """
    dims = found.first(op)
    axis = place(op.arguments.get("dim", 0), len(dims))
    sizes = [shape[axis] for shape in op.shapes]
    starts = [0, *np.cumsum(sizes)]
    parts = [dims[axis][begin:end] for begin, end in pairwise(starts)]
    if len(set(sizes)) == 1 or isinstance(op.arguments.get("split_size"), int):
        for part in parts[1:]:
            found.labels.unite(parts[0][: len(part)], part, "pieces of a split stay equal")
    elif op.kind in ("chunk", "tensor_split"):
        found.labels.freeze(dims[axis], "cut into unequal pieces by their number")
    return tuple((*dims[:axis], part, *dims[axis + 1 :]) for part in parts)


def _unbind(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = found.first(op)
    axis = place(op.arguments.get("dim", 0), len(dims))
    found.labels.freeze(dims[axis], BY_NUMBER)
    return tuple((*dims[:axis], *dims[axis + 1 :]) for _ in op.shapes)


def _getitem(found: Flow, op: Op) -> tuple[Dims, ...]:
    source = op.arguments["arg0"]
    outputs = found.ops[source.name] if isinstance(source, Ref) else ()
    return (outputs[whole(op.arguments["arg1"])],)


def _slice(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = found.first(op)
    axis = place(op.arguments.get("dim", 0), len(dims))
    dim = dims[axis]
    if op.kind == "narrow":
        begin = place(op.arguments["start"], len(dim))
        part = dim[begin : begin + whole(op.arguments["length"])]
    else:
        start, end = (op.arguments.get(name) for name in ("start", "end"))
        step = whole(op.arguments.get("step", 1))
        if step != 1:
            found.labels.freeze(dim, "sliced with a step")
        part = dim[None if start is None else whole(start) : None if end is None else whole(end) : step]
    return ((*dims[:axis], part, *dims[axis + 1 :]),)


def _select(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = found.first(op)
    axis = place(op.arguments.get("dim", 0), len(dims))
    found.labels.freeze(dims[axis], BY_NUMBER)
    return ((*dims[:axis], *dims[axis + 1 :]),)


def _index(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Advanced indexing ``x[..., indices, ...]``: indexed dimensions are addressed by number."""
    dims, indices = found.of(op.arguments["self"]), op.arguments["indices"]
    if not isinstance(indices, tuple):
        return ()
    used = [axis for axis, value in enumerate(indices) if isinstance(value, Ref)]
    for axis in used:
        found.labels.freeze(dims[axis], BY_NUMBER)
        for dim in found.of(indices[axis]):
            found.labels.freeze(dim, BY_NUMBER)
    rest = [axis for axis in range(len(dims)) if axis not in used]
    new = [fixed(size) for size in op.shape]
    together = used == list(range(used[0], used[0] + len(used))) if used else True
    front = len([axis for axis in rest if used and axis < used[0]]) if together else 0
    for number, axis in enumerate(rest):
        new[number if number < front else len(new) - len(rest) + number] = dims[axis]
    return (tuple(new),)


def _index_select(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = list(found.of(op.arguments["self"]))
    axis = place(op.arguments["dim"], len(dims))
    found.labels.freeze(dims[axis], BY_NUMBER)
    dims[axis] = fixed(op.shape[axis])
    return (tuple(dims),)


def _expand(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Repeat dimensions of size 1 (``expand``, and ``repeat`` of those): any number of copies will do."""
    dims = found.first(op)
    result = []
    for axis, size in enumerate(op.shape):
        inner = axis - len(op.shape) + len(dims)
        dim = dims[inner] if inner >= 0 else fixed(1)
        if len(dim) == size:
            result.append(dim)
        elif len(dim) == 1:
            result.append(found.labels.fresh(size))
        else:
            result.append(np.tile(dim, size // len(dim)))
    return (tuple(result),)


def _pad(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Pad: with zeros any number of new channels will do; other modes copy from the border."""
    dims = list(found.first(op))
    pads = op.arguments["pad"]
    constant = op.arguments.get("mode", "constant") == "constant"
    if not isinstance(pads, tuple):
        return ()
    for number in range(len(pads) // 2):
        before, after = whole(pads[2 * number]), whole(pads[2 * number + 1])
        axis = len(dims) - 1 - number
        if before == after == 0:
            continue
        if not constant or min(before, after) < 0:
            found.labels.freeze(dims[axis], "padded other than with a constant")
        fill = found.labels.fresh if dims[axis].any() and constant and min(before, after) >= 0 else fixed
        dims[axis] = (
            np.concatenate([fill(before), dims[axis], fill(after)])
            if min(before, after) >= 0
            else fixed(len(dims[axis]) + before + after)
        )
    return (tuple(dims),)


def _pixel_shuffle(found: Flow, op: Op) -> tuple[Dims, ...]:
    """Channels (C, r, r) become C: the r·r channels of one output go together."""
    dims = found.first(op)
    found.labels.freeze(dims[-1], "shuffled with channels")
    channels = op.shape[-3]
    grid = dims[-3].reshape(channels, -1)
    found.labels.unite(grid, grid[:, :1])
    return ((*dims[:-3], grid[:, 0], fixed(op.shape[-2]), fixed(op.shape[-1])),)


def _pixel_unshuffle(found: Flow, op: Op) -> tuple[Dims, ...]:
    dims = found.first(op)
    times = op.shape[-3] // len(dims[-3])
    return ((*dims[:-3], np.repeat(dims[-3], times), fixed(op.shape[-2]), fixed(op.shape[-1])),)


SHAPING: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze"), _view),
    **dict.fromkeys(("view_as", "reshape_as"), _view),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _pieces),
    **dict.fromkeys(("expand", "expand_as", "repeat"), _expand),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("t", "numpy_T"), _reverse),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "permute": _permute,
    "stack": _stack,
    "unbind": _unbind,
    "getitem": _getitem,
    "select": _select,
    "index": _index,
    "index_select": _index_select,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
