"""From the parts of a record to the tensor that it stands for, in numpy."""

import numpy as np

from kompakt.artifact.records import Record, as_numpy
from kompakt.errors import FormatError
from kompakt.spec import PerChannel, PerGroup


def restore(record: Record, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor of a record: bits as they were for dense, codebook and sparse, float32 for uniform.

    Args:
        record: the record.
        parts: its arrays in their storage dtypes, by role.

    Raises:
        FormatError: indices, masks or scales do not fit.
    """
    return as_numpy(restore_bits(record, parts), restored_dtype(record))


def restored_dtype(record: Record) -> str:
    """The name of the restored tensor's dtype."""
    roles = {"raw": "data", "dense": "data", "codebook": "codebook", "sparse": "values"}
    return record.parts[roles[record.kind]].dtype if record.kind in roles else "float32"


def restored_shape(record: Record) -> tuple[int, ...]:
    """The shape of the restored tensor, which is that of its first part."""
    return next(iter(record.parts.values())).shape


def restore_bits(record: Record, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor of a record in its storage dtype, for a byte-exact copy.

    Raises:
        FormatError: indices, masks or scales do not fit.
    """
    if record.kind in ("raw", "dense"):
        return parts["data"]
    if record.kind == "codebook":
        return _look_up(record, parts["indices"], parts["codebook"])
    if record.kind == "sparse":
        return _scatter(record, parts["mask"], parts["values"])
    return _dequantize(record, parts).view(np.uint32)


def _look_up(record: Record, indices: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """``codebook[indices]``, or ``codebook[channel, indices]`` for one row a channel."""
    size = codebook.shape[-1]
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise FormatError(f"{record.name}: an index beyond the codebook of {size} values; the file is corrupt")
    if codebook.ndim == 1:
        return codebook[indices] if size else np.zeros(indices.shape, codebook.dtype)
    if indices.ndim < 1 or codebook.shape[0] != indices.shape[0]:
        raise FormatError(f"{record.name}: {len(codebook)} codebooks for shape {indices.shape}; the file is corrupt")
    rows = np.arange(indices.shape[0]).reshape(-1, *(1,) * (indices.ndim - 1))
    return codebook[rows, indices]


def _scatter(record: Record, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    if (mask.size and int(mask.max()) > 1) or int(np.count_nonzero(mask)) != values.size:
        raise FormatError(f"{record.name}: the mask does not have {values.size} ones; the file is corrupt")
    found = np.zeros(mask.shape, values.dtype)
    found[mask.view(bool)] = values
    return found


def _dequantize(record: Record, parts: dict[str, np.ndarray]) -> np.ndarray:
    """``scale · (codes − zero point)`` in float32."""
    spec = record.spec
    assert spec is not None
    codes = parts["codes"]
    if codes.size and not spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax:
        raise FormatError(f"{record.name}: a code beyond {spec.bits} bits; the file is corrupt")
    scale = as_numpy(parts["scale"], record.parts["scale"].dtype).astype(np.float32)
    zero = parts["zero_point"].astype(np.float32) if "zero_point" in parts else np.zeros(1, np.float32)
    try:
        rows = _rows(record, codes)
        found = (rows.astype(np.float32) - _spread(record, zero, rows)) * _spread(record, scale, rows)
        return np.ascontiguousarray(found.reshape(codes.shape))
    except ValueError:
        raise FormatError(
            f"{record.name}: {scale.size} scales, {zero.size} zero points for shape {codes.shape}; the file is corrupt"
        ) from None


def _rows(record: Record, codes: np.ndarray) -> np.ndarray:
    granularity = record.spec.granularity if record.spec else None
    return codes.reshape(-1, granularity.size) if isinstance(granularity, PerGroup) else codes


def _spread(record: Record, values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Scales or zero points in a shape that broadcasts over the codes."""
    granularity = record.spec.granularity if record.spec else None
    if values.size == 1:
        return values.reshape(-1)
    if isinstance(granularity, PerGroup):
        return values.reshape(codes.shape[0], 1)
    if isinstance(granularity, PerChannel) and granularity.axis < codes.ndim:
        shape = [1] * codes.ndim
        shape[granularity.axis] = codes.shape[granularity.axis]
        return values.reshape(shape)
    raise ValueError("one scale expected")
