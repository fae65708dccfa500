"""``kompakt compress``, and the run that it shares with other commands."""

from pathlib import Path
from typing import Annotated

import typer

from kompakt.artifact.targets import target
from kompakt.cli.options import DataOptions, ModelOptions, RunOptions
from kompakt.cli.voice import show, speaking
from kompakt.errors import InputError
from kompakt.files import writable_folder
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import BudgetSection, Recipe
from kompakt.report import build_report
from kompakt.search import compress

OVER_BUDGET = 3
Out = Annotated[Path, typer.Option(help="folder for the artifact, result.json and report.html")]


def compress_command(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
    target_name: Annotated[str, typer.Option("--target", help="runtime that the artifact is for")] = "onnxruntime",
    recipe: Annotated[Path | None, typer.Option(help="TOML file that says what to do")] = None,
) -> None:
    """Compress MODEL within an accuracy budget and measure the artifact in its runtime."""
    asked = Recipe.read(recipe) if recipe else Recipe()
    if max_drop is not None:
        asked = asked.model_copy(update={"budget": BudgetSection(max_drop=max_drop)})
    run_job("compress", asked, target_name, out, model, data, run)


def run_job(
    command: str,
    recipe: Recipe,
    target_name: str,
    out: Path,
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    plan: Plan | None = None,
) -> None:
    """Load everything, compress by the recipe or by a plan made before, write the report, show the figures."""
    runtime = target(target_name)
    if runtime.suffix != ".onnx":
        raise InputError(f"--target {target_name}: compress measures ONNX files alone; use kompakt export for this one")
    network = model.load(run.seed)
    metric = data.load_metric()
    folder = writable_folder(out)
    examples = data.open(model, run)
    with speaking(run) as say:
        job = Job(
            model=network,
            name=model.model,
            data=examples,
            source=data.data,
            target=runtime,
            out=folder,
            recipe=recipe,
            plan=plan,
            metric=metric,
            threads=run.threads,
            seed=run.seed,
            command=command,
            say=say,
            progress=not (run.quiet or run.json),
        )
        result = compress(job)
        build_report(result, folder)
    show(result, run, str(out))
    if not result.budget.met:
        typer.echo(
            f"kompakt: the budget of {result.budget.max_drop:g} points is not met; the best artifact is saved", err=True
        )
        raise typer.Exit(OVER_BUDGET)
