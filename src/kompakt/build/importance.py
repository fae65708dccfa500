"""How much values inside a model matter to its predictions: second moments of the loss's gradients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kompakt.errors import InputError
from kompakt.graph.trace import Capture


class _Recorder(fx.Interpreter):
    """Runs a graph and sums, for each op of interest, what is made of the gradient at its output."""

    def __init__(self, capture: Capture, reduced: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(capture.module)
        self.reduced = reduced
        self.sums: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.name in self.reduced and isinstance(found, Tensor) and found.requires_grad:
            # A hook, not ``retain_grad``: an in-place ReLU behind the layer must not count.
            found.register_hook(lambda gradient: self._add(n.name, gradient))
        return found

    def _add(self, name: str, gradient: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + self.reduced[name](gradient.detach())


def output_importance(capture: Capture, batches: Iterable[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Measure ``g_o = E Σ_positions (∂L/∂y_o)²`` of every layer, labels drawn from the model's own predictions.

    These are the diagonals of the second factors of K-FAC's Fisher matrix (Grosse, Martens 2016, arXiv
    1602.01407): with the mean ``H`` of ``x xᵀ`` over positions, ``½ Σ_o g_o e_o H e_oᵀ`` is about the KL
    divergence that a weight error ``e`` causes.

    Args:
        capture: a folded float capture; left as it is.
        batches: inputs, batch first.
        seed: of the drawn labels.

    Returns:
        float32 ``(channels,)`` by the name of the layer's op.

    Raises:
        InputError: there is no batch.
    """
    axes = {op.name: -1 if op.kind == "linear" else 1 for op in capture.graph.layers}

    def by_channel(axis: int) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.movedim(axis, 0).flatten(1).double().square().sum(1)

    return _measured(capture, {name: by_channel(axis) for name, axis in axes.items()}, batches, seed)


def value_importance(
    capture: Capture, names: Iterable[str], batches: Iterable[Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Measure ``E (∂L/∂z)²`` of every value that some ops make, labels drawn from the model's own predictions.

    The diagonal of the Fisher matrix of a block's output, which weighs its errors (BRECQ, Li et al. 2021, arXiv
    2102.05426, eq. 10, here averaged over the examples).

    Args:
        capture: a folded float capture; left as it is.
        names: ops whose outputs have the examples first.
        batches: inputs, batch first.
        seed: of the drawn labels.

    Returns:
        float32 of the shape of one example's output, by the name of the op.

    Raises:
        InputError: there is no batch.
    """
    return _measured(capture, dict.fromkeys(names, lambda gradient: gradient.square().sum(0)), batches, seed)


def _measured(
    capture: Capture, reduced: Mapping[str, Callable[[Tensor], Tensor]], batches: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the mean over the examples of what ``reduced`` makes of the gradients."""
    recorder, generator, count = _Recorder(capture, reduced), torch.Generator().manual_seed(seed), 0
    for inputs in batches:
        with torch.enable_grad():
            logits = recorder.run(inputs.clone().requires_grad_()).flatten(0, -2)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
        count += len(inputs)
    if not count:
        raise InputError("importance: the data gave no batch; expected at least one")
    return {name: (total / count).float() for name, total in recorder.sums.items()}
