"""The vocabulary of quantization: granularity and ``QuantSpec``, as frozen data.

Nothing here computes; the arithmetic is in ``kompakt.numerics`` and the choice of specs in
``kompakt.methods``. Every class survives JSON (see ``kompakt.plan``).
"""

from dataclasses import dataclass
from typing import Literal

from kompakt.errors import InputError

MAX_BITS = 8


@dataclass(frozen=True, kw_only=True)
class PerTensor:
    """One scale for the whole tensor."""

    kind: Literal["tensor"] = "tensor"


@dataclass(frozen=True, kw_only=True)
class PerChannel:
    """One scale for each index of dimension ``axis``."""

    axis: int = 0
    kind: Literal["channel"] = "channel"


@dataclass(frozen=True, kw_only=True)
class PerGroup:
    """One scale for each run of ``size`` consecutive values of every row.

    The tensor is read as rows: dimension 0 stays, the others are flattened; ``size`` must divide
    the row's length.
    """

    size: int
    kind: Literal["group"] = "group"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"group size {self.size} is not positive; use 16, 32 or 64")


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is represented by integers: ``x ≈ scale · (q - zero_point)``.

    Args:
        bits: width of the integers, 1 to 8; ``q`` spans 2^bits values, or one fewer if ``narrow``.
        signed: whether the integers are signed (weights) or unsigned (activations).
        symmetric: zero point fixed at 0 (signed) or at the middle of the range (unsigned).
        granularity: which values share a scale.
        narrow: leave out the most negative signed integer, so that the range is symmetric.
        dynamic: the range is taken from each input at run time; nothing is calibrated.
        saturation_free: no two integers of a channel may add up to more than an int16 holds after each
            is multiplied by an unsigned 8-bit activation (x86 without VNNI sums such pairs in int16).
        packed: weights of up to 4 bits stand two to a byte in the file; kernels of one byte are lost.
        power_of_two: the scale is 2ⁿ, so that hardware shifts where it would multiply.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    narrow: bool = False
    dynamic: bool = False
    saturation_free: bool = False
    packed: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise InputError(f"{self.bits} bits: quantization takes 1 to {MAX_BITS} bits")
        if self.narrow and (not self.signed or self.bits == 1):
            raise InputError("a narrow range needs signed integers of at least 2 bits")

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        return -(2 ** (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
