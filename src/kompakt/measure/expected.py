"""The drop that the original expects: less noisy than counting, where its probabilities can be believed.

On n labelled examples a count of rights and wrongs tells a drop to about 100·√(d/n) points, d the share on which two
models differ; the best of many candidates is then the luckiest. The original's softmax, calibrated on the same
examples, says how likely each class was, and so does not depend on which way the labels fell.
"""

from dataclasses import dataclass
from math import exp

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from kompakt.measure.accuracy import Outputs

COOLEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Beliefs:
    """How likely a classifier takes each class of each example to be.

    Args:
        probabilities: shape (n, classes), calibrated.
        temperature: that calibrated them; above 1 where the classifier was too sure of itself.
    """

    probabilities: np.ndarray
    temperature: float

    def expect(self, outputs: np.ndarray) -> float:
        """Expect how many points another classifier loses: ``100·mean(p(its own class) − p(the other's class))``.

        Args:
            outputs: of the other, shape (n, classes), on the same examples.

        Example:
            >>> mine = Beliefs(probabilities=np.array([[0.9, 0.1], [0.4, 0.6]]), temperature=1.0)
            >>> round(mine.expect(np.array([[2.0, 1.0], [2.0, 1.0]])), 6)  # one of two differs: 0.6 for 0.4
            10.0
        """
        rows = np.arange(len(self.probabilities))
        own = self.probabilities.max(axis=1)
        return float(100 * (own - self.probabilities[rows, outputs.argmax(axis=1)]).mean())


def beliefs(seen: Outputs) -> Beliefs | None:
    """Calibrate a classifier's probabilities by one temperature (Guo et al. 2017, arXiv:1706.04599).

    ``softmax(outputs / T)`` with the T of the least negative log-likelihood of the labels.

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
    logits, rows = outputs.astype(np.float64), np.arange(len(labels))

    def surprise(log_temperature: float) -> float:
        return -float(log_softmax(logits / exp(log_temperature), axis=1)[rows, labels].mean())

    found = minimize_scalar(surprise, bounds=(np.log(COOLEST), np.log(HOTTEST)), method="bounded")
    temperature = exp(float(found.x))
    return Beliefs(probabilities=softmax(logits / temperature, axis=1).astype(np.float32), temperature=temperature)
