from itertools import combinations, pairwise

import pytest
import torch

from kompakt.errors import InputError
from kompakt.numerics.codebook import (
    LEVELS,
    apot_levels,
    centroid_gradient,
    gather,
    kmeans1d,
    nearest,
    optimal1d,
    power_of_two_levels,
    share,
    share_levels,
)
from kompakt.numerics.shared import share_for_inputs

STARTS = ["linear", "density", "random", "exact"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def error(values, centroids, indices, weights=None):
    squared = (values - centroids[indices.long()]).double().square()
    return float((squared if weights is None else squared * weights).sum())


def shared_error(weight, indices, codebook, importance=None):
    squared = (weight - gather(indices, codebook)).double().square()
    return float((squared if importance is None else squared * importance).sum())


def uniform_error(weight, bits):
    """The best of many min–max grids of 2^bits levels, clipped at shares of the range."""
    best = float("inf")
    for share_ in torch.linspace(0.2, 1.0, 30).tolist():
        levels = torch.linspace(share_ * float(weight.min()), share_ * float(weight.max()), 2**bits)
        best = min(best, shared_error(weight, nearest(weight, levels), levels[None]))
    return best


def brute(values, k, weights):
    """The least error over every way to cut the sorted values into k runs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    x, w = [values[i] for i in order], [weights[i] for i in order]
    best = float("inf")
    for cuts in combinations(range(1, len(x)), k - 1):
        bounds, total = (0, *cuts, len(x)), 0.0
        for a, b in pairwise(bounds):
            mass = sum(w[a:b])
            mean = sum(p * q for p, q in zip(x[a:b], w[a:b], strict=True)) / mass if mass else 0.0
            total += sum(q * (p - mean) ** 2 for p, q in zip(x[a:b], w[a:b], strict=True))
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_the_exact_solution_equals_brute_force(k, weighted, generator):
    values = torch.randn(11, generator=generator, dtype=torch.float64)
    weights = torch.rand(11, generator=generator, dtype=torch.float64) if weighted else torch.ones(11)
    if weighted:
        weights[3] = 0
    centroids, indices = optimal1d(values, k, weights)
    assert error(values, centroids, indices, weights) == pytest.approx(
        brute(values.tolist(), k, weights.tolist()), abs=1e-12
    )


@pytest.mark.parametrize("size", [3, 4, 5, 7, 8, 16, 17, 33])
def test_the_exact_solution_equals_brute_force_at_every_size(size, generator):
    values = torch.randn(size, generator=generator, dtype=torch.float64).exp()
    centroids, indices = optimal1d(values, 3)
    assert error(values, centroids, indices) == pytest.approx(brute(values.tolist(), 3, [1.0] * size), abs=1e-12)


@pytest.mark.parametrize("k", [2, 4, 16, 64])
@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_exact_is_no_worse_than_lloyd(k, start, generator):
    values = torch.randn(1500, generator=generator) ** 3
    exact = error(values, *optimal1d(values, k))
    assert exact <= error(values, *kmeans1d(values, k, start, generator=generator)) * (1 + 1e-6)


@pytest.mark.parametrize("k", [4, 16])
def test_with_many_values_it_stays_next_to_the_exact_solution(k, generator):
    values = torch.randn(20_000, generator=generator)
    values[:20] *= 30
    exact = error(values, *optimal1d(values, k, bins=20_000))
    assert exact <= error(values, *optimal1d(values, k)) <= exact * 1.001
    lloyd = kmeans1d(values, k, "exact")
    assert error(values, *lloyd) == pytest.approx(error(values, *optimal1d(values, k)))


@pytest.mark.parametrize("start", STARTS)
def test_lloyd_ends_at_a_fixed_point(start, generator):
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    weights = torch.rand(500, generator=generator, dtype=torch.float64)
    centroids, indices = kmeans1d(values, 7, start, weights=weights, iterations=1000, generator=generator)
    assert centroids.tolist() == sorted(centroids.tolist())
    assert torch.equal(indices.long(), (values[:, None] - centroids).abs().argmin(1))
    for j in indices.unique().tolist():
        members = indices == j
        mean = (values[members] * weights[members]).sum() / weights[members].sum()
        assert centroids[j].item() == pytest.approx(mean.item(), abs=1e-9)


def test_more_steps_never_raise_the_error(generator):
    values = torch.randn(2000, generator=generator)
    errors = [error(values, *kmeans1d(values, 16, "linear", iterations=n)) for n in (0, 1, 2, 5, 20, 100)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


def test_starts_are_what_they_say():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0])
    assert kmeans1d(values, 3, "linear", iterations=0)[0].tolist() == [0, 50, 100]
    assert kmeans1d(values, 5, "density", iterations=0)[0].tolist() == values.tolist()
    first, again, other = (
        kmeans1d(torch.arange(99.0), 4, "random", iterations=0, generator=torch.Generator().manual_seed(s))[0]
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_random_start_draws_distinct_values(generator):
    values = torch.tensor([0.0] * 500 + [1.0, 2.0, 3.0])
    centroids, indices = kmeans1d(values, 4, "random", iterations=0, generator=generator)
    assert centroids.tolist() == [0, 1, 2, 3]
    assert error(values, centroids, indices) == 0


@pytest.mark.parametrize(("granularity", "channels"), [("tensor", 1), ("channel", 1), ("channel", 4)])
def test_more_bits_never_raise_the_error(granularity, channels, generator):
    weight = torch.randn(8, 6, 3, 3, generator=generator) * torch.rand(8, 1, 1, 1, generator=generator)
    errors = [shared_error(weight, *share(weight, b, granularity, channels=channels)) for b in range(1, 9)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[3] < 0.05 * errors[0]


def test_finer_codebooks_never_raise_the_error(generator):
    weight = torch.randn(8, 24, generator=generator) * torch.rand(8, 1, generator=generator)
    books = (("tensor", 1), ("channel", 4), ("channel", 1))
    errors = [shared_error(weight, *share(weight, 3, how, channels=channels)) for how, channels in books]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_codebook_is_no_worse_than_uniform_at_equal_bits(bits, generator):
    weight = torch.randn(64, 27, generator=generator)
    assert shared_error(weight, *share(weight, bits)) <= uniform_error(weight, bits)


def test_channels_are_clustered_as_if_alone(generator):
    weight = torch.randn(5, 40, generator=generator)
    indices, codebook = share(weight, 3, "channel")
    for c in range(5):
        alone, own = share(weight[c : c + 1], 3)
        assert torch.equal(indices[c : c + 1], alone)
        torch.testing.assert_close(codebook[c : c + 1], own)


def test_importance_lowers_the_error_where_it_lies(generator):
    weight = torch.randn(4, 100, generator=generator)
    importance = torch.rand(4, 100, generator=generator) ** 4
    plain, weighted = share(weight, 3), share(weight, 3, importance=importance)
    assert shared_error(weight, *weighted, importance) < shared_error(weight, *plain, importance)
    assert shared_error(weight, *weighted) > shared_error(weight, *plain)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.full((4, 5), 0.3), torch.arange(20.0).reshape(4, 5) // 7])
def test_few_distinct_weights_are_held_exactly(weight, start, generator):
    for granularity in ("tensor", "channel"):
        indices, codebook = share(weight, 2, granularity, start, generator=generator)
        assert torch.equal(gather(indices, codebook), weight)
        assert codebook.shape == (1 if granularity == "tensor" else 4, 4)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_pruned_weights_stay_pruned(granularity, generator):
    weight = torch.randn(6, 50, generator=generator)
    weight[torch.rand(6, 50, generator=generator) < 0.5] = 0
    for bits in (1, 2, 4):
        indices, codebook = share(weight, bits, granularity, keep_zeros=True)
        assert codebook.shape[1] == 2**bits
        assert not gather(indices, codebook)[weight == 0].any()
        assert (codebook == 0).any(1).all()


def test_indices_are_bytes_and_survive_eight_bits(generator):
    weight = torch.randn(3000, generator=generator)
    indices, codebook = share(weight.reshape(10, 300), 8)
    assert indices.dtype == torch.uint8
    assert int(indices.max()) == 255
    assert torch.equal(indices, nearest(weight, codebook[0]).reshape(10, 300))


def test_the_centroids_gradient_is_that_of_the_gather(generator):
    weight = torch.randn(6, 20, generator=generator)
    slope = torch.randn(6, 20, generator=generator)
    for granularity, channels in (("tensor", 1), ("channel", 2)):
        indices, codebook = share(weight, 2, granularity, channels=channels)
        leaf = codebook.clone().requires_grad_()
        (gather(indices, leaf) * slope).sum().backward()
        torch.testing.assert_close(centroid_gradient(slope, indices, 4, len(codebook)), leaf.grad)


def test_centroid_descent_lowers_a_loss_with_the_indices_fixed(generator):
    x, weight = torch.randn(200, 20, generator=generator), torch.randn(6, 20, generator=generator)
    indices, codebook = share(weight, 2)
    target, losses = x @ weight.T, []
    for _ in range(20):
        difference = x @ gather(indices, codebook).T - target
        losses.append(float(difference.square().mean()))
        codebook = codebook - 0.001 * centroid_gradient(2 * difference.T @ x / 200, indices, 4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_power_of_two_and_apot_grids():
    assert power_of_two_levels(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    torch.testing.assert_close(10 * apot_levels(4)[7:], torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 10]))
    for bits in range(2, 9):
        levels = apot_levels(bits)
        assert len(levels) == len(levels.unique()) == 2**bits - 1
        assert levels.tolist() == sorted(levels.tolist())
        torch.testing.assert_close(levels, -levels.flip(0))
        assert levels.max() == 1


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fixed_grids_are_scaled_to_the_least_error(name, granularity, generator):
    weight = 0.1 * torch.randn(8, 60, generator=generator)
    levels = LEVELS[name](4)
    indices, codebook = share_levels(weight, levels, granularity)
    scale = codebook.amax(1, keepdim=True)
    torch.testing.assert_close(codebook, scale * levels)
    least = shared_error(weight, indices, codebook)
    assert shared_error(weight, *share(weight, 4, granularity)) <= least
    for factor in torch.linspace(0.3, 2.0, 60).tolist():
        other = codebook * factor
        moved = torch.stack([nearest(w, c) for w, c in zip(weight.reshape(len(other), -1), other, strict=True)])
        assert least <= shared_error(weight, moved.reshape(8, 60), other) * 1.01


def test_apot_is_better_than_power_of_two_and_than_uniform_on_normal_weights(generator):
    weight = torch.randn(64, 64, generator=generator)
    additive = shared_error(weight, *share_levels(weight, apot_levels(4)))
    assert additive < shared_error(weight, *share_levels(weight, power_of_two_levels(4)))
    assert additive < shared_error(weight, *share_levels(weight, torch.linspace(-1, 1, 15)))


def test_fixed_grids_survive_zeros():
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1.0, -0.5, 0.25, 0.0])
    indices, codebook = share_levels(weight, apot_levels(3), "channel")
    assert torch.equal(gather(indices, codebook), weight)


def test_bad_input_is_named():
    values = torch.tensor([1.0, 2.0, 2.0, 3.0])
    with pytest.raises(InputError, match="4 centroids but only 3 distinct weights; use at most 3"):
        kmeans1d(values, 4)
    with pytest.raises(InputError, match="only 3 distinct weights"):
        optimal1d(values, 4)
    with pytest.raises(InputError, match="0 centroids: expected 1 to 256"):
        kmeans1d(values, 0)
    with pytest.raises(InputError, match="9 bits: a codebook takes 1 to 8"):
        share(values, 9)
    with pytest.raises(InputError, match="NaN or infinity"):
        share(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(InputError, match="at least one value"):
        share(torch.zeros(0), 2)
    with pytest.raises(InputError, match="3 importances for 4"):
        share(values, 1, importance=torch.ones(3))
    with pytest.raises(InputError, match="not negative"):
        share(values, 1, importance=-torch.ones(4))
    with pytest.raises(InputError, match="do not divide 6; use 1, 2, 3, 6"):
        share(torch.rand(6, 2), 2, "channel", channels=4)
    with pytest.raises(InputError, match="start 'median' is unknown"):
        kmeans1d(values, 2, "median")
    with pytest.raises(InputError, match="2 to 5 bits"):
        power_of_two_levels(8)
    with pytest.raises(InputError, match="2 to 8 bits"):
        apot_levels(1)


def layer_error(weight, moments, indices, codebook):
    error = (weight - gather(indices, codebook)).double().reshape(len(moments), -1, moments.shape[-1])
    return float(((error @ moments.double()) * error).sum())


def correlated(generator, groups=1, width=18):
    mix = torch.randn(groups, width, width, generator=generator)
    inputs = torch.randn(groups, 400, width, generator=generator) @ mix
    return inputs.mT @ inputs


@pytest.mark.parametrize(("groups", "books"), [(1, 1), (1, 8), (4, 1), (4, 8)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_codebook_for_the_inputs_errs_less_than_one_for_the_weights(bits, groups, books, generator):
    weight = torch.randn(8, 2, 3, 3, generator=generator)
    moments = correlated(generator, groups)
    granularity = "tensor" if books == 1 else "channel"
    start = share(weight, bits, granularity)
    indices, values = share_for_inputs(weight, moments, *start)
    assert values.shape == start[1].shape
    assert indices.dtype == torch.uint8
    assert indices.shape == weight.shape
    assert bool((values.diff(dim=1) >= 0).all())
    before, after = layer_error(weight, moments, *start), layer_error(weight, moments, indices, values)
    assert after < (0.9 if books == 1 else 1.0) * before


def test_where_inputs_are_white_k_means_cannot_be_bettered_much(generator):
    weight, moments = torch.randn(16, 12, generator=generator), torch.eye(12)[None]
    start = share(weight, 2)
    found = layer_error(weight, moments, *share_for_inputs(weight, moments, *start))
    best = layer_error(weight, moments, *start)
    assert 0.98 * best <= found <= best * (1 + 1e-6)


def test_weights_that_are_levels_already_are_kept(generator):
    levels = torch.tensor([-2.0, -0.5, 0.25, 1.0])
    weight = levels[torch.randint(0, 4, (8, 18), generator=generator)]
    indices, values = share_for_inputs(weight, correlated(generator), *share(weight, 2))
    assert torch.equal(gather(indices, values), weight)


def test_inputs_that_never_came_do_no_harm(generator):
    moments = correlated(generator)
    moments[:, 3] = moments[:, :, 3] = 0
    indices, values = share_for_inputs(torch.zeros(4, 18), moments, *share(torch.zeros(4, 18), 2))
    assert bool((gather(indices, values) == 0).all())
    weight = torch.randn(4, 18, generator=generator)
    assert bool(gather(*share_for_inputs(weight, moments, *share(weight, 2))).isfinite().all())


def test_moments_of_another_layer_are_named(generator):
    weight = torch.randn(4, 18, generator=generator)
    with pytest.raises(InputError, match="do not fit a weight of shape"):
        share_for_inputs(weight, torch.eye(7)[None], *share(weight, 2))
    with pytest.raises(InputError, match="NaN or infinite"):
        share_for_inputs(weight, torch.full((1, 18, 18), torch.nan), *share(weight, 2))
