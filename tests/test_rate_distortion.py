"""Laws of rate–distortion quantization: prices are the coder's, λ trades bits for error."""

import numpy as np
import pytest
import torch

from kompakt.build.rate import rate_distorted
from kompakt.coding import decode_integers, encode_integers
from kompakt.coding.rate import rate_model
from kompakt.measure.result import Drop
from kompakt.numerics.moments import output_error
from kompakt.numerics.rate_distortion import coarse, steps, trade_off
from kompakt.numerics.rounding import inverse_factor
from kompakt.shrink import Candidate, search


class Free:
    def column(self, index: int, q: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(candidates)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 8, 3, 3, generator=generator) * 0.1
    x = torch.randn(4000, 72, generator=generator) @ torch.randn(72, 72, generator=generator)
    return w, (x.T @ x)[None] / len(x)


def test_column_prices_are_those_of_the_whole_tensor() -> None:
    values = np.random.default_rng(0).normal(0, 2, (12, 6, 3, 3)).round().astype(np.int8)
    model = rate_model(values)
    whole, columns = model.bits(values)[0].reshape(12, -1), model.columns()
    flat = values.reshape(12, -1).astype(np.float32)
    for index in range(flat.shape[1]):
        assert np.allclose(columns.bits(index, flat, flat[:, index][None])[0], whole[:, index])


def test_without_a_price_no_error_is_larger_than_that_of_rounding(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    w, hessian = layer
    scale = torch.full((24,), 0.05)
    q, _ = trade_off(w, inverse_factor(hessian, 1e-6), scale, Free(), (torch.ones(24), 0.0))
    rounded = (w / 0.05).round() * 0.05
    assert output_error(w, q * 0.05, hessian) < output_error(w, rounded, hessian)


def test_a_dearer_bit_takes_fewer_bits_and_more_error(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    w, hessian = layer
    sizes, errors = [], []
    for trade in (1e-3, 1e-2, 1e-1):
        q, scale = rate_distorted(w, hessian, torch.ones(24), trade)
        data = encode_integers(q.numpy().astype(np.int8))
        assert (decode_integers(data) == q.numpy()).all()
        sizes.append(len(data))
        errors.append(float(output_error(w, q * scale[:, None, None, None], hessian)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_steps_fall_with_importance_and_rise_with_the_price(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    factor = inverse_factor(layer[1], 0.01)
    important = steps(factor, torch.tensor([1.0, 4.0]), 0.1)
    assert torch.allclose(important[0], 2 * important[1])
    assert torch.allclose(steps(factor, torch.tensor([1.0, 4.0]), 0.4), 2 * important)


def test_coarse_floats_are_near_and_keep_few_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = coarse(x, 6)
    assert float(((found - x) / x).abs().max()) <= 2**-7
    assert not (found.view(torch.int32) & (2**17 - 1)).any()


def test_the_search_ends_beside_the_limit() -> None:
    def attempt(trade: float) -> Candidate:
        return Candidate(trade=trade, size_bytes=int(1 / trade), drop=Drop(points=1e6 * trade, ci95=(0.0, 0.0)))

    found = search(attempt, lambda item: item.drop.points <= 0.5)
    inside = max(item.trade for item in found if item.drop.points <= 0.5)
    assert 5e-7 / 4 ** (1 / 4) <= inside <= 5e-7
