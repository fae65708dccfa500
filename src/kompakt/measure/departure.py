"""Where a simulated model and its artifact part: what each layer's integers stand for, in both, on the same inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from kompakt.artifact.targets import Target
from kompakt.build.integer import FOLDER, behind_clamps, exact
from kompakt.build.quantize import quantizer_of
from kompakt.graph.trace import Capture
from kompakt.measure.parity import first_departure, sqnr_db

TOLERANCE = 3 / 255
"""Of a layer's largest value: kernels may round to a neighbouring step, and steps add up over layers."""


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """One layer, simulated and real.

    Args:
        name: of the op, and of the user's module where it is known.
        sqnr_db: of its output.
        max_steps: largest difference, in steps of the output's grid.
    """

    name: str
    sqnr_db: float
    max_steps: float


@dataclass(frozen=True, kw_only=True)
class Departure:
    """What was seen of the layers.

    Args:
        layers: those that the runtime shows, in order; empty where it shows none.
        first: the first that departs, if any.
    """

    layers: tuple[LayerParity, ...] = ()
    first: str | None = None


def departure(capture: Capture, target: Target, path: Path, inputs: Tensor) -> Departure:
    """Compare layer by layer, where the target's runtime shows the values inside.

    Args:
        capture: quantized.
        target: whose artifact.
        path: the artifact.
        inputs: a few examples.
    """
    grids = _grids(capture)
    if target.inside is None or not grids:
        return Departure()
    wanted = _simulated(capture, inputs, grids)
    found = target.inside(path, inputs.numpy(), grids)
    common = {name: value for name, value in wanted.items() if name in found and found[name].shape == value.shape}
    if not common:
        return Departure()
    labels = {op.name: f"{op.name} ({op.module})" if op.module else op.name for op in capture.graph.ops}
    layers = tuple(
        LayerParity(
            name=labels.get(name, name),
            sqnr_db=sqnr_db(value, found[name]),
            max_steps=float(np.abs(value - found[name]).max() / grids[name][0]),
        )
        for name, value in common.items()
    )
    first = first_departure(common, found, TOLERANCE)
    return Departure(layers=layers, first=None if first is None else labels.get(first, first))


def _grids(capture: Capture) -> dict[str, tuple[float, int]]:
    """Scale and zero point of every op's rounded output, by the op behind the clamps."""
    found = {}
    for node in capture.module.graph.nodes:
        made = quantizer_of(capture.module, node)
        if made is not None and node.args[0].op != "get_attr" and not made.spec.dynamic:
            core = behind_clamps(node, made) if made.spec.bits == 8 else node.args[0]
            found[core.name] = (float(made.scale), int(made.zero_point))
    return found


def _simulated(capture: Capture, inputs: Tensor, grids: Mapping[str, tuple[float, int]]) -> dict[str, np.ndarray]:
    """Run the simulation and keep what lies on a grid, by the name of the op."""
    simulated = exact(capture).module
    found: dict[str, np.ndarray] = {}

    def name_of(node: fx.Node) -> str | None:
        folder, _, key = str(node.target).partition(".")
        if folder == FOLDER:
            return key
        made = quantizer_of(simulated, node)
        if made is None or node.args[0].op == "get_attr":  # type: ignore[union-attr]
            return None
        return behind_clamps(node, made).name

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            name = name_of(n) if n.op == "call_module" else None
            if name in grids and isinstance(value, Tensor):
                found[str(name)] = value.numpy()
            return value

    with torch.inference_mode():
        Keep(simulated).run(inputs)
    return found
