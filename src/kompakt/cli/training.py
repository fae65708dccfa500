"""The options of every command that trains."""

from dataclasses import dataclass
from typing import Annotated

import typer

from kompakt.errors import InputError
from kompakt.plan.recipe import Augment, FinetuneSection, TermSection

SHORT = {"dkd": "decoupled", "kd": "soft_targets"}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train."""

    learning_rate: Annotated[float, typer.Option(help="highest rate of the cosine schedule", min=1e-8)] = 0.02
    cycles: Annotated[int, typer.Option(help="how many times the cosine begins anew", min=1)] = 1
    batch_size: Annotated[int, typer.Option(help="examples a step", min=1)] = 128
    augment: Annotated[Augment, typer.Option(help="of the training images")] = "none"
    teacher: Annotated[
        list[str] | None, typer.Option(help="who teaches beside the labels: original, none or an ONNX file")
    ] = None
    loss: Annotated[
        list[str] | None, typer.Option(help="how it teaches: soft_targets, hint, attention, dkd …, or LOSS=WEIGHT")
    ] = None
    temperature: Annotated[float, typer.Option(help="of the soft targets")] = 4.0
    compile: Annotated[bool, typer.Option("--compile", help="compile the step: for runs of many minutes")] = False
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="go on where a stopped run was")] = False
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write OUT/tensorboard")] = False

    def section(self, epochs: int) -> FinetuneSection:
        """Return the recipe's section.

        Raises:
            InputError: the temperature is not positive.
        """
        if not self.temperature > 0:
            raise InputError(f"--temperature {self.temperature:g}: expected a positive number; try 4")
        return FinetuneSection(
            epochs=epochs,
            learning_rate=self.learning_rate,
            cycles=self.cycles,
            batch_size=self.batch_size,
            augment=self.augment,
            teacher=tuple(self.teacher or ("original",)),
            temperature=self.temperature,
            compile=self.compile,
            checkpoint=self.checkpoint,
            tensorboard=self.tensorboard,
        )

    def terms(self, standardize: bool = False) -> tuple[TermSection, ...]:
        """Return what ``[distill]`` says of the losses.

        Raises:
            InputError: a weight is no number of 0 or more.
        """
        return tuple(_term(text, standardize) for text in self.loss or ["soft_targets"])


def _term(text: str, standardize: bool) -> TermSection:
    """Read ``attention=10``."""
    name, equals, weight = text.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise InputError(f"--loss {text}: expected LOSS or LOSS=WEIGHT, as in attention=10")
    return TermSection(loss=SHORT.get(name, name), weight=value, standardize=standardize)
