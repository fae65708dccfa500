"""Codebooks: weights as indices into a few shared values, found by k-means or taken from a fixed grid.

A codebook is (G, k): one row of rising values for each of G equal runs of outputs (G = 1: the whole
tensor). Indices have the shape of the weight. ``gather`` puts the two together again.
"""

from collections.abc import Callable
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics import kmeans
from kompakt.numerics.kmeans import SortedRows, bounds_of, interval_sums, lloyd, sort_rows
from kompakt.spec import MAX_BITS

Start = Literal["linear", "density", "random", "exact"]


def kmeans1d(
    values: Tensor,
    k: int,
    start: Start = "linear",
    *,
    weights: Tensor | None = None,
    iterations: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster numbers by Lloyd's algorithm, a local optimum of Σ wᵢ(xᵢ − c)².

    Lloyd 1982; the starts are those of Deep Compression (Han, Mao, Dally 2016, arXiv:1510.00149,
    §3.2): ``linear`` between the extremes, ``density`` at equal steps of the distribution function,
    ``random`` among the values (Forgy). ``exact`` starts, and ends, at ``optimal1d``.

    Args:
        values: any shape.
        k: number of centroids, 1 to 256.
        start: where the centroids begin.
        weights: importance of each value, not negative, the shape of ``values``.
        iterations: the most steps; it stops at a fixed point.
        generator: for ``random``.

    Returns:
        Centroids (k,), rising, in the dtype of ``values``; indices, uint8, the shape of ``values``.

    Raises:
        InputError: more centroids than distinct values, NaN or infinity, negative weights.
    """
    rows, importance = _checked(values.reshape(1, -1), weights)
    _enough(rows, k)
    ordered = sort_rows(rows, importance)
    centroids = lloyd(ordered, _start(ordered, k, start, generator), iterations)[0].to(values)
    return centroids, nearest(values, centroids)


def optimal1d(values: Tensor, k: int, weights: Tensor | None = None, *, bins: int = 4096) -> tuple[Tensor, Tensor]:
    """Cluster numbers optimally: the global minimum of Σ wᵢ(xᵢ − c)² over k centroids.

    Wang and Song 2011 (Ckmeans.1d.dp); the monotone minima by divide and conquer, O(k·n·log n) (Grønlund
    et al. 2017, arXiv:1701.07204). With more than ``bins`` values, clusters may end only at ``bins``
    places, half of them equally spaced in value and half in number; Lloyd's steps then settle the ends.

    Args:
        values: any shape.
        k: number of centroids, 1 to 256.
        weights: importance of each value, not negative, the shape of ``values``.
        bins: up to this many values the result is exact.

    Returns:
        As ``kmeans1d``.

    Raises:
        InputError: as ``kmeans1d``.
    """
    rows, importance = _checked(values.reshape(1, -1), weights)
    _enough(rows, k)
    ordered = sort_rows(rows, importance)
    centroids = lloyd(ordered, kmeans.optimal(ordered, k, bins))[0].to(values)
    return centroids, nearest(values, centroids)


def share(
    weight: Tensor,
    bits: int,
    granularity: Literal["tensor", "channel"] = "tensor",
    start: Start = "exact",
    *,
    channels: int = 1,
    importance: Tensor | None = None,
    keep_zeros: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace weights by indices into codebooks of 2^bits values.

    A codebook with at least as many places as there are distinct values holds those values themselves,
    the last one repeated: nothing is lost, and constant or all-zero layers need no special case.

    Args:
        weight: any shape, outputs first.
        bits: 1 to 8.
        granularity: one codebook for the tensor, or one for each run of ``channels`` outputs.
        start: where k-means begins; ``exact`` is the optimum, up to 4096 values in a tensor's and 1024
            in a channel's codebook, and next to it beyond (see ``optimal1d``).
        channels: how many neighbouring outputs share a codebook (``granularity="channel"``).
        importance: weight of each squared error, e.g. the Hessian's diagonal; the shape of ``weight``.
        keep_zeros: reserve one value for 0, so that pruned weights stay pruned.
        generator: for ``random``.

    Returns:
        Indices, uint8, the shape of ``weight``; codebooks (G, 2^bits), each rising.

    Raises:
        InputError: bits out of range, NaN, negative importance, ``channels`` that do not divide.
    """
    rows, worth = _checked(_book_rows(weight, granularity, channels), importance)
    if not 1 <= bits <= MAX_BITS:
        raise InputError(f"{bits} bits: a codebook takes 1 to {MAX_BITS} bits")
    k = 2**bits - int(keep_zeros)
    books = torch.zeros(len(rows), k, dtype=rows.dtype)
    worth = worth * (rows != 0) if keep_zeros else worth
    few = _distinct(rows) <= k
    for row in few.nonzero().flatten().tolist():
        own = rows[row].unique()
        books[row] = torch.cat([own, own[-1:].expand(k - len(own))])
    if not few.all():
        ordered = sort_rows(rows[~few], worth[~few])
        books[~few] = lloyd(ordered, _start(ordered, k, start, generator))
    if keep_zeros:
        books = torch.cat([books, torch.zeros(len(rows), 1, dtype=rows.dtype)], dim=1).sort(1).values
    codebook = books.to(weight.dtype)
    return _nearest_rows(rows, codebook).reshape(weight.shape).to(weight.device), codebook.to(weight.device)


def gather(indices: Tensor, codebook: Tensor) -> Tensor:
    """Look every index up in its codebook; the gradient reaches the codebook.

    Args:
        indices: any integers, outputs first.
        codebook: (G, k); each of the G books serves an equal run of outputs.

    Returns:
        The shape of ``indices``, the dtype of ``codebook``.
    """
    return codebook.gather(1, indices.reshape(len(codebook), -1).long()).reshape(indices.shape)


def centroid_gradient(grad: Tensor, indices: Tensor, k: int, books: int = 1) -> Tensor:
    """Sum the weights' gradients over each shared value: ∂L/∂c_j = Σᵢ ∂L/∂wᵢ·[Iᵢ = j].

    Deep Compression, arXiv:1510.00149, §3.3.

    Args:
        grad: ∂L/∂w, any shape, outputs first.
        indices: the same shape.
        k: values in a codebook.
        books: number of codebooks G.

    Returns:
        (G, k).
    """
    total = torch.zeros(books, k, dtype=grad.dtype, device=grad.device)
    return total.scatter_add_(1, indices.reshape(books, -1).long(), grad.reshape(books, -1))


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level: any shape, levels (k ≤ 256,) rising → uint8. Ties go up."""
    return _nearest_rows(values.reshape(1, -1), levels.reshape(1, -1)).reshape(values.shape)


def power_of_two_levels(bits: int) -> Tensor:
    """Return the grid {0, ±2⁻ⁱ : i = 0 … 2^(bits−1) − 2}, 2^bits − 1 levels from −1 to 1.

    Miyashita, Lee and Murmann 2016, arXiv:1603.01025.

    Raises:
        InputError: bits outside 2 … 5; beyond, the smallest levels are of no use.
    """
    if not 2 <= bits <= 5:
        raise InputError(f"{bits} bits: the power-of-two grid takes 2 to 5 bits; use APoT")
    positive = [2.0**-i for i in range(2 ** (bits - 1) - 1)]
    return _symmetric(positive)


def apot_levels(bits: int) -> Tensor:
    """Return the grid of additive powers of two, 2^bits − 1 levels from −1 to 1.

    APoT, Li, Dong and Wang 2020, arXiv:1909.13144, base bit width 2: with bits − 1 = 2n (a sign
    apart) a level is γ·Σᵢpᵢ, pᵢ ∈ {0, 2⁻ⁱ, 2⁻⁽ⁱ⁺ⁿ⁾, 2⁻⁽ⁱ⁺²ⁿ⁾}, i < n; with bits − 1 = 2n + 1 the last
    power is 2⁻⁽ⁱ⁺²ⁿ⁺¹⁾ and one term of {0, 2⁻²ⁿ} joins. γ makes the largest level 1.

    Raises:
        InputError: bits outside 2 … 8.

    Example:
        >>> apot_levels(3).tolist()
        [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """
    if not 2 <= bits <= MAX_BITS:
        raise InputError(f"{bits} bits: the APoT grid takes 2 to {MAX_BITS} bits")
    n, odd = divmod(bits - 1, 2)
    terms = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)] for i in range(n)]
    terms += [[0.0, 2.0 ** -(2 * n)]] if odd else []
    sums = {sum(choice) for choice in product(*terms)} - {0.0}
    return _symmetric([each / max(sums) for each in sums])


LEVELS: dict[str, Callable[[int], Tensor]] = {"power_of_two": power_of_two_levels, "apot": apot_levels}
"""Fixed grids by name: bits → levels, rising, from −1 to 1."""


def share_levels(
    weight: Tensor,
    levels: Tensor,
    granularity: Literal["tensor", "channel"] = "tensor",
    *,
    channels: int = 1,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace weights by indices into a fixed grid times the scale that leaves the least squared error.

    Forty scales up to the largest magnitude are tried for each codebook and the best one refined by
    least squares, s = Σ w·t / Σ t², in turn with the assignment.

    Args:
        weight: any shape, outputs first.
        levels: (k,), rising, −1 to 1 (see ``LEVELS``).
        granularity: one scale for the tensor, or one for each run of ``channels`` outputs.
        channels: how many neighbouring outputs share a scale.
        importance: weight of each squared error, the shape of ``weight``.

    Returns:
        Indices, uint8, the shape of ``weight``; codebooks (G, k), multiples of ``levels``.
    """
    rows, worth = _checked(_book_rows(weight, granularity, channels), importance)
    ordered, grid = sort_rows(rows, worth), levels.double().cpu()
    top = rows.abs().amax(1, keepdim=True)
    best = torch.where(top > 0, top, 1.0)
    least = torch.full_like(best, torch.inf)
    for share in torch.linspace(0.025, 1.0, 40).tolist():
        scale = share * torch.where(top > 0, top, 1.0)
        for _ in range(4):
            error, fitted = _scale_error(ordered, grid, scale)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            scale = torch.where(fitted > 0, fitted, scale)
    codebook = (best * grid).to(weight.dtype)
    return _nearest_rows(rows, codebook).reshape(weight.shape).to(weight.device), codebook.to(weight.device)


def project(rows: Tensor, scale: Tensor, levels: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Put rows on the nearest of ``scale · levels`` in training, with the gradient of a learned step (LSQ, APoT).

    With ``v = w / scale`` and ``p`` the level next to it, ``d out / d w`` is 1 where |v| ≤ 1, else 0, and
    ``d out / d scale`` is ``p - v`` inside, ±1 outside. Li et al. 2020 (APoT), arXiv:1909.13144, §2.3; Esser et al.
    2020 (LSQ), arXiv:1902.08153.

    Args:
        rows: (G, n).
        scale: (G, 1), above 0.
        levels: (k,), rising, −1 to 1.
        grad_scale: factor on the gradient of the scale.

    Returns:
        (G, n).
    """
    scale = scale * grad_scale + (scale * (1 - grad_scale)).detach()
    inside = (rows / scale).clamp(-1, 1)
    found = levels[nearest(inside.detach(), levels).long()]
    return (inside + (found - inside).detach()) * scale


def ternary_book(
    weight: Tensor, granularity: Literal["tensor", "channel"] = "tensor", threshold: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Replace weights by indices into −Wn, 0 and Wp: the means of what lies beyond ±threshold · mean|w|.

    The start of trained ternary quantization (TTQ, Zhu et al. 2017, arXiv:1612.01064) at the threshold of TWN
    (Li et al. 2016, arXiv:1605.04711).

    Returns:
        Indices 0 to 2, uint8, the shape of ``weight``; codebooks (G, 3), rising.
    """
    rows, _ = _checked(_book_rows(weight, granularity, 1), None)
    limit = threshold * rows.abs().mean(1, keepdim=True)
    signs = (rows > limit).int() - (rows < -limit).int()
    ends = [(rows.abs() * (signs == sign)).sum(1) / (signs == sign).sum(1).clamp_min(1) for sign in (-1, 1)]
    books = torch.stack([-ends[0], torch.zeros_like(ends[0]), ends[1]], dim=1).to(weight.dtype)
    return (signs + 1).to(torch.uint8).reshape(weight.shape).to(weight.device), books.to(weight.device)


def _scale_error(ordered: SortedRows, grid: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The error of the grid (k,) at scales (G, 1), and the scales that fit its assignment best, both (G, 1)."""
    levels = scale * grid
    mass, first, second = interval_sums(ordered, bounds_of(ordered, levels))
    away = levels - ordered.centre
    error = (second - 2 * away * first + away.square() * mass).sum(1, keepdim=True)
    energy = (mass * grid.square()).sum(1, keepdim=True)
    moment = ((first + ordered.centre * mass) * grid).sum(1, keepdim=True)
    return error, moment / torch.where(energy > 0, energy, 1.0)


def _symmetric(positive: list[float]) -> Tensor:
    ordered = sorted(positive)
    return torch.tensor([-level for level in reversed(ordered)] + [0.0] + ordered)


def _book_rows(weight: Tensor, granularity: str, channels: int) -> Tensor:
    if granularity == "tensor":
        return weight.reshape(1, -1)
    if channels < 1 or weight.shape[0] % channels:
        fits = ", ".join(str(n) for n in range(1, weight.shape[0] + 1) if weight.shape[0] % n == 0)
        raise InputError(f"{channels} channels for a codebook do not divide {weight.shape[0]}; use {fits}")
    return weight.reshape(weight.shape[0] // channels, -1)


def _checked(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and importance as float64 (G, n) on the CPU, or an InputError."""
    if not rows.numel():
        raise InputError("a codebook needs at least one value")
    if not torch.isfinite(rows).all():
        raise InputError("NaN or infinity among the weights; no codebook can hold them")
    if weights is None:
        return rows.double().cpu(), torch.ones(rows.shape, dtype=torch.float64)
    if weights.numel() != rows.numel():
        raise InputError(f"{weights.numel()} importances for {rows.numel()} weights")
    if not torch.isfinite(weights).all() or (weights < 0).any():
        raise InputError("importances must be finite and not negative; clamp the Hessian's diagonal at 0")
    return rows.double().cpu(), weights.reshape(rows.shape).double().cpu()


def _distinct(rows: Tensor) -> Tensor:
    return (rows.sort(1).values.diff(dim=1) > 0).sum(1) + 1


def _enough(rows: Tensor, k: int) -> None:
    if not 1 <= k <= 2**MAX_BITS:
        raise InputError(f"{k} centroids: expected 1 to {2**MAX_BITS}")
    found = int(_distinct(rows)[0])
    if found < k:
        raise InputError(f"{k} centroids but only {found} distinct weights; use at most {found} centroids")


def _nearest_rows(rows: Tensor, books: Tensor) -> Tensor:
    levels = books.double()
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(edges.contiguous(), rows.double().contiguous(), right=True).to(torch.uint8)


def _start(ordered: SortedRows, k: int, start: Start, generator: torch.Generator | None) -> Tensor:
    if start == "exact":
        return kmeans.optimal(ordered, k, 4096 if len(ordered.values) == 1 else 1024)
    if start == "random":
        return kmeans.random(ordered, k, generator)
    if start not in ("linear", "density"):
        raise InputError(f"start {start!r} is unknown; use linear, density, random or exact")
    return kmeans.linear(ordered, k) if start == "linear" else kmeans.density(ordered, k)
