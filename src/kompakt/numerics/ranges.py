"""Ranges for quantization: histograms that stream over batches, and the estimators that read them.

A histogram's bins are ``[k, k + 1) · 2^exponent`` for whole ``k``. The width only ever doubles, and two old
bins fall into one new bin exactly, so streaming in any order equals one pass, with no interpolation.

References: Nagel et al. 2021 (white paper), arXiv 2106.08295; Migacz 2017, "8-bit Inference with TensorRT"
(entropy); Choukroun et al. 2019, arXiv 1902.06822 (mean squared error); Jacob et al. 2018, arXiv 1712.05877
(moving averages).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor, frexp, ldexp

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.grid import affine_params, fake_quantize, param_shape, rows
from kompakt.numerics.lattice import lattice
from kompakt.spec import PerChannel, QuantSpec

BINS = 2048
FINEST = 20
"""Bins are no narrower than the largest magnitude · 2^-FINEST."""

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How the values of a tensor are distributed, over all batches seen.

    Args:
        counts: values in each bin, float64, ``(bins,)`` or ``(channels, bins)``.
        zeros: values that are exactly 0, ``()`` or ``(channels,)``; they are in ``counts`` too.
        start: number of the first bin.
        exponent: the bins are ``2^exponent`` wide.
        minimum: exact smallest value, float32, ``()`` or ``(channels,)``.
        maximum: exact largest value.
        low_sum: sum of the smallest values of the batches, float64.
        high_sum: sum of the largest values of the batches.
        batches: number of batches.
    """

    counts: Tensor
    zeros: Tensor
    start: int
    exponent: int
    minimum: Tensor
    maximum: Tensor
    low_sum: Tensor
    high_sum: Tensor
    batches: int = 1

    @property
    def bins(self) -> int:
        """The number of bins."""
        return self.counts.shape[-1]

    @property
    def low(self) -> float:
        """Left edge of the first bin."""
        return self.start * 2.0**self.exponent

    @property
    def high(self) -> float:
        """Right edge of the last bin."""
        return (self.start + self.bins) * 2.0**self.exponent

    @property
    def edges(self) -> Tensor:
        """The ``bins + 1`` edges, float64."""
        return (self.start + torch.arange(self.bins + 1, dtype=torch.float64)) * 2.0**self.exponent

    @property
    def total(self) -> Tensor:
        """The number of values, ``()`` or ``(channels,)``."""
        return self.counts.sum(-1)

    @property
    def channels(self) -> tuple["Histogram", ...]:
        """One histogram for each channel; only itself where there are no channels."""
        if self.counts.ndim == 1:
            return (self,)
        names = ("counts", "zeros", "minimum", "maximum", "low_sum", "high_sum")
        parts = zip(*(getattr(self, name) for name in names), strict=True)
        return tuple(replace(self, **dict(zip(names, part, strict=True))) for part in parts)

    @staticmethod
    def of(x: Tensor, bins: int = BINS, axis: int | None = None) -> "Histogram":
        """Count the values of one batch, each index of ``axis`` for itself where it is given.

        Raises:
            InputError: ``x`` is empty or holds NaN or infinities.
        """
        values = (x.detach() if axis is None else rows(x.detach(), PerChannel(axis=axis))).float()
        values = values.reshape(-1, values.shape[-1]) if axis is not None else values.reshape(1, -1)
        if not values.numel():
            raise InputError(f"tensor of shape {tuple(x.shape)} is empty; calibrate with at least one value")
        minimum, maximum = values.aminmax(dim=1)
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise InputError("activation holds NaN or infinite values; look for overflow in the float model")
        exponent = _exponent(float(minimum.min()), float(maximum.max()), bins)
        start = _bin(float(minimum.min()), exponent)
        index = torch.floor(values * 2.0**-exponent).sub_(start).to(torch.int32)
        index += bins * torch.arange(len(values), dtype=torch.int32, device=index.device)[:, None]
        counts = torch.bincount(index.flatten(), minlength=bins * len(values)).view(-1, bins).double().cpu()
        zeros = (values == 0).sum(1).double().cpu()
        minimum, maximum = minimum.cpu(), maximum.cpu()
        facts = (counts, zeros, minimum, maximum, minimum.double(), maximum.double())
        counts, zeros, minimum, maximum, lows, highs = facts if axis is not None else (fact[0] for fact in facts)
        return Histogram(
            counts=counts,
            zeros=zeros,
            start=start,
            exponent=exponent,
            minimum=minimum,
            maximum=maximum,
            low_sum=lows,
            high_sum=highs,
        )


def _bin(value: float, exponent: int) -> int:
    return floor(ldexp(value, -exponent))


def _exponent(minimum: float, maximum: float, bins: int) -> int:
    """Find the narrowest bins, as a power of two, of which ``bins`` reach from minimum to maximum."""
    largest = max(abs(minimum), abs(maximum))
    exponent = max(frexp(largest)[1] - FINEST, -126) if largest else -126
    while _bin(maximum, exponent) - _bin(minimum, exponent) >= bins:
        exponent += 1
    return exponent


def merge(a: Histogram, b: Histogram) -> Histogram:
    """Add two histograms; the same as one histogram of both data, whatever the order.

    Raises:
        InputError: they differ in the number of bins or channels.
    """
    if a.counts.shape != b.counts.shape:
        raise InputError(f"histograms of {tuple(a.counts.shape)} and {tuple(b.counts.shape)} bins cannot be merged")
    minimum, maximum = torch.minimum(a.minimum, b.minimum), torch.maximum(a.maximum, b.maximum)
    lowest, highest = float(minimum.min()), float(maximum.max())
    exponent = max(a.exponent, b.exponent, _exponent(lowest, highest, a.bins))
    start = _bin(lowest, exponent)
    return Histogram(
        counts=_placed(a, start, exponent) + _placed(b, start, exponent),
        zeros=a.zeros + b.zeros,
        start=start,
        exponent=exponent,
        minimum=minimum,
        maximum=maximum,
        low_sum=a.low_sum + b.low_sum,
        high_sum=a.high_sum + b.high_sum,
        batches=a.batches + b.batches,
    )


def _placed(h: Histogram, start: int, exponent: int) -> Tensor:
    """Counts of ``h`` on wider bins; what the clamp moves is empty."""
    if (start, exponent) == (h.start, h.exponent):
        return h.counts
    index = (h.start + torch.arange(h.bins)) >> min(exponent - h.exponent, 62)
    return torch.zeros_like(h.counts).index_add_(-1, (index - start).clamp(0, h.bins - 1), h.counts)


def update(h: Histogram | None, x: Tensor, bins: int = BINS, axis: int | None = None) -> Histogram:
    """Add one batch to a histogram, or start one."""
    return Histogram.of(x, bins, axis) if h is None else merge(h, Histogram.of(x, h.bins, axis))


def minmax(h: Histogram, spec: QuantSpec) -> Range:
    """Return the exact smallest and largest value."""
    return h.minimum, h.maximum


def moving(h: Histogram, spec: QuantSpec) -> Range:
    """Return the mean, over the batches, of their smallest and of their largest value.

    What an exponential moving average (Jacob et al. 2018) estimates, free of the batches' order.
    """
    return (h.low_sum / h.batches).float(), (h.high_sum / h.batches).float()


def percentile(h: Histogram, spec: QuantSpec, percent: float = 99.99) -> Range:
    """Return the range that holds ``percent`` of the values, up to one bin: half of the rest cut at each end.

    For symmetric integers the share is of the magnitudes.
    """
    return _by_channel(h, lambda one: _percentile(one, spec, percent))


def _percentile(h: Histogram, spec: QuantSpec, percent: float) -> Range:
    if spec.symmetric:
        middles = (h.edges[:-1] + h.edges[1:]).abs()
        order = middles.argsort()
        share = h.counts[order].cumsum(0) / h.total
        place = int(torch.searchsorted(share, percent / 100).clamp(max=h.bins - 1))
        limit = (middles[order][place] / 2 + 2.0 ** (h.exponent - 1)).float()
        return torch.maximum(-limit, h.minimum), torch.minimum(limit, h.maximum)
    share, tail = h.counts.cumsum(0) / h.total, (100 - percent) / 200
    first = int(torch.searchsorted(share, tail, right=True).clamp(max=h.bins - 1))
    last = int(torch.searchsorted(share, 1 - tail).clamp(max=h.bins - 1))
    return torch.maximum(h.edges[first].float(), h.minimum), torch.minimum(h.edges[last + 1].float(), h.maximum)


def mse(h: Histogram, spec: QuantSpec, candidates: int = 100) -> Range:
    """Return the range with the least expected squared error, rounding and clipping together.

    Both ends are shrunk together, then, for affine integers, each end for itself. The error of a candidate
    is exact for values that are uniform within their bin and for those that are exactly 0, see
    ``expected_error``. Never worse than ``minmax`` on the histogram. (Choukroun et al. 2019; Nagel et al. 2021, §3.1.)
    """
    return _by_channel(h, lambda one: _mse(one, spec, candidates))


def _mse(h: Histogram, spec: QuantSpec, candidates: int) -> Range:
    least, most = h.minimum.clamp(max=0), h.maximum.clamp(min=0)
    shrink = torch.linspace(1, 1 / candidates, candidates)
    fine = 1 + torch.linspace(1, -1, 21) / candidates

    def best(lows: Tensor, highs: Tensor) -> Range:
        lows, highs = torch.maximum(lows, least), torch.minimum(highs, most)
        place = int(expected_error(h, lows, highs, spec).argmin())
        return lows[place], highs[place]

    low, high = best(least * shrink, most * shrink)
    if not spec.symmetric and low < 0 < high:
        low, high = best(low.expand(candidates), most * shrink)
        low, high = best(least * shrink, high.expand(candidates))
    return best(torch.cat([low[None], low * fine]), torch.cat([high[None], high * fine]))


def expected_error(h: Histogram, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the mean squared error of quantization for many ranges at once.

    In units of the scale ``s`` the squared error integrates to ``G(v) = n / 12 + (v - n)³ / 3``, with
    ``n = clamp(round(v))``; a bin of density ``d`` from ``a`` to ``b`` adds ``d · s³ · (G(b/s) - G(a/s))``.

    Args:
        h: histogram without channels.
        low: ``(candidates,)``.
        high: ``(candidates,)``.
        spec: the integers.

    Returns:
        float64, ``(candidates,)``.
    """
    scale, zero_point = affine_params(low, high, spec)
    scale, zero_point = scale.double()[:, None], zero_point.double()[:, None]
    value = h.edges / scale
    nearest = (value.round() + zero_point).clamp_(spec.qmin, spec.qmax).sub_(zero_point)
    integral = (value - nearest).pow_(3).div_(3).add_(nearest, alpha=1 / 12)
    # Sum by parts: one product with the steps of the density instead of a difference for each bin.
    density = torch.nn.functional.pad(_without_zeros(h), (1, 1))
    steps = (density[:-1] - density[1:]) * 2.0**-h.exponent
    return (integral @ steps) * scale[:, 0] ** 3 / h.total


def _without_zeros(h: Histogram) -> Tensor:
    counts = h.counts.clone()
    if 0 <= -h.start < h.bins:
        counts[-h.start] -= h.zeros
    return counts


def kl(h: Histogram, spec: QuantSpec, candidates: int = 128) -> Range:
    """Return the range with the least entropy from the clipped distribution to its quantized one.

    Migacz 2017: for a candidate range, ``P`` is the histogram inside it with the outliers added to its ends;
    ``Q`` spreads the mass of each of the ``2^bits`` levels evenly over the bins that are not empty in it;
    the candidate with the least ``Σ P log(P / Q)`` wins. Exact zeros, which cost nothing, are left out.
    """
    return _by_channel(h, lambda one: _kl(one, spec, candidates))


def _kl(h: Histogram, spec: QuantSpec, candidates: int) -> Range:
    low, high = float(h.minimum.clamp(max=0)), float(h.maximum.clamp(min=0))
    if spec.symmetric:
        low, high = -max(-low, high), max(-low, high)
    levels, counts, width = spec.qmax - spec.qmin + 1, _without_zeros(h), 2.0**h.exponent
    narrowest = max(levels, h.bins // 16) * width / (high - low) if high > low else 1
    if narrowest >= 1 or not bool(counts.sum() > 0):
        return h.minimum, h.maximum
    shrink = torch.linspace(narrowest, 1, candidates, dtype=torch.float64)[:, None]
    middles = ((h.edges[:-1] + h.edges[1:]) / 2).clamp(float(h.minimum), float(h.maximum))
    place = int(_divergence(counts, middles, low * shrink, high * shrink, levels).argmin())
    chosen = float(shrink[place])
    ends = torch.tensor([low * chosen, high * chosen])
    return torch.maximum(ends[0], h.minimum), torch.minimum(ends[1], h.maximum)


def _divergence(counts: Tensor, middles: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Kullback–Leibler divergence for ranges ``low`` and ``high``, ``(candidates, 1)`` each.

    Infinite for a range that loses more than half of the values: the outliers, piled on one bin, would match.
    """
    below, above = middles < low, middles > high
    inside = ~(below | above)
    index = ((middles - low) / (high - low) * levels).floor_().clamp_(0, levels - 1).long()
    kept, full = counts * inside, (counts > 0) * inside.double()
    empty = torch.zeros(len(low), levels, dtype=torch.float64)
    mass, places = empty.scatter_add(1, index, kept), empty.scatter_add(1, index, full)
    spread = (mass / places.clamp(min=1)).gather(1, index) * full
    # The outliers join the outermost bins of the range, as Migacz has it.
    outer = torch.stack([(counts * below).sum(1), (counts * above).sum(1)], dim=1)
    first = below.sum(1).clamp(max=len(middles) - 1)
    last = (~above).sum(1).sub(1).clamp(min=0)
    p = kept.scatter_add(1, torch.stack([first, last], dim=1), outer)
    p, q = p / p.sum(1, keepdim=True), spread / spread.sum(1, keepdim=True).clamp(min=1)
    divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(1)
    return torch.where(kept.sum(1) < counts.sum() / 2, torch.inf, divergence)


def _by_channel(h: Histogram, one: Callable[[Histogram], Range]) -> Range:
    if h.counts.ndim == 1:
        return one(h)
    lows, highs = zip(*(one(channel) for channel in h.channels), strict=True)
    return torch.stack(lows), torch.stack(highs)


ESTIMATORS: dict[str, Callable[[Histogram, QuantSpec], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "kl": kl,
    "moving": moving,
}


WEIGHT_RANGES = ("minmax", "mse", "lattice")


def weight_range(w: Tensor, spec: QuantSpec, estimator: str = "minmax") -> Range:
    """Find the range of a weight, exactly, from its values.

    ``mse`` shrinks the exact range by 40 factors, then twice more finely around the best of each scale, and
    for affine integers does so for each end too. Never worse than ``minmax``. ``lattice`` keeps the steps of rows that
    lie on a grid already (``kompakt.numerics.lattice``), and is ``minmax`` for the others and for affine integers.

    Args:
        w: weight.
        spec: the integers and their granularity.
        estimator: ``minmax``, ``mse`` or ``lattice``.

    Returns:
        Low and high ends, float32, of the shape of the scale.

    Raises:
        InputError: the estimator is none of them.
    """
    if estimator not in WEIGHT_RANGES:
        raise InputError(f"{estimator}: weights take the range estimators {', '.join(WEIGHT_RANGES)}")
    shape, flat = param_shape(tuple(w.shape), spec.granularity), rows(w.detach().float(), spec.granularity)
    low, high = flat.aminmax(dim=1)
    if estimator == "mse":
        low, high = _shrunk(flat, low.clamp(max=0), high.clamp(min=0), spec)
    if estimator == "lattice" and spec.symmetric and spec.signed:
        low, high = _kept(flat, low, high, spec)
    return low.reshape(shape), high.reshape(shape)


def _kept(flat: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
    """Give rows on a grid the range whose scale is their step."""
    step = lattice(flat, spec.qmax)
    on = step > 0
    return torch.where(on, step * spec.qmin, low), torch.where(on, step * spec.qmax, high)


def _shrunk(flat: Tensor, least: Tensor, most: Tensor, spec: QuantSpec) -> Range:
    """Search factors of both ends together, then of each end, for every row by itself."""
    by_row = replace(spec, granularity=PerChannel())
    low_factor = high_factor = torch.ones_like(least)
    error = _row_error(flat, least, most, by_row)
    moves = [(True, True)] if spec.symmetric else [(True, True), (False, True), (True, False)]
    for move_low, move_high in moves:
        for reach in (_COARSE, _FINER, _FINEST):
            centre = 1.0 if reach is _COARSE else low_factor if move_low else high_factor
            for shift in reach:
                factor = (centre + torch.full_like(least, shift)).clamp(0.01, 1)
                lows, highs = factor if move_low else low_factor, factor if move_high else high_factor
                found = _row_error(flat, least * lows, most * highs, by_row)
                better = found < error
                error = torch.where(better, found, error)
                low_factor, high_factor = torch.where(better, lows, low_factor), torch.where(better, highs, high_factor)
    return least * low_factor, most * high_factor


_COARSE = tuple(-step / 41 for step in range(1, 41))
_FINER = tuple(step / 246 for step in range(-5, 6) if step)
_FINEST = tuple(step / 1476 for step in range(-5, 6) if step)


def _row_error(flat: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero_point = affine_params(low, high, spec)
    return fake_quantize(flat, scale, zero_point, spec).sub_(flat).square_().sum(1)
