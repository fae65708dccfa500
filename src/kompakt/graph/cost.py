"""Count multiply–accumulates of one op from shapes alone."""

from math import prod

Shape = tuple[int, ...]


def op_macs(kind: str, out: Shape, operands: list[Shape]) -> int:
    """Count the multiply–accumulates of one op, for the whole batch of the example.

    A convolution costs ``numel(out) · C_in/groups · k·k``; a product of matrices ``numel(out) · inner``;
    attention both of its products. Element-wise work is not counted, as is the field's custom.

    Args:
        kind: the operator, e.g. ``conv2d``.
        out: shape of the output.
        operands: shapes of the tensor arguments, in order.
    """
    if kind in ("conv1d", "conv2d", "conv3d"):
        return prod(out) * prod(operands[1][1:])
    if kind in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return prod(operands[0]) * prod(operands[1][1:])
    if kind == "linear":
        return prod(out) * operands[1][-1]
    if kind in ("matmul", "mm", "bmm"):
        return prod(out) * operands[0][-1]
    if kind in ("addmm", "baddbmm"):
        return prod(out) * operands[1][-1]
    if kind == "scaled_dot_product_attention":
        query, key, value = operands[:3]
        return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0
