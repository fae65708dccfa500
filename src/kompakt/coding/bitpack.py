"""Bit packing: unsigned integers of 1 to 32 bits to bytes and back, least significant bit first."""

import numpy as np

from kompakt.errors import FormatError, InputError

MOST_BITS = 32
CHUNK = 2**16
FEW = 256  # values that Python's own integers unpack sooner than numpy


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` values of ``bits`` bits take."""
    whole, rest = divmod(bits, 8) if bits > 8 else (0, bits)
    return count * whole + (count * rest + 7) // 8


def pack(values: np.ndarray, bits: int) -> bytes:
    """Pack integers of 0 … 2^bits − 1; beyond 8 bits, low bytes come first as planes of their own.

    Args:
        values: any integer array, read in row-major order.
        bits: width of a value, 0 to 32; 0 packs zeros into no bytes.

    Raises:
        InputError: a value does not fit.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    _check_bits(bits)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        raise InputError(f"bit packing: values {flat.min()}…{flat.max()} do not fit {bits} bits")
    parts = []
    while bits > 8:
        parts.append((flat & 255).astype(np.uint8).tobytes())
        flat, bits = flat >> 8, bits - 8
    return b"".join((*parts, _pack_narrow(flat.astype(np.uint8), bits)))


def unpack(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """Unpack ``count`` values of ``bits`` bits into the smallest unsigned dtype that holds them.

    Raises:
        FormatError: ``data`` has not exactly the bytes that these values take.
    """
    _check_bits(bits)
    if len(data) != packed_size(count, bits):
        raise FormatError(
            f"bit packing: {len(data)} bytes for {count} values of {bits} bits, {packed_size(count, bits)} expected"
        )
    raw = np.frombuffer(data, np.uint8)
    if bits <= 8:
        return _unpack_narrow(raw, bits, count)
    out: np.ndarray = np.zeros(count, np.uint16 if bits <= 16 else np.uint32)
    shift = 0
    while bits > 8:
        out = out | raw[:count].astype(out.dtype) << shift
        raw, bits, shift = raw[count:], bits - 8, shift + 8
    return out | _unpack_narrow(raw, bits, count).astype(out.dtype) << shift


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MOST_BITS:
        raise FormatError(f"bit packing: {bits} bits, 0 to {MOST_BITS} expected")


def _pack_narrow(values: np.ndarray, bits: int) -> bytes:
    """Eight values of ``bits`` bits make ``bits`` bytes."""
    if bits == 8:
        return values.tobytes()
    out = bytearray()
    for start in range(0, values.size if bits else 0, 8 * CHUNK):
        part = values[start : start + 8 * CHUNK, None]
        out += np.packbits(np.unpackbits(part, axis=1, count=bits, bitorder="little"), bitorder="little").tobytes()
    return bytes(out)


def _unpack_narrow(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    if bits == 8:
        return raw.copy()
    if bits == 0:
        return np.zeros(count, np.uint8)
    if count <= FEW:
        number, mask = int.from_bytes(raw.tobytes(), "little"), 2**bits - 1
        return np.array([number >> place & mask for place in range(0, bits * count, bits)], np.uint8)
    out = np.zeros(-(-count // 8) * 8, np.uint8)
    mask = np.uint64(2**bits - 1)
    for start in range(0, raw.size, bits * CHUNK):
        part = raw[start : start + bits * CHUNK]
        groups = -(-part.size // bits)
        padded = np.zeros((groups, bits), np.uint8)
        padded.reshape(-1)[: part.size] = part
        words = np.zeros((groups, 8), np.uint8)
        words[:, :bits] = padded
        numbers = words.view("<u8").reshape(-1)
        first = start // bits * 8
        target = out[first : first + groups * 8].reshape(groups, 8)
        for index in range(8):
            target[:, index] = numbers >> np.uint64(index * bits) & mask
    return out[:count]
