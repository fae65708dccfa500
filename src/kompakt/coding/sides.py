"""Side information of the coded members: their scale factors and prediction weights, coded as well.

FORMAT.md §6.4, calls 1 and 2.
"""

from dataclasses import replace

import numpy as np

from kompakt.coding.bundle import Member
from kompakt.coding.kernels import Scales, weight_mask, weight_rows
from kompakt.coding.models import ESCAPE, ZERO
from kompakt.coding.rans import Call, Reader, decoding_table, symbol_of
from kompakt.errors import FormatError

MOST_SIDES = 2**26  # more than the values of a block allow


def side_symbols(members: list[Member]) -> tuple[np.ndarray, np.ndarray]:
    """Factors and weights of all members, as symbols in the order of the format."""
    factors, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for member in members:
        scales = member.model.scales
        factors += [part for part in (scales.rows, scales.columns, scales.taps) if part is not None]
        if member.model.weights is not None:
            counts = weight_rows(member.layout.taps)
            weights += [row[:count] for row, count in zip(member.model.weights, counts, strict=True)]
    return np.concatenate(factors) + ZERO, np.concatenate(weights) + ZERO


def side_call(symbols: np.ndarray, table: np.ndarray) -> Call:
    """The call that codes side symbols under one table."""
    starts = np.cumsum(table) - table
    return Call(table[symbols], starts[symbols])


def read_sides(
    members: list[Member], reader: Reader, factors: np.ndarray | None, weights: np.ndarray | None
) -> list[Member]:
    """Read factors and weights and put them into the members' models.

    Args:
        factors: frequencies [256] of factors, or None where no member has any.
        weights: frequencies [256] of weights, likewise.
    """
    counts = [member.factor_counts for member in members]
    masks = [weight_mask(m.layout.taps) if m.model.weights is not None else None for m in members]
    factor_values = _read_side(reader, sum(sum(found) for found in counts), factors)
    weight_values = _read_side(reader, sum(int(np.count_nonzero(mask)) for mask in masks if mask is not None), weights)
    filled, at, used = [], 0, 0
    for member, three, mask in zip(members, counts, masks, strict=True):
        parts: list[np.ndarray | None] = []
        for count in three:
            parts.append(factor_values[at : at + count] if count else None)
            at += count
        scales = Scales(base=member.model.scales.base, rows=parts[0], columns=parts[1], taps=parts[2])
        found = None
        if mask is not None:
            found = np.zeros(mask.shape, np.int64)
            count = int(np.count_nonzero(mask))
            found[mask] = weight_values[used : used + count]
            used += count
        filled.append(Member(member.layout, replace(member.model, scales=scales, weights=found)))
    return filled


def check_side(count: int, histogram: np.ndarray | None) -> None:
    """Check that there is a histogram, and that factors and weights are no more than blocks may hold.

    Raises:
        FormatError: they cannot be read.
    """
    if histogram is None:
        raise FormatError("coded section: factors or weights without their histogram; the file is corrupt")
    if count > MOST_SIDES:
        raise FormatError(f"coded section: {count} factors or weights; the file is corrupt")


def side_values(symbols: np.ndarray) -> np.ndarray:
    """Factors or weights, int32, from their symbols.

    Raises:
        FormatError: one is an escape.
    """
    if int(symbols.max(initial=0)) == ESCAPE:
        raise FormatError("coded section: a factor or weight out of range; the file is corrupt")
    return symbols.astype(np.int32) - ZERO


def _read_side(reader: Reader, count: int, table: np.ndarray | None) -> np.ndarray:
    if count == 0:
        return np.zeros(0, np.int32)
    check_side(count, table)
    assert table is not None
    return side_values(symbol_of(reader.read(np.zeros(count, np.int64), decoding_table(table[None]))))
