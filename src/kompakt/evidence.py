"""What a criterion needs beside the weights, measured on training examples: gradients, curvature, activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_weight

from kompakt.build.taps import inference
from kompakt.data import Data, Split
from kompakt.errors import InputError
from kompakt.graph.graph import Graph, Op
from kompakt.graph.trace import Capture, trace
from kompakt.numerics.saliency import saliency

GRADIENT_EXAMPLES = 512
CURVATURE_EXAMPLES = 128
ACTIVE_EXAMPLES = 128
ACTIVE_VALUES = 1024
"""Values of a channel that are looked at in each batch."""
MEASURED = frozenset({"grad", "curvature", "input_norm", "activations"})
CLAMPS = frozenset({"relu", "relu6", "hardtanh"})
ON_THE_WAY = frozenset({"batch_norm", "add", "dropout", "alias"})

Evidence = dict[str, dict[str, Tensor]]


def evidence(criterion: str, model: nn.Module, data: Data | None, seed: int) -> Evidence:
    """Measure what a criterion needs: its name → parameter → tensor.

    Args:
        criterion: a key of ``kompakt.numerics.saliency.SALIENCIES``.
        model: in eval mode.
        data: measured on its training split.
        seed: of the examples that are drawn.

    Returns:
        Nothing where the criterion looks at weights alone.

    Raises:
        InputError: the criterion is unknown, needs data and there is none, or does not fit the model.
    """
    needs = [need for need in saliency(criterion).needs if need in MEASURED]
    if needs and data is None:
        raise InputError(f"criterion {criterion} is measured: it needs {needs[0]}; give --data")
    measures = {"grad": gradients, "curvature": curvature, "input_norm": input_norms, "activations": activations}
    return {need: measures[need](model, data, seed) for need in needs}


def gradients(model: nn.Module, data: Data | None, seed: int) -> dict[str, Tensor]:
    """Sum the gradients of the cross entropy over some training examples."""
    if data is None:
        raise InputError("this criterion needs gradients: give --data")
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for inputs, labels in _some(data, GRADIENT_EXAMPLES, seed).batches(64):
        for name, gradient in _gradient(model, inputs, labels).items():
            total[name] += gradient
    return total


def curvature(model: nn.Module, data: Data | None, seed: int) -> dict[str, Tensor]:
    """Average the squared gradients of single examples: the empirical Fisher diagonal, which stands for the Hessian's.

    LeCun et al. 1990 (OBD); Theis et al. 2018, arXiv:1801.05787.
    """
    assert data is not None
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    part = _some(data, CURVATURE_EXAMPLES, seed)
    for inputs, labels in part.batches(64):
        for one, label in zip(inputs.split(1), labels.split(1), strict=True):
            for name, gradient in _gradient(model, one, label).items():
                total[name] += gradient.square() / len(part)
    return total


def input_norms(model: nn.Module, data: Data | None, seed: int) -> dict[str, Tensor]:
    """Measure ‖x‖₂ of what each weight multiplies, over examples and places: the shape of the weight.

    Sun et al. 2024 (Wanda), arXiv:2306.11695; a convolution's places are counted by its own gradient.
    """
    assert data is not None
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = _squares(layer, inputs[0].detach().square(), output)
            squares[name] = squares[name] + seen if name in squares else seen

        return record

    layers = {name: layer for name, layer in model.named_modules() if _plain(layer)}
    handles = [layer.register_forward_hook(hook(f"{name}.weight")) for name, layer in layers.items()]
    try:
        with inference(model):
            for inputs, _ in _some(data, ACTIVE_EXAMPLES, seed).batches(32):
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.sqrt() for name, value in squares.items()}


def activations(model: nn.Module, data: Data | None, seed: int) -> dict[str, Tensor]:
    """Sample the values behind the ReLU that each layer feeds, batch norms and sums between: weight → (C, N).

    Raises:
        InputError: no layer feeds a ReLU.
    """
    assert data is not None
    part = _some(data, ACTIVE_EXAMPLES, seed)
    capture = trace(model, next(iter(part.batches(2, limit=2)))[0])
    behind = {str(op.ref("weight")): clamp for op in capture.graph.layers if (clamp := _clamp(capture.graph, op))}
    if not behind:
        raise InputError("criterion apoz counts zeros behind ReLUs, and no layer feeds one; use l2 or taylor")
    recorder = _Recorder(capture, frozenset(behind.values()))
    with torch.no_grad():
        for inputs, _ in part.batches(32):
            recorder.run(inputs.clone())
    seen = {name: torch.cat(values, dim=1) for name, values in recorder.values.items()}
    return {weight: seen[clamp] for weight, clamp in behind.items()}


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps some values of each channel of some ops."""

    def __init__(self, capture: Capture, names: frozenset[str]) -> None:
        super().__init__(capture.module)
        self.names = names
        self.values: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.name in self.names:
            rows = found.movedim(1 if found.ndim > 3 else -1, 0).flatten(1)
            self.values.setdefault(n.name, []).append(rows[:, :: max(1, rows.shape[1] // ACTIVE_VALUES)].clone())
        return found


def _clamp(graph: Graph, op: Op) -> str | None:
    """The first ReLU that reads a layer's output, directly or behind batch norms and sums."""
    for user in graph.users[op.name]:
        if user.kind in CLAMPS:
            return user.name
        found = _clamp(graph, user) if user.kind in ON_THE_WAY else None
        if found is not None:
            return found
    return None


def _plain(layer: nn.Module) -> bool:
    conv = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return conv or isinstance(layer, nn.Linear)


def _squares(layer: nn.Module, squares: Tensor, output: Tensor) -> Tensor:
    """Sum the squared inputs that each weight of a layer multiplies."""
    if not isinstance(layer, nn.Conv2d):
        return squares.flatten(0, -2).sum(0).expand_as(layer.get_parameter("weight"))
    shape = layer.weight.shape
    ones = torch.ones_like(output[:, : layer.groups])
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    each = conv2d_weight(squares, (layer.groups, *shape[1:]), ones, *settings)
    return each.repeat_interleave(shape[0] // layer.groups, dim=0)


def _gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the summed cross entropy, of the parameters that have one."""
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(model(inputs), labels, reduction="sum")
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}


def _some(data: Data, count: int, seed: int) -> Split:
    return data.train.subset(min(count, len(data.train)), seed=seed)
