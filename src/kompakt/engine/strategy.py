"""What to try next: a pure function of what was tried, so that a killed search goes on as it would have.

Cheap candidates come first: integers alone, coded at a rate that keeps the budget, so that there is something to
ship; then channels removed without training, by strides, as far as training may make good. Training begins where what
was lost is what the epochs that there is time for give back; a small network has more of them. Where size counts,
networks are trained as the integers of the file, at a price of a bit. A trained network is cut from the one that was
trained before it and kept the budget, so that no training is lost; so is the price raised where the climb ends. What
can be removed for free is found exactly last, halved on a log scale, and coded, as time is left: a network of less
use than the next one is not coded five times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import exp, inf, log, sqrt
from typing import Literal

from kompakt.engine.choice import Choice

Objective = Literal["size", "latency", "both"]
STRIDE, CLOSE, CLOSE_TRAINED, NEAR, AGAIN = 1.5, 1.15, 1.3, 2.0, 2
"""Factors of a climb: its step, and how near it comes to what breaks the budget, where a try is cheap or a training.
A trained network that loses at most ``NEAR`` times what it may is trained on, ``AGAIN`` times at most, while it gets
better, before it is given up: at its own price where it is ``CLOSE``, else at the next lower one."""
RECOVERED, LASTING, MOST_EPOCHS = 1.0, 0.75, 30
"""Training of ``E`` epochs, trained on included, gives back a loss of ``RECOVERED · E ** LASTING`` times what may be
lost, with a margin: ResNet-20's 10.7 points at half the multiplications were 2.2 after 2 epochs and 0.7 after 10,
ResNet-18's 7.0 at 3.28 times fewer were 1.6 after 4, coded; ResNet-20's 9.3 at 1.4 were 1.5 after 6, coded."""
GROWTH, PROBES = 1.5, 2
"""Below the first stride losses are taken to grow as ``ln(factor) ** GROWTH``; where training would begin is made
without it first, ``PROBES`` times at most: between strides there are steps of what widths are multiples of."""
NATS, FIRST = (0.0027, 0.008, 0.016, 0.032, 0.08), 2
"""What a bit more or less of every weight may cost, in nats of divergence, and the place of what is tried first."""
PRICES, FIRST_PRICE = (0.02, 0.04, 0.08, 0.16), 1
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
        epochs: of training, in every round; 0 trains nothing, unless ``means`` does.
        means: epochs of the original that a round may cost: with half the multiplications it has twice as many.
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
    means: float = 0.0
    most: float = 8.0
    blocks: int = 0
    align: int = 1
    channels_last: bool = False
    augment: str = "none"
    rates: tuple[float, ...] = rates_for(270_000)
    prices: tuple[float, ...] = rates_for(270_000, PRICES)

    def epochs_at(self, fewer_macs: float) -> int:
        """Return how long a network with so many times fewer multiplications is trained in a round.

        Example:
            >>> [Space(max_drop=1.0, means=1.2).epochs_at(factor) for factor in (1, 2, 4)]
            [1, 2, 5]
        """
        return min(MOST_EPOCHS, round(self.means * fewer_macs)) if self.means else self.epochs

    def hope(self, fewer_macs: float) -> float:
        """Return the points that a network may lose before training begins.

        Example:
            >>> round(Space(max_drop=1.0, epochs=4).hope(2.0), 1)
            4.8
        """
        return self.max_drop * max(1.0, RECOVERED * (AGAIN * self.epochs_at(fewer_macs)) ** LASTING)

    def untrained(self) -> "Space":
        """Return the space without training."""
        return replace(self, epochs=0, means=0.0)

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
        """What is lost without training, then training, then what is free without, at a rate."""
        first = self.keeps(Choice())
        rates = () if self.space.objective == "latency" else self.space.rates
        if first:
            next((rate for rate in rates[FIRST::-1] if self.keeps(Choice(rate=rate))), None)
        strides = self.strides()
        if self.space.epochs_at(strides[-1].fewer_macs):
            self.taught(strides)
        free = self.climb()
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

    def strides(self) -> list[Choice]:
        """Remove more and more without training, until more is lost than training may give back."""
        made = [Choice()]
        while (last := made[-1].fewer_macs) < self.space.most and self.lost(made[-1]) <= self.space.hope(last):
            made.append(Choice(fewer_macs=self.between(last, None, STRIDE)))
        return made

    def lost(self, choice: Choice) -> float:
        """Points, a tenth of what may be lost at least, so that there is a logarithm; integers alone ask nothing."""
        self.keeps(choice)
        return max(self.drops[choice] if choice != Choice() else 0.0, 0.1 * self.space.max_drop, 1e-9)

    def promising(self, strides: Sequence[Choice], share: float = 1.0) -> float:
        """Where so large a share is lost of what training may give back, as measured there without it."""
        for _ in range(PROBES):
            probe = Choice(fewer_macs=self.between_strides(strides, share))
            if probe in strides or self.lost(probe) <= CLOSE * share * self.space.hope(probe.fewer_macs):
                return probe.fewer_macs
            strides = sorted([*strides, probe], key=lambda each: each.fewer_macs)
        return self.between_strides(strides, share)

    def between_strides(self, strides: Sequence[Choice], share: float) -> float:
        """The same as it should be: straight between strides on log scales."""
        places = [each.fewer_macs for each in strides]
        hoped = [max(share * self.space.hope(place), 1e-9) for place in places]
        gaps = [log(self.lost(each) / mended) for each, mended in zip(strides, hoped, strict=True)]
        after = next((place for place, gap in enumerate(gaps) if gap > 0), len(gaps))
        if after in (0, len(gaps)):
            return places[min(after, len(gaps) - 1)]
        (low, high), (under, over) = places[after - 1 : after + 1], gaps[after - 1 : after + 1]
        if low == 1.0:
            return round(float(high ** exp(-over / GROWTH)), 2)
        along = under / (under - over) if over < inf else 0.0
        return round(float(low * (high / low) ** along), 2)

    def climb(self) -> list[Choice]:
        """Find factors of multiplications that keep the budget untrained, ascending, 1 the first."""
        kept, broke = [Choice()], list[Choice]()
        while (last := kept[-1].fewer_macs) < self.space.most:
            high = min((choice.fewer_macs for choice in broke), default=None)
            if high is not None and high / last <= CLOSE:
                break
            further = Choice(fewer_macs=self.between(last, high, STRIDE))
            (kept if self.keeps(further) else broke).append(further)
        return kept

    def between(self, low: float, high: float | None, stride: float) -> float:
        """The next factor: a stride up, or the middle of what keeps the budget and what breaks it."""
        return round(min(low * stride, self.space.most) if high is None else sqrt(low * high), 2)

    def taught(self, strides: Sequence[Choice]) -> None:
        """Train at a price: what promises to come back; then smaller networks; then at higher prices."""
        prices = (0.0,) if self.space.objective == "latency" else self.space.prices
        first = min(FIRST_PRICE, len(prices) - 1)
        start = Choice(rate=prices[first])
        begun, high = self.begun(start, strides)
        if begun is None:
            free = self.taught_at(replace(start, fewer_macs=self.free(strides)))
            if free.epochs:
                self.narrow(free, prices[:first], first)
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

    def free(self, strides: Sequence[Choice]) -> float:
        """The largest factor of the strides that keeps the budget untrained."""
        return max((each.fewer_macs for each in strides if self.keeps(each)), default=1.0)

    def begun(self, start: Choice, strides: Sequence[Choice]) -> tuple[Choice | None, float | None]:
        """Begin to train where it promises most; again where the first loss says so; else what was free.

        Returns:
            What keeps the budget, or None, and the factor that did not.
        """
        free, high = self.free(strides), None
        bold = max(free, self.promising(strides))
        while True:
            tried = self.taught_at(replace(start, fewer_macs=bold))
            found = self.held(tried) if tried.epochs else None
            if found is not None or bold <= free:
                return found, high
            share = self.space.max_drop / self.drops[tried] if tried.epochs else 0.0
            again, high = self.promising(strides, share) if high is None and share else free, bold
            bold = max(free, again)

    def taught_at(self, choice: Choice) -> Choice:
        """Return a choice, trained as long as there is time for at its size."""
        return replace(choice, epochs=self.space.epochs_at(choice.fewer_macs))

    def held(self, choice: Choice) -> Choice | None:
        """Return a trained choice that keeps the budget: this one, or where it is near and gets better, trained on."""
        budget = self.space.max_drop
        nearest = NEAR * budget
        for _ in range(AGAIN):
            if self.keeps(choice) or self.drops[choice] >= nearest:
                break
            nearest = self.drops[choice]
            lower = [price for price in self.space.prices if price < choice.rate and nearest > CLOSE * budget]
            choice = replace(choice, rate=max(lower, default=choice.rate), after=choice)
        return choice if self.keeps(choice) else None

    def onward(self, last: Choice, high: float | None) -> Choice:
        """Cut and train a network again and again, each from the one before, as far as the budget goes."""
        while last.fewer_macs < self.space.most and (high is None or high / last.fewer_macs > CLOSE_TRAINED):
            gained = self.drops[last] <= -self.space.max_drop
            ratio = self.between(last.fewer_macs, high, STRIDE**2 if gained else STRIDE)
            found = self.held(self.taught_at(replace(last, fewer_macs=ratio, after=last)))
            last, high = (last, ratio) if found is None else (found, high)
        return last
