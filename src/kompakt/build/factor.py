"""Replace layers by chains of smaller ones that multiply out to nearly the same weight, in a copy of the model."""

import copy

import torch
from torch import Tensor, nn

from kompakt.build.prune import run_once
from kompakt.errors import InputError, PlanError
from kompakt.numerics.factor import cp, separable, svd, tucker2
from kompakt.plan import Factor, Plan

Layer = nn.Conv2d | nn.Linear


def apply_factor(model: nn.Module, plan: Plan, example: Tensor | tuple[Tensor, ...] | None = None) -> nn.Module:
    """Return a copy of a model whose planned layers are factored; the model itself is left as it was.

    A layer ``conv1`` becomes a sequence ``conv1.0``, ``conv1.1``, … that starts from the factors of its
    weight (``kompakt.numerics.factor``) and ends with its bias.

    Args:
        model: the model that the plan was made for.
        plan: its ``Factor`` entries are carried out, the others ignored.
        example: inputs, batch first; where given, the new model is run on them once.

    Raises:
        PlanError: the model has no such layer, the ranks do not fit it, or the new model does not run.

    Example:
        >>> import torch
        >>> from kompakt.plan import Factor, Plan
        >>> plan = Plan(entries=(Factor(module="0", form="svd", ranks=(2,)),))
        >>> apply_factor(torch.nn.Sequential(torch.nn.Linear(4, 3)), plan)
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=4, out_features=2, bias=False)
            (1): Linear(in_features=2, out_features=3, bias=True)
          )
        )
    """
    made = copy.deepcopy(model)
    for entry in plan.of(Factor):
        owner, _, leaf = entry.module.rpartition(".")
        try:
            parent, layer = made.get_submodule(owner), made.get_submodule(entry.module)
        except AttributeError:
            raise PlanError(f"{entry.module}: the plan factors a module that {type(model).__name__} lacks") from None
        if not isinstance(layer, Layer) or getattr(layer, "groups", 1) != 1:
            raise PlanError(
                f"{entry.module}: is a {type(layer).__name__}, expected a linear map or an ungrouped Conv2d"
            )
        try:
            setattr(parent, leaf, chain(layer, entry.form, entry.ranks))
        except InputError as error:
            raise PlanError(f"{entry.module}: {error}") from None
    if example is not None:
        run_once(made, example)
    return made


def chain(layer: Layer, form: str, ranks: tuple[int, ...]) -> nn.Sequential:
    """Return the layers that stand for one layer; the one with the kernel keeps stride, padding and dilation.

    Args:
        layer: a linear map or a convolution without groups.
        form: ``svd`` (linear maps and 1×1 kernels), ``tucker2``, ``cp`` or ``separable``.
        ranks: see the form in ``kompakt.numerics.factor``.

    Raises:
        InputError: the form or the ranks do not fit the weight.
    """
    weight = layer.weight.detach()
    if not ranks:
        raise InputError(f"{form}: no ranks are given")
    if form == "svd":
        made = [_like(layer, w, last) for w, last in zip(_svd(weight, ranks), (False, True), strict=True)]
    elif form == "tucker2":
        first, core, last = tucker2(weight, (ranks[0], ranks[-1])).tensors
        made = [_point(first), _spatial(layer, core, 1, (True, True)), _point(last)]
    elif form == "cp":
        first, high, wide, last = cp(weight, ranks[0]).tensors
        down, across = _spatial(layer, high, len(high), (True, False)), _spatial(layer, wide, len(wide), (False, True))
        made = [_point(first), down, across, _point(last)]
    else:
        kernels, mixing = separable(weight, ranks[0]).tensors
        made = [_spatial(layer, kernels, weight.shape[1], (True, True)), _point(mixing)]
    if layer.bias is not None:
        made[-1].bias = nn.Parameter(layer.bias.detach().clone())
    return nn.Sequential(*made).train(layer.training)


def _svd(weight: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    if weight[0, 0].numel() != 1:
        raise InputError(f"svd takes linear maps and 1×1 kernels, found {tuple(weight.shape)}; use tucker2 or cp")
    flat = [1] * (weight.ndim - 2)
    return [each.reshape(*each.shape, *flat) for each in svd(weight.flatten(1), ranks[0]).tensors]


def _like(layer: Layer, weight: Tensor, last: bool) -> Layer:
    if isinstance(layer, nn.Conv2d):
        # A strided 1×1 reads every other pixel: so does its first factor, and the second all that is left.
        return _point(weight) if last else _spatial(layer, weight, 1, (True, True))
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.clone())
    return made


def _point(weight: Tensor) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    made.weight = nn.Parameter(weight.clone())
    return made


def _spatial(layer: Layer, weight: Tensor, groups: int, axes: tuple[bool, bool]) -> nn.Conv2d:
    """Return a convolution with the geometry of ``layer`` along the axes that are its own, and none along the other."""
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"padding {layer.padding!r} of mode {layer.padding_mode}: expected zeros by number")

    def along(values: tuple[int, ...], default: int) -> tuple[int, int]:
        high, wide = (value if own else default for value, own in zip(values, axes, strict=True))
        return high, wide

    made = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        along(layer.stride, 1),
        along(layer.padding, 0),
        along(layer.dilation, 1),
        groups=groups,
        bias=False,
    )
    made.weight = nn.Parameter(weight.clone())
    return made


def reset(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model whose layers start at random, each by its own ``reset_parameters``."""
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in made.modules():
            start = getattr(module, "reset_parameters", None)
            if callable(start):
                start()
    return made
