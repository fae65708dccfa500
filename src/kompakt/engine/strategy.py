"""What to try next: a pure function of what was tried, so that a killed search goes on as it would have.

Cheap candidates come first: integers alone, then channels removed without training, then the same with training. How
many multiplications go is climbed by factors until a candidate breaks the budget, then halved on a log scale. Rates
are tried where a climb ends, from the rate that the last such network kept: a network of less use than the next one is
not coded five times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import sqrt
from typing import Literal

from kompakt.engine.choice import Choice

Objective = Literal["size", "latency", "both"]
STRIDE, CLOSE, CLOSE_TRAINED = 1.5, 1.15, 1.3
"""Factors of a climb: its step, and how near it comes to what breaks the budget, where a try is cheap or a training."""
NATS, FIRST = (0.0027, 0.008, 0.016, 0.032, 0.08), 2
"""What a bit more or less of every weight may cost, in nats of divergence, and the place of what is tried first."""


def rates_for(weights: int) -> tuple[float, ...]:
    """Return what a single bit may cost: a large network has many that are worth little each.

    Example:
        >>> rates_for(270_000)
        (1e-08, 3e-08, 5.9e-08, 1.2e-07, 3e-07)
    """
    return tuple(float(f"{nats / max(weights, 1):.1e}") for nats in NATS)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be tried.

    Args:
        objective: fewer coded bits are storage only: rates are tried where size counts.
        max_drop: points on the validation split.
        epochs: of training; 0 trains nothing.
        most: the largest factor of multiplications.
        blocks: residual blocks that may be dropped.
        channels_last: the layout that networks are trained in.
        rates: nats of divergence that a bit may cost, ascending.
    """

    objective: Objective = "both"
    max_drop: float
    epochs: int = 0
    most: float = 8.0
    blocks: int = 0
    channels_last: bool = False
    rates: tuple[float, ...] = rates_for(270_000)


def within_reach(drops: Mapping[Choice, float], space: Space) -> Space:
    """Bound what a sampler may draw: a stride beyond what kept the budget, a block more unless that broke it.

    Args:
        drops: points lost by every candidate tried.
        space: what may be tried at all.

    Example:
        >>> within_reach({Choice(fewer_macs=2.0): 0.3}, Space(max_drop=1.0, blocks=2)).most
        3.0
    """
    good = [choice for choice, points in drops.items() if points <= space.max_drop]
    broken = {choice.drop_blocks for choice, points in drops.items() if points > space.max_drop}
    most = STRIDE * max((choice.fewer_macs for choice in good), default=1.0)
    blocks = max((choice.drop_blocks for choice in good), default=0)
    blocks += blocks + 1 not in broken
    return replace(space, most=min(space.most, round(most, 2)), blocks=min(space.blocks, blocks))


class _Wanted(Exception):
    """A candidate whose drop must be known to go on."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(str(choice))
        self.choice = choice


def propose(drops: Mapping[Choice, float], space: Space) -> Choice | None:
    """Return the next candidate, or None where the plan of the search is carried out.

    Args:
        drops: points lost by every candidate tried; infinite where it failed or is in another worker's hands.
        space: what may be tried.

    Example:
        >>> propose({}, Space(max_drop=1.0))
        Choice(fewer_macs=1.0, drop_blocks=0, rate=0.0, epochs=0)
    """
    try:
        _search(drops, space)
    except _Wanted as wanted:
        return wanted.choice
    return None


def _search(drops: Mapping[Choice, float], space: Space) -> None:
    def keeps(choice: Choice) -> bool:
        if choice not in drops:
            raise _Wanted(choice)
        return drops[choice] <= space.max_drop

    def coded(choice: Choice, place: int) -> bool:
        return keeps(replace(choice, rate=rates[place]))

    rates = space.rates if space.objective != "latency" else ()

    def narrow(choice: Choice, guess: int) -> int | None:
        """Find the place of the greatest rate that keeps the budget, up or down from a guess."""
        up = list(takewhile(partial(coded, choice), range(guess, len(rates))))
        return up[-1] if up else next(filter(partial(coded, choice), reversed(range(min(guess, len(rates))))), None)

    def climb(low: float, epochs: int) -> list[float]:
        """Find factors of multiplications that keep the budget, ascending, up to the largest; ``low`` does."""
        kept, high, close = [low], None, CLOSE_TRAINED if epochs else CLOSE
        while kept[-1] < space.most and (high is None or high / kept[-1] > close):
            ratio = round(min(kept[-1] * STRIDE, space.most) if high is None else sqrt(kept[-1] * high), 2)
            if keeps(Choice(fewer_macs=ratio, epochs=epochs)):
                kept.append(ratio)
            else:
                high = ratio
        return kept

    def largest(kept: list[float], epochs: int, guess: int) -> int:
        """Narrow the largest network that leaves room for it; return the place of its rate, else the guess."""
        places = (narrow(Choice(fewer_macs=ratio, epochs=epochs), guess) for ratio in reversed(kept))
        return next((place for place in places if place is not None), guess)

    first = narrow(Choice(), FIRST) if keeps(Choice()) else None
    free = climb(1.0, 0)
    guess = largest(free[1:], 0, FIRST if first is None else first)
    if space.epochs:
        trained = climb(free[-1], space.epochs)
        guess = largest(trained[1:], space.epochs, guess)
        for blocks in range(1, space.blocks + 1):
            choice = Choice(fewer_macs=trained[-1], drop_blocks=blocks, epochs=space.epochs)
            if not keeps(choice):
                break
            narrow(choice, guess)
