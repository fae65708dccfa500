"""Choose which channels go: how many of each group, and which, from scores of coupled units."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import ceil, gcd

import numpy as np
from torch import Tensor

from kompakt.build.prune import removal
from kompakt.errors import BudgetError, InputError
from kompakt.graph.coupling import Cost, Coupling, Group
from kompakt.methods.widths import channels_each, knapsack, least_drop
from kompakt.plan.allocate import NamedCost
from kompakt.plan.plan import Plan

STEPS = 40
ALLOCATIONS = ("uniform", "global", "knapsack", "sensitivity", "latency")


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a recipe may say about channels.

    Args:
        ratio: the share of channels that goes, between 0 and 1; None where ``fewer_macs`` or
            ``fewer_params`` says how far to go.
        fewer_macs: how many times fewer multiply–accumulates, e.g. 2.0.
        fewer_params: how many times fewer parameters.
        allocation: ``uniform``: the same share of every group; ``global``: the lowest scores of all
            groups together; ``knapsack``: the most score kept within the budget, solved exactly;
            ``sensitivity``: the least sum of measured drops within the budget, solved exactly. For the last two
            a ``ratio`` is of all channels together, wherever they matter least; a measured latency is one more
            budget for them. ``latency``: as ``knapsack``, with measured times as the budget (``costs``).
        align: widths become multiples of this many channels, where a group is wide enough.
        min_width: channels that every group keeps at least.
        max_ratio: the largest share of one group that may go.
        ignore: names or patterns (``layer1.*``) of layers whose outputs stay whole.
        ratios: shares of their own for single layers, by name or pattern.
    """

    ratio: float | None = None
    fewer_macs: float | None = None
    fewer_params: float | None = None
    allocation: str = "uniform"
    align: int = 1
    min_width: int = 1
    max_ratio: float = 0.9
    ignore: tuple[str, ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given = [value for value in (self.ratio, self.fewer_macs, self.fewer_params) if value is not None]
        if len(given) != 1 and not (self.allocation == "latency" and not given):
            raise InputError("say one of ratio, fewer_macs and fewer_params")
        for name, ratio in (("ratio", self.ratio), ("max_ratio", self.max_ratio), *self.ratios):
            if ratio is not None and not 0 < ratio < 1:
                raise InputError(f"{name}: {ratio} is not between 0 and 1; 0.5 removes half of the channels")
        if self.ratio is not None and self.ratio > self.max_ratio:
            raise InputError(
                f"ratio {self.ratio:g}: no layer loses more than {self.max_ratio:g} of its channels; ask for less"
            )
        if self.ratios and self.allocation not in ("uniform", "global"):
            raise InputError(f"shares of single layers go with uniform or global, not with {self.allocation}")
        for name, times in (("fewer_macs", self.fewer_macs), ("fewer_params", self.fewer_params)):
            if times is not None and times <= 1:
                raise InputError(f"{name}: {times} is not above 1; 2.0 halves them")
        if self.allocation not in ALLOCATIONS:
            raise InputError(f"allocation {self.allocation!r} is unknown; use {', '.join(ALLOCATIONS)}")
        if self.align < 1 or self.min_width < 1:
            raise InputError("align and min_width are at least 1")


def channels(
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    knobs: Knobs,
    *,
    drops: Mapping[str, Mapping[int, float]] | None = None,
    costs: Mapping[str, NamedCost[str, int]] | None = None,
) -> Plan:
    """Plan the removal of channels.

    Args:
        coupling: what can be removed.
        scores: group name → (size,) scores, the larger the more worth keeping (``unit_scores``).
        knobs: how far and how.
        drops: for the sensitivity allocation, group name → width in units → measured drop
            (``kompakt.methods.sensitivity.measured_drops``); groups that it leaves out stay whole.
        costs: further budgets for the exact allocations, by kind: measured latency (``latency_cost``), bytes.

    Returns:
        A plan of ``Prune`` and ``Mend`` entries.

    Raises:
        InputError: a name that matches nothing (the nearest are offered) or that cannot be pruned.
        BudgetError: the target cannot be reached; the message names the smallest that can.
    """
    whole = _matched(coupling, knobs.ignore)
    own = {name: ratio for pattern, ratio in knobs.ratios for name in _matched(coupling, (pattern,), prune=True)}
    free = tuple(group for group in coupling.groups if group.name not in whole)
    if not free:
        raise InputError("no channels can be removed: every layer is ignored or left whole")
    limits = {group.name: _limit(group, knobs) for group in free}
    if knobs.allocation == "latency" and not costs:
        raise InputError("the latency allocation needs measured times; give a target to measure them on")
    if knobs.allocation in ("knapsack", "latency"):
        offered = offered_widths(coupling, knobs)
        widths = knapsack(coupling, scores, offered, _budget(coupling, knobs, offered), costs)
    elif knobs.allocation == "sensitivity":
        curves = _offered(free, limits, drops, knobs)
        widths = least_drop(coupling, curves, _budget(coupling, knobs, curves), costs)
    else:
        widths = _search(coupling, scores, free, limits, knobs, own)
    widths = _tied(coupling, widths)
    free = tuple(group for group in free if group.name in widths)
    return removal(coupling, {group.name: _lowest(scores[group.name], widths[group.name]) for group in free})


def offered_widths(coupling: Coupling, knobs: Knobs) -> dict[str, list[int]]:
    """List the widths, in units, that the exact allocations choose from: up to nine for every group that may shrink."""
    whole = _matched(coupling, knobs.ignore)
    free = [group for group in coupling.groups if group.name not in whole]
    limits = {group.name: _limit(group, knobs) for group in free}
    return {group.name: _options(group, limits, knobs) for group in free}


def _lowest(scores: Tensor, width: int) -> list[int]:
    """Return the positions of all but the ``width`` largest scores; among equals the first stay."""
    order = np.argsort(-scores.detach().cpu().double().numpy(), kind="stable")
    return sorted(int(place) for place in order[width:])


def _search(
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    free: Sequence[Group],
    limits: Mapping[str, int],
    knobs: Knobs,
    own: Mapping[str, float],
) -> dict[str, int]:
    """Choose widths by one number, the share that goes, found by bisection where a target is given."""
    pooled = _pool(scores, free) if knobs.allocation == "global" else None

    def assign(share: float) -> dict[str, int]:
        kept = {group.name: _kept(group, share, scores, pooled) for group in free}
        kept |= {group.name: round(group.size * (1 - own[group.name])) for group in free if group.name in own}
        return _tied(coupling, {g.name: _rounded(g, kept[g.name], limits[g.name], knobs) for g in free})

    if knobs.ratio is not None:
        return assign(knobs.ratio)
    low, high = 0.0, 1.0
    if not _within(coupling, assign(high), knobs):
        cost = _cost(coupling, assign(high))
        raise BudgetError(
            f"the target cannot be reached: the smallest model has {cost.macs} MACs, {cost.params} parameters"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(coupling, assign(middle), knobs) else (middle, high)
    return assign(high)


def _pool(scores: Mapping[str, Tensor], free: Sequence[Group]) -> np.ndarray:
    return np.sort(np.concatenate([scores[group.name].detach().cpu().double().numpy() for group in free]))


def _kept(group: Group, share: float, scores: Mapping[str, Tensor], pooled: np.ndarray | None) -> int:
    """Count what a group keeps when a share of all goes: its own share, or what is above the common threshold."""
    if pooled is None:
        return round(group.size * (1 - share))
    threshold = pooled[min(int(len(pooled) * share), len(pooled) - 1)]
    return int((scores[group.name].detach().cpu().double().numpy() >= threshold).sum())


def _rounded(group: Group, kept: int, limit: int, knobs: Knobs) -> int:
    """Round a width in units to a multiple of ``align`` channels, not below the limit nor above the size."""
    step = _step(group, knobs.align)
    rounded = round(kept / step) * step if group.size >= step else group.size
    return min(max(rounded, ceil(limit / step) * step if group.size >= step else group.size), group.size)


def _step(group: Group, align: int) -> int:
    """How many units make a multiple of ``align`` channels."""
    each = max((len(indices) for member in group.makers for indices in member.indices), default=1)
    return max(1, align // gcd(align, each))


def _limit(group: Group, knobs: Knobs) -> int:
    """The fewest units that a group may keep."""
    each = max((len(indices) for member in group.makers for indices in member.indices), default=1)
    return min(group.size, max(1, ceil(knobs.min_width / each), ceil(group.size * (1 - knobs.max_ratio))))


def _options(group: Group, limits: Mapping[str, int], knobs: Knobs) -> list[int]:
    """Offer up to nine widths of a group."""
    raw = {_rounded(group, round(group.size * eighths / 8), limits[group.name], knobs) for eighths in range(9)}
    return sorted(raw)


def _offered(
    free: Sequence[Group],
    limits: Mapping[str, int],
    drops: Mapping[str, Mapping[int, float]] | None,
    knobs: Knobs,
) -> dict[str, dict[int, float]]:
    """Take from measured drops the groups and widths that the knobs allow; the full width costs nothing.

    Widths are rounded as ``align`` wants them, their drops read off the line between those that were measured.
    """
    if not drops:
        raise InputError("the sensitivity allocation needs measured drops; give data to measure them on")
    found = {}
    for group in (group for group in free if group.name in drops):
        curve = dict(sorted({group.size: 0.0, **drops[group.name]}.items()))
        allowed = (width for width in curve if width >= limits[group.name])
        rounded = {_rounded(group, width, limits[group.name], knobs) for width in allowed}
        read = np.interp(sorted(rounded | {group.size}), list(curve), list(curve.values()))
        found[group.name] = dict(zip(sorted(rounded | {group.size}), map(float, read), strict=True))
    return found


def _tied(coupling: Coupling, widths: dict[str, int]) -> dict[str, int]:
    """Give tied groups one share: the nearest to their mean that is a whole number of units in all."""
    result = dict(widths)
    for tie in coupling.ties:
        sizes = [coupling.group(name).size for name in tie]
        if any(name not in widths for name in tie):
            result |= {name: coupling.group(name).size for name in tie if name in widths}
            continue
        parts = gcd(*sizes)
        share = sum(widths[name] for name in tie) / sum(sizes)
        count = min(max(1, round(share * parts)), parts)
        result |= {name: size * count // parts for name, size in zip(tie, sizes, strict=True)}
    return result


def _units(coupling: Coupling, widths: Mapping[str, int]) -> list[int]:
    return [unit for name, width in widths.items() for unit in coupling.group(name).units[width:]]


def _cost(coupling: Coupling, widths: Mapping[str, int]) -> Cost:
    return coupling.cost_after(_units(coupling, widths))


def _budget(coupling: Coupling, knobs: Knobs, names: Iterable[str] = ()) -> dict[str, float]:
    """Say the target in MACs or parameters, or in the channels of the groups ``names``."""
    graph = coupling.graph
    if (knobs.ratio, knobs.fewer_macs, knobs.fewer_params) == (None, None, None):
        return {}  # a measured latency is the only budget
    if knobs.fewer_params is not None:
        return {"params": graph.params / knobs.fewer_params}
    if knobs.fewer_macs is not None:
        return {"macs": graph.macs / knobs.fewer_macs}
    groups = [coupling.group(name) for name in names]
    return {"channels": (1 - (knobs.ratio or 0.0)) * sum(group.size * channels_each(group) for group in groups)}


def _within(coupling: Coupling, widths: Mapping[str, int], knobs: Knobs) -> bool:
    cost = _cost(coupling, widths)
    return all(getattr(cost, kind) <= budget for kind, budget in _budget(coupling, knobs).items())


def _matched(coupling: Coupling, patterns: Sequence[str], *, prune: bool = False) -> set[str]:
    """Find the groups whose layers match names or patterns."""
    names = {
        group.name: {group.name, *(member.tensor.rpartition(".")[0] for member in group.makers)}
        for group in coupling.groups
    }
    left = {item.name: item.reason for item in coupling.left}
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name, own in names.items() if any(fnmatchcase(layer, pattern) for layer in own)}
        whole = [name for name in left if fnmatchcase(name, pattern)]
        if not hits and whole and prune:
            raise InputError(f"{whole[0]}: its channels cannot be removed: {left[whole[0]]}")
        if not hits and not whole:
            layers = sorted({layer for own in names.values() for layer in own} | set(left))
            near = ", ".join(get_close_matches(pattern, layers, n=3, cutoff=0.0))
            raise InputError(f"{pattern}: no layer has such a name; the nearest are {near}")
        found |= hits
    return found
