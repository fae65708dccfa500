"""The modules that stand on the edges of a quantized graph."""

from typing import Literal

import torch
from torch import Tensor, nn

from kompakt.numerics.binary import (
    adaptive_activation,
    binary_weight,
    sign_polynomial,
    ternary_weight,
    trained_ternary,
)
from kompakt.numerics.codebook import centroid_gradient, gather, nearest, project
from kompakt.numerics.grid import (
    SMALLEST_SCALE,
    affine_params,
    fake_quantize,
    lsq_grad_scale,
    lsq_quantize,
    nearest_power,
    ste_quantize,
)
from kompakt.spec import QuantSpec


class Quantizer(nn.Module):
    """Round a tensor to the grid of ``spec`` and back.

    ``scale`` and ``zero_point`` are buffers of the shape that the granularity asks. A dynamic quantizer
    takes its range from each input. In training mode the gradient passes straight through; after ``learn``
    it reaches scale and zero point too.
    """

    scale: Tensor
    zero_point: Tensor
    grad_scale: float | None = None

    def __init__(self, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", torch.ones(()) if scale is None else scale)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        scale, zero_point = self.parameters_for(x)
        if self.training and self.grad_scale is not None:
            return lsq_quantize(x, scale, zero_point, self.spec, self.grad_scale)
        if self.training and x.requires_grad:
            return ste_quantize(x, scale, zero_point, self.spec)
        return fake_quantize(x, scale, zero_point, self.spec)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point to use for ``x``."""
        if self.grad_scale is not None:
            scale = self.scale.clamp_min(SMALLEST_SCALE)
            # A power of two is the nearest one to the step that is learned; its gradient is the step's.
            return scale + (nearest_power(scale, self.spec) - scale).detach(), self.zero_point
        if not self.spec.dynamic:
            return self.scale, self.zero_point
        low, high = x.detach().aminmax()
        return affine_params(low, high, self.spec)

    def learn(self, values: int) -> None:
        """Make the scale, and the zero point of affine integers, parameters (LSQ, LSQ+).

        Args:
            values: how many numbers share a scale.
        """
        self.grad_scale = lsq_grad_scale(values, self.spec)
        scale, zero_point = self.scale, self.zero_point.float()
        del self.scale
        self.scale = nn.Parameter(scale.clone())
        if not self.spec.symmetric:
            del self.zero_point
            self.zero_point = nn.Parameter(zero_point)

    def settled(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point as they ship: constants, the zero point an integer of the grid."""
        zero_point = self.zero_point.detach().round().clamp(self.spec.qmin, self.spec.qmax)
        scale = nearest_power(self.scale.detach().clamp_min(SMALLEST_SCALE), self.spec)
        return scale.clone(), zero_point.to(torch.int32)


class Signs(nn.Module):
    """Train a weight that ships as signs and a scale: ``binary`` (XNOR-Net) or ``ternary`` (TWN), a channel each."""

    def __init__(self, form: Literal["binary", "ternary"]) -> None:
        super().__init__()
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        """Return ±scale, or 0 and ±scale, with a straight-through gradient."""
        return binary_weight(weight) if self.form == "binary" else ternary_weight(weight)


class Codebook(nn.Module):
    """Stand for a weight by its indices into shared values; the gradient of a value is the sum of its weights'.

    In training that sum is divided by n, how many weights share the value: a step of SGD is then the step that the
    weights would take on their own, projected on what they share, and the learning rate that suits them suits it.

    Args:
        indices: uint8, the shape of the weight.
        values: (G, k), one row for each of G runs of outputs.
    """

    indices: Tensor
    grad_scale: Tensor

    def __init__(self, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("grad_scale", _reciprocal_shares(indices, values), persistent=False)

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return max(1, (self.values.shape[1] - 1).bit_length())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shared values; ``weight``, which they replaced, is not looked at."""
        return gather(self.indices, _slowed(self.values, self.grad_scale))

    def begin_at(self, other: "Codebook") -> None:
        """Take another book's indices and values."""
        self.indices, self.grad_scale = other.indices.clone(), other.grad_scale.clone()
        self.values.data = other.values.detach().clone()

    def settled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices and the values as they ship."""
        return self.indices.clone(), self.values.detach().clone()


class Levels(nn.Module):
    """Train a weight on fixed levels times learned scales (APoT); it ships as a ``Codebook``.

    Args:
        levels: (k,), rising, −1 to 1.
        scale: (G, 1), one for each of G runs of outputs.
        values: how many weights share a scale.
    """

    levels: Tensor

    def __init__(self, levels: Tensor, scale: Tensor, values: int) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.scale = nn.Parameter(scale)
        self.grad_scale = (values * len(levels) / 2) ** -0.5

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its levels, with gradients for weight and scale."""
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        return project(weight.reshape(len(scale), -1), scale, self.levels, self.grad_scale).reshape(weight.shape)

    def settled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices and the values (G, k) that ship."""
        scale = self.scale.detach().clamp_min(SMALLEST_SCALE)
        inside = (weight.detach().reshape(len(scale), -1) / scale).clamp(-1, 1)
        return nearest(inside, self.levels).reshape(weight.shape), scale * self.levels


class Ternary(nn.Module):
    """Train a weight as −Wn, 0 or Wp, both learned; it ships as a ``Codebook``.

    TTQ, Zhu et al. 2017, arXiv 1612.01064. The summed gradients of Wn and Wp are divided by a third of a row's length,
    about how many weights share each, as a ``Codebook`` does.

    Args:
        values: −Wn, 0, Wp: (G, 3).
        threshold: as a share of the largest magnitude, (G, 1).
    """

    threshold: Tensor

    def __init__(self, values: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.negative, self.positive = nn.Parameter(-values[:, :1]), nn.Parameter(values[:, 2:])
        self.register_buffer("threshold", threshold)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the ternary weight, with the gradients of TTQ."""
        rows = weight.reshape(len(self.positive), -1)
        positive, negative = (_slowed(value, 3 / rows.shape[1]) for value in (self.positive, self.negative))
        return trained_ternary(rows, positive, negative, self.threshold).reshape(weight.shape)

    def settled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices and the values (G, 3) that ship."""
        rows = weight.detach().reshape(len(self.positive), -1)
        limit = self.threshold * rows.abs().amax(1, keepdim=True)
        indices = ((rows > limit).int() - (rows < -limit).int() + 1).to(torch.uint8)
        ends = -self.negative.detach(), self.positive.detach()
        return indices.reshape(weight.shape), torch.cat([ends[0], torch.zeros_like(ends[0]), ends[1]], dim=1)


def _slowed(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return ``x`` to the bit, its gradient times ``factor``."""
    slow = x * factor
    return x.detach() + (slow - slow.detach())


def _reciprocal_shares(indices: Tensor, values: Tensor) -> Tensor:
    """Return one over how many weights share each value, (G, k); 1 where none does."""
    counts = centroid_gradient(torch.ones_like(indices, dtype=values.dtype), indices, values.shape[1], len(values))
    return counts.clamp_min(1).reciprocal()


class TwoValues(nn.Module):
    """Let an activation be one of two learned values: α·sign((x − β)/α) + β, β for each channel.

    AdaBin, Tu et al. 2022, arXiv 2208.08084, with the threshold of each channel of ReActNet, Liu et al. 2020,
    arXiv 2003.03488, and the gradient of Bi-Real Net, Liu et al. 2018, arXiv 1808.00278.

    Args:
        scale: α, ``()``.
        shift: β, ``(C,)``.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return one of two values for each of (N, C, ...)."""
        return adaptive_activation(x, self.scale.clamp_min(SMALLEST_SCALE).reshape(1), self.shift, sign_polynomial)


class BiasQuantizer(nn.Module):
    """Round a layer's bias to int32 of scale ``input scale · weight scale``, as integer kernels add it."""

    def __init__(self, source: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        # Held without registering: both are modules of the graph already.
        self._pair = (source, weight)

    @property
    def scale(self) -> Tensor:
        """The scale of the bias, ``(C_out,)``."""
        source, weight = self._pair
        return source.scale * weight.scale

    def integers(self, bias: Tensor) -> Tensor:
        """Return the int32 values of ``bias``."""
        steps = torch.round(bias.detach().double() / self.scale.double())
        return steps.clamp(-(2**31), 2**31 - 1).to(torch.int32)

    def forward(self, bias: Tensor) -> Tensor:
        """Return ``bias`` on its grid."""
        rounded = self.integers(bias).float() * self.scale
        return rounded if not bias.requires_grad else bias + (rounded - bias).detach()
