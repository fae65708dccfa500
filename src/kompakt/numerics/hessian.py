"""The trace of a loss's Hessian, block by block, without the Hessian."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hessian_traces(loss: Tensor, blocks: Sequence[Tensor], probes: int, generator: torch.Generator) -> list[float]:
    """Estimate the trace of the diagonal blocks of a Hessian: E[vᵀHv] over signs v = ±1.

    Hutchinson 1989; as a measure of sensitivity Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852.

    Args:
        loss: a scalar, twice differentiable in ``blocks``.
        blocks: tensors that require a gradient.
        probes: how many v are drawn.
        generator: draws them.

    Returns:
        One trace for each block.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> hessian_traces((x * x).sum(), [x], 4, torch.Generator().manual_seed(0))
        [6.0]
    """
    grads = torch.autograd.grad(loss, list(blocks), create_graph=True)
    totals = [0.0] * len(blocks)
    for _ in range(probes):
        signs = [torch.randint(0, 2, block.shape, generator=generator).to(block) * 2 - 1 for block in blocks]
        products = torch.autograd.grad(grads, list(blocks), grad_outputs=signs, retain_graph=True)
        totals = [t + float((v * h).sum()) for t, v, h in zip(totals, signs, products, strict=True)]
    return [total / probes for total in totals]
