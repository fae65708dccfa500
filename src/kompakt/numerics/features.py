"""Distillation losses on features, one pure function each.

A feature is an intermediate tensor, shape (N, C, H, W), or anything with the batch first where a
function says so. The teacher's is a constant: no gradient flows into it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kompakt.errors import InputError


def attention(teacher: Tensor, student: Tensor, *, power: float = 2.0) -> Tensor:
    """Compare where teacher and student look (Zagoruyko & Komodakis 2017, arXiv:1612.03928).

    ``mean_n ‖Q_t / ‖Q_t‖ - Q_s / ‖Q_s‖‖²`` with the map ``Q = Σ_c |A_c|^power`` flattened: widths may
    differ, spatial sizes may not. The authors' code averages over the H·W positions as well, with a weight
    of 1000 (β); here the sum is kept, so that a weight means the same at every resolution.

    Args:
        teacher: shape (N, C, H, W).
        student: shape (N, D, H, W).

    Returns:
        A scalar between 0 and 4.

    Raises:
        InputError: the spatial sizes differ.
    """
    _check_space(teacher, student)
    expected, found = (
        F.normalize(x.abs().pow(power).sum(dim=1).flatten(1), dim=1) for x in (teacher.detach(), student)
    )
    return (expected - found).square().sum(dim=1).mean()


def hint(teacher: Tensor, student: Tensor) -> Tensor:
    """Match a feature itself (FitNets; Romero et al. 2015, arXiv:1412.6550).

    ``½ · mean (t - s)²`` over all elements (the paper sums), so that a weight does not depend on the layer's
    size. Where the widths differ the student's feature goes through a trained projection first.

    Args:
        teacher, student: the same shape, batch first.

    Raises:
        InputError: the shapes differ.
    """
    if teacher.shape != student.shape:
        raise InputError(f"hint: the teacher's tap is {_shape(teacher)}, the student's {_shape(student)}")
    return 0.5 * (teacher.detach() - student).square().mean()


def fsp(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    """Match the flow between two layers (FSP; Yim et al. 2017, "A gift from knowledge distillation").

    ``mean (G_t - G_s)²`` with ``G[i, j] = Σ_hw a[i, h, w] · b[j, h, w] / (H·W)``, the Gram matrix of the
    first and the last feature of a stage; the larger of the two is max-pooled to the smaller.

    Args:
        teacher, student: two features each, (N, C, H, W) and (N, D, H', W').

    Raises:
        InputError: not two features each, or their widths differ between teacher and student.
    """
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in (teacher, student)):
        raise InputError("fsp: expected two taps on each side, the first and the last of a stage")
    expected = _flow(teacher[0].detach(), teacher[1].detach())
    found = _flow(*student)
    if expected.shape != found.shape:
        raise InputError(f"fsp: the teacher's widths are {_shape(expected)}, the student's {_shape(found)}")
    return (expected - found).square().mean()


def _flow(a: Tensor, b: Tensor) -> Tensor:
    """Return the Gram matrices of two features, shape (N, C, D)."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (F.adaptive_max_pool2d(x, size) if tuple(x.shape[2:]) != size else x for x in (a, b))
    return torch.einsum("nchw,ndhw->ncd", a, b) / (size[0] * size[1])


def similarity(teacher: Tensor, student: Tensor) -> Tensor:
    """Preserve which samples look alike (Tung & Mori 2019, arXiv:1907.09682).

    ``‖G_t - G_s‖²_F / N²`` with ``G = A · Aᵀ``, its rows scaled to norm 1, and A the batch flattened:
    shapes may differ in everything but the batch.

    Args:
        teacher, student: batch first, any shape.

    Raises:
        InputError: the batches differ.
    """
    _check_batch(teacher, student)
    expected, found = (F.normalize(x @ x.T, dim=1) for x in (teacher.detach().flatten(1), student.flatten(1)))
    return (expected - found).square().sum() / len(student) ** 2


def relational(teacher: Tensor, student: Tensor, *, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Preserve distances and angles between samples (RKD; Park et al. 2019, arXiv:1904.05068).

    ``distance · huber(d_t - d_s) + angle · huber(cos_t - cos_s)``: ``d`` are the distances of all pairs
    divided by their mean, ``cos`` the angles of all triples. Both are free of scale, rotation and shift.
    Memory grows with N³ (N = 128: 8 MB a tensor).

    Args:
        teacher, student: batch first, any shape.

    Raises:
        InputError: the batches differ.
    """
    _check_batch(teacher, student)
    expected, cos_expected = _relations(teacher.detach().flatten(1))
    found, cos_found = _relations(student.flatten(1))
    return distance * F.smooth_l1_loss(found, expected) + angle * F.smooth_l1_loss(cos_found, cos_expected)


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances over their mean, (N, N), and cosines at j between i and k, (N, N, N) as [j, i, k].

    Everything comes from the Gram matrix, so no (N, N, features) tensor is made. Pairs that coincide get
    distance and cosine 0 and no gradient, where the root would have an infinite one.
    """
    x = x - x.mean(dim=0)
    gram = x @ x.T
    norm = gram.diagonal()
    square = norm[:, None] + norm - 2 * gram
    apart = square > 1e-6 * square.detach().mean()
    length = torch.where(apart, square, 1.0).sqrt()
    mean = (length * apart).sum() / apart.sum().clamp(min=1)
    inverse = apart / length
    dots = gram[None] - gram[:, :, None] - gram[:, None, :] + norm[:, None, None]
    return length * apart / mean.clamp(min=1e-12), dots * inverse[:, :, None] * inverse[:, None, :]


def _check_space(teacher: Tensor, student: Tensor) -> None:
    _check_batch(teacher, student)
    if teacher.shape[2:] != student.shape[2:] or teacher.ndim < 3:
        raise InputError(
            f"the teacher's tap is {_shape(teacher)}, the student's {_shape(student)}: "
            "their spatial sizes differ; tap both at the same resolution"
        )


def _check_batch(teacher: Tensor, student: Tensor) -> None:
    if len(teacher) != len(student):
        raise InputError(f"the teacher answered {len(teacher)} samples, the student {len(student)}")


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape)
