"""The drop that fitted probabilities expect: less noisy than a count of rights and wrongs.

On n labelled examples a count tells a drop to about 100·√(d/n) points, d the share on which two models differ; the best
of many candidates is then the luckiest. Probabilities that are fitted to the same labels say how likely each class was,
and so do not depend on which way the labels fell. A candidate that was not trained knows nothing that the original does
not; one that was trained is right more often, where it differs, than the original believes, and has as much of a say as
the labels give it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from kompakt.measure.accuracy import Outputs

MOST = 20.0
"""The largest weight of a classifier's outputs: one that is always right would have no bound."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Beliefs:
    """What a classifier said of labelled examples.

    Args:
        outputs: shape (n, classes), before the softmax.
        labels: shape (n,).
    """

    outputs: np.ndarray
    labels: np.ndarray

    def expect(self, outputs: np.ndarray, *, taught: bool) -> float:
        """Expect how many points another classifier loses: ``100·mean(p(this one's class) − p(the other's class))``.

        Args:
            outputs: of the other, shape (n, classes), on the same examples.
            taught: whether the other was trained: ``p`` is then fitted to both, else to this one alone.

        Example:
            >>> sure, labels = np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 1])
            >>> round(Beliefs(outputs=sure, labels=labels).expect(sure[::-1], taught=False), 3)  # wrong twice
            100.0
        """
        rows = np.arange(len(self.labels))
        likely = stacked([self.outputs, outputs] if taught else [self.outputs], self.labels)
        return float(100 * (likely[rows, self.outputs.argmax(axis=1)] - likely[rows, outputs.argmax(axis=1)]).mean())


def stacked(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Fit probabilities to labels: ``softmax(Σ aᵢ·outputsᵢ)``, the aᵢ ≥ 0 of the least negative log-likelihood.

    Stacking of classifiers (Wolpert 1992); of one alone, ``1/a`` is the temperature of Guo et al. 2017
    (arXiv:1706.04599).

    Args:
        outputs: of every classifier, before the softmax, shape (n, classes).
        labels: shape (n,).

    Returns:
        Shape (n, classes).
    """
    parts, rows = np.stack(outputs).astype(np.float64), np.arange(len(labels))
    right = parts[:, rows, labels]

    def surprise(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.tensordot(weights, parts, 1), axis=1)
        slope = (np.exp(logs) * parts).sum(axis=2) - right
        return -float(logs[rows, labels].mean()), slope.mean(axis=1)

    found = minimize(surprise, np.full(len(parts), 0.5), jac=True, bounds=[(0.0, MOST)] * len(parts))
    return np.asarray(softmax(np.tensordot(found.x, parts, 1), axis=1))


def beliefs(seen: Outputs) -> Beliefs | None:
    """Take what a classifier said of labelled examples.

    Args:
        seen: its outputs and the labels.

    Returns:
        None where the outputs are not those of a classifier: not one row of classes an example, or labels of no class.
    """
    outputs, labels = seen.outputs, seen.labels
    integers = np.issubdtype(labels.dtype, np.integer)
    if outputs.ndim != 2 or outputs.shape[1] < 2 or labels.shape != outputs.shape[:1] or not integers:
        return None
    if labels.min() < 0 or labels.max() >= outputs.shape[1]:
        return None
    return Beliefs(outputs=outputs, labels=labels)
