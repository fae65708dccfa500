"""What to try next: a pure function of what was tried, so that a killed search goes on as it would have.

Cheap candidates come first: integers alone, then channels removed without training, then the same with training. How
many multiplications go is climbed by factors until a candidate breaks the budget, then halved on a log scale. Rates
are tried where a climb ends, from the rate that the last such network kept: a network of less use than the next one is
not coded five times. Where training is affordable and size counts, networks are trained as the integers of the file,
at a price of a bit. A trained network is cut from the one that was trained before it and kept the budget, so that no
training is lost; so is the price raised where the climb ends. What was not trained is coded last, as time is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import sqrt
from typing import Literal

from kompakt.engine.choice import Choice

Objective = Literal["size", "latency", "both"]
STRIDE, CLOSE, CLOSE_TRAINED, NEAR = 1.5, 1.15, 1.3, 2.0
"""Factors of a climb: its step, and how near it comes to what breaks the budget, where a try is cheap or a training.
A trained network that loses at most ``NEAR`` times what it may is trained once more before it is given up."""
NATS, FIRST = (0.0027, 0.008, 0.016, 0.032, 0.08), 2
"""What a bit more or less of every weight may cost, in nats of divergence, and the place of what is tried first."""
PRICES, FIRST_PRICE = (0.0135, 0.027, 0.054, 0.108), 1
"""The same for weights that are trained at the price."""


def rates_for(weights: int, nats: tuple[float, ...] = NATS) -> tuple[float, ...]:
    """Return what a single bit may cost: a large network has many that are worth little each.

    Example:
        >>> rates_for(270_000)
        (1e-08, 3e-08, 5.9e-08, 1.2e-07, 3e-07)
    """
    return tuple(float(f"{each / max(weights, 1):.1e}") for each in nats)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be tried.

    Args:
        objective: fewer coded bits are storage only: rates are tried where size counts.
        max_drop: points on the validation split.
        epochs: of training, in every round; 0 trains nothing.
        most: the largest factor of multiplications.
        blocks: residual blocks that may be dropped.
        channels_last: the layout that networks are trained in.
        augment: what training makes of images.
        rates: nats of divergence that a bit may cost, ascending.
        prices: nats of the loss that a bit may cost in training, ascending.
    """

    objective: Objective = "both"
    max_drop: float
    epochs: int = 0
    most: float = 8.0
    blocks: int = 0
    channels_last: bool = False
    augment: str = "none"
    rates: tuple[float, ...] = rates_for(270_000)
    prices: tuple[float, ...] = rates_for(270_000, PRICES)

    def fitted(self, weights: int) -> "Space":
        """Return the space of a network with so many weights."""
        return replace(self, rates=rates_for(weights), prices=rates_for(weights, PRICES))


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

    sized = space.objective != "latency"
    rates, prices = (space.rates, space.prices) if sized else ((), ())
    price = prices[FIRST_PRICE] if prices else 0.0

    def coded(choice: Choice, ladder: Sequence[float], place: int) -> bool:
        return keeps(replace(choice, rate=ladder[place]))

    def narrow(choice: Choice, ladder: Sequence[float], guess: int) -> int | None:
        """Find the place of the greatest rate that keeps the budget, up or down from a guess."""
        fits = partial(coded, choice, ladder)
        up = list(takewhile(fits, range(guess, len(ladder))))
        return up[-1] if up else next(filter(fits, reversed(range(min(guess, len(ladder))))), None)

    def climb(low: Choice) -> list[Choice]:
        """Find factors of multiplications that keep the budget, ascending, up to the largest; ``low`` does."""
        kept, high = [low], None
        while (last := kept[-1].fewer_macs) < space.most and (high is None or high / last > CLOSE):
            ratio = between(last, high, STRIDE)
            if keeps(replace(low, fewer_macs=ratio)):
                kept.append(replace(low, fewer_macs=ratio))
            else:
                high = ratio
        return kept

    def between(low: float, high: float | None, stride: float) -> float:
        """The next factor: a stride up, or the middle of what keeps the budget and what breaks it."""
        return round(min(low * stride, space.most) if high is None else sqrt(low * high), 2)

    def held(choice: Choice) -> Choice | None:
        """Return a trained choice that keeps the budget: this one, or where it comes near, trained once more."""
        if keeps(choice):
            return choice
        longer = replace(choice, after=choice)
        return longer if drops[choice] <= NEAR * space.max_drop and keeps(longer) else None

    def onward(last: Choice) -> Choice:
        """Cut and train a network again and again, each from the one before, as far as the budget goes."""
        high = None
        while last.fewer_macs < space.most and (high is None or high / last.fewer_macs > CLOSE_TRAINED):
            gained = last.epochs > 0 and drops[last] <= -space.max_drop
            ratio = between(last.fewer_macs, high, STRIDE**2 if gained else STRIDE)
            after = last if last.epochs else None
            found = held(replace(last, fewer_macs=ratio, epochs=space.epochs, after=after))
            last, high = (last, ratio) if found is None else (found, high)
        return last

    def taught(low: float) -> None:
        """Train: the network that was free without, at a price; then smaller ones; then at higher prices."""
        start = Choice(fewer_macs=low, epochs=space.epochs, rate=price)
        first = held(start) if sized else Choice(fewer_macs=low)
        if first is None:
            narrow(start, prices[:FIRST_PRICE], FIRST_PRICE)
            return
        best = onward(first)
        for dearer in prices[FIRST_PRICE + 1 :]:
            if not keeps(further := replace(best, rate=dearer, after=best)):
                break
            best = further
        for blocks in range(1, space.blocks + 1):
            if not best.epochs or not keeps(further := replace(best, drop_blocks=blocks, after=best)):
                break
            best = further

    whole = keeps(Choice())
    free = climb(Choice())
    if space.epochs:
        taught(free[-1].fewer_macs)
    guess = FIRST
    for choice in ([Choice()] if whole else []) + free[:0:-1]:
        place = narrow(choice, rates, guess)
        if place is not None and choice != Choice():
            break
        guess = guess if place is None else place
