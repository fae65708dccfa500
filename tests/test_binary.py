from itertools import product

import pytest
import torch

from kompakt.errors import InputError
from kompakt.numerics.binary import (
    SIGNS,
    SURROGATES,
    adaptive_activation,
    binarize,
    binarize_shifted,
    binary_activation,
    binary_weight,
    expand,
    sharpness_at,
    shifted_prelu,
    sign_tanh,
    ternarize,
    ternarize_exact,
    ternary_weight,
    trained_ternary,
)
from kompakt.numerics.codebook import gather, share


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def error(weight, approximation):
    return float((weight - approximation).double().square().sum())


def slope(function, x, step=1e-4):
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_binary_signs_and_scales_are_optimal(per, generator):
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    signs, scale = binarize(weight, per)
    least = error(weight, expand(signs, scale))
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert error(weight, expand(signs, scale * factor)) > least
    for place in range(weight.numel()):
        flipped = signs.clone()
        flipped.view(-1)[place] *= -1
        assert error(weight, expand(flipped, scale)) >= least
    assert len(scale) == (4 if per == "channel" else 1)


def test_finer_scales_and_more_levels_never_raise_the_error(generator):
    weight = torch.randn(6, 40, generator=generator) * torch.rand(6, 1, generator=generator)
    for method in (binarize, ternarize_exact):
        assert error(weight, expand(*method(weight))) <= error(weight, expand(*method(weight, "tensor")))
    assert error(weight, expand(*ternarize_exact(weight))) <= error(weight, expand(*binarize(weight)))
    assert error(weight, gather(*share(weight, 1, "channel"))) <= error(weight, expand(*binarize(weight)))
    assert error(weight, gather(*share(weight, 2, "channel"))) <= error(weight, expand(*ternarize_exact(weight)))


def test_shifted_signs_keep_mean_and_deviation(generator):
    weight = torch.randn(3, 400, generator=generator, dtype=torch.float64) + 0.7
    signs, scale, shift = binarize_shifted(weight)
    torch.testing.assert_close(shift, weight.mean(1))
    torch.testing.assert_close(scale, weight.std(1, correction=0))
    assert error(weight, expand(signs, scale, shift)) < error(weight, expand(*binarize(weight)))


def test_ternary_exact_equals_brute_force_and_twn_is_no_better(generator):
    for _ in range(10):
        weight = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        best = error(weight, torch.zeros_like(weight))
        for choice in product((-1.0, 0.0, 1.0), repeat=6):
            signs = torch.tensor([choice], dtype=torch.float64)
            if signs.any():
                scale = (weight * signs).sum() / signs.abs().sum()
                best = min(best, error(weight, scale * signs))
        exact = error(weight, expand(*ternarize_exact(weight)))
        assert exact == pytest.approx(best)
        assert exact <= error(weight, expand(*ternarize(weight))) + 1e-12


def test_ternary_of_normal_weights_is_close_to_the_rule_of_thumb(generator):
    weight = torch.randn(8, 2000, generator=generator)
    exact, rule = (error(weight, expand(*method(weight))) for method in (ternarize_exact, ternarize))
    assert exact <= rule <= 1.02 * exact


@pytest.mark.parametrize("method", [binarize, ternarize, ternarize_exact])
def test_zero_and_constant_channels(method):
    weight = torch.tensor([[0.0, 0.0, 0.0], [-0.5, -0.5, -0.5]])
    assert torch.equal(expand(*method(weight)), weight)


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_has_its_surrogates_gradient(name):
    x = torch.linspace(-2.013, 2.017, 401, dtype=torch.float64, requires_grad=True)
    y = SIGNS[name](x)
    assert torch.equal(y.detach(), torch.where(x < 0, -1.0, 1.0).double())
    y.sum().backward()
    torch.testing.assert_close(x.grad, slope(SURROGATES[name], x.detach()), atol=1e-3, rtol=1e-3)
    assert (x.grad >= 0).all()


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 7.0])
def test_the_tanh_sharpens(sharpness):
    x = torch.linspace(-1, 1, 51, dtype=torch.float64, requires_grad=True)
    sign_tanh(x, sharpness).sum().backward()
    expected = slope(lambda v: SURROGATES["tanh"](v, sharpness), x.detach())
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_sharpness_runs_geometrically():
    values = [sharpness_at(p / 4) for p in range(5)]
    assert values == pytest.approx([0.1, 0.1 * 10**0.5, 1.0, 10**0.5, 10.0])


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("name", SIGNS)
def test_the_binary_weights_gradient_is_the_chain_rule_of_its_surrogate(name, balance, generator):
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64) * 0.6
    direction = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    (binary_weight(leaf, SIGNS[name], balance=balance) * direction).sum().backward()

    def brought(w):
        return (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True, correction=0) if balance else w

    def linearised(w):  # each factor moves while the other stands still at the expansion point
        signs = torch.where(brought(weight) < 0, -1.0, 1.0)
        scale = weight.abs().mean(1, keepdim=True)
        moved = signs * w.abs().mean(1, keepdim=True) + scale * SURROGATES[name](brought(w))
        return (moved * direction).sum()

    step = 1e-6
    for place in range(weight.numel()):
        bump = torch.zeros(24, dtype=torch.float64)
        bump[place] = step
        bump = bump.reshape(3, 8)
        numeric = (linearised(weight + bump) - linearised(weight - bump)) / (2 * step)
        assert leaf.grad.view(-1)[place].item() == pytest.approx(numeric.item(), abs=1e-6)


def test_binary_weights_are_what_binarize_gives_and_balance_halves_them(generator):
    weight = torch.randn(5, 3, 3, 3, generator=generator) + 0.5
    torch.testing.assert_close(binary_weight(weight), expand(*binarize(weight)))
    balanced = binary_weight(weight, balance=True)
    assert (balanced > 0).float().mean() < (binary_weight(weight) > 0).float().mean()
    assert torch.isfinite(binary_weight(torch.zeros(2, 4), balance=True)).all()


def test_binary_activation_has_a_threshold_for_each_channel(generator):
    x = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    shift = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    y = binary_activation(x, shift)
    for c in range(3):
        assert torch.equal(y[:, c] > 0, x[:, c] >= shift[c])
    y.sum().backward()
    torch.testing.assert_close(shift.grad, -x.grad.sum((0, 2, 3)))


def test_adaptive_activation_takes_two_values_and_learns_them(generator):
    x = torch.randn(4, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.7, 1.5], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)
    y = adaptive_activation(x, scale, shift)
    for c in range(2):
        torch.testing.assert_close(y[:, c].unique().detach(), (shift[c] + torch.tensor([-1, 1]) * scale[c]).detach())
    y.sum().backward()
    u = ((x - shift[:, None]) / scale[:, None]).detach()
    inside = (u.abs() <= 1).double()
    torch.testing.assert_close(x.grad, inside)
    torch.testing.assert_close(shift.grad, (1 - inside).sum((0, 2)))
    torch.testing.assert_close(scale.grad, (torch.where(u < 0, -1.0, 1.0) - u * inside).sum((0, 2)))


def test_shifted_prelu_against_naive(generator):
    x = torch.randn(2, 3, 4, generator=generator)
    slope_, before, after = (torch.rand(3, generator=generator) for _ in range(3))
    y = shifted_prelu(x, slope_, before, after)
    for n, c, i in product(range(2), range(3), range(4)):
        moved = x[n, c, i] - before[c]
        expected = (moved if moved > 0 else slope_[c] * moved) + after[c]
        assert y[n, c, i].item() == pytest.approx(expected.item(), abs=1e-6)


def test_ternary_weights_pass_the_gradient_straight_through(generator):
    weight = torch.randn(4, 10, generator=generator, requires_grad=True)
    direction = torch.randn(4, 10, generator=generator)
    y = ternary_weight(weight)
    torch.testing.assert_close(y, expand(*ternarize(weight.detach())))
    (y * direction).sum().backward()
    assert torch.equal(weight.grad, direction)


def test_trained_ternary_values_have_the_papers_gradients(generator):
    weight = torch.randn(40, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(40, generator=generator, dtype=torch.float64)
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.6)]
    y = trained_ternary(weight, *values, 0.2)
    limit = 0.2 * weight.abs().max()
    assert y.unique().tolist() == [-0.6, 0.0, 0.8]
    assert torch.equal(y != 0, weight.abs() > limit)
    (y * direction).sum().backward()
    for i in range(2):
        bumped = [[v.detach() + (1e-6 * sign if j == i else 0) for j, v in enumerate(values)] for sign in (1, -1)]
        up, down = ((trained_ternary(weight.detach(), *each, 0.2) * direction).sum() for each in bumped)
        assert values[i].grad.item() == pytest.approx(float(up - down) / 2e-6, abs=1e-6)
    factor = torch.where(weight > limit, 0.8, torch.where(weight < -limit, 0.6, 1.0))
    torch.testing.assert_close(weight.grad, direction * factor)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="NaN or infinity"):
        binarize(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(InputError, match="NaN or infinity"):
        ternarize_exact(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match=r"progress 2 must lie in 0 … 1"):
        sharpness_at(2)
