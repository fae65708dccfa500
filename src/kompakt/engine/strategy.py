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
from itertools import takewhile
from math import sqrt
from typing import Literal

from kompakt.engine.choice import Choice

Objective = Literal["size", "latency", "both"]
STRIDE, CLOSE, CLOSE_TRAINED, NEAR, AGAIN = 1.5, 1.15, 1.3, 2.0, 2
"""Factors of a climb: its step, and how near it comes to what breaks the budget, where a try is cheap or a training.
A trained network that loses at most ``NEAR`` times what it may is trained on, ``AGAIN`` times at most, while it gets
better, before it is given up."""
RECOVERED = 3.0
"""Training begins at the smallest network that lost so many times what it may without: most of it comes back."""
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
        align: what widths are multiples of.
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
    align: int = 1
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
        _Walk(drops=drops, space=space).whole()
    except _Wanted as wanted:
        return wanted.choice
    return None


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The plan of a search, from its beginning: it ends at the first candidate that was not tried."""

    drops: Mapping[Choice, float]
    space: Space

    def whole(self) -> None:
        """What is free without training, then training, then what was not trained at a rate."""
        first = self.keeps(Choice())
        free, broke = self.climb()
        if self.space.epochs:
            mended = [choice for choice in broke if self.drops[choice] <= RECOVERED * self.space.max_drop]
            self.taught(free[-1].fewer_macs, max(choice.fewer_macs for choice in (free[-1], *mended)))
        rates = () if self.space.objective == "latency" else self.space.rates
        guess = FIRST
        for choice in ([Choice()] if first else []) + free[:0:-1]:
            place = self.narrow(choice, rates, guess)
            if place is not None and choice != Choice():
                break
            guess = guess if place is None else place

    def keeps(self, choice: Choice) -> bool:
        """Whether a choice keeps the budget; one that was not tried ends the walk."""
        if choice not in self.drops:
            raise _Wanted(choice)
        return self.drops[choice] <= self.space.max_drop

    def narrow(self, choice: Choice, ladder: Sequence[float], guess: int) -> int | None:
        """Find the place of the greatest rate that keeps the budget, up or down from a guess."""

        def fits(place: int) -> bool:
            return self.keeps(replace(choice, rate=ladder[place]))

        up = list(takewhile(fits, range(guess, len(ladder))))
        return up[-1] if up else next(filter(fits, reversed(range(min(guess, len(ladder))))), None)

    def climb(self) -> tuple[list[Choice], list[Choice]]:
        """Find factors of multiplications that keep the budget untrained, ascending, 1 the first; and what broke it."""
        kept, broke = [Choice()], list[Choice]()
        while (last := kept[-1].fewer_macs) < self.space.most:
            high = min((choice.fewer_macs for choice in broke), default=None)
            if high is not None and high / last <= CLOSE:
                break
            further = Choice(fewer_macs=self.between(last, high, STRIDE))
            (kept if self.keeps(further) else broke).append(further)
        return kept, broke

    def between(self, low: float, high: float | None, stride: float) -> float:
        """The next factor: a stride up, or the middle of what keeps the budget and what breaks it."""
        return round(min(low * stride, self.space.most) if high is None else sqrt(low * high), 2)

    def taught(self, low: float, bold: float) -> None:
        """Train at a price: what removal alone did not cost too much; then smaller networks; then at higher prices."""
        prices = (0.0,) if self.space.objective == "latency" else self.space.prices
        first = min(FIRST_PRICE, len(prices) - 1)
        start, high = Choice(fewer_macs=low, epochs=self.space.epochs, rate=prices[first]), None
        begun = self.held(replace(start, fewer_macs=bold))
        if begun is None and bold > low:
            begun, high = self.held(start), bold
        if begun is None:
            self.narrow(start, prices[:first], first)
            return
        best = self.onward(begun, high)
        dearer = [replace(best, rate=price) for price in prices[first + 1 :]]
        shorter = [replace(best, drop_blocks=blocks) for blocks in range(1, self.space.blocks + 1)]
        for group in (dearer, shorter):
            for choice in group:
                further = replace(choice, rate=max(choice.rate, best.rate), after=best)
                if not self.keeps(further):
                    break
                best = further

    def held(self, choice: Choice) -> Choice | None:
        """Return a trained choice that keeps the budget: this one, or where it is near and comes nearer, trained on."""
        nearest = NEAR * self.space.max_drop
        for _ in range(AGAIN):
            if self.keeps(choice) or self.drops[choice] >= nearest:
                break
            choice, nearest = replace(choice, after=choice), self.drops[choice]
        return choice if self.keeps(choice) else None

    def onward(self, last: Choice, high: float | None) -> Choice:
        """Cut and train a network again and again, each from the one before, as far as the budget goes."""
        while last.fewer_macs < self.space.most and (high is None or high / last.fewer_macs > CLOSE_TRAINED):
            gained = self.drops[last] <= -self.space.max_drop
            ratio = self.between(last.fewer_macs, high, STRIDE**2 if gained else STRIDE)
            found = self.held(replace(last, fewer_macs=ratio, after=last))
            last, high = (last, ratio) if found is None else (found, high)
        return last
