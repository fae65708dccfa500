"""Laws of powers of two, of QONNX and of HLS projects: what is simulated is what the fixed-point hardware computes."""

from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.artifact.targets import TARGETS, hls4ml, qonnx
from kompakt.build.averages import averages_as_convolutions
from kompakt.build.integer import exact
from kompakt.build.layers import Quantizer
from kompakt.build.quantize import quantize, quantizers
from kompakt.errors import FormatError, ModelError
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.measure.resources import estimate, resources, total
from kompakt.methods.uniform import Knobs, uniform
from kompakt.numerics.grid import affine_params, nearest_power, saturation_free, snapped
from kompakt.numerics.grid import quantize as to_integers
from kompakt.plan.rules import placed
from kompakt.spec import QuantSpec
from tests.integer_nets import Residual, inputs, quantized, seeded

POWER = QuantSpec(power_of_two=True)
NEEDED = {"qonnx": ("qonnx",), "hls4ml": ("qonnx", "hls4ml")}


class Small(nn.Module):
    """A convolution whose channels differ a hundredfold, a depthwise one, an image average, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.linear = nn.Linear(6, 5)
        self.conv.weight.data *= torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep(F.relu(self.conv(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def small(knobs: Knobs = Knobs()) -> Capture:
    torch.manual_seed(0)
    model, data = Small(), torch.randn(32, 3, 8, 8)
    capture = averages_as_convolutions(fold(trace(model, data[:2])))
    stats = calibrate(capture, [data], placed(capture.graph, qonnx.RULES))
    plan, _ = uniform(capture.graph, qonnx.RULES, knobs)
    return quantize(capture, plan, stats)


def test_a_scale_is_the_next_power_of_two() -> None:
    scale = torch.tensor([1.0, 1.0001, 0.75, 2.0**-60, 3e-20])
    found = snapped(scale, POWER)
    assert (torch.frexp(found).mantissa == 0.5).all()
    assert ((found >= scale) & (found < 2 * scale)).all()
    assert torch.equal(snapped(scale, QuantSpec()), scale)
    assert torch.equal(nearest_power(torch.tensor([1.0, 1.4, 1.5, 0.7]), POWER), torch.tensor([1.0, 1.0, 2.0, 0.5]))


def test_the_range_stays_inside_the_grid() -> None:
    low, high = -torch.rand(50), torch.rand(50) * 3
    for spec in (POWER, QuantSpec(signed=False, symmetric=False, power_of_two=True)):
        scale, zero = affine_params(low, high, spec)
        assert (scale * (spec.qmax - zero) >= high - scale / 2).all()
        assert (scale * (spec.qmin - zero) <= low + scale / 2).all()


def test_power_of_two_makes_every_scale_one_and_every_zero_point_zero_and_runs_as_simulated(tmp_path: Path) -> None:
    capture = seeded(Residual, Knobs(power_of_two=True))
    for made in quantizers(capture.module).values():
        assert (torch.frexp(made.scale).mantissa == 0.5).all()
        assert not made.zero_point.any()
        assert made.spec.signed
    for name, made in quantizers(capture.module).items():
        if name in capture.graph.tensor:
            weight = capture.module.get_parameter(name)
            assert saturation_free(to_integers(weight, made.scale, made.zero_point, made.spec)).all()
    x = inputs(64, seed=1)
    runtime = open_onnx(export_onnx(capture, tmp_path / "model.onnx"))
    with torch.no_grad():
        assert np.array_equal(runtime(x.numpy()), exact(capture).module(x).numpy())


def test_learned_steps_settle_on_powers_of_two() -> None:
    made = Quantizer(POWER, torch.tensor(0.3), torch.tensor(0, dtype=torch.int32))
    made.learn(16)
    made.train()
    x = torch.linspace(-2, 2, 33, requires_grad=True)
    made(x).square().sum().backward()
    assert made.scale.grad is not None
    assert bool(made.scale.grad.abs() > 0)
    assert float(made.settled()[0]) == 0.25
    with torch.no_grad():
        assert torch.equal(made(x) / 0.25, (made(x) / 0.25).round())


@pytest.mark.parametrize("pool", ["image", "windows"])
def test_average_pools_are_convolutions_of_the_same_values(pool: str) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x.mean((2, 3)) if pool == "image" else F.avg_pool2d(x, (2, 3), stride=2, padding=1)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    before = fold(trace(Pool(), x[:2]))
    after = averages_as_convolutions(before)
    kinds = [op.kind for op in after.graph.ops]
    assert kinds.count("conv2d") == 2
    assert not {"mean", "avg_pool2d"} & set(kinds)
    with torch.no_grad():
        assert torch.allclose(before.module(x), after.module(x), atol=1e-6)
    assert len(before.graph.layers) == 1, "what was given is left as it was"


def test_a_quant_node_says_the_bits_and_the_power_of_two() -> None:
    model = qonnx.quant_nodes(small(Knobs(weight_bits=3, activation_bits=5)))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Quant"]
    widths = {float(stored[node.input[3]]) for node in nodes}
    assert {3.0, 5.0} < widths
    assert all((np.frexp(stored[node.input[1]])[0] == 0.5).all() for node in nodes)
    assert all(node.domain == qonnx.DOMAIN for node in nodes)
    assert not [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "Gemm", "AveragePool")]


def test_one_grid_holds_the_same_values_with_more_bits() -> None:
    capture = small()
    several, one = (rounded_weights(qonnx.quant_nodes(capture, one_grid=way)) for way in (False, True))
    for name, (value, scales) in several.items():
        assert np.array_equal(value, one[name][0]), name
        assert one[name][1].size == 1
        assert one[name][1] == scales.min()


def rounded_weights(model: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Round the stored weights as their ``Quant`` nodes say: a reference of four lines."""
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Quant" and node.input[0] in stored and "kernel" in node.output[0]:
            value, scale, bits = (stored[node.input[place]] for place in (0, 1, 3))
            top = 2.0 ** (bits - 1) - 1
            found[node.output[0]] = (np.clip(np.round(value / scale), -top, top) * scale, scale)
    return found


def test_resources_add_up() -> None:
    need = estimate("fc", weights=8192, fan_in=64, multiplications=8192, weight_bits=4, activation_bits=8)
    assert (need.memory_bits, need.bram18, need.accumulator_bits) == (32768, 2, 4 + 8 + 6 + 1)
    assert estimate("x", weights=9, fan_in=1, multiplications=9, weight_bits=1, activation_bits=1).accumulator_bits == 3
    layers = resources(small(Knobs(weight_bits=4, activation_bits=6)))
    whole = total(layers)
    assert whole.multiplications == sum(item.multiplications for item in layers) == small().graph.macs
    assert whole.memory_bits == 4 * sum(item.multipliers for item in layers)
    assert {item.activation_bits for item in layers} == {6}
    assert resources(fold(trace(Small(), torch.randn(2, 3, 8, 8))))[0].weight_bits == 32


def test_the_accumulator_holds_the_largest_sum() -> None:
    for weight_bits, activation_bits, fan_in in [(8, 8, 576), (2, 3, 9), (4, 8, 1)]:
        need = estimate("x", weights=fan_in, fan_in=fan_in, multiplications=1, weight_bits=weight_bits,
                        activation_bits=activation_bits)  # fmt: skip
        largest = 2 ** (weight_bits - 1) * (2**activation_bits - 1) * fan_in
        assert 2 ** (need.accumulator_bits - 1) > largest


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no groups; quantize it statically"):
        qonnx.quant_nodes(quantized(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), inputs(8), Knobs(group_size=8)))

    class Soft(Small):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(super().forward(x))

    with pytest.raises(ModelError, match="softplus"):
        qonnx.quant_nodes(averages_as_convolutions(fold(trace(Soft(), torch.randn(2, 3, 8, 8)))))
    with pytest.raises(FormatError, match="not an HLS project"):
        hls4ml.open_hls4ml(tmp_path)
    with pytest.raises(FormatError, match="not a QONNX file"):
        qonnx.check(tmp_path / "none.onnx")
    with pytest.raises(FormatError, match="without qonnx"):
        qonnx.check(export_onnx(seeded(Residual), tmp_path / "plain.onnx"))


@pytest.mark.parametrize("name", NEEDED)
def test_the_target_computes_what_was_simulated_to_the_bit(name: str, tmp_path: Path) -> None:
    for module in NEEDED[name]:
        if find_spec(module) is None:
            pytest.skip(f'{module} is not installed; pip install "kompakt[fpga]"')
    if name == "hls4ml" and which("g++") is None:
        pytest.skip("no g++ to compile the C simulation")
    chosen, capture = TARGETS[name], small()
    path = chosen.export(capture, tmp_path / f"model{chosen.suffix}", metadata={})
    x = torch.randn(24, 3, 8, 8) * torch.tensor([1.0, 4.0]).repeat(12).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        assert np.array_equal(chosen.open(path, 1)(x.numpy()), capture.module(x).numpy())
    assert chosen.check(path) == ()
