"""What a sender of updates chooses: which values to send, how to round them, how many bytes to take."""

from dataclasses import dataclass, replace
from typing import Literal

from kompakt.errors import InputError

Selection = Literal["all", "top", "random", "threshold"]
Rounding = Literal["nearest", "stochastic", "rate-distortion"]
SELECTIONS = ("all", "top", "random", "threshold")
ROUNDINGS = ("nearest", "stochastic", "rate-distortion")


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """How updates are made; the default is a hundredth of the floats by rate and distortion.

    Args:
        ratio: the state's bytes over the message's; all weights share one step, found for it. None: by ``bits``.
        warm_up: rounds over which the ratio rises to its value from a quarter of it, where rounds are numbered: the
            first updates are the largest, and what they leave out is missed for long.
        bits: without a ratio, each tensor's step makes its largest difference fit that many bits (2–16).
        selection: which differences are sent: all, the largest, random places, or those above a threshold.
        keep: the share that ``top`` and ``random`` keep.
        threshold: least magnitude that ``threshold`` keeps, in the root mean square of all differences.
        rounding: to nearest, stochastic (unbiased), or by rate and distortion.
        statistic_bits: the step of running statistics is 2 to the minus this (of a deviation, of a variance).

    Raises:
        InputError: a field is out of its range.

    Example:
        >>> UpdateSpec(selection="top", keep=0.01, ratio=None, bits=8, rounding="nearest").keep
        0.01
    """

    ratio: float | None = 100.0
    warm_up: int = 0
    bits: int = 8
    selection: Selection = "all"
    keep: float = 0.01
    threshold: float = 1.0
    rounding: Rounding = "rate-distortion"
    statistic_bits: int = 4

    def __post_init__(self) -> None:
        _require(self.ratio is None or 1 <= self.ratio < 1e6, "ratio", self.ratio, "1 to a million, or None")
        _require(0 <= self.warm_up <= 10**6, "warm_up", self.warm_up, "0 to a million rounds")
        _require(2 <= self.bits <= 16, "bits", self.bits, "2 to 16")
        _require(self.selection in SELECTIONS, "selection", self.selection, ", ".join(SELECTIONS))
        _require(self.rounding in ROUNDINGS, "rounding", self.rounding, ", ".join(ROUNDINGS))
        _require(0 < self.keep <= 1, "keep", self.keep, "above 0, at most 1")
        _require(0 <= self.threshold < 1e6, "threshold", self.threshold, "0 or more")
        _require(0 <= self.statistic_bits <= 15, "statistic_bits", self.statistic_bits, "0 to 15")

    def at(self, number: int) -> "UpdateSpec":
        """The spec of a round, the first is 1: ``ratio · 4^−(rounds of warm-up left / all)`` (Lin et al. 2018, DGC)."""
        left = max(0, self.warm_up + 1 - number)
        if self.ratio is None or not left:
            return replace(self, warm_up=0)
        return replace(self, ratio=max(1.0, self.ratio * 4.0 ** (-left / self.warm_up)), warm_up=0)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise InputError(f"update: {name} is {found}; expected {expected}")
