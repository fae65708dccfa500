"""Laws of the distillation losses: zero at equality, equal to a naive reference, the papers' invariances."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kompakt.errors import InputError
from kompakt.numerics.losses import (
    LABEL_LOSSES,
    LOGIT_LOSSES,
    LOSSES,
    attention,
    decoupled,
    dist,
    fsp,
    hint,
    relational,
    similarity,
    soft_targets,
    standardize,
)

N, K = 6, 5
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def maps(seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(N, width, 3, 2, generator=torch.Generator().manual_seed(seed))


def sides(name: str, seed: int):
    """One side's argument for a loss: logits, a map, or two of them."""
    if name in LOGIT_LOSSES:
        return logits(seed)
    return (maps(seed), maps(seed + 100, 3)) if name == "fsp" else maps(seed)


def call(name: str, teacher, student) -> torch.Tensor:
    return LOSSES[name](teacher, student, *((LABELS,) if name in LABEL_LOSSES else ()))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def naive_soft_targets(t, s):
    p, q = softmax(t / 4), softmax(s / 4)
    return 16 * sum(sum(p[n, k] * np.log(p[n, k] / q[n, k]) for k in range(K)) for n in range(N)) / N


def naive_decoupled(t, s):
    total = 0.0
    for n, y in enumerate(LABELS.tolist()):
        p, q = softmax(t[n] / 4), softmax(s[n] / 4)
        target = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        p, q = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
        total += 16 * (target + 8 * np.sum(p * np.log(p / q)))
    return total / N


def naive_dist(t, s):
    p, q = softmax(t), softmax(s)
    rows = np.mean([np.corrcoef(p[n], q[n])[0, 1] for n in range(N)])
    columns = np.mean([np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(K)])
    return (1 - rows) + (1 - columns)


def naive_attention(t, s):
    total = 0.0
    for n in range(N):
        a, b = (np.square(x[n]).sum(axis=0).ravel() for x in (t, s))
        total += np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum()
    return total / N


def naive_hint(t, s):
    return 0.5 * np.mean((t - s) ** 2)


def naive_fsp(t, s):
    def gram(a, b, n):
        return [[np.sum(a[n, i] * b[n, j]) / 6 for j in range(b.shape[1])] for i in range(a.shape[1])]

    return np.mean([np.square(np.subtract(gram(*t, n), gram(*s, n))) for n in range(N)])


def naive_similarity(t, s):
    def gram(x):
        g = [[np.sum(x[i] * x[j]) for j in range(N)] for i in range(N)]
        return np.array([row / np.linalg.norm(row) for row in g])

    return np.square(gram(t) - gram(s)).sum() / N**2


def naive_relational(t, s):
    def relations(x):
        x = x.reshape(N, -1)
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        e = [[[0.0 if j in (i, k) else (x[i] - x[j]) @ (x[k] - x[j]) / d[i, j] / d[k, j] for k in range(N)]
              for i in range(N)] for j in range(N)]  # fmt: skip
        return d / d[d > 0].mean(), np.array(e)

    def huber(a, b):
        gap = np.abs(a - b)
        return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()

    (d_t, a_t), (d_s, a_s) = relations(t), relations(s)
    return huber(d_t, d_s) + 2 * huber(a_t, a_s)


NAIVE = {name.removeprefix("naive_"): f for name, f in list(globals().items()) if name.startswith("naive_")}


def to_numpy(side):
    return tuple(x.double().numpy() for x in side) if isinstance(side, tuple) else side.double().numpy()


def test_every_loss_has_a_reference():
    assert NAIVE.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_naive_reference(name):
    teacher, student = sides(name, 1), sides(name, 2)
    expected = NAIVE[name](to_numpy(teacher), to_numpy(student))
    assert call(name, teacher, student).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_is_zero_at_equality_and_positive_elsewhere(name):
    assert call(name, sides(name, 1), sides(name, 1)).item() == pytest.approx(0, abs=1e-5)
    for seed in range(2, 6):
        assert call(name, sides(name, 1), sides(name, seed)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_flows_into_the_student_alone(name):
    teacher, student = sides(name, 1), sides(name, 2)
    leaves = [x.requires_grad_() for side in (teacher, student) for x in (side if isinstance(side, tuple) else (side,))]
    call(name, teacher, student).backward()
    half = len(leaves) // 2
    assert all(x.grad is None for x in leaves[:half])
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().max() > 0 for x in leaves[half:])


@pytest.mark.parametrize("name", LOSSES)
def test_descent_leads_to_the_teacher(name):
    teacher, student = sides(name, 1), sides(name, 2)
    leaves = [x.requires_grad_() for x in (student if isinstance(student, tuple) else (student,))]
    before = call(name, teacher, student).item()
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = call(name, teacher, student)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before


def test_attention_and_similarity_do_not_ask_for_equal_widths():
    assert attention(maps(1, 4), maps(2, 7)) > 0
    assert similarity(maps(1, 4), maps(2, 7)) > 0
    assert relational(maps(1, 4), maps(2, 7)) > 0


def test_attention_lies_between_0_and_4_whatever_the_scale():
    assert attention(maps(1), 100 * maps(1)).item() == pytest.approx(0, abs=1e-5)
    assert 0 < attention(maps(1), maps(2)) < 4


def test_relational_is_free_of_scale_rotation_and_shift():
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert relational(x, 7 * x @ rotation + 3).item() == pytest.approx(0, abs=1e-5)
    assert relational(x, x.roll(1, 0)) > 0.01


def test_relational_survives_twins_in_the_batch():
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    student = x.clone().requires_grad_()
    relational(torch.randn(N, 8), student).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 10


def test_similarity_is_free_of_scale():
    assert similarity(maps(1), 5 * maps(1)).item() == pytest.approx(0, abs=1e-6)


def test_dist_asks_for_correlation_only():
    shifted = logits(1) + torch.arange(N)[:, None]
    assert dist(logits(1), shifted).item() == pytest.approx(0, abs=1e-5)
    two = torch.tensor([[0.0, 0.5], [0.0, 2.0], [0.0, 1.0]])
    assert dist(two, two, beta=1, gamma=0) < 1e-5
    assert dist(two, 2 * two, beta=1, gamma=0) < 1e-5


def test_soft_targets_and_decoupled_ignore_a_shift_of_the_logits():
    shifted = logits(1) + 9 * torch.randn(N, 1, generator=torch.Generator().manual_seed(3))
    assert soft_targets(logits(1), shifted).item() == pytest.approx(0, abs=1e-5)
    assert decoupled(logits(1), shifted, LABELS).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_with_beta_of_the_teachers_doubt_is_soft_targets(temperature):
    teacher, student = logits(1), logits(2)
    for n in range(N):
        t, s, y = teacher[n : n + 1], student[n : n + 1], LABELS[n : n + 1]
        doubt = 1 - float(F.softmax(t / temperature, dim=1)[0, y])
        apart = decoupled(t, s, y, alpha=1, beta=doubt, temperature=temperature)
        assert apart.item() == pytest.approx(soft_targets(t, s, temperature=temperature).item(), rel=1e-4)


def test_soft_targets_at_a_high_temperature_match_centred_logits():
    """Hinton et al. 2015, section 2.1: T → ∞ gives ½ · mean (t - s)² of centred logits."""
    t, s = (x - x.mean(dim=1, keepdim=True) for x in (logits(1).double(), logits(2).double()))
    expected = 0.5 * (t - s).square().mean(dim=1).mean()
    assert soft_targets(t, s, temperature=1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_standardized_logits_have_mean_0_deviation_1_and_forget_range():
    z = standardize(logits(1))
    assert z.mean(dim=1).abs().max() < 1e-6
    assert (z.std(dim=1, correction=0) - 1).abs().max() < 1e-5
    other = standardize(0.2 * logits(1) + 5)
    assert soft_targets(z, other, temperature=2.0).item() == pytest.approx(0, abs=1e-5)
    assert soft_targets(logits(1), 0.2 * logits(1), temperature=2.0) > 0.01


def test_fsp_pools_the_larger_map():
    large = torch.randn(N, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    pooled = F.adaptive_max_pool2d(large, (3, 2))
    assert fsp((large, maps(1, 3)), (pooled, maps(1, 3))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(name, temperature):
    labels = (LABELS,) if name in LABEL_LOSSES else ()
    with pytest.raises(InputError, match="temperature"):
        LOSSES[name](logits(1), logits(2), *labels, temperature=temperature)


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
def test_different_numbers_of_classes_are_refused(name):
    labels = (LABELS,) if name in LABEL_LOSSES else ()
    with pytest.raises(InputError, match="teacher has 5 classes, the student 3"):
        LOSSES[name](logits(1), logits(2)[:, :3], *labels)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="resolution"):
        attention(maps(1), maps(2)[..., :1])
    with pytest.raises(InputError, match="hint"):
        hint(maps(1), maps(2, 7))
    with pytest.raises(InputError, match="two taps"):
        fsp(maps(1), maps(2))
    with pytest.raises(InputError, match="widths"):
        fsp((maps(1), maps(1)), (maps(1, 3), maps(1)))
    with pytest.raises(InputError, match="samples"):
        similarity(maps(1), maps(2)[:3])
    with pytest.raises(InputError, match="logits"):
        soft_targets(maps(1), maps(2))
