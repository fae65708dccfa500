"""Carry out everything in a plan that changes a model's shape, and rebuild such a model from saved tensors."""

from collections.abc import Mapping
from itertools import groupby

from torch import Tensor, nn

from kompakt.build.cut import rounds
from kompakt.build.drop import apply_drop
from kompakt.build.factor import apply_factor
from kompakt.build.prune import apply_prune, check, run_once
from kompakt.errors import PlanError
from kompakt.graph.coupling import couple
from kompakt.graph.trace import trace
from kompakt.plan import Drop, Factor, Mend, Plan, Prune

APPLY = {Drop: apply_drop, Factor: apply_factor, Prune: apply_prune, Mend: apply_prune}


def apply_structure(model: nn.Module, plan: Plan, example: Tensor | tuple[Tensor, ...] | None = None) -> nn.Module:
    """Return a copy of a model with blocks dropped, layers factored and channels removed, in the plan's order.

    Args:
        model: the model that the plan was made for; it is left as it was.
        plan: its other entries are ignored.
        example: inputs, batch first; where given, the new model is run on them once.

    Raises:
        PlanError: an entry does not fit the model, or the new model does not run.
    """
    entries = [entry for entry in plan.entries if type(entry) in APPLY]
    for apply, run in groupby(entries, key=lambda entry: APPLY[type(entry)]):
        model = apply(model, Plan(entries=tuple(run)))
    if example is not None:
        run_once(model, example)
    return model


def checked_structure(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Carry out a plan that somebody gives, as ``apply_structure``, checking each removal against the model first.

    Raises:
        PlanError: the plan is for another model (the message says what differs), names a coupled part alone, or
            leaves nothing of a layer.
    """
    entries = [entry for entry in plan.entries if type(entry) in APPLY]
    for apply, run in groupby(entries, key=lambda entry: APPLY[type(entry)]):
        if apply is not apply_prune:
            model = apply(model, Plan(entries=tuple(run)))
            continue
        for prunes, mends in rounds(tuple(run)):
            one = Plan(entries=(*prunes, *mends))
            check(couple(trace(model, example).graph), one)
            model = apply(model, one)
    run_once(model, example)
    return model


def restructured(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild a student from its original class, its plan and its saved tensors; no pickle is read.

    Args:
        model: a freshly built model of the original class; it is left as it was.
        plan: of the saved model.
        state: the saved model's ``state_dict``, e.g. read by ``safetensors``.

    Raises:
        PlanError: the tensors are not those of this model under this plan.
    """
    made = apply_structure(model, plan)
    own = made.state_dict()
    for name in (*own, *state):
        if name not in own or name not in state:
            raise PlanError(f"{name}: only in the {'saved tensors' if name in state else 'model'}")
        if own[name].shape != state[name].shape:
            expected, found = tuple(own[name].shape), tuple(state[name].shape)
            raise PlanError(f"{name}: the plan gives shape {expected}, saved was {found}")
    made.load_state_dict(dict(state))
    return made
