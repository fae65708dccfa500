"""``ship``: one model, the artifact of one target by that target's rules, proved in its runtime."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kompakt.artifact.lint import Finding
from kompakt.artifact.targets import MADE_BY, Target
from kompakt.build.equalize import evened, with_biases
from kompakt.build.integer import exact
from kompakt.build.refine import Refinement, refined
from kompakt.build.stream import fitting
from kompakt.data import Split
from kompakt.graph.fold import fold
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture, trace
from kompakt.measure.departure import Departure, departure
from kompakt.measure.parity import compare
from kompakt.measure.resources import Resources, resources
from kompakt.measure.result import Parity
from kompakt.measure.size import size_bytes
from kompakt.methods.uniform import Knobs, integers

BATCH = 32
PROOFS = 256
AS_ROUNDED = Refinement(rounding="nearest")
LOOK = 8
"""Examples on which the layers inside are compared."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """An artifact and what was seen of it.

    Args:
        path: the file or folder.
        size_bytes: of all of it.
        parity: simulated against real outputs; None where the runtime is not here.
        departure: where the two part, layer by layer.
        findings: what the target's checks say of it.
        left: layers that stay float, with the reason.
        snippet: how to run it.
        options: how the runtime opens it best, where that was measured.
        resources: what each layer asks of a chip.
    """

    path: Path
    size_bytes: int
    parity: Parity | None
    departure: Departure
    findings: tuple[Finding, ...]
    left: tuple[Left, ...]
    snippet: str
    options: dict[str, Any] = field(default_factory=dict)
    resources: tuple[Resources, ...] = ()


def quantized(
    model: nn.Module,
    example: Tensor,
    target: Target,
    calibration: Split,
    knobs: Knobs = Knobs(),
    how: Refinement = AS_ROUNDED,
) -> tuple[Capture, tuple[Left, ...]]:
    """Quantize a model by a target's rules, without training.

    Args:
        model: in float; it is left as it was.
        example: two inputs.
        target: whose rules.
        calibration: examples for the ranges.
        knobs: of the method.
        how: weights are rounded and biases mended on the calibration examples.
    """
    capture = target.prepare(fold(trace(model, example)))
    capture = with_biases(capture) if how.bias_correction else capture
    capture = evened(capture, (inputs for inputs, _ in calibration.batches(BATCH)))
    made = integers(capture, target.rules, (inputs for inputs, _ in calibration.batches(BATCH)), knobs)
    if how == AS_ROUNDED:
        return made.capture, made.left
    part = calibration.subset(min(len(calibration), fitting(capture)))
    return refined(capture, made.capture, made.plan, [inputs for inputs, _ in part.batches(BATCH)], how), made.left


def ship(
    capture: Capture,
    target: Target,
    out: Path,
    *,
    left: tuple[Left, ...] = (),
    proof: Tensor | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Shipped:
    """Write the artifact of a capture, float or quantized, and prove it.

    Args:
        capture: what to write.
        target: for which runtime.
        out: the folder that gets ``model`` with the target's suffix.
        left: passed on.
        proof: inputs on which simulated and real outputs are compared; the capture's example by default.
        say: is told what is going on.

    Raises:
        ModelError: the target lacks an operator of the model.
    """
    say(f"exporting to {target.name}")
    path = target.export(capture, out / f"model{target.suffix}", metadata=MADE_BY)
    say("comparing with the simulated model")
    inputs = capture.example[0] if proof is None else proof
    parity = prove(capture, target, path, inputs)
    inside = departure(capture, target, path, inputs[:LOOK])
    shape = tuple(capture.example[0][:1].shape)
    snippet = target.snippet.format(file=path.name, shape=shape)
    return Shipped(
        path=path,
        size_bytes=size_bytes(path),
        parity=parity,
        departure=inside,
        findings=target.check(path),
        left=left,
        snippet=snippet,
        resources=resources(capture),
    )


def prove(capture: Capture, target: Target, path: Path, inputs: Tensor) -> Parity:
    """Compare the simulated model with the artifact in its runtime."""
    runtime, simulated = target.open(path, 1), exact(capture)
    ours, theirs = [], []
    with torch.inference_mode():
        for part in inputs.split(BATCH):
            ours.append(simulated.module(part).numpy())
            theirs.append(runtime(part.numpy()))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    return compare(a, b, step=float(a.max() - a.min()) / 255)
