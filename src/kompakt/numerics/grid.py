"""Affine integer grids: ``x ≈ scale · (q - zero_point)``, with the arithmetic of ONNX.

``quantize`` and ``dequantize`` give, bit for bit, what ONNX ``QuantizeLinear`` and
``DequantizeLinear`` give in float32: a true division, rounding half to even, saturation.

Scales and zero points have shape ``()`` for ``PerTensor``, ``(shape[axis],)`` for ``PerChannel`` and
``(shape[0], row_length // size)`` for ``PerGroup``; ``expand`` spreads them over the tensor.

Reference: Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort, "A White Paper on Neural
Network Quantization", 2021, arXiv 2106.08295, section 2.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kompakt.errors import InputError
from kompakt.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec

SMALLEST_SCALE = 2.0**-60
ZERO_RANGE_SCALE = 2.0**-16
LARGEST_FLOAT = torch.finfo(torch.float32).max
INT16_MAX = 32767


def param_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the scale of a tensor of ``shape``.

    Raises:
        InputError: the axis does not exist, or the group size does not divide the row length.
    """
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        if not -len(shape) <= granularity.axis < len(shape):
            raise InputError(f"axis {granularity.axis} is outside a tensor of shape {tuple(shape)}")
        return (shape[granularity.axis],)
    row = prod(shape[1:])
    if not shape or row % granularity.size:
        fits = [str(n) for n in range(1, row + 1) if row % n == 0] if shape else []
        raise InputError(f"group size {granularity.size} does not divide {row}; use {', '.join(fits) or 'PerTensor'}")
    return (shape[0], row // granularity.size)


def expand(param: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """Spread a scale or zero point over a tensor of ``shape``, as a view where one exists.

    Raises:
        InputError: ``param`` has not the shape that ``param_shape`` gives.
    """
    return _broadcastable(param, tuple(shape), granularity).expand(tuple(shape))


def _broadcastable(param: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """View ``param`` so that it broadcasts against ``shape``, with as few values as can be."""
    expected = param_shape(shape, granularity)
    if tuple(param.shape) != expected:
        raise InputError(f"scale of shape {tuple(param.shape)} for a tensor of shape {shape}: expected {expected}")
    if isinstance(granularity, PerTensor):
        return param
    if isinstance(granularity, PerChannel):
        spread = [1] * len(shape)
        spread[granularity.axis] = -1
        return param.view(spread)
    return param[:, :, None].expand(*expected, granularity.size).reshape(shape)


def rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Reshape ``x`` to one row for each scale, in the scale's order: ``(scales, values)``."""
    expected = param_shape(tuple(x.shape), granularity)
    if isinstance(granularity, PerChannel):
        return x.movedim(granularity.axis, 0).reshape(expected[0], -1)
    return x.reshape(1, -1) if isinstance(granularity, PerTensor) else x.reshape(-1, granularity.size)


def affine_params(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Compute the scale and zero point whose grid covers ``[low, high]`` and holds 0 exactly.

    Symmetric: ``scale = max(low / (qmin - z), high / (qmax - z))`` with ``z`` 0 (signed) or the middle
    of the range (unsigned). Affine: ``scale = (high - low) / (qmax - qmin)`` and
    ``z = clamp(round(qmin - low / scale))``. Where the spec asks for it, the scale is the next power of two.
    A range without 0 is widened to it; one so small that its scale would be under 2^-60 gets the scale 2^-16,
    which leaves room for an int32 bias.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        spec: the integers.

    Returns:
        Scale, float32, and zero point, int32, of the shape of ``low``.

    Raises:
        InputError: an end is not finite, or ``low > high``.
    """
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise InputError("range with NaN or infinite ends cannot be quantized; look for overflow in the float model")
    if bool((low > high).any()):
        raise InputError("range with its low end above its high end; exchange the two")
    lowest, highest = low.double().clamp(max=0), high.double().clamp(min=0)
    if spec.symmetric:
        middle = 0 if spec.signed else 2 ** (spec.bits - 1)
        wide = torch.maximum(lowest / (spec.qmin - middle), highest / max(spec.qmax - middle, 1))
        scale = snapped(_usable(wide), spec)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = snapped(_usable((highest - lowest) / (spec.qmax - spec.qmin)), spec)
    zero_point = torch.round(spec.qmin - lowest / scale.double()).clamp(spec.qmin, spec.qmax)
    return scale, zero_point.to(torch.int32)


def _usable(scale: Tensor) -> Tensor:
    usable = torch.where(scale < SMALLEST_SCALE, ZERO_RANGE_SCALE, scale)
    return usable.clamp(max=LARGEST_FLOAT).float()


def snapped(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the smallest power of two that is no less than each scale where the spec asks for it, else the scales."""
    if not spec.power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale.double())
    return torch.exp2((exponent - (mantissa == 0.5).int()).double()).clamp(max=2.0**127).float()


def nearest_power(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the power of two next to each scale, by ratio, where the spec asks for it, else the scales."""
    return snapped(scale * 2**-0.5, spec) if spec.power_of_two else scale


def scale_for_bias(scale: Tensor, bias: Tensor, input_scale: Tensor) -> Tensor:
    """Raise the weight scales of channels whose bias would not fit an int32 of ``scale · input_scale``.

    Channels with (nearly) no weights have so small a scale that ``bias / (scale · input_scale)`` overflows.
    The result is the smallest scale that leaves one bit of room: ``|bias| / (input_scale · 2^30)``.

    Args:
        scale: weight scales, ``(channels,)`` or ``()``.
        bias: ``(channels,)``.
        input_scale: scale of the layer's input, ``()``.
    """
    need = bias.double().abs() / (input_scale.double() * 2.0**30)
    need = need if scale.ndim else need.max()
    return torch.maximum(scale, need.float())


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``x / scale`` half to even, add the zero point and clamp: int32 of the shape of ``x``."""
    return _steps(x, scale, zero_point, spec).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``scale · (q - zero_point)`` as float32."""
    scale, zero_point = _ready(q, scale, zero_point, spec)
    return (q.to(torch.int32) - zero_point).float() * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``dequantize(quantize(x))``, bit for bit, without leaving floats; no gradient passes."""
    steps = _steps(x, scale, zero_point, spec)
    scale, zero_point = _ready(x, scale, zero_point, spec)
    return steps.sub_(zero_point).mul_(scale)


def _ready(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    shape, granularity = tuple(x.shape), spec.granularity
    return _broadcastable(scale.detach(), shape, granularity), _broadcastable(zero_point.detach(), shape, granularity)


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero_point = _ready(x, scale, zero_point, spec)
    # Adding the zero point, even 0, turns -0.0 into 0.0 as the way over integers does.
    return (x.detach().float() / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)


def ste_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Fake-quantize with a straight-through gradient: 1 where ``x`` is inside the clamp, else 0.

    Reference: Bengio, Léonard, Courville 2013, arXiv 1308.3432.
    """
    return lsq_quantize(x, scale.detach(), zero_point.detach(), spec, 1.0)


def lsq_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, grad_scale: float) -> Tensor:
    """Fake-quantize with the learned-step-size gradient for the scale, and that of LSQ+ for the offset.

    With ``v = x / scale + z``, ``d out / d scale`` is ``round(v) - v`` inside the clamp, ``qmin - z`` below
    and ``qmax - z`` above; ``d out / d z`` is 0 inside and ``-scale`` outside; both times ``grad_scale``.
    A zero point that is learned is a float tensor and is rounded and clamped to the grid on the way forward.

    References: Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020 (LSQ+), arXiv 2004.09576.

    Args:
        x: values to quantize.
        scale: positive scales, of the shape that the granularity asks for.
        zero_point: integers, or floats where it is learned, of the same shape.
        spec: the integers.
        grad_scale: factor on the gradients of scale and zero point, see ``lsq_grad_scale``.

    Returns:
        The values of ``fake_quantize``, float32, of the shape of ``x``.
    """
    shape, granularity = tuple(x.shape), spec.granularity
    spread = _broadcastable(scale, shape, granularity)
    offset = _broadcastable(zero_point.float(), shape, granularity)
    return _LearnedStep.apply(x.float(), spread, offset, spec, grad_scale)


def lsq_grad_scale(values: int, spec: QuantSpec) -> float:
    """Return ``1 / sqrt(values · qmax)``, for ``values`` numbers that share a scale (Esser 2020, §2.2)."""
    return float((values * max(spec.qmax, 1)) ** -0.5)


class _LearnedStep(torch.autograd.Function):
    """The forward and backward of ``lsq_quantize``, for a scale and offset that broadcast against ``x``.

    With ``q`` the clamped integers, ``d out / d scale`` is ``q - v`` inside and ``q`` outside, so that its sum with the
    gradient is ``(Σ grad · out - Σ inside · grad · x) / scale``: three passes over the tensor instead of ten. The
    fastest operators want Python's numbers; a compiler, which fuses the passes, is left with tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, grad_scale: float) -> Tensor:
        zero_point = offset.round().clamp_(spec.qmin, spec.qmax)
        low, high = spec.qmin - zero_point, spec.qmax - zero_point
        ends = (float(low), float(high)) if zero_point.ndim == 0 and not is_compiling() else (low, high)
        out = (x / scale).clamp_(*ends).round_().mul_(scale)
        ctx.save_for_backward(x, out, scale, low, high)
        ctx.grad_scale = grad_scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, out, scale, low, high = ctx.saved_tensors
        inside = _inside(grad, x, scale, low, high)
        for_scale, for_offset = None, None
        if ctx.needs_input_grad[1]:
            for_scale = (_summed(grad, out, scale) - _summed(inside, x, scale)) / scale * ctx.grad_scale
        if ctx.needs_input_grad[2]:
            for_offset = (inside - grad).sum_to_size(low.shape) * scale.sum_to_size(low.shape) * ctx.grad_scale
        return inside, for_scale, for_offset, None, None


def _inside(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The gradient where ``low ≤ x / scale ≤ high``, else 0."""
    if scale.ndim == 0 and low.ndim == 0 and not is_compiling():
        # The operator leaves the ends out.
        ends = float((low - 1e-6) * scale), float((high + 1e-6) * scale)
        return torch.ops.aten.hardtanh_backward(grad, x, *ends)
    value = x / scale
    return grad * ((value >= low) & (value <= high))


def _summed(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum a product over all that shares one value of ``like``."""
    if like.ndim or is_compiling():
        return (a * b).sum_to_size(like.shape)
    if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.flatten(), b.flatten())


def worst_pair(q: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Sum, for each channel, the two largest positive and the two most negative integers.

    Kernels for x86 without VNNI add two products of an unsigned activation and a signed weight in int16,
    with saturation; these sums bound every pair whatever the order of the weights.

    Args:
        q: signed integers of a weight whose zero point is 0.
        axis: the dimension of the output channels.

    Returns:
        ``(positive ≥ 0, negative ≤ 0)``, int32, ``(channels,)`` each.
    """
    flat = rows(q.to(torch.int32), PerChannel(axis=axis))
    count = min(2, flat.shape[1])
    positive = flat.topk(count, dim=1).values.clamp(min=0).sum(1)
    negative = flat.topk(count, dim=1, largest=False).values.clamp(max=0).sum(1)
    return positive.to(torch.int32), negative.to(torch.int32)


def saturation_free(q: Tensor, axis: int = 0, activation_max: int = 255) -> Tensor:
    """Tell, for each channel, whether no pair of products can leave int16: bool ``(channels,)``.

    Args:
        q: signed integers of a weight whose zero point is 0.
        axis: the dimension of the output channels.
        activation_max: the largest activation integer, 255 for 8 bits.
    """
    positive, negative = worst_pair(q, axis)
    return (positive * activation_max <= INT16_MAX) & (negative * activation_max >= -INT16_MAX - 1)


def saturation_scale(w: Tensor, spec: QuantSpec, scale: Tensor | None = None, axis: int | None = None) -> Tensor:
    """Find the smallest scales, no smaller than ``scale``, whose integers cannot saturate int16.

    Finer than 7-bit weights: a channel with one large weight keeps 8 bits. ``round(w / s)`` falls in
    magnitude as ``s`` grows, so the answer is found by bisection over the floats and is exact.

    Args:
        w: float weight.
        spec: symmetric, signed, per tensor or per output channel.
        scale: the scale wanted otherwise, ``()`` or ``(channels,)``; by default the one that clips nothing.
        axis: the dimension of the output channels; by default the spec's, or 0 for one scale per tensor.

    Returns:
        float32 of the shape of ``scale``.

    Raises:
        InputError: the integers are not symmetric signed ones, or are grouped.
    """
    if not (spec.symmetric and spec.signed) or isinstance(spec.granularity, PerGroup):
        raise InputError("a scale without saturation needs symmetric signed weights, per channel or per tensor")
    if axis is None:
        axis = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else 0
    flat = rows(w.detach().float(), PerChannel(axis=axis))
    if scale is None:
        low, high = flat.aminmax(dim=1) if isinstance(spec.granularity, PerChannel) else flat.aminmax()
        scale, _ = affine_params(low, high, spec)
    count = min(2, flat.shape[1])
    ends = torch.cat([flat.topk(count, dim=1).values, flat.topk(count, dim=1, largest=False).values], dim=1)
    least = scale.float().expand(flat.shape[0])
    found = snapped(_smallest(ends, least, spec), spec)
    return found if scale.ndim else found.max()


def saturation_bounds(q: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Bound every integer so that a channel stays free of saturation however its integers are rounded anew.

    The largest of a channel may stay above half of the pair's limit; the others keep to the rest.

    Args:
        q: integers that are free of saturation, see ``saturation_scale``.
        axis: the dimension of the output channels.

    Returns:
        Lowest and highest allowed integer, int32, of the shape of ``q``.
    """
    limit = INT16_MAX // 255
    flat = q.to(torch.int32).movedim(axis, 0)
    low, high = -_room(-flat, limit), _room(flat, limit)
    return low.movedim(0, axis), high.movedim(0, axis)


def _room(q: Tensor, limit: int) -> Tensor:
    flat = q.flatten(1)
    top, place = flat.max(1, keepdim=True)
    most = top.clamp(min=limit // 2)
    room = (limit - most).expand_as(flat).scatter(1, place, most)
    return room.to(torch.int32).view_as(q)


def _smallest(ends: Tensor, least: Tensor, spec: QuantSpec) -> Tensor:
    """Bisect, over the bit patterns of positive floats, for the smallest scale that is safe."""

    def safe(bits: Tensor) -> Tensor:
        q = torch.round(ends / bits.view(torch.float32)[:, None]).clamp(spec.qmin, spec.qmax)
        return saturation_free(q)

    most = torch.maximum(least, ends.abs().amax(1) / 63).contiguous()
    low, high = least.contiguous().view(torch.int32), most.view(torch.int32)
    high = torch.where(safe(low), low, high)
    for _ in range(31):
        middle = low + (high - low) // 2
        good = safe(middle)
        low, high = torch.where(good, low, middle + 1).minimum(high), torch.where(good, middle, high)
    return high.view(torch.float32)
