"""``Judge``: read off a loaded artifact what it is worth, against the original model on the same examples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kompakt.artifact.targets import Target
from kompakt.data import Split
from kompakt.measure.accuracy import Metric, Score, paired_drop, score
from kompakt.measure.latency import Times, interleave
from kompakt.measure.memory import peak_memory
from kompakt.measure.result import Drop, Measurement
from kompakt.measure.size import size_bytes, weight_bits

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How artifacts are judged: in which runtime, by which metric, how long they are timed.

    Args:
        target: the runtime.
        metric: outputs and labels → one value an example; None is top-1.
        threads: of the runtime while it is timed and scored.
        seconds: to spend on the clock at the most.
        seed: of the order of timing and of bootstraps.
    """

    target: Target
    metric: Metric | None = None
    threads: int = 1
    seconds: float = 20.0
    seed: int = 0

    def score(
        self, path: Path, split: Split, tick: Callable[[int], None] = lambda done: None, keep: bool = False
    ) -> Score:
        """Score the file at ``path`` on every example of ``split``; ``keep`` its outputs too."""
        return score(self.target.open(path, self.threads), arrays(split, tick), self.metric, keep)

    def times(self, paths: dict[str, Path], example: np.ndarray) -> dict[str, Times]:
        """Time files interleaved on one example; the first is the baseline."""
        runs = {name: partial(self.target.open(path, self.threads), example) for name, path in paths.items()}
        return interleave(runs, seconds=self.seconds, seed=self.seed)

    def drop(self, baseline: Score, compressed: Score) -> Drop:
        """State the paired drop in points."""
        return paired_drop(baseline, compressed, seed=self.seed)


def measurement(name: str, path: Path, found: Score, times: Times | None, *, macs: int, threads: int) -> Measurement:
    """Put together what was seen of one artifact."""
    stored = weight_bits(path)
    return Measurement(
        name=name,
        file=path.name,
        accuracy=found.accuracy,
        accuracy_ci95=found.interval,
        examples=found.examples,
        size_bytes=size_bytes(path),
        latency_ms=times.latency(threads=threads, batch=1) if times else None,
        peak_memory_bytes=peak_memory(path, threads),
        macs=macs,
        params=stored.params,
        bits_per_weight=stored.bits_per_weight,
    )


def arrays(split: Split, tick: Callable[[int], None] = lambda done: None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the examples of a split in batches, inputs and labels; ``tick`` is told how many are done."""
    done = 0
    for inputs, labels in split.batches(BATCH):
        yield inputs.numpy(), labels.numpy()
        done += len(labels)
        tick(done)
