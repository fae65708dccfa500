"""Masks that move while the one training loop runs: gradual schedules and soft masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kompakt.numerics.masks import masked, sparsity_at

Masks = Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]
RISE = 0.8
"""The share of the steps over which a gradual schedule rises."""
UPDATES = 100
"""Masks are chosen anew so many times in a run."""


class SoftMask(nn.Module):
    """Let a weight be zero where masked while it keeps learning (Guo et al. 2016, arXiv:1608.04493)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight; its gradient reaches every weight."""
        return masked(weight, self.mask)


@dataclass(kw_only=True)
class Moving:
    """Masks of one training run that are chosen anew as it goes.

    Args:
        masks: weights by name and the share of the final sparsity → masks.
        names: the weights that are masked.
        steps: of the whole run.
        gradual: rise from dense to the final sparsity (Zhu and Gupta 2017, arXiv:1710.01878), else be there at once.
        soft: masked weights keep learning and may come back.
    """

    masks: Masks
    names: tuple[str, ...]
    steps: int
    gradual: bool = False
    soft: bool = False
    now: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> None:
        """Put soft masks into a model before its run."""
        if self.soft:
            for name in self.names:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                keep = torch.ones_like(module.get_parameter(leaf), dtype=torch.bool)
                parametrize.register_parametrization(module, leaf, SoftMask(keep))

    def detach(self, model: nn.Module) -> dict[str, Tensor]:
        """Take soft masks out again, their zeros becoming the weights'; return the final masks."""
        if self.soft:
            for name in self.names:
                owner, _, leaf = name.rpartition(".")
                parametrize.remove_parametrizations(model.get_submodule(owner), leaf)
        return {name: model.get_parameter(name) != 0 for name in self.names}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Choose the masks anew where it is time, and hold them."""
        tensors = {name: self._weight(model, name) for name in self.names}
        with torch.no_grad():
            if not self.soft:  # what is gone stays gone: it must not be weighed by the step that it just took
                for name, keep in self.now.items():
                    tensors[name].mul_(keep)
            if not self.now or step == self._end() or (step < self._end() and step % self._every() == 0):
                self.now = self.masks(tensors, self._share(step))
            for name, keep in self.now.items():
                if self.soft:
                    owner, _, leaf = name.rpartition(".")
                    layer = model.get_submodule(owner).get_submodule(f"parametrizations.{leaf}.0")
                    layer.get_buffer("mask").copy_(keep)
                else:
                    tensors[name].mul_(keep)

    def _end(self) -> int:
        return max(1, int(RISE * self.steps))

    def _every(self) -> int:
        return max(1, self.steps // UPDATES)

    def _share(self, step: int) -> float:
        return sparsity_at(step, start=0, end=self._end(), final=1.0) if self.gradual else 1.0

    def _weight(self, model: nn.Module, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        return module.get_parameter(f"parametrizations.{leaf}.original" if self.soft else leaf)
