"""Cut tensors of a model by name, and mend the attributes that state their sizes. Internal to ``build``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from kompakt.build.slim import KINDS
from kompakt.errors import PlanError
from kompakt.plan import Cut, Mend, Prune

GEOMETRY = frozenset(
    {"stride", "padding", "dilation", "kernel_size", "output_padding", "window_size", "shift_size", "patch_size"}
    | {"img_size", "image_size", "input_size", "seq_length", "num_classes", "p", "eps", "dim"}
)
"""Attributes that never state a width."""
PER_HEAD = frozenset({"head_dim", "dim_head", "head_size", "dim_per_head", "head_width", "d_head", "key_dim", "d_k"})
"""Attributes that state one head's width: where it equals the number of heads, it is the number that changes."""


def rounds(entries: Sequence[object]) -> list[tuple[list[Prune], list[Mend]]]:
    """Sort a plan's entries into rounds of removals that refer to the same sizes (see ``Prune``)."""
    found: list[tuple[list[Prune], list[Mend]]] = []
    sizes: dict[tuple[str, int], int] = {}
    for entry in entries:
        if isinstance(entry, Prune):
            if not found or any(sizes.get((cut.tensor, cut.dim), cut.size) != cut.size for cut in entry.cuts):
                found.append(([], []))
                sizes = {}
            found[-1][0].append(entry)
            sizes.update({(cut.tensor, cut.dim): cut.size for cut in entry.cuts})
        elif isinstance(entry, Mend):
            if not found:
                found.append(([], []))
            found[-1][1].append(entry)
    return found


def removed(cuts: Sequence[Cut]) -> dict[str, dict[int, tuple[int, set[int]]]]:
    """Join cuts: tensor → dim → (size, indices that go)."""
    joined: dict[str, dict[int, tuple[int, set[int]]]] = {}
    for cut in cuts:
        size, gone = joined.setdefault(cut.tensor, {}).setdefault(cut.dim, (cut.size, set()))
        wrong = next((index for index in cut.removed if not 0 <= index < size), None)
        if wrong is not None:
            raise PlanError(f"{cut.tensor}: index {wrong} of dimension {cut.dim} is outside 0…{size - 1}")
        gone.update(cut.removed)
    return joined


def cut_tensors(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Replace every tensor that is cut by a smaller one, wherever the model holds it.

    Raises:
        PlanError: the model has no such tensor, or one of another size; or nothing would be left.
    """
    holders = _holders(model)
    for name, dims in removed(cuts).items():
        tensor = _find(model, name)
        kept = tensor.detach()
        for dim, (size, gone) in dims.items():
            if dim >= tensor.ndim or tensor.shape[dim] != size:
                found = f"shape {tuple(tensor.shape)}"
                raise PlanError(f"{name}: the plan expects size {size} in dimension {dim}, the model has {found}")
            if len(gone) == size:
                raise PlanError(f"{name}: nothing of dimension {dim} would be left")
            stays = torch.tensor([i for i in range(size) if i not in gone], dtype=torch.int64, device=tensor.device)
            kept = kept.index_select(dim, stays)
        new = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        for owner, leaf in holders[id(tensor)]:
            setattr(owner, leaf, new)


def mend_layers(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Make the attributes of PyTorch's own layers state the sizes of their tensors."""
    gone = removed(cuts)
    prefixes = {name.rpartition(".")[0] for name in gone} | {name.rpartition(".parametrizations.")[0] for name in gone}
    holders = _holders(model)
    owners = {id(owner): owner for name in gone for owner, _ in holders[id(_find(model, name))]}
    owners |= {id(module): module for module in map(model.get_submodule, prefixes)}
    names = {id(module): name for name, module in model.named_modules()}
    for module in owners.values():
        _mend_layer(module, gone.get(f"{names.get(id(module), '')}.weight", {}))


def mend_numbers(model: nn.Module, mends: Sequence[Mend]) -> None:
    """Change the attributes that hold numbers of the module's code (see ``Mend``)."""
    known: dict[str, dict[object, int | tuple[int, ...]]] = {}
    for mend in mends:
        known.setdefault(mend.module, {})[mend.before] = mend.after
    for name, numbers in known.items():
        module = _submodule(model, name)
        if not isinstance(module, _ConvNd | nn.Linear | _NormBase) and type(module) not in KINDS:
            _mend_numbers(module, numbers)


def _mend_numbers(module: nn.Module, numbers: Mapping[object, int | tuple[int, ...]]) -> None:
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in GEOMETRY}
    others = {value for key, value in own.items() if type(value) is int and key not in PER_HEAD}
    for key, value in own.items():
        if isinstance(value, bool) or (key in PER_HEAD and value in others):
            continue
        if isinstance(value, int) and value in numbers:
            setattr(module, key, numbers[value])
        elif isinstance(value, tuple | list) and all(type(item) is int for item in value) and tuple(value) in numbers:
            setattr(module, key, type(value)(numbers[tuple(value)]))  # type: ignore[arg-type]


def _mend_layer(module: nn.Module, gone: Mapping[int, tuple[int, set[int]]]) -> None:
    """Mend one layer after its tensors were cut."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if isinstance(module, _ConvNd):
        module.groups = _groups_left(module, gone)
        setattr(module, ("out_channels", "in_channels")[module.transposed], shape[0])
        setattr(module, ("in_channels", "out_channels")[module.transposed], shape[1] * module.groups)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, _NormBase):
        sized = weight if weight is not None else module.running_mean
        module.num_features = len(sized) if sized is not None else module.num_features
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]


def _groups_left(module: _ConvNd, gone: Mapping[int, tuple[int, set[int]]]) -> int:
    """Count a convolution's groups: fewer where whole groups went, as many where all lost the same places."""
    if module.groups == 1 or 0 not in gone:
        return module.groups
    size, indices = gone[0]
    each = size // module.groups
    whole = [group for group in range(module.groups) if group * each in indices]
    if all(i // each in set(whole) for i in indices) and len(indices) == len(whole) * each:
        return module.groups - len(whole)
    return module.groups


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find every place that holds a tensor: id → (module, attribute)."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((module, leaf))
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"{name}: the plan names a module that {type(model).__name__} does not have") from None


def _find(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(_submodule(model, owner), leaf, None)
    if not isinstance(tensor, Tensor):
        raise PlanError(f"{name}: the plan names a tensor that {type(model).__name__} does not have")
    return tensor
