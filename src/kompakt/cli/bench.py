"""``kompakt bench``: artifacts side by side."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kompakt.artifact.onnx import open_onnx
from kompakt.artifact.targets import target
from kompakt.cli.options import ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.voice import speaking
from kompakt.data import Split
from kompakt.measure.judge import Judge
from kompakt.measure.latency import Times, interleave
from kompakt.measure.size import size_bytes
from kompakt.report.numbers import bytes_text, ms_text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact's figures."""

    file: str
    size_bytes: int
    latency_ms: dict[str, float]
    ratio: float
    accuracy: float | None = None
    accuracy_ci95: tuple[float, float] | None = None


def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the baseline")],
    data: OptionalDataOptions,
    run: RunOptions,
    input_size: Annotated[int, typer.Option(help="height and width of the input", min=1)] = 224,
    grey: Annotated[bool, typer.Option("--grey", help="one input channel instead of three")] = False,
    seconds: Annotated[float, typer.Option(help="to spend on timing", min=0.1)] = 20.0,
) -> None:
    """Compare artifacts: bytes, latency (interleaved), and accuracy where --data is given."""
    with speaking(run) as say:
        sessions = {str(path): open_onnx(path, run.threads) for path in artifacts}
        shape = next(iter(sessions.values())).session.get_inputs()[0].shape
        example = np.zeros([size if isinstance(size, int) else 1 for size in shape], dtype=np.float32)
        say("timing, interleaved")
        timed = interleave({k: partial(s, example) for k, s in sessions.items()}, seconds=seconds, seed=run.seed)
        shape_of = ModelOptions(model="", input_size=input_size, grey=grey)
        split = data.open(shape_of, run).test if data.data is not None else None
        judge = Judge(target=target("onnxruntime"), metric=data.load_metric(), threads=run.threads, seed=run.seed)
        rows = [_row(path, timed[str(path)], split, judge) for path in artifacts]
    if run.json:
        print(json.dumps([row.__dict__ for row in rows], indent=1))
    elif not run.quiet:
        Console().print(_table(rows, run.threads))


def _row(path: Path, times: Times, split: Split | None, judge: Judge) -> Row:
    score = judge.score(path, split) if split is not None else None
    return Row(
        file=str(path),
        size_bytes=size_bytes(path),
        latency_ms={"p50": times.p50_ms, "p90": times.p90_ms},
        ratio=times.ratio,
        accuracy=score.accuracy if score else None,
        accuracy_ci95=score.interval if score else None,
    )


def _table(rows: list[Row], threads: int) -> Table:
    table = Table(title=f"ONNX Runtime, {threads} thread{'s' if threads > 1 else ''}, batch 1")
    table.add_column("artifact", overflow="fold")
    for title in ("bytes", "p50", "p90", "time ÷ first", "accuracy"):
        table.add_column(title, justify="right")
    for row in rows:
        times = (ms_text(row.latency_ms["p50"]), ms_text(row.latency_ms["p90"]), f"{row.ratio:.3f}")
        accuracy = "–" if row.accuracy is None else f"{row.accuracy:.2%}"
        table.add_row(row.file, bytes_text(row.size_bytes), *times, accuracy)
    return table
