"""One-shot sparsity after training: layer after layer, weights go and those that stay are mended on data.

Frantar and Alistarh 2022 (OBC, arXiv:2208.11580) and 2023 (SparseGPT, arXiv:2301.00774). Each layer sees the inputs
that the layers before it, already sparse, really give, and aims at what the original did on its own inputs.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kompakt.build.reconstruct import conv_of, layer_inputs
from kompakt.build.taps import inference
from kompakt.errors import InputError
from kompakt.numerics.masks import obc, refit, sparsegpt
from kompakt.numerics.moments import cross_moment, second_moment
from kompakt.numerics.rounding import retarget
from kompakt.plan.plan import Plan, Sparsify

Update = Literal["refit", "sparsegpt", "obc"]
Masks = Callable[[str, Tensor], Tensor]


def sparse_updated(
    original: nn.Module,
    plan: Plan,
    batches: Iterable[tuple[Tensor, Tensor]],
    how: Update,
    mask: Masks,
    damp: float = 0.01,
) -> nn.Module:
    """Return a copy of a model with the weights that a plan names sparse and the rest of each mended.

    Args:
        original: the dense model; it is left as it was.
        plan: its ``Sparsify`` entries, in execution order.
        batches: pairs (inputs, anything), some hundred examples.
        how: ``sparsegpt`` and ``obc`` choose what goes as they mend; ``refit`` keeps the masks of a criterion.
        mask: for ``refit``: name and the weight so far → the mask.
        damp: share of the mean diagonal of the second moments that is added to it.

    Raises:
        InputError: there is no batch, or blocks are asked of a method that chooses single weights.
    """
    inputs = [batch for batch, _ in batches]
    if not inputs:
        raise InputError("the data give no batch: nothing to mend the weights on")
    made = copy.deepcopy(original)
    with inference(original), inference(made):
        for entry in plan.of(Sparsify):
            if entry.block and how != "refit":
                raise InputError(f"{entry.tensor}: {how} removes single weights; for blocks use refit")
            name = entry.tensor.rpartition(".")[0]
            layer = made.get_submodule(name)
            aim, moment = _moments(original, made, name, layer, inputs, damp)
            layer.get_parameter("weight").copy_(_sparse(entry, aim, moment, how, mask, damp))
    return made


def _moments(
    original: nn.Module, made: nn.Module, name: str, layer: nn.Module, inputs: Sequence[Tensor], damp: float
) -> tuple[Tensor, Tensor]:
    """Return the weight that does on the sparse model's inputs what the layer's own did, and their second moments."""
    conv = conv_of(layer) if isinstance(layer, nn.Conv2d) else None
    pairs = [(layer_inputs(made, name, batch), layer_inputs(original, name, batch)) for batch in inputs]
    moment = torch.stack([second_moment(ours, conv) for ours, _ in pairs]).sum(0)
    cross = torch.stack([cross_moment(theirs, ours, conv) for ours, theirs in pairs]).sum(0)
    return retarget(layer.get_parameter("weight"), cross, moment, damp), moment


def _sparse(entry: Sparsify, weight: Tensor, moment: Tensor, how: Update, mask: Masks, damp: float) -> Tensor:
    """Make one layer's weight sparse: (out, in, …) and the second moments of each of its groups of rows."""
    order = _inputs_last(weight)
    rows = weight.flatten(1)[:, order].unflatten(0, (len(moment), -1))
    moments = moment[:, order][:, :, order]
    if how == "refit":
        kept = mask(entry.tensor, weight).flatten(1)[:, order].unflatten(0, (len(moment), -1))
        done = [refit(w, k, h, damp) for w, k, h in zip(rows, kept, moments, strict=True)]
    else:
        method = sparsegpt if how == "sparsegpt" else obc
        size: Mapping[str, object] = (
            {"n_of_m": (entry.n, entry.m)} if entry.n is not None else {"sparsity": entry.sparsity}
        )
        done = [method(w, h, damp=damp, **size) for w, h in zip(rows, moments, strict=True)]  # type: ignore[arg-type]
    mixed = torch.cat(done)
    return torch.empty_like(mixed).index_copy_(1, order, mixed).reshape(weight.shape)


def _inputs_last(weight: Tensor) -> Tensor:
    """Order the columns of ``weight.flatten(1)`` so that the inputs of one tap follow each other: N:M counts so."""
    columns = torch.arange(weight[0].numel()).reshape(weight.shape[1:])
    return columns.movedim(0, -1).flatten()
