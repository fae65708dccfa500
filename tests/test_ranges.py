"""Laws of ranges: streaming equals one pass, clipping never worse than the whole range, entropy, exact weights."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.grid import affine_params, fake_quantize, param_shape
from kompakt.numerics.ranges import (
    ESTIMATORS,
    Histogram,
    expected_error,
    kl,
    merge,
    minmax,
    moving,
    mse,
    percentile,
    update,
    weight_range,
)
from kompakt.spec import PerChannel, PerGroup, PerTensor, QuantSpec

ACTIVATION = QuantSpec(signed=False, symmetric=False)


def sample(name: str, count: int = 15_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    heavy = normal / torch.rand(count, generator=generator).clamp(min=0.02)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "heavy": heavy,
        "skew": normal.exp() - 1,
        "offset": 100 + normal,
        "negative": -heavy.abs() - 3,
        "sparse": heavy * (normal > 1.5),
        "constant": torch.full((count,), 2.5),
        "zero": torch.zeros(count),
        "tiny": normal * 1e-30,
        "large": normal * 1e30,
        "outlier": torch.cat([normal, torch.tensor([500.0])]),
    }[name]


SAMPLES = (
    *("normal", "relu", "heavy", "skew", "offset", "negative"),
    *("sparse", "constant", "zero", "tiny", "large", "outlier"),
)
SPECS = [
    QuantSpec(bits=bits, signed=signed, symmetric=symmetric)
    for bits, (signed, symmetric) in itertools.product((2, 4, 8), ((True, True), (False, False), (False, True)))
]


def same(a: Histogram, b: Histogram) -> bool:
    exact = ("counts", "zeros", "minimum", "maximum")
    return (a.start, a.exponent, a.batches) == (b.start, b.exponent, b.batches) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in exact
    )


def error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    scale, zero_point = affine_params(low, high, spec)
    return float((fake_quantize(x, scale, zero_point, spec).double() - x.double()).square().mean())


@pytest.mark.parametrize("name", SAMPLES)
def test_bins_hold_the_values_that_lie_in_them(name: str) -> None:
    x = sample(name)
    h = Histogram.of(x, bins=256)
    expected, _ = np.histogram(x.double().numpy(), bins=np.append(h.edges.numpy()[:-1], np.inf))
    np.testing.assert_array_equal(h.counts.numpy(), expected)
    assert h.low <= float(x.min()) == float(h.minimum)
    assert float(h.maximum) == float(x.max()) <= h.high
    assert float(h.total) == x.numel()
    assert float(h.zeros) == int((x == 0).sum())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("axis", [None, 0])
def test_streaming_in_any_order_equals_one_pass(name: str, axis: int | None) -> None:
    x = sample(name)[:15_000].view(3, -1)
    batches = [*x.sort(dim=1).values.split(977, dim=1)]
    whole = Histogram.of(torch.cat(batches, dim=1), bins=128, axis=axis)
    for order in (batches, batches[::-1]):
        h: Histogram | None = None
        for batch in order:
            h = update(h, batch, bins=128, axis=axis)
        assert h is not None
        assert h.batches == len(batches)
        assert same(h, Histogram(**{**vars(whole), "batches": h.batches}))


def test_merge_is_associative_and_commutative() -> None:
    a, b, c = (Histogram.of(sample(name), bins=64) for name in ("relu", "negative", "skew"))
    assert same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert same(merge(a, b), merge(b, a))
    with pytest.raises(InputError, match="cannot be merged"):
        merge(a, Histogram.of(sample("relu"), bins=32))


def test_channels_are_counted_apart() -> None:
    x = torch.stack([sample("normal"), sample("skew"), sample("zero")]).view(3, 10, -1)
    h = Histogram.of(x.movedim(0, 1), bins=512, axis=1)
    assert h.counts.shape == (3, 512)
    for one, channel in zip(h.channels, x, strict=True):
        alone = Histogram.of(channel, bins=512)
        assert float(one.total) == float(alone.total)
        assert torch.equal(one.minimum, alone.minimum)
        low, high = mse(one, ACTIVATION)
        assert error(channel, low, high, ACTIVATION) <= error(channel, *minmax(alone, ACTIVATION), ACTIVATION)
    low, high = mse(h, ACTIVATION)
    assert low.shape == high.shape == (3,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        Histogram.of(torch.tensor([0.0, bad]))
    with pytest.raises(InputError, match="is empty"):
        Histogram.of(torch.zeros(0, 3))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_finite_and_within_the_values(name: str, estimator: str) -> None:
    x = sample(name)
    h = Histogram.of(x, bins=512)
    for spec in SPECS[::3]:
        low, high = ESTIMATORS[estimator](h, spec)
        assert low.dtype == high.dtype == torch.float32
        assert low.shape == high.shape == ()
        assert min(float(x.min()), 0) <= float(low) <= float(high) <= max(float(x.max()), 0)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in ("constant", "zero")])
def test_mse_is_never_worse_than_the_other_estimators(name: str) -> None:
    x = sample(name)
    h = Histogram.of(x)
    for spec in SPECS[::2]:
        best = error(x, *mse(h, spec), spec)
        for estimator in ("minmax", "percentile", "kl", "moving"):
            assert best <= error(x, *ESTIMATORS[estimator](h, spec), spec) * 1.01, (spec, estimator)


@pytest.mark.parametrize("name", ["normal", "relu", "heavy", "skew", "sparse", "outlier"])
def test_expected_error_equals_the_error_of_the_values(name: str) -> None:
    x = sample(name, count=60_000)
    h = Histogram.of(x)
    shares = torch.tensor([1.0, 0.7, 0.3])
    for spec in SPECS:
        expected = expected_error(h, h.minimum * shares, h.maximum * shares, spec)
        for share, value in zip(shares, expected, strict=True):
            truth = error(x, h.minimum * share, h.maximum * share, spec)
            assert float(value) == pytest.approx(truth, rel=0.03)


def test_mse_finds_the_known_optimum_of_a_gaussian() -> None:
    """Banner et al. 2019 (arXiv 1810.05723), table of optimal clipping: 2.83 σ at 4 bits, 3.92 σ at 8 bits."""
    h = Histogram.of(sample("normal", count=1_000_000))
    assert float(mse(h, QuantSpec(bits=4, symmetric=False))[1]) == pytest.approx(2.55, abs=0.2)
    assert float(mse(h, QuantSpec(bits=8, symmetric=False))[1]) == pytest.approx(3.92, abs=0.4)


def test_more_bits_clip_less() -> None:
    h = Histogram.of(sample("heavy"))
    for estimator in ("mse", "kl"):
        highs = [float(ESTIMATORS[estimator](h, QuantSpec(bits=bits))[1]) for bits in (2, 4, 6, 8)]
        assert highs == sorted(highs), estimator


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["normal", "heavy", "skew", "relu"])
def test_percentile_holds_its_share(name: str, symmetric: bool) -> None:
    x = sample(name)
    h = Histogram.of(x)
    spec = QuantSpec(symmetric=symmetric, signed=symmetric)
    for percent in (90.0, 99.0, 99.9):
        low, high = percentile(h, spec, percent)
        assert float(((x >= low) & (x <= high)).double().mean()) >= percent / 100 - 1e-9
        width = 2 * 2.0**h.exponent
        narrower = ((x >= low + width) & (x <= high - width)).double().mean()
        assert float(narrower) < percent / 100 or symmetric or name == "relu"
    assert torch.equal(torch.stack(percentile(h, ACTIVATION, 100.0)), torch.stack(minmax(h, ACTIVATION)))


def test_moving_is_the_mean_of_the_batches_ends() -> None:
    batches = sample("normal").split(1000)
    h: Histogram | None = None
    for batch in batches:
        h = update(h, batch)
    assert h is not None
    low, high = moving(h, ACTIVATION)
    assert float(low) == pytest.approx(sum(float(b.min()) for b in batches) / len(batches), rel=1e-6)
    assert float(high) == pytest.approx(sum(float(b.max()) for b in batches) / len(batches), rel=1e-6)
    assert float(h.minimum) < float(low)


def entropy_reference(counts: np.ndarray, keep: int, levels: int) -> float:
    """Migacz 2017, in plain loops, for a histogram of positive values."""
    p = counts[:keep].astype(float)
    q, groups = np.zeros(keep), [[] for _ in range(levels)]
    for i in range(keep):
        groups[math.floor((i + 0.5) / keep * levels)].append(i)
    for group in groups:
        full = [i for i in group if p[i] > 0]
        for i in full:
            q[i] = sum(p[j] for j in group) / len(full)
    p[keep - 1] += counts[keep:].sum()
    p, q = p / p.sum(), q / q.sum()
    return sum(a * math.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)


def test_entropy_equals_the_loops_of_the_reference() -> None:
    x = sample("heavy").abs()
    h = Histogram.of(x, bins=512)
    spec, keeps = QuantSpec(bits=4, signed=False, symmetric=False), range(32, 513, 10)
    used = [k for k in keeps if k * 2.0**h.exponent <= float(h.maximum)]
    values = [entropy_reference(h.counts.numpy(), k, 16) for k in used]
    best = used[int(np.argmin(values))] * 2.0**h.exponent
    chosen = float(kl(h, spec)[1])
    reached = entropy_reference(h.counts.numpy(), round(chosen / 2.0**h.exponent), 16)
    assert reached <= min(values) * 1.05 + 1e-3
    assert chosen < 0.6 * float(h.maximum)
    assert best < 0.6 * float(h.maximum)


GRANULARITIES = (PerTensor(), PerChannel(axis=0), PerChannel(axis=1), PerGroup(size=18))


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(8, 6, 3, 3, generator=generator) / torch.rand(8, 6, 3, 3, generator=generator).clamp(min=0.1)
    return w * torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)


def weight_error(w: Tensor, spec: QuantSpec, estimator: str) -> Tensor:
    scale, zero_point = affine_params(*weight_range(w, spec, estimator), spec)
    return (fake_quantize(w, scale, zero_point, spec) - w).square().flatten(1).sum(1)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_mse_no_worse_than_minmax(
    granularity: PerTensor | PerChannel | PerGroup, bits: int, symmetric: bool
) -> None:
    w, spec = weight(), QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    low, high = weight_range(w, spec, "mse")
    assert low.shape == high.shape == param_shape(tuple(w.shape), granularity)
    least, most = weight_range(w, spec, "minmax")
    assert bool((low >= least.clamp(max=0)).all() and (high <= most.clamp(min=0)).all())
    assert float(weight_error(w, spec, "mse").sum()) <= float(weight_error(w, spec, "minmax").sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finer_granularity_no_worse(bits: int, symmetric: bool) -> None:
    w, errors = weight(), []
    for granularity in (PerTensor(), PerChannel(), PerGroup(size=18)):
        errors.append(
            weight_error(w, QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity), "mse").sum().item()
        )
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_mse_is_near_a_fine_brute_force(bits: int) -> None:
    w, spec = weight()[0].flatten(), QuantSpec(bits=bits)
    low, high = w.min(), w.max()
    best = min(error(w, low * f, high * f, spec) for f in torch.linspace(0.01, 1, 2000))
    assert error(w, *weight_range(w, spec, "mse"), spec) <= best * 1.02


def test_weights_refuse_other_estimators() -> None:
    with pytest.raises(InputError, match="minmax, mse, lattice"):
        weight_range(weight(), QuantSpec(), "kl")
