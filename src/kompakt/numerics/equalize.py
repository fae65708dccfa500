"""Cross-layer equalization: move scale between layers, the function unchanged, until channels are alike.

For ``f(s x) = s f(x)`` with ``s > 0`` (ReLU, leaky ReLU, PReLU, identity, pooling; not ReLU6, GELU or SiLU),
dividing output channel ``i`` of one layer by ``s_i`` and multiplying input channel ``i`` of the next by ``s_i``
changes nothing.
``s_i`` is chosen so that the weights of channel ``i`` reach equally far in all the layers that share it, which is
what a scale for the whole tensor wants.

Reference: Nagel, van Baalen, Blankevoort, Welling 2019 (DFQ), arXiv 1906.04721, section 4.1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kompakt.errors import InputError

MOST = 2.0**16
"""No channel is scaled by more than this or less than its inverse: dead channels stay representable."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution's or linear layer's tensors.

    Args:
        weight: ``(out, in / groups, *kernel)``.
        bias: ``(out,)`` or None.
        groups: groups of the convolution; its number of channels where it is depthwise.
    """

    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return self.weight.shape[1] * self.groups


def output_reach(weight: Tensor) -> Tensor:
    """Return the largest magnitude of every output channel, ``(out,)``."""
    return weight.abs().flatten(1).amax(1)


def input_reach(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the largest magnitude that every input channel meets, ``(in,)``."""
    return weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()


def scale_inputs(weight: Tensor, factor: Tensor, groups: int = 1) -> Tensor:
    """Multiply what meets input channel ``i`` by ``factor[i]``; shape of ``weight``."""
    by_group = factor.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (weight.unflatten(0, (groups, -1)) * by_group).reshape(weight.shape)


def scale_outputs(weight: Tensor, bias: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Multiply output channel ``i``, its bias too, by ``factor[i]``."""
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), None if bias is None else bias * factor


def equalize_pair(
    w1: Tensor, b1: Tensor | None, w2: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Equalize two layers with a positively homogeneous activation between them.

    ``s = r1 / sqrt(r1 · r2)`` with ``r1`` and ``r2`` the reach of the shared channels in both weights; then
    ``w1 / s``, ``b1 / s`` and ``w2 · s`` all reach ``sqrt(r1 · r2)``. A channel that is 0 in either stays.

    Args:
        w1: weight of the first layer, ``(channels, …)``.
        b1: its bias, ``(channels,)`` or None.
        w2: weight of the second, whose inputs are ``channels``.
        groups: groups of the second layer (``channels`` where it is depthwise).

    Returns:
        ``w1 / s``, ``b1 / s``, ``w2 · s`` and ``s``, ``(channels,)``.

    Raises:
        InputError: the second layer has not as many inputs as the first has outputs.
    """
    _check(w1, w2, groups)
    r1, r2 = output_reach(w1), input_reach(w2, groups)
    s = _bounded((r1 / r2).sqrt(), (r1 > 0) & (r2 > 0))
    return *scale_outputs(w1, b1, 1 / s), scale_inputs(w2, s, groups), s


def equalize_triple(first: Layer, depthwise: Layer, last: Layer) -> tuple[Layer, Layer, Layer]:
    """Equalize a layer, a depthwise convolution of its outputs and the layer after it, all at once.

    With ``r = (r1 r2 r3)^(1/3)``, the scale between the first two is ``r1 / r`` and between the last two
    ``r / r3``, so that the shared channels reach ``r`` in all three.

    Raises:
        InputError: the middle layer is not depthwise, or the channels do not match.
    """
    channels = depthwise.weight.shape[0]
    if depthwise.groups != channels or depthwise.weight.shape[1] != 1:
        raise InputError(f"layer between has {depthwise.groups} groups for {channels} channels: expected depthwise")
    _check(first.weight, depthwise.weight, channels)
    _check(depthwise.weight, last.weight, last.groups)
    r1, r2 = output_reach(first.weight), output_reach(depthwise.weight)
    r3 = input_reach(last.weight, last.groups)
    alive, mean = (r1 > 0) & (r2 > 0) & (r3 > 0), r1.pow(1 / 3) * r2.pow(1 / 3) * r3.pow(1 / 3)
    before, after = _bounded(r1 / mean, alive), _bounded(mean / r3, alive)
    w1, b1 = scale_outputs(first.weight, first.bias, 1 / before)
    w2, b2 = scale_outputs(scale_inputs(depthwise.weight, before, channels), depthwise.bias, 1 / after)
    w3 = scale_inputs(last.weight, after, last.groups)
    return replace(first, weight=w1, bias=b1), replace(depthwise, weight=w2, bias=b2), replace(last, weight=w3)


def lift(peaks: Tensor, ceiling: float, margin: float = 0.9, most: float = 16.0) -> Tensor:
    """Return what every channel may be multiplied by so that all reach equally high under a clamp that cuts none anew.

    ``s = t / peak`` with ``t = margin · ceiling``, or the highest peak where nothing is clamped, and ``1 ≤ s ≤ most``;
    1 for a channel that is dead or reaches ``t`` already. Before a depthwise convolution, whose kernels have a scale
    each, that costs nothing and gives every channel the whole grid that they share.

    Args:
        peaks: the largest value of every channel before the clamp, on calibration examples, (channels,).
        ceiling: the clamp's upper end; infinite for a ReLU.
        margin: room for what calibration has not seen.
        most: the largest factor.

    Example:
        >>> lift(torch.tensor([5.9, 2.7, 0.0]), ceiling=6.0)
        tensor([1., 2., 1.])
    """
    target = margin * ceiling if ceiling < float("inf") else float(peaks.max())
    factor = target / peaks.clamp_min(torch.finfo(peaks.dtype).tiny)
    return torch.where(peaks > 0, factor, 1.0).clamp(1.0, most)


def equalize_chain(layers: tuple[Layer, ...], sweeps: int = 20, tolerance: float = 1e-3) -> tuple[Layer, ...]:
    """Equalize every neighbouring pair of a chain again and again, until no scale is far from 1.

    Args:
        layers: in order, each fed by the one before through a positively homogeneous activation.
        sweeps: the most passes over the pairs.
        tolerance: largest ``|s - 1|`` of the last pass.
    """
    chain = list(layers)
    for _ in range(sweeps):
        furthest = 0.0
        for i in range(len(chain) - 1):
            w1, b1, w2, s = equalize_pair(chain[i].weight, chain[i].bias, chain[i + 1].weight, chain[i + 1].groups)
            chain[i], chain[i + 1] = replace(chain[i], weight=w1, bias=b1), replace(chain[i + 1], weight=w2)
            furthest = max(furthest, float((s - 1).abs().max()))
        if furthest <= tolerance:
            break
    return tuple(chain)


def _bounded(scale: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, scale.clamp(1 / MOST, MOST), 1.0)


def _check(w1: Tensor, w2: Tensor, groups: int) -> None:
    if w2.shape[1] * groups != w1.shape[0]:
        raise InputError(
            f"layer with {w1.shape[0]} outputs feeds one with {w2.shape[1] * groups} inputs: expected equal"
        )
