"""Measure how much the model's output suffers from quantizing each layer alone."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import Stats
from kompakt.graph.trace import Capture, attribute
from kompakt.methods.uniform import Knobs, uniform, with_bits
from kompakt.numerics.grid import affine_params, fake_quantize
from kompakt.numerics.hessian import hessian_traces
from kompakt.numerics.ranges import weight_range
from kompakt.plan.plan import Plan, Quantize
from kompakt.plan.rules import Rules, range_owner

PROBES = 16


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


def bit_errors(
    capture: Capture, plan: Plan, stats: Stats, inputs: Tensor, widths: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, float]]:
    """Quantize each tensor alone at each width and measure the error of the model's output.

    Args:
        capture: a folded float capture.
        plan: uniform integers; an op that shares another's range goes with it.
        stats: ranges of the activations.
        inputs: a batch to measure on.
        widths: weight, or op that owns its range → the bits to try.

    Returns:
        Weight, or op → bits → error as of ``sensitivities``.
    """
    entries: tuple[Quantize, ...] = plan.of(Quantize)
    sites = {entry.tensor: entry.like for entry in entries if entry.role == "activation"}
    found: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        reference = capture.module(inputs)
        for name, tried in widths.items():
            own = [entry for entry in entries if range_owner(sites, entry.tensor) == name]
            found[name] = {}
            for bits in tried:
                changed = Plan(entries=tuple(replace(entry, spec=with_bits(entry.spec, bits)) for entry in own))
                found[name][bits] = output_error(reference, quantize(capture, changed, stats).module(inputs))
    return found


def trace_errors(
    capture: Capture, plan: Plan, batch: tuple[Tensor, Tensor], widths: Mapping[str, Sequence[int]], seed: int
) -> dict[str, dict[int, float]]:
    """Weigh the squared rounding error of each weight with the mean trace of the loss's Hessian.

    HAWQ-V2 (Dong et al. 2020), arXiv:1911.03852: ``trace / n · ‖Q(w) - w‖²``, the loss being the cross entropy.

    Args:
        capture: a folded float capture that returns logits.
        plan: its weights' integers.
        batch: inputs and labels.
        widths: weight → the bits to try.
        seed: of the probes.

    Returns:
        Weight → bits → error.
    """
    module = copy.deepcopy(capture.module)
    names = list(widths)
    weights = [attribute(module, name).requires_grad_(True) for name in names]
    loss = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
    traces = hessian_traces(loss, weights, PROBES, torch.Generator().manual_seed(seed))
    entries = {entry.tensor: entry for entry in plan.of(Quantize)}
    found: dict[str, dict[int, float]] = {}
    for name, weight, trace in zip(names, weights, traces, strict=True):
        found[name] = {}
        for bits in widths[name]:
            spec = with_bits(entries[name].spec, bits)
            params = affine_params(*weight_range(weight.detach(), spec, "mse"), spec)
            error = (fake_quantize(weight, *params, spec) - weight.detach()).square().sum()
            found[name][bits] = max(trace, 0.0) / weight.numel() * float(error)
    return found
