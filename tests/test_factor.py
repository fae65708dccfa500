from itertools import pairwise

import pytest
import torch
from torch.nn.functional import conv2d

from kompakt.errors import InputError
from kompakt.numerics.factor import (
    PARAMETERS,
    cp,
    full_ranks,
    rank_by_energy,
    ranks_by_budget,
    reconstruct,
    separable,
    svd,
    tucker2,
)

FORMS = {
    "svd": lambda weight, ranks: svd(weight, *ranks),
    "tucker2": lambda weight, ranks: tucker2(weight, ranks),
    "cp": lambda weight, ranks: cp(weight, *ranks),
    "separable": lambda weight, ranks: separable(weight, *ranks),
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def weight_for(form, generator):
    return torch.randn((7, 5) if form == "svd" else (6, 4, 3, 2), generator=generator, dtype=torch.float64)


def relative(weight, other):
    return float((weight - other).norm() / weight.norm())


@pytest.mark.parametrize("form", FORMS)
def test_at_full_rank_nothing_is_lost(form, generator):
    weight = weight_for(form, generator)
    ranks = full_ranks(form, tuple(weight.shape))
    found = FORMS[form](weight, ranks)
    assert found.error < 1e-6
    torch.testing.assert_close(reconstruct(form, found.tensors, ranks), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_that_of_the_reconstruction_and_falls_with_the_rank(form, generator):
    weight = weight_for(form, generator)
    full = full_ranks(form, tuple(weight.shape))
    errors = []
    for step in range(1, 5):
        ranks = tuple(max(1, size * step // 4) for size in full)
        found = FORMS[form](weight, ranks)
        assert found.error == pytest.approx(relative(weight, reconstruct(form, found.tensors, ranks)), abs=1e-9)
        assert sum(each.numel() for each in found.tensors) == PARAMETERS[form](tuple(weight.shape), ranks)
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_factoring_is_deterministic_and_keeps_the_dtype(form, generator):
    weight = weight_for(form, generator).float()
    ranks = tuple(2 for _ in full_ranks(form, tuple(weight.shape)))
    first, again = (FORMS[form](weight, ranks) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, again.tensors, strict=True))
    assert {each.dtype for each in first.tensors} == {torch.float32}


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_weight_stays_zero(form):
    weight = torch.zeros((7, 5) if form == "svd" else (6, 4, 3, 2))
    ranks = tuple(1 for _ in full_ranks(form, tuple(weight.shape)))
    found = FORMS[form](weight, ranks)
    assert found.error == 0
    assert not reconstruct(form, found.tensors, ranks).any()


def test_svd_is_the_best_of_its_rank(generator):
    weight = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, 6):
        expected = (values[rank:].square().sum() / values.square().sum()).sqrt()
        assert svd(weight, rank).error == pytest.approx(float(expected), abs=1e-7)


def test_svd_with_a_moment_is_better_on_those_inputs(generator):
    weight = torch.randn(12, 10, generator=generator)
    x = torch.randn(500, 10, generator=generator) * torch.logspace(-1, 1, 10)
    moment = x.T @ x / 500
    plain, aware = svd(weight, 4), svd(weight, 4, moment)

    def output_error(found):
        return float((x @ (weight - found.tensors[1] @ found.tensors[0]).T).norm() / (x @ weight.T).norm())

    assert aware.error == pytest.approx(output_error(aware), rel=1e-3)
    assert output_error(aware) < 0.5 * output_error(plain)
    best = torch.linalg.svdvals(x @ weight.T)
    assert output_error(aware) == pytest.approx(float(best[4:].norm() / best.norm()), rel=1e-3)


def test_factors_share_the_norm(generator):
    first, last = svd(torch.randn(9, 7, generator=generator), 5).tensors
    torch.testing.assert_close(first.norm(dim=1), last.norm(dim=0))


def test_orthogonal_iteration_improves_on_the_unfoldings(generator):
    weight = torch.randn(12, 10, 3, 3, generator=generator)
    start, end = tucker2(weight, (4, 5), iterations=0).error, tucker2(weight, (4, 5), iterations=50).error
    assert end < start


def test_low_rank_weights_are_recovered(generator):
    o, i, h, v = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (8, 6, 3, 3))
    weight = torch.einsum("or,ir,hr,vr->oihv", o, i, h, v)
    assert tucker2(weight, (3, 3)).error < 1e-7
    assert cp(weight, 3, iterations=1000).error < 1e-3
    kernels = torch.randn(6, 2, 9, generator=generator, dtype=torch.float64)
    mixing = torch.randn(8, 6, 2, generator=generator, dtype=torch.float64)
    mixed = torch.einsum("oid,idk->oik", mixing, kernels).reshape(8, 6, 3, 3)
    assert separable(mixed, 2).error < 1e-7


def test_more_rounds_never_raise_the_error_of_cp(generator):
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    errors = [cp(weight, 4, iterations=n).error for n in (1, 2, 5, 20, 100)]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))


def test_separable_is_the_best_of_its_form(generator):
    weight = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    lost = sum(torch.linalg.svdvals(weight[:, i].flatten(1))[1:].square().sum() for i in range(4))
    assert separable(weight).error == pytest.approx(float((lost / weight.square().sum()).sqrt()))
    kernels, mixing = (each.clone().requires_grad_() for each in separable(weight).tensors)
    (reconstruct("separable", (kernels, mixing), (1,)) - weight).square().sum().backward()
    assert kernels.grad.abs().max() < 1e-9
    assert mixing.grad.abs().max() < 1e-9


@pytest.mark.parametrize(("form", "ranks"), [("tucker2", (3, 4)), ("cp", (5,)), ("separable", (2,))])
def test_the_chain_of_layers_computes_what_the_one_weight_does(form, ranks, generator):
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    x = torch.randn(2, 4, 9, 9, generator=generator)
    tensors = FORMS[form](weight, ranks).tensors
    expected = conv2d(x, reconstruct(form, tensors, ranks), stride=2, padding=1)
    if form == "tucker2":
        y = conv2d(conv2d(conv2d(x, tensors[0]), tensors[1], stride=2, padding=1), tensors[2])
    elif form == "separable":
        y = conv2d(conv2d(x, tensors[0], stride=2, padding=1, groups=4), tensors[1])
    else:
        tall = conv2d(conv2d(x, tensors[0]), tensors[1], stride=(2, 1), padding=(1, 0), groups=5)
        y = conv2d(conv2d(tall, tensors[2], stride=(1, 2), padding=(0, 1), groups=5), tensors[3])
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_rank_by_energy_is_the_least_that_holds_it():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [rank_by_energy(values, e) for e in (0.5, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [0.4, 0.7, 3.0])
def test_ranks_by_budget_meet_it_and_one_more_would_not(form, ratio):
    shape = (64, 48) if form == "svd" else (64, 48, 3, 3)
    ranks = ranks_by_budget(form, shape, ratio)
    allowed = ratio * torch.Size(shape).numel()
    assert PARAMETERS[form](shape, ranks) <= allowed
    if ranks != full_ranks(form, shape):
        assert PARAMETERS[form](shape, tuple(rank + 1 for rank in ranks)) > allowed


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"svd of \(4, 3\): ranks \(4,\), expected 1 to \(3,\)"):
        svd(torch.ones(4, 3), 4)
    with pytest.raises(InputError, match=r"tucker2 takes a weight \(O, I, kh, ...\), found \(4, 3\)"):
        tucker2(torch.ones(4, 3), (1, 1))
    with pytest.raises(InputError, match="ranks"):
        tucker2(torch.ones(4, 3, 3, 3), (4, 3))
    with pytest.raises(InputError, match=r"cp takes a weight \(O, I, kh, kw\)"):
        cp(torch.ones(4, 3, 3), 1)
    with pytest.raises(InputError, match="NaN or infinity"):
        separable(torch.full((4, 3, 3, 3), float("nan")))
    with pytest.raises(InputError, match="form 'pca' is unknown"):
        ranks_by_budget("pca", (4, 3), 0.5)
    with pytest.raises(InputError, match="form 'pca' is unknown"):
        reconstruct("pca", (torch.ones(1),), (1,))
    with pytest.raises(InputError, match=r"needs at least 0.583 of the parameters, 0.5 were allowed"):
        ranks_by_budget("svd", (4, 3), 0.5)
    with pytest.raises(InputError, match="energy 0"):
        rank_by_energy(torch.ones(3), 0.0)
