"""Integer arrays to bytes and back, each as small as the coders make it; also sizes without coding.

>>> import numpy as np
>>> from kompakt.coding import decode_integers, encode_integers
>>> codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
>>> bool((decode_integers(encode_integers(codes)) == codes).all())
True
"""

from math import prod

import numpy as np

from kompakt.coding.block import encode_block
from kompakt.coding.choose import best_bits
from kompakt.coding.kernels import layout_of
from kompakt.coding.options import Integers
from kompakt.coding.planes import KINDS, MOST_PIECE, NAMES, join, pieces, specs, split
from kompakt.coding.unblock import decode_block
from kompakt.coding.wire import Cursor, varint
from kompakt.errors import FormatError, InputError

NO_AXIS = 255
MOST_DIMENSIONS = 32
MOST_VALUES = 2**48
SAMPLE = 2**16
BLEND = 0.02


def encode_integers(values: np.ndarray, *, axis: int | None = None) -> bytes:
    """Code an integer or boolean array, losslessly.

    Args:
        values: any shape, up to 64 bits. Dimensions are read as outputs, inputs, taps of a kernel.
        axis: the dimension of the output channels, where it is not the first.

    Raises:
        InputError: the dtype is not an integer.
    """
    dtype = dtype_name(values)
    front = values if axis is None else np.moveaxis(values, axis, 0)
    place = NO_AXIS if axis is None else axis % values.ndim
    head = bytes([KINDS[dtype].code, place, front.ndim]) + b"".join(varint(size) for size in front.shape)
    flat = np.ascontiguousarray(front).astype(KINDS[dtype].storage, copy=False).reshape(-1)
    blocks, start = [], 0
    for shape in pieces(front.shape):
        end = start + prod(shape)
        block = encode_block(split(flat[start:end].reshape(shape), dtype))
        blocks.append(varint(len(block)) + block)
        start = end
    return b"".join((head, *blocks))


def decode_integers(data: bytes | memoryview, *, max_values: int = 2**31) -> np.ndarray:
    """Decode what ``encode_integers`` wrote.

    Args:
        data: the bytes.
        max_values: refuse arrays of more values.

    Raises:
        FormatError: the bytes are not such an array, or a larger one.
    """
    cursor = Cursor(data, "coded integers")
    code, place, dimensions = cursor.u8(max(NAMES), "the dtype"), cursor.u8(), cursor.u8(MOST_DIMENSIONS, "dimensions")
    dtype = NAMES[code]
    shape = tuple(cursor.varint(MOST_VALUES, "a dimension") for _ in range(dimensions))
    if KINDS[dtype].fields or (place != NO_AXIS and place >= dimensions):
        raise FormatError(f"coded integers: dtype {dtype}, axis {place} of {dimensions}; the data is corrupt")
    # Every piece has a block of at least three bytes: the shape is bounded by the data.
    if prod(shape) > max_values or prod(shape) > MOST_PIECE * (cursor.left + 1):
        raise FormatError(f"coded integers: {prod(shape)} values, at most {max_values} expected")
    parts = []
    for piece in pieces(shape):
        block = cursor.take(cursor.varint(cursor.left, "the length of a block"))
        parts.append(join(decode_block(block, specs(piece, dtype), "coded integers"), dtype).reshape(-1))
    cursor.end()
    found = np.concatenate(parts).reshape(shape)
    found = found.astype(bool) if dtype == "bool" else found
    return found if place == NO_AXIS else np.moveaxis(found, 0, place)


def estimate_bits(values: np.ndarray) -> float:
    """Estimate the bits that an integer array takes, without coding it; large ones from a sample of their rows."""
    if values.size <= 1:
        return 24.0
    layout = layout_of(values.shape)
    step = max(1, min(layout.outputs // 8, values.size // SAMPLE))
    sample = values[::step] if values.ndim > 1 else values[: max(SAMPLE, 1)]
    return best_bits(Integers(values=np.ascontiguousarray(sample))) * values.size / sample.size


def rate_table(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits of each integer under the array's own distribution, for rate–distortion decisions.

    Counts are blended with 2 % of a two-sided geometric distribution of the same mean magnitude, so
    that integers that do not occur (yet) have a finite price, which rises away from zero.

    Returns:
        symbols: int64, from one below the least to one above the greatest value.
        bits: float64, −log2 of their probabilities.
    """
    flat = values.reshape(-1).astype(np.int64)
    if not flat.size:
        return np.zeros(1, np.int64), np.zeros(1)
    symbols = np.arange(flat.min() - 1, flat.max() + 2)
    counts = np.bincount(flat - symbols[0], minlength=symbols.size) / flat.size
    mean = float(np.abs(flat).mean()) + 0.05
    tail = (mean / (1 + mean)) ** np.abs(symbols)
    return symbols, -np.log2((1 - BLEND) * counts + BLEND * tail / tail.sum())


def dtype_name(values: np.ndarray) -> str:
    """The name of an integer array's dtype in the format.

    Raises:
        InputError: the format has no such integers.
    """
    name = values.dtype.newbyteorder("=").name
    if name not in KINDS or KINDS[name].fields:
        raise InputError(f"coding: dtype {values.dtype}, an integer or boolean array expected")
    return name
