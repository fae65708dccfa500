"""The mean of states by role, and a client's change carried over to the state that the server holds.

Reference: McMahan et al. 2017 (FedAvg), arXiv 1602.05629.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.federated.layout import State, layout_of


def average_states(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean ``Σ wᵢ·sᵢ / Σ wᵢ``, each tensor in its own dtype.

    Floats, running statistics among them, are averaged in float64; integers (counters) are averaged and rounded to
    the nearest, a bool is what the greater weight says.

    Args:
        states: of the same names, shapes and dtypes.
        weights: how much each counts, as its number of examples; none below 0, one above 0.

    Raises:
        InputError: there is no state, or no weight.

    Example:
        >>> average_states([{"n": torch.tensor(2)}, {"n": torch.tensor(5)}], [1.0, 3.0])
        {'n': tensor(4)}
    """
    if not states or sum(weights) <= 0 or min(weights) < 0:
        raise InputError("average: no state of a weight above 0; leave the round out")
    shares = [weight / sum(weights) for weight in weights]
    return {name: _mean([state[name] for state in states], shares) for name in states[0]}


def _mean(tensors: list[Tensor], shares: list[float]) -> Tensor:
    total = sum((share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)), torch.tensor(0.0))
    assert isinstance(total, Tensor)
    kind = tensors[0].dtype
    if kind == torch.bool:
        return total >= 0.5
    return total.to(kind) if kind.is_floating_point else total.round().to(kind)


class Momentum:
    """The server's momentum on the mean of a round: ``v ← β·v + (mean − state)``, ``state ← state + v``, weights alone.

    Small updates say the same in several rounds; what one leaves out, the direction of the last ones brings nearer.
    Running statistics and integers are taken from the mean. With β = 0 this is plain averaging.
    Reference: Hsu, Qi, Brown 2019 (FedAvgM), arXiv 1909.06335.

    Args:
        beta: β, 0 to below 1.

    Raises:
        InputError: β is out of its range.

    Example:
        >>> momentum, state = Momentum(0.5), {"w": torch.zeros(1)}
        >>> for _ in range(2):
        ...     state = momentum.step(state, {"w": state["w"] + 1})
        >>> state["w"]
        tensor([2.5000])
    """

    def __init__(self, beta: float) -> None:
        if not 0 <= beta < 1:
            raise InputError(f"momentum: {beta}; expected 0 to below 1")
        self._beta, self._speed = beta, dict[str, Tensor]()

    def step(self, state: State, mean: State) -> dict[str, Tensor]:
        """The server's next state."""
        weights, found = set(layout_of(state).weights), dict(mean)
        for name in weights if self._beta else ():
            change = mean[name].double() - state[name].double()
            self._speed[name] = self._beta * self._speed.get(name, torch.zeros_like(change)) + change
            found[name] = (state[name].double() + self._speed[name]).to(state[name].dtype)
        return found


def rebase(state: State, base: State, target: State) -> dict[str, Tensor]:
    """Carry what a client changed from ``base`` to ``state`` over to ``target``, the state that the server holds.

    Where clients get the server's state by lossy messages, they train from ``base``, which is near ``target`` and not
    equal to it. A weight becomes ``target + (state − base)``, so that what the downlink has not sent yet is not lost;
    statistics and integers are states and no sums: they are taken as the client has them.
    """
    weights = set(layout_of(base).weights)
    return {
        name: (target[name].double() + (found.double() - base[name].double())).to(found.dtype)
        if name in weights
        else found
        for name, found in state.items()
    }
