"""Mend a pruned model without training: the layers that lost inputs are refitted to the original's outputs.

He, Zhang and Sun 2017, arXiv:1707.06168, §3.1 (least squares on the channels that stay), layer after layer, with
the inputs that the pruned model really has (§3.2: so that a layer also mends the errors of those before it).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from kompakt.build.cut import removed
from kompakt.build.taps import inference
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling
from kompakt.numerics.moments import Conv, patches
from kompakt.plan.plan import Plan, Prune

Pair = tuple[Tensor, Tensor]
MOST_BYTES = 2**28
"""Of outputs of the original that are held at once."""


class _Reached(Exception):
    """The layer that was waited for has run."""


@dataclass(kw_only=True)
class Fit:
    """Sums over places of a layer's inputs x and wanted outputs y, in float64: all that least squares needs."""

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    count: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (P, K), y (P, R)."""
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y).double()
        self.x += x.sum(0).double()
        self.y += y.sum(0).double()
        self.count += len(x)

    def solve(self, weight: Tensor, damp: float) -> tuple[Tensor, Tensor]:
        """Return the weight (R, K) and the shift (R,) that minimise ‖x·wᵀ + b − y‖² + λ‖w − weight‖².

        Args:
            weight: (R, K), what the damping pulls towards.
            damp: λ as a share of the mean variance of the inputs.
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - torch.outer(mean_x, mean_x)
        xy = self.xy / self.count - torch.outer(mean_x, mean_y)
        start = weight.double()
        ridge = damp * xx.diagonal().mean().clamp_min(1e-12) * torch.eye(len(xx), dtype=xx.dtype)
        fitted = start + torch.linalg.solve(xx + ridge, xy - xx @ start.T).T
        return fitted, mean_y - fitted @ mean_x


def reconstruct(
    original: nn.Module,
    pruned: nn.Module,
    coupling: Coupling,
    plan: Plan,
    batches: Iterable[Pair],
    damp: float = 0.01,
) -> nn.Module:
    """Refit every convolution and linear layer that lost inputs; return a new model.

    The shift that least squares finds goes to the batch norm behind the layer or to the layer's bias;
    a layer that has neither is refitted as well, without the shift. Batch norms keep the original's
    variances: estimating them anew would undo the fit's scale. Grouped convolutions are left as they are.

    Args:
        original: before pruning.
        pruned: after it, from the same weights, its batch norms' statistics not estimated anew.
        coupling: of the original.
        plan: by which it was pruned.
        batches: pairs (inputs, anything), some hundred examples.
        damp: see ``Fit.solve``.

    Raises:
        InputError: there is no batch.
    """
    inputs = [batch for batch, _ in batches]
    if not inputs:
        raise InputError("the data give no batch: nothing to reconstruct on")
    made = copy.deepcopy(pruned)
    cuts = removed([cut for prune in plan.of(Prune) for cut in prune.cuts])
    gone = {(name, dim): tuple(sorted(places)) for name, dims in cuts.items() for dim, (_, places) in dims.items()}
    norms = _norms(coupling)
    with inference(original), inference(made):
        for names in _together(_layers(made, coupling, gone), coupling, sum(map(len, inputs))):
            wanted = _outputs(original, names, inputs)
            for name in names:
                pairs = zip(inputs, wanted.pop(name), strict=True)
                _refit(made, name, norms.get(name), gone.get((f"{name}.weight", 0), ()), pairs, damp)
    return made


def _together(names: Sequence[str], coupling: Coupling, examples: int) -> Iterator[list[str]]:
    """Part layers into runs whose outputs fit into ``MOST_BYTES`` together; one at least is in each."""
    sizes = {str(op.ref("weight")).rpartition(".")[0]: 4 * prod(op.shape[1:]) for op in coupling.graph.layers}
    found: list[str] = []
    for name in names:
        if found and examples * sum(sizes[each] for each in [*found, name]) > MOST_BYTES:
            yield found
            found = []
        found.append(name)
    if found:
        yield found


def _outputs(model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Run the model once for each batch; return the output of the first call of each layer, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in inputs:
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, suppress(_Reached):
            for name in names:
                hook = partial(_keep, seen, name, len(names))
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            model(batch)
        for name in names:
            found[name].append(seen[name])
    return found


def _keep(
    seen: dict[str, Tensor], name: str, count: int, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    seen.setdefault(name, output.clone())  # what follows may change it in place
    if len(seen) == count:
        raise _Reached


def _layers(model: nn.Module, coupling: Coupling, gone: Mapping[tuple[str, int], Sequence[int]]) -> list[str]:
    """Name the layers that lost inputs, in execution order."""
    names = [op.ref("weight") or "" for op in coupling.graph.layers]
    found = [name.rpartition(".")[0] for name in dict.fromkeys(names) if (name, 1) in gone]
    modules = dict(model.named_modules())
    return [name for name in found if _refits(modules.get(name))]


def _refits(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _norms(coupling: Coupling) -> dict[str, str]:
    """Return layer → the batch norm that alone reads its output."""
    found = {}
    for op in coupling.graph.layers:
        users = coupling.graph.users[op.name]
        norm = users[0] if len(users) == 1 and users[0].kind == "batch_norm" else None
        weight, mean = op.ref("weight"), norm.ref("running_mean") if norm is not None else None
        if weight is not None and mean is not None:
            found[weight.rpartition(".")[0]] = mean.rpartition(".")[0]
    return found


def _refit(
    made: nn.Module,
    name: str,
    norm: str | None,
    removed: Sequence[int],
    pairs: Iterable[Pair],
    damp: float,
) -> None:
    """Refit one layer in place, from pairs: the model's inputs, what the layer should give for them."""
    layer = made.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    shape = layer.weight.shape
    kept = sorted(set(range(shape[0] + len(removed))) - set(removed))
    width = layer.weight[0].numel()
    blank = torch.zeros(width, width, dtype=torch.float64)
    fit = Fit(xx=blank, xy=blank.new_zeros(width, shape[0]), x=blank[0].clone(), y=blank.new_zeros(shape[0]))
    shifts = norm is not None or layer.bias is not None
    for batch, wanted in pairs:
        seen = layer_inputs(made, name, batch)
        rows = patches(seen, conv_of(layer))[0] if isinstance(layer, nn.Conv2d) else seen.flatten(0, -2)
        outputs = wanted.movedim(1, -1) if isinstance(layer, nn.Conv2d) else wanted
        fit.add(rows, outputs.flatten(0, -2)[:, kept])
    if not shifts:
        fit.x.zero_()
        fit.y.zero_()
    weight, shift = fit.solve(layer.weight.detach().flatten(1), damp)
    layer.weight.copy_(weight.reshape(shape))
    if norm is not None:
        mean = made.get_submodule(norm).get_buffer("running_mean")
        before = 0.0 if layer.bias is None else layer.bias.double()
        mean.sub_((shift - before).to(mean.dtype))
    elif layer.bias is not None:
        layer.bias.copy_(shift)


def conv_of(layer: nn.Conv2d) -> Conv:
    """Return the arguments of a convolution.

    Raises:
        InputError: its padding is not a number of zeros.
    """
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"a convolution padded by {layer.padding_mode}, {layer.padding}: expected numbers of zeros")
    sizes = {"kernel": layer.kernel_size, "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return Conv(**sizes, groups=layer.groups)


def layer_inputs(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    """Return the input of the layer ``name``; what comes after it is not run."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        with suppress(_Reached):
            model(batch)
    finally:
        handle.remove()
    return seen[0]
