"""From a message and the base to the new state; nothing of a message is believed unchecked."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError
from kompakt.federated.grid import grid_of
from kompakt.federated.layout import Layout, State, hash_state, layout_of, message_pieces
from kompakt.federated.message import WHERE, Header, read_blocks, read_header
from kompakt.federated.sparse import read_sparse
from kompakt.federated.values import STEP_BIAS, apply_integer, apply_statistic, apply_weight
from kompakt.numerics.updates import LEAST_STEP, MOST_STEP, keep_random


def decode_update(data: bytes, base: State) -> dict[str, Tensor]:
    """Return the state that an update makes of its base; the base stays as it is.

    Args:
        data: what ``encode_update`` returned, from anyone.
        base: the very state that the sender started from.

    Raises:
        FormatError: the message is cut, damaged, hostile, or belongs to another base.

    Example:
        >>> from kompakt.federated import UpdateSpec, encode_update
        >>> base, new = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 1.0, -1.0])}
        >>> decode_update(encode_update(new, base, UpdateSpec(ratio=None, rounding="nearest")), base)["w"].sign()
        tensor([ 0.,  1., -1.])
    """
    layout = layout_of(base)
    size = sum(base[name].numel() for name in layout.weights)
    header, cursor = read_header(data, size)
    if header.base != hash_state(base):
        raise FormatError(f"{WHERE}: made for another base (its hash differs); send the current state and ask again")
    held = message_pieces(base, layout, header.places, sparse=header.sparse)
    weights = dict(zip(layout.weights, _sparse(base, layout, cursor), strict=True)) if header.sparse else {}
    arrays = _Arrays(read_blocks(cursor, held))
    found = weights or dict(zip(layout.weights, _weights(base, layout, header, arrays), strict=True))
    for name in layout.statistics:
        found[name] = apply_statistic(name, base, arrays.like(base[name]), header.shift)
    for name in layout.integers:
        found[name] = apply_integer(base[name], arrays.like(base[name]))
    arrays.end()
    for name in (*layout.weights, *layout.statistics):
        if not bool(found[name].isfinite().all()):
            raise FormatError(f"{WHERE}: {name}: values that are not finite; the update is refused")
    return {name: found[name] for name in base}


class _Arrays:
    """The arrays of a message in order, put together from their pieces."""

    def __init__(self, pieces: Iterator[np.ndarray]) -> None:
        self._pieces = pieces

    def flat(self, size: int) -> np.ndarray:
        """The next array, of this many values."""
        found: list[np.ndarray] = []
        while size > sum(piece.size for piece in found):
            found.append(next(self._pieces))
        return np.concatenate(found) if found else np.zeros(0, np.int16)

    def like(self, tensor: Tensor) -> Tensor:
        """The next array in the shape of a tensor; in its dtype where that is no float."""
        found = torch.from_numpy(self.flat(tensor.numel()).copy())
        if tensor.dtype == torch.bool and found.numel() and int(found.max()) > 1:
            raise FormatError(f"{WHERE}: a truth value is neither 0 nor 1; the update is refused")
        return (found if tensor.is_floating_point() else found.to(tensor.dtype)).reshape(tensor.shape)

    def end(self) -> None:
        """Check that nothing is left."""
        if next(self._pieces, None) is not None:
            raise FormatError(f"{WHERE}: more values than the base has; the update is refused")


def _sparse(base: State, layout: Layout, cursor: Cursor) -> Iterator[Tensor]:
    """The weights of a sparse message."""
    section = Cursor(cursor.take(cursor.varint(cursor.left, "the length of the weights")), WHERE)
    shared = section.u8(1, "whether the step is shared")
    steps = [section.fixed(2) for _ in range(1 if shared else len(layout.weights))] * (
        len(layout.weights) if shared else 1
    )
    grid = grid_of(tuple(tuple(base[name].shape) for name in layout.weights))
    places, values = read_sparse(section, grid)
    section.end()
    codes = torch.zeros(int(grid.sizes.sum()), dtype=torch.int16)
    codes[torch.from_numpy(places)] = torch.from_numpy(values.astype(np.int16))
    checked = _steps(np.array(steps, np.int64))
    for name, step, part in zip(layout.weights, checked, codes.split(grid.sizes.tolist()), strict=True):
        yield apply_weight(base[name], part.reshape(base[name].shape), step)


def _steps(codes: np.ndarray) -> list[int]:
    steps = [int(code) - STEP_BIAS for code in codes]
    if not all(LEAST_STEP <= step <= MOST_STEP for step in steps):
        raise FormatError(f"{WHERE}: a step is out of range; the update is refused")
    return steps


def _weights(base: State, layout: Layout, header: Header, arrays: _Arrays) -> Iterator[Tensor]:
    steps = _steps(arrays.flat(len(layout.weights)))
    if header.places is None:
        yield from (
            apply_weight(base[n], arrays.like(base[n]), step) for n, step in zip(layout.weights, steps, strict=True)
        )
        return
    sizes = [base[name].numel() for name in layout.weights]
    codes = torch.zeros(sum(sizes), dtype=torch.int16)
    codes[keep_random(sum(sizes), header.places, header.seed)] = torch.from_numpy(arrays.flat(header.places).copy())
    for name, step, part in zip(layout.weights, steps, codes.split(sizes), strict=True):
        yield apply_weight(base[name], part.reshape(base[name].shape), step)
