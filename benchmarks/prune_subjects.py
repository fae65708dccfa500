"""The networks, data and counts of ``python -m benchmarks.prune``, shared with torch-pruning's process."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kompakt.zoo import resnet20

ROOT = Path(__file__).parent.parent
ZOO = ROOT.parent / "shared" / "zoo"
RATIOS = (0.3, 1.5, 2.0, 2.57, 4.0)
"""How many times fewer MACs; below 1 it is the share of the channels that goes, wherever they stand."""
GRADIENT_EXAMPLES = 512
BN_EXAMPLES = 1024


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One trained network.

    Args:
        size: of its input in pixels.
        stream: layers whose outputs are added up; left whole where only a block's inside is pruned.
        ends: the same as torch-pruning needs them: every layer that writes to the residual stream.
        channels_last: the layout that it trains faster in here.
        compile: whether the step of its training is compiled, which changes time alone.
    """

    size: int
    stream: tuple[str, ...]
    ends: tuple[str, ...]
    channels_last: bool = False
    compile: bool = False


SUBJECTS = {
    "resnet20": Subject(
        size=32,
        stream=("conv1", "layer2.0.conv2", "layer3.0.conv2"),
        ends=("conv1", *(f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(3))),
        compile=True,
    ),
    "resnet18": Subject(
        size=48,
        stream=("conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"),
        ends=(
            "conv1",
            *(f"layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in range(2)),
            *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)),
        ),
        channels_last=True,
    ),
}


def build(name: str) -> nn.Module:
    """Build a network with its trained weights."""
    model = resnet20() if name == "resnet20" else torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(load_file(ZOO / f"{name}-cifar10.safetensors"))
    return model.eval()


def example(name: str) -> Tensor:
    """Return an input of a batch of two."""
    size = SUBJECTS[name].size
    return torch.zeros(2, 3, size, size)


def macs(model: nn.Module, inputs: Tensor) -> int:
    """Count the multiply–accumulates of convolutions and linear layers for one example."""
    total = 0

    def hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return total


def fused(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution before it: the same outputs, sooner."""
    quick = copy.deepcopy(model).eval()
    for module in list(quick.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            before, after = getattr(module, conv, None), getattr(module, norm, None)
            if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(before, after))
                setattr(module, norm, nn.Identity())
    return quick
