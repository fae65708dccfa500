"""K-means on the line, for many rows at once: Lloyd's steps and the exact optimum.

On the line, clusters are intervals of the sorted values, and prefix sums give any interval's mean and
error at once: Lloyd's step is a binary search, and the optimum a dynamic program. All of it runs on
rows, (G, n) values for G codebooks, so that a layer's channels are clustered together.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 2**25  # entries of the dynamic program's table that are held at once


class SortedRows(NamedTuple):
    """Rows of values in rising order, (G, n), with prefix sums of weights, w·x and w·x², (G, n + 1).

    The sums are taken of x less ``centre``, (G, 1), the row's mean, so that differences keep their digits.
    """

    values: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    centre: Tensor


def sort_rows(rows: Tensor, weights: Tensor) -> SortedRows:
    """Sort float64 rows (G, n) and sum them up, each value with its weight."""
    values, order = rows.sort(1)
    mass = weights.gather(1, order)
    centre = values.mean(1, keepdim=True)
    x = values - centre
    mass_sum, first, second = (pad(each.cumsum(1), (1, 0)) for each in (mass, mass * x, mass * x * x))
    return SortedRows(values, mass_sum, first, second, centre)


def lloyd(ordered: SortedRows, centroids: Tensor, iterations: int = 100) -> Tensor:
    """Move the centroids (G, k), rising, to their clusters' means until nothing changes, or ``iterations`` times."""
    before = None
    for _ in range(iterations):
        bounds = bounds_of(ordered, centroids)
        if before is not None and torch.equal(bounds, before):
            break
        centroids, before = _means(ordered, bounds, centroids), bounds
    return centroids


def bounds_of(ordered: SortedRows, levels: Tensor) -> Tensor:
    """Return where each level's nearest values begin and end in the sorted rows: (G, k) rising → (G, k + 1)."""
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    cuts = torch.searchsorted(ordered.values, edges.contiguous())
    return pad(pad(cuts, (1, 0)), (0, 1), value=ordered.values.shape[1])


def interval_sums(ordered: SortedRows, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σw, Σw(x − centre) and Σw(x − centre)² of each interval: (G, k + 1) → three (G, k)."""
    mass, first, second = (each.gather(1, bounds).diff(dim=1) for each in ordered[1:4])
    return mass, first, second


def _means(ordered: SortedRows, bounds: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each interval, or ``otherwise`` (G, k) where it has no weight."""
    mass, first, _ = interval_sums(ordered, bounds)
    means = ordered.centre + first / torch.where(mass > 0, mass, 1.0)
    return torch.where(mass > 0, means, otherwise).sort(1).values


def linear(ordered: SortedRows, k: int) -> Tensor:
    """Place centroids at equal steps between the extremes: (G, k)."""
    places = torch.linspace(0, 1, k, dtype=torch.float64) if k > 1 else torch.full((1,), 0.5, dtype=torch.float64)
    return ordered.values[:, :1] + (ordered.values[:, -1:] - ordered.values[:, :1]) * places


def density(ordered: SortedRows, k: int) -> Tensor:
    """Place centroids at equal steps of the weighted distribution function: (G, k)."""
    targets = ordered.mass[:, -1:] * ((torch.arange(k, dtype=torch.float64) + 0.5) / k)
    places = torch.searchsorted(ordered.mass[:, 1:].contiguous(), targets)
    return ordered.values.gather(1, places.clamp_max(ordered.values.shape[1] - 1))


def random(ordered: SortedRows, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Place centroids at distinct values drawn at random: (G, k)."""
    keys = torch.rand(ordered.values.shape, generator=generator)
    keys[:, 1:][ordered.values.diff(dim=1) == 0] = -1  # of equal values one may be drawn
    return ordered.values.gather(1, keys.topk(k, dim=1).indices).sort(1).values


def optimal(ordered: SortedRows, k: int, bins: int) -> Tensor:
    """Find the centroids of the least error among clusters that end at one of ``bins`` places: (G, k).

    With no more than ``bins`` values a row every place is allowed, and the result is the optimum.
    """
    places = _places(ordered.values, bins)
    sums = np.stack([each.gather(1, places).numpy() for each in ordered[1:4]])
    step = max(1, CHUNK // (k * places.shape[1]))
    chunks = [_dynamic_program(sums[:, i : i + step], k) for i in range(0, len(places), step)]
    bounds = places.gather(1, torch.from_numpy(np.concatenate(chunks)))
    at = bounds[:, 1:].clamp(max=ordered.values.shape[1]) - 1
    return _means(ordered, bounds, ordered.values.gather(1, at.clamp_min(0)))


def _places(values: Tensor, bins: int) -> Tensor:
    """Positions 0 … n at which a cluster may end: all of them, or ``bins`` + 1."""
    size = values.shape[1]
    if size <= bins:
        return torch.arange(size + 1).repeat(len(values), 1)
    half = torch.linspace(0, 1, bins // 2 + 1, dtype=values.dtype)
    by_value = torch.searchsorted(values, values[:, :1] + (values[:, -1:] - values[:, :1]) * half[:-1])
    by_number = (half * size).round().long().repeat(len(values), 1)
    return torch.cat([by_value, by_number], dim=1).sort(1).values


def _dynamic_program(sums: Array, k: int) -> Array:
    """The bounds (G, k + 1) of the best k intervals, from the prefix sums at the allowed places (3, G, N + 1)."""
    _, rows, places = sums.shape
    every = np.broadcast_to(np.arange(places), (rows, places))
    error = _error(sums - sums[:, :, :1])
    cut = np.zeros((k, rows, places), dtype=np.int32)
    for clusters in range(1, k):
        error, cut[clusters] = _monotone_minima(error, sums, every)
    bounds = np.full((rows, k + 1), places - 1, dtype=np.int64)
    bounds[:, 0] = 0
    for clusters in range(k - 1, 0, -1):
        bounds[:, clusters] = cut[clusters][np.arange(rows), bounds[:, clusters + 1]]
    return bounds


def _monotone_minima(before: Array, sums: Array, every: Array) -> tuple[Array, Array]:
    """For every j the least of before[i] + error(i, j) over i ≤ j, and its i, which never falls as j grows.

    Solved for j at ever finer steps; each j searches only between the answers of its neighbours.
    """
    least, where = before.copy(), np.zeros(before.shape, dtype=np.int64)
    last = before.shape[1] - 1
    step = 1 << max(last.bit_length() - 1, 0)
    while step and last:
        j = every[:, step :: 2 * step]
        low = where[:, 0 : last + 1 - step : 2 * step]
        after = np.minimum(j[0] + step, last)
        high = np.where(j + step <= last, where[:, after], j)
        high = np.maximum(np.minimum(high, j), low)
        least[:, j[0]], where[:, j[0]] = _least_between(before, sums, j, low, high)
        step //= 2
    return least, where


def _least_between(before: Array, sums: Array, j: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The least of before[i] + error(i, j) over low ≤ i ≤ high for each (row, j), and the first such i."""
    lengths = (high - low + 1).ravel()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    row = np.arange(len(before))[:, None] * before.shape[1]
    i = np.arange(int(lengths.sum())) + np.repeat(low.ravel() - starts, lengths)
    flat = i + np.repeat(np.broadcast_to(row, j.shape).ravel(), lengths)
    ends = (j + row).ravel()
    flattened = sums.reshape(3, -1)
    spans = np.repeat(flattened[:, ends], lengths, axis=1) - flattened[:, flat]
    total = before.ravel()[flat] + _error(spans)
    least = np.minimum.reduceat(total, starts)
    first = np.minimum.reduceat(np.where(total == np.repeat(least, lengths), i, before.shape[1]), starts)
    return least.reshape(j.shape), first.reshape(j.shape)


def _error(spans: Array) -> Array:
    """Σw(x − mean)² of intervals with the given sums of w, w·x and w·x²."""
    mass, first, second = spans
    return np.maximum(second - first * first / np.where(mass > 0, mass, np.inf), 0.0)
