"""Laws of sparse training: what it zeroes is exactly zero, is removed, and the outputs stay as they were."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kompakt.build.penalty import GROWTH, Kind, Penalty, lowest, scales
from kompakt.build.prune import apply_prune
from kompakt.build.train import Hooks, train
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.methods.scores import unit_scores
from kompakt.methods.zeros import without_zeros, zero_units
from kompakt.plan.plan import Prune
from tests.nets import Residual
from tests.train_toy import toy_loader, toy_settings

STRONG: dict[Kind, float] = {"l1": 0.02, "bn_l1": 1.0, "group_lasso": 0.03, "greg": 2.0}


def net() -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = Residual(classes=4, width=16).eval()
    return model, couple(trace(model, example()).graph)


def example() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def sparse_trained(kind: Kind, epochs: int = 12) -> tuple[nn.Module, Coupling]:
    model, coupling = net()
    settings = toy_settings(epochs=epochs, ema=None, learning_rate=0.02, weight_decay=0.0)
    scores = unit_scores(coupling, model.state_dict())
    penalty = Penalty(
        kind=kind,
        strength=STRONG[kind],
        coupling=coupling,
        settings=settings,
        steps=epochs * toy_loader().steps,
        chosen=lowest(scores, 0.5) if kind == "greg" else {},
    )
    train(model, toy_loader(), settings, regularizers=(penalty.term,), hooks=Hooks(after_step=(penalty.after_step,)))
    return model.eval(), coupling


@pytest.mark.parametrize("kind", ["bn_l1", "group_lasso", "greg"])
def test_zeroed_groups_removed_leave_outputs_unchanged(kind: Kind) -> None:
    model, coupling = sparse_trained(kind)
    plan, left = without_zeros(model, coupling, example())
    assert plan.of(Prune)
    assert not left
    made = apply_prune(model, plan, example())
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(made(example()), model(example()), rtol=0, atol=1e-5)


def test_l1_zeroes_single_weights_exactly() -> None:
    model, _ = sparse_trained("l1")
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert zeros > 100
    before = net()[0]
    assert not any(bool((p == 0).any()) for p in before.parameters() if p.ndim > 1)


def test_growing_regularisation_removes_what_was_chosen_and_no_other() -> None:
    chosen = lowest(unit_scores(net()[1], net()[0].state_dict()), 0.5)
    model, coupling = sparse_trained("greg")
    found = zero_units(coupling, model.state_dict())
    assert {name: sorted(gone.nonzero().flatten().tolist()) for name, gone in chosen.items()} == found
    assert 0 < GROWTH < 1


def test_without_a_penalty_nothing_is_zero() -> None:
    model, coupling = net()
    assert zero_units(coupling, model.state_dict()) == {}
    plan, _ = without_zeros(model, coupling, example())
    assert plan.entries == ()


def test_a_scale_of_zero_alone_is_no_zero_channel() -> None:
    """A batch norm's shift goes on being added: only with scale and shift gone does the channel say nothing."""
    model, coupling = net()
    with torch.no_grad():
        for name, beta in scales(coupling).items():
            model.get_parameter(name)[3] = 0
            model.get_parameter(beta)[3] = 0.5
    assert zero_units(coupling, model.state_dict()) == {}


class Normed(nn.Module):
    """Channels that pass through a group norm: each one changes the others' scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()).mean((2, 3))


def test_zero_channels_that_others_depend_on_stay_and_are_said() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    with torch.no_grad():
        for parameter in (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias):
            parameter[2] = 0
    before = copy.deepcopy(model.state_dict())
    plan, left = without_zeros(model, couple(trace(model, example()).graph), example())
    assert not plan.of(Prune)
    assert [item.name for item in left] == ["first"]
    assert "outputs change" in left[0].reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bad_strengths_and_models_are_refused() -> None:
    coupling = net()[1]
    with pytest.raises(InputError, match="expected a positive number"):
        Penalty(kind="l1", strength=0.0, coupling=coupling, settings=toy_settings(), steps=1, chosen={})
    plain = couple(trace(nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Linear(8, 4)), example()).graph)
    with pytest.raises(InputError, match="no batch norm"):
        Penalty(kind="bn_l1", strength=0.1, coupling=plain, settings=toy_settings(), steps=1, chosen={})
