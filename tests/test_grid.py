"""Laws of integer grids: round trips, equality with a naive reference and with ONNX Runtime, LSQ gradients."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.grid import (
    affine_params,
    dequantize,
    expand,
    fake_quantize,
    lsq_grad_scale,
    lsq_quantize,
    param_shape,
    quantize,
    rows,
    saturation_bounds,
    saturation_free,
    saturation_scale,
    scale_for_bias,
    ste_quantize,
    worst_pair,
)
from kompakt.spec import PerChannel, PerGroup, PerTensor, QuantSpec

GRANULARITIES = (PerTensor(), PerChannel(axis=0), PerChannel(axis=1), PerGroup(size=12))
SPECS = [
    QuantSpec(bits=bits, signed=signed, symmetric=symmetric, granularity=granularity, narrow=narrow)
    for bits, signed, symmetric, granularity in itertools.product((1, 2, 4, 8), (0, 1), (0, 1), GRANULARITIES)
    for narrow in ((False, True) if signed and bits > 1 else (False,))
]


def weight(seed: int = 0, shape: tuple[int, ...] = (6, 4, 3, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


def params(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    low, high = rows(w, spec.granularity).aminmax(dim=1)
    shape = param_shape(tuple(w.shape), spec.granularity)
    return affine_params(low.reshape(shape), high.reshape(shape), spec)


def naive(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> np.ndarray:
    """Ten lines of numpy, value by value, in float32."""
    out = np.empty(x.numel(), np.int64)
    where = np.unravel_index(np.arange(x.numel()), x.shape)
    for i, value in enumerate(x.numpy().ravel()):
        match spec.granularity:
            case PerTensor():
                at = ()
            case PerChannel(axis=axis):
                at = (where[axis][i],)
            case PerGroup(size=size):
                at = (where[0][i], i % (x.numel() // x.shape[0]) // size)
        steps = np.rint(np.float32(value) / scale.numpy()[at]) + zero_point.numpy()[at]
        out[i] = min(max(steps, spec.qmin), spec.qmax)
    return out.reshape(x.shape)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_the_naive_reference(spec: QuantSpec) -> None:
    w = weight()
    scale, zero_point = params(w, spec)
    np.testing.assert_array_equal(quantize(w, scale, zero_point, spec).numpy(), naive(w, scale, zero_point, spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_floats_take_the_same_way_as_integers_bit_for_bit(spec: QuantSpec) -> None:
    w = torch.cat([weight().flatten(), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38] * 2)]).view(6, -1)
    w = w[:, :36]
    w[0, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])
    scale, zero_point = params(weight().reshape(6, 36), spec)
    by_integers = dequantize(quantize(w, scale, zero_point, spec), scale, zero_point, spec)
    by_floats = fake_quantize(w, scale, zero_point, spec)
    assert torch.equal(by_floats.view(torch.int32), by_integers.view(torch.int32))
    assert torch.equal(ste_quantize(w, scale, zero_point, spec), by_floats)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_idempotent_and_integers_round_trip(spec: QuantSpec) -> None:
    w = weight()
    scale, zero_point = params(w, spec)
    once = fake_quantize(w, scale, zero_point, spec)
    assert torch.equal(fake_quantize(once, scale, zero_point, spec), once)
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(spec.qmin, spec.qmax + 1, w.shape, generator=generator, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(q, scale, zero_point, spec), scale, zero_point, spec), q)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits > 1], ids=str)
def test_zero_is_exact_and_the_range_is_covered(spec: QuantSpec) -> None:
    w = weight()
    scale, zero_point = params(w, spec)
    assert torch.equal(fake_quantize(torch.zeros_like(w), scale, zero_point, spec), torch.zeros_like(w))
    error = (fake_quantize(w, scale, zero_point, spec) - w).abs()
    # Half a step for rounding, half a step more at an end where the zero point was rounded.
    allowed = expand(scale, tuple(w.shape), spec.granularity) * (0.5 if spec.symmetric else 1.0)
    assert bool((error <= allowed * 1.0001).all())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_no_more_error(granularity: PerTensor | PerChannel | PerGroup, symmetric: bool) -> None:
    w = weight()
    errors = []
    for bits in range(2, 9):
        spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)
        errors.append(float((fake_quantize(w, *params(w, spec), spec) - w).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_channel_no_worse_than_per_tensor(bits: int) -> None:
    w = weight()
    tensor, channel = QuantSpec(bits=bits), QuantSpec(bits=bits, granularity=PerChannel())
    coarse = (fake_quantize(w, *params(w, tensor), tensor) - w).square().mean()
    fine = (fake_quantize(w, *params(w, channel), channel) - w).square().mean()
    assert fine < coarse


def onnx_round_trip(x: Tensor, scale: Tensor, zero_point: Tensor, signed: bool, axis: int) -> tuple[Tensor, Tensor]:
    stored = zero_point.numpy().astype(np.int8 if signed else np.uint8)
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], axis=axis),
    ]
    graph = helper.make_graph(
        nodes,
        "grid",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", kind, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [numpy_helper.from_array(scale.numpy(), "scale"), numpy_helper.from_array(stored, "zero_point")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    q, y = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(q.astype(np.int32)), torch.from_numpy(y)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(axis=0), PerChannel(axis=1)], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_onnxruntime(granularity: PerTensor | PerChannel, signed: bool, symmetric: bool) -> None:
    spec = QuantSpec(signed=signed, symmetric=symmetric, granularity=granularity)
    w = weight(shape=(6, 40, 50))
    scale, zero_point = params(w, spec)
    full = expand(scale, tuple(w.shape), granularity)
    generator = torch.Generator().manual_seed(2)
    ties = (torch.randint(-300, 300, w.shape, generator=generator) + 0.5) * full
    x = torch.cat([w, ties, w * 3], dim=2)
    axis = granularity.axis if isinstance(granularity, PerChannel) else 1
    q, y = onnx_round_trip(x, scale, zero_point, signed, axis)
    assert torch.equal(quantize(x, scale, zero_point, spec), q)
    assert torch.equal(fake_quantize(x, scale, zero_point, spec), y)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.granularity == PerTensor()], ids=str)
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1e-38, 1e-38), (-1e-30, 0.0), (5.0, 5.0), (-3e38, 3e38), (0.0, 1e-12)]
)
def test_degenerate_ranges_give_usable_scales(spec: QuantSpec, low: float, high: float) -> None:
    scale, zero_point = affine_params(torch.tensor([low]), torch.tensor([high]), spec)
    assert torch.isfinite(scale).all()
    assert float(scale) >= 2.0**-60
    assert spec.qmin <= int(zero_point) <= spec.qmax
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (1.0, -1.0)])
def test_unusable_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="range with"):
        affine_params(torch.tensor(low), torch.tensor(high), QuantSpec())


def test_group_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(InputError, match=r"group size 48 does not divide 36; use 1, 2, 3, 4, 6, 9, 12, 18, 36$"):
        param_shape((6, 4, 3, 3), PerGroup(size=48))
    with pytest.raises(InputError, match="axis 4"):
        param_shape((6, 4, 3, 3), PerChannel(axis=4))
    with pytest.raises(InputError, match="expected"):
        expand(torch.ones(5), (6, 4), PerChannel())


def test_expand_is_a_view_where_it_can_be() -> None:
    scale = torch.rand(6)
    assert expand(scale, (6, 4, 3, 3), PerChannel()).data_ptr() == scale.data_ptr()
    assert expand(scale[0], (6, 4, 3, 3), PerTensor()).data_ptr() == scale.data_ptr()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_straight_through_gradient_is_one_inside_and_zero_outside(
    granularity: PerTensor | PerChannel | PerGroup,
) -> None:
    spec = QuantSpec(bits=4, symmetric=False, granularity=granularity)
    w = weight()
    scale, zero_point = params(w * 0.5, spec)
    x = w.clone().requires_grad_()
    ste_quantize(x, scale, zero_point, spec).sum().backward()
    steps = w / expand(scale, tuple(w.shape), granularity) + expand(zero_point, tuple(w.shape), granularity)
    inside = (steps >= spec.qmin) & (steps <= spec.qmax)
    assert torch.equal(x.grad, inside.float())
    assert 0 < int(inside.sum()) < inside.numel()


def lsq_reference(x: float, s: float, z: float, spec: QuantSpec) -> tuple[float, float]:
    """The gradients of Esser 2020 (equation 3) and of LSQ+ for one value."""
    v, low, high = x / s, spec.qmin - z, spec.qmax - z
    if v < low:
        return low, -s
    return (high, -s) if v > high else (round(v) - v, 0.0)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_learned_step_gradients_equal_the_formula(granularity: PerTensor | PerChannel | PerGroup, bits: int) -> None:
    spec = QuantSpec(bits=bits, symmetric=False, granularity=granularity)
    w = weight()
    scale, zero_point = params(w * 0.5, spec)
    s, z = scale.clone().requires_grad_(), zero_point.float().requires_grad_()
    grads = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    (lsq_quantize(w, s, z, spec, 0.25) * grads).sum().backward()
    full_s, full_z = (rows(expand(p, tuple(w.shape), granularity), granularity) for p in (scale, zero_point))
    for_scale, for_zero = torch.zeros(full_s.shape[0]), torch.zeros(full_s.shape[0])
    flat, weights = rows(w, granularity), rows(grads, granularity)
    for i, j in itertools.product(range(flat.shape[0]), range(flat.shape[1])):
        ds, dz = lsq_reference(float(flat[i, j]), float(full_s[i, j]), float(full_z[i, j]), spec)
        for_scale[i] += ds * weights[i, j] * 0.25
        for_zero[i] += dz * weights[i, j] * 0.25
    torch.testing.assert_close(s.grad.flatten(), for_scale, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(z.grad.flatten(), for_zero, rtol=1e-3, atol=1e-4)


def test_learned_step_gradient_of_clipped_values_equals_finite_differences() -> None:
    spec, x, step = QuantSpec(bits=3), torch.tensor([-9.0, 7.0, 30.0]), 1e-3
    scale = torch.tensor(1.0, requires_grad=True)
    zero = torch.tensor(0)
    lsq_quantize(x, scale, zero, spec, 1.0).sum().backward()
    ends = [fake_quantize(x, torch.tensor(1.0 + d), zero, spec).sum() for d in (-step, step)]
    assert float(scale.grad) == pytest.approx(float((ends[1] - ends[0]) / (2 * step)), rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_a_learned_step_compiles_whole(granularity: PerTensor | PerChannel | PerGroup) -> None:
    spec = QuantSpec(bits=3, symmetric=False, granularity=granularity)
    scale, zero_point = params(weight() * 0.5, spec)

    def loss(w: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (lsq_quantize(w, s, z, spec, 0.25) * w.detach().cos()).sum()

    found = []
    for work in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)):
        leaves = [each.detach().clone().requires_grad_() for each in (weight(), scale, zero_point.float())]
        value = work(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found)


def test_learned_step_finds_a_better_scale() -> None:
    spec, x = QuantSpec(bits=3), weight(shape=(1, 4000))[0]
    scale, zero = params(x, spec)
    learned = scale.clone().requires_grad_()
    optimizer = torch.optim.SGD([learned], lr=0.002)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (lsq_quantize(x, learned, zero, spec, lsq_grad_scale(x.numel(), spec)) - x).square().sum()
        loss.backward()
        optimizer.step()
    before = (fake_quantize(x, scale, zero, spec) - x).square().mean()
    after = (fake_quantize(x, learned, zero, spec) - x).square().mean()
    assert float(after) < 0.7 * float(before)


def test_worst_pair_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(-128, 128, (20, 3, 2, 2), generator=generator)
    q[0], q[1] = q[0].abs(), -q[1].abs()
    positive, negative = worst_pair(q)
    for channel in range(20):
        pairs = [max(a, 0) + max(b, 0) for a, b in itertools.combinations(q[channel].flatten().tolist(), 2)]
        assert int(positive[channel]) == max(pairs)
        pairs = [min(a, 0) + min(b, 0) for a, b in itertools.combinations(q[channel].flatten().tolist(), 2)]
        assert int(negative[channel]) == min(pairs)
    sums = torch.stack([positive * 255 <= 32767, negative * 255 >= -32768]).all(0)
    assert torch.equal(saturation_free(q), sums)
    assert saturation_free(torch.tensor([[127, 127], [-127, -127]]), activation_max=127).all()
    assert saturation_free(torch.tensor([[127], [-128]])).all()


@pytest.mark.parametrize("scale_by", ["gauss", "one large", "large pair", "positive"])
def test_saturation_scale_is_the_smallest_safe_one(scale_by: str) -> None:
    w = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    if scale_by == "one large":
        w[:, 3] = 8 * w[:, 3].sign()
    if scale_by == "large pair":
        w[:, 3] = w[:, 7] = 8
    w = w.abs() if scale_by == "positive" else w
    spec = QuantSpec(granularity=PerChannel())
    plain, zero = params(w, spec)
    scale = saturation_scale(w, spec)
    assert bool(saturation_free(quantize(w, scale, zero, spec)).all())
    assert bool((scale >= plain).all())
    assert bool((scale <= plain * 2.02).all())
    for channel in range(12):
        smaller = torch.linspace(float(plain[channel]), float(scale[channel]), 400)[:-1]
        smaller = smaller[smaller < scale[channel]]
        q = [quantize(w[channel : channel + 1], s.view(1), zero[:1], spec) for s in smaller]
        assert not any(bool(saturation_free(each)) for each in q)
    if scale_by == "one large":
        assert bool((scale < plain * 1.6).all()), "a channel with one large weight keeps more than 7 bits"


def test_saturation_scale_per_tensor_and_refusals() -> None:
    w = weight()
    scale = saturation_scale(w, QuantSpec())
    assert scale.shape == ()
    assert bool(saturation_free(quantize(w, scale, torch.tensor(0), QuantSpec())).all())
    assert torch.equal(saturation_scale(w, QuantSpec(bits=7)), params(w, QuantSpec(bits=7))[0])
    with pytest.raises(InputError, match="symmetric signed"):
        saturation_scale(w, QuantSpec(signed=False))


def test_saturation_scale_follows_the_channels_of_the_spec() -> None:
    w, spec = weight().movedim(0, 1).contiguous(), QuantSpec(granularity=PerChannel(axis=1))
    scale, zero = saturation_scale(w, spec), torch.zeros(6, dtype=torch.int32)
    assert bool(saturation_free(quantize(w, scale, zero, spec), axis=1).all())
    assert torch.equal(scale, saturation_scale(weight(), QuantSpec(granularity=PerChannel())))


@pytest.mark.parametrize("axis", [0, 1])
def test_any_integers_within_the_bounds_are_free_of_saturation(axis: int) -> None:
    generator = torch.Generator().manual_seed(6)
    w = torch.randn(8, 30, generator=generator) * torch.linspace(0.1, 1, 8)[:, None]
    w[::2, 4] *= 9
    spec = QuantSpec(granularity=PerChannel())
    q = quantize(w, saturation_scale(w, spec), torch.zeros(8, dtype=torch.int32), spec)
    q = q if axis == 0 else q.T
    low, high = saturation_bounds(q, axis)
    assert bool((low <= q).all() and (q <= high).all())
    assert bool(saturation_free(low, axis).all() and saturation_free(high, axis).all())
    assert bool((high - low >= 64).all())


def test_bias_fits_int32_after_its_scale_is_raised() -> None:
    scale, bias, input_scale = torch.tensor([2.0**-60, 0.01]), torch.tensor([0.7, 0.7]), torch.tensor(0.02)
    raised = scale_for_bias(scale, bias, input_scale)
    assert float((bias / (raised * input_scale)).max()) <= 2**30
    assert raised[1] == scale[1]
    assert scale_for_bias(torch.tensor(0.0), bias, input_scale).shape == ()
