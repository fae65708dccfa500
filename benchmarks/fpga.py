"""C simulation against the simulated model, bit for bit: ``python -m benchmarks.fpga``.

Needs ``kompakt[fpga]`` and g++. Each network is quantized after training by the rules of ``hls4ml`` (integers of
``bits``, scales 2ⁿ by channel), written as QONNX and as an HLS project, executed by qonnx, compiled by g++ and run on
the same inputs. Writes ``docs/targets/fpga-table.md``.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.prune_subjects import ROOT
from kompakt.artifact.targets import target
from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.measure.resources import resources, total
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import placed

SIZE, INPUTS = 8, 200


class Plain(nn.Module):
    """Convolutions with batch norms, a stride, a max pool and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×8×8 to N×10."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        return self.linear(torch.flatten(F.relu(self.conv2(x)), 1))


class Residual(nn.Module):
    """Two residual sums, an image average and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×8×8 to N×10."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x) + x)
        x = F.relu(self.conv3(x) + x)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Depthwise(nn.Module):
    """Separable convolutions, an image average and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.linear = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×8×8 to N×10."""
        x = F.relu(self.point(F.relu(self.depthwise(F.relu(self.stem(x))))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Channels(Plain):
    """``Plain`` with channels whose weights differ a hundredfold, so that their scales differ."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.conv1, self.conv2, self.linear):
            spread = torch.logspace(-1, 1, len(layer.weight))[torch.randperm(len(layer.weight))]
            layer.weight.data *= spread.reshape(-1, *[1] * (layer.weight.ndim - 1))


NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "plain": (Plain, 8, 8),
    "residual": (Residual, 8, 8),
    "depthwise": (Depthwise, 8, 8),
    "per-channel": (Channels, 8, 8),
    "residual, W4A6": (Residual, 4, 6),
}
"""Network, bits of weights, bits of activations."""


def quantized(make: Callable[[], nn.Module], weight_bits: int, activation_bits: int) -> Capture:
    """Build a network of seeded random weights and quantize it by the rules of hls4ml."""
    torch.manual_seed(0)
    model, chosen = make().eval(), target("hls4ml")
    capture = chosen.prepare(fold(trace(model, drawn(2, 0))))
    stats = calibrate(capture, drawn(256, 0).split(32), placed(capture.graph, chosen.rules))
    plan, _ = uniform(capture.graph, chosen.rules, Knobs(weight_bits=weight_bits, activation_bits=activation_bits))
    return quantize(capture, plan, stats)


def drawn(count: int, seed: int) -> Tensor:
    """Draw inputs; one in ten is far outside of what was calibrated, so that grids saturate."""
    x = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    x[::10] *= 4
    return x


def row(name: str, folder: Path) -> str:
    """Export, compile, run and compare one network."""
    capture = quantized(*NETS[name])
    x = drawn(INPUTS, 1)
    with torch.inference_mode():
        simulated = capture.module(x).numpy()
    equal = []
    for runtime in ("qonnx", "hls4ml"):
        chosen = target(runtime)
        path = folder / f"{name.replace(', ', '-')}-{runtime}{chosen.suffix}"
        shutil.rmtree(path, ignore_errors=True)
        found = chosen.open(chosen.export(capture, path, metadata={}), 1)(x.numpy())
        equal.append(f"{np.mean(found == simulated):.2%}")
    need = total(resources(capture))
    return (
        f"| {name} | {' | '.join(equal)} | {simulated.std():.3g} | {need.multiplications:,} | {need.multipliers:,} | "
        f"{need.memory_bits:,} | {need.bram18} | {need.accumulator_bits} |"
    )


COLUMNS = (
    "network", "qonnx = simulated", "C simulation = simulated", "deviation of the outputs", "multiplications",
    "weights", "bits of weights", "18 kbit blocks", "widest sum, bits",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
NOTE = f"""

Written by `python -m benchmarks.fpga`: share of the outputs, of {INPUTS} inputs, that are equal bit for bit;
seeded random weights; one input in ten is four times as large as those calibrated on.
g++ compiled the projects. No synthesis was run: that needs Vitis HLS.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fpga")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fpga")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [HEADER]
    for name in given.nets:
        lines.append(row(name, given.out))
        print(lines[-1], flush=True)
    if given.nets == list(NETS):
        (ROOT / "docs" / "targets" / "fpga-table.md").write_text("\n".join(lines) + NOTE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
