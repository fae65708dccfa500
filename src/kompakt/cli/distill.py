"""``kompakt distill``."""

from typing import Annotated, Literal

import typer

from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import DataOptions, ModelOptions, RunOptions
from kompakt.cli.training import TrainingOptions
from kompakt.errors import InputError
from kompakt.methods.students import FORMS
from kompakt.plan.recipe import BudgetSection, DistillSection, Recipe, TermSection

SHORT = {"dkd": "decoupled", "kd": "soft_targets"}


def distill(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    student: Annotated[str, typer.Option(help=FORMS)],
    epochs: Annotated[int, typer.Option(help="passes over the training split", min=1)],
    start: Annotated[Literal["teacher", "random"], typer.Option(help="the student's first weights")] = "teacher",
    loss: Annotated[list[str] | None, typer.Option(help="soft_targets, attention, dkd, dist …, or LOSS=WEIGHT")] = None,
    standardize: Annotated[bool, typer.Option("--standardize", help="logits to mean 0 and deviation 1 first")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="keep the teachers' outputs on disk")] = False,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
) -> None:
    """Train a smaller student that imitates MODEL, the teacher, and measure both."""
    section = DistillSection(
        student=student,
        start=start,
        terms=tuple(_term(text, standardize) for text in loss or ["soft_targets"]),
        cache=cache,
    )
    budget = BudgetSection(max_drop=max_drop)
    recipe = Recipe(distill=section, finetune=training.section(epochs), quantize=None, budget=budget)
    run_job("distill", recipe, "onnxruntime", out, model, data, run)


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
