"""Hostile files: whatever the bytes, the answer is a ``KompaktError`` or a tensor within the limits.

Files are flipped, cut, spliced and inflated; where a checksum would end the reading early it is mended,
so that the decoders behind it are reached as well.
"""

import time
import tracemalloc
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kompakt.artifact.container import Reader, create
from kompakt.artifact.index import (
    HEADER_BYTES,
    MAGIC,
    Index,
    Splice,
    compress,
    inflate,
    read_header,
    write_header,
    write_index,
)
from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.kpk_safetensors import pack_safetensors
from kompakt.artifact.splice import unpack_bytes
from kompakt.coding import decode_integers, encode_integers
from kompakt.coding.unblock import Spec, decode_block
from kompakt.coding.wire import varint
from kompakt.errors import FormatError, KompaktError
from kompakt.spec import PerChannel, QuantSpec

SECONDS = 20.0
SEEDS = st.integers(0, 2**32)


def content(path: Path) -> bytes:
    """A file with every kind of record and every mode of coding."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(0, 3, (16, 8, 3, 3)).round().clip(-8, 7).astype(np.int8)
    with create(path, metadata={"name": "test"}) as writer:
        spec = QuantSpec(bits=4, granularity=PerChannel())
        writer.uniform("kernel", kernels, rng.random(16).astype(np.float32), spec, np.zeros(16, np.int8))
        writer.dense("wide", rng.normal(0, 500, (40, 30)).astype(np.int16))
        writer.dense("float", rng.normal(size=(16, 16, 3, 3)).astype(np.float32))
        writer.codebook("codebook", rng.integers(0, 16, (20, 30)).astype(np.uint8), np.arange(16, dtype=np.float32))
        writer.sparse("sparse", np.where(rng.random((40, 40)) < 0.1, rng.random((40, 40)), 0).astype(np.float32))
        writer.dense("few", rng.geometric(0.5, 60).astype(np.uint8))
        writer.raw("raw", b"bytes")
        writer.dense("constant", np.full((9, 9), 3, np.int32))
    return path.read_bytes()


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> bytes:
    return content(tmp_path_factory.mktemp("honest") / "a.kpk")


@pytest.fixture(scope="module")
def onnx_like(tmp_path_factory) -> bytes:
    """A packed safetensors file, with skeleton and splices."""
    from safetensors.numpy import save

    path = tmp_path_factory.mktemp("spliced") / "a.kpk"
    pack_safetensors(save({"a": np.arange(600, dtype=np.float32), "b": np.zeros((30, 30), np.int8)}), path)
    return path.read_bytes()


def mutate(data: bytes, seed: int) -> bytes:
    """Flip, overwrite, cut, insert, repeat or swap at random."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            return b""
        at, length = int(rng.integers(0, len(out))), int(rng.integers(1, 20))
        match rng.integers(0, 7):
            case 0:
                out[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                out[at : at + length] = rng.integers(0, 256, length).astype(np.uint8).tobytes()
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = rng.choice([0, 127, 128, 255], length).astype(np.uint8).tobytes()
            case 5:
                other = int(rng.integers(0, len(out)))
                out[at : at + length] = out[other : other + length]
            case _:
                out[at : at + 9] = varint(int(rng.integers(0, 2**62)))
    return bytes(out)


def read_all(data: bytes) -> dict[str, bytes] | None:
    """Everything in a file, or None if it is refused, which must be in the right way and in time."""
    start = time.monotonic()
    try:
        with Reader(data, max_bytes=2**26) as reader:
            found = {name: reader.tensor(name).tobytes() for name in reader.records}
            if reader.index.skeleton:
                found[""] = unpack_bytes(data, max_bytes=2**26)
            return found
    except KompaktError as error:
        return check_line(str(error))
    finally:
        assert time.monotonic() - start < SECONDS


def check_line(message: str) -> None:
    assert message
    assert "\n" not in message


def open_up(data: bytes) -> tuple[Index, list[bytes], bytes]:
    """The index, the blocks and the index's bytes of a file."""
    offset, raw = read_header(memoryview(data), "test")
    with Reader(data) as reader:
        index = reader.index
    ends = np.cumsum([HEADER_BYTES, *(block.size_bytes for block in index.blocks)]).tolist()
    assert ends[-1] == offset
    return index, [data[a:b] for a, b in pairwise(ends)], raw


def close_again(blocks: list[bytes], raw: bytes) -> bytes:
    """A file of blocks and an index, with the header that it needs."""
    body = b"".join(blocks)
    stored = compress(raw)
    return write_header(HEADER_BYTES + len(body), stored, len(raw)) + body + stored


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_damaged_files_are_refused(honest, seed):
    """With checksums in place nothing but the very same tensors may come out."""
    damaged = mutate(honest, seed)
    assert read_all(damaged) in (None, read_all(honest))


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_damaged_blocks_with_mended_checksums_do_no_harm(honest, seed):
    index, blocks, _ = open_up(honest)
    blocks = [mutate(block, seed) for block in blocks]
    places = [
        replace(place, size_bytes=len(block), checksum=zlib.crc32(block))
        for place, block in zip(index.blocks, blocks, strict=True)
    ]
    read_all(close_again(blocks, write_index(replace(index, blocks=tuple(places)))))


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_damaged_indices_with_mended_checksums_do_no_harm(honest, onnx_like, seed):
    for data in (honest, onnx_like):
        _, blocks, raw = open_up(data)
        read_all(close_again(blocks, mutate(raw, seed)))


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_damaged_integers_do_no_harm(seed):
    rng = np.random.default_rng(seed)
    values = [
        rng.normal(0, 3, (8, 8, 3, 3)).astype(np.int8),
        np.where(rng.random((30, 30)) < 0.1, rng.integers(-9, 9, (30, 30)), 0).astype(np.int16),
        rng.integers(0, 2**20, 50).astype(np.int32),
        rng.geometric(0.4, 80).astype(np.uint8),
    ][seed % 4]
    try:
        found = decode_integers(mutate(encode_integers(values), seed), max_values=2**20)
        assert found.size <= 2**20
    except KompaktError:
        pass


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_block(data):
    specs = [Spec((4, 4, 3, 3), np.dtype("i1")), Spec((50,), np.dtype("u1"))]
    try:
        found = decode_block(data, specs)
        assert [array.shape for array in found] == [(4, 4, 3, 3), (50,)]
    except FormatError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_no_file(data, with_magic):
    assert read_all(MAGIC + data if with_magic else data) is None


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_damaged_sources_do_no_harm(tmp_path_factory, seed):
    """Packing reads hostile files too."""
    from safetensors.numpy import save

    data = mutate(save({"a": np.arange(64, dtype=np.float32), "b": np.zeros(300, np.int8)}), seed)
    for pack in (pack_safetensors, pack_onnx):
        path = tmp_path_factory.mktemp("pack") / "a.kpk"
        try:
            pack(data, path)
            assert unpack_bytes(path) == data
        except KompaktError:
            assert not path.exists()


def peak_bytes(data: bytes) -> int:
    tracemalloc.start()
    try:
        read_all(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_damaged_files_take_no_more_than_twice_the_memory(honest):
    read_all(honest)  # tables are made once
    most = 2 * peak_bytes(honest)
    index, blocks, raw = open_up(honest)
    for seed in range(60):
        damaged = [mutate(block, seed) for block in blocks]
        places = [
            replace(place, size_bytes=len(block), checksum=zlib.crc32(block))
            for place, block in zip(index.blocks, damaged, strict=True)
        ]
        assert peak_bytes(close_again(damaged, write_index(replace(index, blocks=tuple(places))))) < most
        assert peak_bytes(close_again(blocks, mutate(raw, seed))) < most


# Attacks by hand.


def forged(honest: bytes, **changes: object) -> bytes:
    """The honest file with fields of its index exchanged."""
    index, blocks, _ = open_up(honest)
    return close_again(blocks, write_index(replace(index, **changes)))


def huge(honest: bytes, shape: tuple[int, ...]) -> bytes:
    index, _, _ = open_up(honest)
    records = list(index.records)
    part = replace(records[1].parts["data"], shape=shape)
    records[1] = replace(records[1], parts={"data": part})
    return forged(honest, records=tuple(records))


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (2**47, 1), (2**27,), (2**61,), (3,) * 32])
def test_huge_shapes_are_refused_before_they_are_allocated(honest, shape):
    data = huge(honest, shape)
    tracemalloc.start()
    with pytest.raises(FormatError):
        Reader(data)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_the_limit_of_the_caller_holds(honest):
    with pytest.raises(FormatError, match="pass max_bytes if you trust it"):
        Reader(honest, max_bytes=1000)
    with Reader(honest, max_bytes=2**20) as reader:
        assert reader.tensor("constant").sum() == 243


def test_many_pieces_claimed_by_a_block_cost_nothing(honest):
    index, _, _ = open_up(honest)
    blocks = tuple(replace(block, pieces=2**20) for block in index.blocks)
    with pytest.raises(FormatError, match="more blocks than tensors"):
        Reader(forged(honest, blocks=blocks))


def test_bombs_do_not_inflate():
    for raw in (bytes(2**24), b"ab" * 2**22):
        for method in (1, 2):
            stored = memoryview(bytes([method]) + compress_with(method, raw))
            with pytest.raises(FormatError):
                inflate(stored, len(raw), "test")
            with pytest.raises(FormatError):
                inflate(stored, 1000, "test")


def compress_with(method: int, raw: bytes) -> bytes:
    import lzma

    from kompakt.artifact.index import FILTERS

    if method == 2:
        return lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTERS)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(raw) + deflate.flush()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splices": (Splice(5, 0),)}, "beyond the skeleton"),
        ({"skeleton": b"x", "splices": (Splice(0, 99),)}, "record of a splice"),
    ],
)
def test_splices_are_checked(honest, change, message):
    with pytest.raises(FormatError, match=message):
        Reader(forged(honest, **change))


def test_a_file_without_skeleton_restores_no_file(honest):
    with pytest.raises(FormatError, match="no file to restore"):
        unpack_bytes(honest)
    with pytest.raises(FormatError, match="stands in no file"):
        unpack_bytes(forged(honest, skeleton=b"x", splices=(Splice(0, 0),)))


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "x" * 5000])
def test_names_are_checked(honest, name):
    index, _, _ = open_up(honest)
    records = (replace(index.records[0], name=name), *index.records[1:])
    with pytest.raises(FormatError, match="name"):
        Reader(forged(honest, records=records))


def test_two_records_of_one_name_are_refused(honest):
    index, _, _ = open_up(honest)
    records = (replace(index.records[0], name="wide"), *index.records[1:])
    with pytest.raises(FormatError, match="two records have one name"):
        Reader(forged(honest, records=records))


@pytest.mark.parametrize(
    "metadata", [b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_metadata_is_checked(honest, metadata):
    _, blocks, raw = open_up(honest)
    old = raw[1 : 1 + raw[0]]
    with pytest.raises(FormatError, match="metadata"):
        Reader(close_again(blocks, varint(len(metadata)) + metadata + raw[1 + len(old) :]))


def test_other_versions_and_other_files_are_named(honest, tmp_path):
    newer = honest[:8] + (2).to_bytes(2, "little") + honest[10:]
    with pytest.raises(FormatError, match="version 2, flags 0; this kompakt reads version 1"):
        Reader(newer)
    with pytest.raises(FormatError, match=r"not a \.kpk file"):
        Reader(b"PK\x03\x04" + bytes(100))
    (tmp_path / "empty.kpk").write_bytes(b"")
    with pytest.raises(FormatError, match=r"not a \.kpk file"):
        Reader(tmp_path / "empty.kpk")
    with pytest.raises(FormatError, match="was appended to"):
        Reader(honest + b"more")
    with pytest.raises(FormatError, match="index is damaged"):
        Reader(honest[:-1] + bytes([honest[-1] ^ 1]))


def test_every_cut_is_noticed(honest):
    for end in range(0, len(honest), 37):
        assert read_all(honest[:end]) is None


def test_masks_and_indices_that_do_not_fit_are_refused(honest):
    index, _, _ = open_up(honest)
    by_name = {record.name: i for i, record in enumerate(index.records)}

    def swapped(name: str, role: str, shape: tuple[int, ...]) -> bytes:
        records = list(index.records)
        record = records[by_name[name]]
        parts = {**record.parts, role: replace(record.parts[role], shape=shape)}
        records[by_name[name]] = replace(record, parts=parts)
        return forged(honest, records=tuple(records))

    for name, role, shape in (
        ("codebook", "codebook", (2, 8)),
        ("codebook", "codebook", (4, 4)),
        ("kernel", "codes", (8, 16, 3, 3)),
    ):
        with Reader(swapped(name, role, shape)) as reader, pytest.raises(FormatError, match=name):
            reader.tensor(name)


def test_the_fuzz_target_runs_on_its_corpus():
    from tests.fuzz.fuzz_kpk import CORPUS, blind, one_input

    seeds = sorted(CORPUS.iterdir())
    assert len(seeds) >= 4
    for seed in seeds:
        one_input(seed.read_bytes())
    assert blind(2.0, CORPUS) > 10
