"""Laws of sparsity beyond one magnitude mask: mending on data, gradual schedules, soft masks."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from kompakt.build.masking import Moving
from kompakt.build.sparse_update import Update, sparse_updated
from kompakt.build.train import Hooks, train
from kompakt.errors import InputError
from kompakt.graph.trace import trace
from kompakt.methods.sparse import SparseKnobs, eased, masked_state, masks, sparse
from kompakt.plan.plan import Plan, Sparsify
from tests.train_toy import toy_data, toy_loader, toy_net, toy_settings


def trained() -> nn.Module:
    model = toy_net(dropout=0.0)
    train(model, toy_loader(), toy_settings(ema=None))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def planned(model: nn.Module, **knobs: object) -> Plan:
    return sparse(trace(model, toy_data()[0][:2]).graph, dict(model.named_parameters()), SparseKnobs(**knobs))[0]


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = toy_data()
    return list(zip(images.split(32), labels.split(32), strict=True))


def change(model: nn.Module, made: nn.Module) -> float:
    images = toy_data()[0]
    return float((made(images) - model(images)).detach().square().mean())


def by_magnitude(model: nn.Module, plan: Plan) -> nn.Module:
    made, tensors = copy.deepcopy(model), dict(model.named_parameters())
    made.load_state_dict(masked_state(model.state_dict(), masks(plan, tensors)))
    return made


@pytest.mark.parametrize("how", ["refit", "sparsegpt", "obc"])
@pytest.mark.parametrize("knobs", [{"sparsity": 0.6}, {"n_of_m": (2, 4)}])
def test_mending_on_data_beats_magnitude_at_equal_sparsity(model: nn.Module, how: Update, knobs: dict) -> None:
    plan = planned(model, **knobs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = sparse_updated(model, plan, batches(), how, lambda name, w: masks(plan, {**before, name: w})[name])
    plain = by_magnitude(model, plan)
    for entry in plan.of(Sparsify):
        assert int((made.get_parameter(entry.tensor) == 0).sum()) == int((plain.get_parameter(entry.tensor) == 0).sum())
    assert change(model, made) < 0.8 * change(model, plain)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["sparsegpt", "obc"])
def test_n_of_m_counts_input_channels_of_one_tap(model: nn.Module, how: Update) -> None:
    plan = planned(model, n_of_m=(2, 4))
    made = sparse_updated(model, plan, batches(), how, lambda name, w: w != 0)
    weight = made.get_parameter("3.weight")
    assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def test_what_mending_cannot_do_is_refused(model: nn.Module) -> None:
    blocks = planned(model, sparsity=0.5, block=(1, 1, 3, 3))
    with pytest.raises(InputError, match="for blocks use refit"):
        sparse_updated(model, blocks, batches(), "sparsegpt", lambda name, w: w != 0)
    with pytest.raises(InputError, match="no batch"):
        sparse_updated(model, blocks, [], "refit", lambda name, w: w != 0)


def moving(plan: Plan, steps: int, **how: bool) -> Moving:
    def chosen(tensors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        return masks(eased(plan, share), tensors)

    return Moving(masks=chosen, names=tuple(e.tensor for e in plan.of(Sparsify)), steps=steps, **how)


@pytest.mark.parametrize("soft", [False, True])
def test_a_gradual_schedule_rises_to_the_share_and_holds_it(model: nn.Module, soft: bool) -> None:
    plan, made, settings = planned(model, sparsity=0.8), copy.deepcopy(model), toy_settings(ema=None)
    run = moving(plan, settings.epochs * toy_loader().steps, gradual=True, soft=soft)
    seen: list[float] = []

    def watch(net: nn.Module, step: int) -> None:
        seen.append(float((net.get_submodule("3").weight == 0).float().mean()))

    run.attach(made)
    train(made, toy_loader(), settings, hooks=Hooks(after_step=(run.after_step, watch)))
    keep = run.detach(made)
    assert seen[0] == 0.0
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.8, abs=0.01)
    assert len({*seen}) > 5
    assert set(dict(made.named_parameters())) == set(dict(model.named_parameters()))
    assert all(torch.equal(made.get_parameter(name) != 0, mask) for name, mask in keep.items())


def test_only_soft_masks_let_a_weight_come_back(model: nn.Module) -> None:
    plan = planned(model, sparsity=0.7)
    first = masks(plan, dict(model.named_parameters()))
    back = {}
    for soft in (False, True):
        made, settings = copy.deepcopy(model), toy_settings(ema=None, learning_rate=0.1)
        run = moving(plan, settings.epochs * toy_loader().steps, soft=soft)
        run.attach(made)
        train(made, toy_loader(), settings, hooks=Hooks(after_step=(run.after_step,)))
        keep = run.detach(made)
        back[soft] = sum(int((keep[name] & ~mask).sum()) for name, mask in first.items())
    assert back[True] > 0
    assert back[False] == 0
