"""Masks: which single weights stay. Boolean tensors, True where the weight is kept.

Every mask is made from scores (see ``saliency``), larger is kept, with exactly the number of weights that
the sparsity asks for; equal scores are broken by position, so the same scores give the same mask.
Three functions also mend the weights that stay, so that a layer's output changes least: ``sparsegpt``
(column after column, for any width), ``obc`` (weight after weight, the best, for up to about a thousand
inputs) and ``refit`` (the optimum for a given mask).
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.saliency import damped, sensitivity

NM = tuple[int, int]


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the round(sparsity·numel) smallest scores, over the whole tensor.

    Args:
        scores: any shape.
        sparsity: share of weights that go, 0 to 1.

    Returns:
        Boolean, the shape of ``scores``.

    Raises:
        InputError: sparsity outside 0 … 1, NaN among the scores.
    """
    _check(scores, sparsity)
    return _drop(scores.flatten(), round(sparsity * scores.numel())).reshape(scores.shape)


def keep_largest_globally(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the largest scores of all tensors together: one threshold for all of them.

    Args:
        scores: name → scores; magnitudes, or LAMP scores where no layer may be emptied.
        sparsity: share of all weights that go.

    Returns:
        name → mask.

    Raises:
        InputError: no tensors, sparsity outside 0 … 1, NaN.
    """
    if not scores:
        raise InputError("a global mask needs at least one tensor")
    joined = torch.cat([each.flatten() for each in scores.values()])
    flat = keep_largest(joined, sparsity).split([each.numel() for each in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, flat, strict=True)}


def snip(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the connections with the largest |w·∂L/∂w| of the whole network.

    SNIP, Lee et al. 2019, arXiv:1810.02340: at initialisation, from one batch.

    Args:
        weights: name → weight.
        grads: name → ∂L/∂w of the same shape.
        sparsity: share of all weights that go.

    Returns:
        name → mask.
    """
    return keep_largest_globally({name: sensitivity(w, grads[name]) for name, w in weights.items()}, sparsity)


def keep_n_of_m(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """Keep the ``n`` largest of every ``m`` consecutive scores along ``dim``, the inputs.

    Mishra et al. 2021, arXiv:2104.08378 (2:4); Zhou et al. 2021, arXiv:2102.04010 (N:M).

    Args:
        scores: e.g. (out, in) or (out, in, kh, kw).
        n: how many stay, 1 to m.
        m: length of a run; it must divide the size of ``dim``.
        dim: the dimension along which runs are counted.

    Returns:
        Boolean, the shape of ``scores``; exactly n True in every run.

    Raises:
        InputError: n or m out of range, or m does not divide the dimension.
    """
    _check(scores, 0.0)
    size = scores.shape[dim]
    if not 1 <= n <= m:
        raise InputError(f"{n}:{m} sparsity: expected 1 ≤ n ≤ m")
    if size % m:
        raise InputError(f"{n}:{m} sparsity: {m} does not divide the {size} inputs; it must divide them")
    runs = scores.movedim(dim, -1)
    runs = runs.reshape(*runs.shape[:-1], size // m, m)
    order = runs.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, dim)


def keep_blocks(scores: Tensor, block: tuple[int, ...], sparsity: float) -> Tensor:
    """Keep whole blocks, those with the largest sums of scores.

    Args:
        scores: any shape; squared magnitudes keep the most energy.
        block: the block's size along each dimension, e.g. (4, 4) for a linear layer, (1, 1, 3, 3)
            for whole kernels (see ``keep_kernels``).
        sparsity: share of blocks that go.

    Returns:
        Boolean, the shape of ``scores``, constant on every block.

    Raises:
        InputError: a block of another rank, or one that does not divide the shape.
    """
    if len(block) != scores.ndim or min(block) < 1:
        raise InputError(f"block {block} does not fit a tensor of shape {tuple(scores.shape)}: one size a dimension")
    if any(size % step for size, step in zip(scores.shape, block, strict=True)):
        raise InputError(f"block {block} does not divide the shape {tuple(scores.shape)}")
    split = [part for size, step in zip(scores.shape, block, strict=True) for part in (size // step, step)]
    inner = tuple(range(1, 2 * scores.ndim, 2))
    totals = scores.reshape(split).sum(inner, keepdim=True)
    return keep_largest(totals, sparsity).expand(split).reshape(scores.shape)


def keep_kernels(scores: Tensor, sparsity: float) -> Tensor:
    """Keep whole kernels of a convolution: (out, in, kh, …) → the same, constant over the kernel."""
    return keep_blocks(scores, (1, 1, *scores.shape[2:]), sparsity)


def sparsity_at(step: int, *, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """Return the sparsity at ``step`` of the gradual cubic schedule.

    Zhu and Gupta 2017, arXiv:1710.01878: s = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³; before
    ``start`` it is ``initial``, after ``end`` it is ``final``.

    Raises:
        InputError: ``end`` not after ``start``, or a sparsity outside 0 … 1.

    Example:
        >>> [round(sparsity_at(t, start=0, end=4, final=0.8), 3) for t in range(5)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    if end <= start:
        raise InputError(f"the schedule's end {end} must lie after its start {start}")
    if not (0 <= initial <= 1 and 0 <= final <= 1):
        raise InputError(f"sparsity runs from 0 to 1, found {initial} to {final}")
    progress = min(1.0, max(0.0, (step - start) / (end - start)))
    share = (1 - progress) ** 3
    return share * initial + (1 - share) * final


def masked(weight: Tensor, mask: Tensor, *, soft: bool = True) -> Tensor:
    """Zero the masked weights; with ``soft`` they keep learning.

    The straight-through form w + stop_gradient(w·m − w) equals w·m to the bit, while its gradient
    reaches every weight, so that a weight can come back (dynamic network surgery, Guo et al. 2016,
    arXiv:1608.04493). The hard form w·m stops the gradient at the masked weights.

    Args:
        weight: any shape.
        mask: boolean, the same shape.
        soft: whether masked weights get a gradient.

    Returns:
        The shape of ``weight``.
    """
    hard = weight * mask
    return weight + (hard - weight).detach() if soft else hard


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    n_of_m: NM | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Prune a layer in one shot and mend the weights that stay, so that its output changes least.

    SparseGPT, Frantar and Alistarh 2023, arXiv:2301.00774, alg. 1: columns from left to right; in every
    block of columns the weights with the least w²/[H⁻¹]ⱼⱼ go, and each one's error is spread over
    the columns to its right by the rows of the inverse's Cholesky factor.

    Args:
        weight: (R, K), rows are outputs; a convolution's weight flattened after dimension 0.
        hessian: (K, K) second moment of the inputs, E[xxᵀ] up to a factor.
        sparsity: share of weights that go, or
        n_of_m: (n, m): n of every m consecutive weights of a row stay.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns for which the mask is chosen together; with ``n_of_m`` it is m.

    Returns:
        (R, K), pruned: round(sparsity·R·K) zeros, and those of inputs that are always zero.

    Raises:
        InputError: shapes that do not fit, neither or both of ``sparsity`` and ``n_of_m``, NaN.
    """
    w = _without_dead_inputs(weight, hessian, sparsity, n_of_m)
    rows, columns = w.shape
    step = block if n_of_m is None else n_of_m[1]
    factor = torch.linalg.cholesky(_inverse(hessian, damp), upper=True)  # H⁻¹ = UᵀU
    gone = 0
    for first in range(0, columns, step):
        last = min(first + step, columns)
        scores = (w[:, first:last] / factor.diagonal()[first:last]).square()
        if n_of_m is not None:
            mask = keep_n_of_m(scores, *n_of_m)
        else:
            due = round(float(sparsity or 0.0) * rows * last) - gone  # the rounding never piles up
            mask = _drop(scores.flatten(), due).reshape(scores.shape)
            gone += due
        _prune_block(w, mask, factor, first, last)
    return w.to(weight.dtype)


def _prune_block(w: Tensor, mask: Tensor, factor: Tensor, first: int, last: int) -> None:
    """Zero the masked weights of columns ``first`` to ``last`` and mend what is right of them, in place."""
    errors = torch.zeros_like(mask, dtype=w.dtype)
    for j in range(first, last):
        pruned = w[:, j] * mask[:, j - first]
        errors[:, j - first] = (w[:, j] - pruned) / factor[j, j]
        w[:, j] = pruned
        w[:, j + 1 : last] -= errors[:, j - first, None] * factor[j, j + 1 : last]
    w[:, last:] -= errors @ factor[first:last, last:]


def obc(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    n_of_m: NM | None = None,
    damp: float = 0.01,
) -> Tensor:
    """Prune a layer weight after weight, each time the one that costs least after mending the others.

    ExactOBS, Frantar and Alistarh 2022, arXiv:2208.11580, alg. 1 and 2: every row is emptied greedily
    by w²/[H⁻¹]ⱼⱼ with the inverse of the inputs that remain; the layer's budget is then spread over
    the rows by the recorded losses. Time grows as R·K³: 2 s for (32, 288), about 10 s for
    (64, 576) on one core; for wide layers use ``sparsegpt``.

    Args:
        weight: (R, K), rows are outputs.
        hessian: (K, K) second moment of the inputs.
        sparsity: share of weights that go, or
        n_of_m: (n, m): n of every m consecutive weights of a row stay.
        damp: share of the mean diagonal that is added to the diagonal.

    Returns:
        (R, K), pruned, the kept weights at their least squares (``refit``).

    Raises:
        InputError: as ``sparsegpt``.
    """
    w = _without_dead_inputs(weight, hessian, sparsity, n_of_m)
    inverse = _inverse(hessian, damp).float()
    rows = max(1, 2**20 // w.shape[1] ** 2)  # so that a chunk's inverses stay in the cache
    chunks = [_removal_order(chunk, inverse, n_of_m) for chunk in w.float().split(rows)]
    order = torch.cat([chunk[0] for chunk in chunks])
    losses = torch.cat([chunk[1] for chunk in chunks]).cummax(1).values
    removed = torch.ones_like(losses, dtype=torch.bool) if sparsity is None else ~keep_largest(losses, sparsity)
    mask = torch.ones_like(w, dtype=torch.bool).scatter_(1, order, ~removed)
    return refit(w, mask, hessian, damp).to(weight.dtype)


def _removal_order(w: Tensor, inverse: Tensor, n_of_m: NM | None) -> tuple[Tensor, Tensor]:
    """Empty every row greedily: (R, K) → indices in order of removal and the loss of each, (R, steps)."""
    rows, columns = w.shape
    keep, run = n_of_m if n_of_m is not None else (0, columns)
    steps = columns // run * (run - keep)
    every = torch.arange(rows, device=w.device)
    ids = torch.arange(columns, device=w.device).repeat(rows, 1)
    free = ids.new_full((rows, columns // run), run - keep)  # how many may still go from each run
    alive = torch.ones_like(w, dtype=torch.bool)
    inv = inverse.repeat(rows, 1, 1)
    order, losses = ids.new_zeros(rows, steps), w.new_zeros(rows, steps)
    for step in range(steps):
        diagonal = inv.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(w.dtype).tiny)
        blocked = ~alive | (free.gather(1, ids // run) == 0)
        cost = (w.square() / diagonal).masked_fill(blocked, torch.inf)
        pick = cost.argmin(1)
        column, pivot = inv[every, :, pick], diagonal[every, pick, None]
        order[:, step], losses[:, step] = ids[every, pick], cost[every, pick]
        free[every, order[:, step] // run] -= 1
        w = w - w[every, pick, None] / pivot * column
        inv.baddbmm_(column[:, :, None], (column / pivot)[:, None], alpha=-1)
        alive[every, pick] = False
        if int(alive[0].sum()) <= 7 * alive.shape[1] // 8:  # every row has lost the same number
            left = alive.nonzero()[:, 1].reshape(rows, -1)
            ids, w, alive = ids.gather(1, left), w.gather(1, left), torch.ones_like(left, dtype=torch.bool)
            inv = inv[every[:, None, None], left[:, :, None], left[:, None, :]]
    return order, losses


def refit(weight: Tensor, mask: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Return the weights, zero outside the mask, whose output is nearest to the layer's own.

    The least squares of each row on its kept inputs, w_S = H_SS⁻¹·H_S:·w (OBC, Frantar and
    Alistarh 2022, arXiv:2208.11580, group update): no other weights with this mask do better on the
    second moment. It costs one K×K solve for each row; for wide layers use ``sparsegpt``.

    Args:
        weight: (R, K).
        mask: boolean (R, K), from any criterion.
        hessian: (K, K) second moment of the inputs.
        damp: share of the mean diagonal that is added to the diagonal, and pulls towards ``weight``.

    Returns:
        (R, K).
    """
    _check_layer(weight, hessian)
    if mask.shape != weight.shape:
        raise InputError(f"the mask {tuple(mask.shape)} does not fit the weight {tuple(weight.shape)}")
    moment = damped(hessian, damp)
    target = weight.double() @ moment
    fitted = torch.zeros_like(target)
    for row, kept in enumerate(mask.bool()):
        index = kept.nonzero().flatten()
        if len(index):
            lower = torch.linalg.cholesky(moment[index][:, index])
            fitted[row, index] = torch.cholesky_solve(target[row, index, None], lower).flatten()
    return fitted.to(weight.dtype)


def output_error(weight: Tensor, changed: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(ΔHΔᵀ)/tr(WHWᵀ), the relative squared error of the layer's output.

    Args:
        weight: (R, K).
        changed: (R, K).
        hessian: (K, K) second moment of the inputs.

    Returns:
        Scalar.
    """
    _check_layer(weight, hessian)
    w, difference, moment = weight.double(), (changed - weight).double(), hessian.double()
    energy = (w @ moment * w).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return (difference @ moment * difference).sum() / energy


def _inverse(hessian: Tensor, damp: float) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damp)))


def _without_dead_inputs(weight: Tensor, hessian: Tensor, sparsity: float | None, n_of_m: NM | None) -> Tensor:
    """Check a layer's pruning and return its weight in float64, zero where the input always is: free to go first."""
    _check_layer(weight, hessian)
    if (sparsity is None) == (n_of_m is None):
        raise InputError("give one of sparsity and n_of_m")
    _check(weight, sparsity or 0.0)
    if n_of_m is not None:
        keep_n_of_m(weight, *n_of_m)  # refuses an m that does not divide
    return weight.double() * (hessian.diagonal() != 0)


def _drop(scores: Tensor, count: int) -> Tensor:
    """All True but the ``count`` smallest of a flat tensor; among equals the last ones stay."""
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(min(count, len(scores))).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    mask[ties[count - int((scores < threshold).sum()) :]] = True
    return mask


def _check(scores: Tensor, sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity {sparsity} is not between 0 and 1")
    if torch.isnan(scores).any():
        raise InputError(f"NaN among the {prod(scores.shape)} scores; look for NaN in the weights or gradients")


def _check_layer(weight: Tensor, hessian: Tensor) -> None:
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise InputError(
            f"a weight (R, K) needs a Hessian (K, K), found {tuple(weight.shape)} and {tuple(hessian.shape)}"
        )
