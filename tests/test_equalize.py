"""Laws of equalization: the function is kept, channels reach equally far, per-tensor integers lose less."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kompakt.errors import InputError
from kompakt.numerics.equalize import (
    Layer,
    equalize_chain,
    equalize_pair,
    equalize_triple,
    input_reach,
    output_reach,
    scale_inputs,
)
from kompakt.numerics.grid import affine_params, fake_quantize
from kompakt.numerics.ranges import weight_range
from kompakt.spec import QuantSpec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def badly_scaled(*shape: int, seed: int) -> Tensor:
    """Output channels over five orders of magnitude."""
    return random(*shape, seed=seed) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))


def quantized(w: Tensor) -> Tensor:
    spec = QuantSpec()
    return fake_quantize(w, *affine_params(*weight_range(w, spec), spec), spec)


def pair(kind: str) -> tuple[Tensor, Tensor, Tensor, int]:
    if kind == "linear":
        return badly_scaled(16, 8, seed=1), random(16, seed=2), random(5, 16, seed=3), 1
    groups = {"conv": 1, "grouped": 4, "depthwise": 16}[kind]
    return badly_scaled(16, 8, 3, 3, seed=1), random(16, seed=2), random(32, 16 // groups, 3, 3, seed=3), groups


def apply(w1: Tensor, b1: Tensor | None, w2: Tensor, groups: int) -> Tensor:
    if w1.ndim == 2:
        return F.linear(F.relu(F.linear(random(6, 8, seed=9), w1, b1)), w2)
    return F.conv2d(F.relu(F.conv2d(random(2, 8, 9, 9, seed=9), w1, b1, padding=1)), w2, padding=1, groups=groups)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "depthwise"])
def test_the_function_is_unchanged_and_integers_lose_less(kind: str) -> None:
    w1, b1, w2, groups = pair(kind)
    e1, eb, e2, s = equalize_pair(w1, b1, w2, groups)
    expected = apply(w1, b1, w2, groups)
    size = float(expected.abs().max())
    assert float((apply(e1, eb, e2, groups) - expected).abs().max()) <= 1e-5 * size
    torch.testing.assert_close(output_reach(e1), input_reach(e2, groups), rtol=1e-4, atol=0)
    torch.testing.assert_close(e1 * s.view(-1, *[1] * (w1.ndim - 1)), w1)
    plain = apply(quantized(w1), b1, quantized(w2), groups) - expected
    equal = apply(quantized(e1), eb, quantized(e2), groups) - expected
    assert float(equal.square().mean()) < 0.5 * float(plain.square().mean())


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "depthwise"])
def test_equalizing_twice_changes_nothing(kind: str) -> None:
    w1, b1, w2, groups = pair(kind)
    e1, eb, e2, _ = equalize_pair(w1, b1, w2, groups)
    again = equalize_pair(e1, eb, e2, groups)
    torch.testing.assert_close(again[3], torch.ones(16), rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_reach_and_scaling_of_inputs_equal_loops(groups: int) -> None:
    w, factor = random(32, 16 // groups, 3, seed=4), random(16, seed=5).exp()
    scaled, width = scale_inputs(w, factor, groups), 16 // groups
    for channel in range(16):
        group, inside = divmod(channel, width)
        part = slice(group * 32 // groups, (group + 1) * 32 // groups)
        assert torch.equal(scaled[part, inside], w[part, inside] * factor[channel])
        assert input_reach(w, groups)[channel] == w[part, inside].abs().max()


def test_dead_channels_stay_and_no_bias_is_kept() -> None:
    w1, _, w2, groups = pair("conv")
    w1[3], w2[:, 5] = 0, 0
    e1, eb, e2, s = equalize_pair(w1, None, w2, groups)
    assert eb is None
    assert float(s[3]) == float(s[5]) == 1
    assert torch.isfinite(e1).all()
    assert torch.isfinite(e2).all()
    w1[0] *= 1e-30
    bounded = equalize_pair(w1, None, w2, groups)[3]
    assert float(bounded.min()) >= 2.0**-16


def block(first: Layer, depthwise: Layer, last: Layer) -> Tensor:
    x = F.relu(F.conv2d(random(2, 8, 9, 9, seed=9), first.weight, first.bias))
    x = F.relu(F.conv2d(x, depthwise.weight, depthwise.bias, padding=1, groups=depthwise.groups))
    return F.conv2d(x, last.weight, last.bias)


def inverted_residual() -> tuple[Layer, Layer, Layer]:
    return (
        Layer(weight=badly_scaled(16, 8, 1, 1, seed=1), bias=random(16, seed=2)),
        Layer(weight=badly_scaled(16, 1, 3, 3, seed=3).flip(0), bias=random(16, seed=4), groups=16),
        Layer(weight=random(12, 16, 1, 1, seed=5), bias=random(12, seed=6)),
    )


def with_integers(layers: tuple[Layer, ...]) -> list[Layer]:
    return [Layer(weight=quantized(each.weight), bias=each.bias, groups=each.groups) for each in layers]


def test_depthwise_triple_keeps_the_function_and_reaches_equally_far() -> None:
    layers = inverted_residual()
    equal = equalize_triple(*layers)
    expected = block(*layers)
    size = float(expected.abs().max())
    assert float((block(*equal) - expected).abs().max()) <= 1e-5 * size
    reach = output_reach(equal[0].weight)
    torch.testing.assert_close(output_reach(equal[1].weight), reach, rtol=1e-3, atol=0)
    torch.testing.assert_close(input_reach(equal[2].weight), reach, rtol=1e-3, atol=0)
    plain = (block(*with_integers(layers)) - expected).square().mean()
    better = (block(*with_integers(equal)) - expected).square().mean()
    assert float(better) < 0.1 * float(plain)


def test_chain_converges_and_agrees_with_the_triple() -> None:
    layers = inverted_residual()
    chain = equalize_chain(layers, sweeps=100, tolerance=1e-6)
    for mine, exact in zip(chain, equalize_triple(*layers), strict=True):
        torch.testing.assert_close(mine.weight, exact.weight, rtol=1e-3, atol=1e-6)
    assert equalize_chain(layers[:1]) == layers[:1]
    assert chain[0].inputs == 8


def test_layers_that_do_not_meet_are_refused() -> None:
    first, depthwise, last = inverted_residual()
    with pytest.raises(InputError, match="16 outputs feeds one with 12 inputs"):
        equalize_pair(first.weight, None, random(4, 12, 1, 1))
    with pytest.raises(InputError, match="expected depthwise"):
        equalize_triple(first, last, last)
    with pytest.raises(InputError, match="expected equal"):
        equalize_triple(first, depthwise, Layer(weight=random(4, 12, 1, 1)))
