"""Laws of the accuracy, its interval, and the paired drop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, multinomial

from kompakt.errors import InputError, ModelError
from kompakt.measure.accuracy import Z95, Score, bootstrap, interval, paired_drop, score, tango, wilson

CLASSES = 5


def batches(labels: np.ndarray, size: int):
    """Inputs that already are one-hot outputs for the labels."""
    inputs = np.eye(CLASSES, dtype=np.float32)[labels]
    return [(inputs[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]


def labels(count: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CLASSES, count)


def graded(values, checksum: str = "") -> Score:
    return Score(correct=np.asarray(values), labels=checksum)


def test_top_1_is_the_share_of_largest_outputs_that_are_the_labels():
    def wrong_on_class_0(inputs):
        return np.where(inputs[:, :1] == 1, np.roll(inputs, 1, axis=1), inputs)

    truth = labels()
    found = score(wrong_on_class_0, batches(truth, 32))
    assert found.accuracy == pytest.approx(np.mean(truth != 0))
    assert found.examples == len(truth)
    assert np.array_equal(found.correct, truth != 0)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_score_does_not_depend_on_the_batch_size(size):
    whole, parts = score(lambda x: x, batches(labels(), 64)), score(lambda x: x, batches(labels(), size))
    assert np.array_equal(whole.correct, parts.correct)
    assert whole.labels == parts.labels


def test_a_metric_scores_what_top_1_cannot():
    truth = np.linspace(0, 1, 20).reshape(10, 2)
    found = score(lambda x: x + 0.25, [(truth, truth)], metric=lambda out, target: -np.abs(out - target).mean(axis=1))
    assert found.accuracy == pytest.approx(-0.25)


def test_nan_names_its_batch():
    def breaks_later(inputs, calls=[]):  # noqa: B006
        calls.append(1)
        return inputs * (np.nan if len(calls) == 3 else 1)

    with pytest.raises(ModelError, match=r"batch 2: .*NaN"):
        score(breaks_later, batches(labels(), 10))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda out, target: np.float64(0.5), r"batch 0: the metric must give one value an example, shape \(10,\)"),
        (lambda out, target: np.full(len(target), np.inf), "batch 0: the metric gave NaN or Inf"),
    ],
)
def test_a_metric_that_cannot_be_paired_is_refused(metric, message):
    with pytest.raises(InputError, match=message):
        score(lambda x: x, batches(labels(), 10), metric=metric)


def test_no_batches_is_an_error():
    with pytest.raises(InputError, match="gave no batch"):
        score(lambda x: x, [])


# Newcombe (1998), "Two-sided confidence intervals for the single proportion", Table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_limits(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_limits_are_the_roots_of_the_score_statistic(trials, share):
    successes = round(share * trials)
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    for limit in (low, high):
        if 0 < limit < 1:
            assert abs(successes - trials * limit) == pytest.approx(Z95 * np.sqrt(trials * limit * (1 - limit)))


def test_wilson_covers_on_average_what_it_promises():
    trials, shares = 200, np.linspace(0.5, 0.99, 50)
    limits = np.array([wilson(k, trials) for k in range(trials + 1)])
    weights = binom.pmf(np.arange(trials + 1)[:, None], trials, shares)
    covered = (limits[:, :1] <= shares) & (shares <= limits[:, 1:])
    coverage = (weights * covered).sum(axis=0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.91


def test_the_bootstrap_agrees_with_the_normal_interval_and_is_seeded():
    values = np.random.default_rng(1).gamma(2.0, size=3000)
    half = Z95 * values.std(ddof=1) / np.sqrt(len(values))
    assert interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)


def test_the_bootstrap_does_not_depend_on_its_chunks(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    whole = bootstrap(values)
    monkeypatch.setattr("kompakt.measure.accuracy._CHUNK", 1000)
    assert bootstrap(values) == whole


# (lost, won, pairs) → limits. Airway hyper-responsiveness (Bentur et al., 2009) and complete response
# (Cavo et al., 2012): Fagerland, Lydersen & Laake, "Statistical analysis of contingency tables" (2017),
# chapter 8. Soft contact lenses at 90 %: Tango (1998), section 5.
@pytest.mark.parametrize(
    ("table", "z", "limits"),
    [
        ((1, 7, 21), Z95, (-0.517, -0.026)),
        ((6, 16, 161), Z95, (-0.1240, -0.0054)),
        ((0, 1, 44), 1.6448536, (-0.096, 0.037)),
    ],
)
def test_tango_gives_the_published_limits(table, z, limits):
    digits = 5e-5 if table[2] == 161 else 5e-4
    assert tango(*table, z) == pytest.approx(limits, abs=digits)


tables = st.integers(1, 5000).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda lost: st.tuples(st.just(lost), st.integers(0, n - lost), st.just(n)))
)


@given(tables)
def test_tango_holds_the_estimate_and_turns_over_with_the_models(table):
    lost, won, pairs = table
    low, high = tango(lost, won, pairs)
    assert -1 <= low <= (lost - won) / pairs <= high <= 1
    assert low < high
    assert tango(won, lost, pairs) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize("pairs", [10, 200, 10_000])
def test_without_disagreement_tango_is_its_closed_form(pairs):
    # b = c = 0 reduces the score equation to |λ| = z² / (n + z²).
    limit = Z95**2 / (pairs + Z95**2)
    assert tango(0, 0, pairs) == pytest.approx((-limit, limit), rel=1e-9)


def naive_tango(lost: int, won: int, pairs: int) -> tuple[float, float]:
    """The set of differences that the score test accepts, found on a grid by the multinomial likelihood."""
    grid, accepted = np.linspace(-0.3, 0.3, 2401), []
    for difference in grid:
        shares = np.linspace(max(0, -difference), (1 - difference) / 2, 4001)[1:-1]  # of `won`
        others = 1 - 2 * shares - difference
        likelihood = lost * np.log(shares + difference) + won * np.log(shares) + (pairs - lost - won) * np.log(others)
        q = shares[likelihood.argmax()]
        variance = pairs * (2 * q + difference - difference**2)
        if (lost - won - pairs * difference) ** 2 <= Z95**2 * variance:
            accepted.append(difference)
    return min(accepted), max(accepted)


@pytest.mark.parametrize("table", [(8, 3, 100), (1, 7, 80), (30, 28, 200)])
def test_tango_equals_a_search_over_the_likelihood(table):
    assert tango(*table) == pytest.approx(naive_tango(*table), abs=1e-3)


@pytest.mark.parametrize(("lost", "won"), [(0.05, 0.03), (0.02, 0.02), (0.1, 0.02), (0.03, 0.005)])
def test_tango_covers_the_true_difference(lost, won):
    pairs = 200
    counts = np.stack(np.meshgrid(np.arange(50), np.arange(30), indexing="ij"), axis=-1).reshape(-1, 2)
    cells = np.column_stack([counts, pairs - counts.sum(axis=1)])
    weights = multinomial.pmf(cells, pairs, [lost, won, 1 - lost - won])
    likely = weights > 1e-9
    covered = [low <= lost - won <= high for low, high in (tango(b, c, pairs) for b, c in counts[likely])]
    coverage = (weights[likely] * covered).sum()
    assert weights[likely].sum() > 0.9999
    assert 0.93 <= coverage <= 0.99


def simulate(rng, count: int, right: float, lost: float, won: float) -> tuple[Score, Score]:
    before = rng.random(count) < right
    turns = rng.random(count)
    after = np.where(before, turns >= lost / right, turns < won / (1 - right))
    return graded(before), graded(after)


def test_the_paired_drop_covers_the_true_drop_by_simulation():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(1000):
        drop = paired_drop(*simulate(rng, 500, right=0.9, lost=0.03, won=0.02))
        covered += drop.ci95[0] <= 1.0 <= drop.ci95[1]
    assert covered / 1000 >= 0.93


def test_pairing_is_narrower_than_two_separate_intervals():
    before, after = simulate(np.random.default_rng(4), 5000, right=0.9, lost=0.01, won=0.005)
    low, high = paired_drop(before, after).ci95
    separate = 100 * np.hypot(*(np.subtract(*one.interval[::-1]) for one in (before, after)))
    assert high - low < 0.5 * separate


def test_the_drop_is_in_points_and_a_loss_is_positive():
    before, after = graded(np.ones(100, dtype=bool)), graded(np.arange(100) >= 3)
    drop, gain = paired_drop(before, after), paired_drop(after, before)
    assert drop.points == pytest.approx(3.0)
    assert gain.points == -drop.points
    assert gain.ci95 == pytest.approx((-drop.ci95[1], -drop.ci95[0]))


def test_graded_drops_are_paired_too():
    rng = np.random.default_rng(5)
    before = rng.normal(size=400)
    after = before - 0.02 + 0.01 * rng.normal(size=400)
    drop = paired_drop(graded(before), graded(after))
    assert drop.ci95[0] <= 2.0 <= drop.ci95[1]
    assert drop.ci95[1] - drop.ci95[0] < 0.5  # the spread of the scores themselves is some 20 points
    assert drop == paired_drop(graded(before), graded(after))


def test_graded_drops_cover_the_true_drop_by_simulation():
    rng, covered = np.random.default_rng(6), 0
    for trial in range(300):
        before = rng.random(200)
        after = before - 0.1 * rng.exponential(size=200)
        low, high = paired_drop(graded(before), graded(after), seed=trial).ci95
        covered += low <= 10.0 <= high
    assert covered / 300 >= 0.90  # 0.95 less three standard errors and the bootstrap's known lack at n = 200


@pytest.mark.parametrize(
    ("other", "message"),
    [(graded([1.0] * 9, "a"), "found 10 and 9 examples"), (graded([1.0] * 10, "b"), "with different labels")],
)
def test_only_the_same_examples_can_be_paired(other, message):
    with pytest.raises(InputError, match=message):
        paired_drop(graded([1.0] * 10, "a"), other)


def test_an_empty_score_is_refused():
    with pytest.raises(InputError, match="one value an example"):
        graded(np.empty(0))
