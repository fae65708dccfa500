"""What a ``.kpk`` file holds under a name: parts, their dtypes and shapes, and how they make a tensor.

FORMAT.md §2 is the specification. Floats are carried as arrays of their bits' dtype (``uint32`` for
float32, ``uint16`` for bfloat16) beside the name of their dtype; ``as_numpy`` gives numpy's own.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from kompakt.coding.planes import KINDS, NAMES
from kompakt.coding.wire import Cursor, text, varint
from kompakt.errors import FormatError, InputError
from kompakt.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec

RAW, DENSE, UNIFORM, CODEBOOK, SPARSE = range(5)
KIND_NAMES = ("raw", "dense", "uniform", "codebook", "sparse")
ROLES = {
    RAW: ("data",),
    DENSE: ("data",),
    UNIFORM: ("codes", "scale", "zero_point"),
    CODEBOOK: ("indices", "codebook"),
    SPARSE: ("mask", "values"),
}
MOST_NAME = 4096
LEAST_SHARED, MOST_SHARED, SAMPLE = 1024, 256, 4096
MOST_DIMENSIONS = 32
MOST_PART_BYTES = 2**48
MOST_DTYPE = max(NAMES)
SIGNED, SYMMETRIC, NARROW, ZERO_POINT = 1, 2, 4, 8


@dataclass(frozen=True)
class Part:
    """One array of a record: the name of its dtype and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * KINDS[self.dtype].storage.itemsize


@dataclass(frozen=True, kw_only=True)
class Record:
    """A named tensor of a file.

    Args:
        name: unique in the file; never a path.
        kind: "raw", "dense", "uniform", "codebook" or "sparse".
        parts: its arrays by role, in the order of the format.
        spec: how a uniform record is quantized.
    """

    name: str
    kind: str
    parts: dict[str, Part]
    spec: QuantSpec | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts in memory."""
        return sum(part.size_bytes for part in self.parts.values())


def to_bits(array: np.ndarray, dtype: str | None = None) -> tuple[np.ndarray, str]:
    """The storage array and the dtype name of an array.

    Args:
        array: numpy array; bfloat16 and 8-bit floats as unsigned integers of their bits.
        dtype: the dtype's name, where numpy's own does not say it.

    Raises:
        InputError: the format has no such dtype.
    """
    name = dtype or array.dtype.newbyteorder("=").name
    if name not in KINDS or KINDS[name].storage.itemsize != array.dtype.itemsize:
        raise InputError(f"dtype {name} of {array.dtype} cannot be stored; expected one of {', '.join(KINDS)}")
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return little.reshape(array.shape).view(KINDS[name].storage), name


def as_numpy(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The array in numpy's dtype of that name; the bits themselves where numpy has none."""
    if dtype in ("float16", "float32", "float64"):
        return bits.view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)
    return bits != 0 if dtype == "bool" else bits.astype(bits.dtype.newbyteorder("="), copy=False)


def ordered(bits: np.ndarray) -> np.ndarray:
    """Unsigned integers that sort as the floats of these bits do."""
    top = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def few_values(bits: np.ndarray) -> np.ndarray | None:
    """The distinct floats of an array in ascending order, if a codebook of them pays for itself."""
    if bits.size < LEAST_SHARED or np.unique(bits.reshape(-1)[:SAMPLE]).size > MOST_SHARED:
        return None
    found = np.unique(bits)
    if found.size > min(MOST_SHARED, int(np.count_nonzero(bits)) // 8):
        return None
    return found[np.argsort(ordered(found))]


def write_record(record: Record) -> bytes:
    """A record's entry in the index."""
    kind = KIND_NAMES.index(record.kind)
    out = [text(record.name), bytes([kind])]
    if record.spec is not None:
        out.append(_write_spec(record.spec, "zero_point" in record.parts))
    for part in record.parts.values():
        out.append(bytes([KINDS[part.dtype].code, len(part.shape)]))
        out += [varint(size) for size in part.shape]
    return b"".join(out)


def read_record(cursor: Cursor) -> Record:
    """Read a record's entry.

    Raises:
        FormatError: the name, a kind, a dtype or a shape is not allowed.
    """
    name = cursor.text(MOST_NAME, "a name")
    if not name or min(name) < " ":
        raise FormatError(f"{cursor.where}: a record's name is empty or has control characters; the file is corrupt")
    kind = cursor.u8(SPARSE, f"{name}: the kind")
    spec, has_zero_point = _read_spec(cursor) if kind == UNIFORM else (None, False)
    roles = [role for role in ROLES[kind] if role != "zero_point" or has_zero_point]
    record = Record(
        name=name, kind=KIND_NAMES[kind], parts={role: _read_part(cursor, name) for role in roles}, spec=spec
    )
    if kind != DENSE:
        _check_parts(record, cursor.where)
    return record


def _read_part(cursor: Cursor, name: str) -> Part:
    dtype = NAMES[cursor.u8(MOST_DTYPE, f"{name}: the dtype")]
    count, what = cursor.u8(MOST_DIMENSIONS, f"{name}: the number of dimensions"), f"{name}: a dimension"
    part = Part(dtype, tuple([cursor.varint(MOST_PART_BYTES, what) for _ in range(count)]))
    if part.size_bytes >= MOST_PART_BYTES:
        raise FormatError(f"{cursor.where}: {name}: shape {part.shape} is too large; the file is corrupt")
    return part


def _check_parts(record: Record, where: str) -> None:
    """Check that the parts of a record fit each other, as far as their shapes tell."""
    parts = record.parts
    problem = None
    integer = {role: not KINDS[part.dtype].fields for role, part in parts.items()}
    if record.kind == "raw" and (parts["data"].dtype != "uint8" or len(parts["data"].shape) != 1):
        problem = "raw bytes are not one row of bytes"
    if record.kind == "uniform" and not (integer["codes"] and integer.get("zero_point", True)):
        problem = "codes are not integers"
    if record.kind == "codebook" and not (integer["indices"] and len(parts["codebook"].shape) in (1, 2)):
        problem = "indices are not integers, or the codebook has more than two dimensions"
    if record.kind == "sparse" and (parts["mask"].dtype != "uint8" or len(parts["values"].shape) != 1):
        problem = "the mask is not made of bytes, or the values are not one row"
    if record.kind == "sparse" and parts["values"].size > parts["mask"].size:
        problem = "there are more values than places"
    if problem:
        raise FormatError(f"{where}: {record.name}: {problem}; the file is corrupt")


def _write_spec(spec: QuantSpec, zero_point: bool) -> bytes:
    granularity = spec.granularity
    flags = SIGNED * spec.signed + SYMMETRIC * spec.symmetric + NARROW * spec.narrow + ZERO_POINT * zero_point
    if isinstance(granularity, PerChannel):
        return bytes([spec.bits, flags, 1]) + varint(granularity.axis)
    if isinstance(granularity, PerGroup):
        return bytes([spec.bits, flags, 2]) + varint(granularity.size)
    return bytes([spec.bits, flags, 0, 0])


def _read_spec(cursor: Cursor) -> tuple[QuantSpec, bool]:
    bits, flags, number = cursor.u8(8, "the bits"), cursor.u8(15, "the flags"), cursor.u8(2, "the granularity")
    value = cursor.varint(2**32, "the axis or group size")
    granularity: Granularity = (PerTensor(), PerChannel(axis=value), PerGroup(size=max(1, value)))[number]
    try:
        spec = QuantSpec(
            bits=bits,
            signed=bool(flags & SIGNED),
            symmetric=bool(flags & SYMMETRIC),
            narrow=bool(flags & NARROW),
            granularity=granularity,
        )
    except InputError as error:
        raise FormatError(f"{cursor.where}: {error}; the file is corrupt") from None
    return spec, bool(flags & ZERO_POINT)
