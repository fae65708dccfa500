"""Laws of bias correction: the mean of every output channel is restored."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kompakt.errors import InputError
from kompakt.numerics.bias import analytic_bias, channel_means, corrected_bias, expected_shift, rectified_mean
from kompakt.numerics.grid import affine_params, fake_quantize
from kompakt.numerics.ranges import weight_range
from kompakt.spec import QuantSpec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(w: Tensor, bits: int) -> Tensor:
    spec = QuantSpec(bits=bits)
    return fake_quantize(w, *affine_params(*weight_range(w, spec), spec), spec)


def activations(count: int, seed: int) -> Tensor:
    return (random(count, 12, 10, 10, seed=seed) + torch.linspace(-1, 2, 12).view(-1, 1, 1)).relu()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("groups", "padding"), [(1, 0), (1, 1), (3, 0), (12, 1)])
def test_measured_correction_restores_unseen_means(bits: int, groups: int, padding: int) -> None:
    w, b = random(24, 12 // groups, 3, 3, seed=1), random(24, seed=2)
    wq, x, unseen = quantized(w, bits), activations(16, seed=3), activations(16, seed=4)

    def means(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return channel_means(F.conv2d(x, w, b, padding=padding, groups=groups))

    fixed = corrected_bias(b, means(x, w, b), means(x, wq, b))
    torch.testing.assert_close(means(x, wq, fixed), means(x, w, b), rtol=1e-4, atol=1e-4)
    before = (means(unseen, wq, b) - means(unseen, w, b)).abs().mean()
    after = (means(unseen, wq, fixed) - means(unseen, w, b)).abs().mean()
    assert float(after) < 0.2 * float(before)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_analytic_correction_equals_the_measured_one_without_padding(groups: int) -> None:
    w, b = random(24, 12 // groups, 1, 1, seed=1), random(24, seed=2)
    wq, x = quantized(w, 3), activations(8, seed=3)
    outputs = [channel_means(F.conv2d(x, each, b, groups=groups)) for each in (w, wq)]
    measured = corrected_bias(b, *outputs)
    torch.testing.assert_close(analytic_bias(b, w, wq, channel_means(x), groups), measured, rtol=1e-4, atol=1e-4)
    without = analytic_bias(None, w, wq, channel_means(x), groups)
    torch.testing.assert_close(without + b, measured, rtol=1e-4, atol=1e-4)


def test_analytic_correction_of_a_linear_layer_is_exact() -> None:
    w, b, x = random(7, 12, seed=1), random(7, seed=2), random(50, 12, seed=3).relu()
    wq = quantized(w, 2)
    fixed = analytic_bias(b, w, wq, x.mean(0))
    torch.testing.assert_close(F.linear(x, wq, fixed).mean(0), F.linear(x, w, b).mean(0))


def test_shift_over_taps_equals_loops() -> None:
    error, mean = random(6, 2, 3, 3, seed=5), random(4, seed=6)
    expected = [sum(error[o, i].sum() * mean[o // 3 * 2 + i] for i in range(2)) for o in range(6)]
    torch.testing.assert_close(expected_shift(error, mean, groups=2), torch.stack(expected))


def test_mean_of_rectified_gaussians() -> None:
    mean, std = torch.tensor([-1.0, 0.0, 0.5, 3.0, 2.0, -2.0]), torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0])
    drawn = (random(200_000, 6) * std + mean).relu().mean(0)
    torch.testing.assert_close(rectified_mean(mean, std), drawn, rtol=0.02, atol=0.005)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="4 input means for 2 inputs"):
        expected_shift(random(3, 2), random(4))
    with pytest.raises(InputError, match="NaN or infinite"):
        corrected_bias(None, torch.tensor([float("nan")]), torch.zeros(1))
