"""``kompakt inspect``: facts about a model before anything is done to it."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from kompakt.artifact.targets import target
from kompakt.cli.options import ModelOptions, RunOptions
from kompakt.graph.coupling import couple
from kompakt.graph.fold import fold
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture, trace
from kompakt.methods.uniform import uniform


def inspect(model: ModelOptions, run: RunOptions) -> None:
    """Show layers, parameters, MACs, and what cannot be compressed and why."""
    capture = trace(model.load(run.seed), model.example())
    folded = fold(capture)
    _, left = uniform(folded.graph, target("onnxruntime").rules)
    left += tuple(_unfolded(folded)) + couple(capture.graph).left
    if run.json:
        print(json.dumps(_facts(capture, left), indent=1))
    elif not run.quiet:
        console = Console()
        console.print(_layers(capture))
        console.print(
            f"{len(capture.graph.layers)} layers, {capture.graph.params:,} parameters, {capture.graph.macs:,} MACs"
        )
        for item in left:
            console.print(f"left alone: {item.name}: {item.reason}", highlight=False)


def _unfolded(capture: Capture) -> list:
    norms = [op for op in capture.graph.ops if op.kind == "batch_norm"]
    return [Left(name=op.module, reason="batch norm without a layer before it to fold into") for op in norms]


def _facts(capture: Capture, left: tuple) -> dict[str, object]:
    graph = capture.graph
    return {
        "params": graph.params,
        "macs": graph.macs,
        "layers": [
            {"name": op.module or op.name, "kind": op.kind, "weight": graph.tensor[str(op.ref("weight"))].shape}
            | {"output": op.shape[1:], "macs": op.macs}
            for op in graph.layers
        ],
        "left_alone": [asdict(item) for item in left],
    }


def _layers(capture: Capture) -> Table:
    table = Table("layer", "kind", "weight", "output")
    table.add_column("MACs", justify="right")
    for op in capture.graph.layers:
        weight = "×".join(map(str, capture.graph.tensor[str(op.ref("weight"))].shape))
        table.add_row(op.module or op.name, op.kind, weight, "×".join(map(str, op.shape[1:])), f"{op.macs:,}")
    return table
