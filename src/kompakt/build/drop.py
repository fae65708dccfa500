"""Replace residual blocks by the identity, in a copy of the model."""

import copy

from torch import Tensor, nn

from kompakt.build.prune import run_once
from kompakt.errors import PlanError
from kompakt.plan import Drop, Plan


class Skip(nn.Module):
    """Stands where a residual block was: returns its first argument."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Return ``x``."""
        return x


def apply_drop(model: nn.Module, plan: Plan, example: Tensor | tuple[Tensor, ...] | None = None) -> nn.Module:
    """Return a copy of a model without the blocks that a plan drops; the model itself is left as it was.

    The state dict of the copy is the model's less the blocks' own entries, so a dropped model is loaded
    by dropping from a freshly built one first.

    Args:
        model: the model that the plan was made for.
        plan: its ``Drop`` entries are carried out, the others ignored.
        example: inputs, batch first; where given, the new model is run on them once.

    Raises:
        PlanError: the model has no such module, or the new model does not run.
    """
    dropped = copy.deepcopy(model)
    for entry in plan.of(Drop):
        owner, _, leaf = entry.module.rpartition(".")
        try:
            parent, _ = dropped.get_submodule(owner), dropped.get_submodule(entry.module)
        except AttributeError:
            raise PlanError(f"{entry.module}: the plan drops a module that {type(model).__name__} lacks") from None
        setattr(parent, leaf, Skip())
    if example is not None:
        run_once(dropped, example)
    return dropped
