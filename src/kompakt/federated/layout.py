"""What both ends derive from the base: the role of each tensor, its hash, and the pieces of a message.

FORMAT.md §10 is the specification.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from kompakt.coding.planes import KINDS, pieces
from kompakt.coding.wire import varint
from kompakt.errors import InputError

State = Mapping[str, Tensor]
Piece = tuple[tuple[int, ...], str]
HASH_BYTES = 16
BLOCK_VALUES = 2**21
SUPPORTED = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a state by role, in its order."""

    weights: tuple[str, ...]
    statistics: tuple[str, ...]
    integers: tuple[str, ...]


def layout_of(base: State) -> Layout:
    """Sort the tensors of a state by role.

    Raises:
        InputError: a dtype is not supported.
    """
    for name, tensor in base.items():
        if dtype_name(tensor) not in SUPPORTED:
            raise InputError(f"{name}: updates of {tensor.dtype} are not supported; expected {', '.join(SUPPORTED)}")
    floats = [name for name, tensor in base.items() if tensor.is_floating_point()]
    statistics = tuple(name for name in floats if _is_statistic(name, base))
    return Layout(
        weights=tuple(name for name in floats if name not in set(statistics)),
        statistics=statistics,
        integers=tuple(name for name, tensor in base.items() if not tensor.is_floating_point()),
    )


def variance_of(name: str) -> str:
    """The name of the running variance beside a statistic."""
    return name.removesuffix("running_mean").removesuffix("running_var") + "running_var"


def _is_statistic(name: str, base: State) -> bool:
    if name.rpartition(".")[2] == "running_var":
        return True
    other = base.get(variance_of(name)) if name.rpartition(".")[2] == "running_mean" else None
    return other is not None and other.is_floating_point() and other.shape == base[name].shape


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype in the format."""
    return str(tensor.dtype).removeprefix("torch.")


def hash_state(state: State) -> bytes:
    """Hash names, dtypes, shapes and bytes of a state, in its order: 16 bytes.

    Example:
        >>> hash_state({"w": torch.zeros(2)}) == hash_state({"w": torch.zeros(2)})
        True
    """
    found = hashlib.blake2b(digest_size=HASH_BYTES)
    for name, tensor in state.items():
        raw = name.encode()
        head = varint(len(raw)) + raw + bytes([KINDS[dtype_name(tensor)].code, tensor.ndim])
        found.update(head + b"".join(varint(size) for size in tensor.shape))
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def message_pieces(base: State, layout: Layout, places: int | None, *, sparse: bool = False) -> list[Piece]:
    """Shape and dtype of every array of a message, cut into pieces.

    Args:
        base, layout: of the state that sender and receiver hold.
        places: how many random places are sent, or None for all.
        sparse: whether the weights are a section of their own, and so no pieces.
    """
    whole = [(tuple(base[name].shape), "int16") for name in layout.weights]
    arrays: list[Piece] = [] if sparse else [((len(layout.weights),), "uint16")]
    if not sparse:
        arrays += whole if places is None else [((places,), "int16")]
    arrays += [(tuple(base[name].shape), "int32") for name in layout.statistics]
    arrays += [(tuple(base[name].shape), dtype_name(base[name])) for name in layout.integers]
    return [(piece, dtype) for shape, dtype in arrays if prod(shape) for piece in pieces(shape)]


def blocks_of(held: list[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces into the blocks of a message."""
    block: list[Piece] = []
    values = 0
    for shape, dtype in held:
        block.append((shape, dtype))
        values += prod(shape) * (2 if KINDS[dtype].storage.itemsize == 8 else 1)
        if values >= BLOCK_VALUES:
            yield block
            block, values = [], 0
    if block:
        yield block


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor of integers as an array of the storage dtype of its kind."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array.view(np.uint8) if array.dtype == np.bool_ else array
