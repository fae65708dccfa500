"""``kompakt bench``: artifacts side by side, each in its runtime."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from kompakt.artifact.targets import Runtime
from kompakt.artifact.targets.onnxruntime import snippet
from kompakt.cli.contest import Entrant, entrants, interpreters
from kompakt.cli.options import ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.ranking import Row, layer_lines, plot, tables
from kompakt.cli.voice import speaking
from kompakt.data import Split
from kompakt.errors import InputError
from kompakt.files import atomic_write
from kompakt.measure.accuracy import Metric, Score, score
from kompakt.measure.judge import arrays
from kompakt.measure.latency import Times, interleave
from kompakt.measure.layers import RUNTIME_TIMES
from kompakt.measure.remote import Remote, Stopwatch
from kompakt.measure.size import size_bytes
from kompakt.measure.tune import tune


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How to measure."""

    threads: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float
    seed: int
    layers: bool
    tune: bool


def bench(
    artifacts: Annotated[list[str], typer.Argument(help="FILE, or RUNTIME:FILE as in openvino:model.onnx")],
    data: OptionalDataOptions,
    run: RunOptions,
    input_size: Annotated[int, typer.Option(help="height and width of the input", min=1)] = 224,
    grey: Annotated[bool, typer.Option("--grey", help="one input channel instead of three")] = False,
    seconds: Annotated[float, typer.Option(help="to spend on timing", min=0.1)] = 20.0,
    batch: Annotated[list[int] | None, typer.Option(help="examples a call; may be repeated", min=1)] = None,
    python: Annotated[list[str] | None, typer.Option(help="RUNTIME=INTERPRETER whose environment has it")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="time of each layer, where the runtime tells")] = False,
    tune_options: Annotated[bool, typer.Option("--tune", help="choose ONNX Runtime's options by measurement")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="SVG file to draw the latencies in")] = None,
) -> None:
    """Compare artifacts: bytes, memory, latency (interleaved), and accuracy where --data is given."""
    known = entrants(artifacts, interpreters(python or []))
    asked = Knobs(
        threads=tuple(dict.fromkeys((1, run.threads))),
        batches=tuple(dict.fromkeys(batch or [1])),
        seconds=seconds,
        seed=run.seed,
        layers=layers,
        tune=tune_options,
    )
    with speaking(run) as say:
        shape_of = ModelOptions(model="", input_size=input_size, grey=grey)
        split = data.open(shape_of, run).test if data.data is not None else None
        rows = measured(known, asked, split, data.load_metric(), say)
    if plot_file is not None:
        atomic_write(plot_file, plot(rows).encode())
    if run.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif not run.quiet:
        console = Console()
        for table in tables(rows):
            console.print(table)
        for line in layer_lines(rows):
            console.print(line, highlight=False, soft_wrap=True)


def measured(
    known: tuple[Entrant, ...], asked: Knobs, split: Split | None, metric: Metric | None, say: Callable[[str], None]
) -> list[Row]:
    """Open every artifact with every number of threads, score it once and time all of them interleaved."""
    rows: list[Row] = []
    scores: dict[str, Score] = {}
    for threads in asked.threads:
        say("measuring memory, each artifact in a process of its own")
        memory = {item.name: item.memory(threads) for item in known}
        with ExitStack() as stack:
            opened = {item.name: item.open(threads, stack) for item in known}
            shape = _common_shape(opened)
            if split is not None and not scores:
                say("scoring on the test split")
                scores = {name: score(runtime, arrays(split), metric) for name, runtime in opened.items()}
            for count in asked.batches:
                say(f"timing, interleaved: {threads} threads, batch {count}")
                share = asked.seconds / len(asked.threads) / len(asked.batches)
                timed = timed_together(opened, (count, *shape), share, asked.seed)
                for item in known:
                    row = _row(item, timed[item.name], memory[item.name], threads, count)
                    rows.append(_scored(row, scores.get(item.name)))
    return [_more(row, item, asked, say) for row, item in zip(rows, _cycle(known, len(rows)), strict=True)]


def timed_together(
    opened: dict[str, Runtime | Remote], shape: tuple[int, ...], seconds: float, seed: int
) -> dict[str, Times]:
    """Time open artifacts on a batch of ``shape``, interleaved; the first is the baseline."""
    watch, inputs = Stopwatch(), np.zeros(shape, dtype=np.float32)
    runs = {
        name: watch.there(runtime, inputs) if isinstance(runtime, Remote) else watch.here(runtime, inputs)
        for name, runtime in opened.items()
    }
    return interleave(runs, seconds=seconds, seed=seed, clock=watch)


def _common_shape(opened: dict[str, Runtime | Remote]) -> tuple[int, ...]:
    """Return the shape of one example, which all artifacts that tell theirs must share."""
    shapes = {name: tuple(runtime.shape[1:]) for name, runtime in opened.items() if runtime.shape}
    if not shapes:
        raise InputError(f"{', '.join(opened)}: tells no shape of its input; compare it with an artifact that does")
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other != shape:
            raise InputError(f"{name}: takes inputs of {other}, and {first} of {shape}; compare like with like")
    return shape


def _cycle(known: tuple[Entrant, ...], count: int) -> list[Entrant]:
    return [known[index % len(known)] for index in range(count)]


def _row(item: Entrant, times: Times, memory: int, threads: int, count: int) -> Row:
    return Row(
        file=str(item.path),
        runtime=item.runtime,
        name=item.name,
        threads=threads,
        batch=count,
        size_bytes=size_bytes(item.path),
        peak_memory_bytes=memory,
        latency_ms={"p50": times.p50_ms, "p90": times.p90_ms},
        ratio=times.ratio,
        ratio_ci95=times.ratio_ci95,
        throughput=1000 * count / times.p50_ms,
    )


def _scored(row: Row, found: Score | None) -> Row:
    return row if found is None else replace(row, accuracy=found.accuracy, accuracy_ci95=found.interval)


def _more(row: Row, item: Entrant, asked: Knobs, say: Callable[[str], None]) -> Row:
    """Add what is measured once an artifact: the times of its layers, the options that suit it."""
    if (row.threads, row.batch) != (asked.threads[0], asked.batches[0]):
        return row
    tell = RUNTIME_TIMES.get(item.runtime) if item.python is None else None
    if asked.layers and tell is not None:
        say(f"timing the layers of {item.name}")
        row = replace(row, layers_ms=tell(item.path, np.zeros(item.example_shape(row.batch), dtype=np.float32)))
    if asked.tune and item.runtime == "onnxruntime" and item.python is None:
        say(f"choosing options for {item.name}")
        example = np.zeros(item.example_shape(row.batch), dtype=np.float32)
        chosen = tune(item.path, example, threads=max(asked.threads), seconds=asked.seconds, seed=asked.seed)
        text = snippet(chosen.options).format(file=item.path.name, shape=tuple(example.shape))
        row = replace(row, options={**asdict(chosen.options), "why": chosen.why, "snippet": text})
    return row
