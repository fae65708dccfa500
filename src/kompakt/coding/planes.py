"""Arrays to members: pieces of bounded size, and planes that part exponents from noise.

FORMAT.md §3 is the specification. Floats are carried as unsigned integers of their bits, so that
bfloat16 and the 8-bit floats need no dtype of numpy's.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from kompakt.coding.options import Integers
from kompakt.coding.unblock import Spec

MOST_PIECE = 2**21
MOST_JOINED = 2**12


@dataclass(frozen=True)
class Field:
    """A plane of a float: ``bits >> shift & mask``, with the sign (bit ``sign``) above it if there is one."""

    shift: int
    width: int
    sign: int = 0

    @property
    def mask(self) -> int:
        """The lowest ``width`` bits."""
        return (1 << self.width) - 1


@dataclass(frozen=True)
class Kind:
    """A dtype of the format.

    Args:
        code: its number in a file.
        storage: the numpy dtype that carries it.
        fields: its planes, for floats.
    """

    code: int
    storage: np.dtype
    fields: tuple[Field, ...] = ()


def _kind(code: int, storage: str, *fields: Field) -> Kind:
    return Kind(code, np.dtype(storage), fields)


KINDS = {
    "bool": _kind(0, "u1"),
    "uint8": _kind(1, "u1"),
    "int8": _kind(2, "i1"),
    "uint16": _kind(3, "<u2"),
    "int16": _kind(4, "<i2"),
    "uint32": _kind(5, "<u4"),
    "int32": _kind(6, "<i4"),
    "uint64": _kind(7, "<u8"),
    "int64": _kind(8, "<i8"),
    "float16": _kind(9, "<u2", Field(10, 5), Field(8, 2, 15), Field(0, 8)),
    "bfloat16": _kind(10, "<u2", Field(7, 8), Field(0, 7, 15)),
    "float32": _kind(11, "<u4", Field(23, 8), Field(16, 7, 31), Field(8, 8), Field(0, 8)),
    "float64": _kind(12, "<u8", *(Field(shift, 8) for shift in range(56, -8, -8))),
    "uint4": _kind(13, "u1"),
    "int4": _kind(14, "i1"),
    "float8_e4m3fn": _kind(15, "u1", Field(0, 8)),
    "float8_e5m2": _kind(16, "u1", Field(0, 8)),
}
NAMES = {kind.code: name for name, kind in KINDS.items()}


def pieces(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the pieces into which an array is cut; in row-major order they follow one another."""
    if prod(shape) <= MOST_PIECE:
        return [shape]
    row = prod(shape[1:])
    if row > MOST_PIECE:
        return pieces((prod(shape),))
    step = max(1, MOST_PIECE // row)
    return [(min(step, shape[0] - start), *shape[1:]) for start in range(0, shape[0], step)]


@dataclass(frozen=True)
class Group:
    """Pieces of a block that are coded as one array.

    Args:
        places: which pieces of the block.
        shape: the shape of the array.
        dtype: their dtype's name.
    """

    places: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


def groups(held: list[tuple[tuple[int, ...], str]]) -> list[Group]:
    """Join the small rows of a block: a hundred scales and biases make one array, not a hundred.

    Args:
        held: shape and dtype of each piece of the block.
    """
    joined: dict[str, list[int]] = {}
    alone = []
    for place, (shape, dtype) in enumerate(held):
        if prod(shape) <= MOST_JOINED and (KINDS[dtype].fields or len(shape) < 2):
            joined.setdefault(dtype, []).append(place)
        else:
            alone.append(Group((place,), shape, dtype))
    rows = [Group(tuple(found), (sum(prod(held[i][0]) for i in found),), dtype) for dtype, found in joined.items()]
    return [*rows, *alone]


def split(piece: np.ndarray, dtype: str) -> list[Integers]:
    """The members of a piece.

    Args:
        piece: array of the storage dtype.
        dtype: its name in ``KINDS``.
    """
    kind = KINDS[dtype]
    if kind.fields:
        planes = [_plane(piece, field) for field in kind.fields]
        return [Integers(values=p, flat=True, family=f"{dtype}.{i}.{p.ndim == 1}") for i, p in enumerate(planes)]
    if kind.storage.itemsize == 8:
        low = (piece & piece.dtype.type(0xFFFFFFFF)).astype("<u4")
        high = (piece >> piece.dtype.type(32)).astype(kind.storage.str.replace("8", "4"))
        return [Integers(values=low, family=f"{dtype}.low"), Integers(values=high, family=f"{dtype}.high")]
    return [Integers(values=piece, family=dtype)]


def specs(shape: tuple[int, ...], dtype: str) -> list[Spec]:
    """What ``split`` makes of a piece of this shape."""
    kind = KINDS[dtype]
    if kind.fields:
        return [Spec(shape, np.dtype("u1"))] * len(kind.fields)
    if kind.storage.itemsize == 8:
        return [Spec(shape, np.dtype("<u4")), Spec(shape, np.dtype(kind.storage.str.replace("8", "4")))]
    return [Spec(shape, kind.storage)]


def join(members: list[np.ndarray], dtype: str) -> np.ndarray:
    """Undo ``split``: the piece as an array of the storage dtype."""
    kind = KINDS[dtype]
    if kind.fields:
        found = np.zeros(members[0].shape, kind.storage)
        for member, field in zip(members, kind.fields, strict=True):
            wide = member.astype(kind.storage)
            found |= (wide & field.mask) << field.shift
            if field.sign:
                found |= (wide >> field.width) << field.sign
        return found
    if kind.storage.itemsize == 8:
        return members[1].astype(kind.storage) << 32 | members[0].astype(kind.storage)
    return members[0]


def _plane(bits: np.ndarray, field: Field) -> np.ndarray:
    found = (bits >> field.shift & field.mask).astype(np.uint8)
    if field.sign:
        found |= (bits >> field.sign << field.width).astype(np.uint8)
    return found
