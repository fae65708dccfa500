"""Latency of several artifacts side by side: interleaved, so that a noisy machine favours none."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np

from kompakt.errors import InputError
from kompakt.measure.result import Latency

SAMPLE_NS = 200_000  # a sample repeats a short call until it lasts this long: clock and call overhead stay below 0.1 %
MAX_REPEATS = 10_000
FIRST_LOOK = 20  # rounds before the interval of the ratio is first looked at
RESAMPLES = 1000


class Timed(Protocol):
    """A callable without arguments that runs one inference and waits for its end."""

    def __call__(self) -> object:
        """Run one inference to its end."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Latency of one artifact, in milliseconds a call.

    Args:
        p50_ms: median over the samples.
        p90_ms: 90th percentile over the samples.
        ratio: median over the rounds of own time / baseline's time in the same round; below 1 is faster.
        ratio_ci95: bootstrap interval of ``ratio`` over the rounds.
        runs: timed calls in all.
        samples_ms: one sample a round, in order.
    """

    p50_ms: float
    p90_ms: float
    ratio: float
    ratio_ci95: tuple[float, float]
    runs: int
    samples_ms: tuple[float, ...]

    def latency(self, *, threads: int, batch: int) -> Latency:
        """State the times as ``result.json`` has them."""
        return Latency(
            p50=self.p50_ms,
            p90=self.p90_ms,
            threads=threads,
            batch=batch,
            runs=self.runs,
            ratio=self.ratio,
            ratio_ci95=self.ratio_ci95,
        )


def interleave(
    runs: Mapping[str, Timed],
    *,
    warmup: int = 3,
    rounds: int = 200,
    seconds: float = 20.0,
    precision: float = 0.02,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Times]:
    """Time callables in random order, round after round; the first one is the baseline.

    A round takes one sample of every callable, each after one call that is not timed (so that
    caches hold its own weights, as where it runs alone). Short calls are repeated within a sample.
    It ends when the half-width of every ratio's interval is within ``precision`` of the ratio,
    when ``seconds`` are spent, or after ``rounds``; at least one round is always taken. A callable
    that is timed alone has no ratio, and takes all of its rounds or seconds.

    Args:
        runs: name → callable that runs one inference; the first is the baseline of the ratios.
        warmup: calls of each before anything is timed.
        rounds: rounds at the most.
        seconds: time to spend at the most, warm-up included; a call is never cut short.
        precision: half-width of the ratio's 95 % interval, relative, that is narrow enough.
        seed: of the order and of the bootstrap.
        clock: nanoseconds, monotonic.

    Raises:
        InputError: there is nothing to time.
    """
    if not runs or rounds < 1:
        raise InputError(f"nothing to time: {len(runs)} callables, {rounds} rounds")
    rng = np.random.default_rng(seed)
    deadline = clock() + round(seconds * 1e9)
    repeats = {name: _warm(run, warmup, clock) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    look = FIRST_LOOK
    with _no_garbage_collection():
        for done in range(1, rounds + 1):
            for index in rng.permutation(len(names)):
                name = names[index]
                samples[name].append(_sample(runs[name], repeats[name], clock))
            if clock() >= deadline:
                break
            if done == look:
                look = ceil(look * 1.25)
                if _narrow(samples, names[0], precision, seed):
                    break
    return {name: _times(samples[name], samples[names[0]], repeats[name], seed) for name in names}


def ratio_interval(own: np.ndarray, base: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Compute the median of own / base over paired rounds and its 95 % bootstrap interval.

    Args:
        own: shape (rounds,), times of one artifact.
        base: shape (rounds,), times of the baseline in the same rounds.
        seed: of the bootstrap (percentile, rounds resampled; Efron & Tibshirani, 1993).
    """
    ratios = np.asarray(own, dtype=np.float64) / np.asarray(base, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def _warm(run: Timed, warmup: int, clock: Callable[[], int]) -> int:
    """Call ``run`` a few times and tell how many calls make a sample."""
    fastest = SAMPLE_NS
    for _ in range(max(1, warmup)):
        start = clock()
        run()
        fastest = min(fastest, clock() - start)
    return min(MAX_REPEATS, ceil(SAMPLE_NS / max(1, fastest)))


def _sample(run: Timed, repeats: int, clock: Callable[[], int]) -> float:
    """Time ``repeats`` calls after one untimed call; milliseconds a call."""
    run()
    start = clock()
    for _ in range(repeats):
        run()
    return max(1, clock() - start) / repeats / 1e6


def _narrow(samples: Mapping[str, list[float]], baseline: str, precision: float, seed: int) -> bool:
    if len(samples) == 1:
        return False
    base = np.array(samples[baseline])
    for name, own in samples.items():
        ratio, (low, high) = ratio_interval(np.array(own), base, seed)
        if name != baseline and (high - low) / 2 > precision * ratio:
            return False
    return True


def _times(own: list[float], base: list[float], repeats: int, seed: int) -> Times:
    p50, p90 = np.quantile(own, [0.5, 0.9])
    ratio, limits = ratio_interval(np.array(own), np.array(base), seed)
    return Times(
        p50_ms=float(p50),
        p90_ms=float(p90),
        ratio=ratio,
        ratio_ci95=limits,
        runs=len(own) * repeats,
        samples_ms=tuple(own),
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
