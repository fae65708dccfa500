"""Regularisers that drive weights or whole coupled channel groups to zero during training.

Each returns a scalar to be added to the loss, times its strength. A *group* is a sequence of members,
``(tensor, dim)``: the tensors whose channels stand or fall together, each with its channel dimension
(the indices of a part of a tensor are cut out first, by ``index_select``, which keeps the gradient).
"""

from collections.abc import Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.saliency import channel_rows

Member = tuple[Tensor, int]


def l1(weights: Iterable[Tensor]) -> Tensor:
    """Return Σ|w| over all weights (Tibshirani 1996): the sparsest single weights.

    Args:
        weights: tensors of any shape, at least one.

    Returns:
        Scalar.
    """
    return _total([weight.abs().sum() for weight in weights])


def bn_l1(scales: Iterable[Tensor]) -> Tensor:
    """Return Σ|γ| over the batch norms' scales (network slimming, Liu et al. 2017, arXiv:1708.06519).

    Args:
        scales: γ of each batch norm, (C,).

    Returns:
        Scalar.
    """
    return l1(scales)


def group_rows(group: Sequence[Member]) -> Tensor:
    """Gather all that each channel of a coupled group owns: members → (C, ΣK).

    The number of channels is the smallest among the members; a member whose dimension is a
    multiple of it gives each channel a run of consecutive entries (a linear layer after flatten).

    Raises:
        InputError: no members, or one whose dimension is not a multiple of the channels.
    """
    if not group:
        raise InputError("a coupled group needs at least one member")
    channels = min(tensor.shape[dim] for tensor, dim in group)
    return torch.cat([channel_rows(tensor, dim, channels) for tensor, dim in group], dim=1)


def group_lasso(groups: Iterable[Sequence[Member]]) -> Tensor:
    """Return Σ_g √K_g Σ_c ‖w_{g,c}‖₂ over coupled groups: whole channels go to zero, in all members at once.

    Yuan and Lin 2006; for networks Wen et al. 2016, arXiv:1608.03665; over coupled members Fang et
    al. 2023, arXiv:2301.12900. K_g is the number of weights that one channel owns. The gradient of a
    channel that is zero is zero.

    Args:
        groups: coupled groups of members (tensor, channel dimension).

    Returns:
        Scalar.
    """
    rows = [group_rows(group) for group in groups]
    return _total([sqrt(each.shape[1]) * torch.linalg.vector_norm(each, dim=1).sum() for each in rows])


def growing_coefficient(step: int, *, every: int, increment: float, ceiling: float) -> float:
    """Return the penalty's strength at ``step``: it grows by ``increment`` every ``every`` steps up to ``ceiling``.

    GReg, Wang et al. 2021, arXiv:2012.09243, §3.2 (the paper: 1e-4 every 10 steps up to 1).

    Raises:
        InputError: ``every`` below 1, or a negative increment or ceiling.

    Example:
        >>> [growing_coefficient(t, every=10, increment=0.5, ceiling=1.0) for t in (0, 9, 10, 25, 90)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if every < 1 or increment < 0 or ceiling < 0:
        raise InputError(
            f"growing regularisation: every {every}, increment {increment}, ceiling {ceiling}; none may be negative"
        )
    return min(ceiling, increment * (max(step, 0) // every))


def growing_penalty(groups: Iterable[Sequence[Member]], chosen: Iterable[Tensor], coefficient: float) -> Tensor:
    """Return ½·λ·Σ‖w_{g,c}‖² over the channels chosen to go (GReg, arXiv:2012.09243).

    Its gradient is λ·w on the chosen channels alone, so that growing λ presses them to zero while
    the others adapt.

    Args:
        groups: coupled groups of members.
        chosen: for each group a boolean (C,), True where the channel is to go.
        coefficient: λ, e.g. from ``growing_coefficient``.

    Returns:
        Scalar.

    Raises:
        InputError: a choice whose length is not the group's number of channels.
    """
    terms = []
    for group, mask in zip(groups, chosen, strict=True):
        rows = group_rows(group)
        if mask.shape != rows.shape[:1]:
            raise InputError(f"the choice covers {tuple(mask.shape)} channels, the group has {rows.shape[0]}")
        terms.append((rows.square().sum(1) * mask).sum())
    return 0.5 * coefficient * _total(terms)


def _total(terms: Sequence[Tensor]) -> Tensor:
    if not terms:
        raise InputError("nothing to regularise: no tensors were given")
    return torch.stack(list(terms)).sum()
