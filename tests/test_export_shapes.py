"""Export of layers that once went wrong: linear maps on tokens, chunks that are joined again, computed biases."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.moves import move_integers
from kompakt.artifact.onnx import export_onnx, open_onnx, runtime_ops
from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.methods.uniform import integers, uniform
from kompakt.plan.rules import ONNXRUNTIME, placed
from kompakt.zoo import resnet20
from tests.nets import images, tokens


class Shuffled(nn.Module):
    """Two halves of the channels, one of them convolved, joined and shuffled, as in ShuffleNet v2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.branch(right))], dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class ComputedBias(nn.Module):
    """A linear layer whose bias is computed from a parameter, as in Swin v2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(12, 16, bias=False), nn.Linear(16, 4)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x.mean((2, 3)), self.fc.weight, torch.cat([self.bias[:8], -self.bias[8:]]))))


class Padded(nn.Module):
    """Zeros on two sides only before a strided convolution, as in networks that came from TensorFlow."""

    def __init__(self, mode: str = "constant") -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.fc, self.mode = nn.Linear(8, 4), mode

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu6(self.stem(x)), (0, 1, 0, 1), mode=self.mode)
        return self.fc(F.relu6(self.depthwise(x)).mean((2, 3)))


CASES = {
    "padded": (Padded, images(32)),
    "reflected": (lambda: Padded("reflect"), images(32)),
    "tokens": (tokens, images(32, size=4, channels=12)),
    "shuffled": (Shuffled, images(32)),
    "computed bias": (ComputedBias, images(32, channels=12)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_computes_what_was_simulated(name: str, tmp_path: Path) -> None:
    make, x = CASES[name]
    torch.manual_seed(0)
    capture = fold(trace(make().eval(), x[:2]))
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    made = quantize(capture, plan, calibrate(capture, [x], placed(capture.graph, ONNXRUNTIME)))
    path = export_onnx(made, tmp_path / "model.onnx")
    with torch.no_grad():
        simulated = made.module(x).numpy()
    step = (simulated.max() - simulated.min()) / 255
    assert np.abs(open_onnx(path)(x.numpy()) - simulated).max() <= step
    assert "MatMul" not in runtime_ops(path), "every product runs in integers"


def test_integers_are_moved_as_integers(tmp_path: Path) -> None:
    x = images(16)
    capture = fold(trace(resnet20().eval(), x[:2]))
    made = integers(capture, ONNXRUNTIME, [x]).capture
    plain, moved = (export_onnx(made, tmp_path / f"{moves}.onnx", moves=moves) for moves in (False, True))
    assert np.array_equal(open_onnx(plain)(x.numpy()), open_onnx(moved)(x.numpy()))
    before, after = runtime_ops(plain), runtime_ops(moved)
    assert (before["QuantizeLinear"], after["QuantizeLinear"]) == (3, 1), "no shortcut is padded in float"
    assert (before["Slice"], after["Slice"]) == (4, 2), "one slice takes both axes"
    graph = onnx.load(moved).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}


def test_a_pad_that_is_not_of_zeros_stays_in_float(tmp_path: Path) -> None:
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
                helper.make_node("Pad", ["x", "pads", "one"], ["padded"]),
                helper.make_node("QuantizeLinear", ["padded", "s", "z"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, [1, 2])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1, 4])],
            [
                numpy_helper.from_array(np.float32(0.5), "s"),
                numpy_helper.from_array(np.uint8(3), "z"),
                numpy_helper.from_array(np.array([0, 1, 0, 1]), "pads"),
                numpy_helper.from_array(np.float32(1.0), "one"),
            ],
        )
    )
    move_integers(made)
    assert [node.op_type for node in made.graph.node] == ["DequantizeLinear", "Pad", "QuantizeLinear"]


def test_a_convolution_pads_for_itself(tmp_path: Path) -> None:
    x = images(16)
    capture = fold(trace(Padded().eval(), x[:2]))
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    made = quantize(capture, plan, calibrate(capture, [x], placed(capture.graph, ONNXRUNTIME)))
    ops = runtime_ops(export_onnx(made, tmp_path / "model.onnx"))
    assert "Pad" not in ops
    assert ops["QuantizeLinear"] == 1, "only the input is rounded by an op of its own"
