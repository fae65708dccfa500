"""Rounding that is learned: every weight goes up or down, whichever keeps the outputs of its layer or block.

References: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020 (AdaRound), arXiv 2004.10568; blocks of layers at
once: Li et al. 2021 (BRECQ), arXiv 2102.05426.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kompakt.numerics.grid import dequantize, quantize
from kompakt.numerics.rounding import Grid, facts
from kompakt.spec import QuantSpec

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
STEP_RATE = 1e-3
"""Learning rate of steps, as a share of the step."""


class Task(Protocol):
    """What one or several weights together should do."""

    @property
    def examples(self) -> int:
        """How many examples there are."""
        ...

    def loss(self, weights: Sequence[Tensor], picked: Tensor) -> Tensor:
        """Return the summed squared error of the outputs of some examples, with a gradient."""
        ...

    def error(self, weights: Sequence[Tensor]) -> float:
        """Return the mean over all examples of the summed squared error of the outputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a layer should do: ``layer(inputs, weight)`` should give ``targets``.

    Args:
        layer: pure function of inputs and weight, bias and what follows (a ReLU) included.
        inputs: ``(N, …)``, as the layer will see them in the quantized model.
        targets: ``(N, …)``, the outputs in the float model.
    """

    layer: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    def error(self, weight: Tensor, batch: int = 64) -> float:
        """Mean over the examples of the summed squared error of the outputs."""
        with torch.no_grad():
            parts = zip(self.inputs.split(batch), self.targets.split(batch), strict=True)
            total = sum(float((self.layer(x, weight) - y).double().square().sum()) for x, y in parts)
        return total / max(len(self.inputs), 1)


@dataclass(frozen=True)
class _Alone:
    """The task of one layer's weight."""

    problem: Reconstruction

    @property
    def examples(self) -> int:
        return len(self.problem.inputs)

    def loss(self, weights: Sequence[Tensor], picked: Tensor) -> Tensor:
        output = self.problem.layer(self.problem.inputs[picked], weights[0])
        return (output - self.problem.targets[picked]).square().sum()

    def error(self, weights: Sequence[Tensor]) -> float:
        return self.problem.error(weights[0])


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """How rounding is learned.

    Args:
        iterations: steps of Adam.
        batch: examples in a step, drawn with the generator.
        learning_rate: of Adam.
        weight: λ, of the mean over the weights of the term that pushes each up or down, beside an output
            error whose unit is that of the start.
        warm: share of the iterations without that term.
        beta: exponent of that term, from and to, along a cosine.
    """

    iterations: int = 1000
    batch: int = 32
    learning_rate: float = 0.03
    weight: float = 20.0
    warm: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def beta_at(self, step: int) -> float:
        """The exponent at a step after the warm start."""
        start = self.warm * self.iterations
        share = (step - start) / max(self.iterations - start, 1)
        return self.beta[1] + (self.beta[0] - self.beta[1]) * 0.5 * (
            1 + float(torch.cos(torch.tensor(share * torch.pi)))
        )


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight that gets integers.

    Args:
        weight: float.
        start: integers to beat, int32, of its shape; each will stay or go one towards ``weight``.
        scale: of the shape that the spec's granularity asks for.
        zero_point: same.
        spec: the integers.
        lean: how far learning begins from the weight towards ``start``, 0 to 1.
    """

    weight: Tensor
    start: Tensor
    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec
    lean: float = 0.0

    def on_grid(self, q: Tensor) -> Tensor:
        """Return what integers stand for."""
        return dequantize(q, self.scale, self.zero_point, self.spec)


def adaround(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    problem: Reconstruction,
    annealing: Annealing,
    generator: torch.Generator,
) -> Tensor:
    """Learn, for every weight of a layer, whether to round down or up: ``learn_rounding`` of one weight.

    Rounding to nearest is returned where it is better on ``problem``.

    Args:
        w: weight.
        scale: of the shape that the spec's granularity asks for.
        zero_point: same.
        spec: the integers.
        problem: the layer, its inputs and targets.
        annealing: iterations, batch, rates.
        generator: draws the batches.

    Returns:
        Integers, int32, of the shape of ``w``.
    """
    nearest = quantize(w, scale, zero_point, spec)
    alone = Rounded(weight=w, start=nearest, scale=scale, zero_point=zero_point, spec=spec)
    found = learn_rounding((alone,), _Alone(problem), annealing, generator)
    return nearest if found is None else found[0]


def learn_rounding(
    weights: Sequence[Rounded],
    task: Task,
    annealing: Annealing,
    generator: torch.Generator,
    steps: Sequence[Tensor] = (),
) -> tuple[Tensor, ...] | None:
    """Learn, for all weights of a task together, whether each number goes down or up.

    Minimizes ``loss(ŵ) / E + λ · mean(1 - |2h - 1|^β)`` over ``v``, where
    ``ŵ = s · (clamp(floor + h + z) - z)``, ``h = clamp(1.2 · sigmoid(v) - 0.1, 0, 1)`` and ``E`` is the error of the
    start, which makes λ free of units. ``floor`` is that of ``w / s``, or next to the start where that lies further
    away. At first ``ŵ = w``, or nearer to the start; at the end ``h ≥ 1/2`` rounds up.

    Args:
        weights: what is rounded.
        task: what they should do.
        annealing: iterations, batch, rates.
        generator: draws the batches.
        steps: positive parameters that ``task`` reads, such as the steps of activations (LSQ); trained along.

    Returns:
        Integers, int32, for each weight; None where the start is no worse, judged with ``steps`` as they then are.
    """
    start = task.error([each.on_grid(each.start) for each in weights])
    if start == 0:
        return None
    grids = [Grid(*facts(each.weight, each.scale, each.zero_point, each.spec)) for each in weights]
    floors = [_floor(each, grid) for each, grid in zip(weights, grids, strict=True)]
    found = [_begin(*parts) for parts in zip(weights, grids, floors, strict=True)]
    groups = [{"params": found, "lr": annealing.learning_rate}]
    groups += [{"params": [step], "lr": STEP_RATE * float(step.detach().abs().mean())} for step in steps]
    optimizer = torch.optim.Adam(groups)
    for step in range(annealing.iterations):
        picked = torch.randint(task.examples, (annealing.batch,), generator=generator)
        optimizer.zero_grad()
        ups = [_up(v) for v in found]
        soft = [_between(floor, h, grid) for floor, h, grid in zip(floors, ups, grids, strict=True)]
        loss = task.loss(soft, picked) / (annealing.batch * start)
        if step >= annealing.warm * annealing.iterations:
            loss = loss + annealing.weight * _undecided(ups, annealing.beta_at(step))
        loss.backward()
        optimizer.step()
    hard = [(_up(v.detach()) >= 0.5).float() for v in found]
    learned = tuple(
        (floor + up + grid.zero_point).clamp(grid.low, grid.high).to(torch.int32)
        for floor, up, grid in zip(floors, hard, grids, strict=True)
    )
    after = task.error([each.on_grid(q) for each, q in zip(weights, learned, strict=True)])
    return learned if after < start else None


def _floor(each: Rounded, grid: Grid) -> Tensor:
    """Return the lower of the two integers, less the zero point, between which each number chooses."""
    below = (each.weight.detach().float() / grid.scale).floor()
    start = each.start.float() - grid.zero_point
    return torch.where(start < below, start, torch.where(start > below + 1, start - 1, below))


def _begin(each: Rounded, grid: Grid, floor: Tensor) -> Tensor:
    """Return the v at which the soft weight is the float one, or leans from it towards the start."""
    share = each.weight.detach().float() / grid.scale - floor
    share = torch.lerp(share, each.start.float() - grid.zero_point - floor, each.lean).clamp(1e-4, 1 - 1e-4)
    return torch.logit((share - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).requires_grad_()


def _undecided(ups: Sequence[Tensor], beta: float) -> Tensor:
    """Return how far all numbers together are from up or down: the mean of ``1 - |2h - 1|^β``."""
    total = torch.stack([(1 - (2 * h - 1).abs().pow(beta)).sum() for h in ups]).sum()
    return total / max(sum(h.numel() for h in ups), 1)


def _up(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def _between(floor: Tensor, h: Tensor, grid: Grid) -> Tensor:
    return grid.scale * ((floor + h + grid.zero_point).clamp(grid.low, grid.high) - grid.zero_point)
