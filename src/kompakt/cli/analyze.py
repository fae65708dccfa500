"""``kompakt analyze``: what each layer matters, to bits and to pruning, measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from kompakt.allotment import accuracy_on, classifies
from kompakt.artifact.targets import target
from kompakt.build.follow import follow
from kompakt.cli.options import DataOptions, ModelOptions, RunOptions
from kompakt.cli.voice import speaking
from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.calibrate import calibrate
from kompakt.graph.coupling import couple
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.sensitivity import sensitivities
from kompakt.methods.scores import unit_scores
from kompakt.methods.sensitivity import measured_drops
from kompakt.methods.uniform import Knobs
from kompakt.plan.rules import placed
from kompakt.report.layer_curves import layer_curves_svg

Say = Callable[[str], None]
Curves = dict[str, list[tuple[float, float]]]


def analyze(
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    only: Annotated[Literal["bits", "pruning"] | None, typer.Option(help="measure this alone")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for analysis.json and pruning.svg")] = None,
) -> None:
    """Measure what each layer matters: to quantizing it alone, and to removing its channels alone."""
    folder = None if out is None else writable_folder(out)
    examples, network = data.open(model, run), model.load(run.seed)
    bits: dict[str, float] = {}
    curves: Curves = {}
    with speaking(run) as say:
        if only != "pruning":
            bits = _to_bits(network, examples, run.seed, say)
        if only != "bits":
            curves = _to_pruning(network, examples, run.seed, say)
    found = {"divergence": bits, "pruning": curves}
    if folder is not None:
        atomic_write(folder / "analysis.json", json.dumps(found, indent=1).encode())
        if curves:
            whole = next(iter(curves.values()))[0][1]
            atomic_write(folder / "pruning.svg", layer_curves_svg(curves, whole).encode())
    if run.json:
        print(json.dumps(found, indent=1))
    elif not run.quiet:
        _show(bits, curves)


def _to_bits(network: nn.Module, data: Data, seed: int, say: Say) -> dict[str, float]:
    """Quantize each layer alone: layer → how far the output moves."""
    rules = target("onnxruntime").rules
    say("capturing the model")
    inputs = torch.cat([x for x, _ in data.train.subset(256, seed=seed).batches(64)])
    capture = fold(trace(network, inputs[:2]))
    say("calibrating")
    stats = calibrate(capture, inputs.split(64), placed(capture.graph, rules))
    found: dict[str, float] = {}
    layers = [op.name for op in capture.graph.layers if op.kind in rules.layers]
    for number, name in enumerate(layers, 1):
        say(f"layer {number} of {len(layers)}: quantized alone")
        found |= sensitivities(capture, rules, Knobs(), stats, inputs[:64], [name])
    return {capture.graph.by_name[name].module or name: value for name, value in found.items()}


def _to_pruning(network: nn.Module, data: Data, seed: int, say: Say) -> Curves:
    """Remove channels of each group alone: its layer → pairs (share that is gone, accuracy in %)."""
    if not classifies(network, data):
        raise InputError("curves of pruning are of accuracy: the model must give a score a class; use --only bits")
    example = next(iter(data.train.batches(2, limit=2)))[0]
    coupling = follow(network, couple(trace(network, example).graph), example)
    score = accuracy_on(data, seed)
    say(f"measuring {len(coupling.groups)} groups of channels, each made narrower alone")
    whole = score(network)
    drops = measured_drops(network, coupling, unit_scores(coupling, dict(network.state_dict())), score)
    sizes = {group.name: group.size for group in coupling.groups}
    return {
        name: sorted((1 - width / sizes[name], whole - drop) for width, drop in curve.items())
        for name, curve in drops.items()
    }


def _show(bits: dict[str, float], curves: Curves) -> None:
    console = Console()
    if bits:
        table = Table("layer", "divergence of the output")
        for name, value in sorted(bits.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{value:.3g}")
        console.print(table)
    if curves:
        table = Table("layer", "accuracy in % with this share of its channels gone")
        for name, curve in sorted(curves.items(), key=lambda item: item[1][-1][1]):
            table.add_row(name, ", ".join(f"{share:.0%}: {value:.1f}" for share, value in curve))
        console.print(table)
