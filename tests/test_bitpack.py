"""Laws of bit packing and of Huffman's code: round trips, sizes, equality with naive references."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kompakt.coding import huffman
from kompakt.coding.bitpack import pack, packed_size, unpack
from kompakt.coding.wire import Cursor, varint, zigzag
from kompakt.errors import FormatError, InputError


def naive_pack(values: np.ndarray, bits: int) -> bytes:
    """Bit by bit, for up to 8 bits."""
    stream = [int(value) >> place & 1 for value in values for place in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return bytes(sum(stream[i + j] << j for j in range(8)) for i in range(0, len(stream), 8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_equals_the_naive_one(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 37)
    assert pack(values, bits) == naive_pack(values, bits)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 32), st.integers(0, 300), st.integers(0, 2**32))
def test_packing_returns_what_it_was_given(bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, count)
    data = pack(values, bits)
    assert len(data) == packed_size(count, bits)
    assert np.array_equal(unpack(data, bits, count), values)


def test_packing_is_the_same_across_its_chunks():
    values = np.random.default_rng(0).integers(0, 8, 8 * 2**16 + 13)
    assert np.array_equal(unpack(pack(values, 3), 3, values.size), values)
    assert pack(values, 3)[:30] == pack(values[:80], 3)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="do not fit 3 bits"):
        pack(np.array([8]), 3)
    with pytest.raises(InputError, match="do not fit"):
        pack(np.array([-1]), 3)
    with pytest.raises(FormatError, match="4 expected"):
        unpack(b"abc", 8, 4)
    with pytest.raises(FormatError, match="33 bits"):
        unpack(b"", 33, 0)


@given(st.integers(0, 2**63 - 1), st.integers(-(2**61), 2**61))
def test_numbers_return(unsigned, signed):
    cursor = Cursor(varint(unsigned) + zigzag(signed), "numbers")
    assert (cursor.varint(), cursor.zigzag()) == (unsigned, signed)
    cursor.end()


def huffman_bits(counts: np.ndarray) -> int:
    """The size of Huffman's optimal code: the sum of all merged weights."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 5000), st.floats(0.3, 30), st.integers(0, 2**32))
def test_huffman_round_trip(alphabet, count, width, seed):
    rng = np.random.default_rng(seed)
    symbols = np.minimum(np.abs(rng.normal(0, width, count)).astype(int), alphabet - 1)
    symbols[:1] = alphabet - 1  # at least two symbols, unless there is one value
    lengths = huffman.code_lengths(np.bincount(np.append(symbols, 0), minlength=alphabet))
    data = huffman.encode(symbols, lengths)
    assert np.array_equal(huffman.decode(data, lengths, count), symbols)


def test_huffman_is_optimal_where_the_limit_does_not_bind():
    counts = np.random.default_rng(1).integers(0, 500, 64)
    lengths = huffman.code_lengths(counts)
    assert int((counts * lengths.astype(int)).sum()) == huffman_bits(counts)


def test_huffman_lengths_are_limited_and_complete():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    counts = np.array(fibonacci)
    lengths = huffman.code_lengths(counts)
    assert lengths.max() == huffman.MOST_LENGTH
    huffman.check_lengths(lengths)
    assert (counts * lengths.astype(int)).sum() < 1.01 * huffman_bits(counts)


def test_huffman_decodes_long_streams_piece_by_piece():
    rng = np.random.default_rng(2)
    symbols = rng.geometric(0.4, 200_000).clip(max=20)
    lengths = huffman.code_lengths(np.bincount(symbols, minlength=21))
    assert np.array_equal(huffman.decode(huffman.encode(symbols, lengths), lengths, symbols.size), symbols)


def test_huffman_refuses_wrong_streams():
    symbols = np.array([0, 1, 2, 2, 2, 1, 0, 2])
    lengths = huffman.code_lengths(np.bincount(symbols))
    data = huffman.encode(symbols, lengths)
    with pytest.raises(FormatError, match="complete prefix code"):
        huffman.decode(data, np.array([1, 2, 3]), 8)
    with pytest.raises(FormatError, match="Huffman stream"):
        huffman.decode(data[:1], lengths, 8)
    with pytest.raises(FormatError, match="Huffman stream"):
        huffman.decode(data + b"\0\0", lengths, 8)
