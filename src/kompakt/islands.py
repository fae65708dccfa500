"""Layers between which a float operator stands: integers there cost a conversion on both sides, and may not pay.

An activation that a runtime has no integer kernel for (SiLU, hard-swish, GELU) runs in float: the layer before it gives
integers that are made floats, and the layer behind it gets integers that are made from floats. Whether that is faster
than float layers is a matter of the machine; it is measured on the files.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from kompakt.artifact.targets import Target
from kompakt.data import Split
from kompakt.graph.fold import fold
from kompakt.graph.graph import Graph, Left
from kompakt.graph.trace import Capture, trace
from kompakt.measure.latency import Times, interleave
from kompakt.methods.uniform import Knobs
from kompakt.plan.rules import Rules, clamped, integer_layers, moves
from kompakt.ship import quantized

FLOAT, ALL, SOME = "float", "all layers in integers", "layers beside float operators in float"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen.

    Args:
        capture: quantized.
        left: layers that stay float, with the reason.
        why: what was compared, in a line.
    """

    capture: Capture
    left: tuple[Left, ...]
    why: str


def beside_islands(graph: Graph, rules: Rules) -> frozenset[str]:
    """Name the layers whose output, behind its clamps, is read by an operator that runs in float.

    Args:
        graph: of a folded capture.
        rules: the target's.
    """
    layers = {op.name for op in integer_layers(graph, rules, frozenset())}
    found = set()
    for op in graph.ops:
        if op.name in layers:
            last = clamped(graph, rules, op)
            if any(not _integer(graph, rules, user.name, layers) for user in graph.users[last.name]):
                found.add(op.name)
    return frozenset(found)


def _integer(graph: Graph, rules: Rules, name: str, layers: set[str]) -> bool:
    op = graph.by_name[name]
    return name in layers or op.kind in rules.joins | rules.pools | rules.clamps or moves(op)


def measured(
    model: nn.Module,
    example: Tensor,
    target: Target,
    calibration: Split,
    *,
    knobs: Knobs = Knobs(),
    seconds: float = 10.0,
    seed: int = 0,
) -> Chosen:
    """Quantize a model all through, or but for the layers beside float operators, whichever file is faster.

    Args:
        model: in float.
        example: two inputs.
        target: the runtime.
        calibration: examples for the ranges.
        knobs: of the method.
        seconds: to spend on timing.
        seed: of the order of timing.
    """
    whole, left = quantized(model, example, target, calibration, knobs)
    keep = beside_islands(whole.graph, target.rules)
    if not keep:
        return Chosen(capture=whole, left=left, why="no layer stands beside a float operator")
    some, more = quantized(model, example, target, calibration, replace(knobs, keep=knobs.keep | keep))
    captures = {FLOAT: fold(trace(model, example)), ALL: whole, SOME: some}
    times = _times(captures, target, example[:1].numpy(), seconds, seed)
    figures = ", ".join(f"{name} {times[name].ratio:.3f}" for name in (ALL, SOME))
    why = f"{len(keep)} layers stand beside float operators; time over float: {figures}"
    if times[SOME].ratio < times[ALL].ratio:
        return Chosen(capture=some, left=more, why=why)
    return Chosen(capture=whole, left=left, why=why)


def _times(
    captures: dict[str, Capture], target: Target, example: np.ndarray, seconds: float, seed: int
) -> dict[str, Times]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: target.export(capture, Path(folder) / f"{number}{target.suffix}", metadata={})
            for number, (name, capture) in enumerate(captures.items())
        }
        runs = {name: partial(target.open(path, 1), example) for name, path in paths.items()}
        return interleave(runs, seconds=seconds, seed=seed)
