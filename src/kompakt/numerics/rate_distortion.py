"""Rate–distortion quantization: integers that weigh a layer's output error against the bits that they take.

With second moments ``H`` of a layer's inputs, the cost of integers ``q`` is ``½ Σ_o g_o e_o H e_oᵀ + λ · bits(q)``,
``e = w - s q``: the first term is about how far the network's predictions move when ``g_o`` is the second moment of
the loss's gradient at output ``o`` (the diagonal of K-FAC's second factor; Martens, Grosse 2015, arXiv 1503.05671).

References: Frantar et al. 2022 (GPTQ), arXiv 2210.17323; Conzelmann, Bamler 2025 (CERWU), arXiv 2505.18758.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

LEAST_IMPORTANCE = 1e-3
"""Of the mean: a channel that seems not to matter still gets a finite step."""


class Price(Protocol):
    """What integers cost, column by column, given those before them."""

    def column(self, index: int, q: Tensor, candidates: Tensor) -> Tensor:
        """Return the bits of ``candidates`` (n, rows) at column ``index``; columns before it of ``q`` are final."""
        ...


def steps(factor: Tensor, importance: Tensor, trade: float) -> Tensor:
    """Find each output channel's step at which uniform noise and entropy balance: ``s² = 6 λ / (ln 2 · g · mean(d))``.

    Rounding costs ``½ g d s² / 12`` a weight, with ``d = 1 / U_ii²`` what is left of the error once later columns have
    mended what they can; entropy falls by ``log2`` of the step. The sum is least where both slopes cancel.

    Args:
        factor: ``(groups, k, k)``, see ``inverse_factor``.
        importance: ``(rows,)``, the rows of the groups one after the other.
        trade: λ, error for a bit.

    Returns:
        float32 ``(rows,)``.
    """
    needs = factor.diagonal(dim1=1, dim2=2).double().square().reciprocal().mean(1)
    weights = importance.double().clamp(min=LEAST_IMPORTANCE * float(importance.double().mean()) + 1e-30)
    spread = needs.repeat_interleave(len(importance) // len(needs))
    return (12 * trade / (math.log(2) * weights * spread)).sqrt().float()


def coarse(x: Tensor, mantissa_bits: int) -> Tensor:
    """Round floats to so many bits of mantissa: side information that a coder makes small.

    Args:
        x: any shape.
        mantissa_bits: beside the leading one.
    """
    fraction, exponent = torch.frexp(x.detach().float())
    unit = 2.0 ** (mantissa_bits + 1)
    return torch.ldexp(torch.round(fraction * unit) / unit, exponent)


def trade_off(
    w: Tensor,
    factor: Tensor,
    scale: Tensor,
    price: Price,
    weights: tuple[Tensor, float],
    most: int = 127,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """Choose integers column by column, moving each column's error onto the later ones.

    Candidates are the nearest integer, its two neighbours and zero; the one with the least
    ``½ g (v - s q)² / U_ii² + λ bits`` is taken, where ``v`` is the weight as the columns before have moved it.

    Args:
        w: weight, dimension 0 the output channels.
        factor: ``(groups, k, k)``, upper Cholesky factor of ``H⁻¹``.
        scale: ``(rows,)``.
        price: what integers cost.
        weights: importance ``(rows,)`` and λ.
        most: the largest magnitude of an integer.
        block: columns whose errors reach the rest at once.

    Returns:
        Integers, int32, of the shape of ``w``; cost of each row, ``(rows,)``.
    """
    groups, width, _ = factor.shape
    importance, trade = weights
    rows, layout = w.shape[0], (groups, -1, width)
    left = (w.detach().float().reshape(rows, width) / scale[:, None]).reshape(layout).clone()
    pivots = factor.diagonal(dim1=1, dim2=2).repeat_interleave(rows // groups, dim=0).T.contiguous()
    worth = (importance * scale.square()).float().clamp(min=1e-30) / 2 / pivots.square()
    moves = torch.tensor([0.0, -1.0, 1.0])[:, None]
    q, cost, candidates = torch.zeros(rows, width), torch.zeros(rows), torch.zeros(4, rows)
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros_like(left[:, :, start:end])
        for i in range(start, end):
            value = left[:, :, i].reshape(rows)
            torch.add(value.round(), moves, out=candidates[:3]).clamp_(-most, most)
            costs = worth[i] * (value - candidates).square_() + trade * price.column(i, q, candidates)
            least, which = costs.min(0)
            taken = candidates.gather(0, which[None])[0]
            q[:, i] = taken
            cost += least
            error = ((value - taken) / pivots[i]).reshape(groups, -1)
            left[:, :, i:end] -= error[:, :, None] * factor[:, i, None, i:end]
            errors[:, :, i - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return q.to(torch.int32).reshape(w.shape), cost
