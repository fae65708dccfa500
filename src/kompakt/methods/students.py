"""Make a smaller student from the teacher itself: fewer blocks, fewer channels, separable or low-rank layers."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from kompakt.build.follow import follow
from kompakt.build.structure import apply_structure
from kompakt.errors import InputError
from kompakt.graph.coupling import couple
from kompakt.graph.graph import Graph, Left, Op
from kompakt.graph.trace import trace
from kompakt.methods.blocks import residual_blocks
from kompakt.methods.channels import Knobs, channels
from kompakt.methods.scores import unit_scores
from kompakt.numerics.factor import PARAMETERS, full_ranks, rank_by_energy, ranks_by_budget
from kompakt.plan.plan import Drop, Factor, Plan

FORMS = "shallower, thinner:0.5, separable, lowrank:0.5, two of them joined by +, or package.module:callable"
LEAST_WIDTH = 16
"""Layers with fewer inputs or outputs (the first, the classifier) are small, and hurt: they stay whole."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A student that starts from its teacher's weights, the plan that makes it, and what stayed whole."""

    model: nn.Module
    plan: Plan
    left: tuple[Left, ...] = ()


def is_derived(text: str) -> bool:
    """Whether a student is made from the teacher (``shallower+thinner:0.5``) rather than named by a reference."""
    return text.split("+")[0].split(":")[0] in KINDS


def student(teacher: nn.Module, text: str, example: Tensor) -> Made:
    """Make the student that ``text`` names, from the teacher's weights; the teacher is left as it was.

    Args:
        teacher: the trained model.
        text: kinds of ``KINDS`` joined by ``+``, carried out from left to right.
        example: a batch of inputs.

    Raises:
        InputError: an unknown kind, a number that does not fit, or nothing in the model to make smaller.

    Example:
        >>> import torch, torchvision
        >>> net = torchvision.models.resnet18(num_classes=10)
        >>> made = student(net, "shallower", torch.zeros(2, 3, 64, 64))
        >>> [entry.module for entry in made.plan.entries]
        ['layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
    """
    model, plan = teacher, Plan()
    left: tuple[Left, ...] = ()
    for part in text.split("+"):
        name, _, value = part.partition(":")
        if name not in KINDS:
            raise InputError(f"student {part}: unknown; use {FORMS}")
        step, stayed = KINDS[name](model, value, example)
        if not step.entries:
            raise InputError(f"student {part}: nothing in {type(teacher).__name__} can be made smaller this way")
        model = apply_structure(model, step, example)
        plan, left = plan.then(*step.entries), (*left, *stayed)
    return Made(model=model, plan=plan, left=left)


def shallower(model: nn.Module, value: str, example: Tensor) -> tuple[Plan, tuple[Left, ...]]:
    """Plan to drop the last blocks of every stage: half of them, rounded down, or what ``value`` leaves.

    A stage is a module's children that give one shape. ResNet-18 (2, 2, 2, 2 blocks) becomes ResNet-10.
    """
    keep = _share("shallower", value or "0.5")
    graph = trace(model, example).graph
    found = [block.module for block in residual_blocks(graph)]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    stages: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in _children(graph, {name.rpartition(".")[0] for name in outer}).items():
        stages.setdefault((name.rpartition(".")[0], shape), []).append(name)
    gone: list[str] = []
    for names in stages.values():
        free = [name for name in names if name in outer]
        count = len(names) - max(1, ceil(keep * len(names)))
        gone += free[len(free) - min(count, len(free)) :]
    return Plan(entries=tuple(Drop(module=name) for name in gone)), ()


def _children(graph: Graph, parents: set[str]) -> dict[str, tuple[int, ...]]:
    """Return every child of some modules with the shape of what it gives, in execution order."""
    found: dict[str, tuple[int, ...]] = {}
    for op in graph.ops:
        for parent in parents:
            start = f"{parent}." if parent else ""
            if op.module.startswith(start) and op.module != parent:
                found[start + op.module.removeprefix(start).split(".")[0]] = op.shape
    return found


def thinner(model: nn.Module, value: str, example: Tensor) -> tuple[Plan, tuple[Left, ...]]:
    """Plan to keep a share of every layer's channels, the largest by L2 norm: MobileNets' α (arXiv:1704.04861)."""
    keep = _share("thinner", value)
    if keep == 1:
        raise InputError("thinner:1 removes nothing; use a share below 1, such as thinner:0.5")
    coupling = follow(model, couple(trace(model, example).graph), example)
    scores = unit_scores(coupling, dict(model.state_dict()))
    return channels(coupling, scores, Knobs(ratio=1 - keep, max_ratio=0.99)), coupling.left


def separable(model: nn.Module, value: str, example: Tensor) -> tuple[Plan, tuple[Left, ...]]:
    """Plan to replace k×k convolutions by depthwise and 1×1 ones, as in MobileNets."""
    if value:
        raise InputError(f"student separable:{value}: separable takes no number")
    entries, left = [], []
    for op, name, layer in _layers(model, example):
        shape = tuple(layer.weight.shape)
        if len(shape) != 4 or layer.weight[0, 0].numel() == 1:
            continue
        if (why := _whole(op, layer)) is not None:
            left.append(Left(name=name, reason=why))
        elif PARAMETERS["separable"](shape, (1,)) < layer.weight.numel():
            entries.append(Factor(module=name, form="separable", ranks=(1,)))
    return Plan(entries=tuple(entries)), tuple(left)


def lowrank(model: nn.Module, value: str, example: Tensor) -> tuple[Plan, tuple[Left, ...]]:
    """Plan to factor layers: SVD for linear maps and 1×1 kernels, Tucker-2 (``cp=0.5``: CP) for larger ones.

    ``0.5`` keeps that share of each layer's parameters; 1 is the full rank, where nothing is lost;
    ``energy=0.9`` takes the least rank that holds that share of the squared singular values.
    """
    how, _, number = value.rpartition("=")
    if how not in ("", "energy", "cp"):
        raise InputError(f"student lowrank:{value}: expected lowrank:0.5, lowrank:energy=0.9 or lowrank:cp=0.5")
    share = _share("lowrank", number)
    entries, left = [], []
    for op, name, layer in _layers(model, example):
        if (why := _whole(op, layer)) is not None:
            left.append(Left(name=name, reason=why))
            continue
        weight = layer.weight.detach()
        weight = weight.flatten(1) if weight[0, 0].numel() == 1 else weight
        form: Literal["svd", "cp", "tucker2"] = "svd" if weight.ndim == 2 else "cp" if how == "cp" else "tucker2"
        ranks = _ranks(form, weight, share, energy=how == "energy")
        if share == 1 or PARAMETERS[form](tuple(weight.shape), ranks) < weight.numel():
            entries.append(Factor(module=name, form=form, ranks=ranks))
        else:
            left.append(Left(name=name, reason=f"{form} at ranks {ranks} is no smaller"))
    return Plan(entries=tuple(entries)), tuple(left)


def _ranks(form: str, weight: Tensor, share: float, *, energy: bool) -> tuple[int, ...]:
    shape = tuple(weight.shape)
    if share == 1:
        return full_ranks(form, shape)
    if not energy:
        return ranks_by_budget(form, shape, share)
    unfolded = [weight] if form == "svd" else [weight.transpose(0, 1).flatten(1), weight.flatten(1)]
    return tuple(rank_by_energy(torch.linalg.svdvals(each), share) for each in unfolded)


def _layers(model: nn.Module, example: Tensor) -> list[tuple[Op, str, nn.Conv2d | nn.Linear]]:
    """Return the layers that can be replaced as modules: those that run themselves, once."""
    graph = trace(model, example).graph
    modules = dict(model.named_modules())
    weights = [op.ref("weight") for op in graph.layers]
    found = []
    for op in graph.layers:
        layer, name = modules.get(op.module), op.ref("weight") or ""
        plain = type(layer) in (nn.Conv2d, nn.Linear) and name == f"{op.module}.weight" and weights.count(name) == 1
        if plain and (not isinstance(layer, nn.Conv2d) or layer.groups == 1):
            found.append((op, op.module, layer))
    return found  # type: ignore[return-value]


def _whole(op: Op, layer: nn.Conv2d | nn.Linear) -> str | None:
    """Say why a layer stays whole, or None."""
    if min(layer.weight.shape[:2]) < LEAST_WIDTH:
        return f"fewer than {LEAST_WIDTH} inputs or outputs"
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        return "its padding is not zeros by number"
    return None


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"student {name}:{text}: expected a share above 0 and up to 1, as in {name}:0.5")
    return share


Kind = Callable[[nn.Module, str, Tensor], tuple[Plan, tuple[Left, ...]]]
KINDS: dict[str, Kind] = {"shallower": shallower, "thinner": thinner, "separable": separable, "lowrank": lowrank}
