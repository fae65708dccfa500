"""One and two bits: signs with a scale, and gradients for functions that have none.

Weights have their outputs first; a scale is (C,), one for each output, or (1,) for the whole tensor. For
training, ``sign_*`` give a sign whose gradient is that of the surrogate of the same name in
``SURROGATES``; the other functions here are built from them and differentiate by the chain rule.
"""

from collections.abc import Callable
from math import log10
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kompakt.errors import InputError

Per = Literal["channel", "tensor"]
SignFunction = Callable[[Tensor], Tensor]


def binarize(weight: Tensor, per: Per = "channel") -> tuple[Tensor, Tensor]:
    """Return the signs and scales of least squared error ‖w − α·b‖², b = ±1.

    XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279: b = sign(w), α = mean|w|. Zero counts as +1.

    Args:
        weight: (C, ...).
        per: whether each output has its own scale.

    Returns:
        Signs, int8 ±1, the shape of ``weight``; scales (C,) or (1,).

    Raises:
        InputError: NaN or infinity among the weights.
    """
    rows = _rows(weight, per)
    signs = torch.where(weight < 0, -1, 1).to(torch.int8)
    return signs, rows.abs().mean(1)


def binarize_shifted(weight: Tensor, per: Per = "channel") -> tuple[Tensor, Tensor, Tensor]:
    """Return signs, half distance and centre of two values w ≈ β + α·b that keep mean and deviation.

    AdaBin, Tu et al. 2022, arXiv:2208.08084: β = mean(w), α = ‖w − β‖₂/√n, b = sign(w − β). For the
    two values of least squared error see ``codebook.share`` with one bit.

    Args:
        weight: (C, ...).
        per: whether each output has its own values.

    Returns:
        Signs, int8 ±1, the shape of ``weight``; α and β, each (C,) or (1,).

    Raises:
        InputError: NaN or infinity among the weights.
    """
    rows = _rows(weight, per)
    shift = rows.mean(1)
    signs = torch.where(rows < shift[:, None], -1, 1).to(torch.int8)
    return signs.reshape(weight.shape), rows.std(1, correction=0), shift


def ternarize(weight: Tensor, per: Per = "channel", *, threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return signs in {−1, 0, 1} and scales by the rule of thumb Δ = 0.7·mean|w|, α = mean of |w| > Δ.

    TWN, Li, Zhang and Liu 2016, arXiv:1605.04711.

    Args:
        weight: (C, ...).
        per: whether each output has its own threshold and scale.
        threshold: Δ as a share of mean|w|.

    Returns:
        Signs, int8, the shape of ``weight``; scales (C,) or (1,).

    Raises:
        InputError: NaN or infinity among the weights.
    """
    rows = _rows(weight, per)
    magnitude = rows.abs()
    kept = magnitude > threshold * magnitude.mean(1, keepdim=True)
    scale = (magnitude * kept).sum(1) / kept.sum(1).clamp_min(1)
    return (rows.sign() * kept).to(torch.int8).reshape(weight.shape), scale


def ternarize_exact(weight: Tensor, per: Per = "channel") -> tuple[Tensor, Tensor]:
    """Return the signs in {−1, 0, 1} and scales of least squared error.

    With the magnitudes sorted, the n largest are kept that maximise (Σ|w|)²/n (TWN, arXiv:1605.04711,
    its objective solved by trying every n).

    Args:
        weight: (C, ...).
        per: whether each output has its own scale.

    Returns:
        As ``ternarize``.
    """
    rows = _rows(weight, per).double()
    magnitude = rows.abs()
    ordered, order = magnitude.sort(dim=1, descending=True, stable=True)
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    totals = ordered.cumsum(1)
    best = (totals.square() / count).argmax(1, keepdim=True)
    rank = torch.empty_like(order).scatter_(1, order, count.expand_as(order) - 1)
    signs = (rows.sign() * (rank <= best)).to(torch.int8).reshape(weight.shape)
    return signs, (totals.gather(1, best) / (best + 1)).flatten().to(weight.dtype)


def expand(signs: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Put signs, scales and shifts together again: β + α·b, the shape of ``signs``."""
    rows = signs.reshape(len(scale), -1) * scale[:, None]
    return (rows if shift is None else rows + shift[:, None]).reshape(signs.shape)


def sign_clip(x: Tensor) -> Tensor:
    """Sign with the gradient of clip(x, −1, 1): 1 where |x| ≤ 1 (Hubara et al. 2016, arXiv:1602.02830)."""
    return _Sign.apply(x, (x.abs() <= 1).to(x.dtype))


def sign_polynomial(x: Tensor) -> Tensor:
    """Sign with the gradient of a piecewise quadratic: 2 − 2|x| where |x| < 1.

    Bi-Real Net, Liu et al. 2018, arXiv:1808.00278.
    """
    return _Sign.apply(x, (2 - 2 * x.abs()).clamp_min(0))


def sign_tanh(x: Tensor, sharpness: float = 1.0) -> Tensor:
    """Sign with the gradient of k·tanh(t·x), k = max(1/t, 1) (IR-Net's EDE, Qin et al. 2020, arXiv:1909.10788).

    Args:
        x: any shape.
        sharpness: t, growing over the training (see ``sharpness_at``).

    Returns:
        ±1, the shape of ``x``.
    """
    slope = max(1 / sharpness, 1.0) * sharpness
    return _Sign.apply(x, slope * (1 - torch.tanh(sharpness * x).square()))


SIGNS: dict[str, Callable[..., Tensor]] = {"clip": sign_clip, "polynomial": sign_polynomial, "tanh": sign_tanh}
"""Signs with a gradient, by the name of their surrogate."""

SURROGATES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x: x.clamp(-1, 1),
    "polynomial": lambda x: (2 * x - x * x.abs()) * (x.abs() < 1) + x.sign() * (x.abs() >= 1),
    "tanh": lambda x, sharpness=1.0: max(1 / sharpness, 1.0) * torch.tanh(sharpness * x),
}
"""The functions whose gradients the signs borrow."""


def sharpness_at(progress: float, *, low: float = 0.1, high: float = 10.0) -> float:
    """Return the sharpness t = low·10^(progress·log₁₀(high/low)) for ``sign_tanh`` (IR-Net, arXiv:1909.10788).

    Raises:
        InputError: progress outside 0 … 1, or bounds that are not positive.
    """
    if not 0 <= progress <= 1 or low <= 0 or high <= 0:
        raise InputError(f"progress {progress} must lie in 0 … 1, bounds {low} and {high} above 0")
    return low * 10.0 ** (progress * log10(high / low))


def binary_weight(weight: Tensor, sign: SignFunction = sign_clip, *, balance: bool = False) -> Tensor:
    """Binarize weights in training: α·sign(w), α = mean|w| for each output, both with gradients.

    The gradient is the chain rule's with the sign's surrogate (XNOR-Net, arXiv:1603.05279, §3.1).

    Args:
        weight: (C, ...).
        sign: one of ``SIGNS``.
        balance: take the sign of the weights brought to mean 0 and deviation 1 for each output
            (IR-Net, arXiv:1909.10788), so that half of them are positive.

    Returns:
        The shape of ``weight``.
    """
    rows = weight.flatten(1)
    scale = rows.abs().mean(1, keepdim=True)
    if balance:
        deviation = rows.std(1, keepdim=True, correction=0)
        rows = (rows - rows.mean(1, keepdim=True)) / deviation.clamp_min(torch.finfo(rows.dtype).tiny)
    return (sign(rows) * scale).reshape(weight.shape)


def binary_activation(x: Tensor, shift: Tensor, sign: SignFunction = sign_polynomial) -> Tensor:
    """Binarize activations around a learned threshold for each channel: sign(x − β).

    ReActNet's RSign, Liu et al. 2020, arXiv:2003.03488.

    Args:
        x: (N, C, ...).
        shift: (C,).
        sign: one of ``SIGNS``.

    Returns:
        ±1, the shape of ``x``.
    """
    return sign(x - _channels(shift, x))


def adaptive_activation(x: Tensor, scale: Tensor, shift: Tensor, sign: SignFunction = sign_clip) -> Tensor:
    """Binarize activations to two learned values: α·sign((x − β)/α) + β (AdaBin, arXiv:2208.08084).

    Args:
        x: (N, C, ...).
        scale: α, (C,) or (1,), above 0.
        shift: β, (C,) or (1,).
        sign: one of ``SIGNS``.

    Returns:
        Two values for each channel, the shape of ``x``.
    """
    alpha, beta = _channels(scale, x), _channels(shift, x)
    return alpha * sign((x - beta) / alpha) + beta


def shifted_prelu(x: Tensor, slope: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Apply PReLU with learned shifts on both sides: prelu(x − γ) + ζ (ReActNet's RPReLU, arXiv:2003.03488).

    Args:
        x: (N, C, ...).
        slope: of the negative side, (C,).
        before: γ, (C,).
        after: ζ, (C,).

    Returns:
        The shape of ``x``.
    """
    moved = x - _channels(before, x)
    return torch.where(moved > 0, moved, _channels(slope, x) * moved) + _channels(after, x)


def ternary_weight(weight: Tensor, *, threshold: float = 0.7) -> Tensor:
    """Ternarize weights in training: the values of ``ternarize``, the gradient straight through (arXiv:1605.04711)."""
    signs, scale = ternarize(weight.detach(), threshold=threshold)
    return weight + (expand(signs, scale).to(weight.dtype) - weight).detach()


def trained_ternary(weight: Tensor, positive: Tensor, negative: Tensor, threshold: float | Tensor = 0.05) -> Tensor:
    """Ternarize weights to learned values: +Wp above Δ, −Wn below −Δ, else 0, with Δ = threshold·max|w|.

    TTQ, Zhu et al. 2017, arXiv:1612.01064: ∂L/∂Wp sums the gradients of the positive weights,
    ∂L/∂Wn those of the negative ones (with their sign), and ∂L/∂w is the gradient times Wp, 1 or Wn.

    Args:
        weight: any shape, one layer; or rows (G, n), each with values of its own.
        positive: Wp, scalar tensor, or (G, 1).
        negative: Wn, scalar tensor, or (G, 1).
        threshold: t, 0 to 1; one, or (G, 1).

    Returns:
        The shape of ``weight``.
    """
    return _TrainedTernary.apply(weight, positive, negative, threshold)


class _Sign(torch.autograd.Function):
    """±1 forward (zero counts as +1), the given slope backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None


class _TrainedTernary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, positive: Tensor, negative: Tensor, threshold: float | Tensor) -> Tensor:
        magnitude = weight.abs()
        limit = threshold * (magnitude.amax(1, keepdim=True) if positive.ndim else magnitude.max())
        above, below = weight > limit, weight < -limit
        ctx.save_for_backward(above, below, positive, negative)
        return above * positive - below * negative

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        above, below, positive, negative = ctx.saved_tensors
        grad = grads[0]
        slope = torch.where(above, positive, torch.where(below, negative, torch.ones_like(negative)))
        sums = [(grad * part).sum_to_size(positive.shape) for part in (above, below)]
        return grad * slope, sums[0], -sums[1], None


def _rows(weight: Tensor, per: Per) -> Tensor:
    # A compiled step cannot ask; training looks at its losses and weights.
    if not is_compiling() and not torch.isfinite(weight).all():
        raise InputError("NaN or infinity among the weights; they cannot be binarized")
    return weight.reshape(1, -1) if per == "tensor" else weight.reshape(weight.shape[0], -1)


def _channels(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(1, -1, *[1] * (x.ndim - 2))
