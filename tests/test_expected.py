"""The drop that two classifiers expect: fitted probabilities tell a drop with less noise than a count."""

import numpy as np
import pytest
from scipy.special import softmax

from kompakt.measure.accuracy import Outputs, score
from kompakt.measure.expected import beliefs, stacked

CLASSES, EXAMPLES = 10, 500


def drawn(seed: int, sharpness: float = 1.0, examples: int = EXAMPLES) -> tuple[Outputs, np.ndarray, np.ndarray]:
    """Draw labels from known probabilities, which the classifier sharpens; also another's outputs, and the truth."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((examples, CLASSES))
    truth = softmax(logits, axis=1)
    labels = np.array([rng.choice(CLASSES, p=row) for row in truth])
    other = logits + 0.7 * rng.standard_normal(logits.shape)
    return Outputs(outputs=sharpness * logits, labels=labels), other, truth


def true_points(truth: np.ndarray, other: np.ndarray) -> float:
    rows = np.arange(len(truth))
    return float(100 * (truth.max(axis=1) - truth[rows, other.argmax(axis=1)]).mean())


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_probabilities_are_calibrated(sharpness: float) -> None:
    seen, _, truth = drawn(0, sharpness, 4000)
    noise = np.random.default_rng(1).standard_normal(truth.shape)
    assert np.abs(stacked([seen.outputs, noise], seen.labels) - truth).mean() < 0.01


def test_who_knows_what_the_other_does_not_is_believed() -> None:
    rng = np.random.default_rng(0)
    one, two = 2 * rng.standard_normal((2, 4000, CLASSES))
    truth = softmax(one + 0.6 * two, axis=1)
    labels = np.array([rng.choice(CLASSES, p=row) for row in truth])
    other = one + 1.2 * two
    rows = np.arange(len(labels))
    true = float(100 * (truth[rows, one.argmax(axis=1)] - truth[rows, other.argmax(axis=1)]).mean())
    found = beliefs(Outputs(outputs=one, labels=labels))
    alone, both = (found.expect(other, taught=taught) for taught in (False, True))
    assert abs(both - true) < 1.5 < abs(alone - true)


@pytest.mark.parametrize("taught", [False, True])
def test_what_is_expected_is_nearer_to_the_truth_than_a_count(taught: bool) -> None:
    counted, expected = [], []
    for seed in range(30):
        seen, other, truth = drawn(seed, 2.0)
        right = [(outputs.argmax(axis=1) == seen.labels).mean() for outputs in (seen.outputs, other)]
        true = true_points(truth, other)
        counted.append(abs(100 * (right[0] - right[1]) - true))
        expected.append(abs(beliefs(seen).expect(other, taught=taught) - true))
    assert np.mean(expected) < 0.5 * np.mean(counted)


def test_who_agrees_loses_nothing() -> None:
    seen, _, _ = drawn(0)
    assert beliefs(seen).expect(seen.outputs, taught=True) == 0.0


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (np.zeros((4, 1)), np.zeros(4, dtype=np.int64)),
        (np.zeros((4, 3, 2)), np.zeros(4, dtype=np.int64)),
        (np.zeros((4, 3)), np.zeros(4)),
        (np.zeros((4, 3)), np.full(4, 3)),
        (np.zeros((4, 3)), np.full(4, -1)),
        (np.zeros((4, 3)), np.zeros((4, 2), dtype=np.int64)),
    ],
)
def test_what_is_no_classifier_believes_nothing(outputs: np.ndarray, labels: np.ndarray) -> None:
    assert beliefs(Outputs(outputs=outputs, labels=labels)) is None


def test_a_classifier_that_is_always_right_is_believed() -> None:
    labels = np.arange(40) % 4
    sure = 5.0 * np.eye(4)[labels]
    assert stacked([sure], labels).max(axis=1).min() > 0.999


def test_outputs_are_kept_where_asked_for() -> None:
    batches = [(np.eye(3)[[0, 1]], np.array([0, 1])), (np.eye(3)[[2]], np.array([1]))]
    assert score(lambda x: x, batches).seen is None
    found = score(lambda x: x, batches, keep=True)
    assert found.seen.outputs.shape == (3, 3)
    assert found.seen.labels.tolist() == [0, 1, 1]
    assert found.correct.tolist() == [True, True, False]
