"""Accuracy with its interval, and the paired drop between two models on the same examples."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from scipy.optimize import brentq

from kompakt.errors import InputError, ModelError
from kompakt.measure.result import Drop

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000
_OFF = 1e-9  # how far from the estimate Tango's limits are looked for
_CHUNK = 1 << 20  # values drawn at once by the bootstrap: bounds its memory

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What one model said of each example.

    Args:
        outputs: shape (n, …).
        labels: shape (n, …).
    """

    outputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """How well one model did on each example.

    Args:
        correct: shape (n,): boolean for right or wrong, float for a graded metric.
        labels: checksum of the labels, so that two scores can only be paired on the same examples.
        seen: what it said, where that was to be kept.
    """

    correct: np.ndarray
    labels: str = ""
    seen: Outputs | None = None

    def __post_init__(self) -> None:
        if self.correct.ndim != 1 or not len(self.correct):
            raise InputError(f"a score needs one value an example, found shape {self.correct.shape}")

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """The mean over the examples: a share in 0…1 for right or wrong."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy; see ``interval``."""
        return interval(self.correct)


def top_1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tell for each example whether the largest output is the label's.

    Args:
        outputs: shape (n, classes).
        labels: shape (n,), integers.

    Returns:
        Shape (n,), boolean.
    """
    return outputs.argmax(axis=1) == labels


def score(
    run: Callable[[np.ndarray], np.ndarray],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    metric: Metric | None = None,
    keep: bool = False,
) -> Score:
    """Run a model over labelled batches and score every example.

    Args:
        run: maps a batch of inputs to its outputs, e.g. an ONNX Runtime session.
        batches: pairs of inputs (n, …) and labels (n, …).
        metric: maps outputs and labels to one value an example, shape (n,); ``top_1`` by default.
        keep: the outputs too.

    Raises:
        InputError: there are no batches, or the metric does not give one value an example.
        ModelError: an output is NaN; the message names the batch.
    """
    measure = metric or top_1
    values, said, digest = [], [], hashlib.sha256()
    for index, (inputs, labels) in enumerate(batches):
        labels = np.asarray(labels)
        outputs = _finite(run(inputs), index)
        values.append(_per_example(measure(outputs, labels), len(labels), index))
        digest.update(_bytes(labels))
        if keep:
            said.append((outputs, labels))
    if not values:
        raise InputError("there is nothing to measure on: the data gave no batch")
    seen = (
        Outputs(outputs=np.concatenate([o for o, _ in said]), labels=np.concatenate([y for _, y in said]))
        if said
        else None
    )
    return Score(correct=np.concatenate(values), labels=digest.hexdigest(), seen=seen)


def interval(correct: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bound the mean at 95 % confidence.

    Right-or-wrong values get the score interval of Wilson (1927, "Probable inference, the law of
    succession, and statistical inference", JASA 22):
    ``(p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``.
    Graded values get the percentile bootstrap (Efron & Tibshirani, 1993), seeded.

    Args:
        correct: shape (n,), one value an example.
        seed: of the bootstrap.
    """
    if _is_binary(correct):
        return wilson(int(np.count_nonzero(correct)), len(correct))
    return bootstrap(correct, seed=seed)


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Compute Wilson's score interval for a proportion; see ``interval``."""
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = z * sqrt((share * (1 - share) + spread / 4) / trials)
    low = 0.0 if successes == 0 else (centre - half) / (1 + spread)
    high = 1.0 if successes == trials else (centre + half) / (1 + spread)
    return low, high


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Compute the 95 % percentile bootstrap interval of the mean (Efron & Tibshirani, 1993)."""
    rng, count = np.random.default_rng(seed), len(values)
    rows = max(1, _CHUNK // count)
    means = [
        values[rng.integers(0, count, (min(rows, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def paired_drop(baseline: Score, compressed: Score, seed: int = 0) -> Drop:
    """Compute how much accuracy was lost, in points, with a paired 95 % interval.

    Both models saw the same examples, so only those on which they disagree carry information.
    Right-or-wrong values: ``tango`` on the discordant pairs; graded values: the bootstrap of the
    differences. A positive drop is a loss.

    Raises:
        InputError: the two scores are not of the same examples.
    """
    if baseline.examples != compressed.examples or baseline.labels != compressed.labels:
        raise InputError(
            f"the drop needs both models on the same examples in the same order; "
            f"found {baseline.examples} and {compressed.examples} examples"
            + ("" if baseline.examples != compressed.examples else " with different labels")
        )
    if _is_binary(baseline.correct) and _is_binary(compressed.correct):
        before, after = baseline.correct.astype(bool), compressed.correct.astype(bool)
        lost, won = int(np.count_nonzero(before & ~after)), int(np.count_nonzero(after & ~before))
        points, limits = (lost - won) / len(before), tango(lost, won, len(before))
    else:
        differences = baseline.correct.astype(np.float64) - compressed.correct.astype(np.float64)
        points, limits = float(differences.mean()), bootstrap(differences, seed=seed)
    return Drop(points=100 * points, ci95=(100 * limits[0], 100 * limits[1]))


def tango(lost: int, won: int, pairs: int, z: float = Z95) -> tuple[float, float]:
    """Compute Tango's score interval for the difference of two paired proportions.

    Tango (1998, "Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design", Statistics in Medicine 17): all ``λ`` for which

        ``|lost - won - n·λ| / sqrt(n·(2·q(λ) + λ·(1 - λ))) ≤ z``

    where ``q`` is the maximum-likelihood share of ``won`` under a difference of ``λ``. It depends
    on the discordant pairs alone, and stays sound where there are few of them, or none.

    Args:
        lost: pairs that only the first got right.
        won: pairs that only the second got right.
        pairs: all pairs.
        z: quantile of the normal distribution.

    Returns:
        The limits of (lost - won) / pairs, as shares.
    """
    estimate = (lost - won) / pairs

    def excess(difference: float) -> float:
        # Squared, the statistic has no pole at ±1, where the variance vanishes.
        a = 2 * pairs
        b = -lost - won + (2 * pairs - lost + won) * difference
        c = -won * difference * (1 - difference)
        q = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = pairs * (2 * q + difference * (1 - difference))
        return (lost - won - pairs * difference) ** 2 - z * z * variance

    # With no discordant pair, or nothing else, the estimate itself is a root, but not a limit.
    low = -1.0 if estimate == -1 else brentq(excess, -1.0, estimate - _OFF)
    high = 1.0 if estimate == 1 else brentq(excess, estimate + _OFF, 1.0)
    return low, high


def _is_binary(values: np.ndarray) -> bool:
    return values.dtype == np.bool_ or bool(np.isin(values, (0, 1)).all())


def _finite(outputs: np.ndarray, index: int) -> np.ndarray:
    for output in outputs if isinstance(outputs, list | tuple) else (outputs,):
        if np.issubdtype(np.asarray(output).dtype, np.floating) and np.isnan(output).any():
            raise ModelError(f"batch {index}: the model's output holds NaN; look for NaN or Inf in its weights")
    return outputs


def _per_example(values: np.ndarray, expected: int, index: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (expected,):
        expectation = f"one value an example, shape ({expected},)"
        raise InputError(f"batch {index}: the metric must give {expectation}; it gave shape {values.shape}")
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise InputError(f"batch {index}: the metric gave NaN or Inf")
    return values


def _bytes(labels: np.ndarray) -> bytes:
    kind = np.int64 if np.issubdtype(labels.dtype, np.integer) else np.float64
    return np.ascontiguousarray(labels, dtype=kind).tobytes()
