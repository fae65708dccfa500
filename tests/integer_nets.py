"""Small networks, one for each pattern that has integer kernels, and how to quantize them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate, pool
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import ONNXRUNTIME, Rules, placed, pooled


class Residual(nn.Module):
    """Two residual sums, one with a ReLU behind it, an image average and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×5."""
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        x = self.conv3(x) + x
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Shapes(nn.Module):
    """Strides, dilation, groups, padding by name, no bias; the output is a convolution's, on its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, dilation=2, padding="same", groups=4, bias=False)
        self.conv3 = nn.Conv2d(12, 6, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×6×H/2×W/2."""
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Depthwise(nn.Module):
    """An inverted residual with ReLU6 and a depthwise convolution; the output is a sum, on its grid."""

    def __init__(self, top: float = 0.7) -> None:
        super().__init__()
        self.top = top
        self.stem, self.expand = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 1)
        self.depthwise, self.project = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        for layer in (self.stem, self.expand, self.depthwise):
            layer.weight.data *= 8  # so that the clamps clamp

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×4×H×W."""
        x = F.relu6(self.stem(x))
        inner = F.relu6(self.expand(x))
        inner = F.hardtanh(self.depthwise(inner), -self.top, self.top)
        return self.last(self.project(inner) + x)


class Concat(nn.Module):
    """Two branches of different ranges side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×4×(H-2)×(W-2)."""
        return self.last(torch.cat([F.relu(self.left(x)), self.right(x)], dim=1))


class Pools(nn.Module):
    """Max pool, average pools with and without counted padding, an average by ``mean``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×5."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)
        x = self.conv2(F.avg_pool2d(x, 3, stride=1, padding=1))
        x = self.conv3(F.avg_pool2d(x, (2, 3), stride=1, padding=1, count_include_pad=False))
        return self.linear(x.mean(dim=(2, 3)))


class Gate(nn.Module):
    """Products: of two images, and of an image and one value a channel; a sum of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.squeeze = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.shift, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×H×W to N×4×(H-2)×(W-2)."""
        x = self.conv1(x) * self.conv2(x)
        small = F.adaptive_avg_pool2d(x, 1)
        return self.last(self.shift(small) + x * self.squeeze(small))


class Flat(nn.Module):
    """Linear maps of images laid flat, with a ReLU, a hidden layer of many inputs and a wide bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(3 * 144, 16), nn.Linear(16, 5)
        nn.init.uniform_(self.linear1.bias, -60, 60)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×12×12 to N×5."""
        return self.linear2(F.relu(self.linear1(torch.flatten(x, 1))))


class Tokens(nn.Module):
    """Linear maps of sequences, whose kernels give floats and add the bias behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×12×12 to N×36×5."""
        return self.linear2(F.relu(self.linear1(torch.flatten(x, 1, 2))))


class Clamped(Depthwise):
    """A clamp whose ends lie inside the grid behind it, which the runtime runs in floats."""

    def __init__(self) -> None:
        super().__init__(top=2.0)


NETS = {net.__name__: net for net in (Residual, Shapes, Depthwise, Clamped, Concat, Pools, Gate, Flat, Tokens)}


class Together(nn.Module):
    """All of ``NETS`` on one input, their outputs laid flat side by side: one capture and one export for all."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(net() for net in NETS.values())

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×12×12 to N×(all outputs)."""
        return torch.cat([torch.flatten(net(x), 1) for net in self.nets], dim=1)


def split(outputs: np.ndarray) -> dict[str, np.ndarray]:
    """Cut an output of ``Together`` into those of the nets."""
    one = torch.zeros(1, 3, 12, 12)
    with torch.no_grad():
        sizes = [net()(one).numel() for net in NETS.values()]
    return dict(zip(NETS, np.split(outputs, np.cumsum(sizes)[:-1], axis=1), strict=True))


def inputs(count: int, seed: int = 0) -> Tensor:
    """Draw ``count`` images of 3×12×12."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def quantized(
    model: nn.Module,
    data: Tensor,
    knobs: Knobs = Knobs(),
    rules: Rules = ONNXRUNTIME,
    prepare: Callable[[Capture], Capture] = lambda capture: capture,
) -> Capture:
    """Fold, prepare, calibrate and quantize a model."""
    capture = prepare(fold(trace(model, data[:2])))
    sites = placed(capture.graph, rules, knobs.keep)
    stats = pool(calibrate(capture, data.split(32), sites), pooled(capture.graph, rules, sites))
    plan, _ = uniform(capture.graph, rules, knobs)
    return quantize(capture, plan, stats)


def seeded(
    make: Callable[[], nn.Module],
    knobs: Knobs = Knobs(),
    rules: Rules = ONNXRUNTIME,
    prepare: Callable[[Capture], Capture] = lambda capture: capture,
) -> Capture:
    """Build a model with fixed random weights and quantize it."""
    torch.manual_seed(0)
    return quantized(make(), inputs(64), knobs, rules, prepare)
