"""From differences to integer codes under a spec: which are sent, at which step, rounded how."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kompakt.federated.spec import UpdateSpec
from kompakt.numerics.updates import (
    LEAST_STEP,
    MOST_STEP,
    entropy_bits,
    keep_largest,
    keep_random,
    round_rate_distortion,
    round_stochastic,
    step_code,
    step_size,
)

MOST_CODE = 2**15 - 1
JOINED = 2**12
SAMPLE = 2**15
HALVINGS = 9
SPAN = 128


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Integers of the weights, and how to read them.

    Args:
        codes: int16, of the weights' shapes, by name.
        steps: the code of each weight's step.
        places: how many random places are sent, None for all.
    """

    codes: dict[str, Tensor]
    steps: dict[str, int]
    places: Tensor | None = None


def selected(changes: dict[str, Tensor], spec: UpdateSpec, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Set to zero what a spec does not send; for random places also the mask over all weights."""
    if spec.selection == "all" or not changes:
        return changes, None
    flat = torch.cat([change.reshape(-1).float() for change in changes.values()])
    count = max(1, round(spec.keep * flat.numel()))
    if spec.selection == "threshold":
        mask = flat.abs() > spec.threshold * flat.square().mean().sqrt()
    else:
        mask = keep_largest(flat, count) if spec.selection == "top" else keep_random(flat.numel(), count, seed)
    parts = mask.split([change.numel() for change in changes.values()])
    kept = {
        name: change * part.reshape(change.shape) for (name, change), part in zip(changes.items(), parts, strict=True)
    }
    return kept, mask if spec.selection == "random" else None


def tensor_steps(changes: dict[str, Tensor], bits: int) -> dict[str, int]:
    """For each tensor the step that makes its largest change fit the bits."""
    most = 2 ** (bits - 1) - 1
    return {
        name: step_code(float(change.abs().max()) / most if change.numel() else 0.0) for name, change in changes.items()
    }


def common_step(changes: dict[str, Tensor], spec: UpdateSpec, bits: float) -> int:
    """The finest step, the same for all weights, whose codes take about ``bits`` bits by their entropy."""
    total = sum(change.numel() for change in changes.values())
    every = max(1, total // SAMPLE)
    parts = [part[::every].float() for part in grouped(changes)]
    target = bits / every

    def fits(code: int) -> bool:
        rounded = (round_plain(part / step_size(code), spec) for part in parts)
        return sum(entropy_bits(found) for found in rounded) <= target

    peak = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
    high = min(max(step_code(peak) + 32, LEAST_STEP + SPAN), MOST_STEP)
    low = high - 2 * SPAN
    for _ in range(HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return max(high, LEAST_STEP)


def grouped(changes: dict[str, Tensor]) -> list[Tensor]:
    """Flat differences as they are coded: small rows together, the others alone."""
    small = [c.reshape(-1) for c in changes.values() if c.ndim < 2 and c.numel() <= JOINED]
    large = [c.reshape(-1) for c in changes.values() if not (c.ndim < 2 and c.numel() <= JOINED)]
    return ([torch.cat(small)] if small else []) + large


def round_plain(x: Tensor, spec: UpdateSpec) -> Tensor:
    """Round differences in steps without chance: stochastic rounding is priced as rounding to nearest."""
    return round_rate_distortion(x) if spec.rounding == "rate-distortion" else x.round()


def round_all(changes: dict[str, Tensor], steps: dict[str, int], spec: UpdateSpec, seed: int) -> dict[str, Tensor]:
    """Codes of all weights; no step is too fine for 16 bits."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    found = {}
    for name, change in changes.items():
        x = change / step_size(steps[name])
        q = round_stochastic(x, generator) if spec.rounding == "stochastic" else round_plain(x.float(), spec)
        found[name] = q.clamp(-MOST_CODE, MOST_CODE).to(torch.int16)
    return found
