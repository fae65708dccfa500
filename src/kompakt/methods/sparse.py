"""Unstructured, block and N:M sparsity: which layers, how sparse, by which criterion."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from kompakt.errors import InputError, PlanError
from kompakt.graph.graph import Graph, Left
from kompakt.numerics.masks import keep_blocks, keep_largest, keep_largest_globally, keep_n_of_m
from kompakt.numerics.saliency import saliency
from kompakt.plan.plan import Plan, Sparsify


@dataclass(frozen=True, kw_only=True)
class SparseKnobs:
    """What a recipe may say about sparsity.

    Args:
        sparsity: the share of weights that becomes zero, between 0 and 1; or
        n_of_m: ``(2, 4)`` keeps two of every four inputs.
        scope: ``layer``: the same share of every layer; ``global``: the lowest scores of all layers
            together (for LAMP, Lee et al. 2021, arXiv:2010.07611, that is the method).
        criterion: a criterion that scores single weights.
        block: shape of blocks that go as a whole, e.g. ``(4, 4)`` for linear layers.
        kernels: whole kernels of convolutions go, whatever their shape.
        ignore: names or patterns of layers that stay dense.
    """

    sparsity: float | None = None
    n_of_m: tuple[int, int] | None = None
    scope: str = "layer"
    criterion: str = "magnitude"
    block: tuple[int, ...] = ()
    kernels: bool = False
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kernels and (self.block or self.n_of_m is not None):
            raise InputError("kernels go whole: say one of kernels, block and n_of_m")
        if (self.sparsity is None) == (self.n_of_m is None):
            raise InputError("say one of sparsity and n_of_m")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity} is not between 0 and 1; 0.9 zeroes nine of ten weights")
        if self.n_of_m is not None and not 0 < self.n_of_m[0] < self.n_of_m[1]:
            raise InputError(f"{self.n_of_m[0]}:{self.n_of_m[1]}: N must be between 0 and M, as in 2:4")
        if self.scope not in ("layer", "global"):
            raise InputError(f"scope {self.scope!r} is unknown; use layer or global")
        if self.scope == "global" and (self.n_of_m is not None or self.block or self.kernels):
            raise InputError("a global scope takes single weights, not blocks or N:M")
        if self.block and self.n_of_m is not None:
            raise InputError("say one of block and n_of_m")
        if saliency(self.criterion).scores != "parameters":
            raise InputError(f"criterion {self.criterion!r} scores channels; use magnitude, lamp, sensitivity or obd")


def sparse(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    knobs: SparseKnobs,
    inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[Plan, tuple[Left, ...]]:
    """Plan sparsity for the layers of a model.

    Args:
        graph: the model.
        tensors: weights by name.
        knobs: how far and how.
        inputs: what the criterion needs beside the weight (``grad``, ``curvature``, ``input_norm``, …):
            its name → weight name → tensor.

    Returns:
        A plan of ``Sparsify`` entries, and the layers that stay dense with the reason.

    Raises:
        InputError: an ignored name matches nothing, or the criterion's inputs are missing.
    """
    weights = dict.fromkeys(tensor.name for op in graph.layers if (tensor := graph.weight(op)) is not None)
    dense = _ignored(tuple(weights), knobs.ignore)
    left = [Left(name=name, reason="ignored") for name in weights if name in dense]
    chosen = []
    for name in weights:
        if name in dense:
            continue
        reason = _unfit(tensors[name], knobs)
        if reason:
            left.append(Left(name=name, reason=reason))
        else:
            chosen.append(name)
    shares = _shares(chosen, tensors, knobs, inputs or {})
    n, m = knobs.n_of_m or (None, None)
    entries = tuple(
        Sparsify(
            tensor=name,
            sparsity=shares.get(name),
            n=n,
            m=m,
            block=(1, 1, *tensors[name].shape[2:]) if knobs.kernels else knobs.block,
            criterion=knobs.criterion,
        )
        for name in chosen
    )
    return Plan(entries=entries), tuple(left)


def eased(plan: Plan, share: float) -> Plan:
    """Return a plan with a share of each layer's sparsity, as on the way of a gradual schedule."""
    return Plan(
        entries=tuple(
            replace(entry, sparsity=entry.sparsity * share)
            if isinstance(entry, Sparsify) and entry.sparsity is not None
            else entry
            for entry in plan.entries
        )
    )


def masks(
    plan: Plan, tensors: Mapping[str, Tensor], inputs: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Compute the masks that a plan asks for, True where a weight stays.

    Raises:
        PlanError: the model lacks a tensor that the plan names.
    """
    found = {}
    for entry in plan.of(Sparsify):
        if entry.tensor not in tensors:
            raise PlanError(f"{entry.tensor}: the plan names a tensor that the model does not have")
        scores = _scores(entry.tensor, entry.criterion, tensors, inputs or {})
        if entry.n is not None and entry.m is not None:
            found[entry.tensor] = keep_n_of_m(scores, entry.n, entry.m)
        elif entry.block:
            found[entry.tensor] = keep_blocks(scores, entry.block, entry.sparsity or 0.0)
        else:
            found[entry.tensor] = keep_largest(scores, entry.sparsity or 0.0)
    return found


def _scores(
    name: str, criterion: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Mapping[str, Tensor]]
) -> Tensor:
    entry = saliency(criterion)
    given = {"weight": tensors[name].detach()}
    for need in entry.needs:
        if need != "weight":
            if name not in inputs.get(need, {}):
                raise InputError(f"criterion {criterion!r} needs {need} of {name}; give data to compute it from")
            given[need] = inputs[need][name]
    return entry.function(**{need: given[need] for need in entry.needs})


def _shares(
    names: list[str],
    tensors: Mapping[str, Tensor],
    knobs: SparseKnobs,
    inputs: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, float]:
    """Say how sparse each layer becomes: a global threshold, written as a share of each layer."""
    if knobs.sparsity is None:
        return {}
    if knobs.scope == "layer":
        return dict.fromkeys(names, knobs.sparsity)
    kept = keep_largest_globally({n: _scores(n, knobs.criterion, tensors, inputs) for n in names}, knobs.sparsity)
    return {name: 1 - float(mask.double().mean()) for name, mask in kept.items()}


def _unfit(weight: Tensor, knobs: SparseKnobs) -> str:
    """Say why a weight cannot have the pattern, or nothing."""
    if knobs.n_of_m is not None and weight.shape[1] % knobs.n_of_m[1]:
        return f"{weight.shape[1]} inputs are not a multiple of {knobs.n_of_m[1]}"
    if knobs.kernels and (weight.ndim < 3 or weight[0, 0].numel() == 1):
        return "has no kernels of more than one weight"
    if knobs.block and (
        len(knobs.block) != weight.ndim or any(s % b for s, b in zip(weight.shape, knobs.block, strict=True))
    ):
        return f"blocks of {knobs.block} do not divide {tuple(weight.shape)}"
    return ""


def _ignored(names: tuple[str, ...], patterns: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)}
        if not hits:
            near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise InputError(f"{pattern}: no layer has such a name; the nearest are {near}")
        found |= hits
    return found


def masked_state(tensors: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors, those that a plan makes sparse multiplied by their masks."""
    with torch.no_grad():
        return {name: value * found[name] if name in found else value for name, value in tensors.items()}
