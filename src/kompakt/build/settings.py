"""What a training run is given and gives back, as data: settings, data, hooks and the report."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kompakt.data import Split
from kompakt.errors import InputError

Batch = tuple[Tensor, Tensor]
Regularizer = Callable[[nn.Module], Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how fast and how exactly to train.

    Args:
        epochs: passes over the data.
        learning_rate: the highest rate of the schedule.
        optimizer: ``sgd`` (momentum, Nesterov) or ``adamw``.
        momentum: of ``sgd``.
        weight_decay: on matrices and kernels; norms and biases (parameters of one dimension) get
            none unless ``decay_all``.
        schedule: ``cosine`` and ``onecycle`` fall to 0 at the last step; ``constant`` does not fall.
        cycles: how many times the cosine begins anew, in equal parts of the steps (``cosine`` only).
        warmup_epochs: linear rise at the start of each cycle (``onecycle`` has its own: the first 30 %).
        label_smoothing: ε of the task's cross entropy.
        clip_norm: the gradient's largest norm; None does not clip.
        precision: ``bf16`` runs forward and backward under autocast; weights stay float32.
        channels_last: lay images and kernels out as NHWC during the run.
        compile: compile the training step with ``torch.compile`` (TorchInductor; on a CPU it needs a C++ compiler).
            Pays from a few hundred steps on. Batches of another shape than the first, such as an epoch's last,
            and validation run uncompiled.
        freeze_bn: leave batch norms in inference mode (their statistics do not move).
        shard: split parameters and optimizer states between the processes (FSDP) instead of keeping them
            whole on each (DDP): for a model larger than one device. Regularizers and ``after_step`` see
            the sharded parameters; every process keeps batch-norm statistics of its own.
        ema: decay of an exponential moving average of the weights, which the model gets at the end.
        seed: of everything that is drawn during the run.
        checkpoint: folder of the checkpoint. Where it holds one of the same run, the run goes on from
            it, to the same final weights as if it had never stopped.
        checkpoint_every: steps between checkpoints; 0 writes one at the end of each epoch.
    """

    epochs: int = 1
    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_all: bool = False
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    cycles: int = 1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: Literal["no", "bf16"] = "no"
    channels_last: bool = False
    compile: bool = False
    freeze_bn: bool = False
    shard: bool = False
    ema: float | None = None
    seed: int = 0
    checkpoint: Path | None = None
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        _need(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _need(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a positive number")
        _need(self.optimizer in ("sgd", "adamw"), "optimizer", self.optimizer, "sgd or adamw")
        _need(0 <= self.momentum < 1, "momentum", self.momentum, "0 or more, below 1")
        _need(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _need(
            self.schedule in ("cosine", "onecycle", "constant"),
            "schedule",
            self.schedule,
            "cosine, onecycle or constant",
        )
        most = self.epochs if self.schedule == "cosine" else 1
        _need(1 <= self.cycles <= most, "cycles", self.cycles, f"1 to {most}, the epochs (1 without a cosine)")
        whole = self.epochs / self.cycles
        _need(0 <= self.warmup_epochs < whole, "warmup_epochs", self.warmup_epochs, "0 or more, below a cycle")
        _need(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "0 or more, below 1")
        _need(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive number or none")
        _need(self.precision in ("no", "bf16"), "precision", self.precision, "no or bf16")
        _need(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1, such as 0.999, or none")
        _need(not (self.shard and self.ema), "ema", self.ema, "none where parameters are sharded")
        _need(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more steps")

    def identity(self) -> dict[str, object]:
        """The fields that decide the final weights: all but where and how often to checkpoint."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if not name.startswith("checkpoint")}


def _need(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} {found}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The data of a run.

    Args:
        batches: epoch → the batches (inputs, labels) of that epoch. The same epoch must give the same
            batches again: a resumed run asks for them a second time.
        steps: how many batches an epoch has.
    """

    batches: Callable[[int], Iterable[Batch]]
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError("the data give no batch: nothing to train on")


def data_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's data in a run of a given seed."""
    return seed * 1_000_003 + epoch


def shuffled(split: Split, batch_size: int, *, seed: int = 0, augment: Any = None) -> Loader:
    """Return the loader that visits ``split`` in a new order every epoch, the same for the same seed."""

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(data_seed(seed, epoch))
        return split.batches(batch_size, shuffle=True, generator=generator, augment=augment)

    return Loader(batches=batches, steps=math.ceil(len(split) / batch_size))


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: its mean losses, its share of right answers, its last learning rate, its seconds."""

    epoch: int
    loss: float
    losses: dict[str, float]
    accuracy: float | None
    validation: float | None
    learning_rate: float
    seconds: float

    def scalars(self) -> dict[str, float]:
        """Return what a tracker plots."""
        found = {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            **{f"loss/{k}": v for k, v in self.losses.items()},
        }
        scores = {"accuracy": self.accuracy, "validation": self.validation}
        return found | {name: score for name, score in scores.items() if score is not None}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did: every epoch, all steps, and the step at which this process took it up."""

    history: tuple[EpochRecord, ...]
    steps: int
    resumed_at: int = 0

    @property
    def seconds(self) -> float:
        """The time of all epochs together."""
        return sum(record.seconds for record in self.history)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What else happens during a run.

    Args:
        after_step: called with (model, steps done) after every step, and once before the first, or
            before going on from a checkpoint: masks, schedules. It must depend on its arguments alone.
        validate: called with the model in inference mode after every epoch, with its current
            weights (not the average); its score is recorded.
        log: called with every epoch's record.
        task_loss: (outputs, labels) → scalar; None is cross entropy with label smoothing.
        progress: show a bar, once a run takes more than 2 seconds and where stderr is a terminal.
        tensorboard: folder for TensorBoard's event files, or None.
    """

    after_step: tuple[Callable[[nn.Module, int], None], ...] = ()
    validate: Callable[[nn.Module], float] | None = None
    log: Callable[[EpochRecord], None] | None = None
    task_loss: Callable[[Any, Tensor], Tensor] | None = None
    progress: bool = True
    tensorboard: Path | None = None
