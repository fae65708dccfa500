"""Laws of size, stored bits, memory, parity, per-node times and the machine's description."""

import json
import math
import platform
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kompakt.errors import FormatError, InputError, ModelError
from kompakt.measure.bench import op_times
from kompakt.measure.machine import machine, versions
from kompakt.measure.memory import measure, peak_memory
from kompakt.measure.parity import SQNR_LIMIT_DB, compare, first_departure, sqnr_db
from kompakt.measure.result import Parity
from kompakt.measure.size import size_bytes, weight_bits

FEATURES = 64


def model(nodes, initializers, inputs=(("x", (None, FEATURES)),)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape[1:]]) for name, shape in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def dense(layers: int = 1, features: int = FEATURES) -> onnx.ModelProto:
    """A chain of float matrix products."""
    weight = np.random.default_rng(0).normal(size=(features, features)).astype(np.float32)
    names = ["x", *(f"h{i}" for i in range(layers - 1)), "y"]
    return model(
        [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"layer{i}") for i in range(layers)],
        [numpy_helper.from_array(weight, f"w{i}") for i in range(layers)],
        inputs=(("x", (None, features)),),
    )


def quantized(kind: int) -> onnx.ModelProto:
    """A matrix product whose weights are stored as integers with one scale and zero point a column."""
    return model(
        [
            helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wf"], axis=1),
            helper.make_node("DequantizeLinear", ["b", "bias_scale"], ["bf"]),
            helper.make_node("MatMul", ["x", "wf"], ["h"]),
            helper.make_node("Add", ["h", "bf"], ["s"]),
            helper.make_node("Reshape", ["s", "shape"], ["y"]),
        ],
        [
            helper.make_tensor("w", kind, [FEATURES, FEATURES], np.ones(FEATURES**2, dtype=np.int8)),
            helper.make_tensor("scale", TensorProto.FLOAT, [FEATURES], np.ones(FEATURES)),
            helper.make_tensor("zero", kind, [FEATURES], np.zeros(FEATURES, dtype=np.int8)),
            helper.make_tensor("b", TensorProto.INT32, [FEATURES], np.zeros(FEATURES, dtype=np.int32)),
            helper.make_tensor("bias_scale", TensorProto.FLOAT, [], [0.5]),
            helper.make_tensor("shape", TensorProto.INT64, [2], [-1, FEATURES]),
        ],
    )


@pytest.fixture
def write(tmp_path):
    def save(proto: onnx.ModelProto, name: str = "model.onnx", **options):
        onnx.save(proto, str(tmp_path / name), **options)
        return tmp_path / name

    return save


# --- size


def test_a_file_is_its_bytes_and_a_folder_the_sum(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 100)
    (tmp_path / "deep" / "b.bin").write_bytes(b"x" * 23)
    assert size_bytes(tmp_path / "a.bin") == 100
    assert size_bytes(tmp_path) == 123


def test_external_data_counts_wherever_it_lies(write, tmp_path):
    inside = size_bytes(write(dense()))
    outside = write(dense(2), "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)
    assert inside > 4 * FEATURES**2
    assert outside.stat().st_size < 4 * FEATURES**2
    assert size_bytes(outside) == outside.stat().st_size + (tmp_path / "ext.data").stat().st_size
    (tmp_path / "ext.data").unlink()
    with pytest.raises(FormatError, match=r"ext\.data is missing"):
        size_bytes(outside)


def test_what_is_not_there_or_not_onnx_is_said(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        size_bytes(tmp_path / "none.onnx")
    for content in (b"\xff" * 40, b""):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(FormatError, match="not an ONNX file"):
            weight_bits(tmp_path / "bad.onnx")


# --- stored bits


def test_a_float_model_stores_32_bits_a_weight(write):
    stored = weight_bits(write(dense(3)))
    assert stored.values == {"FLOAT": 3 * FEATURES**2}
    assert stored.bits_per_weight == 32


@pytest.mark.parametrize(("kind", "name", "bits"), [(TensorProto.INT8, "INT8", 8), (TensorProto.INT4, "INT4", 4)])
def test_integers_count_with_their_width_and_their_scales(write, kind, name, bits):
    path = write(quantized(kind))
    stored = weight_bits(path)
    assert stored.values == {name: FEATURES**2, "INT32": FEATURES}
    assert stored.weight_bits == bits * FEATURES**2 + 32 * FEATURES
    assert stored.overhead_bits == (32 + bits) * FEATURES + 32
    assert stored.bits_per_weight == pytest.approx((stored.weight_bits + stored.overhead_bits) / stored.params)
    # What is counted is what the file holds, up to names and structure.
    assert 0 < path.stat().st_size - (stored.weight_bits + stored.overhead_bits) / 8 < 1000


def test_constants_and_bodies_of_ifs_count(write):
    value = numpy_helper.from_array(np.ones(10, dtype=np.float16), "c")
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value)],
        "body",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT16, [10])],
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    node = helper.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=body)
    stored = weight_bits(write(model([node], [condition])))
    assert stored.values["FLOAT16"] == 20


def test_packed_matrix_products_count_their_values(write):
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=32, bits=4, block_size=32
    )
    packed = numpy_helper.from_array(np.zeros((32, 2, 16), dtype=np.uint8), "w")
    scales = numpy_helper.from_array(np.ones((32, 2), dtype=np.float32), "s")
    stored = weight_bits(write(model([node], [packed, scales])))
    assert stored.values == {"UINT4": 64 * 32}
    assert stored.bits_per_weight == 4 + 32 / 32


# --- memory


def test_a_larger_model_takes_more_memory_and_at_least_its_weights(write):
    small = peak_memory(write(dense(1, 256), "small.onnx"))
    large = peak_memory(write(dense(4, 1536), "large.onnx"))
    assert large > 4 * 4 * 1536**2
    assert 0 <= small < large / 2


def test_memory_tells_what_fails(write, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        peak_memory(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        measure(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        peak_memory(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="took over"):
        peak_memory(write(dense()), timeout_s=0.01)


# --- parity


def test_sqnr_is_the_ratio_of_powers_in_decibels():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=100_000)
    noise = rng.normal(size=100_000)
    assert sqnr_db(signal, signal + 0.1 * noise) == pytest.approx(20, abs=0.1)
    assert sqnr_db(signal, signal + 0.01 * noise) == pytest.approx(40, abs=0.1)


def test_each_bit_gains_six_decibels():
    signal = np.random.default_rng(1).uniform(-1, 1, 100_000)
    ratios = [sqnr_db(signal, np.round(signal * 2 ** (b - 1)) / 2 ** (b - 1)) for b in range(4, 10)]
    assert np.diff(ratios) == pytest.approx([6.02] * 5, abs=0.1)


def test_the_ends_of_sqnr_survive_json():
    one, zero = np.ones(3), np.zeros(3)
    assert sqnr_db(one, one) == sqnr_db(zero, zero) == SQNR_LIMIT_DB
    assert sqnr_db(zero, one) == -SQNR_LIMIT_DB
    parity = compare(np.eye(3), np.eye(3), step=0.1)
    assert Parity.model_validate_json(parity.model_dump_json()) == parity


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sqnr_of_what_is_not_a_number_is_refused(bad):
    with pytest.raises(InputError, match="NaN or infinite"):
        sqnr_db(np.ones(2), np.array([1.0, bad]))


def test_compare_gives_agreement_and_the_largest_error():
    simulated = np.eye(4, dtype=np.float32)
    actual = simulated.copy()
    actual[0] = [0.0, 1.0, 0.0, 0.0]
    parity = compare(simulated, actual, step=0.5)
    assert (parity.top1_agreement, parity.max_abs_error, parity.output_step, parity.examples) == (0.75, 1.0, 0.5, 4)
    assert parity.sqnr_db == pytest.approx(10 * math.log10(2))


def test_compare_refuses_other_shapes_and_nothing():
    with pytest.raises(InputError, match="cannot compare shape"):
        compare(np.ones((2, 3)), np.ones((2, 4)), step=1.0)
    with pytest.raises(InputError, match="at least one example"):
        compare(np.ones((0, 3)), np.ones((0, 3)), step=1.0)


def test_the_first_departure_is_the_first():
    rng = np.random.default_rng(2)
    reference = {name: rng.normal(size=8) for name in ("conv1", "fused", "conv2", "fc")}
    actual = {name: value.copy() for name, value in reference.items() if name != "fused"}
    assert first_departure(reference, actual, 0.0) is None
    actual["conv2"] += 0.1
    actual["fc"] += 10
    assert first_departure(reference, actual, 1e-3) == "conv2"
    assert first_departure(reference, actual, 0.5) == "fc"
    actual["conv1"][0] = math.nan
    assert first_departure(reference, actual, 1e9) == "conv1"
    with pytest.raises(InputError, match="no layer in common"):
        first_departure(reference, {"other": np.ones(1)}, 0.1)


# --- per-node times


def test_op_times_reads_a_real_profile(write, tmp_path):
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(write(dense(3))), options, providers=["CPUExecutionProvider"])
    for _ in range(4):
        session.run(None, {"x": np.ones((1, FEATURES), dtype=np.float32)})
    with open(session.end_profiling()) as file:
        profile = json.load(file)
    times = op_times(profile)
    assert list(times) == ["layer0", "layer1", "layer2"]
    kernels_us = sum(event["dur"] for event in profile if event["name"].startswith("layer"))
    assert sum(times.values()) == pytest.approx(kernels_us / 1000 / 4)
    whole_us = sum(event["dur"] for event in profile if event["name"] == "model_run")
    assert sum(times.values()) <= whole_us / 1000 / 4


def test_op_times_is_the_mean_over_inferences():
    def event(name, cat, dur):
        return {"name": name, "cat": cat, "dur": dur, "ts": 0, "args": {}}

    profile = [
        event("session_initialization", "Session", 900),
        *[event("conv_kernel_time", "Node", us) for us in (1000, 3000)],
        event("conv_fence_before", "Node", 50),
        event("model_run", "Session", 1100),
        event("model_run", "Session", 3100),
    ]
    assert op_times(profile) == {"conv": 2.0}
    with pytest.raises(FormatError, match="no model_run"):
        op_times(profile[:2])


# --- machine


def test_the_machine_is_described_in_words():
    found = machine()
    assert set(found) == {"cpu", "cores", "memory_gib", "isa", "arch", "os", "python"}
    assert all(isinstance(value, str) and value for value in found.values())
    assert int(found["cores"]) >= 1
    assert float(found["memory_gib"]) > 0
    assert found["python"] == platform.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_versions_names_only_what_is_installed():
    assert versions(["numpy", "no-such-package-anywhere"]) == {"numpy": np.__version__}
    assert {"kompakt", "torch", "onnxruntime"} <= set(versions())
