"""Find which groups the model's own code can follow, by running it without some of their channels.

A class may compute one width from another (``C // num_heads``), so that two groups can only shrink
together, or hard-code a width where no attribute can be mended, so that a group cannot shrink at all.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from kompakt.build.prune import apply_prune, removal
from kompakt.errors import PlanError
from kompakt.graph.coupling import Coupling, Group
from kompakt.graph.graph import Left

UNEVEN = (0.5, 0.25, 0.34)
"""Shares to remove that differ from group to group, so that a width computed from another does not fit."""


def follow(model: nn.Module, coupling: Coupling, example: Tensor | tuple[Tensor, ...]) -> Coupling:
    """Keep the groups that the model runs without parts of; tie those that only shrink in step.

    One run where all is well; else about log₂(groups) runs for each group that the code cannot follow.

    Args:
        model: the model that ``coupling`` was found for; it is left as it was.
        coupling: what the graph allows to be removed.
        example: inputs to run on, batch first.

    Returns:
        ``coupling`` with fewer groups, or ties, and the reasons in ``left``.
    """
    found = coupling
    wrong: list[tuple[Group, str]] = []
    while (reason := _complaint(model, found, found.groups, example, even=False)) is not None:
        failing = _failing(model, found, found.groups, example) or [(found.groups[-1], reason)]
        names = {group.name for group, _ in failing}
        wrong += failing
        found = replace(found, groups=tuple(group for group in found.groups if group.name not in names))
    if not wrong:
        return found
    tied = [group for group, _ in wrong]
    if len(tied) > 1 and _complaint(model, coupling, tied, example, even=True) is None:
        return replace(coupling, ties=(tuple(group.name for group in tied),))
    left = tuple(Left(name=group.name, reason=f"the model's code cannot follow: {why}") for group, why in wrong)
    return replace(found, left=(*coupling.left, *left))


def _failing(
    model: nn.Module, coupling: Coupling, groups: Sequence[Group], example: Tensor | tuple[Tensor, ...]
) -> list[tuple[Group, str]]:
    """Find by halving the groups that cannot be shrunk while all others stay."""
    reason = _complaint(model, coupling, groups, example, even=False)
    if reason is None:
        return []
    if len(groups) == 1:
        return [(groups[0], reason)]
    half = len(groups) // 2
    return [
        *_failing(model, coupling, groups[:half], example),
        *_failing(model, coupling, groups[half:], example),
    ]


def _complaint(
    model: nn.Module,
    coupling: Coupling,
    groups: Sequence[Group],
    example: Tensor | tuple[Tensor, ...],
    *,
    even: bool,
) -> str | None:
    """Run the model without the last units of some groups; return what it complains of."""
    place = {group.name: number for number, group in enumerate(coupling.groups)}
    gone = {}
    for group in groups:
        share = 0.5 if even else UNEVEN[place[group.name] % len(UNEVEN)]
        count = min(max(1, round(group.size * share)), group.size - 1)
        gone[group.name] = range(group.size - count, group.size)
    try:
        apply_prune(model, removal(coupling, gone), example)
    except PlanError as error:
        return str(error).partition("does not run after pruning: ")[2] or str(error)
    return None
