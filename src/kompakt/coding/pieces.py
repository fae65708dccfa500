"""Arrays side by side in one block: small rows joined, floats in planes. FORMAT.md §3 is the specification."""

from itertools import pairwise
from math import prod

import numpy as np

from kompakt.coding.block import Block, encode_block, prepare_block
from kompakt.coding.options import Integers
from kompakt.coding.planes import groups, join, specs, split
from kompakt.coding.unblock import decode_block


def encode_pieces(held: list[tuple[np.ndarray, str]]) -> bytes:
    """The block of some pieces.

    Args:
        held: array and dtype name of each piece, of at most 2²¹ values.
    """
    return encode_block(_members(held))


def prepare_pieces(held: list[tuple[np.ndarray, str]]) -> tuple[Block, ...]:
    """The ways in which ``encode_pieces`` could write its block, with their sizes."""
    return prepare_block(_members(held))


def _members(held: list[tuple[np.ndarray, str]]) -> list[Integers]:
    members: list[Integers] = []
    for group in groups([(piece.shape, dtype) for piece, dtype in held]):
        arrays = [held[place][0] for place in group.places]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays])
        members += split(joined.reshape(group.shape), group.dtype)
    return members


def decode_pieces(
    data: bytes | memoryview, held: list[tuple[tuple[int, ...], str]], where: str = "a block"
) -> list[np.ndarray]:
    """The pieces of a block, flat, in their storage dtypes.

    Args:
        data: the block.
        held: shape and dtype name of each piece.
        where: what the block is, for messages.

    Raises:
        FormatError: the block is not one, or does not fit the pieces.
    """
    plan = groups(held)
    wanted = [specs(group.shape, group.dtype) for group in plan]
    members = iter(decode_block(data, [spec for found in wanted for spec in found], where))
    decoded: list[np.ndarray] = [np.zeros(0)] * len(held)
    for group, found in zip(plan, wanted, strict=True):
        flat = join([next(members) for _ in found], group.dtype).reshape(-1)
        ends = np.cumsum([0, *(prod(held[place][0]) for place in group.places)]).tolist()
        for place, (start, end) in zip(group.places, pairwise(ends), strict=True):
            decoded[place] = flat[start:end]
    return decoded
