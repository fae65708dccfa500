"""Weights that are trained as the integers that will be coded, at the prices of the coder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kompakt.coding.rate import rate_model
from kompakt.numerics.priced import SLOPES, price_share, priced, priced_round

MOST = 127
EVERY = 100
"""Steps of training after which prices are fitted anew."""
FIRST = 0.03
"""Of the full price of a bit, where it rises: a price that hardly moves what a trained network says."""


class Priced(nn.Module):
    """A weight as its integers, ``w → s · q(w / s)``, rounded by rate and distortion, straight through in the gradient.

    The step grows with the root of the price, as ``kompakt.numerics.rate_distortion.steps`` has it.

    Args:
        steps: s at the full price, ``(rows,)``.
        shape: of the weight, dimension 0 the rows.
        share: of the full price, now.
    """

    full: Tensor
    share: Tensor
    slopes: Tensor
    fitted: Tensor

    def __init__(self, steps: Tensor, shape: torch.Size, share: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("full", steps.reshape(-1, *(1,) * (len(shape) - 1)))
        self.register_buffer("share", torch.tensor(share))
        # Not five dimensions: a network that is laid out channels last takes those for images of videos.
        self.register_buffer("slopes", torch.zeros(SLOPES, shape.numel()))
        self.register_buffer("fitted", torch.tensor(-1))

    @property
    def steps(self) -> Tensor:
        """The steps at the price that a bit has now, a dimension of the weight each."""
        return self.full * self.share.sqrt()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid."""
        steps = self.steps
        return steps * priced_round(weight / steps, self._slopes(weight), MOST)

    def bits(self, weight: Tensor) -> Tensor:
        """Return the bits that the weight takes beyond an empty one, scalar."""
        return priced(weight / self.steps, self._slopes(weight)).sum()

    @torch.no_grad()
    def refit(self, weight: Tensor, step: int) -> None:
        """Fit the coder's model to the integers as they are after ``step`` steps, once."""
        if int(self.fitted) == step:  # a run that goes on from a checkpoint of this very step
            return
        q = priced_round(weight / self.steps, self._slopes(weight), MOST).cpu().numpy().astype(np.int8)
        model = rate_model(q)
        prices = model.bits(np.zeros_like(q), tuple(range(SLOPES + 1)))
        self.slopes.copy_(torch.from_numpy(np.diff(prices, axis=0)).clamp(min=0).flatten(1))
        self.fitted.fill_(step)

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


def attach(model: nn.Module, starts: Mapping[str, Start], share: float = 1.0) -> None:
    """Let weights be trained as integers, in place: each of ``starts`` gets a ``Priced`` of its own.

    Args:
        model: whose parameters, by name, are those of ``starts``.
        starts: the name of a weight → where it begins.
        share: of the full price, that ``starts`` were chosen at.
    """
    tensors = dict(model.named_parameters())
    for name, start in starts.items():
        owner, _, leaf = name.rpartition(".")
        with torch.no_grad():
            tensors[name].copy_(start.weight)
        made = Priced(start.steps / share**0.5, start.weight.shape, share)
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
            made.refit(weight, step)


def rising(rise: float, steps: int, first: float = FIRST) -> Callable[[nn.Module, int], None]:
    """Return a hook for the training loop that lets the price of a bit rise, see ``price_share``.

    Args:
        rise: the share of the training over which it does.
        steps: of the whole training.
        first: of the full price, to begin with.
    """

    def after_step(model: nn.Module, step: int) -> None:
        share = price_share(step / steps, rise, first)
        for made, _ in latents(model).values():
            made.share.fill_(share)

    return after_step


def priced_bits(rate: float) -> Callable[[nn.Module], Tensor]:
    """Return a regulariser for the training loop: the bits of all such weights at what they cost, fully ``rate``."""

    def term(model: nn.Module) -> Tensor:
        return rate * torch.stack([made.share * made.bits(weight) for made, weight in latents(model).values()]).sum()

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
