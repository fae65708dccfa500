"""A model in memory on data: its outputs, and the statistics of its batch norms."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kompakt.build.taps import inference
from kompakt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outputs and labels of a pass over data, on the CPU.

    This is what training looks at. Figures that are reported come from the artifact in its runtime.

    Args:
        outputs: logits, shape (N, K).
        labels: shape (N,).
    """

    outputs: Tensor
    labels: Tensor

    @cached_property
    def correct(self) -> Tensor:
        """Whether each sample is classified right, shape (N,), bool."""
        return self.outputs.argmax(dim=1) == self.labels

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return float(self.correct.double().mean())


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Run ``model`` in inference mode over ``batches``; its modes are as they were afterwards.

    Args:
        model: any module from a batch to logits (N, K).
        batches: pairs (inputs, labels).

    Raises:
        InputError: there is no batch.
    """
    device = _device(model)
    outputs, labels = [], []
    with inference(model):
        for inputs, expected in batches:
            outputs.append(model(inputs.to(device)).float().cpu())
            labels.append(expected.cpu())
    if not outputs:
        raise InputError("the data give no batch: nothing to evaluate")
    return Evaluation(outputs=torch.cat(outputs), labels=torch.cat(labels))


def reestimate_bn(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> None:
    """Replace every batch norm's running statistics by the average over ``batches``, in place.

    Cutting or quantizing weights moves what a batch norm sees; a few hundred samples mend it without
    training. Weights do not change. A model without batch norms is left as it is.

    Args:
        batches: pairs (inputs, anything); every batch counts alike.

    Raises:
        InputError: there is no batch (the statistics are as they were).
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    device, seen = _device(model), 0
    with inference(model):
        for norm in norms:
            norm.train()
            norm.momentum = None  # None is torch's cumulative average
        try:
            for inputs, _ in batches:
                if not seen:
                    for norm in norms:
                        norm.reset_running_stats()
                model(inputs.to(device))
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen and norms:
        raise InputError("the data give no batch: batch norms cannot be re-estimated")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
