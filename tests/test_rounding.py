"""Laws of rounding to the layer's output: exact second moments, less error than rounding to nearest."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kompakt.errors import InputError
from kompakt.numerics.adaround import Annealing, Reconstruction, adaround
from kompakt.numerics.grid import affine_params, dequantize, quantize, saturation_free, saturation_scale
from kompakt.numerics.moments import Conv, cross_moment, output_error, patches, second_moment
from kompakt.numerics.ranges import weight_range
from kompakt.numerics.rounding import descend, gptq, retarget
from kompakt.spec import PerChannel, PerGroup, PerTensor, QuantSpec

CONVS = (
    Conv(kernel=(3,), stride=(2,), padding=(1,), dilation=(1,)),
    Conv(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
    Conv(kernel=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3), groups=2),
    Conv(kernel=(5, 5), stride=(2, 2), padding=(2, 2), dilation=(1, 1), groups=8),
    Conv(kernel=(1, 1), stride=(2, 2), padding=(0, 0), dilation=(1, 1)),
    Conv(kernel=(2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1), groups=4),
)
RUN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SAME = Conv(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))


def run(x: Tensor, w: Tensor, conv: Conv) -> Tensor:
    return RUN[len(conv.kernel)](x, w, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def images(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Smooth, rectified, mixed over channels: what a convolution inside a network sees."""
    generator, mixer = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    x = torch.randn(count * channels, 1, size, size, generator=generator)
    x = F.avg_pool2d(x, 5, stride=1, padding=2).view(count, channels, size, size) * 5
    mix = torch.randn(channels, channels, generator=mixer) / channels**0.5
    return (torch.einsum("oc,nchw->nohw", mix, x) + 0.5).relu()


def features(count: int, width: int, seed: int) -> Tensor:
    """Correlated and rectified: what a linear layer sees."""
    generator, mixer = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(98)
    mix = torch.randn(width // 4, width, generator=mixer)
    noise = 0.3 * torch.randn(count, width, generator=generator)
    return (torch.randn(count, width // 4, generator=generator) @ mix + noise).relu()


def random_weight(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def grid(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, QuantSpec]:
    return (*affine_params(*weight_range(w, spec, "mse"), spec), spec)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_patches_times_weight_is_the_convolution(conv: Conv) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, *[9] * len(conv.kernel), generator=generator)
    w = random_weight((16, 8 // conv.groups, *conv.kernel))
    expected = run(x, w, conv)
    by_group = patches(x, conv) @ w.reshape(conv.groups, 16 // conv.groups, -1).mT
    found = by_group.unflatten(1, (2, *expected.shape[2:])).movedim(-1, 2).movedim(0, 1).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_second_moments_give_the_exact_output_error(conv: Conv) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, *[9] * len(conv.kernel), generator=generator)
    w, other = (
        random_weight((16, 8 // conv.groups, *conv.kernel)),
        random_weight((16, 8 // conv.groups, *conv.kernel), 4),
    )
    hessian = second_moment(x, conv)
    truth = (run(x, w, conv) - run(x, other, conv)).square().sum()
    torch.testing.assert_close(output_error(w, other, hessian), truth, rtol=1e-4, atol=1e-4)
    parts = sum(second_moment(part, conv) for part in x.split(1))
    torch.testing.assert_close(parts, hessian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hessian, hessian.mT)


def test_second_moments_of_a_linear_layer_with_many_tokens() -> None:
    x, w = features(40, 12, seed=5).view(4, 10, 12), random_weight((7, 12))
    hessian = second_moment(x)
    assert hessian.shape == (1, 12, 12)
    torch.testing.assert_close(output_error(w, torch.zeros_like(w), hessian), F.linear(x, w).square().sum())


def cases() -> list[tuple[str, QuantSpec]]:
    specs = [QuantSpec(bits=4, granularity=PerChannel()), QuantSpec(bits=2, symmetric=False)]
    specs.append(QuantSpec(bits=3, granularity=PerGroup(size=12)))
    kinds = ("linear", "conv", "grouped", "depthwise")
    return [(k, s) for k, s in itertools.product(kinds, specs) if k != "depthwise" or s.granularity == PerChannel()]


def layer(kind: str) -> tuple[Tensor, Tensor, Tensor, Conv | None]:
    """Inputs to fit, held-out inputs, weight, convolution."""
    if kind == "linear":
        return features(400, 48, seed=1), features(200, 48, seed=2), random_weight((32, 48)), None
    groups = {"conv": 1, "grouped": 2, "depthwise": 8}[kind]
    conv = replace(SAME, groups=groups)
    return images(24, 8, 10, seed=1), images(12, 8, 10, seed=2), random_weight((16, 8 // groups, 3, 3)), conv


@pytest.mark.parametrize(("kind", "spec"), cases(), ids=str)
def test_gptq_and_descent_lower_the_error_of_unseen_outputs(kind: str, spec: QuantSpec) -> None:
    x, unseen, w, conv = layer(kind)
    params, hessian, judge = grid(w, spec), second_moment(x, conv), second_moment(unseen, conv)
    nearest = quantize(w, *params)
    swept = gptq(w, hessian, *params)
    better = descend(w, swept, hessian, params)
    errors = [float(output_error(w, dequantize(q, *params), judge)) for q in (nearest, swept, better)]
    assert errors[1] < 0.8 * errors[0]
    fitted = [float(output_error(w, dequantize(q, *params), hessian)) for q in (nearest, swept, better)]
    assert fitted[2] <= fitted[1] * 1.0001 < fitted[0]
    for q in (swept, better):
        assert q.dtype == torch.int32
        assert q.shape == w.shape
        assert spec.qmin <= int(q.min()) <= int(q.max()) <= spec.qmax


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(size=16)], ids=str)
def test_uncorrelated_inputs_leave_rounding_to_nearest(granularity: PerTensor | PerChannel | PerGroup) -> None:
    w = random_weight((8, 32))
    params = grid(w, QuantSpec(bits=3, granularity=granularity))
    nearest = quantize(w, *params)
    assert torch.equal(gptq(w, torch.eye(32)[None] * 5, *params), nearest)
    assert torch.equal(descend(w, nearest, torch.eye(32)[None] * 5, params), nearest)


def test_descent_never_loses_from_any_start() -> None:
    x, _, w, conv = layer("conv")
    params, hessian = grid(w, QuantSpec(bits=3, granularity=PerChannel())), second_moment(x, conv)
    generator = torch.Generator().manual_seed(8)
    for q in (torch.zeros_like(w, dtype=torch.int32), torch.randint(-4, 4, w.shape, generator=generator)):
        before = output_error(w, dequantize(q, *params), hessian)
        errors = [
            output_error(w, dequantize(descend(w, q, hessian, params, sweeps), *params), hessian)
            for sweeps in (1, 2, 8)
        ]
        assert float(before) > float(errors[0]) >= float(errors[1]) >= float(errors[2]) * 0.9999


def test_near_the_best_integers_of_a_small_problem() -> None:
    x, w = features(200, 8, seed=4)[:, :6], random_weight((4, 6))
    params, hessian = grid(w, QuantSpec(bits=2, granularity=PerChannel())), second_moment(x)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.int32)
    found = descend(w, gptq(w, hessian, *params), hessian, params)
    for row in range(4):
        scale = params[0][row]
        errors = w[row] - every * scale
        best = float(((errors @ hessian[0]) * errors).sum(1).min())
        mine = float(output_error(w[row : row + 1], found[row : row + 1] * scale, hessian))
        plain = float(output_error(w[row : row + 1], dequantize(quantize(w, *params), *params)[row : row + 1], hessian))
        assert best * 0.999 <= mine <= plain
        assert mine <= 1.5 * best


def test_order_of_columns_and_block_size_do_not_matter() -> None:
    x, _, w, _ = layer("linear")
    params, order = (
        grid(w, QuantSpec(bits=4, granularity=PerChannel())),
        torch.randperm(48, generator=torch.Generator().manual_seed(6)),
    )
    hessian = second_moment(x)
    q = gptq(w, hessian, *params)
    shuffled = gptq(w[:, order], hessian[:, order][:, :, order], *params)
    assert float((q[:, order] == shuffled).float().mean()) > 0.97
    blocked = gptq(w, hessian, *params, block=5)
    assert float((q == blocked).float().mean()) > 0.97


def test_dead_and_dependent_inputs() -> None:
    x, w = features(20, 48, seed=1), random_weight((8, 48))
    x[:, 7] = 0
    x[:, 9] = x[:, 8]
    params, hessian = grid(w, QuantSpec(bits=4, granularity=PerChannel())), second_moment(x)
    nearest = quantize(w, *params)
    q = gptq(w, hessian, *params)
    assert torch.equal(q[:, 7], nearest[:, 7])
    assert torch.equal(descend(w, q, hessian, params)[:, 7], nearest[:, 7])
    assert output_error(w, dequantize(q, *params), hessian) < output_error(w, dequantize(nearest, *params), hessian)
    assert torch.equal(gptq(w, torch.zeros(1, 48, 48), *params), nearest)


def apply_layer(x: Tensor, w: Tensor, conv: Conv | None) -> Tensor:
    return F.linear(x, w) if conv is None else run(x, w, conv)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "depthwise"])
def test_retargeted_weights_mend_the_errors_of_the_inputs(kind: str) -> None:
    x, unseen, w, conv = layer(kind)

    def spoilt(values: Tensor) -> Tensor:
        """What integers of two bits and wrong weights before this layer make of its inputs."""
        axis = -1 if conv is None else 1
        wrong = 0.7 * values + 0.3 * values.roll(1, dims=axis)
        return (wrong / 0.8).round().clamp(0, 3) * 0.8

    cross, hessian = cross_moment(x, spoilt(x), conv), second_moment(spoilt(x), conv)
    mended = retarget(w, cross, hessian)
    spec = QuantSpec(bits=4, granularity=PerChannel())
    truth = apply_layer(unseen, w, conv)

    def lost(weight: Tensor) -> float:
        return float((apply_layer(spoilt(unseen), weight, conv) - truth).square().mean())

    # A depthwise layer cannot undo what mixed its channels.
    share = 0.95 if kind == "depthwise" else 0.8
    assert lost(mended) < share * lost(w)
    rounded = [dequantize(gptq(v, hessian, *grid(v, spec)), *grid(v, spec)) for v in (w, mended)]
    assert lost(rounded[1]) < share * lost(rounded[0])


def test_retargeting_changes_nothing_where_the_inputs_are_the_same() -> None:
    x, _, w, conv = layer("grouped")
    hessian = second_moment(x, conv)
    assert torch.equal(cross_moment(x, x.clone(), conv), hessian)
    torch.testing.assert_close(retarget(w, hessian, hessian), w)
    torch.testing.assert_close(retarget(w, hessian * 0, hessian * 0), w)
    with pytest.raises(InputError, match="expected equal shapes"):
        cross_moment(x, x[:1], conv)


def test_what_does_not_fit_is_refused() -> None:
    w = random_weight((8, 12))
    params = grid(w, QuantSpec())
    with pytest.raises(InputError, match=r"second moments \(1, 11, 11\) do not fit"):
        gptq(w, torch.eye(11)[None], *params)
    with pytest.raises(InputError, match="NaN or infinite"):
        gptq(w, torch.full((1, 12, 12), float("nan")), *params)
    with pytest.raises(InputError, match="expected 4 dimensions"):
        patches(torch.zeros(1, 8, 9), SAME)
    with pytest.raises(InputError, match="differ in length"):
        Conv(kernel=(3, 3), stride=(1,), padding=(0, 0), dilation=(1, 1))


def problem(x: Tensor, w: Tensor, conv: Conv | None) -> Reconstruction:
    def apply(inputs: Tensor, weight: Tensor) -> Tensor:
        return (F.linear(inputs, weight) if conv is None else run(inputs, weight, conv)).relu()

    return Reconstruction(layer=apply, inputs=x, targets=apply(x, w))


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=3, granularity=PerChannel()), QuantSpec(bits=4, symmetric=False)], ids=str
)
def test_adaround_lowers_the_error_of_unseen_outputs(kind: str, spec: QuantSpec) -> None:
    x, unseen, w, conv = layer(kind)
    params = grid(w, spec)
    task, judge = problem(x, w, conv), problem(unseen, w, conv)
    nearest = quantize(w, *params)
    found = [
        adaround(w, *params, task, Annealing(iterations=200, batch=8), torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert torch.equal(*found), "one seed, one answer"
    learned = found[0]
    before, after = (judge.error(dequantize(q, *params)) for q in (nearest, learned))
    assert after < 0.85 * before
    assert learned.dtype == torch.int32
    assert spec.qmin <= int(learned.min()) <= int(learned.max()) <= spec.qmax
    # Every weight goes up or down, never further.
    assert int((learned - nearest).abs().max()) == 1


def test_adaround_without_iterations_is_no_worse_than_nearest() -> None:
    x, _, w, conv = layer("conv")
    params, task = grid(w, QuantSpec(bits=4)), problem(x, w, conv)
    nearest = quantize(w, *params)
    q = adaround(w, *params, task, Annealing(iterations=0), torch.Generator().manual_seed(0))
    assert task.error(dequantize(q, *params)) <= task.error(dequantize(nearest, *params))
    exact = dequantize(nearest, *params)
    same = adaround(exact, *params, problem(x, exact, conv), Annealing(), torch.Generator().manual_seed(0))
    assert torch.equal(same, nearest)


def test_annealing_falls_from_the_first_exponent_to_the_last() -> None:
    annealing = Annealing(iterations=100, warm=0.2)
    betas = [annealing.beta_at(step) for step in range(20, 101)]
    assert betas[0] == pytest.approx(20)
    assert betas[-1] == pytest.approx(2)
    assert betas == sorted(betas, reverse=True)


def test_integers_stay_free_of_saturation_where_the_spec_asks_it() -> None:
    x, _, w, conv = layer("conv")
    w[:, 0, 0, 0] *= 8
    spec = QuantSpec(granularity=PerChannel(), saturation_free=True)
    scale, zero_point = saturation_scale(w, spec), torch.zeros(16, dtype=torch.int32)
    params, hessian = (scale, zero_point, spec), second_moment(x, conv)
    nearest = quantize(w, *params)
    swept = gptq(w, hessian, *params)
    learned = adaround(w, *params, problem(x, w, conv), Annealing(iterations=60), torch.Generator().manual_seed(0))
    for q in (nearest, swept, descend(w, swept, hessian, params), learned):
        assert bool(saturation_free(q).all())
        assert int(q.abs().max()) > 64, "the larger integer of a pair may pass 7 bits"
    errors = [output_error(w, dequantize(q, *params), hessian) for q in (nearest, swept)]
    assert float(errors[1]) < 0.8 * float(errors[0])
    unbound = QuantSpec(granularity=PerChannel())
    assert not bool(saturation_free(gptq(w * 1.5, hessian, scale, zero_point, unbound)).all())
