"""Laws of entropy coding: round trips, sizes near the entropy and below the peers', tables that cannot drift."""

import lzma
import zlib

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kompakt.coding import (
    decode_integers,
    encode_integers,
    estimate_bits,
    huffman,
    models,
    rans,
    rate_model,
    rate_table,
)
from kompakt.coding.block import encode_block
from kompakt.coding.choose import choose
from kompakt.coding.header import Coded, Constant, Packed
from kompakt.coding.options import Integers
from kompakt.coding.unblock import Spec, decode_block
from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError, InputError


def entropy(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum() * values.size)


def smooth_kernels(rng: np.random.Generator, outputs: int = 32, inputs: int = 24, scale: float = 2.0) -> np.ndarray:
    """3×3 kernels as training makes them: smooth within a kernel, with a scale a row and a column."""
    noise = rng.normal(size=(outputs, inputs, 4, 4))
    kernels = noise[..., :3, :3] + noise[..., 1:, :3] + noise[..., :3, 1:] + noise[..., 1:, 1:]
    factors = np.exp(rng.normal(0, 0.7, (outputs, 1, 1, 1))) * np.exp(rng.normal(0, 0.7, (1, inputs, 1, 1)))
    return np.rint(np.clip(kernels * factors * scale, -127, 127)).astype(np.int8)


def same(found: np.ndarray, given_: np.ndarray) -> bool:
    return found.dtype == given_.dtype and found.shape == given_.shape and np.array_equal(found, given_)


CASES = {
    "empty": np.zeros((0,), np.int8),
    "empty kernels": np.zeros((3, 0, 3, 3), np.int32),
    "scalar": np.array(-5, np.int64),
    "one": np.array([7], np.uint8),
    "constant": np.full((16, 16, 3, 3), -3, np.int8),
    "zeros": np.zeros((64, 64), np.int16),
    "all of int32": np.random.default_rng(0).integers(-(2**31), 2**31, (64, 33)).astype(np.int32),
    "all of uint32": np.random.default_rng(0).integers(0, 2**32, 999).astype(np.uint32),
    "all of int64": np.array([2**63 - 1, -(2**63), 0, -1], np.int64),
    "all of uint64": np.array([2**64 - 1, 0, 2**63], np.uint64),
    "bool": np.random.default_rng(0).random((50, 7)) > 0.8,
    "wide kernels": np.random.default_rng(0).normal(0, 9, (4, 3, 7, 7)).astype(np.int8),
    "five dimensions": np.random.default_rng(0).integers(0, 2, (4, 4, 4, 4, 4)).astype(np.uint16),
    "long kernels": np.random.default_rng(0).normal(0, 5, (30, 16, 11, 11)).astype(np.int16),
    "outliers": (np.random.default_rng(0).standard_cauchy((64, 32, 3, 3)) * 3).clip(-(2**30), 2**30).astype(np.int32),
    "one outlier": np.append(np.zeros(5000, np.int32), 2**31 - 1),
    "big endian": np.arange(-60, 60).astype(">i2").reshape(4, 30),
    "strided": np.arange(4000, dtype=np.int32).reshape(40, 100)[::2, ::3],
    "bytes": np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8),
    "zero point 128": np.random.default_rng(0).normal(128, 6, (64, 64)).astype(np.uint8),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_return(name):
    values = CASES[name]
    wanted = values.astype(values.dtype.newbyteorder("="))
    found = decode_integers(encode_integers(values))
    assert found.dtype.newbyteorder("=") == wanted.dtype
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64]),
    st.lists(st.integers(0, 12), max_size=5),
    st.floats(0.01, 1e9),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_any_integers_return(dtype, shape, scale, zeros, seed):
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    values = np.clip(rng.laplace(0, scale, shape), max(limits.min, -(2**52)), min(limits.max, 2**52))
    values = np.asarray(np.where(rng.random(shape) < zeros, 0, values)).astype(dtype)
    assert same(decode_integers(encode_integers(values)), values)


def test_the_channel_axis_is_put_back():
    values = smooth_kernels(np.random.default_rng(0))
    turned = np.moveaxis(values, 0, 1)
    data = encode_integers(turned, axis=1)
    assert same(decode_integers(data), turned)
    assert len(data) == len(encode_integers(values))


def test_the_same_integers_give_the_same_bytes():
    values = smooth_kernels(np.random.default_rng(1))
    models.frequencies.cache_clear()
    first = encode_integers(values)
    assert encode_integers(values.copy()) == first


def test_constants_take_bytes_not_bits_a_value():
    assert len(encode_integers(np.full((512, 512, 3, 3), 4, np.int8))) < 40


def test_smooth_kernels_cost_less_than_their_entropy_and_than_general_coders():
    values = smooth_kernels(np.random.default_rng(2), 64, 64)
    size = 8 * len(encode_integers(values))
    assert size < 0.85 * entropy(values)
    raw = values.tobytes()
    assert size < 0.88 * 8 * min(len(lzma.compress(raw, preset=9)), len(zlib.compress(raw, 9)))


def test_noise_costs_no_more_than_its_entropy_and_one_percent():
    values = np.random.default_rng(3).normal(0, 2, (128, 128, 3, 3)).round().astype(np.int8)
    assert 8 * len(encode_integers(values)) < 1.01 * entropy(values)


def test_sparse_integers_cost_no_more_than_their_entropy_and_four_percent():
    rng = np.random.default_rng(4)
    values = (rng.normal(0, 6, (256, 256)) * (rng.random((256, 256)) < 0.05)).astype(np.int8)
    assert 8 * len(encode_integers(values)) < 1.04 * entropy(values)


def test_trained_weights_cost_less_than_their_entropy(zoo):
    tensors = load_file(zoo / "resnet20-cifar10.safetensors")
    members, bits = [], 0.0
    for name, weight in tensors.items():
        if weight.ndim == 4:
            scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 7
            codes = np.rint(weight / scale).astype(np.int8)
            members.append(Integers(values=codes, family=name[:0]))
            bits += entropy(codes)
    data = encode_block(members)
    assert 8 * len(data) < 0.91 * bits
    found = decode_block(data, [Spec(member.values.shape, member.values.dtype) for member in members])
    assert all(same(a, member.values) for a, member in zip(found, members, strict=True))


def test_each_member_is_coded_its_own_way():
    rng = np.random.default_rng(5)
    members = [
        Integers(values=np.full(100, 3, np.int8)),
        Integers(values=rng.integers(0, 256, 5000).astype(np.uint8)),
        Integers(values=smooth_kernels(rng)),
        Integers(values=np.where(rng.random((64, 64)) < 0.1, rng.choice([-9, -8, 8, 9], (64, 64)), 0).astype(np.int8)),
        Integers(values=rng.geometric(0.3, 9000).astype(np.uint8), flat=True, family="plane"),
    ]
    entries = choose(members).entries
    assert [type(entry) for entry in entries] == [Constant, Packed, Coded, Coded, Coded]
    assert [entry.stored for entry in entries if isinstance(entry, Coded)] == [False, True, True]
    found = decode_block(encode_block(members), [Spec(m.values.shape, m.values.dtype) for m in members])
    assert all(same(a, member.values) for a, member in zip(found, members, strict=True))


def test_sparse_kernels_have_heads_and_cost_no_more_for_it():
    rng = np.random.default_rng(13)
    values = (rng.normal(0, 3, (128, 64, 3, 3)) * (rng.random((128, 64, 3, 3)) < 0.06)).astype(np.int8)
    full = rng.normal(0, 3, (128, 64, 3, 3)).astype(np.int8)
    clustered = full * (rng.random((128, 64, 1, 1)) < 0.08)
    entries = [choose([Integers(values=array)]).entries[0] for array in (values, clustered)]
    assert all(isinstance(entry, Coded) and entry.heads is not None for entry in entries)
    assert 8 * len(encode_integers(values)) < 1.04 * entropy(values)
    assert 8 * len(encode_integers(clustered)) < 0.9 * entropy(clustered)


@pytest.mark.parametrize("inputs", [64, 300, 37])
def test_sparse_matrices_take_neighbouring_inputs_as_taps(inputs):
    rng = np.random.default_rng(14)
    values = (rng.normal(0, 3, (100, inputs)) * (rng.random((100, inputs)) < 0.06)).astype(np.int8)
    entry = choose([Integers(values=values)]).entries[0]
    assert isinstance(entry, Coded)
    assert entry.grouped == (inputs != 37)
    assert same(decode_integers(encode_integers(values)), values)


def test_smooth_rows_are_predicted():
    rng = np.random.default_rng(15)
    rows = np.cumsum(rng.normal(size=(100, 784)), axis=1)
    values = np.rint(rows - np.cumsum(rows, axis=1) / np.arange(1, 785)).clip(-127, 127).astype(np.int8)
    assert 8 * len(encode_integers(values)) < 0.7 * entropy(values)


def test_seven_bit_weights_in_bytes_cost_at_most_seven_bits():
    values = np.random.default_rng(6).integers(-64, 64, (64, 64)).astype(np.int8)
    assert 8 * len(encode_integers(values)) <= 7 * values.size + 8 * 16


# Interleaved rANS.


def tables(rng: np.random.Generator, contexts: int, bits: int) -> np.ndarray:
    found = np.zeros((contexts, 256), np.int64)
    share = rng.dirichlet(np.full(20, 0.5), contexts)
    found[:, 100:120] = np.maximum(1, np.floor(share * ((1 << bits) - 21)))
    found[:, 255] = 1
    found[np.arange(contexts), found.argmax(axis=1)] += (1 << bits) - found.sum(axis=1)
    return found


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("lanes_log", [0, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 255, 4000])
def test_rans_returns_symbols_and_payload(bits, lanes_log, count):
    rng = np.random.default_rng(count)
    frequencies = tables(rng, 5, bits)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    contexts = [part.astype(np.int64) for part in np.array_split(rng.integers(0, 5, count), 3)]
    symbols = [rng.choice(np.append(np.arange(100, 120), 255), part.size) for part in contexts]
    calls = [rans.Call(frequencies[c, s], starts[c, s]) for c, s in zip(contexts, symbols, strict=True)]
    payload = rng.integers(0, 256, rans.capacity(1 << lanes_log, bits)).astype(np.uint8).tobytes()
    cursor = Cursor(rans.encode(calls, lanes_log, bits, payload), "test")
    reader, table = rans.Reader(cursor, bits), rans.decoding_table(frequencies)
    for c, s in zip(contexts, symbols, strict=True):
        assert np.array_equal(rans.symbol_of(reader.read(c << bits, table)), s)
    assert reader.close() == payload
    cursor.end()


def test_rans_is_as_small_as_constriction():
    rng = np.random.default_rng(7)
    frequencies = tables(rng, 1, 12)
    symbols = rng.choice(256, 50_000, p=frequencies[0] / 4096)
    starts = np.cumsum(frequencies[0]) - frequencies[0]
    ours = len(rans.encode([rans.Call(frequencies[0][symbols], starts[symbols])], 4, 12, b""))
    coder = constriction.stream.stack.AnsCoder()
    model = constriction.stream.model.Categorical((frequencies[0] / 4096).astype(np.float32), perfect=False)
    coder.encode_reverse(symbols.astype(np.int32), model)
    assert ours < 1.001 * coder.num_bits() / 8 + 16 * 5


def test_rans_finds_a_wrong_word():
    rng = np.random.default_rng(8)
    frequencies = tables(rng, 1, 10)
    starts = np.cumsum(frequencies[0]) - frequencies[0]
    symbols = rng.choice(256, 2000, p=frequencies[0] / 1024)
    data = bytearray(rans.encode([rans.Call(frequencies[0][symbols], starts[symbols])], 2, 10, b""))
    data[-3] ^= 16
    reader = rans.Reader(Cursor(bytes(data), "test"), 10)

    def read_all() -> None:
        reader.read(np.zeros(2000, np.int64), rans.decoding_table(frequencies))
        reader.close()

    with pytest.raises(FormatError):
        read_all()


# Models.


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("shape", range(models.SHAPES))
def test_parametric_tables_are_proper_and_far_from_rounding_boundaries(shape, bits):
    table = models.frequencies(shape, bits)
    assert (table.sum(axis=1) == 1 << bits).all()
    assert table.max() < 1 << bits
    assert table[:, [models.ZERO, models.ESCAPE]].min() > 0
    scaled = models.masses(shape).reshape(-1, 255) * (1 << bits)
    missing = (1 << bits) - np.where(table[:, :255] > 0, scaled, 0).sum(axis=1)
    for values in (scaled[scaled > 0.25], missing):
        assert np.abs(values - np.floor(values) - 0.5).min() > 1e-9


def test_parametric_tables_are_symmetric_at_fraction_zero():
    table = models.frequencies(1, 12).reshape(models.CLASSES, models.FRACTIONS, 256)[:, models.FRACTIONS // 2]
    left, right = table[:, 2:128], table[:, 254:128:-1]
    shared = (left > 0) & (right > 0)
    assert shared.sum() > 500
    assert np.array_equal(left[shared], right[shared])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 255), st.integers(0, 2**32), st.floats(0.001, 0.99))
def test_stored_histograms_return_close_to_the_counts(alphabet, seed, rate):
    rng = np.random.default_rng(seed)
    counts = np.zeros(256, np.int64)
    counts[:alphabet] = np.bincount(rng.geometric(rate, 3000).clip(max=alphabet) - 1, minlength=alphabet)
    raw = models.write_histogram(*models.histogram_codes(counts))
    table = models.read_histogram(Cursor(raw, "test"), 12)
    assert table.sum() == 4096
    assert table.max() < 4096
    assert (table[counts > 0] > 0).all()
    share = counts / counts.sum()
    extra = (share[counts > 0] * np.log2(share[counts > 0] / (table[counts > 0] / 4096))).sum()
    assert extra < 0.03 + 256 / 4096


def test_estimates_are_close_to_the_coded_size():
    rng = np.random.default_rng(9)
    for values in (smooth_kernels(rng, 64, 64), rng.normal(0, 3, (256, 256)).astype(np.int8), np.zeros((9, 9), int)):
        coded = 8 * len(encode_integers(values))
        assert abs(estimate_bits(values) - coded) < 0.04 * coded + 300


def test_rate_tables_are_probabilities_and_rise_away_from_zero():
    values = np.random.default_rng(10).laplace(0, 2, 4000).round().astype(np.int16)
    symbols, bits = rate_table(values)
    assert symbols[0] == values.min() - 1
    assert symbols[-1] == values.max() + 1
    assert (2.0**-bits).sum() == pytest.approx(1)
    centre = int(np.argmin(bits))
    assert symbols[centre] == 0
    assert bits[0] > bits[centre] + 4
    assert abs((bits[values - symbols[0]]).sum() - entropy(values)) < 0.05 * entropy(values)


def test_the_rate_model_prices_values_as_they_are_coded():
    values = smooth_kernels(np.random.default_rng(11), 64, 64, scale=1.0)
    model = rate_model(values)
    prices = model.bits(values, (-1, 0, 1))
    assert prices.shape == (3, *values.shape)
    assert abs(float(prices[1].sum()) - 8 * len(encode_integers(values))) < 0.05 * 8 * len(encode_integers(values))
    # Moving a large value towards its prediction is cheaper, moving it away dearer, on the whole.
    large = values > 6
    assert prices[0][large].mean() < prices[1][large].mean() < prices[2][large].mean()


def test_huffman_costs_more_than_entropy_coding_on_skewed_integers():
    values = (np.random.default_rng(12).random(20_000) < 0.06).astype(np.int8)
    counts = np.bincount(values)
    code = 4 + len(huffman.encode(values, huffman.code_lengths(counts)))
    assert len(encode_integers(values)) < 0.5 * code


def test_only_integers_are_taken():
    with pytest.raises(InputError, match="dtype float32"):
        encode_integers(np.zeros(3, np.float32))


def test_a_larger_array_than_allowed_is_refused():
    with pytest.raises(FormatError, match="at most 50"):
        decode_integers(encode_integers(np.zeros(100, np.int8)), max_values=50)
