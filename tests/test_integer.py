"""Laws of the exact integers: what is simulated is what ONNX Runtime's kernels compute."""

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.build.integer import behind_clamps, exact
from kompakt.build.layers import Quantizer
from kompakt.build.quantize import quantizers
from kompakt.graph.trace import Capture
from kompakt.methods.uniform import Knobs
from kompakt.numerics.grid import fake_quantize
from kompakt.numerics.integer import (
    EXACT_FLOAT32,
    Grid,
    Window,
    add,
    average_image,
    average_windows,
    exact_dtype,
    multiply,
    requantize,
)
from kompakt.spec import QuantSpec
from kompakt.zoo import resnet20
from tests.integer_nets import NETS, Together, inputs, quantized, seeded, split

Outputs = dict[str, np.ndarray]


def run(capture: Capture, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return capture.module(x).numpy()


def in_runtime(capture: Capture, x: Tensor, folder: Path) -> np.ndarray:
    return open_onnx(export_onnx(capture, folder / "model.onnx"))(x.numpy())


@pytest.fixture(scope="module")
def together() -> Capture:
    return seeded(Together)


@pytest.fixture(scope="module")
def outputs(together: Capture, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outputs, Outputs, Outputs]:
    """Of the runtime, of the exact capture and of the capture of rounded floats, by net."""
    x = inputs(256, seed=1)
    real = in_runtime(together, x, tmp_path_factory.mktemp("together"))
    return split(real), split(run(exact(together), x)), split(run(together, x))


def step_of(output: np.ndarray) -> float:
    """The distance of neighbours on the output's grid, or 1/255 of the range of an output of floats."""
    levels = np.unique(output)
    return float(np.diff(levels).min()) if len(levels) <= 256 else float(np.ptp(output)) / 255


@pytest.mark.parametrize("name", NETS)
def test_the_exact_capture_is_what_the_runtime_computes(name: str, outputs: tuple[Outputs, ...]) -> None:
    real, ours, rough = (item[name] for item in outputs)
    step = step_of(real)
    assert np.abs(ours - real).max() <= step * 1.01
    share, share_rough = (float((np.abs(values - real) < step / 100).mean()) for values in (ours, rough))
    assert share >= 0.999
    assert share >= share_rough


def test_rounded_floats_are_not_what_the_runtime_computes(outputs: tuple[Outputs, ...]) -> None:
    """The reason for all this: ties fall otherwise. Without this test the one above could pass for nothing."""
    real, ours, rough = outputs

    def flips(values: Outputs) -> int:
        return sum(int((np.abs(values[name] - real[name]) > step_of(real[name]) / 100).sum()) for name in NETS)

    assert flips(rough) > 10 * flips(ours)


def test_a_clamp_inside_the_grid_stays_a_clamp() -> None:
    """The grid of a clamp to ±2 ends at -2.008: taking the clamp out would change values."""
    capture = seeded(NETS["Clamped"])
    node = next(node for node in capture.module.graph.nodes if node.name == "quantizers_hardtanh")
    assert behind_clamps(node, quantizers(capture.module)["hardtanh"]).name == "hardtanh"


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0), (-0.7, 0.7)])
def test_a_clamp_that_is_taken_out_changes_no_value(low: float, high: float) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 8
    spec, graph, taken = QuantSpec(signed=False, symmetric=False), torch.fx.Graph(), 0
    clamp = graph.call_function(torch.ops.aten.hardtanh.default, (graph.placeholder("x"), low, high))
    node = graph.call_module("q", (clamp,))
    for top in torch.linspace(0.2, 12.0, 60):
        for zero in (0, 100, 128, 255):
            made = Quantizer(spec, top / 255, torch.tensor(zero, dtype=torch.int32))
            if behind_clamps(node, made) is not clamp:
                taken += 1
                clamped = fake_quantize(x.clamp(low, high), made.scale, made.zero_point, spec)
                assert torch.equal(fake_quantize(x, made.scale, made.zero_point, spec), clamped)
    assert 0 < taken < 240


def test_exact_changes_nothing_in_its_input(together: Capture) -> None:
    code, state = together.module.code, {key: value.clone() for key, value in together.module.state_dict().items()}
    assert exact(together).module is not together.module
    assert together.module.code == code
    assert together.module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in together.module.state_dict().items())


def test_exact_stays_close_to_rounded_floats(outputs: tuple[Outputs, ...]) -> None:
    _, ours, rough = outputs
    for name in NETS:
        difference = np.abs(ours[name] - rough[name]) / step_of(ours[name])
        assert difference.max() < 2.0
        assert difference.mean() < 0.01


def test_every_op_of_integers_is_found() -> None:
    found = {
        str(node.target) for node in exact(seeded(NETS["Residual"])).module.graph.nodes if node.op == "call_module"
    }
    ops = ("conv2d", "conv2d_1", "add", "conv2d_2", "add_1", "adaptive_avg_pool2d", "linear")
    assert found - {"quantizers.adaptive_avg_pool2d"} == {"quantizers.x", *(f"integers.{name}" for name in ops)}


def test_what_has_no_integer_kernel_stays_as_it_is() -> None:
    x = inputs(8, seed=1)
    for knobs in (Knobs(activation_bits=6), Knobs(group_size=4, keep=frozenset({"conv2d"})), Knobs(dynamic=True)):
        capture = seeded(NETS["Residual"], knobs)
        made = [node for node in exact(capture).module.graph.nodes if "integers." in str(node.target)]
        if knobs.group_size is None:
            assert not made
            np.testing.assert_array_equal(run(exact(capture), x), run(capture, x))
        else:
            assert not any("conv" in str(node.target) or "linear" in str(node.target) for node in made)


def test_linear_maps_equal_int64_arithmetic() -> None:
    capture, x = seeded(NETS["Flat"]), inputs(32, seed=1)
    made = quantizers(capture.module)
    source, weight, middle = made["flatten"], made["linear1.weight"], made["relu"]
    q = torch.round(x.flatten(1) / source.scale).add(source.zero_point).clamp(0, 255).to(torch.int64).numpy()
    w = torch.round(capture.module.linear1.weight / weight.scale[:, None]).clamp(-127, 127).to(torch.int64).numpy()
    b = capture.module.quantizers.linear_bias.integers(capture.module.linear1.bias).numpy().astype(np.int64)
    total = (q - int(source.zero_point)) @ w.T + b
    factor = source.scale.numpy() * weight.scale.numpy() / middle.scale.numpy()
    expected = np.clip(
        np.rint(total.astype(np.float32) * factor), -int(middle.zero_point), 255 - int(middle.zero_point)
    )
    layer = exact(capture).module.integers.linear
    values = torch.from_numpy((q - int(source.zero_point)).astype(np.float32)) * source.scale
    np.testing.assert_array_equal(np.rint(layer(values).numpy() / middle.scale.numpy()), expected)


def test_sums_that_float32_cannot_hold_are_made_in_float64() -> None:
    weight = torch.full((2, 129, 2, 2), 127)
    largest = int(weight[0].sum()) * 255
    room = EXACT_FLOAT32 - 1 - largest
    assert exact_dtype(weight, None) == torch.float32
    assert exact_dtype(weight, torch.tensor([room, -room])) == torch.float32
    assert exact_dtype(weight, torch.tensor([0, -room - 1])) == torch.float64
    assert exact_dtype(weight.repeat(1, 2, 1, 1), None) == torch.float64


def grids(count: int, seed: int) -> list[Grid]:
    rng = np.random.default_rng(seed)
    scales, zeros = np.exp(rng.normal(-3, 1, count)).astype(np.float32), rng.integers(0, 256, count)
    return [
        Grid(scale=torch.tensor(s), zero_point=torch.tensor(z), qmin=0, qmax=255)
        for s, z in zip(scales, zeros, strict=True)
    ]


def integers(x: Tensor, grid: Grid) -> np.ndarray:
    return (grid.steps(x) + grid.zero_point).numpy()


def kernel(operator: str) -> ort.InferenceSession:
    """One operator of ONNX Runtime's own set on 2^16 bytes, its scales and zero points given with each call."""
    names = ("a", "sa", "za", "b", "sb", "zb", "sc", "zc")
    kinds = {"a": (TensorProto.UINT8, ["n"]), "b": (TensorProto.UINT8, ["n"])}
    scalars = {name: (TensorProto.FLOAT if name[0] == "s" else TensorProto.UINT8, []) for name in names}
    values = [helper.make_tensor_value_info(name, *kinds.get(name, scalars[name])) for name in names]
    node = helper.make_node(operator, names, ["c"], domain="com.microsoft")
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("c", TensorProto.UINT8, ["n"])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels of other CPUs round otherwise")
@pytest.mark.parametrize(("operator", "ours"), [("QLinearAdd", add), ("QLinearMul", multiply)])
def test_joins_equal_the_kernels_on_all_pairs_of_bytes(operator: str, ours: Callable[..., Tensor]) -> None:
    """Also where sums are ties: every third case has scales that are eighths of the output's."""
    session = kernel(operator)
    a, b = np.repeat(np.arange(256), 256).astype(np.uint8), np.tile(np.arange(256), 256).astype(np.uint8)
    wrong = 0
    for case in range(24):
        ga, gb, gc = grids(3, case)
        if case % 3 == 0:
            ga, gb = (replace(g, scale=gc.scale * n / 8) for n, g in ((3, ga), (5, gb)))
        if operator == "QLinearMul":
            gc = replace(gc, scale=ga.scale * gb.scale * 160)
        names = {"a": ga, "b": gb, "c": gc}
        feed = {"a": a, "b": b} | {f"s{key}": g.scale.numpy() for key, g in names.items()}
        feed |= {f"z{key}": g.zero_point.numpy().astype(np.uint8) for key, g in names.items()}
        values = [(torch.from_numpy(q).float() - g.zero_point) * g.scale for q, g in ((a, ga), (b, gb))]
        wrong += int((integers(ours(*values, ga, gb, gc), gc) != session.run(None, feed)[0]).sum())
    assert wrong <= 2  # of 1.5 million; another CPU's kernels may round a tie the other way


def test_arithmetic_is_right_to_half_a_step() -> None:
    """Against exact arithmetic in float64, for values that the grid does not clip."""
    ga, gb, gc = grids(3, 5)
    gc = replace(gc, scale=ga.scale + gb.scale, zero_point=torch.tensor(128))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-60, 60, (4, 6, 7, 7), generator=generator) * g.scale for g in (ga, gb))
    half = 0.5001 * float(gc.scale)
    assert (add(a, b, ga, gb, gc) - (a.double() + b.double())).abs().max() <= half
    wide = replace(gc, scale=ga.scale * gb.scale * 40)
    assert (multiply(a, b, ga, gb, wide) - a.double() * b.double()).abs().max() <= 0.5001 * float(wide.scale)
    fine = replace(gc, scale=ga.scale / 4)
    mean = a.double().mean((2, 3), keepdim=True)
    assert (average_image(a, ga, fine) - mean).abs().max() <= 0.5001 * float(fine.scale)
    for count in (True, False):
        window = Window(kernel=(3, 2), stride=(2, 1), padding=(1, 1), count_padding=count)
        expected = torch.nn.functional.avg_pool2d(a.double(), (3, 2), (2, 1), (1, 1), count_include_pad=count)
        assert average_windows(a, window, gc).shape == expected.shape
        assert (average_windows(a, window, gc) - expected).abs().max() <= half


def test_requantize_rounds_ties_to_even_and_clamps() -> None:
    grid = Grid(scale=torch.tensor(1.0), zero_point=torch.tensor(10), qmin=0, qmax=255)
    total = torch.tensor([1.0, 3.0, 5.0, -1.0, -30.0, 1000.0])
    assert requantize(total, torch.tensor(0.5), grid).tolist() == [0.0, 2.0, 2.0, 0.0, -10.0, 245.0]


def pictures(folder: Path, count: int) -> Tensor:
    files = [path for place in sorted(folder.iterdir()) for path in sorted(place.iterdir())[: count // 10]]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in files])
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(((pixels - mean) / deviation).transpose(0, 3, 1, 2).copy())


def test_resnet20_on_photographs_is_the_same_to_the_last_bit_but_one(cifar10: Path, zoo: Path, tmp_path: Path) -> None:
    model = resnet20()
    model.load_state_dict(load_file(zoo / "resnet20-cifar10.safetensors"))
    capture, x = quantized(model, pictures(cifar10 / "train", 60)), pictures(cifar10 / "test", 120)
    real, ours = in_runtime(capture, x, tmp_path), run(exact(capture), x)
    assert (real.argmax(1) == ours.argmax(1)).all()
    noise = np.square(real - ours).sum()
    assert noise <= np.square(real).sum() * 1e-8  # 80 dB; the rounded floats reach 48
