"""A small problem that trains in a fraction of a second, and a process that trains on it until it is killed."""

import copy
import sys
from contextlib import suppress
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


def train_until_killed(folder: Path) -> None:
    """Print every step that is done."""
    from kompakt.build.train import train

    hooks = Hooks(after_step=(lambda _model, step: print(step, flush=True),))
    train(toy_net(), toy_loader(), toy_settings(folder), hooks=hooks)


def l2(model: nn.Module) -> Tensor:
    return 0.01 * model[3].weight.square().sum()


def train_distributed(folder: Path, shard: bool = False) -> nn.Module:
    """Train with a teacher, a projection, a penalty and odd batches; stop after 5 steps, go on from the checkpoint."""
    from kompakt.build.distill import Objective, Teacher, Term
    from kompakt.build.train import train

    def interrupt(_model: nn.Module, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    terms = (Term(loss="soft_targets", weight=0.5), Term(loss="hint", teacher="4", student="4"))
    settings = toy_settings(folder, epochs=2, freeze_bn=True, checkpoint_every=4, clip_norm=2.0, ema=None, shard=shard)
    given = {
        "regularizers": (l2,),
        "objective": Objective(terms=terms),
        "teachers": (Teacher(model=toy_net(1, width=12)),),
    }
    model = toy_net(dropout=0)
    model.register_parameter("spare", nn.Parameter(torch.ones(2, 2)))  # no loss uses it
    with suppress(KeyboardInterrupt):
        train(copy.deepcopy(model), toy_loader(19), settings, **given, hooks=Hooks(after_step=(interrupt,)))
    report = train(model, toy_loader(19), settings, **given)
    assert report.resumed_at == 4
    print(report.history[-1].loss, report.history[-1].accuracy)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        train_until_killed(Path(sys.argv[2]))
    else:
        for name in ("whole", "sharded"):
            folder = Path(sys.argv[2]) / name
            trained = train_distributed(folder, shard=name == "sharded").state_dict()
            torch.save(trained, folder / f"weights-{torch.distributed.get_rank()}.pt")
        torch.distributed.destroy_process_group()
