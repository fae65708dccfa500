"""A small problem that trains in a fraction of a second, and a process that trains on it until it is killed."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.build.settings import Hooks, Loader, TrainSettings

SAMPLES, CLASSES = 96, 4


def toy_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, 6, 6, generator=generator)
    return images, (images.flatten(1) @ torch.randn(108, CLASSES, generator=generator)).argmax(dim=1)


def toy_loader(batch_size: int = 16) -> Loader:
    images, labels = toy_data()

    def batches(epoch: int):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch_size):
            yield images[index] + 0.01 * torch.randn(3, 6, 6), labels[index]

    return Loader(batches=batches, steps=-(-SAMPLES // batch_size))


def toy_net(seed: int = 0, width: int = 8, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(9 * width, CLASSES),
    )


def toy_settings(folder: Path | None = None, **changes) -> TrainSettings:
    given = {"epochs": 4, "learning_rate": 0.05, "ema": 0.9, "checkpoint": folder, "checkpoint_every": 1}
    return TrainSettings(**{**given, **changes})


def train_until_killed(folder: str) -> None:
    from kompakt.build.train import train

    torch.set_num_threads(1)
    hooks = Hooks(after_step=(lambda _model, step: print(step, flush=True),))
    train(toy_net(), toy_loader(), toy_settings(Path(folder)), hooks=hooks)


if __name__ == "__main__":
    train_until_killed(sys.argv[1])
