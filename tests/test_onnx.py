"""Laws of the export to ONNX: the simulated numbers, in files that ONNX Runtime really runs in integers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import Tensor, nn

from kompakt.artifact.onnx import HEAVY_FLOAT_OPS, export_onnx, open_onnx, runtime_ops
from kompakt.build.integer import exact
from kompakt.build.quantize import quantizers
from kompakt.errors import FormatError
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, attribute, trace
from kompakt.methods.uniform import Knobs
from kompakt.numerics.grid import fake_quantize, saturation_free
from kompakt.plan.rules import ONNXRUNTIME
from tests.integer_nets import NETS, Flat, Tokens, inputs, quantized, seeded

PLAIN = replace(ONNXRUNTIME, weight=replace(ONNXRUNTIME.weight, saturation_free=False))


def run(capture: Capture, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return capture.module(x).numpy()


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every stored tensor, constants of nodes as well."""
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    return stored | {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in constants}


def stored_weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, np.ndarray]]:
    """Yield each int8 weight with its DequantizeLinear and the node that multiplies by it."""
    values = tensors(model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and values.get(node.input[0], np.zeros(0)).dtype == np.int8:
            reader = next(item for item in model.graph.node if node.output[0] in item.input)
            yield node, reader, values[node.input[0]]


def is_depthwise(reader: onnx.NodeProto, weight: np.ndarray) -> bool:
    groups = [item.i for item in reader.attribute if item.name == "group"]
    return reader.op_type == "Conv" and groups[0] > 1 and weight.shape[1] == 1


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Capture, Path]:
    capture = seeded(NETS["Residual"])
    return capture, export_onnx(capture, tmp_path_factory.mktemp("residual") / "model.onnx", metadata={"a": "b"})


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Capture, Path]:
    return family("mobilenet_v2", tmp_path_factory.mktemp("mobilenet"))


def family(name: str, folder: Path) -> tuple[Capture, Path]:
    """A torchvision model of random weights and lively batch norms, quantized and exported at 64×64."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.5)
    capture = quantized(model, torch.randn(4, 3, 64, 64))
    return capture, export_onnx(capture, folder / f"{name}.onnx")


def test_the_file_holds_the_simulated_scales_and_zero_points(residual: tuple[Capture, Path]) -> None:
    capture, path = residual
    model, made = onnx.load(path), quantizers(capture.module)
    values = tensors(model)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    found = {(values[node.input[1]].item(), values[node.input[2]].item()) for node in nodes}
    activations = [item for name, item in made.items() if not name.endswith("weight")]
    assert found == {(item.scale.item(), item.zero_point.item()) for item in activations}
    assert all(values[node.input[2]].dtype == np.uint8 for node in nodes)


def test_the_file_holds_the_simulated_weights_and_biases(residual: tuple[Capture, Path]) -> None:
    capture, path = residual
    model, made = onnx.load(path), quantizers(capture.module)
    values = tensors(model)
    found = {node.input[0]: (values[node.input[1]], integers) for node, _, integers in stored_weights(model)}
    assert len(found) == 4
    for name, (scale, integers) in found.items():
        weight = next(item for item in made if name == f"{item.replace('.', '_')}_integers")
        expected = fake_quantize(
            attribute(capture.module, weight), made[weight].scale, made[weight].zero_point, made[weight].spec
        )
        spread = scale.reshape(-1, *(1,) * (integers.ndim - 1))
        np.testing.assert_array_equal(integers.astype(np.float32) * spread, expected.detach().numpy())
    biases = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    biases = [node for node in biases if values[node.input[0]].dtype == np.int32]
    expected_scales = {tuple((made[source].scale * made[weight].scale).tolist()) for source, weight in LAYERS.items()}
    assert {tuple(values[node.input[1]].tolist()) for node in biases} == expected_scales


LAYERS = {"x": "conv1.weight", "relu": "conv2.weight", "relu_1": "conv3.weight", "flatten": "linear.weight"}


def test_float_weights_do_not_ship(residual: tuple[Capture, Path]) -> None:
    values = tensors(onnx.load(residual[1]))
    assert all(item.size <= 8 for item in values.values() if item.dtype == np.float32)


def test_metadata_is_written_and_nothing_of_the_exporter_is(residual: tuple[Capture, Path]) -> None:
    model = onnx.load(residual[1])
    assert {item.key: item.value for item in model.metadata_props} == {"a": "b"}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)


def test_the_runtime_runs_a_residual_net_in_integers(residual: tuple[Capture, Path]) -> None:
    ops = runtime_ops(residual[1])
    assert {name: ops[name] for name in ("QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm")} == {
        "QLinearConv": 3, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1,
    }  # fmt: skip
    assert ops["QuantizeLinear"] == 1  # the input's
    assert not HEAVY_FLOAT_OPS & ops.keys()


def test_the_runtime_runs_mobilenet_in_integers(mobilenet: tuple[Capture, Path]) -> None:
    ops = runtime_ops(mobilenet[1])
    assert (ops["QLinearConv"], ops["QGemm"], ops["QLinearAdd"]) == (52, 1, 10)
    assert not HEAVY_FLOAT_OPS & ops.keys()
    assert "Clip" not in ops


def test_mobilenet_computes_what_was_simulated(mobilenet: tuple[Capture, Path]) -> None:
    capture, path = mobilenet
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    real, ours = open_onnx(path)(x.numpy()), run(exact(capture), x)
    assert np.abs(real - ours).max() <= np.ptp(real) / 255


def test_the_runtime_runs_resnet18_in_integers(tmp_path: Path) -> None:
    capture, path = family("resnet18", tmp_path)
    ops = runtime_ops(path)
    assert (ops["QLinearConv"], ops["QGemm"], ops["QLinearAdd"]) == (20, 1, 8)
    assert not HEAVY_FLOAT_OPS & ops.keys()
    assert path.stat().st_size < 1.06 * sum(value.numel() for value in capture.module.parameters())
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    real, ours = open_onnx(path)(x.numpy()), run(exact(capture), x)
    assert np.abs(real - ours).max() <= np.ptp(real) / 255


def test_clamps_that_the_grid_makes_redundant_are_not_in_the_file(tmp_path: Path) -> None:
    """Not even a ReLU6 whose grid ends a float above 6; a clamp that does something stays."""
    capture = seeded(NETS["Depthwise"], Knobs(activation_range="minmax"))
    made = quantizers(capture.module)["relu6_1"]
    made.scale = torch.nextafter(torch.tensor(6.0) / 255, torch.tensor(1.0))
    assert float(made.scale * 255) > 6
    path = export_onnx(capture, tmp_path / "m.onnx")
    assert not {"Clip", "Relu"} & {node.op_type for node in onnx.load(path).graph.node}
    assert runtime_ops(path)["QLinearConv"] == 5
    clamped = onnx.load(export_onnx(seeded(NETS["Clamped"]), tmp_path / "clamped.onnx"))
    assert [node.op_type for node in clamped.graph.node].count("Clip") == 1


def test_activations_of_fewer_bits_are_clamped_in_the_file_too(tmp_path: Path) -> None:
    capture, x = seeded(NETS["Shapes"], Knobs(activation_bits=4)), inputs(32, seed=1) * 2
    real = open_onnx(export_onnx(capture, tmp_path / "m.onnx"))(x.numpy())
    ours = run(capture, x)
    assert len(np.unique(ours)) <= 16
    step = float(np.diff(np.unique(ours)).min())
    assert (np.abs(real - ours) < step / 100).mean() > 0.999


@pytest.mark.parametrize(("make", "op"), [(Flat, "DynamicQuantizeMatMul"), (Tokens, "DynamicQuantizeMatMul")])
def test_dynamic_quantization_runs_and_matches_its_simulation(make: type[nn.Module], op: str, tmp_path: Path) -> None:
    capture, x = seeded(make, Knobs(dynamic=True)), inputs(16, seed=1)
    path = export_onnx(capture, tmp_path / "m.onnx")
    ops = runtime_ops(path)
    assert ops.get(op, 0) + ops.get("MatMulInteger", 0) == 2
    assert not HEAVY_FLOAT_OPS & ops.keys()
    real, ours = open_onnx(path)(x.numpy()), run(capture, x)
    assert np.abs(real - ours).max() <= 1e-4 * np.ptp(real)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_symbolic_batch_takes_any_batch(batch: int, residual: tuple[Capture, Path]) -> None:
    capture, path = residual
    runtime, x = open_onnx(path), inputs(batch, seed=1)
    assert runtime.session.get_inputs()[0].shape[0] == "batch"
    np.testing.assert_allclose(runtime(x.numpy()), run(exact(capture), x), rtol=1e-5, atol=1e-6)


class Pairs(nn.Module):
    """A model whose code says how large a batch is."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.ones(2, 1, 1, 1)).flatten(1).cumsum(1)[:, ::7]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_file_of_a_fixed_batch_runs_any_batch(batch: int, tmp_path: Path) -> None:
    runtime = open_onnx(export_onnx(fold(trace(Pairs(), inputs(2))), tmp_path / "m.onnx"))
    assert runtime.session.get_inputs()[0].shape[0] == 2
    x = inputs(batch, seed=1)
    expected = (x + 1).flatten(1).cumsum(1)[:, ::7]
    np.testing.assert_allclose(runtime(x.numpy()), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_files_that_are_missing_or_broken_are_refused(tmp_path: Path, residual: tuple[Capture, Path]) -> None:
    broken, empty, cut = tmp_path / "broken.onnx", tmp_path / "empty.onnx", tmp_path / "cut.onnx"
    broken.write_bytes(b"not an ONNX model at all")
    empty.write_bytes(b"")
    cut.write_bytes(residual[1].read_bytes()[:-200])
    for path in (broken, empty, cut, tmp_path / "missing.onnx"):
        with pytest.raises(FormatError, match=path.name):
            open_onnx(path)


def test_no_zero_point_is_shared_between_weights(residual: tuple[Capture, Path]) -> None:
    """Shared ones crash ONNX Runtime's own way out of saturation, ``session.x64quantprecision``."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(residual[1]), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: inputs(1).numpy()})[0].shape == (1, 5)


def saturating(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply u8 rows (n, K) by s8 columns (K, m) as x86 does without VNNI: pairs of products saturate in int16."""
    if len(weight) % 2:
        x, weight = np.pad(x, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    products = x.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


def worst_inputs(weight: np.ndarray, count: int = 8) -> np.ndarray:
    """All at the top; for some outputs, the top where the weight is positive, and where it is negative."""
    rows = [np.full(len(weight), 255)]
    for column in range(0, weight.shape[1], max(1, weight.shape[1] // count)):
        rows += [255 * (weight[:, column] > 0), 255 * (weight[:, column] < 0)]
    return np.stack(rows)


def orders(length: int) -> Iterator[np.ndarray]:
    """Orders in which a kernel may pair the inputs of an output."""
    rng = np.random.default_rng(0)
    yield np.arange(length)
    yield np.arange(length).reshape(-1, 3).T.ravel() if length % 3 == 0 else np.arange(length)[::-1]
    for _ in range(4):
        yield rng.permutation(length)


def columns(reader: onnx.NodeProto, weight: np.ndarray) -> np.ndarray:
    """Lay a weight out (inputs, outputs): MatMul stores it so, Conv and Gemm the other way."""
    return weight if reader.op_type == "MatMul" else weight.reshape(len(weight), -1).T


def extreme(model: nn.Module) -> nn.Module:
    """Give every output its largest weights in pairs, where 8 plain bits put ±127 side by side."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            flat = module.weight.data.reshape(len(module.weight), -1)
            flat[:, ::3], flat[:, 1::3] = flat.abs().amax(), flat.abs().amax()
            flat[::2] *= -1
    return model


@pytest.mark.parametrize("make", [NETS["Residual"], NETS["Depthwise"], NETS["Tokens"]])
def test_exported_weights_cannot_saturate(make: type[nn.Module], tmp_path: Path) -> None:
    """Neither as a bound over all pairs nor in the emulated kernel at the extremes of its inputs."""
    checked = 0
    capture = seeded(lambda: extreme(make()))
    for _, reader, weight in stored_weights(onnx.load(export_onnx(capture, tmp_path / "m.onnx"))):
        if is_depthwise(reader, weight):
            continue  # its kernels sum in int32
        matrix = columns(reader, weight)
        assert bool(saturation_free(torch.from_numpy(matrix.copy()), axis=1).all())
        x = worst_inputs(matrix)
        for order in orders(len(matrix)):
            np.testing.assert_array_equal(saturating(x[:, order], matrix[order]), x @ matrix.astype(np.int64))
        checked += 1
    assert checked >= 2


def test_all_weights_of_mobilenet_cannot_saturate(mobilenet: tuple[Capture, Path]) -> None:
    kinds = {True: 0, False: 0}
    for _, reader, weight in stored_weights(onnx.load(mobilenet[1])):
        kinds[is_depthwise(reader, weight)] += 1
        if not is_depthwise(reader, weight):
            assert bool(saturation_free(torch.from_numpy(columns(reader, weight).copy()), axis=1).all())
    assert kinds == {True: 17, False: 36}


def test_plain_eight_bits_saturate(tmp_path: Path) -> None:
    """The emulation is not blind: weights of the full ±127 come out wrong."""
    capture = seeded(lambda: extreme(NETS["Residual"]()), rules=PLAIN)
    wrong = 0
    for _, reader, weight in stored_weights(onnx.load(export_onnx(capture, tmp_path / "m.onnx"))):
        matrix = columns(reader, weight)
        assert not bool(saturation_free(torch.from_numpy(matrix.copy()), axis=1).all())
        x = worst_inputs(matrix)
        wrong += int((saturating(x, matrix) != x @ matrix.astype(np.int64)).sum())
    assert wrong > 0
