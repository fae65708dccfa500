"""Laws of the refit after pruning: exact where it can be, never a mere copy of what was cut, inputs untouched."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kompakt.build.prune import apply_prune, removal
from kompakt.build.reconstruct import Fit, reconstruct
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.plan.plan import Plan
from kompakt.zoo import resnet20

Batches = list[tuple[Tensor, Tensor]]


def network(bias: bool, norm: bool) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, bias=bias)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    net = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    if norm:
        net.train()
        for _ in range(10):
            net(torch.randn(16, 3, 8, 8))
    return net.eval()


def data() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.zeros(16)) for _ in range(4)]


def cut(net: nn.Module, places: list[int]) -> tuple[Coupling, Plan, nn.Module]:
    example = torch.zeros(2, 3, 8, 8)
    coupling = couple(trace(net, example).graph)
    plan = removal(coupling, {"0": places})
    return coupling, plan, apply_prune(net, plan, example).eval()


def error(net: nn.Module, made: nn.Module) -> float:
    with torch.no_grad():
        return float(sum((net(x) - made(x)).square().sum() for x, _ in data()))


def channel_errors(net: nn.Module, made: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.stack([(net(x) - made(x)).square().sum((0, 2, 3)) for x, _ in data()]).sum(0)


def test_fit_is_least_squares_with_an_intercept() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 5, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    fit = Fit(
        xx=x.new_zeros(5, 5),
        xy=x.new_zeros(5, 2),
        x=x.new_zeros(5),
        y=x.new_zeros(2),
    )
    fit.add(x[:20], y[:20])
    fit.add(x[20:], y[20:])
    weight, shift = fit.solve(torch.zeros(2, 5), 0.0)
    naive = torch.linalg.lstsq(torch.cat([x, x.new_ones(50, 1)], 1), y).solution
    torch.testing.assert_close(weight, naive[:5].T)
    torch.testing.assert_close(shift, naive[5])


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_channel_that_others_can_replace_is_replaced(bias: bool, norm: bool) -> None:
    net = network(bias, norm)
    with torch.no_grad():  # channel 5 is twice channel 1
        net[0].weight[5], net[0].bias[5] = 2 * net[0].weight[1], 2 * net[0].bias[1]
    coupling, plan, pruned = cut(net, [5])
    made = reconstruct(net, pruned, coupling, plan, data(), damp=1e-6)
    assert error(net, pruned) > 1e-3
    assert error(net, made) < 1e-5 * error(net, pruned)


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True), (False, False)])
def test_every_channel_comes_nearer_than_by_the_cut_alone(bias: bool, norm: bool) -> None:
    """No other weights do better on the refitted layer's outputs, the cut ones among them."""
    net = network(bias, norm)
    coupling, plan, pruned = cut(net, [0, 3, 6])
    made = reconstruct(net, pruned, coupling, plan, data(), damp=0.0)
    last = 4 if norm else 3
    assert (channel_errors(net[:last], made[:last]) < channel_errors(net[:last], pruned[:last])).all()
    assert error(net, made) < error(net, pruned)


def test_models_are_left_as_they_were() -> None:
    net = network(bias=False, norm=True)
    coupling, plan, pruned = cut(net, [0, 3])
    before = [copy.deepcopy(model.state_dict()) for model in (net, pruned)]
    reconstruct(net, pruned, coupling, plan, data())
    for model, state in zip((net, pruned), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_nothing_removed_changes_nothing() -> None:
    net = network(bias=True, norm=True)
    coupling = couple(trace(net, torch.zeros(2, 3, 8, 8)).graph)
    made = reconstruct(net, net, coupling, Plan(), data())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in made.state_dict().items())


def test_no_batch_is_refused() -> None:
    net = network(bias=True, norm=False)
    coupling, plan, pruned = cut(net, [0])
    with pytest.raises(InputError, match="no batch"):
        reconstruct(net, pruned, coupling, plan, [])


def test_a_dimension_that_several_groups_cut_is_refitted_whole() -> None:
    torch.manual_seed(0)
    net = resnet20(width=8).eval()
    example = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    coupling = couple(trace(net, example[:2]).graph)
    plan = removal(coupling, {group.name: [0] for group in coupling.groups})
    pruned = apply_prune(net, plan, example).eval()
    made = reconstruct(net, pruned, coupling, plan, [(example, torch.zeros(8))])
    shapes = {name: value.shape for name, value in pruned.state_dict().items()}
    assert {name: value.shape for name, value in made.state_dict().items()} == shapes
    assert torch.isfinite(made(example)).all()


@pytest.mark.parametrize("most", [1, 2**28])
def test_what_is_held_together_and_activations_in_place_change_nothing(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    net, made = nn.Sequential(*layers).eval(), []
    for inplace in (False, True):
        for place in (1, 3):
            net[place] = nn.ReLU(inplace=inplace)
        coupling = couple(trace(net, torch.zeros(2, 3, 8, 8)).graph)
        plan = removal(coupling, {"0": [1, 5], "2": [0, 3]})
        if inplace:
            monkeypatch.setattr("kompakt.build.reconstruct.MOST_BYTES", most)
        made.append(reconstruct(net, apply_prune(net, plan), coupling, plan, data()).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
