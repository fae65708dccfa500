"""Data, networks and partitions of ``benchmarks.federated``."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kompakt.data import Split, open_data
from kompakt.zoo import resnet20

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
CLASSES = 10
PERTURBATION = 0.5


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One network and its task.

    Args:
        network: its name.
        train, validation, test: inputs and labels.
    """

    network: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a federation trains.

    Args:
        rounds: how many.
        clients: how many, all in every round.
        examples: of each client on average.
        batch, rate, momentum: of local SGD, one epoch a round.
    """

    rounds: int
    clients: int = 10
    examples: int
    batch: int = 32
    rate: float = 0.05
    momentum: float = 0.9


SETTINGS = {
    "lenet5": Setting(rounds=12, examples=600),
    "bnnet": Setting(rounds=12, examples=400),
    "resnet20": Setting(rounds=10, examples=120, batch=16, rate=0.03),
}


def lenet5() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 61,706 weights."""
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    linears = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *linears)


def bnnet() -> nn.Module:
    """Three convolutions with batch norms and one linear layer: 24,954 weights."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def start_of(network: str, seed: int) -> nn.Module:
    """The first state of a federation: fresh weights, or for ResNet-20 a warm start.

    The warm start is the zoo's network with noise on every weight tensor, of half its root mean square: most of what
    it had learnt is gone, and a few rounds bring back a part of it.
    """
    torch.manual_seed(seed)
    if network != "resnet20":
        return {"lenet5": lenet5, "bnnet": bnnet}[network]()
    model = resnet20(num_classes=CLASSES)
    model.load_state_dict(load_file(ZOO / "resnet20-cifar10.safetensors"), strict=False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(PERTURBATION * weight.square().mean().sqrt() * torch.randn_like(weight))
    return model


def load_subject(network: str, folder: str) -> Subject:
    """Read what a network is trained on; 1,000 images of train (500 of CIFAR-10) are for validation."""
    if network == "resnet20":
        data = open_data(folder, input_size=32, progress=False, validation=500)
    else:
        grey = {"mean": (0.1307,), "std": (0.3081,), "channels": 1}
        data = open_data(folder, input_size=28, progress=False, validation=1000, **grey)
    parts = {name: _whole(getattr(data, name)) for name in ("train", "validation", "test")}
    return Subject(network=network, **parts)


def _whole(split: Split) -> tuple[Tensor, Tensor]:
    batches = list(split.batches(1000))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches])


def partition(labels: Tensor, setting: Setting, kind: str, seed: int) -> list[Tensor]:
    """Indices of each client's examples: drawn alike, or classes by Dirichlet's distribution with α = 0.3.

    Reference: Hsu, Qi, Brown 2019, arXiv 1909.06335.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: setting.clients * setting.examples]
    if kind == "iid":
        return [torch.from_numpy(part.copy()) for part in np.array_split(chosen, setting.clients)]
    parts: list[list[int]] = [[] for _ in range(setting.clients)]
    for label in range(CLASSES):
        mine = chosen[labels.numpy()[chosen] == label]
        ends = (np.cumsum(rng.dirichlet([0.3] * setting.clients)) * len(mine)).astype(int)[:-1]
        for part, indices in zip(parts, np.split(mine, ends), strict=True):
            part += indices.tolist()
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in parts]
