"""The arithmetic of training: learning rate, optimizer and the running average of the weights."""

import math

import torch
from torch import Tensor, nn

from kompakt.build.settings import TrainSettings
from kompakt.errors import InputError


def learning_rate_at(settings: TrainSettings, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` of ``steps`` of the whole run.

    Cosine: ``½ · lr · (1 + cos(π · x))``, x the share of a cycle's steps after its warm-up; a cycle that follows is a
    warm restart (Loshchilov & Hutter 2017, arXiv:1608.03983). One-cycle: from lr/25 up over 30 % of the steps, then
    down, both as a cosine (Smith & Topin 2019, arXiv:1708.07120).
    """
    top = settings.learning_rate
    if settings.schedule == "onecycle":
        rise = 0.3 * steps
        if step < rise:
            return top / 25 + (top - top / 25) * _half_cosine(1 - step / rise)
        return top * _half_cosine((step - rise) / max(1.0, steps - rise))
    warmup = round(settings.warmup_epochs / settings.epochs * steps)
    cycle = math.ceil(steps / settings.cycles)
    step, steps = step % cycle, cycle
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return top
    return top * _half_cosine((step - warmup) / max(1, steps - warmup))


def _half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return the optimizer of all trainable parameters; those of one dimension are not decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise InputError("the model has no parameter that requires a gradient: there is nothing to train")
    decayed = [p for p in trainable if settings.decay_all or p.ndim > 1]
    free = [p for p in trainable if not (settings.decay_all or p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in trainable) and not settings.shard
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
    momentum = settings.momentum
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused)


def average_into(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Move a running average of the weights and buffers towards ``module``'s, in place.

    ``a ← d · a + (1 - d) · w`` with ``d = min(decay, (1 + step) / (10 + step))``, so that the first steps,
    far from where training ends, are soon forgotten. Integer buffers are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
            else:
                average[name].copy_(value)
