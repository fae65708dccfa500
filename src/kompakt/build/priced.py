"""Weights that are trained as the integers that will be coded, at the prices of the coder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kompakt.coding.rate import rate_model
from kompakt.numerics.priced import SLOPES, priced, priced_round

MOST = 127
EVERY = 100
"""Steps of training after which prices are fitted anew."""


class Priced(nn.Module):
    """A weight as its integers, ``w → s · q(w / s)``, rounded by rate and distortion, straight through in the gradient.

    Args:
        steps: s, ``(rows,)``.
        shape: of the weight, dimension 0 the rows.
    """

    steps: Tensor
    slopes: Tensor

    def __init__(self, steps: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("steps", steps.reshape(-1, *(1,) * (len(shape) - 1)))
        # Not five dimensions: a network that is laid out channels last takes those for images of videos.
        self.register_buffer("slopes", torch.zeros(SLOPES, shape.numel()))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid."""
        return self.steps * priced_round(weight / self.steps, self._slopes(weight), MOST)

    def bits(self, weight: Tensor) -> Tensor:
        """Return the bits that the weight takes beyond an empty one, scalar."""
        return priced(weight / self.steps, self._slopes(weight)).sum()

    @torch.no_grad()
    def refit(self, weight: Tensor) -> None:
        """Fit the coder's model to the integers as they are now."""
        q = priced_round(weight / self.steps, self._slopes(weight), MOST).cpu().numpy().astype(np.int8)
        model = rate_model(q)
        prices = model.bits(np.zeros_like(q), tuple(range(SLOPES + 1)))
        self.slopes.copy_(torch.from_numpy(np.diff(prices, axis=0)).clamp(min=0).flatten(1))

    def _slopes(self, weight: Tensor) -> Tensor:
        return self.slopes.view(SLOPES, *weight.shape)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the training of a weight begins.

    Args:
        weight: on its grid.
        steps: ``(rows,)``, the grid.
    """

    weight: Tensor
    steps: Tensor


def attach(model: nn.Module, starts: Mapping[str, Start]) -> None:
    """Let weights be trained as integers, in place: each of ``starts`` gets a ``Priced`` of its own.

    Args:
        model: whose parameters, by name, are those of ``starts``.
        starts: the name of a weight → where it begins.
    """
    tensors = dict(model.named_parameters())
    for name, start in starts.items():
        owner, _, leaf = name.rpartition(".")
        with torch.no_grad():
            tensors[name].copy_(start.weight)
        made = Priced(start.steps.clone(), start.weight.shape)
        parametrize.register_parametrization(model.get_submodule(owner), leaf, made, unsafe=True)
    refit(model, 0)


def latents(model: nn.Module) -> dict[str, tuple[Priced, Tensor]]:
    """Return the weights that are trained as integers: name → grid and the float behind it."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        for part in module:
            if isinstance(part, Priced):
                owner, _, leaf = path.rpartition(".parametrizations.")
                found[f"{owner}.{leaf}" if owner else path.removeprefix("parametrizations.")] = (part, module.original)
    return found


def refit(model: nn.Module, step: int) -> None:
    """Fit the prices anew, at step 0 and every ``EVERY`` steps: a hook for the training loop."""
    if step % EVERY == 0:
        for made, weight in latents(model).values():
            made.refit(weight)


def priced_bits(rate: float) -> Callable[[nn.Module], Tensor]:
    """Return a regulariser for the training loop: ``rate`` times the bits that all such weights take."""

    def term(model: nn.Module) -> Tensor:
        return rate * torch.stack([made.bits(weight) for made, weight in latents(model).values()]).sum()

    return term


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by the names that they have without grids."""
    found: dict[str, Tensor] = {name: weight for name, (_, weight) in latents(model).items()}
    return found | {name: value for name, value in model.named_parameters() if ".parametrizations." not in f".{name}"}


def settle(model: nn.Module) -> None:
    """Leave the weights as they compute, each on its grid, and take the grids away, in place."""
    for name in latents(model):
        owner, _, leaf = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner), leaf, leave_parametrized=True)
