"""The task: a small network with batch norms, and each client's part of the data."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 32


def network() -> nn.Module:
    """Two convolutions with batch norms and one linear layer, for 8×8 images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def examples(part: int, parts: int) -> tuple[Tensor, Tensor]:
    """One client's images and labels; the last fifth of all is nobody's, for ``held_out``."""
    images, labels = _all()
    return images[: _split(labels)][part::parts], labels[: _split(labels)][part::parts]


def held_out() -> tuple[Tensor, Tensor]:
    """Images and labels that no client trains on."""
    images, labels = _all()
    return images[_split(labels) :], labels[_split(labels) :]


def train(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> float:
    """One epoch of SGD; returns the mean loss."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    losses = []
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0][batch]), data[1][batch])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of images that are classified rightly."""
    model.eval()
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def _all() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def _split(labels: Tensor) -> int:
    return len(labels) * 4 // 5
