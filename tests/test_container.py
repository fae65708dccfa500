"""Laws of the ``.kpk`` file: what goes in comes out, at random, streamed, byte for byte; golden bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from kompakt.artifact.container import Reader, create
from kompakt.artifact.kpk_onnx import pack_onnx, unpack_onnx
from kompakt.artifact.kpk_safetensors import pack_safetensors, unpack_safetensors
from kompakt.artifact.splice import kind_of, unpack_file
from kompakt.coding import encode_integers
from kompakt.errors import FormatError, InputError
from kompakt.spec import PerChannel, PerGroup, PerTensor, QuantSpec

GOLDEN = Path(__file__).parent / "golden"


def weights(seed: int = 0, shape: tuple[int, ...] = (16, 8, 3, 3)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def codes(seed: int = 0, shape: tuple[int, ...] = (16, 8, 3, 3), bits: int = 4) -> np.ndarray:
    most = 2 ** (bits - 1) - 1
    return np.random.default_rng(seed).normal(0, most / 3, shape).round().clip(-most - 1, most).astype(np.int8)


def golden_content() -> dict[str, np.ndarray]:
    """Tensors made by integer arithmetic alone, so that every platform makes the same."""
    ramp = np.arange(16 * 4 * 9, dtype=np.int64)
    noise = (ramp * 2654435761 % 2**32 >> 24) - 128
    return {
        "kernel": (noise * (1 + ramp // 36 % 4) // 64).astype(np.int8).reshape(16, 4, 3, 3),
        "pruned": np.where(noise > 100, noise // 16, 0).astype(np.int8).reshape(24, 24),
        "scale": (ramp[:16].astype(np.float32) + 1) / 64,
        "half": (noise[:64].astype(np.float16) / 32).reshape(8, 8),
        "bias": (noise[:16] * 1000).astype(np.int32),
        "shared": np.array([-0.5, 0, 0.25, 1], np.float32)[noise[:300] % 4],
    }


def write_golden(path: Path) -> None:
    content = golden_content()
    with create(path, metadata={"classes": ["cat", "dog"], "input": [3, 32, 32]}) as writer:
        spec = QuantSpec(bits=4, granularity=PerChannel(axis=0))
        writer.uniform("conv.weight", content["kernel"], content["scale"], spec)
        writer.dense("fc.weight", content["pruned"])
        writer.dense("fc.bias", content["bias"])
        writer.dense("half", content["half"])
        writer.codebook(
            "shared",
            np.searchsorted([-0.5, 0, 0.25, 1], content["shared"]).astype(np.uint8),
            np.unique(content["shared"]),
        )
        writer.sparse("sparse", np.where(content["pruned"] != 0, np.float32(1.5), np.float32(0)))
        writer.raw("note", b"kompakt")


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool", "uint16"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 4), (8, 3, 3, 3)])
def test_dense_arrays_return_bit_for_bit(tmp_path, kind, shape):
    array = np.asarray(np.random.default_rng(0).normal(0, 20, shape)).astype(kind)
    with create(tmp_path / "a.kpk") as writer:
        writer.dense("x", array)
    with Reader(tmp_path / "a.kpk") as reader:
        found = reader.tensor("x")
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_every_float_returns_even_those_that_are_not_numbers(tmp_path):
    bits = np.array([0, 1 << 31, 0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 1, 0x80000001], np.uint32)
    array = np.tile(bits, 40).view(np.float32)
    with create(tmp_path / "a.kpk") as writer:
        writer.dense("dense", array)
        writer.sparse("sparse", array)
        writer.lossless("lossless", np.tile(array, 10))
        writer.dense("bfloat16", np.arange(2**16, dtype=np.uint16), "bfloat16")
    with Reader(tmp_path / "a.kpk") as reader:
        assert reader.tensor("dense").tobytes() == array.tobytes()
        assert reader.tensor("sparse").tobytes() == array.tobytes()
        assert reader.tensor("lossless").tobytes() == np.tile(array, 10).tobytes()
        assert reader.records["lossless"].kind == "codebook"
        assert np.array_equal(reader.tensor("bfloat16"), np.arange(2**16))
        assert reader.records["bfloat16"].parts["data"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("granularity", "scales"),
    [(PerTensor(), ()), (PerChannel(axis=0), (16,)), (PerChannel(axis=1), (8,)), (PerGroup(size=12), (16, 6))],
)
@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_integers_are_the_same_and_made_real(tmp_path, bits, granularity, scales):
    spec = QuantSpec(bits=bits, signed=False, symmetric=False, granularity=granularity)
    values = np.random.default_rng(bits).integers(0, 2**bits, (16, 8, 3, 3)).astype(np.uint8)
    scale = np.random.default_rng(0).uniform(0.5, 2, scales).astype(np.float32)
    zero = np.random.default_rng(1).integers(0, 2**bits, scales).astype(np.uint8)
    with create(tmp_path / "a.kpk") as writer:
        writer.uniform("x", values, scale, spec, zero)
    with Reader(tmp_path / "a.kpk") as reader:
        parts, real = reader.parts("x"), reader.tensor("x")
        assert reader.records["x"].spec == spec
    assert np.array_equal(parts["codes"], values)
    assert np.array_equal(parts["zero_point"], zero)
    if isinstance(granularity, PerGroup):
        wanted = ((values.reshape(16, 6, 12) - zero[..., None].astype(np.float32)) * scale[..., None]).reshape(
            values.shape
        )
    else:
        wide = [1] * 4
        if isinstance(granularity, PerChannel):
            wide[granularity.axis] = values.shape[granularity.axis]
        wanted = (values - zero.reshape(wide).astype(np.float32)) * scale.reshape(wide)
    assert real.dtype == np.float32
    assert np.array_equal(real, wanted.astype(np.float32))


def test_codes_outside_their_bits_are_refused(tmp_path):
    with pytest.raises(InputError, match="not within -8…7"), create(tmp_path / "a.kpk") as writer:
        writer.uniform("x", np.array([8], np.int8), np.ones(1, np.float32), QuantSpec(bits=4))
    assert list(tmp_path.iterdir()) == []


def test_codebooks_and_sparse_tensors_return(tmp_path):
    rng = np.random.default_rng(0)
    book = np.sort(rng.normal(size=16)).astype(np.float32)
    per_channel = np.sort(rng.normal(size=(8, 4)), axis=1).astype(np.float16)
    indices, narrow = rng.integers(0, 16, (8, 40)).astype(np.uint8), rng.integers(0, 4, (8, 40)).astype(np.uint8)
    array = np.where(rng.random((30, 40)) < 0.1, rng.normal(size=(30, 40)), 0).astype(np.float32)
    with create(tmp_path / "a.kpk") as writer:
        writer.codebook("one", indices, book)
        writer.codebook("rows", narrow, per_channel)
        writer.sparse("sparse", array)
    with Reader(tmp_path / "a.kpk") as reader:
        assert np.array_equal(reader.tensor("one"), book[indices])
        assert np.array_equal(reader.tensor("rows"), np.take_along_axis(per_channel, narrow.astype(int), 1))
        assert np.array_equal(reader.tensor("sparse"), array)
    assert (tmp_path / "a.kpk").stat().st_size < indices.size // 2 + narrow.size // 4 + 120 * 4 + 900


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["f", "i", "s"]), st.integers(0, 40), st.integers(0, 9)), max_size=8),
    st.integers(0, 99),
)
def test_any_mixture_of_records_returns(tmp_path_factory, plan, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        f"t{i}": np.rint(rng.normal(0, 3, (rows, columns))).astype(np.int16)
        if kind == "i"
        else (rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < (0.2 if kind == "s" else 2))).astype(
            np.float32
        )
        for i, (kind, rows, columns) in enumerate(plan)
    }
    path = tmp_path_factory.mktemp("mix") / "a.kpk"
    with create(path) as writer:
        for name, array in arrays.items():
            writer.lossless(name, array)
    with Reader(path) as reader:
        for name in reversed(arrays):
            assert reader.tensor(name).tobytes() == arrays[name].tobytes()


def test_tensors_of_many_blocks_return_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr("kompakt.coding.planes.MOST_PIECE", 1000)
    monkeypatch.setattr("kompakt.artifact.writer.BLOCK_VALUES", 2000)
    arrays = {f"t{i}": codes(i, (50 + i, 3, 3, 3)) for i in range(12)} | {
        "long": weights(1, (5000,)),
        "row": weights(2, (2, 1500)),
    }
    with create(tmp_path / "a.kpk") as writer:
        for name, array in arrays.items():
            writer.lossless(name, array)
    with Reader(tmp_path / "a.kpk") as reader:
        assert len(reader.index.blocks) > 8
        for name in np.random.default_rng(0).permutation(list(arrays)):
            assert reader.tensor(name).tobytes() == arrays[name].tobytes()


def test_scales_ride_for_free(tmp_path):
    """The initial states of the coder carry bytes of the scales: together they are smaller than apart."""
    values, scale = codes(0, (64, 64, 3, 3)), weights(0, (64,))
    with create(tmp_path / "a.kpk") as writer:
        writer.uniform("x", values, scale, QuantSpec(bits=4, granularity=PerChannel()))
    assert (tmp_path / "a.kpk").stat().st_size < len(encode_integers(values)) + 4 * 64 + 100


def test_metadata_and_names_return(tmp_path):
    metadata = {"classes": ["Katze", "狗"], "mean": [0.485, 0.456], "nested": {"a": None, "b": [True, 1]}}
    with create(tmp_path / "a.kpk", metadata=metadata) as writer:
        writer.raw("../../etc/passwd", b"a name is not a path")
    with Reader(tmp_path / "a.kpk") as reader:
        assert reader.metadata == metadata
        assert reader.tensor("../../etc/passwd").tobytes() == b"a name is not a path"
        with pytest.raises(InputError, match="there is no tensor b"):
            reader.tensor("b")


def test_names_are_unique(tmp_path):
    with create(tmp_path / "a.kpk") as writer:
        writer.dense("x", weights())
        with pytest.raises(InputError, match="names are unique"):
            writer.dense("x", weights())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a.kpk", "b.kpk"):
        write_golden(tmp_path / name)
    assert (tmp_path / "a.kpk").read_bytes() == (tmp_path / "b.kpk").read_bytes()


def test_golden_file_is_read_as_it_was_written():
    content = golden_content()
    with Reader(GOLDEN / "v1.kpk") as reader:
        assert reader.metadata == {"classes": ["cat", "dog"], "input": [3, 32, 32]}
        assert np.array_equal(reader.parts("conv.weight")["codes"], content["kernel"])
        assert np.array_equal(reader.parts("conv.weight")["scale"].view(np.float32), content["scale"])
        assert np.array_equal(reader.tensor("fc.weight"), content["pruned"])
        assert np.array_equal(reader.tensor("fc.bias"), content["bias"])
        assert np.array_equal(reader.tensor("half"), content["half"])
        assert np.array_equal(reader.tensor("shared"), content["shared"])
        assert np.array_equal(reader.tensor("sparse"), (content["pruned"] != 0) * np.float32(1.5))
        assert reader.tensor("note").tobytes() == b"kompakt"


def test_golden_bytes_are_written_again(tmp_path):
    """The blocks are ours alone; the index goes through zlib or xz, whose builds may differ."""
    write_golden(tmp_path / "new.kpk")
    with Reader(tmp_path / "new.kpk") as new, Reader(GOLDEN / "v1.kpk") as old:
        assert new.index == old.index
        end = 32 + sum(block.size_bytes for block in old.index.blocks)
    assert (tmp_path / "new.kpk").read_bytes()[32:end] == (GOLDEN / "v1.kpk").read_bytes()[32:end]


@pytest.mark.parametrize("name", ["kernel", "pruned", "bias"])
def test_golden_integers_are_coded_alike(name):
    assert encode_integers(golden_content()[name]) == (GOLDEN / f"{name}.bin").read_bytes()


# Files of tensors.


def safetensors_file(path: Path) -> dict[str, np.ndarray]:
    tensors = {
        "conv.weight": weights(0, (32, 16, 3, 3)),
        "fc.weight": np.where(np.random.default_rng(1).random((40, 50)) < 0.1, weights(1, (40, 50)), 0).astype(
            np.float32
        ),
        "shared": np.random.default_rng(2).choice(np.linspace(-1, 1, 16), (50, 60)).astype(np.float32),
        "half": weights(2, (64, 9)).astype(np.float16),
        "codes": codes(3),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def test_safetensors_return_byte_for_byte(tmp_path):
    safetensors_file(tmp_path / "m.safetensors")
    size = pack_safetensors(tmp_path / "m.safetensors", tmp_path / "m.kpk", {"from": "test"})
    whole = (tmp_path / "m.safetensors").read_bytes()
    assert unpack_safetensors(tmp_path / "m.kpk") == whole
    assert size == (tmp_path / "m.kpk").stat().st_size < 0.75 * len(whole)
    assert kind_of(tmp_path / "m.kpk") == "safetensors"
    with Reader(tmp_path / "m.kpk") as reader:
        kinds = {name: record.kind for name, record in reader.records.items()}
    assert (kinds["fc.weight"], kinds["shared"], kinds["conv.weight"]) == ("sparse", "codebook", "dense")


def test_trained_weights_return_byte_for_byte_and_are_smaller(tmp_path, zoo):
    source = zoo / "resnet20-cifar10.safetensors"
    size = pack_safetensors(source, tmp_path / "m.kpk")
    assert unpack_safetensors((tmp_path / "m.kpk").read_bytes()) == source.read_bytes()
    assert size < 0.85 * source.stat().st_size


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{"])
def test_what_is_no_safetensors_file_is_named(tmp_path, data):
    with pytest.raises(FormatError, match="not a safetensors file"):
        pack_safetensors(data, tmp_path / "m.kpk")


def test_overlapping_offsets_are_refused(tmp_path):
    data = bytearray(save({"a": weights(0, (8, 8)), "b": weights(1, (8, 8))}))
    data = bytes(data).replace(
        b'"data_offsets":[256,512]', b'"data_offsets":[000,256]'.replace(b"000", b"128").replace(b"256]", b"384]")
    )
    with pytest.raises(FormatError, match="offsets do not fit"):
        pack_safetensors(data, tmp_path / "m.kpk")


def qdq_model(raw: bool = True) -> onnx.ModelProto:
    """x → QuantizeLinear/DequantizeLinear weights of 7 bits in int8 → Conv → Relu."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    values = np.random.default_rng(0).normal(0, 18, (64, 16, 3, 3)).round().clip(-64, 63).astype(np.int8)
    scale = np.random.default_rng(1).uniform(0.001, 0.01, 64).astype(np.float32)
    bias = np.random.default_rng(2).normal(size=64).astype(np.float32)
    initializers = [
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(bias, "bias"),
        numpy_helper.from_array(np.zeros(64, np.int8), "zero"),
    ]
    initializers.append(
        numpy_helper.from_array(values, "codes")
        if raw
        else helper.make_tensor("codes", onnx.TensorProto.INT8, values.shape, values.ravel().tolist())
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["weight"], axis=0),
        helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 64, 8, 8])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model: bytes) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(3).normal(size=(1, 16, 8, 8)).astype(np.float32)})[0]


def test_onnx_models_return_byte_for_byte_with_the_same_integers(tmp_path):
    whole = qdq_model().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole)
    size = pack_onnx(tmp_path / "m.onnx", tmp_path / "m.kpk")
    found = unpack_onnx(tmp_path / "m.kpk")
    assert found == whole
    assert np.array_equal(run(found), run(whole))
    assert kind_of(tmp_path / "m.kpk") == "onnx"
    # The weights take 7 bits a value at most, all the rest included.
    assert size < 7 / 8 * 64 * 16 * 9 + 64 * 8 + 500
    with Reader(tmp_path / "m.kpk") as reader:
        assert np.array_equal(reader.tensor("codes"), onnx.numpy_helper.to_array(qdq_model().graph.initializer[3]))


def test_weights_in_typed_fields_return_with_bit_equal_outputs(tmp_path):
    whole = qdq_model(raw=False).SerializeToString()
    pack_onnx(whole, tmp_path / "m.kpk")
    found = unpack_onnx(tmp_path / "m.kpk")
    assert np.array_equal(run(found), run(whole))
    with Reader(tmp_path / "m.kpk") as reader:
        assert "codes" in reader.records


def test_weights_in_a_file_of_their_own_are_taken_in(tmp_path):
    model = qdq_model()
    whole = model.SerializeToString()
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=64)
    pack_onnx(tmp_path / "m.onnx", tmp_path / "m.kpk")
    assert np.array_equal(run(unpack_onnx(tmp_path / "m.kpk")), run(whole))


def test_four_bit_constants_and_weights_in_subgraphs_return(tmp_path):
    helper = onnx.helper
    packed = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    nibbles = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[100, 100], name="w4", raw_data=packed)
    odd = onnx.TensorProto(data_type=onnx.TensorProto.UINT4, dims=[201], name="w4", raw_data=packed[:101])
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(weights(0, (40, 40)), "w"))],
        "then",
        [],
        [],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], "g", [], [], [nibbles, odd]
    )
    whole = helper.make_model(graph).SerializeToString()
    pack_onnx(whole, tmp_path / "m.kpk")
    with Reader(tmp_path / "m.kpk") as reader:
        assert len(reader.records) == 4
    # The padding nibble of an odd count is not a value and returns as zero.
    found = onnx.load_model_from_string(unpack_onnx(tmp_path / "m.kpk"))
    assert found.graph.initializer[0].raw_data == packed
    assert found.graph.initializer[1].raw_data[:-1] == packed[:100]
    assert found.graph.node == onnx.load_model_from_string(whole).graph.node


@pytest.mark.parametrize("data", [b"", b"\x0f", b"\x12\xff\xff\xff\xff\x0f", b"hello, this is text", b"\x08\x09"])
def test_what_is_no_onnx_model_is_named(tmp_path, data):
    with pytest.raises(FormatError):
        pack_onnx(data, tmp_path / "m.kpk")


# Streaming and atomic writes.

MEASURE = """
import resource, sys
from kompakt.artifact.kpk_safetensors import pack_safetensors
from kompakt.artifact.splice import unpack_file
def own():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
source, packed, back = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak = []
import threading, time
threading.Thread(target=lambda: [(peak.append(own()), time.sleep(0.01)) for _ in iter(int, 1)], daemon=True).start()
base = own()
pack_safetensors(source, packed)
unpack_file(packed, back)
print((max(peak) - base) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """16 tensors of 4 MB take the memory of one block, not of the file (benchmarks/stream.py does gigabytes)."""
    noise, source = weights(0, (2**20,)), tmp_path / "m.safetensors"
    save_file({f"t{i:02}": np.roll(noise, i).reshape(1024, 1024) for i in range(16)}, source)
    arguments = [str(source), str(tmp_path / "m.kpk"), str(tmp_path / "back")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert int(done.stdout) < 200, "MiB beyond the interpreter"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_golden(tmp_path / "a.kpk")
    before = (tmp_path / "a.kpk").read_bytes()

    def fail() -> None:
        with create(tmp_path / "a.kpk") as writer:
            writer.dense("x", weights())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a.kpk").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


KILLED = """
import sys, numpy as np
from kompakt.artifact.container import create
rng = np.random.default_rng(0)
for number in range(10**6):
    with create(sys.argv[1], metadata={"number": number}) as writer:
        writer.dense("x", np.full((64, 64), number, np.int32) + rng.integers(0, 9, (64, 64)).astype(np.int32))
    print(number, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.kpk"
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            with Reader(path) as reader:
                assert reader.tensor("x").min() >= reader.metadata["number"]
    assert path.exists()


def test_unpacking_leaves_no_half_file(tmp_path):
    safetensors_file(tmp_path / "m.safetensors")
    pack_safetensors(tmp_path / "m.safetensors", tmp_path / "m.kpk")
    data = bytearray((tmp_path / "m.kpk").read_bytes())
    data[2000] ^= 1
    with pytest.raises(FormatError, match="damaged"):
        unpack_file(bytes(data), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    unpack_file(tmp_path / "m.kpk", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "np") as opened:
        assert "conv.weight" in opened.keys()  # noqa: SIM118


def test_the_format_names_every_dtype_and_kind():
    """FORMAT.md and the code have the same numbers."""
    from kompakt.artifact.records import KIND_NAMES
    from kompakt.coding.planes import KINDS

    text = " ".join((Path(__file__).parents[1] / "FORMAT.md").read_text().split())
    for name, kind in KINDS.items():
        assert f"{kind.code} {name}" in text
    for number, name in enumerate(KIND_NAMES):
        assert f"| {number} {name} |" in text
