"""The modules that stand on the edges of a quantized graph."""

import torch
from torch import Tensor, nn

from kompakt.numerics.grid import affine_params, fake_quantize, ste_quantize
from kompakt.spec import QuantSpec


class Quantizer(nn.Module):
    """Round a tensor to the grid of ``spec`` and back.

    ``scale`` and ``zero_point`` are buffers of the shape that the granularity asks. A dynamic quantizer
    takes its range from each input. In training mode the gradient passes straight through.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", torch.ones(()) if scale is None else scale)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        scale, zero_point = self.parameters_for(x)
        if self.training and x.requires_grad:
            return ste_quantize(x, scale, zero_point, self.spec)
        return fake_quantize(x, scale, zero_point, self.spec)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point to use for ``x``."""
        if not self.spec.dynamic:
            return self.scale, self.zero_point
        low, high = x.detach().aminmax()
        return affine_params(low, high, self.spec)


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
