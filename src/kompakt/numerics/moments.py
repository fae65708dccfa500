"""Second moments of a layer's inputs, ``H = Σ x xᵀ``: all that its output error depends on.

A convolution is a linear map of its patches (im2col), so both kinds of layer share one form: replacing the weight
``w`` by ``ŵ`` changes the outputs by ``Σ_rows (w - ŵ) H (w - ŵ)ᵀ`` in all (Hassibi, Stork 1993; Frantar et al. 2022,
arXiv 2210.17323).
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kompakt.errors import InputError

CHUNK_VALUES = 2**22
"""Patches are laid out for this many values at a time."""


@dataclass(frozen=True, kw_only=True)
class Conv:
    """The arguments of a convolution, one value for each spatial dimension, and its groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        if len({len(self.kernel), len(self.stride), len(self.padding), len(self.dilation)}) != 1:
            raise InputError(f"convolution arguments {self} differ in length; give one value for each dimension")


def patches(x: Tensor, conv: Conv) -> Tensor:
    """Lay out the inputs of a convolution as rows: ``(groups, positions, channels / groups · taps)``.

    Args:
        x: ``(N, channels, *spatial)``.
        conv: the convolution.

    Returns:
        Rows whose order of columns is that of ``weight.flatten(1)``.

    Raises:
        InputError: ``x`` has not as many dimensions as the convolution.
    """
    dims = len(conv.kernel)
    if x.ndim != dims + 2:
        raise InputError(f"input of shape {tuple(x.shape)} for a {dims}-d convolution: expected {dims + 2} dimensions")
    pad = [p for padding in reversed(conv.padding) for p in (padding, padding)]
    seen = torch.nn.functional.pad(x, pad)
    for dim, (kernel, stride, dilation) in enumerate(zip(conv.kernel, conv.stride, conv.dilation, strict=True), 2):
        seen = seen.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    seen = seen.unflatten(1, (conv.groups, -1)).movedim(1, 0)
    # (groups, N, channels, *positions, *taps) → positions before channels
    places = list(range(3, 3 + dims))
    order = [0, 1, *places, 2, *range(3 + dims, 3 + 2 * dims)]
    return seen.permute(order).flatten(2 + dims).flatten(1, 1 + dims)


def second_moment(x: Tensor, conv: Conv | None = None) -> Tensor:
    """Sum ``x xᵀ`` over all places where the layer applies its weight; sums of batches add up.

    Args:
        x: inputs of a linear layer, ``(…, features)``, or of a convolution, ``(N, channels, *spatial)``.
        conv: the convolution's arguments; None for a linear layer.

    Returns:
        float32, ``(groups, k, k)`` with ``k`` the length of a row of ``weight.flatten(1)``.
    """
    return cross_moment(x, x, conv)


def cross_moment(x: Tensor, y: Tensor, conv: Conv | None = None) -> Tensor:
    """Sum ``x yᵀ`` for two inputs of one layer, such as that of the float and of the quantized model.

    Args:
        x: one input, see ``second_moment``.
        y: the other, of the same shape.
        conv: the convolution's arguments; None for a linear layer.

    Returns:
        float32, ``(groups, k, k)``.

    Raises:
        InputError: the inputs differ in shape.
    """
    if x.shape != y.shape:
        raise InputError(f"inputs of one layer of shapes {tuple(x.shape)} and {tuple(y.shape)}: expected equal shapes")
    left, right = x.detach().float(), y.detach().float()
    if conv is None:
        return (left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1]))[None]
    taps = prod(conv.kernel)
    size = max(1, CHUNK_VALUES // max(1, taps * x[0].numel()))
    width = x.shape[1] // conv.groups * taps
    total = left.new_zeros(conv.groups, width, width)
    for a, b in zip(left.split(size), right.split(size), strict=True):
        columns = patches(a, conv)
        total.baddbmm_(columns.mT, columns if x is y else patches(b, conv))
    return total


def output_error(w: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Compute ``Σ_rows (w - ŵ) H (w - ŵ)ᵀ``, the summed squared error of the outputs, from second moments.

    Args:
        w: float weight, dimension 0 the output channels.
        approximation: its dequantized integers.
        hessian: ``(groups, k, k)``, see ``second_moment``.
    """
    error = (w - approximation).detach().float().reshape(hessian.shape[0], -1, hessian.shape[-1])
    return ((error @ hessian) * error).sum()
