"""Remove what training has brought to exactly zero: the outputs stay as they were."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kompakt.build.penalty import owners
from kompakt.build.prune import apply_prune, removal, run_once
from kompakt.graph.coupling import Coupling
from kompakt.graph.graph import Left
from kompakt.plan.plan import Plan

TOLERANCE = 1e-5
"""Of the outputs' largest magnitude: sums of fewer terms are rounded in another order."""


def zero_units(coupling: Coupling, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Find the units that are zero for every input: all that makes them is zero.

    That is every scale, shift and bias that a unit owns, and the layers' weights of this unit; but where a batch norm
    stands behind a layer, its scale and shift decide alone. One unit of every group stays.

    Returns:
        Group name → positions of the units, for groups that have any.
    """
    silent = _before_norms(coupling)
    found: dict[str, list[int]] = {}
    for group in coupling.groups:
        makes = {(member.tensor, member.dim) for member in group.makers}
        owned = [owner for owner in owners(coupling, group) if owner.tensor not in silent]
        held = [o for o in owned if tensors[o.tensor].ndim == 1 or (o.tensor, o.dim) in makes]
        if held:
            squares = torch.stack([owner.squares(tensors, group.size) for owner in held]).sum(0)
            places = (squares == 0).nonzero().flatten().tolist()
            found[group.name] = places[1:] if len(places) == group.size else places
    return {name: places for name, places in found.items() if places}


def without_zeros(model: nn.Module, coupling: Coupling, example: Tensor) -> tuple[Plan, tuple[Left, ...]]:
    """Plan the removal of all zero units that can go without any change of the outputs, checked by running it.

    Args:
        model: the trained model; it is left as it was.
        coupling: of it.
        example: inputs to compare the outputs on, batch first; not all zero.

    Returns:
        The plan, and the groups whose zero units have to stay, with the reason.
    """
    found = zero_units(coupling, dict(model.state_dict()))
    tied = {name for tie in coupling.ties for name in tie}
    left = [Left(name=n, reason="zero channels stay: the model's code ties its width") for n in found if n in tied]
    found = {name: places for name, places in found.items() if name not in tied}
    if not found or _change(model, removal(coupling, found), example) <= TOLERANCE:
        return removal(coupling, found), tuple(left)
    exact = {}
    for name, places in found.items():
        change = _change(model, removal(coupling, {name: places}), example)
        if change <= TOLERANCE:
            exact[name] = places
        else:
            reason = f"zero channels stay: without them the outputs change by {change:.1g} of the largest"
            left.append(Left(name=name, reason=reason))
    return removal(coupling, exact), tuple(left)


def _before_norms(coupling: Coupling) -> set[str]:
    """Name the weights and biases of layers whose outputs a batch norm alone reads."""
    found: set[str] = set()
    for op in coupling.graph.layers:
        users = coupling.graph.users[op.name]
        if len(users) == 1 and users[0].kind == "batch_norm":
            found.update(name for name in (op.ref("weight"), op.ref("bias")) if name is not None)
    return found


def _change(model: nn.Module, plan: Plan, example: Tensor) -> float:
    """Return the largest change of the outputs, as a share of their largest magnitude."""
    before, after = run_once(model, example), run_once(apply_prune(model, plan), example)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return float("inf")
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
