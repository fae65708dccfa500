"""Saliency: how much a channel or a single weight matters. The larger the score, the more worth keeping.

Two conventions, and no others. Channel scores take ``weight`` with the channel dimension moved to
the front and the rest flattened, shape (C, K) (see ``channel_rows``), gradients of the same shape, and
return (C,). Parameter scores return the shape of the weight that they were given; summed over a row
they score the channel. ``SALIENCIES`` names them all, with the inputs that each one needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from kompakt.errors import InputError


def channel_rows(tensor: Tensor, dim: int = 0, channels: int | None = None) -> Tensor:
    """Move ``dim`` to the front and flatten the rest, so that row c is all that channel c owns.

    Args:
        tensor: any shape, e.g. a convolution's weight (out, in, kh, kw).
        dim: the channel dimension.
        channels: number of channels C, where ``dim`` holds several consecutive entries for each
            channel (a linear layer after flatten); by default the size of ``dim``.

    Returns:
        (C, K).

    Raises:
        InputError: ``dim`` is not a multiple of ``channels``.

    Example:
        >>> channel_rows(torch.zeros(8, 4, 3, 3), dim=1).shape
        torch.Size([4, 72])
    """
    size = tensor.shape[dim]
    count = size if channels is None else channels
    if count < 1 or size % count:
        raise InputError(f"dimension {dim} of {tuple(tensor.shape)} is not a multiple of {count} channels")
    return tensor.movedim(dim, 0).reshape(count, -1)


def l1(weight: Tensor) -> Tensor:
    """Score channels by the L1 norm Σₖ|wₖ| (Li et al. 2017, arXiv:1608.08710): (C, K) → (C,)."""
    return weight.abs().sum(1)


def l2(weight: Tensor) -> Tensor:
    """Score channels by the L2 norm √Σₖwₖ² (He et al. 2018, arXiv:1808.06866): (C, K) → (C,)."""
    return torch.linalg.vector_norm(weight, dim=1)


def bn_scale(scale: Tensor) -> Tensor:
    """Score channels by the batch norm's |γ| (network slimming, Liu et al. 2017, arXiv:1708.06519): (C,) → (C,)."""
    return scale.abs()


def geometric_median(weight: Tensor) -> Tensor:
    """Score channels by Σⱼ‖w_c − w_j‖₂: the nearest to the geometric median is the most replaceable.

    FPGM, He et al. 2019, arXiv:1811.00250. Distances are taken in float64, so that equal
    channels are at distance zero.

    Args:
        weight: (C, K).

    Returns:
        (C,), in the dtype of ``weight``.
    """
    rows = weight.double()
    return torch.cdist(rows, rows).sum(1).to(weight.dtype)


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """Score channels by (Σₖ wₖgₖ)², the squared first-order change of the loss when the channel goes.

    Molchanov et al. 2019, arXiv:1906.10771. With one gradient for each batch the mean over
    the batches is returned, as the paper does; with one for each example it is the (doubled) Fisher
    score of Theis et al. 2018, arXiv:1801.05787.

    Args:
        weight: (C, K).
        grad: (C, K), or (N, C, K) for N batches or examples.

    Returns:
        (C,).
    """
    squared = (weight * grad).sum(-1).square()
    return squared if squared.ndim == 1 else squared.mean(0)


def taylor_abs(weight: Tensor, grad: Tensor) -> Tensor:
    """Score channels by |Σₖ wₖgₖ| (Molchanov et al. 2017, arXiv:1611.06440): (C, K), (C, K) or (N, C, K) → (C,)."""
    change = (weight * grad).sum(-1).abs()
    return change if change.ndim == 1 else change.mean(0)


def taylor_sum_abs(weight: Tensor, grad: Tensor) -> Tensor:
    """Score channels by Σₖ|wₖgₖ|, no cancelling inside a channel: (C, K), (C, K) or (N, C, K) → (C,)."""
    change = (weight * grad).abs().sum(-1)
    return change if change.ndim == 1 else change.mean(0)


def magnitude(weight: Tensor) -> Tensor:
    """Score weights by |w| (Han et al. 2015, arXiv:1506.02626): any shape → the same."""
    return weight.abs()


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """Score weights by |w·∂L/∂w|, the first-order change of the loss (SNIP, Lee et al. 2019, arXiv:1810.02340).

    Args:
        weight: any shape.
        grad: ∂L/∂w of the same shape.

    Returns:
        The shape of ``weight``.
    """
    return (weight * grad).abs()


def obd(weight: Tensor, curvature: Tensor) -> Tensor:
    """Score weights by ½·h·w², the second-order change with a diagonal Hessian (LeCun et al. 1990, OBD).

    Args:
        weight: any shape.
        curvature: the Hessian's diagonal h, or its empirical Fisher estimate (the mean over
            examples of the squared gradient), of the same shape. Negative values count as zero.

    Returns:
        The shape of ``weight``.
    """
    return 0.5 * curvature.clamp_min(0) * weight.square()


def obs(weight: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Score weights by w²/(2·[H⁻¹]ⱼⱼ), the loss after the others have been mended optimally.

    OBS (Hassibi and Stork 1993) for one layer: OBC, Frantar and Alistarh 2022, arXiv:2208.11580.

    Args:
        weight: (C, K), rows are outputs.
        hessian: (K, K) second moment of the layer's inputs, 2·E[xxᵀ].
        damp: share of the diagonal's mean that is added to the diagonal.

    Returns:
        (C, K).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damp)))
    return (weight.double().square() / (2 * inverse.diagonal())).to(weight.dtype)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Add ``damp`` times the diagonal's mean to the diagonal, in float64: (K, K) → (K, K).

    Inputs that are never active (zero on the diagonal) get the mean itself, so that the matrix is
    positive definite for every ``damp`` > 0.

    Raises:
        InputError: the matrix is not square or holds NaN or infinity.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise InputError(f"a Hessian is square, found {tuple(hessian.shape)}")
    matrix = hessian.double()
    if not torch.isfinite(matrix).all():
        raise InputError("the Hessian holds NaN or infinity; check the calibration data")
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean()) or 1.0
    dead = diagonal == 0
    return matrix + torch.diag(damp * mean + dead * mean)


def lamp(weight: Tensor) -> Tensor:
    """Score weights by wᵤ² / Σ{w_v² : |w_v| ≥ |wᵤ|} over the layer, comparable between layers.

    LAMP, Lee et al. 2021, arXiv:2010.07611: the layer's largest weight scores 1, so no layer
    is ever emptied by a global threshold.

    Args:
        weight: any shape, one layer.

    Returns:
        The shape of ``weight``, in [0, 1].
    """
    squared = weight.double().flatten().square()
    ordered, order = squared.sort(stable=True)
    remaining = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squared)
    scores[order] = ordered / remaining.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.reshape(weight.shape).to(weight.dtype)


def apoz(activations: Tensor) -> Tensor:
    """Score channels by the share of activations that are not zero: 1 − APoZ (Hu et al. 2016, arXiv:1607.03250).

    Args:
        activations: (C, N), the channel's outputs after the ReLU over examples and places.

    Returns:
        (C,), in [0, 1].
    """
    return (activations > 0).to(torch.get_default_dtype()).mean(1)


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score weights by |w|·‖x‖₂ (Sun et al. 2024, arXiv:2306.11695).

    Args:
        weight: (C, K), rows are outputs.
        input_norm: (K,), the L2 norm of each input over the calibration data.

    Returns:
        (C, K). The paper compares scores within one row.
    """
    return weight.abs() * input_norm


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Score channels at random, the control that every criterion must beat: (C, K) → (C,), uniform in [0, 1)."""
    return torch.rand(weight.shape[0], generator=generator, device=generator.device).to(weight.device)


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """One criterion and the inputs that it takes.

    Args:
        function: called with keywords, one for each name in ``needs``.
        needs: ``weight``, ``grad``, ``scale`` (batch norm's γ), ``curvature``, ``hessian``,
            ``activations``, ``input_norm``, ``generator``.
        scores: whether the result is (C,) or has the shape of the weight.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    scores: Literal["channels", "parameters"]


SALIENCIES: dict[str, Saliency] = {
    "l1": Saliency(function=l1, needs=("weight",), scores="channels"),
    "l2": Saliency(function=l2, needs=("weight",), scores="channels"),
    "geometric_median": Saliency(function=geometric_median, needs=("weight",), scores="channels"),
    "bn_scale": Saliency(function=bn_scale, needs=("scale",), scores="channels"),
    "taylor": Saliency(function=taylor, needs=("weight", "grad"), scores="channels"),
    "taylor_abs": Saliency(function=taylor_abs, needs=("weight", "grad"), scores="channels"),
    "taylor_sum_abs": Saliency(function=taylor_sum_abs, needs=("weight", "grad"), scores="channels"),
    "apoz": Saliency(function=apoz, needs=("activations",), scores="channels"),
    "random": Saliency(function=random, needs=("weight", "generator"), scores="channels"),
    "magnitude": Saliency(function=magnitude, needs=("weight",), scores="parameters"),
    "lamp": Saliency(function=lamp, needs=("weight",), scores="parameters"),
    "sensitivity": Saliency(function=sensitivity, needs=("weight", "grad"), scores="parameters"),
    "obd": Saliency(function=obd, needs=("weight", "curvature"), scores="parameters"),
    "obs": Saliency(function=obs, needs=("weight", "hessian"), scores="parameters"),
    "wanda": Saliency(function=wanda, needs=("weight", "input_norm"), scores="parameters"),
}


def saliency(name: str) -> Saliency:
    """Look up a criterion by name.

    Raises:
        InputError: there is none of that name; the nearest are offered.
    """
    if name in SALIENCIES:
        return SALIENCIES[name]
    near = ", ".join(get_close_matches(name, SALIENCIES, n=3, cutoff=0.0))
    raise InputError(f"criterion {name!r} is unknown; the nearest are {near}")


def channel_scores(name: str, **inputs: Tensor | torch.Generator) -> Tensor:
    """Score channels by the criterion ``name``; parameter scores are summed over each channel.

    Args:
        name: a key of ``SALIENCIES``.
        inputs: at least what the criterion needs; more is ignored.

    Returns:
        (C,).

    Raises:
        InputError: the criterion is unknown, an input is missing, or a score is NaN or infinite.

    Example:
        >>> channel_scores("l1", weight=torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        tensor([3.0000, 0.5000])
    """
    entry = saliency(name)
    missing = [need for need in entry.needs if need not in inputs]
    if missing:
        raise InputError(f"criterion {name!r} needs {', '.join(entry.needs)}; missing: {', '.join(missing)}")
    scores = entry.function(**{need: inputs[need] for need in entry.needs})
    scores = scores if entry.scores == "channels" else scores.flatten(1).sum(1)
    if not torch.isfinite(scores).all():
        raise InputError(f"criterion {name!r}: a score is NaN or infinite; look for NaN in the weights or gradients")
    return scores


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0),
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.amax(0),
    "norm": lambda stacked: torch.linalg.vector_norm(stacked, dim=0),
    "first": lambda stacked: stacked[0],
    "product": lambda stacked: stacked.prod(0),
}
"""How the scores of the M coupled members of a group become one: (M, C) → (C,)."""

NORMALISATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "none": lambda scores, size: scores,
    "mean": lambda scores, size: _divide(scores, scores.mean()),
    "max": lambda scores, size: _divide(scores, scores.amax()),
    "sum": lambda scores, size: _divide(scores, scores.sum()),
    "standardise": lambda scores, size: _divide(scores - scores.mean(), scores.std(correction=0)),
    "size": lambda scores, size: scores / size,
}
"""How scores are made comparable between groups: (C,) and the group's parameters per channel → (C,)."""


def reduce(scores: Sequence[Tensor], how: str = "sum") -> Tensor:
    """Reduce the scores of a group's coupled members to one score for each channel.

    Args:
        scores: one (C,) for each member.
        how: a key of ``REDUCTIONS``.

    Returns:
        (C,).

    Raises:
        InputError: no members, members of different lengths, or an unknown reduction.
    """
    if how not in REDUCTIONS:
        raise InputError(f"reduction {how!r} is unknown; use {', '.join(REDUCTIONS)}")
    lengths = sorted({len(member) for member in scores})
    if len(lengths) != 1:
        raise InputError(f"coupled members must score the same channels, found lengths {lengths}")
    return REDUCTIONS[how](torch.stack(list(scores)))


def normalise(scores: Tensor, how: str = "none", *, size: int = 1) -> Tensor:
    """Make a group's scores comparable with those of other groups.

    Args:
        scores: (C,).
        how: a key of ``NORMALISATIONS``; a divisor of zero (a constant or dead group) gives zeros.
        size: number of parameters (or MACs, or bytes) that one channel of the group costs; only
            ``"size"`` reads it.

    Returns:
        (C,).

    Raises:
        InputError: an unknown normalisation, or a size below 1.
    """
    if how not in NORMALISATIONS:
        raise InputError(f"normalisation {how!r} is unknown; use {', '.join(NORMALISATIONS)}")
    if size < 1:
        raise InputError(f"a channel of {size} parameters cannot be normalised by size")
    return NORMALISATIONS[how](scores, size)


def _divide(scores: Tensor, divisor: Tensor) -> Tensor:
    return torch.zeros_like(scores) if divisor == 0 else scores / divisor
