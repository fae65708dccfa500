"""The headline: one sentence, one verdict and a handful of cards, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kompakt.measure.result import Latency, Result
from kompakt.report.numbers import (
    bytes_text,
    count_text,
    interval_text,
    ms_text,
    plural,
    points_text,
    ratio_text,
    speed_text,
)
from kompakt.report.numbers import score_text as score

BUSY = 1.5  # where a tenth of the samples take this many medians, something else ran
Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the budget was met, in words; ``tone`` only repeats what the words say."""

    text: str
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Where a drop, its interval and the budget lie on one scale, in per cent of its width."""

    zero: float
    low: float
    high: float
    point: float
    budget: float | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """One headline figure: ``value`` is read first, then ``change``, then ``details``.

    ``left`` is what is left of the baseline's figure, as a share (for the bar), where that makes sense.
    """

    title: str
    value: str
    unit: str
    change: str
    details: tuple[str, ...] = ()
    left: float | None = None
    gauge: Gauge | None = None


def headline(result: Result) -> str:
    """Say the result in one sentence, as in ``11.4× smaller, 2.1× faster, 0.42 points less accurate``."""
    return ", ".join(claims(result))


def claims(result: Result) -> tuple[str, ...]:
    """The parts of the headline: bytes, time and accuracy, as far as they were measured."""
    before, after = result.baseline, result.compressed
    parts = [ratio_text(before.size_bytes, after.size_bytes, "smaller", "larger").replace("unchanged", "same size")]
    if before.latency_ms and after.latency_ms:
        parts.append(speed_text(before.latency_ms, after.latency_ms).replace("unchanged", "same speed"))
    if result.drop_points is not None:
        parts.append(_accuracy_words(result.drop_points))
    sizes = f"{bytes_text(before.size_bytes)} → {bytes_text(after.size_bytes)}"
    first, *others = [part for part in parts if part] or [sizes]
    return first[:1].upper() + first[1:], *others


def verdict(result: Result) -> Verdict:
    """Say whether the budget was met."""
    limit = result.budget.max_drop
    what = "the budget" if limit is None else f"the budget of {_limit(limit)}"
    if not result.budget.met:
        return Verdict(text=f"Over {what}" if limit is not None else "Budget not met", tone="bad")
    if limit is None:
        return Verdict(text="No accuracy budget set", tone="plain")
    if result.drop_points is None:
        return Verdict(text=f"Accuracy not measured, {what} not checked", tone="plain")
    return Verdict(text=f"Within {what}", tone="good")


def cards(result: Result) -> tuple[Card, ...]:
    """The headline figures; a figure that was not measured has no card."""
    before, after = result.baseline, result.compressed
    found = (
        _accuracy(result),
        _size(result),
        _latency(before.latency_ms, after.latency_ms),
        _compute(result),
        _less("Memory", before.peak_memory_bytes, after.peak_memory_bytes, bytes_text, ("less", "more")),
    )
    return tuple(card for card in found if card is not None)


def gauge(drop: float, interval: tuple[float, float], budget: float | None) -> Gauge:
    """Place a drop, its interval and the budget on one scale that holds zero and all of them."""
    values = [0.0, drop, *interval, *([] if budget is None else [budget])]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    start, width = low - 0.06 * span, 1.12 * span

    def at(value: float) -> float:
        return round(100 * (value - start) / width, 2)

    return Gauge(
        zero=at(0),
        low=at(interval[0]),
        high=at(interval[1]),
        point=at(drop),
        budget=None if budget is None else at(budget),
    )


def _accuracy(result: Result) -> Card | None:
    before, after = result.baseline.accuracy, result.compressed.accuracy
    change = _arrow(score(before), score(after)) if before is not None and after is not None else ""
    if result.drop_points is None:
        if after is None:
            return None
        return Card(title="Accuracy", value=score(after), unit="", change=change, details=_examples(result))
    gained = result.drop_points < 0 and points_text(result.drop_points) != "0.00"
    value = points_text(abs(result.drop_points))
    details, scale = _examples(result), None
    if result.drop_ci95 is not None:
        low, high = result.drop_ci95
        shown = (-high, -low) if gained else (low, high)
        details = (f"95 % interval {interval_text(shown)}", *details)
        scale = gauge(result.drop_points, (low, high), result.budget.max_drop)
        if result.budget.met and result.budget.max_drop is not None and high > result.budget.max_drop:
            details = (*details, "The interval reaches past the budget.")
    return Card(
        title="Accuracy gain" if gained else "Accuracy drop",
        value=value,
        unit="points",
        change=change,
        details=details,
        gauge=scale,
    )


def _size(result: Result) -> Card | None:
    """The file that runs, and what it takes to store and to send."""
    before, after, packed = result.baseline.size_bytes, result.compressed.size_bytes, result.packed_bytes
    less = ratio_text(before, packed, "smaller", "larger")
    details = () if packed is None else (f"As .kpk: {bytes_text(packed)}, {less}".removesuffix(", "),)
    return _less("File size", before, after, bytes_text, ("smaller", "larger"), details)


def _less(
    title: str,
    before: float | None,
    after: float | None,
    write: Callable[[float], str],
    words: tuple[str, str],
    details: tuple[str, ...] = (),
) -> Card | None:
    if before is None or after is None:
        return None
    factor, _, word = ratio_text(before, after, *words).partition(" ")
    change = _arrow(write(before), write(after))
    if not factor:
        return Card(title=title, value=write(after), unit="", change=change, details=details)
    return Card(
        title=title,
        value=factor,
        unit=word,
        change=change,
        details=details,
        left=after / before if before > 0 else None,
    )


def _latency(before: Latency | None, after: Latency | None) -> Card | None:
    if before is None or after is None:
        return None
    details = [f"Median, batch {after.batch}, {plural(after.threads, 'thread')}"]
    if after.ratio and after.ratio_ci95:
        low, high = (1 / bound for bound in reversed(after.ratio_ci95))
        details.append(f"Side by side: {low:.2f}× to {high:.2f}× the speed (95 %)")
    if max(before.p90 / before.p50, after.p90 / after.p50) > BUSY:
        details.append("The machine was busy: single times are not to be trusted")
    factor, _, word = speed_text(before, after).partition(" ")
    return Card(
        title="Latency",
        value=factor if word else ms_text(after.p50),
        unit=word,
        change=_arrow(ms_text(before.p50), ms_text(after.p50)),
        details=tuple(details),
        left=(after.ratio or after.p50 / before.p50) if word else None,
    )


def _compute(result: Result) -> Card | None:
    before, after = result.baseline, result.compressed
    if not before.macs or not after.macs:
        return None
    params = ratio_text(before.params, after.params, "fewer", "more")
    detail = f"Parameters: {_arrow(count_text(before.params), count_text(after.params))}"
    details = (f"{detail}, {params}" if params else detail,)
    return _less("Compute (MACs)", before.macs, after.macs, count_text, ("less", "more"), details)


def _examples(result: Result) -> tuple[str, ...]:
    count = result.compressed.examples
    return (f"On {plural(count, 'example')}",) if count else ()


def _arrow(before: str, after: str) -> str:
    """Write a change so that a line never ends between a number and its unit."""
    return f"{before} → {after}".replace(" ", "\u00a0").replace("→\u00a0", "→ ")


def _accuracy_words(drop: float) -> str:
    text = points_text(abs(drop))
    if text == "0.00":
        return "same accuracy"
    return f"{text} points {'less' if drop > 0 else 'more'} accurate"


def _limit(limit: float) -> str:
    return f"{limit:g} point" if limit == 1 else f"{limit:g} points"
