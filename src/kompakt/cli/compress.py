"""``kompakt compress``, and the run that it shares with other commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from kompakt.artifact.targets import target
from kompakt.cli.options import DataOptions, ModelOptions, RunOptions
from kompakt.cli.voice import show, speaking
from kompakt.engine import Asked, explore
from kompakt.errors import InputError
from kompakt.files import writable_folder
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import BudgetSection, Recipe
from kompakt.report import build_report
from kompakt.search import compress

OVER_BUDGET = 3


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How long to search, and for what."""

    effort: Annotated[
        float | None, typer.Option(help="minutes to search pruning, training and bits together", min=0.1)
    ] = None
    objective: Annotated[
        Literal["size", "latency", "both"], typer.Option(help="of the search: bytes as .kpk, time, or both")
    ] = "both"
    candidates: Annotated[int | None, typer.Option(help="search at most so many candidates", min=1)] = None
    confident: Annotated[bool, typer.Option("--confident", help="the drop's interval, too, must keep the budget")] = (
        False
    )
    max_size_bytes: Annotated[int | None, typer.Option(help="of the artifact; with a search", min=1)] = None
    max_latency_ms: Annotated[float | None, typer.Option(help="of one call; with a search", min=0.0)] = None
    study: Annotated[str | None, typer.Option(help="Optuna storage that several workers share")] = None

    def asked(self) -> Asked | None:
        """Return what is searched; None where no search was asked for.

        Raises:
            InputError: an option of the search without a search.
        """
        if self.effort is None and self.candidates is None:
            if self != SearchOptions():
                raise InputError(
                    "--objective, --confident, --max-size-bytes, --max-latency-ms and --study are of the "
                    "search: say how long with --effort MINUTES, or how much with --candidates"
                )
            return None
        return Asked(
            objective=self.objective,
            minutes=self.effort,
            candidates=self.candidates,
            confident=self.confident,
            max_bytes=self.max_size_bytes,
            max_latency_ms=self.max_latency_ms,
            study=self.study,
        )


Out = Annotated[Path, typer.Option(help="folder for the artifact, result.json and report.html")]


def compress_command(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    search: SearchOptions,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
    target_name: Annotated[str, typer.Option("--target", help="runtime that the artifact is for")] = "onnxruntime",
    recipe: Annotated[Path | None, typer.Option(help="TOML file that says what to do")] = None,
) -> None:
    """Compress MODEL within an accuracy budget and measure the artifact in its runtime.

    With --effort or --candidates, pruning, training and bits are searched together: see docs/compress.md.
    """
    asked = Recipe.read(recipe) if recipe else Recipe()
    if max_drop is not None:
        asked = asked.model_copy(update={"budget": BudgetSection(max_drop=max_drop)})
    run_job("compress", asked, target_name, out, model, data, run, search=search.asked())


def run_job(
    command: str,
    recipe: Recipe,
    target_name: str,
    out: Path,
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    plan: Plan | None = None,
    search: Asked | None = None,
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
        result = compress(job) if search is None else explore(job, search)
        build_report(result, folder)
    show(result, run, str(out))
    if not result.budget.met:
        limit = result.budget.max_drop
        what = "" if limit is None else f" of {limit:g} points"
        typer.echo(f"kompakt: the budget{what} is not met; the best artifact is saved", err=True)
        raise typer.Exit(OVER_BUDGET)
