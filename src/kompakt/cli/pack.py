"""``kompakt pack`` and ``kompakt unpack``: the smallest file, without loss or within a budget."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.kpk_safetensors import pack_safetensors
from kompakt.artifact.splice import unpack_file
from kompakt.artifact.targets import target
from kompakt.cli.options import ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.outcome import artifact_of
from kompakt.cli.voice import speaking
from kompakt.errors import InputError
from kompakt.files import writable_folder
from kompakt.finish import points_text
from kompakt.job import Job
from kompakt.plan.recipe import BudgetSection, FinetuneSection, Recipe
from kompakt.report.numbers import bytes_text
from kompakt.shrink import Shrunk, settled, shrink
from kompakt.slim import slim

PACKERS = {".onnx": pack_onnx, ".safetensors": pack_safetensors}
OVER_BUDGET = 3
DROP = 0.5


def pack(
    model: ModelOptions,
    data: OptionalDataOptions,
    run: RunOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="the .kpk file to write")],
    max_drop: Annotated[
        float | None, typer.Option(help="points that may be lost, with data (default 0.5)", min=0.0)
    ] = None,
    size_bytes: Annotated[int | None, typer.Option(help="bytes that the file may take, with data", min=1)] = None,
    epochs: Annotated[int, typer.Option(help="train for rate so long before, with data", min=0)] = 0,
    rate: Annotated[float | None, typer.Option(help="nats of the loss that a bit is worth in training")] = None,
) -> None:
    """Code a model's weights as small as they go: a file without loss, a MODEL with --data within a budget."""
    if (epochs > 0) != (rate is not None):
        raise InputError("--epochs and --rate go together: how long to train, and what a bit is worth, such as 1e-6")
    if data.data is not None:
        if size_bytes is not None and (max_drop is not None or rate is not None):
            raise InputError("--size-bytes goes with neither --max-drop nor --rate: give one of them")
        limit = DROP if max_drop is None and size_bytes is None else max_drop
        tune = FinetuneSection(epochs=epochs, rate=rate)
        _shrink(model, data, run, out, Recipe(budget=BudgetSection(max_drop=limit), finetune=tune), size_bytes)
        return
    if max_drop is not None or size_bytes is not None or rate is not None:
        raise InputError("--max-drop, --size-bytes and --rate need --data: without data packing is lossless")
    source = Path(model.model)
    file = artifact_of(source) if source.is_dir() else source
    if file.suffix not in PACKERS:
        raise InputError(f"{file}: expected a .onnx or .safetensors file, or a MODEL and --data")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    size = PACKERS[file.suffix](file, out)
    _tell(run, source=file, out=out, before=file.stat().st_size, after=size)


def _shrink(
    model: ModelOptions,
    data: OptionalDataOptions,
    run: RunOptions,
    out: Path,
    recipe: Recipe,
    size_bytes: int | None,
) -> None:
    """Make the file, by the search of λ or by training for rate, and say what it is worth."""
    network = model.load(run.seed)
    metric, folder = data.load_metric(), writable_folder(out.parent)
    examples = data.open(model, run)
    with speaking(run) as say:
        job = Job(
            model=network,
            name=model.model,
            data=examples,
            source=str(data.data),
            target=target("onnxruntime"),
            out=folder,
            recipe=recipe,
            metric=metric,
            threads=run.threads,
            seed=run.seed,
            command="pack",
            say=say,
        )
        rate = recipe.finetune.rate
        if rate is None:
            found = shrink(job, out, size_bytes=size_bytes)
        else:
            example = next(iter(examples.train.batches(2, limit=2)))[0]
            found = settled(job, slim(job, example).model, rate, out)
    size = out.stat().st_size
    met = size <= size_bytes if size_bytes is not None else found.drop.points <= (recipe.budget.max_drop or 0.0)
    _show(run, model.model, out, found, met)
    if not met:
        typer.echo("kompakt: the budget is not met; the best file is saved", err=True)
        raise typer.Exit(OVER_BUDGET)


def _show(run: RunOptions, name: str, out: Path, found: Shrunk, met: bool) -> None:
    size = out.stat().st_size
    if run.json:
        record = {
            "source": name,
            "out": str(out),
            "source_bytes": found.baseline_bytes,
            "out_bytes": size,
            "baseline_accuracy": found.baseline.accuracy,
            "accuracy": found.compressed.accuracy,
            "drop_points": found.drop.points,
            "drop_ci95": found.drop.ci95,
            "budget_met": met,
        }
        print(json.dumps(record))
    elif not run.quiet:
        typer.echo(
            f"wrote {out}: {bytes_text(found.baseline_bytes)} → {bytes_text(size)}, "
            f"{100 * found.baseline.accuracy:.2f} % → {100 * found.compressed.accuracy:.2f} %, "
            f"drop {points_text(found.drop)} on the test split"
        )


def unpack(
    source: Annotated[Path, typer.Argument(help=".kpk file")],
    run: RunOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write, as it was before packing")],
) -> None:
    """Restore the file that a .kpk was packed from, byte for byte."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    unpack_file(source, out)
    _tell(run, source=source, out=out, before=source.stat().st_size, after=out.stat().st_size)


def _tell(run: RunOptions, *, source: Path, out: Path, before: int, after: int) -> None:
    if run.json:
        print(json.dumps({"source": str(source), "out": str(out), "source_bytes": before, "out_bytes": after}))
    elif not run.quiet:
        typer.echo(f"wrote {out}: {bytes_text(before)} → {bytes_text(after)}")
