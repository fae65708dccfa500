"""2:4 sparsity on the sparse tensor cores of an NVIDIA GPU, beside the dense product (Mishra et al. 2021)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kompakt.errors import InputError, MissingExtraError
from kompakt.measure.latency import interleave
from kompakt.numerics.masks import keep_n_of_m

AMPERE = (8, 0)
MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class SemiSparse:
    """One linear layer on the GPU: how many times faster 2:4 is, and how far its outputs are from the dense ones.

    Args:
        times_faster: dense time / sparse time, interleaved; ``low`` and ``high`` its 95 % interval.
        error: largest difference of the outputs relative to the largest output.
        device: the GPU's name.
    """

    times_faster: float
    low: float
    high: float
    error: float
    device: str


def unavailable() -> str | None:
    """Say why 2:4 cannot run on sparse tensor cores here; None where it can."""
    if not torch.cuda.is_available():
        return "2:4 on sparse tensor cores is skipped: this machine has no NVIDIA GPU that torch can use"
    if torch.cuda.get_device_capability() < AMPERE:
        found = torch.cuda.get_device_name()
        return f"2:4 on sparse tensor cores is skipped: {found} has none; they came with compute capability 8.0"
    return None


def semi_sparse(weight: Tensor, rows: int, *, seconds: float = 5.0, seed: int = 0) -> SemiSparse:
    """Time ``x · wᵀ`` in float16 with a 2:4 weight, dense and by ``torch.sparse.to_sparse_semi_structured``.

    Args:
        weight: (outputs, inputs), both multiples of 64; made 2:4 by magnitude where it is not.
        rows: of ``x``.
        seconds: to time, at the most.
        seed: of ``x``.

    Raises:
        MissingExtraError: there is no such GPU; the message is ``unavailable``'s.
        InputError: a size is no multiple of 64.
    """
    reason = unavailable()
    if reason is not None:
        raise MissingExtraError(reason)
    if any(size % MULTIPLE for size in (*weight.shape, rows)):
        raise InputError(f"weight {tuple(weight.shape)} with {rows} rows: expected multiples of {MULTIPLE}")
    dense = (weight * keep_n_of_m(weight.abs(), 2, 4)).half().cuda()
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(seed)).half().cuda()
    packed = torch.sparse.to_sparse_semi_structured(dense)
    before, after = (torch.nn.functional.linear(x, w).float() for w in (dense, packed))

    def run(w: Tensor) -> None:
        torch.nn.functional.linear(x, w)
        torch.cuda.synchronize()

    found = interleave({"dense": lambda: run(dense), "2:4": lambda: run(packed)}, seconds=seconds)["2:4"]
    low, high = found.ratio_ci95
    error = float((before - after).abs().max() / before.abs().max())
    device = torch.cuda.get_device_name()
    return SemiSparse(times_faster=1 / found.ratio, low=1 / high, high=1 / low, error=error, device=device)
