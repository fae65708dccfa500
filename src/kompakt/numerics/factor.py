"""Low-rank factors: one layer's weight as a chain of smaller ones, nearest to it in the Frobenius norm.

The tensors come in the order in which they are applied, shaped as the weights of the layers that take
them: ``(r, I)`` and ``(O, r)`` for linear maps, ``(r, I, 1, 1)`` and so on for convolutions. Only the
layer that had stride, padding and dilation keeps them: the one with the spatial kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.linalg import eigh, vector_norm

from kompakt.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """A factorised weight.

    Args:
        tensors: the factors, in the order in which they are applied.
        error: ‖W − Ŵ‖/‖W‖, 0 to 1 for the best fits; the norm is Frobenius', or weighted by the
            inputs' second moment where one was given.
    """

    tensors: tuple[Tensor, ...]
    error: float


def svd(weight: Tensor, rank: int, moment: Tensor | None = None) -> Factors:
    """Factor a linear map into two, W ≈ B·A: the best of that rank (Eckart and Young 1936).

    With the inputs' second moment M the output's error ‖(W − BA)x‖² is least instead: with U the first
    left singular vectors of W·M^½, B = U and A = UᵀW (Zhang et al. 2015, arXiv:1505.06798). Either way
    the two factors' columns and rows are given equal norms, so that both train at the same pace.

    Args:
        weight: (O, I).
        rank: 1 to min(O, I); at the latter nothing is lost.
        moment: (I, I), E[xxᵀ], positive semidefinite.

    Returns:
        A (rank, I) and B (O, rank).

    Raises:
        InputError: not a matrix, the rank out of range, NaN.
    """
    _check(weight, "svd", (rank,))
    w = weight.double()
    gram = w @ w.T if moment is None else w @ moment.double() @ w.T
    basis = _leading(gram, rank)
    first = basis.T @ w
    norms = vector_norm(first, dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    tensors = (first / norms[:, None], basis * norms)
    difference = w - tensors[1] @ tensors[0]
    if moment is not None:
        total, left = ((each @ moment.double() * each).sum().clamp_min(0).sqrt() for each in (w, difference))
        return _factors(weight, tensors, float(left / total) if total > 0 else 0.0)
    return _factors(weight, tensors, _relative(difference, w))


def tucker2(weight: Tensor, ranks: tuple[int, int], iterations: int = 20) -> Factors:
    """Factor a convolution into a 1×1 that narrows, a small k×k and a 1×1 that widens.

    Tucker-2, Kim et al. 2016, arXiv:1511.06530: W ≈ G ×₀ U_out ×₁ U_in, from the leading singular vectors of
    both unfoldings (HOSVD), improved by orthogonal iteration (HOOI, De Lathauwer et al. 2000).

    Args:
        weight: (O, I, kh, ...), without groups.
        ranks: channels (in, out) of the small convolution, up to I and O; at both nothing is lost.
        iterations: the most HOOI rounds; it stops when the fit no longer improves.

    Returns:
        (r_in, I, 1, ...), (r_out, r_in, kh, ...) and (O, r_out, 1, ...).

    Raises:
        InputError: no spatial dimension, ranks out of range, NaN.
    """
    _check(weight, "tucker2", ranks)
    outputs, inputs = weight.shape[:2]
    w = weight.double().reshape(outputs, inputs, -1)
    u_in = _leading(torch.einsum("oik,ojk->ij", w, w), ranks[0])
    energy = -1.0
    for _ in range(iterations + 1):
        narrowed = torch.einsum("oik,ir->ork", w, u_in)
        u_out = _leading(torch.einsum("ork,prk->op", narrowed, narrowed), ranks[1])
        core = torch.einsum("ork,os->srk", narrowed, u_out)
        before, energy = energy, float(core.square().sum())
        if energy - before <= 1e-12 * energy:
            break
        narrowed_out = torch.einsum("oik,os->sik", w, u_out)
        u_in = _leading(torch.einsum("sik,sjk->ij", narrowed_out, narrowed_out), ranks[0])
    core = torch.einsum("oik,os,ir->srk", w, u_out, u_in)
    flat = [1] * (weight.ndim - 2)
    tensors = (
        u_in.T.reshape(ranks[0], inputs, *flat),
        core.reshape(ranks[1], ranks[0], *weight.shape[2:]),
        u_out.reshape(outputs, ranks[1], *flat),
    )
    return _fitted("tucker2", weight, tensors, ranks)


def cp(weight: Tensor, rank: int, iterations: int = 200, generator: torch.Generator | None = None) -> Factors:
    """Factor a 2-D convolution into 1×1, kh×1 depthwise, 1×kw depthwise and 1×1.

    CP by alternating least squares, Lebedev et al. 2015, arXiv:1412.6553: W ≈ Σᵣ o_r ∘ i_r ∘ h_r ∘ v_r. A local
    optimum; each round solves one factor exactly, so the error never grows.

    Args:
        weight: (O, I, kh, kw), without groups.
        rank: 1 to numel / max(shape), where the fit is exact.
        iterations: the most rounds; it stops when the fit no longer improves.
        generator: for the start; by default one with seed 0.

    Returns:
        (R, I, 1, 1), (R, 1, kh, 1), (R, 1, 1, kw) and (O, R, 1, 1).

    Raises:
        InputError: not four dimensions, the rank out of range, NaN.
    """
    _check(weight, "cp", (rank,))
    w = weight.double()
    total = float(w.square().sum())
    chance = generator if generator is not None else torch.Generator().manual_seed(0)
    factors = [torch.randn(size, rank, generator=chance, dtype=torch.float64) for size in weight.shape]
    error = float("inf")
    for _ in range(iterations):
        for mode in range(4):
            factors[mode] = _least_squares(w, factors, mode)
        before, error = error, float((w - _cp_product(factors)).square().sum())
        if before - error <= 1e-9 * total or error <= 1e-20 * total:
            break
    norms = [vector_norm(each, dim=0).clamp_min(torch.finfo(torch.float64).tiny) for each in factors]
    share = torch.stack(norms).log().mean(0).exp()
    o, i, h, v = (each / norm * share for each, norm in zip(factors, norms, strict=True))
    tensors = (i.T[:, :, None, None], h.T[:, None, :, None], v.T[:, None, None, :], o[:, :, None, None])
    return _fitted("cp", weight, tensors, (rank,))


def separable(weight: Tensor, multiplier: int = 1) -> Factors:
    """Factor a convolution into a depthwise one and a 1×1: the nearest of that form.

    Guo et al. 2018, arXiv:1808.05517: the kernels that read input channel i are an (O, kh·kw) matrix, and
    its best approximation of rank d is d depthwise kernels and their mixing weights, for each i alone.

    Args:
        weight: (O, I, kh, ...), without groups.
        multiplier: d, depthwise kernels for each input, 1 to min(O, kh·kw).

    Returns:
        (I·d, 1, kh, ...), a convolution of I groups, and (O, I·d, 1, ...).

    Raises:
        InputError: no spatial dimension, the multiplier out of range, NaN.
    """
    _check(weight, "separable", (multiplier,))
    outputs, inputs = weight.shape[:2]
    u, s, vh = torch.linalg.svd(weight.double().reshape(outputs, inputs, -1).transpose(0, 1), full_matrices=False)
    root = s[:, :multiplier].sqrt()
    kernels = vh[:, :multiplier] * root[:, :, None]
    mixing = (u[:, :, :multiplier] * root[:, None, :]).transpose(0, 1)
    tensors = (
        kernels.reshape(inputs * multiplier, 1, *weight.shape[2:]),
        mixing.reshape(outputs, inputs * multiplier, *[1] * (weight.ndim - 2)),
    )
    return _fitted("separable", weight, tensors, (multiplier,))


def reconstruct(form: str, tensors: tuple[Tensor, ...], ranks: Shape) -> Tensor:
    """Multiply factors out again into the one weight that they stand for: (O, I) or (O, I, kh, ...).

    Args:
        form: a key of ``PARAMETERS``.
        tensors: the factors, in the order in which they are applied.
        ranks: those that they were made with.

    Raises:
        InputError: an unknown form.
    """
    if form == "svd":
        return tensors[1] @ tensors[0]
    if form == "tucker2":
        first, core, last = (each.flatten(2) for each in tensors)
        product = torch.einsum("oa,abk,bi->oik", last[..., 0], core, first[..., 0])
        return product.reshape(len(last), first.shape[1], *tensors[1].shape[2:])
    if form == "cp":
        i, h, v, o = (each.reshape(each.shape[0], -1) for each in tensors)
        return _cp_product([o, i.T, h.T, v.T])
    if form == "separable":
        kernels, outputs = tensors[0], tensors[1].shape[0]
        inputs = len(kernels) // ranks[0]
        mixing = tensors[1].reshape(outputs, inputs, ranks[0])
        product = torch.einsum("oid,idk->oik", mixing, kernels.reshape(inputs, ranks[0], -1))
        return product.reshape(outputs, inputs, *kernels.shape[2:])
    raise InputError(f"form {form!r} is unknown; use {', '.join(PARAMETERS)}")


def rank_by_energy(values: Tensor, energy: float) -> int:
    """Return the least rank whose singular values hold the share ``energy`` of Σσ².

    Args:
        values: singular values, falling.
        energy: 0 to 1.

    Raises:
        InputError: energy outside 0 … 1.
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy {energy} must lie in 0 … 1")
    held = values.double().square().cumsum(0)
    return int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1


PARAMETERS: dict[str, Callable[[Shape, Shape], int]] = {
    "svd": lambda shape, ranks: ranks[0] * (shape[0] + shape[1]),
    "tucker2": lambda s, ranks: s[1] * ranks[0] + ranks[0] * ranks[1] * prod(s[2:]) + ranks[1] * s[0],
    "cp": lambda shape, ranks: ranks[0] * sum(shape),
    "separable": lambda shape, ranks: shape[1] * ranks[0] * (prod(shape[2:]) + shape[0]),
}
"""Parameters of each form, from the weight's shape and the ranks."""


def full_ranks(form: str, shape: Shape) -> Shape:
    """Return the ranks at which a form loses nothing.

    Raises:
        InputError: an unknown form, or a shape that it does not take.
    """
    if form not in PARAMETERS:
        raise InputError(f"form {form!r} is unknown; use {', '.join(PARAMETERS)}")
    if not {"svd": len(shape) == 2, "cp": len(shape) == 4}.get(form, len(shape) >= 3):
        expected = {"svd": "(O, I)", "cp": "(O, I, kh, kw)"}.get(form, "(O, I, kh, ...)")
        raise InputError(f"{form} takes a weight {expected}, found {shape}")
    full: dict[str, Shape] = {
        "svd": (min(shape[:2]),),
        "tucker2": (shape[1], shape[0]),
        "cp": (prod(shape) // max(shape),),
        "separable": (min(shape[0], prod(shape[2:])),),
    }
    return full[form]


def ranks_by_budget(form: str, shape: Shape, ratio: float) -> Shape:
    """Return the largest ranks whose parameters are at most ``ratio`` of the weight's own.

    Tucker-2's two ranks keep to the same share of their channels.

    Args:
        form: a key of ``PARAMETERS``.
        shape: the weight's.
        ratio: share of parameters that may stay, above 0.

    Raises:
        InputError: the smallest ranks already cost more; the ratio that they need is named.
    """
    full = full_ranks(form, shape)
    steps = max(full)
    allowed = ratio * prod(shape)
    for step in range(steps, 0, -1):
        ranks = tuple(max(1, size * step // steps) for size in full)
        if PARAMETERS[form](shape, ranks) <= allowed:
            return ranks
    least = PARAMETERS[form](shape, tuple(1 for _ in full)) / prod(shape)
    raise InputError(f"{form} of {shape} needs at least {least:.3f} of the parameters, {ratio} were allowed")


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues: (n, n) → (n, rank)."""
    return eigh(gram).eigenvectors[:, -rank:].flip(1)


def _least_squares(w: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The factor of one mode that fits best while the others stand still."""
    others = [factor for index, factor in enumerate(factors) if index != mode]
    gram = prod((factor.T @ factor for factor in others), start=torch.ones(()))
    letters = "oihv"
    terms = ",".join(f"{letter}r" for letter in letters if letter != letters[mode])
    target = torch.einsum(f"oihv,{terms}->{letters[mode]}r", w, *others)
    return target @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-13)


def _cp_product(factors: list[Tensor]) -> Tensor:
    return torch.einsum("or,ir,hr,vr->oihv", *factors)


def _fitted(form: str, weight: Tensor, tensors: tuple[Tensor, ...], ranks: Shape) -> Factors:
    w = weight.double()
    return _factors(weight, tensors, _relative(w - reconstruct(form, tensors, ranks), w))


def _factors(weight: Tensor, tensors: tuple[Tensor, ...], error: float) -> Factors:
    return Factors(tensors=tuple(each.to(weight.dtype).contiguous() for each in tensors), error=error)


def _relative(difference: Tensor, whole: Tensor) -> float:
    norm = vector_norm(whole)
    return float(vector_norm(difference) / norm) if norm > 0 else 0.0


def _check(weight: Tensor, form: str, ranks: Shape) -> None:
    full = full_ranks(form, tuple(weight.shape))
    if len(ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        raise InputError(f"{form} of {tuple(weight.shape)}: ranks {ranks}, expected 1 to {full}")
    if not torch.isfinite(weight).all():
        raise InputError("NaN or infinity in the weight; it cannot be factored")
