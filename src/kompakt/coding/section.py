"""Reading a coded section: side information, values, and what its lanes carry. FORMAT.md §5 and §6.

In numpy, which is the reference, or in compiled code, which gives the same arrays and errors.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

from kompakt.coding.bundle import Member, Tables
from kompakt.coding.kernels import Plane
from kompakt.coding.rans import Reader
from kompakt.coding.sides import read_sides
from kompakt.coding.stream import decode_values, make_bundles
from kompakt.coding.wire import Cursor

Histograms = tuple[np.ndarray | None, np.ndarray | None]


def decode_section(
    cursor: Cursor, members: list[Member], tables: Tables, histograms: Histograms, escapes: np.ndarray
) -> tuple[list[Plane], bytes]:
    """Read a coded section.

    Args:
        cursor: stands at the section; is left behind it.
        members: the coded members of the block.
        tables: the tables of values.
        histograms: frequencies [256] of factors and of weights, or None where no member has any.
        escapes: values outside of tables, int32.

    Returns:
        the planes of the members, and the bytes that the stream carries.

    Raises:
        FormatError: the section is damaged, or does not fit.
    """
    start, loops = cursor.at, compiled_loops()
    reader, found = Reader(cursor, tables.bits), None
    if loops is not None:
        found = loops.decode(members, tables, histograms, reader, escapes)
    if loops is not None and found is None:
        cursor.at = start
        reader = Reader(cursor, tables.bits)
    if found is None:
        found = decode_plainly(members, tables, histograms, reader, escapes)
    return found, reader.close()


def decode_plainly(
    members: list[Member], tables: Tables, histograms: Histograms, reader: Reader, escapes: np.ndarray
) -> list[Plane]:
    """The planes of the members, in numpy.

    Raises:
        FormatError: the section is damaged, or does not fit.
    """
    members = read_sides(members, reader, *histograms)
    bundles = make_bundles(members, tables, 1 << tables.bits)
    decode_values(bundles, tables, reader, escapes)
    found: list[Plane] = [Plane(np.zeros((1, 0)))] * len(members)
    for bundle in bundles:
        for place, part in bundle.parts:
            found[place] = Plane.of(bundle.values[:, part])
    return found


@cache
def compiled_loops() -> ModuleType | None:
    """``kompakt.coding.compiled``, or None where there is no numba or no place for what it compiles."""
    try:
        return import_module("kompakt.coding.compiled")
    except (ImportError, OSError, RuntimeError):
        return None
