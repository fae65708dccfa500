"""What a server takes from a client at most: an update may be well formed and finite, and still too much."""

from dataclasses import dataclass

from kompakt.errors import FormatError, InputError
from kompakt.federated.broadcast import state_bytes
from kompakt.federated.layout import State, layout_of
from kompakt.federated.values import deviation, working

SLACK_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one client's update.

    Args:
        size: bytes of a message over those of the state; 4,096 bytes more are always allowed.
        change: Euclidean length of the change of all weights, over that of the base's weights (or 1, if that is less).
        deviations: how far a running mean may move, in deviations of the base, and a running variance, in times.
        examples: the most examples that a client may say it has: they are its weight in the mean.

    Raises:
        InputError: a bound is not above 0.
    """

    size: float = 1.25
    change: float = 10.0
    deviations: float = 1e4
    examples: int = 10**7

    def __post_init__(self) -> None:
        for name in ("size", "change", "deviations", "examples"):
            if not 0 < getattr(self, name) < 1e30:
                raise InputError(f"limits: {name} is {getattr(self, name)}; expected a number above 0")


def check_size(data: bytes, base: State, limits: Limits) -> None:
    """Refuse a message before it is read.

    Raises:
        FormatError: it is longer than any honest one.
    """
    most = limits.size * state_bytes(base) + SLACK_BYTES
    if len(data) > most:
        raise FormatError(f"update: {len(data):,} bytes, at most {most:,.0f} expected of this model; it is refused")


def check_change(found: State, base: State, limits: Limits) -> None:
    """Refuse a state that lies too far from its base.

    Raises:
        FormatError: its weights or a statistic moved beyond the limits.
    """
    layout = layout_of(base)
    moved = sum(float((found[n].double() - base[n].double()).square().sum()) for n in layout.weights) ** 0.5
    whole = max(sum(float(base[n].double().square().sum()) for n in layout.weights) ** 0.5, 1.0)
    if moved > limits.change * whole:
        raise FormatError(
            f"update: its weights move by {moved:.3g}, at most {limits.change * whole:.3g} expected; it is refused"
        )
    for name in layout.statistics:
        old, new = (state[name].to(working(base[name])) for state in (base, found))
        far = new / old.clamp(min=1e-5) if name.endswith("running_var") else (new - old).abs() / deviation(name, base)
        if far.numel() and float(far.max()) > limits.deviations:
            raise FormatError(f"update: {name} moves by {float(far.max()):.3g} deviations; it is refused")
