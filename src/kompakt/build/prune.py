"""Remove channels: a new model with smaller tensors and the right attributes, never the one given.

``removal`` writes what is removed as a plan, ``check`` says whether a plan fits a model, ``apply_prune``
carries it out; ``kompakt.build.structure`` rebuilds a pruned model from its class, the plan and saved tensors.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kompakt.build.cut import cut_tensors, mend_layers, mend_numbers, rounds
from kompakt.build.slim import slim
from kompakt.errors import PlanError
from kompakt.graph.constants import constants_after
from kompakt.graph.coupling import Coupling, Group
from kompakt.graph.trace import trace
from kompakt.plan import Cut, Mend, Plan, Prune


def removal(coupling: Coupling, removed: Mapping[str, Sequence[int]]) -> Plan:
    """Write the removal of units as a plan.

    Args:
        coupling: what can be removed from the model.
        removed: group name → positions of the units that go, 0 to ``size - 1``.

    Raises:
        PlanError: no such group or unit, or nothing would be left of a tensor's dimension.
    """
    entries: list[Prune | Mend] = []
    units: list[int] = []
    for name, positions in removed.items():
        group = coupling.group(name)
        wrong = next((place for place in positions if not 0 <= place < group.size), None)
        if wrong is not None:
            raise PlanError(f"{name}: unit {wrong} is outside 0…{group.size - 1}")
        places = sorted(set(positions))
        if places:
            entries.append(_prune(group, places))
            units.extend(group.units[place] for place in places)
    plan = Plan(entries=tuple(entries))
    check(coupling, plan)
    mends = [Mend(module=m, before=b, after=a) for m, b, a in constants_after(coupling, units)]
    return plan.then(*mends)


def _prune(group: Group, places: Sequence[int]) -> Prune:
    cuts = []
    for member in group.members:
        gone = sorted(index for place in places for index in member.indices[place])
        if gone:
            cuts.append(Cut(tensor=member.tensor, dim=member.dim, size=member.size, removed=tuple(gone)))
    return Prune(group=group.name, cuts=tuple(cuts))


def units_of(coupling: Coupling, plan: Plan) -> tuple[int, ...]:
    """Return the units that a plan removes.

    Raises:
        PlanError: the plan is for another model, or names a part of what stands or falls together.
    """
    gone: dict[tuple[str, int], set[int]] = {}
    for prune in plan.of(Prune):
        for cut in prune.cuts:
            _fits(coupling, cut)
            gone.setdefault((cut.tensor, cut.dim), set()).update(cut.removed)
    units: set[int] = set()
    for (tensor, dim), indices in gone.items():
        labels = coupling.tensors[tensor][dim]
        frozen = next((index for index in sorted(indices) if labels[index] == 0), None)
        if frozen is not None:
            raise PlanError(f"{tensor}: index {frozen} of dimension {dim} cannot be removed from this model")
        units.update(int(labels[index]) for index in indices)
    for group in coupling.groups:
        places = [place for place, unit in enumerate(group.units) if unit in units]
        for member in group.members:
            owned = {index for place in places for index in member.indices[place]}
            missing = owned - gone.get((member.tensor, member.dim), set())
            if missing:
                raise PlanError(
                    f"{group.name}: the plan names a coupled part alone; {member.tensor} dimension {member.dim} "
                    f"index {min(missing)} must go with it"
                )
    return tuple(sorted(units))


def _fits(coupling: Coupling, cut: Cut) -> None:
    tensor = coupling.graph.tensor.get(cut.tensor)
    if tensor is None or cut.tensor not in coupling.tensors:
        raise PlanError(f"{cut.tensor}: the plan names a tensor that this model does not have")
    if cut.dim >= len(tensor.shape) or tensor.shape[cut.dim] != cut.size:
        raise PlanError(
            f"{cut.tensor}: the plan expects size {cut.size} in dimension {cut.dim}, the model has shape {tensor.shape}"
        )
    wrong = next((index for index in cut.removed if not 0 <= index < cut.size), None)
    if wrong is not None:
        raise PlanError(f"{cut.tensor}: index {wrong} of dimension {cut.dim} is outside 0…{cut.size - 1}")


def check(coupling: Coupling, plan: Plan) -> None:
    """Check that a plan of one round of removals fits a model and is complete.

    Raises:
        PlanError: the plan is for another model (the message says what differs), names a coupled part
            alone, or leaves nothing of a tensor or of an intermediate result.
    """
    units = units_of(coupling, plan)
    if not units:
        return
    shapes = coupling.shapes_after(units)
    before = coupling.shapes_after(())
    for name, many in shapes.items():
        for shape, old in zip(many, before[name], strict=True):
            if 0 in shape and 0 not in old:
                raise PlanError(f"{name}: nothing of dimension {shape.index(0)} would be left; remove fewer channels")


def apply_prune(model: nn.Module, plan: Plan, example: Tensor | tuple[Tensor, ...] | None = None) -> nn.Module:
    """Return a copy of a model without what the plan removes; the model itself is left as it was.

    Args:
        model: the model that the plan was made for.
        plan: its ``Prune`` and ``Mend`` entries are carried out, the others ignored.
        example: inputs, batch first; where given, the new model is run on them once.

    Raises:
        PlanError: a tensor is missing or of another size, or the new model does not run.

    Example:
        >>> import torch
        >>> from kompakt.plan import Cut, Plan, Prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> gone = {"size": 3, "removed": (1,)}
        >>> cuts = (("0.weight", 0), ("0.bias", 0), ("1.weight", 1))
        >>> plan = Plan(entries=(Prune(group="0", cuts=tuple(Cut(tensor=t, dim=d, **gone) for t, d in cuts)),))
        >>> apply_prune(net, plan, torch.zeros(2, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    pruned = copy.deepcopy(model)
    for prunes, mends in rounds(plan.entries):
        cuts = [cut for prune in prunes for cut in prune.cuts]
        cut_tensors(pruned, cuts)
        mend_numbers(pruned, mends)
        mend_layers(pruned, cuts)
        touched = {cut.tensor.rpartition(".")[0] for cut in cuts}
        for name, module in pruned.named_modules():
            if any(owner == name or owner.startswith(f"{name}.") for owner in touched):
                slim(module)
    if example is not None:
        run_once(pruned, example)
    return pruned


def run_once(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> object:
    """Run a model on an example in eval mode, and leave its modes as they were.

    Raises:
        PlanError: it does not run; the message names the module's complaint.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(*inputs)
    except Exception as error:
        first = str(error).strip().splitlines()
        reason = first[0][:200] if first else type(error).__name__
        raise PlanError(f"{type(model).__name__}: does not run after pruning: {reason}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def verify(coupling: Coupling, plan: Plan, pruned: nn.Module, example: Tensor | tuple[Tensor, ...]) -> bool:
    """Trace a pruned model and compare every op's shape with what the coupling says it must be.

    A run alone does not notice code that cuts at a hard-coded place and still fits.

    Returns:
        Whether the ops could be compared; False where the pruned model runs others (``kompakt.build.slim``).

    Raises:
        PlanError: an op gives another shape; the message names the module.
    """
    old, new = coupling.graph.ops, trace(pruned, example).graph.ops
    if [op.kind for op in old] != [op.kind for op in new]:
        return False
    expected = coupling.shapes_after(units_of(coupling, plan))
    for before, after in zip(old, new, strict=True):
        if after.shapes != expected[before.name]:
            raise PlanError(
                f"{before.module or 'the model'}: {before.kind} gives shapes {after.shapes} after pruning, "
                f"expected {expected[before.name]}; its code cuts at a fixed place"
            )
    return True
