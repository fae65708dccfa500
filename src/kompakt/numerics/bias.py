"""Bias correction: quantized weights and inputs shift the mean of a layer's outputs; the bias takes it back.

Reference: Nagel, van Baalen, Blankevoort, Welling 2019 (DFQ), arXiv 1906.04721, section 4.2 and appendix D.
"""

import torch
from torch import Tensor

from kompakt.errors import InputError


def channel_means(y: Tensor, axis: int = 1) -> Tensor:
    """Average over all dimensions but ``axis``, in float64: float32 ``(channels,)``."""
    return y.detach().movedim(axis, 0).flatten(1).double().mean(1).float()


def corrected_bias(bias: Tensor | None, float_mean: Tensor, quantized_mean: Tensor) -> Tensor:
    """Correct a bias from measured outputs: ``b + E[y] - E[ŷ]``.

    Args:
        bias: ``(channels,)``, or None for 0.
        float_mean: mean of each output channel before the activation, in the float model, ``(channels,)``.
        quantized_mean: the same in the quantized model, with this bias in place; layers before it corrected first.

    Returns:
        The new bias, ``(channels,)``.

    Raises:
        InputError: a mean is not finite.
    """
    shift = float_mean - quantized_mean
    if not bool(torch.isfinite(shift).all()):
        raise InputError("mean outputs hold NaN or infinite values; look for overflow in the model")
    return shift if bias is None else bias + shift


def expected_shift(weight_error: Tensor, input_mean: Tensor, groups: int = 1) -> Tensor:
    """Compute how far a weight's error moves the mean output: ``Σ_i Σ_taps (ŵ - w)_oi · E[x_i]``.

    Exact for linear layers and for convolutions without padding whose input has the same mean everywhere.

    Args:
        weight_error: quantized less float weight, ``(out, in / groups, *kernel)``.
        input_mean: ``(in,)``.
        groups: of the convolution.

    Returns:
        ``(out,)``.

    Raises:
        InputError: the number of means is not that of the inputs.
    """
    if input_mean.numel() != weight_error.shape[1] * groups:
        raise InputError(
            f"{input_mean.numel()} input means for {weight_error.shape[1] * groups} inputs: expected equal"
        )
    by_group = weight_error.reshape(*weight_error.shape[:2], -1).sum(2)
    return torch.einsum("goi,gi->go", by_group.unflatten(0, (groups, -1)), input_mean.view(groups, -1)).flatten()


def analytic_bias(
    bias: Tensor | None, weight: Tensor, quantized: Tensor, input_mean: Tensor, groups: int = 1
) -> Tensor:
    """Correct a bias from the weights' error and the mean inputs, without running the quantized model.

    Args:
        bias: ``(out,)``, or None for 0.
        weight: float weight, ``(out, in / groups, *kernel)``.
        quantized: the same weight after quantization.
        input_mean: mean of every input channel, ``(in,)``; of data, or ``rectified_mean`` of batch norm's.
        groups: of the convolution.

    Returns:
        The new bias, ``(out,)``.
    """
    shift = expected_shift(quantized - weight, input_mean, groups)
    return -shift if bias is None else bias - shift


def rectified_mean(mean: Tensor, std: Tensor) -> Tensor:
    """Compute ``E[relu(x)]`` of Gaussian channels: ``σ φ(-μ/σ) + μ (1 - Φ(-μ/σ))``, equation 19 of DFQ.

    With the shift and scale of a batch norm this gives the next layer's input means without data.

    Args:
        mean: μ, any shape.
        std: σ ≥ 0, same shape.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = mean / std.clamp(min=torch.finfo(torch.float32).tiny)
    return std * normal.log_prob(ratio).exp() + mean * normal.cdf(ratio)
