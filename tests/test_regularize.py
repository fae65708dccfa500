import pytest
import torch

from kompakt.errors import InputError
from kompakt.numerics.regularize import bn_l1, group_lasso, group_rows, growing_coefficient, growing_penalty, l1


@pytest.fixture
def group():
    """A convolution, its batch norm, and a linear layer after flatten (2×2 places a channel)."""
    generator = torch.Generator().manual_seed(0)
    conv = torch.randn(6, 4, 3, 3, generator=generator, requires_grad=True)
    gamma = torch.randn(6, generator=generator, requires_grad=True)
    linear = torch.randn(10, 24, generator=generator, requires_grad=True)
    return ((conv, 0), (gamma, 0), (linear, 1))


def test_group_lasso_against_naive(group):
    (conv, _), (gamma, _), (linear, _) = group
    expected = 0.0
    for c in range(6):
        squares = conv[c].square().sum() + gamma[c] ** 2 + linear[:, 4 * c : 4 * c + 4].square().sum()
        expected += (36 + 1 + 40) ** 0.5 * squares.sqrt()
    torch.testing.assert_close(group_lasso([group]), expected)
    torch.testing.assert_close(group_lasso([group, group]), 2 * expected)
    assert group_rows(group).shape == (6, 77)


def test_group_lasso_has_a_finite_gradient_at_zero(group):
    with torch.no_grad():
        for tensor, dim in group:
            tensor.movedim(dim, 0)[: tensor.shape[dim] // 6] = 0
    group_lasso([group]).backward()
    for tensor, dim in group:
        rows = tensor.grad.movedim(dim, 0)
        assert torch.isfinite(rows).all()
        assert not rows[: tensor.shape[dim] // 6].any()
        assert rows[tensor.shape[dim] // 6 :].all()


def test_descent_on_group_lasso_empties_whole_channels(group):
    target = group_rows(group).detach() * torch.tensor([0.01, 1, 0.01, 1, 1, 0.01])[:, None]
    for tensor, _ in group:
        tensor.data.mul_(0.5)
    optimizer = torch.optim.SGD([tensor for tensor, _ in group], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (group_rows(group) - target).square().sum() + 0.1 * group_lasso([group])).backward()
        optimizer.step()
    norms = group_rows(group).detach().norm(dim=1)
    assert (norms[[0, 2, 5]] < 0.05).all()
    assert (norms[[1, 3, 4]] > 1).all()


def test_l1_and_slimming_are_sums_of_magnitudes():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([[3.0], [-4.0]])
    assert l1([a, b]) == 10
    assert bn_l1([a]) == 3


def test_the_growing_coefficient_never_falls_and_stops_at_its_ceiling():
    values = [growing_coefficient(t, every=5, increment=1e-2, ceiling=0.1) for t in range(100)]
    assert values == sorted(values)
    assert values[:6] == [0, 0, 0, 0, 0, 0.01]
    assert values[-1] == 0.1


def test_the_growing_penalty_pulls_only_the_chosen_channels(group):
    mask = torch.tensor([True, False, False, True, False, False])
    growing_penalty([group], [mask], 0.3).backward()
    for tensor, dim in group:
        weights, grads = (each.movedim(dim, 0).reshape(6, -1) for each in (tensor, tensor.grad))
        torch.testing.assert_close(grads, 0.3 * weights * mask[:, None])


def test_bad_input_is_named(group):
    with pytest.raises(InputError, match="no tensors"):
        l1([])
    with pytest.raises(InputError, match="at least one member"):
        group_rows(())
    with pytest.raises(InputError, match="not a multiple of 6 channels"):
        group_rows((*group, (torch.zeros(7), 0)))
    with pytest.raises(InputError, match="none may be negative"):
        growing_coefficient(1, every=0, increment=1, ceiling=1)
    with pytest.raises(InputError, match="the group has 6"):
        growing_penalty([group], [torch.ones(3, dtype=torch.bool)], 1.0)
