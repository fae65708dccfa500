"""Sparse training: penalties that press weights or whole coupled channels to exactly zero in the one training loop.

The penalty's gradient is part of the loss; what it has brought to within one step of zero is set to zero after the
step, as the proximal step of the same penalty would (Parikh and Boyd 2014, §4.2), and stays there unless the task
pulls harder than the penalty. So what is zero at the end is exactly zero, and can be removed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from kompakt.build.optimize import learning_rate_at
from kompakt.build.settings import TrainSettings
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, Group
from kompakt.numerics.regularize import bn_l1, group_lasso, growing_coefficient, growing_penalty, l1

Kind = Literal["l1", "bn_l1", "group_lasso", "greg"]
STRENGTHS: dict[Kind, float] = {"l1": 1e-5, "bn_l1": 1e-3, "group_lasso": 1e-4, "greg": 1.0}
"""Where none is given: λ of the penalty; for ``greg`` the one that it grows to."""
GROWTH = 0.8
"""The share of the steps over which ``greg`` grows; what was chosen is zero from there on."""
LEVELS = 100


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One dimension of one parameter, and for each of its indices the position of the unit that owns it, or -1."""

    tensor: str
    dim: int
    places: Tensor

    def squares(self, tensors: Mapping[str, Tensor], size: int) -> Tensor:
        """Sum the squares of what each of ``size`` units owns here."""
        owned = self.places >= 0
        each = tensors[self.tensor].movedim(self.dim, 0).reshape(len(self.places), -1).square().sum(1)
        return each.new_zeros(size).index_add(0, self.places[owned], each[owned])

    def clear(self, tensors: Mapping[str, Tensor], gone: Tensor) -> None:
        """Set to zero what the units with True in ``gone`` own here."""
        hit = (self.places >= 0) & gone[self.places.clamp_min(0)]
        tensors[self.tensor].movedim(self.dim, 0)[hit] = 0


def owners(coupling: Coupling, group: Group) -> tuple[Owner, ...]:
    """List what the units of a group own of the model's parameters."""
    found = []
    for member in group.members:
        if coupling.graph.tensor[member.tensor].kind == "parameter":
            places = torch.full((member.size,), -1, dtype=torch.int64)
            for place, indices in enumerate(member.indices):
                places[list(indices)] = place
            found.append(Owner(tensor=member.tensor, dim=member.dim, places=places))
    return tuple(found)


def scales(coupling: Coupling) -> dict[str, str]:
    """Return γ → β of the batch norms whose channels can all be removed."""
    makers = {(m.tensor, m.dim): sum(map(len, m.indices)) == m.size for g in coupling.groups for m in g.members}
    found = {}
    for op in coupling.graph.ops:
        gamma, beta = op.ref("weight"), op.ref("bias")
        if op.kind == "batch_norm" and gamma is not None and beta is not None and makers.get((gamma, 0)):
            found[gamma] = beta
    return found


def weights(coupling: Coupling) -> tuple[str, ...]:
    """Name the weights of convolutions and linear layers."""
    return tuple(dict.fromkeys(w.name for op in coupling.graph.layers if (w := coupling.graph.weight(op)) is not None))


@dataclass(kw_only=True)
class Penalty:
    """A penalty on one model, as what ``train`` takes: a regularizer and a hook after every step.

    Args:
        kind: ``l1`` on single weights, ``bn_l1`` on batch norms' scales (Liu et al. 2017, arXiv:1708.06519),
            ``group_lasso`` on coupled channels, ``greg`` on the channels of ``chosen`` (Wang et al. 2021,
            arXiv:2012.09243).
        strength: λ.
        coupling: of the model.
        settings: of the run.
        steps: of the whole run.
        chosen: for ``greg``, group name → (size,) True where a unit is to go.
    """

    kind: Kind
    strength: float
    coupling: Coupling
    settings: TrainSettings
    steps: int
    chosen: Mapping[str, Tensor]
    step: int = 0

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise InputError(f"strength {self.strength:g}: expected a positive number; try {STRENGTHS[self.kind]:g}")
        if self.kind == "bn_l1" and not scales(self.coupling):
            raise InputError("bn_l1: the model has no batch norm whose channels can be removed; use group_lasso")
        self.owners = {group.name: owners(self.coupling, group) for group in self.coupling.groups}
        self.even = {group.name: self._even(group) for group in self.coupling.groups}
        self.sizes = {group.name: group.size for group in self.coupling.groups}

    def term(self, model: nn.Module) -> Tensor:
        """Return the penalty at the model's weights."""
        tensors = dict(model.named_parameters())
        if self.kind == "l1":
            return self.strength * l1([tensors[name] for name in weights(self.coupling)])
        if self.kind == "bn_l1":
            return self.strength * bn_l1([tensors[name] for name in scales(self.coupling)])
        if self.kind == "group_lasso":
            return self.strength * group_lasso([self._rows(tensors, name) for name in self.owners])
        groups = [self._rows(tensors, name) for name in self.chosen]
        return growing_penalty(groups, list(self.chosen.values()), self._grown())

    def after_step(self, model: nn.Module, step: int) -> None:
        """Set to zero what the last step left within reach of zero."""
        self.step = step
        if step == 0:
            return
        tensors = dict(model.named_parameters())
        rate = learning_rate_at(self.settings, step - 1, self.steps) / (1 - self.settings.momentum)
        with torch.no_grad():
            if self.kind == "greg":
                self._clear_chosen(tensors)
            elif self.kind == "group_lasso":
                self._clear_groups(tensors, rate * self.strength)
            else:
                self._clear_single(tensors, rate * self.strength)

    def _even(self, group: Group) -> list[Owner]:
        counts = [torch.bincount(o.places[o.places >= 0], minlength=group.size) for o in self.owners[group.name]]
        pairs = zip(self.owners[group.name], counts, strict=True)
        return [owner for owner, each in pairs if bool((each == each.max()).all())]

    def _grown(self) -> float:
        every = max(1, int(GROWTH * self.steps) // LEVELS)
        levels = max(1, int(GROWTH * self.steps) // every)
        return growing_coefficient(self.step, every=every, increment=self.strength / levels, ceiling=self.strength)

    def _rows(self, tensors: Mapping[str, Tensor], name: str) -> list[tuple[Tensor, int]]:
        """Gather a group's parameters with the indices in the order of its units, where all own equally many."""
        found = []
        for owner in self.even[name]:
            order = owner.places.argsort(stable=True)
            owned = order[int((owner.places < 0).sum()) :]
            found.append((tensors[owner.tensor].index_select(owner.dim, owned), owner.dim))
        return found

    def _clear_single(self, tensors: Mapping[str, Tensor], reach: float) -> None:
        pairs = scales(self.coupling) if self.kind == "bn_l1" else dict.fromkeys(weights(self.coupling))
        for name, beta in pairs.items():
            zero = tensors[name].abs() <= reach
            tensors[name][zero] = 0
            if beta is not None:  # a channel of scale 0 would be its shift everywhere: let it be nothing at all
                tensors[beta][zero] = 0

    def _clear_groups(self, tensors: Mapping[str, Tensor], reach: float) -> None:
        for name, members in self.owners.items():
            size = self.sizes[name]
            squares = torch.stack([owner.squares(tensors, size) for owner in members]).sum(0)
            width = sum(tensors[o.tensor].numel() // len(o.places) * int((o.places >= 0).sum()) for o in members)
            self._clear(tensors, name, squares.sqrt() <= reach * sqrt(width / size))

    def _clear_chosen(self, tensors: Mapping[str, Tensor]) -> None:
        if self.step >= GROWTH * self.steps:
            for name, gone in self.chosen.items():
                self._clear(tensors, name, gone)

    def _clear(self, tensors: Mapping[str, Tensor], name: str, gone: Tensor) -> None:
        for owner in self.owners[name]:
            owner.clear(tensors, gone)


def lowest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Choose the lowest share of every group's units: group name → (size,) True where a unit is to go."""
    found = {}
    for name, each in scores.items():
        gone = torch.zeros(len(each), dtype=torch.bool)
        count: int = min(round(share * len(each)), len(each) - 1)
        gone[each.argsort(stable=True)[:count]] = True
        found[name] = gone
    return found
