"""Laws of the mathematics of updates: steps on a grid, unbiased and frugal rounding, reproducible choices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kompakt.numerics.updates import (
    entropy_bits,
    keep_largest,
    keep_random,
    round_rate_distortion,
    round_stochastic,
    step_code,
    step_size,
)


@given(st.floats(1e-30, 1e20))
def test_the_step_on_the_grid_is_the_next_larger(step: float) -> None:
    code = step_code(step)
    assert step_size(code - 1) < step <= step_size(code)


@pytest.mark.parametrize("code", [-2016, -33, -1, 0, 1, 15, 16, 500])
def test_steps_are_exact_in_float32_and_return_their_code(code: int) -> None:
    assert float(torch.tensor(step_size(code), dtype=torch.float32)) == step_size(code)
    assert step_code(step_size(code)) == code


def test_stochastic_rounding_is_unbiased_and_moves_by_less_than_one() -> None:
    x = torch.full((20000,), 0.3)
    found = round_stochastic(x, torch.Generator().manual_seed(0))
    assert float((found - x).abs().max()) < 1
    assert float(found.mean()) == pytest.approx(0.3, abs=0.02)


def test_rate_and_distortion_beat_rounding_to_nearest_at_equal_bits() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((50000,)) if torch.manual_seed(0) else torch.zeros(1)
    ours = round_rate_distortion(x / 2.0)
    bits, error = entropy_bits(ours), float((x - 2.0 * ours).square().sum())
    steps = [2.0 + 0.05 * i for i in range(60)]
    frugal = next(step for step in steps if entropy_bits((x / step).round()) <= bits)
    assert error < float((x - frugal * (x / frugal).round()).square().sum())


def test_rate_and_distortion_change_no_sign_and_move_by_at_most_the_value() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    found = round_rate_distortion(x)
    assert bool((found * x >= 0).all())
    assert bool(((found - x).abs() <= x.abs().clamp(min=1)).all())


def test_the_largest_are_kept_as_a_sort_keeps_them() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(2))
    expected = sorted(range(100), key=lambda i: -abs(float(x[i])))[:7]
    assert set(keep_largest(x, 7).nonzero().flatten().tolist()) == set(expected)


def test_random_places_are_those_of_splitmix64() -> None:
    def mix(seed: int, place: int) -> int:
        z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        return z - 2**64 if z >= 2**63 else z

    expected = sorted(range(50), key=lambda i: mix(2**64 - 3, i))[:5]
    assert set(keep_random(50, 5, 2**64 - 3).nonzero().flatten().tolist()) == set(expected)
