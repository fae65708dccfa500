"""Which candidates none is better than, and which one ships: pure functions of what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

from kompakt.engine.strategy import Objective
from kompakt.measure.result import Tried

SAME_SPEED = 0.02
"""Ratios that differ by less are one speed: no machine measures closer in the time a candidate gets."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate must keep.

    Args:
        max_drop: points on the validation split; None is no limit.
        max_bytes: of the artifact.
        max_ratio: of its time to the original's.
        confident: whether the upper end of the drop's interval must keep ``max_drop``.
    """

    max_drop: float | None = None
    max_bytes: int | None = None
    max_ratio: float | None = None
    confident: bool = False

    def judged(self, found: Tried) -> float:
        """The drop that counts, in points; infinite where there is none."""
        if found.points is None or found.drop_ci95 is None:
            return float("inf")
        return max(found.drop_ci95[1], found.points) if self.confident else found.points

    def keeps(self, found: Tried) -> bool:
        """Whether a candidate keeps every limit."""
        sizes = self.max_bytes is None or (found.size_bytes or 0) <= self.max_bytes
        times = self.max_ratio is None or (found.latency_ratio or 1.0) <= self.max_ratio
        return found.state == "verified" and sizes and times and self.excess(found) <= 0

    def excess(self, found: Tried) -> float:
        """By how many points a candidate breaks the drop that is allowed; negative where there is room."""
        return self.judged(found) - (float("inf") if self.max_drop is None else self.max_drop)


def worth(found: Tried, objective: Objective) -> float:
    """What a candidate costs, less is better: log bytes as ``.kpk``, log time, or both together."""
    size, time = log(found.packed_bytes or 1), log(found.latency_ratio or 1.0)
    return {"size": size, "latency": time, "both": size + time}[objective]


def choose(candidates: Iterable[Tried], limits: Limits, objective: Objective) -> Tried | None:
    """Return the best candidate that keeps the limits, else the one nearest to them; None where none was verified."""
    verified = [item for item in candidates if item.state == "verified"]
    inside = [item for item in verified if limits.keeps(item)]
    if inside:
        return min(inside, key=lambda item: (worth(item, objective), item.number))
    return min(verified, key=lambda item: (limits.judged(item), item.number), default=None)


def fronted(candidates: Sequence[Tried], chosen: int | None) -> tuple[Tried, ...]:
    """Mark the candidates that no other betters in drop, bytes and time at once, and the chosen one."""
    return tuple(
        item.model_copy(
            update={
                "chosen": item.number == chosen,
                "front": item.state == "verified" and not any(_betters(other, item) for other in candidates),
            }
        )
        for item in candidates
    )


def one_point_more(candidates: Sequence[Tried], limits: Limits, objective: Objective, chosen: Tried) -> str:
    """Say what one more point of accuracy would buy, as far as it was measured; empty where nothing."""
    if limits.max_drop is None:
        return ""
    wider = Limits(**(vars(limits) | {"max_drop": limits.max_drop + 1}))
    best = choose(candidates, wider, objective)
    if best is None or best.number == chosen.number or worth(best, objective) >= worth(chosen, objective):
        return f"one more point than {limits.max_drop:g} would buy nothing that was tried"
    smaller = (chosen.packed_bytes or 1) / (best.packed_bytes or 1)
    faster = (chosen.latency_ratio or 1.0) / (best.latency_ratio or 1.0)
    return (
        f"one more point than {limits.max_drop:g} would buy {smaller:.2f}× fewer bytes and {faster:.2f}× the speed: "
        f"candidate {best.number}, {best.what}"
    )


def _betters(other: Tried, item: Tried) -> bool:
    """Whether another candidate is no worse in anything that counts and better in something."""
    if other.state != "verified" or other.number == item.number:
        return False
    ours, theirs = _figures(item), _figures(other)
    slack = (0.0, 0.0, SAME_SPEED * ours[2])
    no_worse = all(b <= a + room for a, b, room in zip(ours, theirs, slack, strict=True))
    return no_worse and any(b < a - room for a, b, room in zip(ours, theirs, slack, strict=True))


def _figures(item: Tried) -> tuple[float, float, float]:
    drop = float("inf") if item.points is None else item.points
    return drop, float(item.packed_bytes or 0), item.latency_ratio or 1.0
