from itertools import pairwise

import pytest
import torch

from kompakt.errors import InputError
from kompakt.numerics.masks import (
    keep_blocks,
    keep_kernels,
    keep_largest,
    keep_largest_globally,
    keep_n_of_m,
    masked,
    obc,
    output_error,
    refit,
    snip,
    sparsegpt,
    sparsity_at,
)
from kompakt.numerics.saliency import damped, lamp


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def layer(generator, rows=24, columns=48):
    """A weight, the second moment of correlated inputs (a few factors and noise, as after a ReLU) and the inputs."""
    mixing = torch.rand(columns // 3 + 1, columns, generator=generator)
    factors = torch.rand(400, columns // 3 + 1, generator=generator)
    x = (factors @ mixing + 0.5 * torch.randn(400, columns, generator=generator)).relu()
    return torch.randn(rows, columns, generator=generator), x.T @ x / 400, x


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_exactly_the_smallest_go(sparsity, generator):
    scores = torch.rand(7, 9, generator=generator)
    mask = keep_largest(scores, sparsity)
    assert (~mask).sum() == round(63 * sparsity)
    if 0 < sparsity < 1:
        assert scores[mask].min() > scores[~mask].max()


def test_ties_are_counted_exactly_and_by_position():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 1.0])
    assert keep_largest(scores, 0.5).tolist() == [False, False, False, True, True, True]
    assert (~keep_largest(torch.zeros(10), 0.3)).sum() == 3


def test_masks_are_nested_as_sparsity_grows(generator):
    scores = torch.rand(200, generator=generator)
    masks = [keep_largest(scores, s / 10) for s in range(11)]
    for larger, smaller in pairwise(masks):
        assert not (smaller & ~larger).any()


def test_global_mask_has_one_threshold(generator):
    scores = {"a": torch.rand(4, 5, generator=generator), "b": 3 * torch.rand(30, generator=generator)}
    masks = keep_largest_globally(scores, 0.6)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 30
    kept = torch.cat([scores[n][masks[n]] for n in scores])
    gone = torch.cat([scores[n][~masks[n]] for n in scores])
    assert kept.min() > gone.max()
    assert masks["a"].float().mean() < masks["b"].float().mean()


def test_lamp_scores_never_empty_a_layer_where_magnitude_does(generator):
    weights = {"tiny": 1e-3 * torch.randn(50, generator=generator), "large": torch.randn(500, generator=generator)}
    by_magnitude = keep_largest_globally({n: w.abs() for n, w in weights.items()}, 0.95)
    by_lamp = keep_largest_globally({n: lamp(w) for n, w in weights.items()}, 0.95)
    assert not by_magnitude["tiny"].any()
    assert by_lamp["tiny"].any()
    assert by_lamp["large"].any()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3)])
@pytest.mark.parametrize("shape", [(5, 24), (4, 24, 3, 2)])
def test_n_of_m_against_naive(n, m, shape, generator):
    scores = torch.rand(shape, generator=generator)
    mask = keep_n_of_m(scores, n, m)
    rows, marks = scores.movedim(1, -1).reshape(-1, 24), mask.movedim(1, -1).reshape(-1, 24)
    for row, mark in zip(rows, marks, strict=True):
        for start in range(0, 24, m):
            best = sorted(range(start, start + m), key=lambda i: -row[i].item())[:n]
            assert mark[start : start + m].nonzero().flatten().tolist() == sorted(i - start for i in best)


def test_n_of_m_survives_ties():
    mask = keep_n_of_m(torch.zeros(3, 8), 2, 4)
    assert mask.reshape(3, 2, 4).sum(-1).tolist() == [[2, 2]] * 3


def test_blocks_and_kernels_are_whole(generator):
    scores = torch.rand(6, 8, generator=generator)
    mask = keep_blocks(scores, (3, 2), 0.5)
    blocks = mask.reshape(2, 3, 4, 2).transpose(1, 2).flatten(2)
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    totals = scores.reshape(2, 3, 4, 2).sum((1, 3))
    assert totals[blocks.all(-1)].min() > totals[~blocks.any(-1)].max()
    kernels = keep_kernels(torch.rand(5, 4, 3, 3, generator=generator), 0.25).flatten(2)
    assert (kernels.all(-1) | ~kernels.any(-1)).all()
    assert kernels.all(-1).sum() == 15
    assert torch.equal(keep_blocks(scores, (1, 1), 0.3), keep_largest(scores, 0.3))


def test_snip_keeps_what_changes_the_loss(generator):
    weights = {n: torch.randn(6, 6, generator=generator) for n in "ab"}
    grads = {n: torch.randn(6, 6, generator=generator) for n in "ab"}
    grads["b"] *= 0.01
    masks = snip(weights, grads, 0.5)
    assert sum(int(m.sum()) for m in masks.values()) == 36
    assert masks["a"].sum() > 30


def test_the_cubic_schedule_meets_its_ends_and_never_falls():
    values = [sparsity_at(t, start=10, end=50, initial=0.1, final=0.9) for t in range(70)]
    assert values[:11] == [0.1] * 11
    assert values[50:] == [0.9] * 20
    assert values == sorted(values)
    steps = [b - a for a, b in pairwise(values[10:51])]
    assert steps == sorted(steps, reverse=True)
    assert sparsity_at(30, start=10, end=50, initial=0.1, final=0.9) == pytest.approx(0.9 - 0.8 / 8)


def test_soft_masks_let_the_gradient_through_and_hard_masks_do_not(generator):
    weight = torch.randn(40, generator=generator) * 10.0 ** torch.arange(-20, 20)
    mask = torch.rand(40, generator=generator) > 0.5
    slope = torch.randn(40, generator=generator)
    for soft in (True, False):
        leaf = weight.clone().requires_grad_()
        value = masked(leaf, mask, soft=soft)
        assert torch.equal(value, weight * mask)
        (value * slope).sum().backward()
        assert torch.equal(leaf.grad, slope if soft else slope * mask)


METHODS = {
    "sparsegpt": sparsegpt,
    "sparsegpt in blocks of 8": lambda weight, hessian, **how: sparsegpt(weight, hessian, block=8, **how),
    "obc": obc,
}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_mending_beats_magnitude_at_equal_sparsity(method, sparsity, generator):
    weight, hessian, x = layer(generator)
    pruned = METHODS[method](weight, hessian, sparsity=sparsity)
    plain = weight * keep_largest(weight.abs(), sparsity)
    assert (pruned == 0).sum() == (plain == 0).sum() == round(weight.numel() * sparsity)
    assert output_error(weight, pruned, hessian) < 0.6 * output_error(weight, plain, hessian)
    direct = (x @ (pruned - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert output_error(weight, pruned, hessian).item() == pytest.approx(direct.item(), rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("method", [sparsegpt, obc])
def test_mending_keeps_n_of_m_and_beats_magnitude(method, n, m, generator):
    weight, hessian, _ = layer(generator)
    pruned = method(weight, hessian, n_of_m=(n, m))
    assert ((pruned != 0).reshape(24, -1, m).sum(-1) == n).all()
    plain = weight * keep_n_of_m(weight.abs(), n, m)
    assert output_error(weight, pruned, hessian) < 0.6 * output_error(weight, plain, hessian)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_weight_after_weight_beats_column_after_column(sparsity, generator):
    weight, hessian, _ = layer(generator)
    greedy = output_error(weight, obc(weight, hessian, sparsity=sparsity), hessian)
    columns = sparsegpt(weight, hessian, sparsity=sparsity)
    assert greedy < output_error(weight, columns, hessian)
    assert greedy < output_error(weight, refit(weight, columns != 0, hessian), hessian)


def test_obc_removes_in_the_order_of_a_naive_obs(generator):
    weight, hessian, _ = layer(generator, rows=1, columns=12)
    moment = damped(hessian, 0.01)
    left, w = list(range(12)), weight[0].double()
    for gone in range(1, 12):
        inverse = torch.linalg.inv(moment[left][:, left])
        worst = int((w.square() / inverse.diagonal()).argmin())
        w = w - w[worst] / inverse[worst, worst] * inverse[worst]
        w = torch.cat([w[:worst], w[worst + 1 :]])
        del left[worst]
        pruned = obc(weight, hessian, sparsity=gone / 12)[0]
        assert pruned.nonzero().flatten().tolist() == left
        torch.testing.assert_close(pruned[left].double(), w, rtol=1e-4, atol=1e-5)


def test_no_sparsity_is_the_identity(generator):
    weight, hessian, _ = layer(generator)
    assert torch.equal(sparsegpt(weight, hessian, sparsity=0.0), weight)
    torch.testing.assert_close(obc(weight, hessian, sparsity=0.0), weight, rtol=1e-5, atol=1e-6)


def test_sparsegpt_of_one_column_block_follows_the_obs_update(generator):
    weight, hessian, _ = layer(generator, rows=1, columns=6)
    pruned = sparsegpt(weight, hessian, sparsity=1 / 6, damp=1e-9)
    j = int((pruned[0] == 0).nonzero())
    inverse = torch.linalg.inv(hessian.double()[j:, j:])  # the columns before j are settled
    expected = weight.double()[0].clone()
    expected[j:] -= expected[j] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(pruned[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_refit_is_the_least_squares_and_no_mask_does_better_without_it(generator):
    weight, hessian, x = layer(generator)
    mask = keep_largest(weight.abs(), 0.6)
    fitted = refit(weight, mask, hessian, damp=0.0)
    assert not fitted[~mask].any()
    for row in range(3):
        index = mask[row].nonzero().flatten()
        solution = torch.linalg.lstsq(x[:, index].double(), (x @ weight[row]).double()[:, None]).solution
        torch.testing.assert_close(fitted[row, index].double(), solution.flatten(), rtol=1e-3, atol=1e-4)
    best = output_error(weight, fitted, hessian)
    assert best < output_error(weight, weight * mask, hessian)
    pruned = sparsegpt(weight, hessian, sparsity=0.6)
    same = refit(weight, pruned != 0, hessian, damp=0.0)
    assert output_error(weight, same, hessian) <= output_error(weight, pruned, hessian)


def test_refit_of_full_and_empty_masks(generator):
    weight, hessian, _ = layer(generator)
    full = refit(weight, torch.ones_like(weight, dtype=torch.bool), hessian)
    torch.testing.assert_close(full, weight, rtol=1e-4, atol=1e-4)
    assert not refit(weight, torch.zeros_like(weight, dtype=torch.bool), hessian).any()


def test_dead_inputs_do_no_harm(generator):
    weight, hessian, _ = layer(generator)
    hessian[3] = 0
    hessian[:, 3] = 0
    for method in (sparsegpt, obc):
        pruned = method(weight, hessian, sparsity=0.5)
        assert torch.isfinite(pruned).all()
        assert not pruned[:, 3].any()


def test_bad_input_is_named():
    ones = torch.ones(4, 6)
    with pytest.raises(InputError, match=r"sparsity 1.5 is not between"):
        keep_largest(ones, 1.5)
    with pytest.raises(InputError, match="NaN among the 2 scores"):
        keep_largest(torch.tensor([1.0, float("nan")]), 0.5)
    with pytest.raises(InputError, match="at least one tensor"):
        keep_largest_globally({}, 0.5)
    with pytest.raises(InputError, match="4 does not divide the 6 inputs"):
        keep_n_of_m(ones, 2, 4)
    with pytest.raises(InputError, match="1 ≤ n ≤ m"):
        keep_n_of_m(ones, 3, 2)
    with pytest.raises(InputError, match="one size a dimension"):
        keep_blocks(ones, (2,), 0.5)
    with pytest.raises(InputError, match=r"block \(3, 2\) does not divide"):
        keep_blocks(ones, (3, 2), 0.5)
    with pytest.raises(InputError, match="end 3 must lie after"):
        sparsity_at(1, start=3, end=3, final=0.5)
    with pytest.raises(InputError, match="from 0 to 1"):
        sparsity_at(1, start=0, end=3, final=50)
    with pytest.raises(InputError, match="one of sparsity and n_of_m"):
        sparsegpt(ones, torch.eye(6))
    with pytest.raises(InputError, match=r"Hessian \(K, K\)"):
        sparsegpt(ones, torch.eye(4), sparsity=0.5)
    with pytest.raises(InputError, match="mask"):
        refit(ones, torch.ones(2, 6, dtype=torch.bool), torch.eye(6))
