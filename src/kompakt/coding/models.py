"""Probability models as tables of integer frequencies: parametric families and stored histograms.

FORMAT.md §6.2 and §6.4 are the specification. A table has 256 symbols: 128 + r for a residual r,
and the escape 255.
"""

from functools import lru_cache

import numpy as np

from kompakt.coding.bitpack import pack, packed_size, unpack
from kompakt.coding.rans import decoding_table
from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError

CLASSES = 37
UNIT_CLASS = 20  # the class of scale 1; a class is a quarter of an octave
FRACTIONS = 8
ZERO, ESCAPE, SYMBOLS = 128, 255, 256
SHAPES = 5
HEAVY = 4
NORMAL_SHARE = (1.0, 0.75, 0.5, 0.0)
RESIDUALS = np.arange(-ZERO, ESCAPE - ZERO)


def scale(cls: np.ndarray) -> np.ndarray:
    """The scale that a class stands for, in units of the integers."""
    return 2.0 ** ((cls - UNIT_CLASS) / 4)


def masses(shape: int) -> np.ndarray:
    """Probabilities [classes, fractions, 255] of the residuals −128 … 126 under a shape."""
    centers = (np.arange(FRACTIONS) - FRACTIONS // 2) / FRACTIONS
    edges = np.append(RESIDUALS, ESCAPE - ZERO)[None, None, :] - 0.5 - centers[None, :, None]
    s = scale(np.arange(CLASSES))[:, None, None]
    if shape == HEAVY:
        cumulated = (_laplace(edges, s / 2) + _laplace(edges, 3 * s / 2)) / 2
    else:
        share = NORMAL_SHARE[shape]
        cumulated = share * _normal(edges, s) + (1 - share) * _laplace(edges, s)
    return np.diff(cumulated, axis=2)


@lru_cache(maxsize=2 * SHAPES)
def frequencies(shape: int, bits: int) -> np.ndarray:
    """Frequencies [classes · fractions, 256] of the parametric tables; every row sums to 2^bits."""
    total = 1 << bits
    scaled = masses(shape) * total
    inner = _between(scaled.max(axis=1) >= 0.5)[:, None, :]
    table = np.zeros((CLASSES, FRACTIONS, SYMBOLS), np.int64)
    table[:, :, :ESCAPE] = np.where(inner, np.maximum(1, np.floor(scaled + 0.5)), 0)
    missing = total - np.where(inner, scaled, 0).sum(axis=2)
    table[:, :, ESCAPE] = np.maximum(1, np.floor(missing + 0.5))
    table[:, :, ZERO] += total - table.sum(axis=2)
    table.flags.writeable = False
    return table.reshape(-1, SYMBOLS)


@lru_cache(maxsize=SHAPES)
def parametric_table(shape: int, bits: int) -> np.ndarray:
    """Decoding table, int64 [classes · fractions · M], of a shape."""
    table = decoding_table(frequencies(shape, bits))
    table.flags.writeable = False
    return table


@lru_cache(maxsize=2 * SHAPES)
def costs(shape: int, bits: int = 10, escape_bits: int = 16) -> np.ndarray:
    """Bits, float32 [classes, fractions, 256], that each symbol costs; unknown symbols cost an escape."""
    table = frequencies(shape, bits).reshape(CLASSES, FRACTIONS, SYMBOLS)
    cost = bits - np.log2(np.maximum(table, 1)).astype(np.float32)
    escape = cost[:, :, ESCAPE:] + escape_bits
    cost = np.where(table > 0, cost, escape)
    cost[:, :, ESCAPE:] = escape
    cost.flags.writeable = False
    return cost


def weight_of(code: np.ndarray) -> np.ndarray:
    """The weight that a 6-bit code of a histogram stands for."""
    code = np.asarray(code, np.int64)
    return np.where(code < 4, code, (4 + code % 4) << np.maximum(code // 4 - 1, 0))


CODE_WEIGHTS = weight_of(np.arange(64))
CODE_EDGES = (CODE_WEIGHTS[1:] + CODE_WEIGHTS[:-1]) / 2


def histogram_frequencies(codes: np.ndarray, first: int, bits: int) -> np.ndarray:
    """Frequencies [256] of a stored histogram: ``codes`` of the symbols from ``first`` on, the escape last."""
    weights = CODE_WEIGHTS[codes]
    total = (1 << bits) - np.count_nonzero(weights)
    scaled = np.maximum(weights * total // int(weights.sum()), weights > 0)
    scaled[scaled.argmax()] += (1 << bits) - int(scaled.sum())
    table = np.zeros(SYMBOLS, np.int64)
    table[first : first + codes.size - 1] = scaled[:-1]
    table[ESCAPE] = scaled[-1]
    return table


def histogram_codes(counts: np.ndarray) -> tuple[int, np.ndarray]:
    """The first symbol and the 6-bit codes that store ``counts`` [256] best.

    The escape always has a weight, and so has at least one symbol beside it.
    """
    used = np.flatnonzero(counts[:ESCAPE])
    first, last = (int(used[0]), int(used[-1])) if used.size else (ZERO, ZERO)
    wanted = np.concatenate([counts[first : last + 1], counts[ESCAPE:]]).astype(np.float64)
    wanted *= CODE_WEIGHTS[-1] / max(wanted.max(), 1.0)
    codes = np.maximum(CODE_EDGES.searchsorted(wanted, side="right"), wanted > 0)
    codes[-1] = max(codes[-1], 1)
    codes[0] = max(codes[0], 1)
    return first, codes.astype(np.uint8)


def write_histogram(first: int, codes: np.ndarray) -> bytes:
    """A histogram's bytes: first symbol, number of symbols, codes."""
    return bytes([first, codes.size - 1]) + pack(codes, 6)


def read_histogram(cursor: Cursor, bits: int) -> np.ndarray:
    """Read a histogram's frequencies [256].

    Raises:
        FormatError: it reaches beyond the alphabet or gives all its weight to one symbol.
    """
    first = cursor.u8()
    count = cursor.u8(ESCAPE - first, "the number of symbols")
    codes = unpack(cursor.take(packed_size(count + 1, 6)), 6, count + 1)
    if codes[-1] == 0 or int((codes > 0).sum()) < 2:
        raise FormatError(f"{cursor.where}: a histogram without an escape or without a symbol; the file is corrupt")
    return histogram_frequencies(codes, first, bits)


def _laplace(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    tail = 0.5 * np.exp(-np.abs(x) / s)
    return np.where(x < 0, tail, 1 - tail)


def _normal(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """A cubic logistic, within 2·10⁻⁴ of the normal distribution with mean deviation s."""
    z = np.clip(x / (1.2533 * s), -8, 8)
    return 1 / (1 + np.exp(-(1.5976 * z + 0.07056 * z**3)))


def _between(likely: np.ndarray) -> np.ndarray:
    """Along the last axis, everything between the first and the last likely place."""
    from_left = np.logical_or.accumulate(likely, axis=-1)
    from_right = np.logical_or.accumulate(likely[..., ::-1], axis=-1)[..., ::-1]
    return from_left & from_right
