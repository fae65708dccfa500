"""Distillation losses on outputs, one pure function each, and ``LOSSES``: all of them by name.

Every function takes the teacher's tensor, the student's tensor and knobs, and returns a scalar that
is a mean over the batch. The teacher's tensor is a constant: no gradient flows into it. Losses on
features are in ``kompakt.numerics.features``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kompakt.errors import InputError
from kompakt.numerics.features import attention, fsp, hint, relational, similarity


def soft_targets(teacher: Tensor, student: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Compare softened class probabilities (Hinton, Vinyals & Dean 2015, arXiv:1503.02531).

    ``T² · KL(softmax(t / T) ‖ softmax(s / T))``; the factor T² keeps the gradients' scale.

    Args:
        teacher, student: logits, shape (N, K).
        temperature: T > 0; a high one weighs the unlikely classes more.

    Returns:
        A scalar, 0 where both softmaxes agree.

    Raises:
        InputError: T ≤ 0, or different numbers of classes.
    """
    _check_logits(teacher, student, temperature)
    expected = F.log_softmax(teacher.detach() / temperature, dim=1)
    found = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(found, expected, reduction="batchmean", log_target=True)


def decoupled(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Weigh target and non-target knowledge apart (DKD; Zhao et al. 2022, arXiv:2203.08679).

    ``T² (α · KL(b_t ‖ b_s) + β · KL(q_t ‖ q_s))``: ``b`` is the pair (p_label, 1 - p_label), ``q`` the
    softmax over the other classes. With α = 1 and β = 1 - p_label (the teacher's) it is ``soft_targets``.

    Args:
        teacher, student: logits, shape (N, K), K ≥ 2.
        labels: the true classes, shape (N,), int64.

    Raises:
        InputError: T ≤ 0, or different numbers of classes.
    """
    _check_logits(teacher, student, temperature)
    target_t, other_t, rest_t = _split_target(teacher.detach() / temperature, labels)
    target_s, other_s, rest_s = _split_target(student / temperature, labels)
    binary = target_t.exp() * (target_t - target_s) + other_t.exp() * (other_t - other_s)
    others = F.kl_div(rest_s, rest_t, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (alpha * binary + beta * others).mean()


def _split_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p_label (N,), log(1 - p_label) (N,) and the log-softmax of the others (N, K - 1)."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    rest = logits[others].view(len(logits), -1)
    total = logits.logsumexp(dim=1)
    target = logits.gather(1, labels[:, None]).squeeze(1)
    return target - total, rest.logsumexp(dim=1) - total, F.log_softmax(rest, dim=1)


def dist(
    teacher: Tensor, student: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Correlate predictions within samples and within classes (DIST; Huang et al. 2022, arXiv:2205.10536).

    ``T² (β · (1 - mean_n ρ(p_t[n], p_s[n])) + γ · (1 - mean_k ρ(p_t[:, k], p_s[:, k])))`` with
    ``p = softmax(logits / T)`` and Pearson's ρ: a linear relation is enough, equality is not asked for.

    Args:
        teacher, student: logits, shape (N, K).

    Raises:
        InputError: T ≤ 0, or different numbers of classes.
    """
    _check_logits(teacher, student, temperature)
    expected = F.softmax(teacher.detach() / temperature, dim=1)
    found = F.softmax(student / temperature, dim=1)
    within_samples = 1 - _pearson(expected, found).mean()
    within_classes = 1 - _pearson(expected.T, found.T).mean()
    return temperature**2 * (beta * within_samples + gamma * within_classes)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlate rows: (N, K), (N, K) → (N,)."""
    a = a - a.mean(dim=1, keepdim=True)
    b = b - b.mean(dim=1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


def standardize(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Bring every row of logits to mean 0 and deviation 1 (Sun et al. 2024, arXiv:2403.01427).

    ``(z - mean(z)) / (std(z) + eps)``. Applied to both sides before ``soft_targets`` or ``decoupled``,
    the student need only match the teacher's relations between classes, not the range of its logits.

    Args:
        logits: shape (N, K).

    Returns:
        Shape (N, K).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True, correction=0) + eps)


def _check_logits(teacher: Tensor, student: Tensor, temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature {temperature}: expected a positive number; try 4")
    if teacher.ndim != 2 or student.ndim != 2:
        raise InputError(
            f"logits of shape (N, K) are expected; the teacher's are {tuple(teacher.shape)}, "
            f"the student's {tuple(student.shape)}; distil features with another loss"
        )
    if teacher.shape[1] != student.shape[1]:
        raise InputError(
            f"the teacher has {teacher.shape[1]} classes, the student {student.shape[1]}: "
            "their outputs cannot be compared; distil features, or give both the same classes"
        )
    if len(teacher) != len(student):
        raise InputError(f"the teacher answered {len(teacher)} samples, the student {len(student)}")


LOSSES: dict[str, Callable[..., Tensor]] = {
    "soft_targets": soft_targets,
    "decoupled": decoupled,
    "dist": dist,
    "attention": attention,
    "hint": hint,
    "fsp": fsp,
    "similarity": similarity,
    "relational": relational,
}
LOGIT_LOSSES = frozenset({"soft_targets", "decoupled", "dist"})
LABEL_LOSSES = frozenset({"decoupled"})
WIDTH_LOSSES = frozenset({"hint", "fsp"})
