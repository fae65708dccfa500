"""What a layer costs in time when it stays float, in its place: for bits that are chosen under a measured latency."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kompakt.build.quantize import quantize
from kompakt.errors import BudgetError
from kompakt.graph.calibrate import Stats
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.measure.latency import interleave
from kompakt.methods.mixed import FLOAT, Pace
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import integer_layers

ROUNDS, SECONDS_EACH = 30, 0.5
TRIES, SLACK = 4, 1.1
"""Assignments that are tried until the file is as fast as asked, and how many times faster still is near enough."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """Where files are timed: a job's target, with what is exported there."""

    job: Job
    capture: Capture
    stats: Stats
    asked: Knobs

    def pace(self) -> Pace:
        """Time the float file, that in integers, and one for every layer that stays float."""
        layers = integer_layers(self.capture.graph, self.job.target.rules, self.asked.keep)
        whole = self._times({"": (), **{op.name: (op.name,) for op in layers}})
        weights = {op.name: str(op.ref("weight")) for op in layers}
        slower = {weights[name]: ms - whole[""] for name, ms in whole.items() if name in weights}
        return Pace(original_ms=whole["float"], integers_ms=whole[""], slower=slower)

    def speed(self, floats: Iterable[str]) -> float:
        """Measure how many times faster than the float file the one is in which these weights stay float."""
        gone = set(floats)
        names = tuple(op.name for op in self.capture.graph.layers if str(op.ref("weight")) in gone)
        times = self._times({"chosen": names})
        return times["float"] / times["chosen"]

    def _times(self, kept: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """Milliseconds of files in which the layers called so stay float, and of the float file."""
        job, runs = self.job, dict[str, Callable[[], object]]()
        example = np.asarray(next(iter(job.data.train.batches(1, limit=1)))[0].numpy())
        with tempfile.TemporaryDirectory() as scratch:
            for number, (name, names) in enumerate([("float", None), *kept.items()]):
                made = self.capture if names is None else self._with_floats(frozenset(names))
                path = job.target.export(made, Path(scratch) / f"{number}{job.target.suffix}", metadata={})
                runs[name] = partial(job.target.open(path, job.threads), example)
            seconds = SECONDS_EACH * (len(runs) + len(runs) % 2)
            times = interleave(runs, rounds=ROUNDS, seconds=max(seconds, 2.0), precision=0.005, seed=job.seed)
        base = times["float"].p50_ms
        return {name: base if name == "float" else base * (found.ratio or 1.0) for name, found in times.items()}

    def _with_floats(self, names: frozenset[str]) -> Capture:
        rules, asked = self.job.target.rules, self.asked
        knobs = replace(asked, bits={}, keep=asked.keep | names)
        return quantize(self.capture, uniform(self.capture.graph, rules, knobs)[0], self.stats, self.job.seed)


def kept_pace(
    choose: Callable[[float], dict[str, int]], track: Track, pace: Pace, times_faster: float
) -> tuple[dict[str, int], float]:
    """Choose bits until the file that they make is as many times faster, verified on the file.

    Args:
        choose: milliseconds that the file may take → weight or op → bits, ``FLOAT`` for a layer in float.
        track: where the file is timed.
        pace: what was measured of single layers.
        times_faster: than the float file.

    Returns:
        The bits, and how many times faster their file was measured.

    Raises:
        BudgetError: nothing that was tried is as fast; the message says how fast the file can be.
    """
    budget, high, tried = pace.original_ms / times_faster, float("inf"), list[tuple[dict[str, int], float]]()
    for _ in range(TRIES):
        try:
            bits = choose(budget)
        except BudgetError:
            break
        speed = track.speed(name for name, width in bits.items() if width == FLOAT)
        tried.append((bits, speed))
        if times_faster <= speed <= SLACK * times_faster or (speed < times_faster and budget <= pace.integers_ms):
            break
        if speed < times_faster:  # layers in float cost more together than each alone
            high, budget = budget, max(pace.integers_ms, budget * max(0.7, speed / times_faster))
        else:
            budget = (budget + min(high, 1.3 * budget)) / 2
    good = [found for found in tried if found[1] >= times_faster]
    if not good:
        best = max([speed for _, speed in tried], default=pace.original_ms / pace.integers_ms)
        raise BudgetError(
            f"{track.job.target.name}: no assignment of bits is {times_faster:g} times faster than float; the fastest "
            f"that was tried is {best:.2f} times; ask for less, or prune with --times-faster"
        )
    return min(good, key=lambda found: found[1])
