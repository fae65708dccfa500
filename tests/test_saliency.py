import pytest
import torch

from kompakt.errors import InputError
from kompakt.numerics.saliency import (
    NORMALISATIONS,
    REDUCTIONS,
    SALIENCIES,
    apoz,
    channel_rows,
    channel_scores,
    damped,
    geometric_median,
    l1,
    l2,
    lamp,
    normalise,
    obd,
    obs,
    reduce,
    sensitivity,
    taylor,
    taylor_abs,
    taylor_sum_abs,
    wanda,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def inputs(generator, c=6, k=10):
    moment = torch.randn(50, k, generator=generator)
    return {
        "weight": torch.randn(c, k, generator=generator),
        "grad": torch.randn(c, k, generator=generator),
        "scale": torch.randn(c, generator=generator),
        "curvature": torch.rand(c, k, generator=generator),
        "hessian": 2 * moment.T @ moment / 50,
        "activations": torch.randn(c, 40, generator=generator).relu(),
        "input_norm": torch.rand(k, generator=generator),
        "generator": generator,
    }


@pytest.mark.parametrize("name", SALIENCIES)
def test_every_criterion_scores_every_channel_and_is_never_negative(name, generator):
    scores = channel_scores(name, **inputs(generator))
    assert scores.shape == (6,)
    assert (scores >= 0).all()


@pytest.mark.parametrize("name", [name for name in SALIENCIES if name != "random"])
def test_permuting_channels_permutes_scores(name, generator):
    given = inputs(generator)
    order = torch.randperm(6, generator=generator)
    permuted = {
        key: value[order] if key in ("weight", "grad", "scale", "curvature", "activations") else value
        for key, value in given.items()
    }
    torch.testing.assert_close(channel_scores(name, **permuted), channel_scores(name, **given)[order])


@pytest.mark.parametrize(
    "name", ["l1", "l2", "taylor", "taylor_sum_abs", "magnitude", "sensitivity", "obd", "obs", "wanda"]
)
def test_a_zero_channel_scores_zero(name, generator):
    given = inputs(generator)
    given["weight"][2] = 0
    scores = channel_scores(name, **given)
    assert scores[2] == 0
    assert (scores[torch.arange(6) != 2] > 0).all()


def test_channel_rows_against_naive():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    rows = channel_rows(weight, dim=1)
    for c in range(3):
        assert rows[c].tolist() == weight[:, c].flatten().tolist()
    flat = torch.arange(4 * 6).reshape(4, 6)
    split = channel_rows(flat, dim=1, channels=3)
    for c in range(3):
        assert sorted(split[c].tolist()) == sorted(flat[:, 2 * c : 2 * c + 2].flatten().tolist())
    with pytest.raises(InputError, match="not a multiple of 4 channels"):
        channel_rows(flat, dim=1, channels=4)


def test_norms_and_taylor_against_naive(generator):
    given = inputs(generator)
    w, g = given["weight"], given["grad"]
    for c in range(6):
        pairs = list(zip(w[c].tolist(), g[c].tolist(), strict=True))
        assert l1(w)[c].item() == pytest.approx(sum(abs(a) for a, _ in pairs), rel=1e-5)
        assert l2(w)[c].item() == pytest.approx(sum(a * a for a, _ in pairs) ** 0.5, rel=1e-5)
        assert taylor(w, g)[c].item() == pytest.approx(sum(a * b for a, b in pairs) ** 2, rel=1e-4)
        assert taylor_abs(w, g)[c].item() == pytest.approx(abs(sum(a * b for a, b in pairs)), rel=1e-4)
        assert taylor_sum_abs(w, g)[c].item() == pytest.approx(sum(abs(a * b) for a, b in pairs), rel=1e-5)
    several = torch.stack([g, 2 * g])
    torch.testing.assert_close(taylor(w, several), 2.5 * taylor(w, g))
    torch.testing.assert_close(taylor_abs(w, several), 1.5 * taylor_abs(w, g))


def test_geometric_median_prefers_to_drop_a_duplicate_in_the_middle():
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    scores = geometric_median(weight)
    assert set(scores.argsort()[:2].tolist()) == {0, 1}
    assert scores[0] == scores[1] == 5.0


def test_first_order_scores_predict_the_change_of_a_linear_loss(generator):
    w = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    slope = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    for c in range(4):
        cut = w.clone()
        cut[c] = 0
        change = (slope * cut).sum() - (slope * w).sum()
        torch.testing.assert_close(taylor(w, slope)[c], change**2)
    torch.testing.assert_close(sensitivity(w, slope), (slope * w).abs())


def test_obd_is_the_change_of_a_diagonal_quadratic_at_its_minimum(generator):
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    h = torch.rand(12, generator=generator, dtype=torch.float64)
    for i in range(12):
        moved = w.clone()
        moved[i] = 0
        assert obd(w, h)[i].item() == pytest.approx((0.5 * h * (moved - w) ** 2).sum().item())


def test_obs_is_the_loss_after_the_others_are_mended(generator):
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    hessian = 2 * x.T @ x / 40
    w = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    scores = obs(w, hessian, damp=0.0)
    for j in range(6):
        rest = [i for i in range(6) if i != j]
        target = x @ w[0]
        mended = torch.linalg.lstsq(x[:, rest], target[:, None]).solution
        loss = (x[:, rest] @ mended - target[:, None]).square().sum() / 40
        assert scores[0, j].item() == pytest.approx(loss.item(), rel=1e-8)


def test_obs_survives_dead_inputs_and_refuses_nan():
    hessian = torch.diag(torch.tensor([2.0, 0.0, 1.0]))
    assert torch.isfinite(obs(torch.ones(2, 3), hessian)).all()
    assert torch.isfinite(obs(torch.ones(2, 3), torch.zeros(3, 3))).all()
    with pytest.raises(InputError, match="NaN or infinity"):
        damped(torch.full((2, 2), float("nan")), 0.01)
    with pytest.raises(InputError, match="square"):
        damped(torch.zeros(2, 3), 0.01)


def test_lamp_against_naive_and_never_empties_a_layer(generator):
    w = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    flat = w.flatten().tolist()
    expected = [v * v / sum(u * u for u in flat if u * u >= v * v) for v in flat]
    torch.testing.assert_close(lamp(w).flatten(), torch.tensor(expected, dtype=torch.float64))
    assert lamp(w * 1e-6).max() == 1
    assert lamp(torch.zeros(4)).tolist() == [0, 0, 0, 0]


def test_lamp_orders_as_magnitude_within_a_layer(generator):
    w = torch.randn(100, generator=generator)
    assert lamp(w).argsort().tolist() == w.abs().argsort().tolist()


def test_apoz_and_wanda():
    assert apoz(torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [0.5, 0.0]
    assert wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5])).tolist() == [[3.0, 1.0]]


def test_random_is_seeded():
    w = torch.zeros(5, 2)
    first = channel_scores("random", weight=w, generator=torch.Generator().manual_seed(3))
    again = channel_scores("random", weight=w, generator=torch.Generator().manual_seed(3))
    other = channel_scores("random", weight=w, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("how", REDUCTIONS)
def test_reducing_one_member_keeps_its_scores(how):
    scores = torch.tensor([3.0, 1.0, 2.0])
    torch.testing.assert_close(reduce([scores], how), scores)


def test_reductions_against_naive():
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0])
    expected = {
        "sum": [7, 3],
        "mean": [3.5, 1.5],
        "max": [4, 2],
        "norm": [5, 5**0.5],
        "first": [3, 1],
        "product": [12, 2],
    }
    assert expected.keys() == REDUCTIONS.keys()
    for how, values in expected.items():
        torch.testing.assert_close(reduce([a, b], how), torch.tensor([float(v) for v in values]))


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_normalisation_keeps_the_order_and_survives_dead_groups(how):
    scores = torch.tensor([3.0, 1.0, 2.0, 8.0])
    assert normalise(scores, how, size=9).argsort().tolist() == scores.argsort().tolist()
    assert torch.isfinite(normalise(torch.zeros(4), how, size=9)).all()


def test_normalisations_against_naive():
    scores = torch.tensor([1.0, 3.0])
    expected = {"none": [1, 3], "mean": [0.5, 1.5], "max": [1 / 3, 1], "sum": [0.25, 0.75], "standardise": [-1, 1]}
    for how, values in expected.items():
        torch.testing.assert_close(normalise(scores, how), torch.tensor([float(v) for v in values]))
    torch.testing.assert_close(normalise(scores, "size", size=2), scores / 2)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="nearest are taylor"):
        channel_scores("tailor", weight=torch.zeros(2, 2))
    with pytest.raises(InputError, match="missing: grad"):
        channel_scores("taylor", weight=torch.zeros(2, 2))
    with pytest.raises(InputError, match="NaN or infinite"):
        channel_scores("l1", weight=torch.full((2, 2), float("nan")))
    with pytest.raises(InputError, match=r"lengths \[2, 3\]"):
        reduce([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(InputError, match="use sum, mean"):
        reduce([torch.zeros(2)], "median")
    with pytest.raises(InputError, match="use none, mean"):
        normalise(torch.zeros(2), "median")
    with pytest.raises(InputError, match="0 parameters"):
        normalise(torch.zeros(2), "size", size=0)
