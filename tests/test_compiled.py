"""Compiled decoding is numpy's decoding: equal arrays, equal errors, whatever the members and the bytes."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kompakt.coding import decode_integers, encode_integers, huffman, rans, section, unblock
from kompakt.coding.bundle import Bundle, Member, Tables
from kompakt.coding.header import Coded
from kompakt.coding.kernels import WINDOW, Layout, Scales, weight_rows
from kompakt.coding.models import CLASSES, SHAPES
from kompakt.coding.section import compiled_loops, decode_section
from kompakt.coding.sides import side_call, side_symbols
from kompakt.coding.stream import encode_values, make_bundles
from kompakt.coding.tablesets import BINS, TableSet
from kompakt.coding.wire import Cursor
from kompakt.errors import KompaktError
from tests.test_entropy import CASES
from tests.test_hostile import mutate

needs_numba = pytest.mark.skipif(
    compiled_loops() is None, reason="numba is not installed: pip install 'kompakt[fast]' to test compiled decoding"
)
SEEDS = st.integers(0, 2**32)


def both(work: Callable[[], Any]) -> Any:
    """What work returns, or the error that it raises, compiled; checked to be the same in numpy."""
    outcomes = []
    for loops in (compiled_loops(), None):
        with pytest.MonkeyPatch.context() as patch:
            for module in (section, unblock):
                patch.setattr(module, "compiled_loops", lambda loops=loops: loops)
            try:
                outcomes.append(work())
            except KompaktError as error:
                outcomes.append(f"{type(error).__name__}: {error}")
    compiled, plain = outcomes
    if isinstance(plain, str):
        assert compiled == plain
    else:
        assert not isinstance(compiled, str), compiled
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(compiled, plain, strict=True))
    return compiled


def thresholds(rng: np.random.Generator, below: int, most: int) -> tuple[int, ...]:
    return tuple(np.sort(rng.choice(np.arange(1, below), rng.integers(0, most + 1), replace=False)).tolist())


def random_set(rng: np.random.Generator, bits: int) -> TableSet:
    """A set whose tables know every head, so that it codes heads too."""
    classes, bins = thresholds(rng, CLASSES, 5), thresholds(rng, BINS, 5)
    rows = (len(classes) + 1) * (len(bins) + 1) + 1
    tables = rng.geometric(rng.uniform(0.05, 0.9), (rows, 256)) * (rng.random((rows, 256)) < rng.uniform(0.1, 1))
    tables[:, [*range(128, 193), 255]] += 1
    tables = np.maximum(tables * ((1 << bits) - 300) // tables.sum(axis=1, keepdims=True), tables > 0)
    tables[:, 128] += (1 << bits) - tables.sum(axis=1)
    return TableSet(classes, bins, tables, heads=True)


def random_model(rng: np.random.Generator, layout: Layout, sets: int) -> Coded:
    def factors(count: int) -> np.ndarray | None:
        return rng.integers(-9, 10, count) if rng.random() < 0.5 else None

    stored = bool(rng.random() < 0.5)
    rows = weight_rows(layout.taps)
    weights = np.zeros((len(rows), WINDOW), np.int64)
    for place, count in enumerate(rows):
        weights[place, :count] = rng.integers(-127, 128, count) // rng.choice([1, 4, 16])
    return Coded(
        stored=stored, center=0, shift=0, flat=False, index=int(rng.integers(0, sets)) if stored else 0,
        scales=Scales(base=int(rng.integers(0, CLASSES)), rows=factors(layout.outputs), columns=factors(layout.inputs),
                      taps=factors(layout.taps)),
        weights=weights if rng.random() < 0.6 else None,
        heads=int(rng.integers(0, sets)) if stored and rng.random() < 0.5 else None,
    )  # fmt: skip


def random_values(rng: np.random.Generator, bundle: Bundle) -> np.ndarray:
    shape, scale = bundle.values.shape, 10 ** rng.uniform(-0.5, rng.choice([1.5, 5]))
    values = np.rint(rng.laplace(0, scale, shape)).clip(-(2**20) + 1, 2**20 - 1)
    return values * (rng.random(shape) < rng.uniform(0, 1.2))


class Coding(NamedTuple):
    """A coded section, and what the rest of its block would say about it."""

    members: list[Member]
    tables: Tables
    histograms: tuple[np.ndarray | None, np.ndarray | None]
    data: bytes
    escapes: np.ndarray


def side_histogram(rng: np.random.Generator, symbols: np.ndarray, bits: int) -> np.ndarray | None:
    """Frequencies [256] that know these symbols, None where there are none."""
    if not symbols.size:
        return None
    table = np.bincount(symbols, minlength=256) * ((1 << bits) - 300) // symbols.size
    table = np.maximum(table, (rng.random(256) < 0.5) | (np.bincount(symbols, minlength=256) > 0))
    table[255] += 1
    table[128] += (1 << bits) - table.sum()
    return table


def coded(seed: int) -> Coding:
    """Members at random, and the section that codes random values of theirs."""
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([10, 12]))
    tables = Tables(int(rng.integers(0, SHAPES)), tuple(random_set(rng, bits) for _ in range(rng.integers(1, 4))), bits)
    members = []
    for _ in range(rng.integers(1, 6)):
        taps = int(rng.choice([1, 2, 9, 10, 64]))
        layout = Layout(int(rng.integers(0, 20)), int(rng.integers(1, 9) * rng.choice([1, 40])), taps)
        members.append(Member(layout, random_model(rng, layout, len(tables.sets))))
    bundles = make_bundles(members, tables, 256)
    for bundle in bundles:
        bundle.values[:] = random_values(rng, bundle)
    symbols = side_symbols(members)
    histograms = tuple(side_histogram(rng, found, bits) for found in symbols)
    calls, escapes = encode_values(bundles, tables)
    sides = [side_call(s, h) for s, h in zip(symbols, histograms, strict=True) if h is not None]
    data = rans.encode([*sides, *calls], int(rng.integers(0, 10)), bits, b"")
    return Coding(members, tables, histograms, data, escapes)


def decoded(coding: Coding) -> list[np.ndarray]:
    cursor = Cursor(coding.data, "test")
    planes, _ = decode_section(cursor, coding.members, coding.tables, coding.histograms, coding.escapes)
    cursor.end()
    ends = [np.array([plane.least, plane.most]) for plane in planes]
    return [plane.values.astype(np.float32) for plane in planes] + ends


@needs_numba
@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_random_members_are_equal(seed):
    both(lambda: decoded(coded(seed)))


@needs_numba
def test_damaged_streams_and_escapes_give_the_same_errors():
    seen: Counter[str] = Counter()
    for seed in range(120):
        rng = np.random.default_rng(seed)
        coding = coded(seed)
        if seed % 3 == 0:
            coding = coding._replace(escapes=coding.escapes[: coding.escapes.size // 2])
        elif seed % 3 == 1:
            coding = coding._replace(escapes=np.append(coding.escapes, np.int32(3)))
        else:
            data = bytearray(coding.data)
            data[int(rng.integers(3, len(data)))] ^= 1 << int(rng.integers(0, 8))
            coding = coding._replace(data=bytes(data))
        found = both(lambda coding=coding: decoded(coding))
        seen[found.split(";")[0] if isinstance(found, str) else "read"] += 1
    said = " ".join(seen)
    for message in ("words are used up", "does not end where", "too large for", "is missing", "left over"):
        assert message in said, seen


@needs_numba
@pytest.mark.parametrize("name", CASES)
def test_arrays_of_every_kind_are_equal(name):
    data = encode_integers(CASES[name])
    both(lambda: [decode_integers(data)])


@needs_numba
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["wide kernels", "long kernels", "outliers", "zero point 128", "bool"]), SEEDS)
def test_damaged_arrays_are_equal(name, seed):
    data = mutate(encode_integers(CASES[name]), seed)
    both(lambda: [decode_integers(data, max_values=2**20)])


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr.strip()


@needs_numba
@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_codes_of_huffman_are_read_equally_whole_cut_and_damaged(seed):
    rng = np.random.default_rng(seed)
    symbols = rng.geometric(rng.uniform(0.02, 0.9), rng.integers(2, 3000)) % 300
    symbols[:2] = 0, 1
    lengths = huffman.code_lengths(np.bincount(symbols))
    whole = huffman.encode(symbols, lengths)
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    for data in (whole, whole[:-1], whole + b"\0", bytes(damaged)):
        outcomes = []
        for walk in (compiled_loops().walk, None):
            try:
                outcomes.append(huffman.decode(data, lengths, symbols.size, walk).tolist())
            except KompaktError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        assert data is not whole or outcomes[0] == symbols.tolist()


def test_importing_kompakt_does_not_import_numba():
    assert in_a_process("import sys, kompakt, kompakt.cli, kompakt.coding; print('numba' in sys.modules)") == "False"


DECODE = """
import numpy as np
from kompakt.coding import decode_integers, encode_integers
from kompakt.coding.section import compiled_loops
values = np.random.default_rng(0).normal(0, 3, (8, 8, 3, 3)).astype(np.int8)
assert (decode_integers(encode_integers(values)) == values).all()
print(compiled_loops() is not None)
"""


def test_without_numba_numpy_decodes():
    assert in_a_process("import sys; sys.modules['numba'] = None" + DECODE) == "False"


@needs_numba
def test_without_a_place_for_what_is_compiled_numpy_decodes():
    # Of all the places that numba tries, this one is for notebooks alone.
    assert in_a_process(DECODE, NUMBA_CACHE_LOCATOR_CLASSES="IPythonCacheLocator") == "False"


@needs_numba
def test_what_is_compiled_is_kept(tmp_path):
    for _ in range(2):
        assert in_a_process(DECODE, NUMBA_CACHE_DIR=str(tmp_path)) == "True"
    assert list(tmp_path.rglob("*.nbc"))
