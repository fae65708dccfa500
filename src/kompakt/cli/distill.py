"""``kompakt distill``."""

from typing import Annotated, Literal

import typer

from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import DataOptions, ModelOptions, RunOptions
from kompakt.cli.training import TrainingOptions
from kompakt.methods.students import FORMS
from kompakt.plan.recipe import BudgetSection, DistillSection, Recipe


def distill(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    student: Annotated[str, typer.Option(help=FORMS)],
    epochs: Annotated[int, typer.Option(help="passes over the training split", min=1)],
    start: Annotated[Literal["teacher", "random"], typer.Option(help="the student's first weights")] = "teacher",
    standardize: Annotated[bool, typer.Option("--standardize", help="logits to mean 0 and deviation 1 first")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="keep the teachers' outputs on disk")] = False,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
) -> None:
    """Train a smaller student that imitates MODEL, the teacher, and measure both."""
    section = DistillSection(
        student=student,
        start=start,
        terms=training.terms(standardize),
        cache=cache,
    )
    budget = BudgetSection(max_drop=max_drop)
    recipe = Recipe(distill=section, finetune=training.section(epochs), quantize=None, budget=budget)
    run_job("distill", recipe, "onnxruntime", out, model, data, run)
