"""Codes to values: what a receiver adds to its base, and what a sender therefore knows it will hold.

FORMAT.md §10 is the specification; every operation is rounded on its own, so both ends agree in every bit.
"""

import torch
from torch import Tensor

from kompakt.federated.layout import State, variance_of
from kompakt.numerics.updates import step_size

EPSILON = 1e-5
STEP_BIAS = 2048


def working(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor's arithmetic is done in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def apply_weight(base: Tensor, codes: Tensor, step: int) -> Tensor:
    """Return ``base + code · step`` in the base's dtype."""
    kind = working(base)
    change = codes.to(kind) * step_size(step)
    return (base.to(kind) + change).to(base.dtype)


def apply_statistic(name: str, base: State, codes: Tensor, shift: int) -> Tensor:
    """Return a running mean moved by parts of a deviation, or a running variance by parts of itself."""
    old = base[name]
    kind, step = working(old), 2.0**-shift
    moves = codes.to(kind) * step
    if name.endswith("running_var"):
        return (old.to(kind) * (1 + moves).clamp(min=step)).to(old.dtype)
    return (old.to(kind) + moves * deviation(name, base)).to(old.dtype)


def deviation(name: str, base: State) -> Tensor:
    """The standard deviation of the base beside a running mean."""
    return (base[variance_of(name)].to(working(base[name])) + EPSILON).sqrt()


def apply_integer(base: Tensor, change: Tensor) -> Tensor:
    """Return ``base + change`` modulo the width; exclusive or for bool."""
    return base ^ change if base.dtype == torch.bool else base + change
