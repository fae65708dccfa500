"""Score the units of coupled groups: a criterion on every member, reduced over members, made comparable."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, Group, Member
from kompakt.numerics.saliency import channel_scores, normalise, reduce, saliency

PER_MEMBER = frozenset({"grad", "curvature", "input_norm", "activations"})
"""What criteria need of each tensor beside itself."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How units are scored.

    Args:
        criterion: a key of ``kompakt.numerics.saliency.SALIENCIES``.
        members: ``all`` tensors of a unit, or only those that ``make`` its channels.
        reduction: how a group's members become one score, a key of ``REDUCTIONS``.
        normalisation: how groups are made comparable, a key of ``NORMALISATIONS``.
        folded: multiply the weights that make a channel by its batch norm's |γ|/σ first, which is
            what they are once the norm is folded.
        seed: for the random criterion.
    """

    criterion: str = "l2"
    members: str = "all"
    reduction: str = "mean"
    normalisation: str = "mean"
    folded: bool = True
    seed: int = 0


def unit_scores(
    coupling: Coupling,
    tensors: Mapping[str, Tensor],
    scoring: Scoring = Scoring(),
    grads: Mapping[str, Tensor] | None = None,
    measured: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group; the larger, the more worth keeping.

    Args:
        coupling: the groups.
        tensors: parameters and buffers by name (``dict(model.state_dict())``).
        scoring: the criterion and its knobs.
        grads: gradients by the parameters' names, for criteria that need them.
        measured: what else criteria need (``kompakt.evidence``): ``curvature`` and ``input_norm`` in the shape of the
            parameter, ``activations`` (C, N) of the channels that a weight makes: need → parameter → tensor.

    Returns:
        Group name → (size,) scores.

    Raises:
        InputError: an unknown criterion or knob, or gradients that are missing.
    """
    needs = saliency(scoring.criterion).needs
    if scoring.members not in ("all", "make"):
        raise InputError(f"members {scoring.members!r} is unknown; use all or make")
    if "hessian" in needs:
        raise InputError(
            f"criterion {scoring.criterion!r} needs hessian; it scores single weights, not coupled channels"
        )
    known = {"grad": grads or {}, **(measured or {})}
    if "grad" in needs and not known["grad"]:
        raise InputError(f"criterion {scoring.criterion!r} needs gradients; give data to compute them from")
    unmet = [need for need in needs if need in PER_MEMBER and need not in known]
    if unmet:
        raise InputError(f"criterion {scoring.criterion!r} needs {', '.join(unmet)}; give data to measure it on")
    generator = torch.Generator().manual_seed(scoring.seed)
    return {group.name: _group_scores(coupling, group, tensors, scoring, known, generator) for group in coupling.groups}


def _group_scores(
    coupling: Coupling,
    group: Group,
    tensors: Mapping[str, Tensor],
    scoring: Scoring,
    known: Mapping[str, Mapping[str, Tensor]],
    generator: torch.Generator,
) -> Tensor:
    needs = saliency(scoring.criterion).needs
    scored = []
    for member in _scored(coupling, group, scoring):
        if any(need in PER_MEMBER and member.tensor not in known[need] for need in needs):
            continue
        folds = scoring.folded and member.makes and "curvature" not in needs  # which is that of the weight itself
        weight = _folded(coupling, member, tensors) if folds else tensors[member.tensor]
        rows = unit_rows(member, weight)
        inputs: dict[str, Tensor | torch.Generator] = {"weight": rows, "generator": generator}
        if "scale" in needs:
            inputs["scale"] = rows.square().mean(1).sqrt()
        inputs |= {need: unit_rows(member, known[need][member.tensor]) for need in needs if need in PER_MEMBER}
        scored.append(channel_scores(scoring.criterion, **inputs).double())
    if not scored:
        scored = [torch.ones(group.size, dtype=torch.float64)]
    return normalise(reduce(scored, scoring.reduction), scoring.normalisation, size=unit_params(coupling, group))


def _scored(coupling: Coupling, group: Group, scoring: Scoring) -> list[Member]:
    """Choose the members that the criterion looks at."""
    params = [member for member in group.members if coupling.graph.tensor[member.tensor].kind == "parameter"]
    if "scale" in saliency(scoring.criterion).needs:
        scales = {op.ref("weight") for op in coupling.graph.ops if op.kind == "batch_norm"}
        found = [member for member in params if member.tensor in scales]
        if found:
            return found
    weights = [member for member in params if len(coupling.graph.tensor[member.tensor].shape) > 1] or params
    if scoring.members == "make" or "activations" in saliency(scoring.criterion).needs:
        return [member for member in weights if member.makes] or weights
    return weights


def unit_rows(member: Member, tensor: Tensor) -> Tensor:
    """Gather what each unit owns of a tensor: (size, K), zeros where units own unequal numbers of indices."""
    rows = tensor.detach().movedim(member.dim, 0).flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
    longest = max(len(indices) for indices in member.indices)
    padded = torch.tensor([[*indices, *[len(rows)] * (longest - len(indices))] for indices in member.indices])
    extended = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return extended[padded.to(rows.device)].flatten(1)


def unit_params(coupling: Coupling, group: Group) -> int:
    """Count the parameters that one unit of a group owns, on average, at least 1."""
    total = 0
    for member in group.members:
        tensor = coupling.graph.tensor[member.tensor]
        if tensor.kind == "parameter":
            total += sum(map(len, member.indices)) * (tensor.numel // member.size)
    return max(1, round(total / group.size))


def _folded(coupling: Coupling, member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layer's weight with the batch norm behind it folded in, where there is one."""
    weight = tensors[member.tensor]
    layers = [op for op in coupling.graph.users[member.tensor] if op.ref("weight") == member.tensor]
    users = coupling.graph.users[layers[0].name] if len(layers) == 1 else ()
    norm = next((op for op in users if op.kind == "batch_norm"), None)
    scale, variance = (norm.ref("weight"), norm.ref("running_var")) if norm is not None else (None, None)
    if norm is None or scale is None or variance is None or len(tensors[scale]) != weight.shape[member.dim]:
        return weight
    factor = tensors[scale].abs() / (tensors[variance] + float(str(norm.arguments["eps"]))).sqrt()
    shape = [1] * weight.ndim
    shape[member.dim] = -1
    return weight * factor.reshape(shape)
