"""What ``emit`` writes computes what torch's own exporter writes, and it gives up on what it does not know."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from kompakt.artifact.emit import emit
from kompakt.artifact.onnx import _onnx_program
from kompakt.artifact.qdq import to_integers
from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import ONNXRUNTIME, placed


class Everything(nn.Module):
    """One of each operator that is written node by node."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.clip = nn.ReLU6()
        self.act = nn.SiLU()
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.mean = nn.AvgPool2d(2, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(torch.cat([self.clip(x), self.act(self.wide(x))], dim=1))
        x = self.mean(self.pool(x)) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = nn.functional.pad(x[:, ::2].relu(), (0, 0, 0, 0, 1, 1))
        x = x.permute(0, 2, 3, 1).transpose(1, 3).contiguous()
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        x = torch.cat([x.flatten(1), x.reshape(x.shape[0], 10)], dim=1)
        return self.head(x)


def captured() -> Capture:
    torch.manual_seed(0)
    model = Everything().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return fold(trace(model, torch.randn(2, 3, 16, 16)))


def quantized(capture: Capture) -> Capture:
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs())
    batches = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
    return quantize(capture, plan, calibrate(capture, batches, placed(capture.graph, ONNXRUNTIME)))


def run(model: object, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("integers", [False, True])
def test_emitted_graph_computes_what_the_exporter_writes(integers: bool) -> None:
    capture = quantized(captured()) if integers else captured()
    module = to_integers(capture)
    ours = emit(module)
    assert ours is not None
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)
    theirs = run(_onnx_program(module, capture.example).model_proto, x)
    np.testing.assert_allclose(run(ours, x), theirs, atol=1e-5)


def test_the_batch_is_symbolic_and_called_batch() -> None:
    model = emit(to_integers(captured()))
    assert model is not None
    sizes = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert sizes == ["batch", "batch"]


def test_an_operator_that_is_not_known_is_left_to_the_exporter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LayerNorm(4 * 36)).eval()
    assert emit(to_integers(trace(model, torch.randn(2, 3, 8, 8)))) is None
