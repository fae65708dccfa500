"""Measure how much the model's output suffers from quantizing each layer alone."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import Stats
from kompakt.graph.trace import Capture
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import Rules


def sensitivities(
    capture: Capture, rules: Rules, knobs: Knobs, stats: Stats, inputs: Tensor, names: Collection[str]
) -> dict[str, float]:
    """Quantize each layer alone, its weight, input and output, and measure the error of the model's output.

    The error is the Kullback–Leibler divergence of the softmax outputs where the model returns
    (N, classes), else the mean squared error relative to the output's variance.

    Args:
        capture: a folded float capture.
        rules: what the target quantizes.
        knobs: how.
        stats: ranges of the activations.
        inputs: a batch to measure on.
        names: layers (ops) to measure.

    Returns:
        Op → error, ≥ 0.
    """
    layers = {op.name for op in capture.graph.layers}
    found = {}
    with torch.inference_mode():
        reference = capture.module(inputs)
        for name in names:
            plan, _ = uniform(capture.graph, rules, replace(knobs, keep=frozenset(layers - {name})))
            found[name] = output_error(reference, quantize(capture, plan, stats).module(inputs))
    return found


def output_error(reference: Tensor, value: Tensor) -> float:
    """Measure how far ``value`` is from ``reference``; see ``sensitivities``."""
    if reference.ndim == 2 and reference.shape[1] > 1:
        target = torch.log_softmax(reference.double(), dim=1)
        given = torch.log_softmax(value.double(), dim=1)
        return float((target.exp() * (target - given)).sum(1).mean().clamp(min=0))
    return float((reference - value).double().square().mean() / reference.double().var().clamp(min=1e-30))
