"""Training for rate: where the weights of a job's model begin, as integers chosen by rate and distortion."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from kompakt.build.priced import Start
from kompakt.build.quantize import quantizers
from kompakt.errors import InputError
from kompakt.graph.trace import attribute
from kompakt.job import Job
from kompakt.shrink import prepare


def started(job: Job, model: nn.Module, rate: float, keep: Mapping[str, Tensor]) -> dict[str, Start]:
    """Choose integers and steps of a model's weights at a price of a bit, for training to go on from.

    They are chosen in the folded network (``kompakt.shrink``) and carried back: a batch norm that was folded in scales
    a channel's weight and its step alike.

    Args:
        job: whose training data are used.
        model: pruned or not; it is left as it was.
        rate: λ, nats a bit.
        keep: masks of weights that stay zero, by name.

    Raises:
        InputError: the model has no weight that could be coded so.
    """
    source = prepare(replace(job, model=model))
    made = source.at(rate)
    found: dict[str, Start] = {}
    parameters = dict(model.named_parameters())
    for name, quantizer in quantizers(made.module).items():
        if name not in parameters:
            continue
        weight, folded = parameters[name].detach(), attribute(source.capture.module, name).detach()
        ratio = _ratio(weight, folded)
        chosen = attribute(made.module, name).detach() * ratio
        chosen = chosen * keep[name] if name in keep else chosen
        found[name] = Start(weight=chosen, steps=quantizer.scale * ratio.abs().flatten())
    if not found:
        raise InputError("rate: the model has no convolution or linear layer with a weight of its own to train")
    return found


def _ratio(weight: Tensor, folded: Tensor) -> Tensor:
    """What a channel of the weight is of the folded one, as factors that broadcast; 1 where a channel is empty."""
    shape = (-1, *(1,) * (weight.ndim - 1))
    rows, others = weight.double().flatten(1), folded.double().flatten(1)
    size = others.square().sum(1)
    found = torch.where(size > 0, (rows * others).sum(1) / size.clamp(min=1e-300), torch.ones_like(size))
    return torch.where(found == 0, torch.ones_like(found), found).float().reshape(shape)
